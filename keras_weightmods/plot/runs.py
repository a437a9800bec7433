"""Pictures of trainings."""

from typing import Any

import numpy as np

from keras_weightmods.plot import style
from keras_weightmods.utils import checks


def sparsity_run(history: Any, *, ax: Any = None) -> Any:
    """Draw how a training reaches its pattern, epoch by epoch.

    Args:
        history: What `fit` returned with a `SparsityMonitor` among its
            callbacks, or a dict of lists: `kept_share` and `mask_flips`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes, of S_t, the kept share; the flips have an axis on the right.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the history has no such logs.

    Example:

    ```python
    import keras_weightmods as kwm

    logs = {"kept_share": [0.8, 0.95, 1.0], "mask_flips": [0.0, 0.02, 0.001]}
    ax = kwm.plot.sparsity_run(logs)
    assert ax.get_xlabel() == "epoch"
    ```
    """
    logs = getattr(history, "history", history)
    names = ("kept_share", "mask_flips")
    if not isinstance(logs, dict) or not logs.keys() >= {*names}:
        expected = f"of a run with a `SparsityMonitor`, with the logs {names}"
        raise checks.error("history", expected, logs)
    shares, flips = (logs[name] for name in names)
    epochs = np.arange(1, len(shares) + 1)
    ax = style.new_axes(ax)
    (first,) = ax.plot(epochs, shares, "o-", ms=3)
    ax.set(xlabel="epoch", ylabel="kept share $S_t$ of the sum of |w|")
    right = ax.twinx()
    right.spines["top"].set_visible(False)
    color = style.COLORS[1]
    (second,) = right.plot(epochs, flips, "s--", ms=3, color=color)
    right.set(ylabel="flips for each mask set, share")
    right.set_ylim(bottom=0)
    style.legend(ax, [first, second], ["kept share", "flips"], above=True)
    return ax


def mask_overlap(refreshes: Any, *, ax: Any = None) -> Any:
    """Draw how much of LIFT's masks stays from one refresh to the next.

    Args:
        refreshes: A `PrincipalMaskCallback` that has trained, or its
            `refreshes`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes: at each refresh, the share of the new masks' entries that
        were in the masks before.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there was no refresh.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.SparseAdamW(1e-2), "mse")
    callback = kwm.PrincipalMaskCallback(0.1, refresh_every=2)
    x = np.random.normal(size=(64, 16))
    model.fit(x, x[:, :8], 8, verbose=0, callbacks=[callback])
    ax = kwm.plot.mask_overlap(callback)
    assert ax.get_xlabel() == "update"
    ```
    """
    found = list(getattr(refreshes, "refreshes", refreshes))
    if not found:
        expected = "of a training with a refresh of the masks"
        raise checks.error("refreshes", expected, refreshes)
    ax = style.new_axes(ax)
    steps = [each.step for each in found]
    ax.plot(steps, [1 - each.changed for each in found], "o-", ms=4)
    label = "share of the masks that stayed"
    ax.set(ylim=(0, 1.02), xlabel="update", ylabel=label)
    return ax


def scaling(
    tokens: Any, perplexities: Any, law: Any = None, *, ax: Any = None
) -> Any:
    """Draw perplexity against the tokens of retraining, with a scaling law.

    Args:
        tokens: Sequence of positive numbers, the tokens of each run.
        perplexities: Sequence of positive numbers, as long.
        law: A `ScalingLaw`, of the losses in nats, to draw with its interval
            of predictions. Defaults to `None`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes, both of logarithms.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `tokens` and `perplexities` are not of one length, or
            not positive.

    Example:

    ```python
    import numpy as np
    import keras_weightmods as kwm

    tokens = np.array([1e4, 2e4, 4e4, 8e4, 16e4])
    losses = 3 + 50 * tokens**-0.5
    law = kwm.fit_scaling_law(tokens, losses)
    ax = kwm.plot.scaling(tokens, np.exp(losses), law)
    assert ax.get_xscale() == "log"
    ```
    """
    x, y = np.asarray(tokens, float), np.asarray(perplexities, float)
    if x.shape != y.shape or x.ndim != 1 or not x.size or min(*x, *y) <= 0:
        expected = "positive numbers, as many as `perplexities`"
        raise checks.error("tokens", expected, (tokens, perplexities))
    ax = style.new_axes(ax)
    ax.plot(x, y, "o", label="runs")
    if law is not None:
        many = np.geomspace(x.min() / 1.5, x.max() * 4, 100)
        loss, low, high = law.predict(many)
        label = f"exp({law.L_inf:.2f} + {law.B:.3g} D$^{{-{law.beta:.2f}}}$)"
        (line,) = ax.plot(many, np.exp(loss), "-", label=label)
        style_of_band = {"color": line.get_color(), "alpha": 0.15, "lw": 0}
        label = f"{law.confidence:.0%} of runs"
        band = map(np.exp, (low, high))
        ax.fill_between(many, *band, label=label, **style_of_band)
    ax.set(xscale="log", yscale="log", xlabel="tokens D", ylabel="perplexity")
    style.plain_numbers(ax.yaxis)
    style.legend(ax)
    return ax
