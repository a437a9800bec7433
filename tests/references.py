"""Slow NumPy float64 references, written from the equations."""

import ml_dtypes
import numpy as np


def nm_mask(x, n, m, axes):
    """Sorts every group, one after the other (CAST, equation 6)."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    axes = tuple(a % x.ndim for a in axes)
    order = axes + tuple(a for a in range(x.ndim) if a not in axes)
    moved = np.transpose(x, order)
    k = int(np.prod([x.shape[a] for a in axes]))
    matrix = np.abs(moved.reshape(k, -1)).astype("float64")
    matrix[np.isnan(matrix)] = np.inf
    mask = np.zeros(matrix.shape, bool)
    for column in range(matrix.shape[1]):
        for start in range(0, k, m):
            group = matrix[start : start + m, column]
            best = sorted(range(m), key=lambda i: (-group[i], i))[:n]
            mask[start + np.array(best), column] = True
    return np.transpose(mask.reshape(moved.shape), np.argsort(order))


def adam_s(
    w, grads, axes, n, m, rate, total, importance, decay, l1="auto", ramp=1.0
):
    """CAST, algorithm 1, equations 6 to 8: the last kernel and its mask."""
    b1, b2, epsilon = 0.9, 0.999, 1e-8
    theta = np.array(w, "float64")
    mu, v = np.zeros_like(theta), np.zeros_like(theta)
    factor = 1.0
    if importance is not None:
        sizes = [s if i in axes else 1 for i, s in enumerate(theta.shape)]
        factor = np.reshape(importance, sizes)

    def alpha(t):
        return min(1.0, t / (ramp * total)) if ramp else 1.0

    first_squares = []
    for t, g in enumerate(grads):
        g = np.array(g, "float64")
        if t % 10 == 0:
            mask = nm_mask(theta * factor, n, m, axes)
        a = alpha(t)
        mu = b1 * mu + (1 - b1) * g
        pulled = (1 - a) * mu
        if decay == "published":
            if t < 10:
                first_squares.append(np.mean(g**2))
            strength = l1
            if l1 == "auto":
                strength = 0.5 * np.sqrt(np.mean(first_squares))
            pulled += a * strength * np.sign(theta)
        mixed = np.where(mask, mu, pulled)
        v = b2 * v + (1 - b2) * mixed**2
        mu_hat = mixed / (1 - b1 ** (t + 1))
        v_hat = v / (1 - b2 ** (t + 1))
        theta = theta - rate(t) * mu_hat / (np.sqrt(v_hat) + epsilon)
        if decay == "relative":
            shrink = (1 - alpha(t + 1)) / (1 - a) if a < 1 else 0.0
            theta = np.where(mask, theta, shrink * theta)
    return theta, mask


def pack_24(kernel, dtype):
    """The packed arrays of a 2:4 kernel, a kept value after the other."""
    k, n = kernel.shape
    blocks, rows = -(-n // 16), -(-k // 32)
    meta = np.zeros((blocks, rows, 16), np.uint32)
    scale = np.ones((blocks, 16), np.float32)
    values = np.zeros((blocks, rows * 16, 16))
    for column in range(blocks * 16):
        block, lane = divmod(column, 16)
        for group in range(rows * 8):
            entries = [
                kernel[row, column] if row < k and column < n else 0.0
                for row in range(4 * group, 4 * group + 4)
            ]
            nonzeros = [i for i in range(4) if entries[i] != 0]
            free = [i for i in range(4) if entries[i] == 0]
            for kept, place in enumerate(sorted((nonzeros + free)[:2])):
                slot = 2 * group + kept
                meta[block, slot // 16, lane] |= place << (2 * (slot % 16))
                values[block, slot, lane] = entries[place]
    if dtype == "int8":
        largest = np.abs(kernel).max(axis=0, initial=0).astype("float32")
        steps = largest / np.float32(127)
        scale.reshape(-1)[:n] = np.where(steps == 0, 1, steps)
        values = np.rint(values.astype("float32") / scale[:, None])
        values = values.reshape(blocks, rows, 4, 4, 16)
        values = values.transpose(0, 1, 3, 4, 2)
    if dtype == "int4":
        scale = np.ones((blocks, -(-rows // 2), 16), ml_dtypes.bfloat16)
        kept, values = values, np.zeros((blocks, rows, 2, 16, 4), np.uint8)
        for block, group, lane in np.ndindex(scale.shape):
            slots = range(32 * group, min(32 * group + 32, 16 * rows))
            found = round_int4(kept[block, slots, lane])
            steps, scale[block, group, lane] = found
            for slot, step in zip(slots, steps):
                row, place = divmod(slot, 16)
                q, word = divmod(place, 4)
                byte = (int(step) & 15) << (4 if word > 1 else 0)
                values[block, row, word % 2, lane, q] |= byte
    if dtype == "bfloat16":
        values = values.reshape(blocks, rows * 8, 2, 16).swapaxes(2, 3)
    has_scale = dtype in ("int8", "int4")
    return values, meta.view(np.int32), scale if has_scale else None


def round_int4(weights, bits=4):
    """int4 steps of weights with one scale, and that scale; or of few bits."""
    weights = np.asarray(weights, "float64")
    largest = np.float32(np.abs(weights).max(initial=0))
    found = [(np.inf, np.zeros(len(weights)), ml_dtypes.bfloat16(1))]
    most = 2 ** (bits - 1)
    ends = np.arange(2 * most - 1, 2 * most + 3) / 2
    for step in (*range(1, most), *ends, *-ends):
        scale = ml_dtypes.bfloat16(largest / np.float32(step))
        if scale == 0 or not np.isfinite(scale):
            continue
        quotients = weights.astype("float32") / np.float32(scale)
        steps = np.clip(np.rint(quotients), -most, most - 1)
        error = sum((weights - steps * np.float64(scale)) ** 2)
        found.append((error, steps, scale))
    # The first of the best.
    _, steps, scale = min(found, key=lambda each: each[0])
    return steps, scale


def round_activations(x):
    """Each row in blocks of 32 entries, to 127 steps either way."""
    x = np.asarray(x, "float64")
    rounded = np.zeros_like(x)
    for row in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], 32):
            block = x[row][start : start + 32]
            scale = np.abs(block).max() / 127
            if scale != 0:
                steps = np.rint(block / scale)
                rounded[row][start : start + 32] = steps * scale
    return rounded


def principal_mask(x, count, rank, axes=(0,), candidates=None):
    """The largest entries of the truncated SVD (LIFT), one after the other."""
    axes = tuple(a % x.ndim for a in axes)
    order = axes + tuple(a for a in range(x.ndim) if a not in axes)
    moved = np.transpose(x, order).astype("float64")
    rows = int(np.prod([x.shape[a] for a in axes]))
    matrix = moved.reshape(rows, -1)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    near = sum(s[i] * np.outer(u[:, i], vh[i]) for i in range(rank))
    near = np.abs(near).reshape(-1)
    if candidates is not None:
        near[~np.transpose(candidates, order).reshape(-1)] = -1.0
    best = sorted(range(near.size), key=lambda i: (-near[i], i))[:count]
    mask = np.zeros(near.size, bool)
    mask[best] = True
    return np.transpose(mask.reshape(moved.shape), np.argsort(order))


def sparsegpt(w, h, n, m, damping=0.01):
    """SparseGPT, an input after the other, each with an inverse of its own.

    When the weights before it are settled, removing weight j costs `w_j**2 /
    inv[0, 0]` and moves the rest by the first row of `inv`. This is the inverse
    of the remaining part of the damped second moment `h` of the inputs.
    """
    w = w.astype("float64").copy()
    size, units = w.shape
    h = h + damping * np.mean(np.diag(h)) * np.eye(size)
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(size)]
    keep = np.zeros(w.shape, bool)
    for j in range(size):
        if j % m == 0:
            for unit in range(units):
                kept = [inverses[j + i][0, 0] for i in range(m)]
                cost = w[j : j + m, unit] ** 2 / kept
                best = sorted(range(m), key=lambda i: (-cost[i], i))[:n]
                keep[j + np.array(best), unit] = True
        for unit in range(units):
            if not keep[j, unit]:
                row = inverses[j][0]
                w[j:, unit] -= w[j, unit] / row[0] * row
                w[j, unit] = 0.0
    return w


def wanda(w, x, n, m):
    """Wanda: the largest |w| times the norm of its input, in each group."""
    norms = np.sqrt((x.astype("float64") ** 2).sum(axis=0))
    return np.where(nm_mask(np.abs(w) * norms[:, None], n, m, 0), w, 0.0)


def distillation(student, teacher, labels, weights, share, temperature):
    """Total, cross-entropy, KL as weighted sums; the total's gradient.

    A position after the other. A label outside of the classes adds nothing
    to the cross-entropy.
    """

    def softmax(z):
        z = np.exp(z - z.max())
        return z / z.sum()

    entropy = kl = 0.0
    slopes = np.zeros(student.shape)
    for place, (label, weight) in enumerate(zip(labels, weights)):
        s, t = (z[place].astype("float64") for z in (student, teacher))
        if 0 <= label < len(s):
            p = softmax(s)
            entropy -= weight * np.log(p[label])
            p[label] -= 1
            slopes[place] += (1 - share) * weight * p
        p, q = softmax(s / temperature), softmax(t / temperature)
        kl += weight * temperature**2 * (q * np.log(q / p)).sum()
        slopes[place] += share * weight * temperature * (p - q)
    return [share * kl + (1 - share) * entropy, entropy, kl], slopes


def swap_mask(w, pruned, h, n, m, sweeps=1):
    """Tries every 1-swap of a group of a unit, by the error itself.

    Swaps the weight p for the weight q, which gets the value at which the
    parabola through three errors is lowest (SparseSwaps swaps to w_q). A kept
    weight of 0 may also be swapped for itself.
    """
    w, result = w.astype("float64"), pruned.astype("float64").copy()

    def error(column, unit):
        rest = w[:, unit] - column
        return rest @ h @ rest

    for _ in range(sweeps):
        for start in range(0, len(w), m):
            kept = nm_mask(result[start : start + m], n, m, 0)
            for unit in range(w.shape[1]):
                best, choice = error(result[:, unit], unit), None
                for p, q in np.ndindex(m, m):
                    again = p == q and result[start + p, unit] == 0
                    if not kept[p, unit] or (kept[q, unit] and not again):
                        continue
                    column = result[:, unit].copy()
                    column[start + p] = 0.0
                    errors = []
                    for value in (-1.0, 0.0, 1.0):
                        column[start + q] = value
                        errors.append(error(column, unit))
                    slope = (errors[2] - errors[0]) / 2
                    curvature = errors[0] + errors[2] - 2 * errors[1]
                    flat = curvature <= 1e-9 * np.mean(np.diag(h))
                    value = w[start + q, unit] if flat else -slope / curvature
                    column[start + q] = value
                    if error(column, unit) < best - 1e-9 * (1 + best):
                        best, choice = error(column, unit), column
                if choice is not None:
                    result[:, unit] = choice
    return result


def refit(w, pruned, h, damping=0.01):
    """Solves the normal equations of each unit, for its nonzero weights."""
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    result = np.zeros(w.shape)
    for unit in range(w.shape[1]):
        kept = np.flatnonzero(pruned[:, unit])
        right = h[kept] @ w[:, unit].astype("float64")
        result[kept, unit] = np.linalg.solve(h[np.ix_(kept, kept)], right)
    return result


def bfloat16(x):
    """The nearest floats with 8 significant bits; of two, the even one."""
    mantissa, exponent = np.frexp(np.asarray(x, "float64"))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def round_group(values, scale, bits):
    """The nearest of all multiples of a scale, for each value."""
    multiples = scale * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    best = np.abs(np.subtract.outer(values, multiples)).argmin(axis=-1)
    return multiples[best]


def search_scales(w, weights, bits, group_size, count=16):
    """Tries every scale of every group of every unit.

    The largest weight becomes the lowest integer, or one that is as far from 0
    as the highest, or is clipped to the lowest, at half of its size.
    """
    low = -(2 ** (bits - 1))
    shares = np.linspace(0.5, low / (1 + low), count)
    w = w.astype("float64")
    scales = np.ones((-(-len(w) // group_size), w.shape[1]))
    for group, unit in np.ndindex(scales.shape):
        part = slice(group * group_size, (group + 1) * group_size)
        largest = max(w[part, unit], key=abs)
        tried = bfloat16(largest * shares / low)
        errors = [
            weights[part]
            @ (round_group(w[part, unit], scale, bits) - w[part, unit]) ** 2
            for scale in tried
            if scale != 0
        ]
        if errors:
            scales[group, unit] = tried[np.argmin(errors)]
    return scales


def nearest(w, bits, group_size=64):
    """Each group by its best scale, each weight to nearest."""
    scales = search_scales(w, np.ones(len(w)), bits, group_size)
    rounded = np.zeros(w.shape)
    for i, unit in np.ndindex(w.shape):
        scale = scales[i // group_size, unit]
        rounded[i, unit] = round_group(w[i, unit], scale, bits)
    return rounded


def gptq(w, scales, h, bits, group_size, damping=0.01):
    """GPTQ, an input after the other, each with an inverse of its own.

    The inputs with the largest diagonal come first. When the weights before it
    are settled, rounding weight j moves the others by its row of the inverse of
    the remaining damped `h`. Zeros stay zero.
    """
    w = w.astype("float64").copy()
    kept = w != 0
    left = sorted(range(len(w)), key=lambda j: -h[j, j])
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    while left:
        j, row = left[0], np.linalg.inv(h[np.ix_(left, left)])[0]
        for unit in np.flatnonzero(kept[j]):
            scale = scales[j // group_size, unit]
            error = w[j, unit] - round_group(w[j, unit], scale, bits)
            w[left, unit] -= error / row[0] * row * kept[left, unit]
        left = left[1:]
    return w


def descend(w, rounded, scales, h, bits, group_size, sweeps=1):
    """Tries every integer of every weight, and fits every scale.

    The best scale is where the parabola through three errors is lowest.
    """
    w, result = w.astype("float64"), rounded.astype("float64").copy()
    scales = scales.astype("float64").copy()

    def error(column, unit):
        rest = w[:, unit] - column
        return rest @ h @ rest

    for _ in range(sweeps):
        for group, unit in np.ndindex(scales.shape):
            start, stop = group * group_size, (group + 1) * group_size
            part = slice(start, stop)
            column = result[:, unit].copy()
            integers = np.rint(column[part] / scales[group, unit])
            errors = []
            for scale in (-1.0, 0.0, 1.0):
                column[part] = scale * integers
                errors.append(error(column, unit))
            curvature = errors[0] + errors[2] - 2 * errors[1]
            if integers.any():
                best = (errors[0] - errors[2]) / 2 / curvature
                if best != 0:
                    scales[group, unit] = bfloat16(best)
                    result[part, unit] = scales[group, unit] * integers
            tried = scales[group, unit] * np.arange(
                -(2 ** (bits - 1)), 2 ** (bits - 1)
            )
            for j in start + np.flatnonzero(w[part, unit]):
                column = result[:, unit].copy()
                errors = []
                for value in tried:
                    column[j] = value
                    errors.append(error(column, unit))
                result[j, unit] = tried[np.argmin(errors)]
    return result, scales


def is_on_grid(w, bits, group_size):
    """Whether all of each group are multiples, within range, of one bfloat16.

    Its largest weight is an integer times that, which may be negative.
    """
    w = np.asarray(w, "float32")
    for unit in range(w.shape[1]):
        for start in range(0, len(w), group_size):
            group = w[start : start + group_size, unit]
            found = not group.any()
            lowest = -(2 ** (bits - 1))
            for q in (*range(1, -lowest + 1), lowest):
                scale = np.abs(group).max() / np.float32(q)
                if scale == 0 or scale != bfloat16(scale):
                    continue
                integers = np.rint(group / scale).astype("float32")
                is_within = lowest <= integers.min() <= integers.max() < -lowest
                found |= is_within and (integers * scale == group).all()
            if not found:
                return False
    return True


def convolution_patches(x, sizes, strides, padding, dilation):
    """The inputs of each pixel of a convolution, one pixel at a time.

    `x` is (batch, ..., channels), what is returned (batch, ..., taps *
    channels); `sizes`, `strides` and `dilation` have an int for each axis.
    """
    pads, counts = [(0, 0)], []
    for size, taps, stride, step in zip(x.shape[1:], sizes, strides, dilation):
        span = (taps - 1) * step
        before = behind = 0
        if padding == "causal":
            before = span
        elif padding == "same":
            count = -(-size // stride)
            total = max((count - 1) * stride + span + 1 - size, 0)
            before, behind = total // 2, total - total // 2
        pads.append((before, behind))
        counts.append((size + before + behind - span - 1) // stride + 1)
    x = np.pad(x, [*pads, (0, 0)])
    rows = np.empty((len(x), *counts, int(np.prod(sizes)), x.shape[-1]))
    for pixel in np.ndindex(*counts):
        for i, tap in enumerate(np.ndindex(*sizes)):
            place = np.multiply(pixel, strides) + np.multiply(tap, dilation)
            rows[(slice(None), *pixel, i)] = x[(slice(None), *place)]
    return rows.reshape(len(x), *counts, -1)
