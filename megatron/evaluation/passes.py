"""What a model predicts of a text in each of its passes: the seam of everything that looks inside a likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megatron.evaluation.scorer import Request, Tally


class Passes(NamedTuple):
    """One target in each of some passes; its log-likelihood, or the bound on it, is ``Σ weights · logprobs``.

    Attributes:
        hidden: float64 [passes, target], share of the target (of the token's block in a model of blocks) that is hidden when
            the token is predicted, in the middle of its count: (m − ½) / L; NaN where nothing is hidden but noised.
        weights: float64 [passes, target], 0 where a token is not predicted; the passes of a token sum to 1 in the mean.
        chances: float64 [passes, target], of a pass among those of a token: all alike where masks are drawn, the probability
            of its mask where every mask is run; 0 where it is not about the token's block. The passes of a token sum to 1.
        logprobs: float64 [passes, target], nats.
    """

    hidden: np.ndarray
    weights: np.ndarray
    chances: np.ndarray
    logprobs: np.ndarray


class ByPass(Protocol):
    """A witness that tells its passes apart."""

    def by_pass(self, requests: Sequence[Request]) -> list[Passes]:
        """Pass by pass, one a request; the same passes for models that are asked the same."""


def causal_passes(logprobs: np.ndarray) -> Passes:
    """The one pass of a causal model: a token is predicted while it and all behind it are hidden; logprobs: [target]."""
    length = len(logprobs)
    hidden = (length - np.arange(length) - 0.5) / length
    return Passes(hidden[None], np.ones((1, length)), np.ones((1, length)), logprobs[None])


def masked_passes(tally: Tally, *, block_size: int | None) -> Passes:
    """All passes behind a tally."""
    request, number = tally.request, len(tally.values)
    length = len(request.target)
    draws = tally.estimator.draws(length, key=request.key, start=0, count=number)
    masks = draws.masks.reshape(-1, length)
    span = (len(request.context) + np.arange(length)) // (block_size or len(request.context) + length)
    own = span[:, None] == span  # [target, target], tokens of one block
    hidden = (masks.astype(np.float64) @ own - 0.5) / own.sum(0)
    weights = (draws.weights / number).reshape(-1, length)
    chances = weights @ own / own.sum(0)  # m tokens of L are masked, each with the weight L/m times the chance
    return Passes(hidden, weights, chances, tally.logprobs(draws).reshape(-1, length))


def undivided(values: np.ndarray) -> Passes:
    """Of a bound whose passes predict every token from noise: its mean over them, [target]."""
    whole = np.ones((1, len(values)))
    return Passes(whole * np.nan, whole, whole, values[None])
