"""How the loss of a retrained model falls with the tokens it is given."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from keras_weightmods.utils import checks

_FEWEST_BUDGETS = 4  # one more than there are parameters
_LARGEST_BETA = 10.0


class Prediction(NamedTuple):
    """What `ScalingLaw.predict` returns.

    Attributes:
        loss: Float or array, the losses that the law gives.
        low: The lower ends of their prediction intervals.
        high: The upper ends.
    """

    loss: Any
    low: Any
    high: Any


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """The power law `L(D) = L_inf + B * D**-beta`, as fitted to some runs.

    Attributes:
        L_inf: Float, the loss that no number of tokens goes below.
        B: Float, the size of what tokens reduce.
        beta: Float, the exponent.
        intervals: Dict from the three names to pairs of floats, their
            confidence intervals. They come from the curvature of the fit,
            with Student's t for the few degrees of freedom; an end outside
            what the parameter can be is cut off there.
        confidence: Float in (0, 1), of these and of `predict`.
        residual: Float, standard deviation of the losses around the law.

    Example:

    ```python
    import keras_weightmods as kwm

    law = kwm.ScalingLaw(
        L_inf=2.0,
        B=100.0,
        beta=0.5,
        intervals={},
        confidence=0.95,
        residual=0.0,
    )
    assert law.predict(10_000).loss == 3.0
    ```
    """

    L_inf: float
    B: float
    beta: float
    intervals: dict[str, tuple[float, float]]
    confidence: float
    residual: float
    _covariance: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((3, 3)), repr=False, compare=False
    )
    _center: float = dataclasses.field(default=1.0, repr=False)
    _quantile: float = dataclasses.field(default=0.0, repr=False)

    def predict(self, tokens: Any) -> Prediction:
        """Predict the loss after training on a number of tokens.

        Args:
            tokens: Positive number, or an array of them.

        Returns:
            A `Prediction(loss, low, high)` of floats, or of arrays of the
            shape of `tokens`. A run's loss is expected between `low` and
            `high`, with the confidence of the fit; far from the runs that
            were fitted, that holds as far as the law itself does.

        Raises:
            ValueError: If `tokens` are not positive and finite.
        """
        tokens = _positive("tokens", tokens)
        x = tokens / self._center
        size = self.B * self._center**-self.beta
        loss = self.L_inf + size * x**-self.beta
        gradient = _gradient(x, size, self.beta)
        variance = np.einsum(
            "...i,ij,...j->...", gradient, self._covariance, gradient
        )
        # The law's own uncertainty, and a run's deviation from it.
        width = self._quantile * np.sqrt(variance + self.residual**2)
        ends = loss, loss - width, loss + width
        if tokens.ndim == 0:
            return Prediction(*map(float, ends))
        return Prediction(*ends)


def fit_scaling_law(
    tokens: Any, losses: Any, confidence: float = 0.95
) -> ScalingLaw:
    """Fit `L(D) = L_inf + B * D**-beta` to losses at several budgets.

    Least squares with `L_inf, B, beta >= 0`. Retrain one model with one
    recipe at several budgets, whose learning-rate schedules end with the
    budget, and fit the law to the losses; hold the largest budget out to see
    how far the law can be trusted. Needs SciPy.

    Args:
        tokens: Sequence of positive numbers, D: the tokens each run was
            trained on. Four different numbers at least; several runs (seeds)
            of one budget count as one.
        losses: Sequence of positive numbers, as long: the runs' losses in
            nats a token, `log` of their perplexities.
        confidence: Float in (0, 1), of the intervals. Defaults to `0.95`.

    Returns:
        A `ScalingLaw`.

    Raises:
        ImportError: If SciPy is not installed.
        ValueError: If `tokens` and `losses` are not of one length, not
            positive or not finite, if there are fewer than four budgets, if
            the losses do not fall with the tokens, or if `confidence` is out
            of range.

    Example:

    ```python
    import numpy as np
    import keras_weightmods as kwm

    tokens = np.array([1e4, 3e4, 1e5, 3e5, 1e6])
    losses = 2.0 + 60.0 * tokens**-0.4
    law = kwm.fit_scaling_law(tokens[:-1], losses[:-1])
    assert np.isclose(law.beta, 0.4, atol=1e-3)
    assert np.isclose(law.predict(1e6).loss, losses[-1], rtol=1e-4)
    ```

    Reference:
        The irreducible term and the power of the tokens are those of
        Hoffmann et al. 2022 (arXiv 2203.15556), equation 2, for one size of
        model. CAST (arXiv 2509.25996) fits the loss of sparse models to the
        tokens they were retrained on.
    """
    try:
        from scipy import optimize, stats
    except ImportError as error:
        raise ImportError(
            "`fit_scaling_law` needs SciPy. Install it with: "
            "pip install 'keras-weightmods[law]'"
        ) from error
    tokens = _positive("tokens", tokens)
    losses = _positive("losses", losses)
    if tokens.ndim != 1 or tokens.shape != losses.shape:
        raise ValueError(
            "`tokens` and `losses` must be two sequences of one length. "
            f"Received: shapes {tokens.shape} and {losses.shape}"
        )
    if len(np.unique(tokens)) < _FEWEST_BUDGETS:
        raise ValueError(
            f"The law has three parameters; it needs {_FEWEST_BUDGETS} "
            "different budgets at least. Received: "
            f"tokens={np.unique(tokens).tolist()}"
        )
    confidence = checks.check_float("confidence", confidence, above=0, below=1)
    # In units of a budget in the middle, L_inf + size * x**-beta is well
    # conditioned; B is the loss at one token, far outside of the data.
    center = float(np.exp(np.log(tokens).mean()))
    x = tokens / center
    floor, size, beta = _least_squares(x, losses, optimize)
    residuals = losses - (floor + size * x**-beta)
    freedom = len(losses) - 3
    variance = residuals @ residuals / freedom
    gradient = _gradient(x, size, beta)
    covariance = variance * np.linalg.pinv(gradient.T @ gradient)
    quantile = float(stats.t.ppf((1 + confidence) / 2, freedom))
    spread = quantile * np.sqrt(np.diag(covariance))
    # B = size * center**beta, whose logarithm is nearly normal.
    log_b = np.log(size) + beta * np.log(center)
    slope = np.array([0.0, 1 / size, np.log(center)])
    log_spread = quantile * np.sqrt(slope @ covariance @ slope)
    with np.errstate(over="ignore"):
        b_low, b_high = np.exp([log_b - log_spread, log_b + log_spread])
    return ScalingLaw(
        L_inf=floor,
        B=float(np.exp(log_b)),
        beta=beta,
        intervals={
            "L_inf": (max(0.0, floor - spread[0]), floor + spread[0]),
            "B": (float(b_low), float(b_high)),
            "beta": (max(0.0, beta - spread[2]), beta + spread[2]),
        },
        confidence=confidence,
        residual=float(np.sqrt(variance)),
        _covariance=covariance,
        _center=center,
        _quantile=quantile,
    )


def _positive(name: str, values: Any) -> np.ndarray:
    array: np.ndarray = checks.check_array(name, values, "float64")
    if not array.size or not np.all(np.isfinite(array) & (array > 0)):
        raise checks.error(name, "positive, finite numbers", values)
    return array


def _gradient(x: Any, size: Any, beta: Any) -> np.ndarray:
    """Return that of `floor + size * x**-beta` by floor, size and beta."""
    power = x**-beta
    return np.stack(
        [np.ones_like(x), power, -size * np.log(x) * power], axis=-1
    )


def _least_squares(x: Any, losses: Any, optimize: Any) -> Any:
    """Return the best exponent, behind its best other parameters."""

    def fit(beta: float) -> Any:
        columns = np.stack([np.ones_like(x), x**-beta], axis=1)
        (floor, size), norm = optimize.nnls(columns, losses)
        return norm, float(floor), float(size)

    betas = np.geomspace(0.01, _LARGEST_BETA, 100)
    best = int(np.argmin([fit(beta)[0] for beta in betas]))
    beta = float(
        optimize.minimize_scalar(
            lambda beta: fit(beta)[0],
            bounds=(betas[max(best - 1, 0)], betas[min(best + 1, 99)]),
            method="bounded",
            options={"xatol": 1e-12},
        ).x
    )
    norm, floor, size = fit(beta)
    constant = float(np.linalg.norm(losses - losses.mean()))
    if size == 0 or norm >= constant * (1 - 1e-9):
        raise ValueError(
            "The losses must fall with the tokens. Received: losses that a "
            "constant fits as well as a falling law"
        )
    return floor, size, beta
