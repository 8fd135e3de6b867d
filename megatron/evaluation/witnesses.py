"""Witnesses of :mod:`megatron.evaluation.court`: every way to score a sample that a model has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from megatron.evaluation.blocks import scorer_of
from megatron.evaluation.estimators import Estimator, MaskedBound
from megatron.evaluation.exact import MIN_ORDERS, PolicyScorer, TokenScores, log_mean_exp, tangent
from megatron.evaluation.passes import ByPass, Passes, causal_passes, masked_passes
from megatron.evaluation.scorer import CausalScorer, Request, Tally
from megatron.evaluation.uniform import UniformBound
from megatron.generation.blocks import sampler_of
from megatron.generation.diffusion import DiffusionSettings
from megatron.generation.sampling import TokenSampling
from megatron.inference.blocks import BlockLogitsFn
from megatron.inference.logits import LogitsFn
from megatron.inference.model import InferenceModel
from megatron.randomness import named_seed
from megatron.runs.likelihoods import BOUND, EXACT, FLOOR, MIXTURE

MAX_TANGENT_TOKENS = 16


class Witness(Protocol):
    """One way to score a sample.

    Attributes:
        name: of the estimator.
        kind: EXACT, BOUND, MIXTURE or FLOOR: what its value says of the NLL.
        draws: noise draws behind a value; 0 where it is exact.
    """

    name: str
    kind: str
    draws: int

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """Token by token, one a request; of a bound, what the token adds to it."""

    def passes(self, num_tokens: int) -> int:
        """Forward passes for a target."""


class ChainRule:
    """The one exact likelihood of a causal model."""

    name, kind, draws = "chain rule", EXACT, 0

    def __init__(self, logits_fn: LogitsFn, loaded: InferenceModel, batch_size: int) -> None:
        self._scorer = CausalScorer(
            logits_fn, max_length=loaded.max_length, batch_size=batch_size, device=loaded.device
        )

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """See :class:`Witness`."""
        return _without_choice(self._scorer.token_logprobs(requests))

    def by_pass(self, requests: Sequence[Request]) -> list[Passes]:
        """See :class:`ByPass`."""
        return [causal_passes(own) for own in self._scorer.token_logprobs(requests)]

    def passes(self, num_tokens: int) -> int:
        """See :class:`Witness`."""
        return 1


class Bound:
    """The bound of masked diffusion by exact counts, stratified, in antithetic pairs; blocks of one token have no other order,
    and are exact."""

    def __init__(self, logits_fn: BlockLogitsFn, loaded: InferenceModel, batch_size: int, *, pairs: int) -> None:
        self._pairs, self._estimator, self._block_size = pairs, MaskedBound(antithetic=True), loaded.block_size
        self._scorer = scorer_of(loaded, logits_fn, batch_size=batch_size)
        number = loaded.max_length - 1
        estimator = self._estimator_for(number)
        is_exact, is_drawn = estimator.kind == "exact", estimator.max_draws(number) is None
        self.kind, self.draws = (EXACT, 0) if is_exact else (BOUND, pairs)
        self.name = (
            "chain rule" if is_exact else f"bound, {self.passes(number)} passes" if is_drawn else "bound, all masks"
        )

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """See :class:`Witness`."""
        return _without_choice([tally.token_values for tally in self._tallies(requests)])

    def by_pass(self, requests: Sequence[Request]) -> list[Passes]:
        """See :class:`ByPass`."""
        return [masked_passes(tally, block_size=self._block_size) for tally in self._tallies(requests)]

    def passes(self, num_tokens: int) -> int:
        """See :class:`Witness`."""
        estimator = self._estimator_for(num_tokens)
        draws = estimator.max_draws(num_tokens) or self._pairs
        return draws * estimator.draws(num_tokens, key="", start=0, count=1).masks.shape[1]

    def _tallies(self, requests: Sequence[Request]) -> list[Tally]:
        tallies = [self._scorer.tally(request, self._estimator, num_draws=self._pairs) for request in requests]
        self._scorer.extend(tallies, num_draws=self._pairs)
        return tallies

    def _estimator_for(self, num_tokens: int) -> Estimator:
        whole = Request((0,), (0,) * num_tokens)
        return self._scorer.estimator_for(whole, self._estimator, num_draws=self._pairs)


class UnderPolicy:
    """The exact likelihood of the sampler that uncovers by a policy."""

    kind, draws = EXACT, 0

    def __init__(self, loaded: InferenceModel, batch_size: int, *, settings: DiffusionSettings) -> None:
        self._scorer = PolicyScorer(sampler_of(loaded), settings, max_length=loaded.max_length, batch_size=batch_size)
        self.name = self._scorer.name

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """See :class:`Witness`."""
        return self._scorer.token_scores(requests)

    def passes(self, num_tokens: int) -> int:
        """See :class:`Witness`."""
        return self._scorer.num_passes(Request((0,), (0,) * num_tokens))


class RandomOrders:
    """log-likelihoods of samples under ``number`` random orders, of every sample its own."""

    def __init__(self, scorer: PolicyScorer, *, block_size: int | None, number: int) -> None:
        self._scorer, self._block_size, self.number = scorer, block_size, number

    def score(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """log p of the tokens under each order, fp64 [orders, target] a request."""
        found = []
        for order in range(self.number):
            numbers = [named_seed(order, own.key) for own in requests]
            found.append([own.logprobs for own in self._scorer.token_scores(requests, numbers=numbers)])
        return [np.stack(own) for own in zip(*found)]

    def parts(self, request: Request) -> list[slice]:
        """Target tokens whose order is drawn apart from that of others: the blocks of a model of blocks, else all."""
        start, stop = len(request.context), len(request.context) + len(request.target)
        size = self._block_size or stop
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        return [slice(one - start, other - start) for one, other in pairwise(edges)]

    def passes(self, num_tokens: int) -> int:
        """Forward passes for a target."""
        return self.number * self._scorer.num_passes(Request((0,), (0,) * num_tokens))


class Mixture:
    """The K-order bound of the mixture over random orders: ``−log (1/K) Σ p_σ``, block by block."""

    kind = MIXTURE

    def __init__(self, orders: RandomOrders) -> None:
        self.draws, self.name = orders.number, f"{orders.number} orders in the logarithm"
        self._orders, self.passes = orders, orders.passes

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """See :class:`Witness`. Tokens share the value by the orders' weights, and evenly what the logarithm adds."""
        values = []
        for request, by_order in zip(requests, self._orders.score(requests)):
            values.append(np.concatenate([_shared_out(by_order[:, part]) for part in self._orders.parts(request)]))
        return _without_choice(values)


class Tangent:
    """The lower bound on the NLL of the mixture: ``1 − log ψ − mean p_σ / ψ``, block by block, for blocks of a few tokens.

    Half of the orders give ψ, the others the mean, so that its expectation is a bound for any number of them.
    """

    kind = FLOOR

    def __init__(self, orders: RandomOrders) -> None:
        self.draws, self.name = orders.number, f"{orders.number} orders, tangent"
        self._orders, self._half, self.passes = orders, orders.number // 2, orders.passes

    def scores(self, requests: Sequence[Request]) -> list[TokenScores]:
        """See :class:`Witness`. Tokens of a block share its value evenly."""
        values = [np.zeros(len(request.target)) for request in requests]
        for request, own, by_order in zip(requests, values, self._orders.score(requests)):
            for part in self._orders.parts(request):
                logprobs = by_order[:, part].sum(-1)
                reference = float(log_mean_exp(logprobs[: self._half]))
                own[part] = tangent(logprobs[self._half :], reference) / (part.stop - part.start)
        return _without_choice(values)

    @staticmethod
    def is_for(loaded: InferenceModel, orders: int) -> bool:
        """Whether p_σ / ψ is not dominated by single orders, and there are enough for an error that can be believed."""
        return orders >= 2 * MIN_ORDERS and (loaded.block_size or loaded.max_length - 1) <= MAX_TANGENT_TOKENS


def _shared_out(by_order: np.ndarray) -> np.ndarray:
    """``log mean exp`` over orders of the sum over tokens, as one share a token; by_order: [orders, tokens]."""
    logprobs = by_order.sum(-1)
    weights = np.exp(logprobs - logprobs.max())
    shares = weights @ by_order / weights.sum()
    return shares + (log_mean_exp(logprobs) - shares.sum()) / len(shares)


def _without_choice(logprobs: Sequence[np.ndarray]) -> list[TokenScores]:
    """Scores in an order that the model does not choose."""
    return [TokenScores(own, np.zeros(len(own), dtype=bool)) for own in logprobs]


class MainWitness(Witness, ByPass, Protocol):
    """What every model has: its likelihood, or the bound on it."""


def main_witness(loaded: InferenceModel, *, pairs: int, batch_size: int) -> MainWitness:
    """The likelihood of a causal model, the bound of another.

    Args:
        loaded: the model.
        pairs: antithetic pairs of noise for a bound.
        batch_size: rows per forward pass.
    """
    shut = torch.tensor(sorted({*loaded.unused_ids, *([loaded.mask_id] if loaded.is_masked else [])}), dtype=torch.long)
    shut = shut.to(loaded.device)

    def logits(
        input_ids: torch.Tensor, *, positions: torch.Tensor | None = None, clean: torch.Tensor | None = None
    ) -> torch.Tensor:
        return loaded.logits(input_ids, positions=positions, clean=clean).float().index_fill(-1, shut, -torch.inf)

    if loaded.is_causal:
        return ChainRule(logits, loaded, batch_size)
    return (Bound if loaded.is_masked else UniformBound)(logits, loaded, batch_size, pairs=pairs)


def witnesses(loaded: InferenceModel, settings: Sequence[DiffusionSettings], *, pairs: int, orders: int,
              batch_size: int) -> list[Witness]:  # fmt: skip
    """Everything that can be said of a model.

    Args:
        loaded: the model.
        settings: samplers of masked diffusion.
        pairs: antithetic pairs of masks for the bound.
        orders: of the bounds of the mixture; 0: without them.
        batch_size: rows per forward pass.
    """
    found: list[Witness] = [main_witness(loaded, pairs=pairs, batch_size=batch_size)]
    if not loaded.is_masked:
        return found
    if orders:
        random = DiffusionSettings("random", sampling=TokenSampling(temperature=1.0))
        scorer = PolicyScorer(sampler_of(loaded), random, max_length=loaded.max_length, batch_size=batch_size)
        drawn = RandomOrders(scorer, block_size=loaded.block_size, number=orders)
        found += [Mixture(drawn), *([Tangent(drawn)] if Tangent.is_for(loaded, orders) else [])]
    return found + [UnderPolicy(loaded, batch_size, settings=own) for own in settings]
