"""CAST, LIFT and packed models on a mesh of 2 x 4 devices, by JAX.

`make devices` runs it. The devices are made of one CPU, by XLA_FLAGS. Each
check compares with one device, and what a device holds with the whole. With
`--dumps`, where XLA_FLAGS tell XLA to write its programs, these are read for
what they gather.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import tempfile

import jax
import keras
import numpy as np
from keras.distribution import DeviceMesh, LayoutMap, ModelParallel

import keras_weightmods as kwm
from keras_weightmods.backend.jax import layouts
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.native.packed import pack_dense
from keras_weightmods.ops import (
    pack_kernel,
    packed_arrays,
    sparse_matmul,
    unpack_kernel,
)
from tests import references
from tests.models import causal_lm, normal, sequential
from tests.native.test_packed import kernel_of
from tests.ops.test_sparse_matmul import assert_close

CHECKS = ("products", "stacks", "lift", "cast", "language_model")
SHARE = 0.30  # of the whole, on each device
OPTIONS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dumps", type=pathlib.Path, help="of XLA's programs")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=CHECKS)
    args = parser.parse_args()
    assert jax.device_count() == 8, jax.devices()
    for name in args.checks:
        globals()[name](args.dumps)


def distribution(axes=()):
    """Return a distribution of the mesh; `axes` is a dict from paths."""
    devices = keras.distribution.list_devices()
    mesh = DeviceMesh((2, 4), ("batch", "model"), devices)
    layout_map = LayoutMap(mesh)
    for path, own in dict(axes).items():
        layout_map[f".*{path}"] = own
    return ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def share(variables):
    """Return the most that a device holds, as a share of the whole."""
    held = dict.fromkeys(jax.devices(), 0)
    for variable in variables:
        for shard in variable.value.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values()) / sum(v.value.nbytes for v in variables)


def gathered(text, dtypes="f32|bf16|s8|u8|s32"):
    """Return the sizes of what a program gathers."""
    found = re.findall(rf"= (?:{dtypes})\[([\d,]*)\]\S* all-gather", text)
    return [math.prod(map(int, filter(None, x.split(",")))) for x in found]


def products(_):
    """Products with parts of packed kernels, and their gradients."""
    kernel = kernel_of(256, 128)
    kinds = [
        pack_kernel(kernel),
        pack_kernel(kernel, "int8", "int8"),
        pack_dense(kernel, "int4"),
    ]
    own = distribution()
    with own.scope():
        for axes in ((None, "model"), ("model", "batch")):
            layout = keras.distribution.TensorLayout(axes, own.device_mesh)
            for packed in kinds:
                product(packed, split_as(packed, layout))
    print("products: equal, nothing gathered")


def split_as(packed, layout):
    about = packed.shape, packed.dtype, ("rows", "columns")
    split, left = layouts.split_of(layout, (0,), *about)
    assert not left
    specs = packed_arrays(packed.shape, packed.dtype, packed.pattern)
    arrays = {
        name: jax.device_put(getattr(packed, name), own)
        for name, own in split.layouts(specs).items()
    }
    return layouts.SplitPacked(**{**vars(packed), **arrays}, split=split)


def product(packed, split):
    w = unpack_kernel(packed).astype("float64")
    x = normal(2, 3, len(w))
    used = x.astype("float64")
    if packed.activations == "int8":
        used = references.round_activations(x)
    names = packed_arrays(packed.shape, packed.dtype, packed.pattern)

    def loss(x, *arrays):
        own = dataclasses.replace(split, **dict(zip(names, arrays)))
        y = sparse_matmul(x, own)
        return (y**2).sum(), y

    arrays = [getattr(split, name) for name in names]
    wanted = (0, 1) if packed.dtype == "float32" else 0
    gradients = jax.jit(jax.grad(loss, wanted, has_aux=True))
    compiled = gradients.lower(x, *arrays).compile()
    # Gradients of the input are sums over what splits the columns.
    assert max(gathered(compiled.as_text()), default=0) <= x.size
    found, y = compiled(x, *arrays)
    assert_close(y, used @ w)
    dx = found[0] if wanted else found
    assert_close(dx, 2 * (used @ w) @ w.T)
    if wanted:
        assert found[1].sharding.is_equivalent_to(arrays[0].sharding, 3)
        dw = 2 * np.einsum("abk,abn->kn", used, used @ w)
        kept = pack_kernel(np.where(w != 0, dw, 0).astype("float32"))
        is_kept = packed.values != 0
        expected = kept.values.astype("float64")
        assert_close(found[1] * is_kept, expected * is_kept, 1e-4)


def stacks(dumps):
    """A packed stack of kernels, each on one device, and data in parallel."""
    x = normal(8, 4, 128)
    expected = packed_stack().predict(x, verbose=0)
    devices = keras.distribution.list_devices()
    for own, most in (
        (distribution({"experts/kernel": ("model", None, None)}), SHARE),
        (keras.distribution.DataParallel(devices=devices), 1),
    ):
        with own.scope():
            model = packed_stack()
            assert share(model.variables) <= most
            found = model.predict(x, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        # Outputs are summed, inputs whole at most.
        check_programs(dumps, x.size)
    print("stacks: equal, no weights gathered")


def packed_stack():
    keras.utils.set_random_seed(0)
    experts = keras.layers.EinsumDense(
        "bge,geh->bgh", output_shape=(4, 64), name="experts"
    )
    model = sequential((4, 128), experts)
    kwm.sparsify(model, "2:4", criterion="magnitude", verbose=0)
    assert len(kwm.pack(model).weights) == 1
    return model


X, Y = normal(16, 64), normal(16, 64, seed=1)


def layers():
    keras.utils.set_random_seed(0)
    one = keras.layers.Dense(128, activation="relu", name="one")
    return sequential((64,), one, keras.layers.Dense(64, name="two"))


def on_mesh():
    columns, rows = (None, "model"), ("model", None)
    return distribution({"one/kernel": columns, "two/kernel": rows})


def fitted_lift():
    model = layers()
    optimizer = kwm.SparseAdamW(0.01, use_ema=True, weight_decay=0.1)
    model.compile(optimizer, "mse", jit_compile=True)
    mask = kwm.PrincipalMaskCallback(0.25, None, 2, 2, seed=0)
    model.fit(X, Y, callbacks=[mask], **OPTIONS)
    return model


def lift(dumps):
    """SparseAdamW, whose masks move within the run."""
    alone = fitted_lift()
    with on_mesh().scope():
        model = fitted_lift()
        state = share(model.optimizer.variables)
        assert state <= SHARE, state
    assert_equal(model, alone)
    # What one device has left as it was is so here, bit for bit.
    for new, other, old in zip(
        *(m.get_weights() for m in (model, alone, layers())), strict=True
    ):
        is_left = other == old
        assert is_left.any()
        np.testing.assert_array_equal(new[is_left], old[is_left])
    for kernel in model.optimizer.masked_variables:
        indices = model.optimizer.indices_of(kernel)
        assert len(indices) == len(set(indices)) == kernel.value.size / 4
    print(f"LIFT: {state:.3f} of the optimizer's state on a device")
    # Only entries are exchanged, of which there are a quarter here.
    check_programs(dumps, 64 * 128 / 2)


def fitted_cast():
    cast = kwm.CAST(layers())
    cast.compile(loss="mse", jit_compile=True)
    cast.fit(X, Y, **OPTIONS)
    return cast


def cast(dumps):
    """CAST, with its teacher."""
    alone = fitted_cast().finalize()
    with on_mesh().scope():
        cast = fitted_cast()
        teacher = share(cast.teacher.variables)
        optimizer = share(cast.optimizer.variables)
        assert max(teacher, optimizer) <= SHARE, (teacher, optimizer)
        model = cast.finalize()
        kwm.assert_sparse(model)
    assert_equal(model, alone)
    print(
        f"CAST: {teacher:.3f} of the teacher and {optimizer:.3f} of the "
        "optimizer's state on a device"
    )
    # Masks are gathered, where they are set; no weights.
    check_programs(dumps, 64 * 128 / 2, "f32")


def assert_equal(model, expected):
    pairs = zip(model.get_weights(), expected.get_weights(), strict=True)
    for weight, other in pairs:
        np.testing.assert_allclose(weight, other, atol=1e-5)


def check_programs(dumps, most, *dtypes):
    """Check what XLA has written of the programs of steps, and delete it."""
    if dumps is None:
        return
    files = list(dumps.glob("*step*after_optimizations.txt"))
    assert files, list(dumps.iterdir())
    on_a_mesh = 0
    for file in files:
        text = file.read_text()
        on_a_mesh += "num_partitions=8" in text
        assert max(gathered(text, *dtypes), default=0) <= most, file
        file.unlink()
    assert on_a_mesh


def language_model(dumps):
    """A packed Llama by KerasHub's layout, and by the model axis alone."""
    import keras_hub

    by_model = distribution(
        {
            "token_embedding/embeddings": ("model", None),
            "(query|key|value)/kernel": (None, "model", None),
            "attention_output/kernel": ("model", None, None),
            "feedforward_(intermediate|gate)_dense/kernel": (None, "model"),
            "feedforward_output_dense/kernel": ("model", None),
        }
    )
    of_hub = ModelParallel(
        layout_map=keras_hub.models.LlamaBackbone.get_layout_map(
            by_model.device_mesh
        ),
        batch_dim_name="batch",
    )
    tokens = np.random.default_rng(0).integers(512, size=(4, 4))
    data = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    # A rounded input may be rounded to its neighbour.
    for options, tolerance in (({}, 1e-5), ({"dtype": "int4"}, 2e-2)):
        expected = packed_llama(options).predict(data, verbose=0)
        for own, whose in ((by_model, "our"), (of_hub, "KerasHub's")):
            with own.scope(), tempfile.TemporaryDirectory() as folder:
                model = packed_llama(options)
                logits = model.predict(data, verbose=0)
                items = reparameterizations(model)
                held = share([p for each in items for p in each.parameters])
                assert held <= SHARE, held
                kwm.save_model(model, f"{folder}/model.safetensors")
                again = kwm.load_model(f"{folder}/model.safetensors")
                assert share(again.variables) <= SHARE
                np.testing.assert_allclose(
                    again.predict(data, verbose=0), logits, atol=1e-6
                )
                kwm.unpack(model)
                assert share(model.variables) <= SHARE
            np.testing.assert_allclose(logits, expected, atol=tolerance)
            kind = options.get("dtype", "float32")
            print(
                f"packed, {kind}: {held:.3f} of the arrays on a device, by "
                f"{whose} layout"
            )
            # Activations have so many entries, at most; the values of a
            # kernel at least 256 x 128 / 2 bytes.
            check_programs(dumps, 4 * 4 * 512)


def packed_llama(options):
    sizes = {"vocabulary_size": 512, "hidden_dim": 256, "intermediate_dim": 512}
    sizes |= {"num_query_heads": 8, "num_key_value_heads": 4}
    model = causal_lm("llama", tie_word_embeddings=True, **sizes)
    kwm.sparsify(model, "2:4", criterion="magnitude", verbose=0)
    kwm.pack(model, **options)
    return model


if __name__ == "__main__":
    main()
