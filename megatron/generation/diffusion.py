"""Sampling from a masked diffusion model: which masked tokens to uncover next, and with what.

The state is a row of tokens, some of them the mask token; given tokens may stand anywhere (prompt, infix, suffix) and
are never changed. Every step predicts masked tokens and uncovers some: by a policy (``policies.py``), or ``ancestral``, each
with probability (t-s)/t while t falls linearly from 1 to 0 (the reverse process; Sahoo et al. 2024, arXiv 2406.07524, eq. 7;
Shi et al. 2024, arXiv 2406.04329). What a policy draws has a likelihood that can be computed: ``log_likelihoods``.

Block-wise (semi-autoregressive) decoding uncovers the masked tokens ``block_length`` at a time from left to right
(Arriola et al. 2025, arXiv 2503.09573; Nie et al. 2025). Classifier-free guidance contrasts with the same row without
its given tokens: ``l = l_u + (1 + w)(l_c - l_u)`` (Nie et al. 2024, arXiv 2410.18514, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron.errors import UserError, require
from megatron.generation.flags import KNOWN, ORDERS, POLICIES
from megatron.generation.policies import first_ranked, known_ranks, near_ties, sureness
from megatron.generation.sampling import TokenSampling, draw_tokens, row_uniforms, token_logprobs
from megatron.inference.logits import LogitsFn


@dataclass(frozen=True)
class DiffusionSettings:
    """How to uncover.

    Attributes:
        order: a policy (``policies.py``) or ``ancestral``.
        steps: forward passes in all; None: one for every masked token.
        tokens_per_step: tokens of a block uncovered together, instead of ``steps``; the same whatever the length.
        block_length: masked tokens per block; None: one block.
        order_number: which random order all rows take; None: each row its own, by its sample number (in a likelihood: 0).
        guidance: weight w of classifier-free guidance; 0: none.
        sampling: temperature, top-k, top-p and seed.
    """

    order: str = "confidence"
    steps: int | None = None
    block_length: int | None = None
    guidance: float = 0.0
    sampling: TokenSampling = field(default_factory=TokenSampling)
    tokens_per_step: int | None = None
    order_number: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(
                f"order {self.order!r} is not known", "it says what to uncover next", f"use one of {', '.join(ORDERS)}"
            )
        for name in ("steps", "block_length", "tokens_per_step"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= 10**9:
                raise UserError(f"{name} {value}", "it is from 1 to 1e9", "leave it out for the default")
        require(
            self.steps is None or self.tokens_per_step is None,
            f"steps {self.steps} and tokens_per_step {self.tokens_per_step}",
            "each follows from the other",
            "give one of them",
        )
        require(math.isfinite(self.guidance), f"guidance {self.guidance}", "it weighs logits", "use a finite number")

    def num_passes(self, num_masked: int) -> int:
        """Forward passes that fill ``num_masked`` tokens."""
        size = self.block_length or max(num_masked, 1)
        return sum(split_steps(self, [min(size, num_masked - start) for start in range(0, num_masked, size)]))

    def check_has_likelihood(self) -> None:
        """Check that what is drawn has a likelihood that can be computed.

        Raises:
            UserError: an order that depends on coins, or tokens that are not drawn.
        """
        rule = "a likelihood is of a sampler that draws tokens, and uncovers them by a policy"
        require(self.order in POLICIES, f"order {self.order}", rule, f"use one of {', '.join(POLICIES)}")
        require(self.sampling.temperature > 0, "temperature 0", rule, "use 1 for the model's own distribution")

    def check_steps(self, num_masked: int) -> None:
        """Check that ``num_masked`` tokens can be uncovered in these steps.

        Raises:
            UserError: fewer steps than blocks.
        """
        self.check_blocks(-(-num_masked // (self.block_length or max(num_masked, 1))))

    def check_blocks(self, number: int) -> None:
        """Check that so many blocks can be uncovered in these steps.

        Raises:
            UserError: fewer steps than blocks.
        """
        require(
            self.steps is None or self.steps >= number,
            f"{self.steps} steps for {number} blocks",
            "every block needs at least one step",
            "raise --steps or --block-length",
        )


@dataclass(frozen=True)
class Step:
    """What one step did, for display: ``tokens`` [batch, seq] after it, ``uncovered`` [batch, seq] bool new in it."""

    index: int
    tokens: torch.Tensor
    uncovered: torch.Tensor


class LogLikelihoods(NamedTuple):
    """What a sampler says of given tokens.

    Attributes:
        values: [batch, seq] float64 log p of each token when it is uncovered, nats; 0 where it is given, −inf where top-k or
            top-p would never draw it.
        near_ties: [batch, seq] bool, which were uncovered by a choice that rounding may turn (:func:`near_ties`).
    """

    values: torch.Tensor
    near_ties: torch.Tensor


StopFn = Callable[[int, list[int]], bool]
RevealFn = Callable[
    [torch.Tensor, torch.Tensor], torch.Tensor
]  # logits [n, vocab], which [batch, seq] bool -> tokens [n]


class DiffusionSampler:
    """Fills the masked tokens of rows of equal length.

    Args:
        logits_fn: bidirectional model.
        mask_id: id of the mask token.
        forbidden: ids that are never drawn, besides the mask token (padding rows of the vocabulary).
        device: of the token ids.
    """

    def __init__(
        self, logits_fn: LogitsFn, *, mask_id: int, forbidden: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.logits_fn = logits_fn
        self.block_size: int | None = None  # of a model that is made of blocks
        self.mask_id = mask_id
        self.forbidden = torch.tensor(sorted({mask_id, *forbidden}), device=device)
        self.device = torch.device(device)

    def num_passes(self, settings: DiffusionSettings, *, num_given: int, num_masked: int) -> int:
        """Forward passes that give the likelihood of ``num_masked`` tokens behind ``num_given`` ones."""
        return settings.num_passes(num_masked)

    def check(self, settings: DiffusionSettings, *, num_masked: int) -> None:
        """Check that up to ``num_masked`` tokens can be uncovered so, wherever they stand.

        Raises:
            UserError: fewer steps than blocks, or settings that the model cannot follow.
        """
        settings.check_steps(num_masked)

    @torch.inference_mode()
    def fill(
        self,
        rows: Sequence[Sequence[int]],
        *,
        settings: DiffusionSettings,
        stop: StopFn | None = None,
        on_step: Callable[[Step], None] | None = None,
        sample_numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Replace every mask token of ``rows`` (equal lengths); given tokens come back unchanged.

        All rows go through the steps and blocks of the row with most mask tokens; rows with as many of them do what they
        would do alone.

        Args:
            rows: token ids, ``mask_id`` where a token is wanted.
            settings: order, steps, blocks, guidance, sampling.
            stop: called after each block with (row, its tokens up to the first mask); True leaves the rest masked.
            on_step: called after every step.
            sample_numbers: random stream of each row; default 0, 1, 2, ...
        """
        tokens = self._rows(rows)
        numbers = range(len(rows)) if sample_numbers is None else sample_numbers
        streams = settings.sampling.generators(numbers, self.device)

        def draw(logits: torch.Tensor, uncovered: torch.Tensor) -> torch.Tensor:
            uniforms = None
            if settings.sampling.temperature > 0:
                counts = uncovered.sum(-1).tolist()
                uniforms = torch.cat([row_uniforms(s, n, logits.shape[-1]) for s, n in zip(streams, counts)])
            return draw_tokens(logits, settings.sampling, uniforms)

        self._uncover(self.begin(tokens, tokens == self.mask_id, settings, numbers, streams), draw, stop, on_step)
        return tokens.tolist()

    @torch.inference_mode()
    def log_likelihoods(
        self,
        rows: Sequence[Sequence[int]],
        masked: torch.Tensor,
        *,
        settings: DiffusionSettings,
        numbers: Sequence[int] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> LogLikelihoods:
        """log p of every masked token when the sampler uncovers it: its own walk, with true tokens instead of drawn ones.

        Their sum is the exact log-likelihood of a row under this sampler (see ``policies.py``).

        Args:
            rows: token ids of equal lengths, whole.
            masked: [batch, seq] bool, which tokens are not given; as many in every row.
            settings: a policy, and how tokens are drawn; temperature 1 is the model's own distribution.
            numbers: of the random order of each row; default: 0 for all.
            on_step: called after every step.

        Raises:
            UserError: the sampler has no distribution that could be computed.
        """
        settings.check_has_likelihood()
        truth = self._rows(rows)
        tokens = truth.masked_fill(masked, self.mask_id)
        result = torch.zeros(truth.shape, dtype=torch.float64, device=self.device)

        def reveal(logits: torch.Tensor, uncovered: torch.Tensor) -> torch.Tensor:
            result[uncovered] = token_logprobs(logits, truth[uncovered], settings.sampling)
            return truth[uncovered]

        walk = self.begin(tokens, masked, settings, numbers or [0] * len(rows))
        self._uncover(walk, reveal, on_step=on_step)
        return LogLikelihoods(result, walk.near_ties)

    def begin(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        settings: DiffusionSettings,
        numbers: Sequence[int],
        streams: Sequence[torch.Generator] = (),
    ) -> Walk:
        """The start of a batch: ``masked`` [batch, seq] tokens are wanted; ``numbers`` of the random order of each row."""
        numbers = numbers if settings.order_number is None else [settings.order_number] * len(numbers)
        different = list(dict.fromkeys(numbers))
        # On the CPU: a likelihood under a random order is that of the same order on every device.
        orders = settings.sampling.generators(different, torch.device("cpu"), purpose="order")
        drawn = {number: row_uniforms(stream, tokens.shape[1]) for number, stream in zip(different, orders)}
        uniforms = torch.stack([drawn[number] for number in numbers]).to(tokens.device)
        return Walk(self.filling(), settings, tokens, ~masked, uniforms, streams)

    def filling(self) -> LogitsFn:
        """The model, for one batch."""
        return self.logits_fn

    def blocks(self, masked: torch.Tensor, settings: DiffusionSettings) -> list[torch.Tensor]:
        """Split the ``masked`` tokens of every row, from left to right, into what is uncovered together: bool [batch, seq]
        each."""
        most = int(masked.sum(-1).max())
        if most == 0:
            return []
        size = settings.block_length or most
        rank = masked.cumsum(-1) - 1
        return [masked & (rank // size == index) for index in range(-(-most // size))]

    def _rows(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise UserError(
                f"rows have lengths {sorted(lengths)}", "one call fills rows of equal length", "group them first"
            )
        return torch.tensor([list(row) for row in rows], device=self.device)

    def _uncover(
        self,
        walk: Walk,
        reveal: RevealFn,
        stop: StopFn | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        """Go through blocks and steps; ``reveal`` gives the tokens of what a step uncovers."""
        done = torch.zeros(len(walk.tokens), dtype=torch.bool, device=self.device)
        masked = ~walk.given
        blocks = self.blocks(masked, walk.settings)
        index = 0
        for block, steps in zip(blocks, split_steps(walk.settings, [int(b.sum(-1).max()) for b in blocks])):
            for counts in _schedule(block, steps, order=walk.settings.order):
                candidates = block & masked & ~done[:, None]
                uncovered = self.step(walk, candidates, counts, reveal)
                masked = masked & ~uncovered
                if on_step is not None:
                    on_step(Step(index, walk.tokens, uncovered))
                index += 1
            if stop is not None:
                for row in range(len(walk.tokens)):
                    done[row] |= stop(row, _prefix(walk.tokens[row].tolist(), self.mask_id))
            if bool(done.all()):
                break

    def step(
        self, walk: Walk, candidates: torch.Tensor, counts: torch.Tensor | float, reveal: RevealFn
    ) -> torch.Tensor:
        """Uncover some candidates in place; returns which, [batch, seq] bool.

        ``counts``: tokens to uncover in each row [batch], or the probability of each (ancestral).
        """
        logits, order = None, walk.settings.order
        if isinstance(counts, float):  # ancestral: coins first, so that a step without heads needs no pass
            coins = torch.stack([row_uniforms(stream, candidates.shape[1]) for stream in walk.streams])
            uncovered = candidates & (coins < counts)
        elif order in KNOWN:
            uncovered = first_ranked(known_ranks(order, walk.uniforms), candidates, counts)
        elif not bool(candidates.any()):
            return candidates
        else:
            logits = self._logits(walk, candidates)
            ranks = torch.zeros(candidates.shape, dtype=torch.float64, device=self.device)
            ranks[candidates] = sureness(order, logits)
            uncovered = first_ranked(ranks, candidates, counts)
            walk.near_ties |= near_ties(ranks, candidates, uncovered)
            logits = logits[uncovered[candidates]]
        if bool(uncovered.any()):
            logits = self._logits(walk, uncovered) if logits is None else logits
            walk.tokens[uncovered] = reveal(logits, uncovered)
        return uncovered

    def _logits(self, walk: Walk, wanted: torch.Tensor) -> torch.Tensor:
        """Logits [wanted, vocab] in fp32 or more, guided, with tokens that cannot be drawn at -inf."""
        tokens, guidance = walk.tokens, walk.settings.guidance
        logits = _at_least_fp32(walk.logits_fn(tokens, positions=wanted))
        if guidance != 0.0:
            without = walk.logits_fn(tokens.masked_fill(walk.given, self.mask_id), positions=wanted)
            logits = _at_least_fp32(without) * -guidance + (1.0 + guidance) * logits
        return logits.index_fill(-1, self.forbidden, -torch.inf)


@dataclass
class Walk:
    """One batch on its way.

    Attributes:
        logits_fn: the model.
        settings: how to uncover.
        tokens: [batch, seq], changed in place.
        given: [batch, seq] bool, tokens that never change.
        uniforms: [batch, seq] numbers of the random order.
        streams: of each row, for coins.
        near_ties: [batch, seq] bool, changed in place, see :class:`LogLikelihoods`.
    """

    logits_fn: LogitsFn
    settings: DiffusionSettings
    tokens: torch.Tensor
    given: torch.Tensor
    uniforms: torch.Tensor
    streams: Sequence[torch.Generator] = ()

    def __post_init__(self) -> None:
        self.near_ties = torch.zeros_like(self.given)


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def split_steps(settings: DiffusionSettings, sizes: list[int]) -> list[int]:
    """Steps of each block: an equal share, at least 1; no more than the block has tokens, except for ancestral steps,
    which may uncover nothing."""
    if settings.steps is None:
        return [-(-size // (settings.tokens_per_step or 1)) for size in sizes]
    settings.check_blocks(len(sizes))
    share, rest = divmod(settings.steps, max(len(sizes), 1))
    shares = [share + (index < rest) for index in range(len(sizes))]
    return shares if settings.order == "ancestral" else [min(pair) for pair in zip(shares, sizes)]


def _schedule(block: torch.Tensor, steps: int, *, order: str) -> Iterator[torch.Tensor | float]:
    """For each step: how many tokens every row uncovers [batch], or the probability of each token (ancestral)."""
    sizes = block.sum(-1)
    for step in range(steps):
        if order == "ancestral":
            yield 1.0 / (steps - step)  # (t - s) / t with t = 1 - step/steps
        else:
            yield sizes // steps + (step < sizes % steps)


def _prefix(tokens: list[int], mask_id: int) -> list[int]:
    """The tokens before the first mask."""
    return tokens[: tokens.index(mask_id)] if mask_id in tokens else tokens
