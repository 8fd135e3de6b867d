"""When to give a trial up: no hope that it becomes the best, by a law fitted to its own learning curve, and then some.

The price of a mistake is the wrong winner, that of patience some compute. So a trial is given up only where all of this holds:

1. It has not been the best so far, and half of its planned training is done, with :data:`LEAST` validations (MDM stands on its
   first plateau for long).
2. What it lacks is more than :data:`TIMES` the largest gain that any finished trial has made from that place of its plan to
   its best. Only trials whose learning rate had come at least as far down count, since decay brings a gain of its own.
3. The law L = E + B/D^beta + P·(D/U − 1)^kappa, fitted to its validations, stays above the best trial up to the planned end
   in every bootstrap refit.
4. So does a straight line at its steepest recent slope: learning curves flatten.

3 and 4 are no bounds by themselves: where the rate decays late or a plateau is left, curves of MDM fell below the line at 12 % of
places and below their law at more (recorded curves, 27 November 2026). So 2 asks for a margin; one trial has made up 2.1 times
the gain of the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.errors import UserError
from megatron.scaling.fit import fit_law
from megatron.scaling.laws import Points, Reference

Array = np.ndarray
LEAST, TIMES = 8, 3.0
EARLIEST = 0.5
"""Share of the planned training before which no trial is given up."""
SLACK = 0.05
"""How much less a learning rate may have decayed, as a share of its peak, and still count as having come as far down."""
_LOG_TEN = math.log(10.0)


@dataclass(frozen=True)
class Curve:
    """Validations of one trial in order, on the selection half.

    Attributes:
        share: [n] of the planned training that was done.
        tokens: [n] training tokens.
        loss: [n] nats per token.
        rate: [n] learning rate as a share of its peak so far.
        unique_tokens: of one epoch.
    """

    share: Array
    tokens: Array
    loss: Array
    rate: Array
    unique_tokens: int

    def until(self, number: int) -> Curve:
        """The first validations of it."""
        share, tokens, loss, rate = (part[:number] for part in (self.share, self.tokens, self.loss, self.rate))
        return Curve(share, tokens, loss, rate, self.unique_tokens)

    def gain_from(self, share: float, rate: float) -> float | None:
        """How far the best of the rest lies below the loss at this place of the plan; None where the learning rate there had
        decayed further than ``rate``."""
        if np.interp(share, self.share, self.rate) < rate - SLACK:
            return None
        later = self.loss[self.share >= share]
        return max(0.0, float(np.interp(share, self.share, self.loss) - later.min())) if later.size else 0.0


@dataclass(frozen=True)
class OneRun:
    """L = E + B/D^beta + P*(D/U - 1)^kappa: the learning curve of one size on one amount of unique data, which may overfit."""

    name: str = "one_run"
    names: tuple[str, ...] = ("E", "B", "beta", "P", "kappa")
    equation: str = "L = E + B/D^beta + P*(D/U - 1)^kappa"
    can_rise: bool = True

    def loss(self, phi: Array, points: Points, reference: Reference) -> tuple[Array, Array]:
        """Loss [s, n] and gradient [s, n, p]; B is carried at the reference, P at ten repetitions."""
        e, b, beta, p, kappa = (phi[:, index, None] for index in range(5))
        y = np.log(points.tokens) - reference.log_d
        term = np.exp(b - np.exp(beta) * y)
        repeats = points.tokens / points.unique_tokens - 1
        log_r = np.log(np.maximum(repeats, 1e-300)) - _LOG_TEN
        penalty = np.where(repeats > 1e-9, np.exp(np.minimum(p + np.exp(kappa) * log_r, 50.0)), 0.0)
        constant = np.broadcast_to(np.exp(e), term.shape)
        gradient = [constant, term, -term * y * np.exp(beta), penalty, penalty * np.exp(kappa) * log_r]
        return constant + term + penalty, np.stack(gradient, axis=-1)

    def to_theta(self, phi: Array, reference: Reference) -> Array:
        """Natural parameters [..., p]."""
        theta = np.exp(phi)
        theta[..., 1] = np.exp(phi[..., 1] + theta[..., 2] * reference.log_d)
        theta[..., 3] = np.exp(phi[..., 3] - theta[..., 4] * _LOG_TEN)
        return theta

    def to_phi(self, theta: Array, reference: Reference) -> Array:
        """Inverse of :meth:`to_theta`."""
        phi = np.log(theta)
        phi[..., 1] -= theta[..., 2] * reference.log_d
        phi[..., 3] += theta[..., 4] * _LOG_TEN
        return phi

    def start_range(self, lowest: float) -> tuple[Array, Array]:
        """Ends [p] of random starts."""
        low, high = [0.1, 0.02, 0.1, 1e-4, 0.3], [0.98, 1.0, 1.0, 0.3, 2.0]
        scale = np.array([lowest, lowest, 1.0, lowest, 1.0])
        return np.log(low * scale), np.log(high * scale)

    def limits(self) -> tuple[Array, Array]:
        """Bounds [p] of phi."""
        return np.log([1e-6, 1e-9, 0.005, 1e-9, 0.005]), np.log([150.0, 150.0, 4.0, 150.0, 4.0])


def given_up_at(curve: Curve, rivals: Sequence[Curve]) -> tuple[int, str] | None:
    """The first validation at which a trial is without hope, and why; None where it has some to the last one.

    A function of the validations up to there alone: whoever looks, and when, finds the same place.

    Args:
        curve: the trial, as far as it is.
        rivals: finished trials of the same search.
    """
    best = min((float(rival.loss.min()) for rival in rivals), default=math.inf)
    for number in range(LEAST, len(curve.loss) + 1):
        if curve.share[number - 1] < 1 and (reason := _without_hope(curve.until(number), rivals, best)):
            return number, reason
    return None


def _without_hope(curve: Curve, rivals: Sequence[Curve], best: float) -> str | None:
    share, now = float(curve.share[-1]), float(curve.loss[-2:].min())
    lacking = now - best
    if share < EARLIEST or not curve.loss.min() > best:
        return None
    gains = [gain for rival in rivals if (gain := rival.gain_from(share, float(curve.rate[-1]))) is not None]
    if not gains or lacking <= TIMES * max(gains):
        return None
    line = now + min(0.0, _steepest(curve)) * float(curve.tokens[-1]) * (1 / share - 1)
    if line <= best or (lowest := _lowest(curve)) <= best:
        return None
    return (
        f"at {share:.0%} of its plan {now:.3f}; the law of its own curve reaches {lowest:.3f} at best by its end, a straight "
        f"line {line:.3f}; the best trial has {best:.3f}, and none gained more than {max(gains):.3f} from there"
    )


def _steepest(curve: Curve) -> float:
    """The steepest slope of the last half, the last third and the last three of the validations, nats per token."""
    parts = [slice(-max(3, number), None) for number in (len(curve.loss) // 2, len(curve.loss) // 3, 3)]
    return min(float(np.polyfit(curve.tokens[part], curve.loss[part], 1)[0]) for part in parts)


def _lowest(curve: Curve) -> float:
    """The lowest loss that any refit of the law reaches between now and the planned end; −inf where none can be fitted."""
    used = (curve.share >= 0.1) & np.isfinite(curve.loss)
    points = Points.of(1.0, curve.tokens[used], curve.unique_tokens)
    try:
        fit = fit_law(OneRun(), points, curve.loss[used], num_starts=16, num_bootstrap=64)
    except UserError:  # too few points: no reason to give up
        return -math.inf
    tokens = float(curve.tokens[-1]) * np.linspace(1.0, 1 / float(curve.share[-1]), 33)
    return float(fit.loss_samples(Points.of(1.0, tokens, curve.unique_tokens)).min())
