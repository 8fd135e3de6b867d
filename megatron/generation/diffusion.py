"""Sampling from a masked diffusion model: which masked tokens to uncover next, and with what.

The state is a row of tokens, some of them the mask token; given tokens may stand anywhere (prompt, infix, suffix) and
are never changed. Every step predicts all masked tokens and uncovers some:

* ``ancestral``: each masked token with probability (t-s)/t while t falls linearly from 1 to 0 (the reverse process;
  Sahoo et al. 2024, arXiv 2406.07524, eq. 7; Shi et al. 2024, arXiv 2406.04329);
* ``random``: a fixed number at random positions (the same process with counts instead of coins);
* ``confidence``: the tokens with the highest probability (Chang et al. 2022, arXiv 2202.04200; Nie et al. 2025,
  arXiv 2502.09992, sec. 2.4);
* ``margin``: the largest difference between the two best tokens (Kim et al. 2025, arXiv 2502.06768);
* ``entropy``: the lowest entropy of the prediction.

Block-wise (semi-autoregressive) decoding uncovers the masked tokens ``block_length`` at a time from left to right
(Arriola et al. 2025, arXiv 2503.09573; Nie et al. 2025). Classifier-free guidance contrasts with the same row without
its given tokens: ``l = l_u + (1 + w)(l_c - l_u)`` (Nie et al. 2024, arXiv 2410.18514, eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron.errors import UserError, require
from megatron.generation.sampling import TokenSampling, draw_tokens, row_uniforms
from megatron.inference.logits import LogitsFn

ORDERS = ("confidence", "margin", "entropy", "random", "ancestral")


@dataclass(frozen=True)
class DiffusionSettings:
    """How to uncover.

    Attributes:
        order: one of ``ORDERS``.
        steps: forward passes in all; None: one for every masked token.
        block_length: masked tokens per block; None: one block.
        guidance: weight w of classifier-free guidance; 0: none.
        sampling: temperature, top-k, top-p and seed.
    """

    order: str = "confidence"
    steps: int | None = None
    block_length: int | None = None
    guidance: float = 0.0
    sampling: TokenSampling = field(default_factory=TokenSampling)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(
                f"order {self.order!r} is not known", "it says what to uncover next", f"use one of {', '.join(ORDERS)}"
            )
        for name, value in (("steps", self.steps), ("block_length", self.block_length)):
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is not positive", "it counts from 1", "leave it out for the default")
        require(math.isfinite(self.guidance), f"guidance {self.guidance}", "it weighs logits", "use a finite number")

    def check_steps(self, num_masked: int) -> None:
        """Check that ``num_masked`` tokens can be uncovered in these steps.

        Raises:
            UserError: fewer steps than blocks.
        """
        blocks = -(-num_masked // (self.block_length or max(num_masked, 1)))
        require(
            self.steps is None or self.steps >= blocks,
            f"{self.steps} steps for {blocks} blocks",
            "every block needs at least one step",
            "raise --steps or --block-length",
        )


@dataclass(frozen=True)
class Step:
    """What one step did, for display: ``tokens`` [batch, seq] after it, ``uncovered`` [batch, seq] bool new in it."""

    index: int
    tokens: torch.Tensor
    uncovered: torch.Tensor


StopFn = Callable[[int, list[int]], bool]


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
        self.mask_id = mask_id
        self.forbidden = torch.tensor(sorted({mask_id, *forbidden}), device=device)
        self.device = torch.device(device)

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
        lengths = {len(row) for row in rows}
        if len(lengths) != 1:
            raise UserError(
                f"rows have lengths {sorted(lengths)}", "one call fills rows of equal length", "group them first"
            )
        tokens = torch.tensor([list(row) for row in rows], device=self.device)
        given = tokens != self.mask_id
        streams = settings.sampling.generators(
            range(len(rows)) if sample_numbers is None else sample_numbers, self.device
        )
        blocks = _blocks(~given, settings.block_length)
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        index = 0
        for block, steps in zip(blocks, _split_steps(settings, [int(b.sum(-1).max()) for b in blocks])):
            for chosen_counts in _schedule(block, steps, order=settings.order):
                candidates = block & (tokens == self.mask_id) & ~done[:, None]
                uncovered = self._step(tokens, given, candidates, chosen_counts, streams=streams, settings=settings)
                if on_step is not None:
                    on_step(Step(index, tokens, uncovered))
                index += 1
            if stop is not None:
                for row in range(len(rows)):
                    done[row] |= stop(row, _prefix(tokens[row].tolist(), self.mask_id))
            if bool(done.all()):
                break
        return tokens.tolist()

    def _step(
        self,
        tokens: torch.Tensor,
        given: torch.Tensor,
        candidates: torch.Tensor,
        counts: torch.Tensor | float,
        *,
        streams: list[torch.Generator],
        settings: DiffusionSettings,
    ) -> torch.Tensor:
        """Uncover some candidates in place; returns which, [batch, seq] bool.

        ``counts``: tokens to uncover in each row [batch], or the probability of each (ancestral).
        """
        if isinstance(counts, float):  # ancestral: coins first, so that a step without heads needs no pass
            coins = torch.stack([row_uniforms(stream, tokens.shape[1]) for stream in streams])
            candidates = candidates & (coins < counts)
        if not bool(candidates.any()):
            return torch.zeros_like(candidates)
        logits = self._logits(tokens, given, candidates, guidance=settings.guidance)
        per_row = candidates.sum(-1).tolist()
        uniforms = None
        if settings.sampling.temperature > 0:
            uniforms = torch.cat([row_uniforms(s, n, logits.shape[-1]) for s, n in zip(streams, per_row)])
        drawn = draw_tokens(logits, settings.sampling, uniforms)
        uncovered = candidates
        if not isinstance(counts, float):
            scores = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=self.device)
            scores[candidates] = _scores(logits, drawn, settings.order, streams=streams, per_row=per_row)
            rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            uncovered = candidates & (rank < counts[:, None])
        proposal = tokens.clone()
        proposal[candidates] = drawn
        tokens[uncovered] = proposal[uncovered]
        return uncovered

    def _logits(
        self, tokens: torch.Tensor, given: torch.Tensor, candidates: torch.Tensor, *, guidance: float
    ) -> torch.Tensor:
        """Logits [candidates, vocab] in fp32, guided, with tokens that cannot be drawn at -inf."""
        logits = self.logits_fn(tokens, positions=candidates).float()
        if guidance != 0.0:
            without = self.logits_fn(tokens.masked_fill(given, self.mask_id), positions=candidates).float()
            logits = without + (1.0 + guidance) * (logits - without)
        return logits.index_fill(-1, self.forbidden, -torch.inf)


def _scores(
    logits: torch.Tensor, drawn: torch.Tensor, order: str, *, streams: list[torch.Generator], per_row: list[int]
) -> torch.Tensor:
    """How much each candidate wants to be uncovered now, [candidates] float64."""
    if order == "random":
        return torch.cat([row_uniforms(stream, count) for stream, count in zip(streams, per_row)])
    logprobs = logits.double().log_softmax(-1)
    if order == "confidence":
        return logprobs.gather(-1, drawn[:, None]).squeeze(-1).exp()
    if order == "margin":
        best = logprobs.topk(2, dim=-1).values.exp()
        return best[:, 0] - best[:, 1]
    assert order == "entropy", order
    return (logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1)


def _blocks(masked: torch.Tensor, block_length: int | None) -> list[torch.Tensor]:
    """Split the masked tokens of every row, from left to right, into blocks: bool [batch, seq] each."""
    most = int(masked.sum(-1).max())
    if most == 0:
        return []
    size = block_length or most
    rank = masked.cumsum(-1) - 1
    return [masked & (rank // size == index) for index in range(-(-most // size))]


def _split_steps(settings: DiffusionSettings, sizes: list[int]) -> list[int]:
    """Steps of each block: an equal share, at least 1; no more than the block has tokens, except for ancestral steps,
    which may uncover nothing."""
    if settings.steps is None:
        return sizes
    settings.check_steps(sum(sizes))
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
