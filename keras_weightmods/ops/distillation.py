"""The losses of distillation, and their gradient, from logits."""

import functools

from keras import ops

from keras_weightmods import backend


def logits_losses(student, teacher, labels, weights, share, temperature=1.0):
    """Return cross-entropy, KL(teacher || student) and how to take a gradient.

    In this form, the gradient by the logits takes one exponential of each:

    `share * T * (softmax(s / T) - softmax(t / T))
    + (1 - share) * (softmax(s) - onehot)`

    Args:
        student: Float32 tensor of logits, `(positions, classes)`.
        teacher: The same, or `None` for no distillation.
        labels: Int32 tensor `(positions,)`. Outside of the classes they add
            nothing to the cross-entropy, as in Keras on JAX.
        weights: Float32 tensor `(positions,)`.
        share: Float in [0, 1], of the distillation in the gradient.
        temperature: Float > 0, T. The divergence is multiplied by its square.

    Returns:
        The cross-entropy and the divergence, both as weighted sums, and a
        function without arguments, to be called once: the gradient of
        `share * divergence + (1 - share) * cross_entropy` by `student`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.distillation import logits_losses

    logits, one = np.zeros((1, 4), "float32"), np.ones(1, "float32")
    entropy, kl, gradient = logits_losses(logits, logits, [2], one, 0.5)
    assert np.isclose(entropy, np.log(4)) and np.isclose(kl, 0)
    assert np.allclose(gradient(), [[0.125, 0.125, -0.375, 0.125]])
    ```
    """
    labels, weights = ops.cast(labels, "int32"), ops.convert_to_tensor(weights)
    classes = student.shape[-1]
    is_known = ops.logical_and(labels >= 0, labels < classes)
    known = weights * ops.cast(is_known, weights.dtype)
    labels = ops.clip(labels, 0, classes - 1)[:, None]
    log_p = ops.log_softmax(student, axis=-1)
    picked = ops.take_along_axis(log_p, labels, axis=-1)[:, 0]
    entropy = -ops.sum(known * picked)
    by_label = ((1 - share) * known)[:, None]
    soft = q = by_teacher = None
    kl = ops.zeros_like(entropy)
    if teacher is not None:
        is_soft = temperature != 1
        soft = ops.log_softmax(student / temperature) if is_soft else log_p
        # Under one name, so that torch holds one of them at a time.
        teacher = teacher / temperature if is_soft else teacher
        teacher = ops.log_softmax(teacher, axis=-1)
        q = ops.exp(teacher)
        teacher = teacher - soft
        kl = ops.sum(weights * ops.sum(q * teacher, axis=-1))
        by_teacher = (share * temperature * weights)[:, None]
    in_place = backend.current().in_place()
    function = in_place.distillation_gradient if in_place else _gradient
    return (
        entropy,
        temperature**2 * kl,
        functools.partial(
            function, log_p, soft, q, labels, by_label, by_teacher
        ),
    )


def _gradient(log_p, soft, q, labels, by_label, by_teacher):
    """Return the gradient that `logits_losses` describes.

    Args:
        log_p, soft: The student's log-probabilities, and those at the
            temperature: the same tensor where it is 1.
        q: The teacher's probabilities, or `None`; then `soft` is `None`, too.
        labels: Int tensor `(positions, 1)`.
        by_label, by_teacher: Tensors `(positions, 1)`, the factors of the
            two losses.
    """
    is_label = ops.arange(log_p.shape[-1])[None] == labels
    picked = ops.where(is_label, by_label, 0.0)
    p = ops.exp(log_p)
    if q is None:
        return by_label * p - picked
    if soft is log_p:
        return (by_label + by_teacher) * p - by_teacher * q - picked
    return by_label * p + by_teacher * (ops.exp(soft) - q) - picked


def chunked_losses(
    student,
    parameters,
    teacher,
    hidden,
    taught,
    labels,
    weights,
    share,
    temperature=1.0,
    *,
    chunk_size=256,
    with_gradients=True,
):
    """Return the losses of `logits_losses` from what enters the heads.

    The logits of all positions of a language model can take more memory than
    everything else. Here they exist for one chunk of positions at a time. The
    gradients are computed along with the loss, so nothing of a chunk is kept
    for a backward pass.

    Args:
        student: Callable from `(1, positions, width)` and `*parameters` to
            logits `(1, positions, classes)`.
        parameters: List of float tensors that get gradients.
        teacher: Callable from `(1, positions, width)` to logits; or `None`.
        hidden: Float tensor `(positions, width)`, for the student. It gets a
            gradient.
        taught: The same for the teacher, or `None`.
        labels, weights, share, temperature: As in `logits_losses`.
        chunk_size: Int, the positions in a chunk, about.
        with_gradients: Bool, whether gradients can be asked for.

    Returns:
        Tensor of three numbers: `share * divergence + (1 - share) *
        cross_entropy`, the cross-entropy, and the divergence. Only the first
        has gradients.

    Example:

    ```python
    import numpy as np
    from keras import ops
    from keras_weightmods.ops.distillation import chunked_losses

    x, head = np.ones((1, 3), "float32"), np.zeros((3, 4), "float32")
    total, entropy, kl = chunked_losses(
        ops.matmul, [head], None, x, None, [2], np.ones(1, "float32"), 0.0
    )
    assert np.isclose(total, np.log(4)) and np.isclose(entropy, total)
    ```
    """
    vjp = backend.current().vjp
    positions = ops.shape(hidden)[0]
    # On TensorFlow the number of positions may be unknown before a step.
    count = (positions + chunk_size - 1) // chunk_size
    size = (positions + count - 1) // count

    def into_chunks(x):
        x = ops.convert_to_tensor(x)
        rest = tuple(x.shape[1:])
        filling = ops.zeros((count * size - positions, *rest), x.dtype)
        x = ops.concatenate([x, filling])
        return ops.reshape(x, (count, size, *rest))

    chunks = [into_chunks(x) for x in (labels, weights)]
    if teacher is not None:
        chunks.append(into_chunks(taught))

    def losses_of(place, logits):
        labels, weights, *taught = (each[place] for each in chunks)
        return logits_losses(
            logits,
            _in_float32(teacher)(*taught) if taught else None,
            *(labels, weights, share, temperature),
        )

    def total_of(entropy, kl):
        return ops.stack([share * kl + (1 - share) * entropy, entropy, kl])

    def value(hidden, *parameters):
        states = into_chunks(hidden)

        def add(place, sums):
            logits = _in_float32(student)(states[place], *parameters)
            entropy, kl, _ = losses_of(place, logits)
            return sums[0] + entropy, sums[1] + kl

        zero = ops.zeros((), "float32")
        return total_of(*ops.fori_loop(0, count, add, (zero, zero)))

    @ops.custom_gradient
    def value_and_gradients(hidden, *parameters):
        states = into_chunks(hidden)

        def add(place, carry):
            entropy, kl, by_hidden, by_parameters = carry
            logits, pullback = vjp(
                _in_float32(student), states[place], *parameters
            )
            losses = [*losses_of(place, logits)]
            # On torch nothing of a chunk but its gradient is held meanwhile.
            del logits
            here, *own = pullback(losses.pop()())
            by_hidden = ops.slice_update(by_hidden, (place, 0, 0), here[None])
            by_parameters = [
                total + ops.cast(each, "float32")
                for total, each in zip(by_parameters, own)
            ]
            return entropy + losses[0], kl + losses[1], by_hidden, by_parameters

        zero = ops.zeros((), "float32")
        start = [ops.zeros(each.shape, "float32") for each in parameters]
        entropy, kl, by_hidden, by_parameters = ops.fori_loop(
            0, count, add, (zero, zero, ops.zeros_like(states), start)
        )
        width = hidden.shape[-1]
        gradients = [
            ops.reshape(by_hidden, (-1, width))[:positions],
            *by_parameters,
        ]

        def pullback(*args, upstream=None):
            # torch passes the inputs too.
            scale = (args[0] if upstream is None else upstream)[0]
            return tuple(
                ops.cast(ops.multiply(each, scale), like.dtype)
                for each, like in zip(gradients, [hidden, *parameters])
            )

        return total_of(entropy, kl), pullback

    function = value_and_gradients if with_gradients else value
    return function(*map(ops.convert_to_tensor, [hidden, *parameters]))


# The logits of a chunk, in float32. About five such arrays exist at a time.
CHUNK_BYTES = 64 * 2**20
# Smaller chunks make products too small to be fast. And each chunk adds to the
# gradient of the whole head, which is as large as the logits of as many
# positions as the head is wide.
LEAST_POSITIONS = 256


def chunk_positions(classes):
    """Return the number of positions whose logits are in memory at a time."""
    return max(LEAST_POSITIONS, CHUNK_BYTES // (4 * classes))


def _in_float32(head):
    def logits(hidden, *parameters):
        return ops.cast(head(hidden[None], *parameters)[0], "float32")

    return logits
