"""Log-likelihood estimators of a masked diffusion model: what to mask, how to weigh it, how sure the answer is.

Every estimator writes the log-likelihood of the target tokens ``x_1..x_L`` (given a context that is never masked) as
an average over *draws*. A draw is one or more *passes*; a pass masks some target positions ``M`` and is worth

    v(M, w) = sum_{i in M} w_i * log p(x_i | context, x_{not M})                                            (1)

so one scorer (``scorer.py``) runs them all. ``kind`` says what the average means:

* ``exact``: the log-likelihood of a model that generates in one fixed order, no sampling error;
* ``bound``: a lower bound on the log-likelihood of the any-order model (the negative ELBO of masked diffusion;
  Sahoo et al. 2024, arXiv 2406.07524, eq. 10; Nie et al. 2025, arXiv 2502.09992, eq. 6 and 14). In expectation all
  bounds here are equal: they average the chain rule over uniformly random orders (Ou et al. 2024, arXiv 2406.03736).

Common random numbers: the noise of draw k is a function of (seed, key, k) only. Requests that share a key (the answer
choices of one question) see the same diffusion times and the same mask on each position they both have.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from megatron.errors import UserError
from megatron.evaluation.names import ESTIMATORS
from megatron.randomness import generator, radical_inverse

MIN_MASK_PROB = 1e-3  # the training loss draws p from [1e-3, 1]; 1/p has infinite variance without the floor


@dataclass(frozen=True)
class Draws:
    """Some draws of one request.

    Attributes:
        masks: ``[draws, passes, length]`` bool, target positions that are masked.
        weights: ``[draws, passes, length]`` float64, ``w`` of eq. (1); 0 where a masked position is not scored.
        strata: ``[draws]`` float64, the diffusion time that orders stratified draws (0 where it has no meaning).
    """

    masks: np.ndarray
    weights: np.ndarray
    strata: np.ndarray


class Estimator(Protocol):
    """One way to estimate the log-likelihood of the target tokens."""

    @property
    def name(self) -> str:
        """For people and tables."""

    @property
    def kind(self) -> str:
        """``exact`` or ``bound``."""

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """Draws ``start .. start+count-1`` for a target of ``length`` tokens; ``count`` is ignored by exact ones."""

    def max_draws(self, length: int) -> int | None:
        """Draws after which nothing new can be learned (1 for exact estimators); None: no limit."""

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """Standard error of ``values.mean()`` (nats); nan when it cannot be known from these draws."""


def noise(seed: int, key: str, index: int) -> np.random.Generator:
    """Random numbers of draw ``index`` for the requests that share ``key``: the same on every rank and in any batch."""
    return generator(seed, key, index + 1)  # index -1 is what the draws of a request share


def independent_standard_error(values: np.ndarray) -> float:
    """``sd / sqrt(n)``; nan for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def stratified_standard_error(values: np.ndarray, strata: np.ndarray) -> float:
    """Standard error of a stratified mean from successive differences in order of the stratum; nan for fewer than two.

    One draw per stratum leaves no variance within a stratum to measure, so neighbours stand in for it
    (Wolter 2007, Introduction to Variance Estimation, sec. 8.2, estimator v2). The first and the last stratum have one
    neighbour each; their differences count twice, or the strata where the spread is largest (few masked tokens, large
    weights) would count half. From 8 draws on it is within 10 % of the truth, below that too large; draws of a bound are
    skewed, so intervals need Student's quantiles (docs/evaluation.md has the coverage).
    """
    if len(values) < 2:
        return math.nan
    squares = np.square(np.diff(values[np.argsort(strata, kind="stable")]))
    total = squares[0] if len(squares) == 1 else (squares.sum() + squares[0] + squares[-1]) / 2
    return math.sqrt(float(total)) / len(values)


@dataclass(frozen=True)
class MaskedBound:
    """Monte-Carlo bound: one random mask a pass.

    ``mask="bernoulli"``: t ~ U(0,1), p = (1-e)t + e, each token masked with probability p, w = 1/p, as in the training
    loss (Sahoo et al. 2024, eq. 10). The floor e leaves out p < e, a bias of at most e times the spread of the
    integrand. ``mask="exact_count"``: m ~ U{1..L}, exactly m tokens masked, w = L/m (Nie et al. 2025, eq. 14): the same
    expectation without the noise in the number of masked tokens, and no pass without a scored token.

    ``stratified``: t (or m) runs over (u + radical_inverse(k)) mod 1 instead of independent draws.
    ``antithetic``: a draw is two passes, (t, v) and (1-t, 1-v), v the uniforms that choose the positions: the second
    masks the tokens that the first one showed.
    """

    mask: str = "exact_count"
    stratified: bool = True
    antithetic: bool = False
    seed: int = 1234
    kind: ClassVar[str] = "bound"

    def __post_init__(self) -> None:
        if self.mask not in ("bernoulli", "exact_count"):
            raise UserError(
                f"mask {self.mask!r} is not known",
                "the bound masks by 'bernoulli' or 'exact_count'",
                "choose one of them",
            )

    @property
    def name(self) -> str:
        """Such as ``exact-count, stratified, antithetic``."""
        parts = [self.mask.replace("_", "-"), "stratified" if self.stratified else "independent"]
        return ", ".join(parts + ["antithetic"] * self.antithetic)

    def max_draws(self, length: int) -> int | None:
        """No limit; a single token is enumerated (:func:`for_length`)."""
        return None

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """See :class:`Estimator`; ``passes`` is 2 for antithetic draws, else 1."""
        passes = 2 if self.antithetic else 1
        masks = np.zeros((count, passes, length), dtype=bool)
        weights = np.zeros((count, passes, length))
        strata = np.zeros(count)
        offset = float(noise(self.seed, key, -1).random())
        spread = radical_inverse(np.arange(start, start + count))
        for row in range(count):
            random = noise(self.seed, key, start + row)
            own_time = float(random.random())
            uniforms = random.random(length)
            time = (offset + float(spread[row])) % 1.0 if self.stratified else own_time
            if self.antithetic:  # the mirrored pass covers the other half of (0, 1)
                time /= 2
            strata[row] = time
            for index in range(passes):
                mirrored = index == 1
                t, v = (1.0 - time, 1.0 - uniforms) if mirrored else (time, uniforms)
                masks[row, index], weight = self._mask(t, v)
                weights[row, index] = masks[row, index] * (weight / passes)
        return Draws(masks, weights, strata)

    def _mask(self, t: float, uniforms: np.ndarray) -> tuple[np.ndarray, float]:
        length = len(uniforms)
        if self.mask == "bernoulli":
            prob = (1.0 - MIN_MASK_PROB) * t + MIN_MASK_PROB
            return uniforms < prob, 1.0 / prob
        num_masked = min(1 + int(length * t), length)
        mask = np.zeros(length, dtype=bool)
        mask[np.argsort(uniforms, kind="stable")[:num_masked]] = True
        return mask, length / num_masked

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """See :class:`Estimator`."""
        return stratified_standard_error(values, strata) if self.stratified else independent_standard_error(values)


@dataclass(frozen=True)
class EnumeratedBound:
    """The bound itself, without sampling: every non-empty mask M once, weight L/|M| times its probability.

    ``2^L - 1`` passes; for short answers that is cheaper than sampling. One draw, standard error 0.
    """

    name: ClassVar[str] = "all masks"
    kind: ClassVar[str] = "bound"

    def max_draws(self, length: int) -> int | None:
        """One."""
        return 1

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """See :class:`Estimator`; ``passes`` is ``2^length - 1``."""
        masks = np.array(list(itertools.product([False, True], repeat=length))[1:])[None]
        sizes = masks.sum(-1, keepdims=True)
        # P(M) = 1/L * 1/C(L, m); times L/m
        weight = np.vectorize(lambda m: 1.0 / (m * math.comb(length, m)))(sizes)
        return Draws(masks, masks * weight, np.zeros(1))

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """Always 0."""
        return 0.0


@dataclass(frozen=True)
class LeftToRight:
    """Chain rule from left to right: pass i masks tokens i..L and scores token i.

    The exact log-likelihood of the model that is made to generate in this order, not of the any-order model
    (sum_i log p(x_i | x_{<i}); Nie et al. 2024, arXiv 2410.18514, sec. 3). L passes, one draw, standard error 0.
    """

    name: ClassVar[str] = "left-to-right chain rule"
    kind: ClassVar[str] = "exact"

    def max_draws(self, length: int) -> int | None:
        """One."""
        return 1

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """See :class:`Estimator`; ``passes`` is ``length``."""
        masks = np.triu(np.ones((length, length), dtype=bool))[None]
        return Draws(masks, np.eye(length)[None], np.zeros(1))

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """Always 0."""
        return 0.0


@dataclass(frozen=True)
class RandomOrder:
    """Chain rule over random orders: each draw is the exact log-likelihood of one order's model, in L passes.

    Their average is the bound of :class:`MaskedBound` (Uria et al. 2014, arXiv 1310.1757, eq. 11), with less variance
    a draw and more passes.
    """

    seed: int = 1234
    name: ClassVar[str] = "random-order chain rule"
    kind: ClassVar[str] = "bound"

    def max_draws(self, length: int) -> int | None:
        """No limit; a single token is enumerated (:func:`for_length`)."""
        return None

    def draws(self, length: int, *, key: str, start: int, count: int) -> Draws:
        """See :class:`Estimator`; ``passes`` is ``length``."""
        ranks = np.stack(
            [np.argsort(np.argsort(noise(self.seed, key, start + row).random(length))) for row in range(count)]
        )
        step = np.arange(length)[None, :, None]
        return Draws(ranks[:, None] >= step, (ranks[:, None] == step).astype(np.float64), np.zeros(count))

    def standard_error(self, values: np.ndarray, strata: np.ndarray) -> float:
        """See :class:`Estimator`."""
        return independent_standard_error(values)


def make_estimator(name: str, *, seed: int = 1234) -> Estimator:
    """The estimator that a command line calls ``name`` (one of ``ESTIMATORS``)."""
    if name in ("exact-count", "exact-count-antithetic"):
        return MaskedBound(antithetic=name.endswith("antithetic"), seed=seed)
    if name in ("bernoulli", "bernoulli-independent"):
        return MaskedBound(mask="bernoulli", stratified=name == "bernoulli", seed=seed)
    if name == "left-to-right":
        return LeftToRight()
    if name == "random-order":
        return RandomOrder(seed=seed)
    raise UserError(
        f"estimator {name!r} is not known", "it names a likelihood estimator", f"use one of {', '.join(ESTIMATORS)}"
    )


def for_length(estimator: Estimator, length: int, *, num_draws: int) -> Estimator:
    """Replace a sampled bound by all masks where these are no more passes than ``num_draws`` draws would take."""
    if not isinstance(estimator, (MaskedBound, RandomOrder)) or length > 20:
        return estimator
    passes = num_draws * (2 if getattr(estimator, "antithetic", False) else 1)
    if isinstance(estimator, RandomOrder):
        passes = num_draws * length
    return EnumeratedBound() if 2**length - 1 <= passes else estimator
