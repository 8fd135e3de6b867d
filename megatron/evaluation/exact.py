"""Exact log-likelihoods of masked diffusion, under a sampler; and what random orders say of their mixture.

A sampler that uncovers by a policy draws from a distribution whose likelihood is a product (``generation/policies.py``;
arXiv 2603.01367). So every policy is a model of its own with an exact likelihood, and :class:`PolicyScorer` computes it with
the sampler itself.

The mixture over uniformly random orders, ``p(x) = E_σ p_σ(x)``, is what ancestral sampling in many steps draws from. Its
likelihood has no closed form; of K orders,

    E log p_σ(x)  ≤  E log (1/K) Σ_k p_{σ_k}(x)  ≤  log p(x)  ≤  log ψ − 1 + E p_σ(x) / ψ                          (1)

for any ψ > 0: the usual bound, its importance-weighted form (Burda et al. 2016, arXiv 1509.00519, eq. 8), and the tangent of the
logarithm at ψ (arXiv 2605.24292), tightest where ψ is p(x). These are statements about the mixture, not about any policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megatron.evaluation.scorer import Estimate, Request, batches, cut_context
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings
from megatron.randomness import generator


class TokenScores(NamedTuple):
    """One target under a sampler.

    Attributes:
        logprobs: log p of each token when it is uncovered, float64 [target].
        near_ties: bool [target], which were chosen so narrowly that another batch size or layout may choose otherwise
            (``NEAR_TIE`` of generation/policies.py). Where there are none, scores agree to 1e-5.
    """

    logprobs: np.ndarray
    near_ties: np.ndarray


class PolicyScorer:
    """Scores requests under one sampler.

    Args:
        sampler: holds the model.
        settings: policy, tokens a pass, blocks, and the temperature that tokens are drawn at (1: the model's own).
        max_length: longest row in tokens; longer requests lose the left end of their context.
        batch_size: rows per forward pass.

    Raises:
        UserError: the sampler has no likelihood that could be computed.
    """

    kind = "exact"

    def __init__(
        self, sampler: DiffusionSampler, settings: DiffusionSettings, *, max_length: int, batch_size: int = 32
    ) -> None:
        settings.check_has_likelihood()
        sampler.check(settings, num_masked=1)
        self.sampler, self.settings = sampler, settings
        self.max_length, self.batch_size = max_length, batch_size
        self.on_pass: Callable[[int], None] = lambda rows: None  # progress: rows finished

    @property
    def name(self) -> str:
        """For people and tables, such as ``confidence, 4 tokens a pass``."""
        settings, sampling = self.settings, self.settings.sampling
        together = settings.tokens_per_step or 1
        tokens = f"{together} token{'s' * (together > 1)} a pass"
        parts = [settings.order, tokens if settings.steps is None else f"{settings.steps} steps"]
        parts += [f"order {settings.order_number}"] if settings.order == "random" and settings.order_number else []
        block = settings.block_length or self.sampler.block_size
        parts += [f"blocks of {block}"] if block else []
        # In full, not rounded: results are kept by this name.
        shown = {
            "temperature": (sampling.temperature, 1.0),
            "top-k": (sampling.top_k, 0),
            "top-p": (sampling.top_p, 1.0),
            "guidance": (settings.guidance, 0.0),
        }
        return ", ".join(
            parts
            + [f"{name} {str(value).removesuffix('.0')}" for name, (value, plain) in shown.items() if value != plain]
        )

    def score(self, requests: Sequence[Request]) -> list[Estimate]:
        """The exact log-likelihood of every target."""
        passes = [self.num_passes(request) for request in requests]
        return [
            Estimate(float(own.logprobs.sum()), 0.0, self.kind, self.name, count)
            for own, count in zip(self.token_scores(requests), passes)
        ]

    def num_passes(self, request: Request) -> int:
        """Forward passes for the target of a request."""
        cut = cut_context(request, self.max_length)
        return self.sampler.num_passes(self.settings, num_given=len(cut.context), num_masked=len(cut.target))

    def token_scores(self, requests: Sequence[Request], *, numbers: Sequence[int] | None = None) -> list[TokenScores]:
        """Token by token, one a request; ``numbers`` of the random order of each, default 0 for all."""
        cut = [cut_context(request, self.max_length) for request in requests]
        sizes = [(len(one.context), len(one.target)) for one in cut]
        order = sorted(range(len(cut)), key=sizes.__getitem__, reverse=True)
        results: dict[int, TokenScores] = {}
        alike = [sizes[index] for index in order]
        for start, stop in batches([target for _, target in alike], alike=alike, limit=self.batch_size):
            indices = order[start:stop]
            context = sizes[indices[0]][0]
            rows = [(*cut[index].context, *cut[index].target) for index in indices]
            masked = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool, device=self.sampler.device)
            masked[:, context:] = True
            own = None if numbers is None else [numbers[index] for index in indices]
            found = self.sampler.log_likelihoods(rows, masked, settings=self.settings, numbers=own)
            columns = (part[:, context:].cpu().numpy() for part in found)
            results.update(zip(indices, map(TokenScores, *columns)))
            self.on_pass(len(rows))
        return [results[index] for index in range(len(requests))]


def log_mean_exp(values: np.ndarray) -> np.ndarray:
    """``log mean exp`` over the last axis: of log-likelihoods under K orders, the K-order bound of eq. (1)."""
    most = values.max(-1, keepdims=True)
    return np.log(np.exp(values - most).mean(-1)) + most[..., 0]


def tangent(logprobs: np.ndarray, log_reference: float) -> float:
    """The right side of eq. (1), log ψ − 1 + mean p_σ / ψ, nats; its expectation is at least log p.

    Args:
        logprobs: nats, [orders]; of orders that ``log_reference`` did not see.
        log_reference: log ψ, such as :func:`log_mean_exp` of other orders.
    """
    return log_reference - 1 + float(np.exp(logprobs - log_reference).mean())


@dataclass(frozen=True)
class Ceiling:
    """An upper bound on a log-likelihood, estimated.

    Attributes:
        value: of :func:`tangent`.
        limit: one-sided 95 % upper limit of that expectation; NaN for fewer than ``MIN_ORDERS`` orders.
    """

    value: float
    limit: float


MIN_ORDERS = 32  # below, the limit misses the truth in up to 15 % of the cases (tests/evaluation/test_exact.py)


def ceiling(logprobs: np.ndarray, log_reference: float, *, resamples: int = 999) -> Ceiling:
    """:func:`tangent` with its limit.

    p_σ / ψ is skewed to the right, where Student's limit is too low (7 to 16 % misses): the limit is a bootstrap-t one
    (Efron and Tibshirani 1993, An Introduction to the Bootstrap, sec. 12.5).

    Args:
        logprobs, log_reference: of :func:`tangent`.
        resamples: of the bootstrap.
    """
    ratios = np.exp(logprobs - log_reference)
    mean, number = float(ratios.mean()), len(ratios)
    value = tangent(logprobs, log_reference)
    if number < MIN_ORDERS or not ratios.std() > 0:
        return Ceiling(value, value if number >= MIN_ORDERS else math.nan)
    drawn = ratios[generator(0, "ceiling", number).integers(0, number, (resamples, number))]
    errors = drawn.std(-1, ddof=1) / math.sqrt(number)
    students = np.divide(drawn.mean(-1) - mean, errors, out=np.full(resamples, -math.inf), where=errors > 0)
    low = float(np.quantile(students, 0.05, method="lower"))
    return Ceiling(value, value - low * float(ratios.std(ddof=1)) / math.sqrt(number))
