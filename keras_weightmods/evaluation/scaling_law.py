"""The loss of a retrained model as a function of its training tokens."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from keras_weightmods.utils import checks

_FEWEST_BUDGETS = 4  # one more than there are parameters


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
    """The power law `L(D) = L_inf + B * D**-beta`, fitted to some runs.

    Attributes:
        L_inf: Float, the loss that remains with any number of tokens.
        B: Float, the size of the part that tokens reduce.
        beta: Float, the exponent.
        intervals: Dict from the three names to pairs of floats, their
            confidence intervals. They come from the curvature of the fit, with
            Student's t for the few degrees of freedom. An end outside the range
            of the parameter is cut off there.
        confidence: Float in (0, 1), the confidence of these and of `predict`.
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
    # The covariance of L_inf, log B and beta.
    _covariance: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((3, 3)), repr=False, compare=False
    )
    _quantile: float = dataclasses.field(default=0.0, repr=False)

    def predict(self, tokens: Any) -> Prediction:
        """Predict the loss after training on a number of tokens.

        Args:
            tokens: Positive number, or an array of them.

        Returns:
            A `Prediction(loss, low, high)` of floats, or of arrays of the shape
            of `tokens`. A run's loss is expected between `low` and `high`, with
            the confidence of the fit. Far from the fitted runs this holds only
            as far as the law does.

        Raises:
            ValueError: If `tokens` are not positive and finite.
        """
        tokens = _positive("tokens", tokens)
        law = self.L_inf, np.log(self.B), self.beta
        loss, gradient = _loss(tokens, *law), _gradient(tokens, *law)
        variance = np.einsum(
            "...i,ij,...j->...", gradient, self._covariance, gradient
        )
        # The law's own uncertainty, and a run's deviation from it.
        width = self._quantile * np.sqrt(variance + self.residual**2)
        return Prediction(loss, loss - width, loss + width)


def fit_scaling_law(
    tokens: Any, losses: Any, confidence: float = 0.95
) -> ScalingLaw:
    """Fit `L(D) = L_inf + B * D**-beta` to losses at several budgets.

    This is a least-squares fit with `L_inf, B, beta >= 0`, and needs SciPy.
    Retrain one model with one recipe at several budgets, with learning-rate
    schedules that end with the budget. Then fit the law to the losses. Hold the
    largest budget out to see how far you can trust the law.

    Args:
        tokens: Sequence of positive numbers, D: the tokens that each run was
            trained on. It needs at least four different numbers; several runs
            (seeds) of one budget count as one.
        losses: Sequence of positive numbers of the same length: the runs'
            losses in nats a token, the `log` of their perplexities.
        confidence: Float in (0, 1), the confidence of the intervals. Defaults
            to `0.95`.

    Returns:
        A `ScalingLaw`.

    Raises:
        ImportError: If SciPy is not installed.
        ValueError: If `tokens` and `losses` have different lengths, or values
            that are not positive or not finite. If there are fewer than four
            budgets, the losses do not fall with the tokens, or `confidence` is
            out of range.

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
        raise checks.not_installed(
            "`fit_scaling_law`", "scipy", error
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
    # Fit log B, because B is the loss at one token, far from the data.
    beta = 0.5
    log_b = np.log(losses.mean() / 2) + beta * np.log(tokens).mean()
    law, covariance = optimize.curve_fit(
        _loss,
        tokens,
        losses,
        (losses.min() / 2, log_b, beta),
        bounds=([0, -np.inf, 0], [np.inf, np.inf, 10]),
        jac=_gradient,
        x_scale="jac",
        max_nfev=100_000,
        **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15),
    )
    residuals = losses - _loss(tokens, *law)
    error = residuals @ residuals
    if error >= losses.var() * len(losses) * (1 - 1e-9):
        raise ValueError(
            "The losses must fall with the tokens. Received: losses that a "
            "constant fits as well as a falling law"
        )
    freedom = len(losses) - 3
    quantile = float(stats.t.ppf((1 + confidence) / 2, freedom))
    spread = quantile * np.sqrt(np.diag(covariance))
    # The fit comes close to a bound, but does not reach it.
    law[0] = round(law[0], 9)
    ends = np.array(
        [law, np.maximum(law - spread, [0, -np.inf, 0]), law + spread]
    )
    with np.errstate(over="ignore"):
        ends[:, 1] = np.exp(ends[:, 1])
    found, *intervals = ends.tolist()
    names = "L_inf", "B", "beta"
    return ScalingLaw(
        **dict(zip(names, found)),
        intervals=dict(zip(names, zip(*intervals))),
        confidence=confidence,
        residual=float(np.sqrt(error / freedom)),
        _covariance=covariance,
        _quantile=quantile,
    )


def _positive(name: str, values: Any) -> np.ndarray:
    array: np.ndarray = checks.check_array(name, values, "float64")
    if not array.size or not np.all(np.isfinite(array) & (array > 0)):
        raise checks.error(name, "positive, finite numbers", values)
    return array


def _loss(tokens: Any, floor: Any, log_b: Any, beta: Any) -> Any:
    return floor + np.exp(log_b - beta * np.log(tokens))


def _gradient(tokens: Any, floor: Any, log_b: Any, beta: Any) -> np.ndarray:
    """Return the gradient of `_loss` by the floor, log B and beta."""
    power = _loss(tokens, 0, log_b, beta)
    parts = np.ones_like(power), power, -power * np.log(tokens)
    return np.stack(parts, axis=-1)
