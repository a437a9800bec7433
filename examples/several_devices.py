r"""Trains a language model sparse by CAST, on the devices of several processes.

On each machine, with the address of the first one and a number of its own:

    export KERAS_DISTRIBUTION_JOB_ADDRESSES=first-machine:1234
    export KERAS_DISTRIBUTION_NUM_PROCESSES=2
    export KERAS_DISTRIBUTION_PROCESS_ID=0
    python -m examples.several_devices --folder /shared/run \
        --output /shared/sparse.safetensors

JAX alone; the folder is one that all machines see. The same commands, given
again after an interruption, go on after the last whole epoch. Without the
variables it is one process, with all devices that it has.

By default each device holds the model, and a share of each batch (data
parallel). `--model-parallel 4` splits each weight over 4 devices as well, by
KerasHub's layout for Llama, and what stands for weights as they are: the
teacher of CAST and the optimizer's state. The model is a tiny Llama with random
weights and random tokens, to show the way: put a preset and your rows in place
of `load_model` and `load_rows`.
"""

import os

from examples import command_line


def main():
    args = parse_arguments()
    command_line.choose_backend("jax")
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--folder", required=True, help="of the checkpoints")
    parser.add_argument("--output", default="sparse.safetensors")
    parser.add_argument("--model-parallel", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="of all")
    parser.add_argument(
        "--die-after", type=int, help="steps: an interruption, to test it"
    )
    args = parser.parse_args()
    counts = ("model_parallel", "epochs", "batch_size")
    command_line.check(parser, args, counts, files=("folder", "output"))
    return args


def run(args):
    import keras

    import keras_weightmods as kwm

    if "KERAS_DISTRIBUTION_JOB_ADDRESSES" in os.environ:
        keras.distribution.initialize()
    # The same first weights and masks in all processes.
    keras.utils.set_random_seed(0)
    distribution = make_distribution(args.model_parallel)
    keras.distribution.set_distribution(distribution)
    model = load_model()
    x, y = load_rows(distribution)

    cast = kwm.CAST(model)
    cast.compile()
    callbacks = [kwm.Checkpoint(args.folder)]
    if args.die_after:
        callbacks.append(Interruption(args.die_after))
    shards = count_of_shards(distribution)
    history = cast.fit(
        x,
        y,
        batch_size=args.batch_size // shards,
        epochs=args.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    sparse = cast.finalize()
    kwm.assert_sparse(sparse)
    # All of them call it, and the first one writes.
    kwm.save_model(sparse, args.output)
    print(f"losses: {history.history['loss']}", flush=True)


def make_distribution(model_parallel):
    """Return the distribution over all devices of all processes."""
    import keras
    import keras_hub

    devices = keras.distribution.list_devices()
    if model_parallel == 1:
        # Each process brings its own rows.
        return keras.distribution.DataParallel(
            devices=devices, auto_shard_dataset=False
        )
    shape = len(devices) // model_parallel, model_parallel
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    return keras.distribution.ModelParallel(
        layout_map=keras_hub.models.Llama3Backbone.get_layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,
    )


def count_of_shards(distribution):
    """Return over how many processes a batch is split."""
    return min(distribution.num_model_replicas, distribution.num_processes)


def load_model():
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=64,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        tie_word_embeddings=True,
    )
    return keras_hub.models.Llama3CausalLM(backbone)


def load_rows(distribution):
    """Return the inputs and labels of this process."""
    import numpy as np

    rows = np.random.default_rng(0).integers(64, size=(32, 9)).astype("int32")
    rows = rows[distribution.data_shard_id :: count_of_shards(distribution)]
    tokens = rows[:, :-1]
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return x, rows[:, 1:]


def Interruption(steps):
    """Return a callback that ends the process, as if it was killed."""
    import keras

    made = 0

    def end(batch, logs):
        nonlocal made
        made += 1
        if made == steps:
            os._exit(1)

    return keras.callbacks.LambdaCallback(on_train_batch_end=end)


if __name__ == "__main__":
    main()
