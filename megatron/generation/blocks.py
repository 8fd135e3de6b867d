"""Sampling from a model of blocks: block after block from left to right, a policy within each (arXiv 2503.09573).

Blocks are the model's own, at multiples of their size from the start of a row. A block sees the blocks before it and
nothing behind, so finished ones are computed once (``inference/blocks.py``), and a likelihood needs no order among them:
given the text, every block is a row of its own, and all of them are scored in the passes of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megatron.errors import require
from megatron.generation.diffusion import DiffusionSampler, DiffusionSettings, LogLikelihoods, Step, Walk, split_steps
from megatron.generation.sampling import token_logprobs
from megatron.inference.blocks import BlockLogitsFn
from megatron.inference.logits import LogitsFn
from megatron.inference.model import InferenceModel


def sampler_of(loaded: InferenceModel) -> DiffusionSampler:
    """The sampler of a loaded model of masked diffusion."""
    options: dict[str, Any] = {"mask_id": loaded.mask_id, "forbidden": loaded.unused_ids, "device": loaded.device}
    if loaded.block_size is None:
        return DiffusionSampler(loaded.logits, **options)
    return BlockSampler(loaded.logits, block_size=loaded.block_size, filling=loaded.filling, **options)


def block_sizes(start: int, number: int, size: int) -> list[int]:
    """How ``number`` tokens that begin at position ``start`` fall into blocks of ``size``."""
    first = min(-start % size or size, number)
    return [first] * (number > 0) + [min(size, number - done) for done in range(first, number, size)]


class BlockSampler(DiffusionSampler):
    """Fills rows from left to right in the model's own blocks.

    Args:
        logits_fn: model of blocks.
        mask_id: id of the mask token.
        block_size: tokens per block.
        filling: makes a model for one batch that remembers finished blocks; None: ``logits_fn`` is asked every time.
        forbidden: ids that are never drawn, besides the mask token.
        device: of the token ids.
    """

    def __init__(
        self,
        logits_fn: BlockLogitsFn,
        *,
        mask_id: int,
        block_size: int,
        filling: Callable[[], LogitsFn] | None = None,
        forbidden: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(logits_fn, mask_id=mask_id, forbidden=forbidden, device=device)
        self.block_size = self._size = block_size
        self._block_logits, self._filling = logits_fn, filling

    def num_passes(self, settings: DiffusionSettings, *, num_given: int, num_masked: int) -> int:
        """See :class:`DiffusionSampler`; all blocks share their passes."""
        return max(split_steps(settings, block_sizes(num_given, num_masked, self._size)), default=0)

    def check(self, settings: DiffusionSettings, *, num_masked: int) -> None:
        """See :class:`DiffusionSampler`."""
        self._check_settings(settings)
        settings.check_blocks(len(block_sizes(self._size - 1, num_masked, self._size)))

    def filling(self) -> LogitsFn:
        """The model, for one batch."""
        return self.logits_fn if self._filling is None else self._filling()

    def begin(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        settings: DiffusionSettings,
        numbers: Sequence[int],
        streams: Sequence[torch.Generator] = (),
    ) -> Walk:
        """See :class:`DiffusionSampler`.

        Raises:
            UserError: settings of another kind of model, or given tokens behind masked ones.
        """
        self._check_settings(settings)
        require(
            not bool((~masked & (masked.cumsum(-1) > 0)).any()),
            "given tokens behind tokens to be filled in",
            "block diffusion writes from left to right: a block sees the blocks before it, and nothing behind",
            "drop what stands behind the gap (--infix, or text after [MASK]), or load a model of full-sequence masked diffusion",
        )
        return super().begin(tokens, masked, settings, numbers, streams)

    def blocks(self, masked: torch.Tensor, settings: DiffusionSettings) -> list[torch.Tensor]:
        """The model's blocks that hold masked tokens."""
        index = torch.arange(masked.shape[1], device=masked.device) // self._size
        return [masked & (index == block) for block in index[masked.any(0)].unique().tolist()]

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
        """See :class:`DiffusionSampler`: the same walk, in all blocks at once."""
        settings.check_has_likelihood()
        truth, size = self._rows(rows), self._size
        begun = self.begin(truth.masked_fill(masked, self.mask_id), masked, settings, numbers or [0] * len(rows))
        whole = F.pad(truth, (0, -truth.shape[1] % size), value=self.mask_id)  # what is behind a row stays masked

        def by_block(values: torch.Tensor, fill: int = 0) -> torch.Tensor:
            return F.pad(values, (0, whole.shape[1] - values.shape[1]), value=fill).view(-1, size)

        def by_row(values: torch.Tensor) -> torch.Tensor:
            return values.view(whole.shape)[:, : truth.shape[1]]

        def logits(input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
            assert positions is not None
            return self._block_logits(input_ids.view(whole.shape), positions=positions.view(whole.shape), clean=whole)

        answers, masked = whole.view(-1, size), by_block(masked)
        result = torch.zeros(answers.shape, dtype=torch.float64, device=self.device)

        def reveal(logits: torch.Tensor, uncovered: torch.Tensor) -> torch.Tensor:
            result[uncovered] = token_logprobs(logits, answers[uncovered], settings.sampling)
            return answers[uncovered]

        uniforms = by_block(begun.uniforms)
        walk = Walk(logits, settings, by_block(begun.tokens, self.mask_id), ~masked, uniforms)
        for index, counts in enumerate(self._counts(masked, settings, num_rows=len(rows))):
            uncovered = self.step(walk, masked, counts, reveal)
            masked = masked & ~uncovered
            if on_step is not None:
                on_step(Step(index, by_row(walk.tokens), by_row(uncovered)))
        return LogLikelihoods(by_row(result), by_row(walk.near_ties))

    def _counts(self, masked: torch.Tensor, settings: DiffusionSettings, *, num_rows: int) -> Iterator[torch.Tensor]:
        """Tokens that each block uncovers in each step, [batch · blocks]: as many in every row."""
        sizes = masked.sum(-1)
        own = sizes.view(num_rows, -1)[0]
        steps = torch.zeros_like(own)
        steps[own > 0] = torch.tensor(split_steps(settings, own[own > 0].tolist()), device=own.device)
        steps = steps.repeat(num_rows)
        share, rest = sizes // steps.clamp(min=1), sizes % steps.clamp(min=1)
        for step in range(int(steps.max())):
            yield (share + (step < rest)) * (step < steps)

    def _check_settings(self, settings: DiffusionSettings) -> None:
        own = f"the model has blocks of {self._size} tokens, and sees all that is finished before one"
        require(settings.block_length in (None, self._size), f"block_length {settings.block_length}", own,
                "leave --block-length out")  # fmt: skip
        require(settings.guidance == 0, f"guidance {settings.guidance:g}", own, "leave --guidance out: it needs a model that "
                "was trained without them, too")  # fmt: skip
