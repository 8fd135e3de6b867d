"""Start masked diffusion from an autoregressive checkpoint (``pretrain_mdm.py --finetune --load AR_RUN``).

Every tensor is taken over, attention becomes bidirectional through the objective, and the embedding of the mask token,
which the autoregressive model never read, starts as the mean of the token embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.files import Fragment
from megatron.checkpoint.reader import CheckpointReader
from megatron.config.schema import WEIGHT, Config
from megatron.errors import require
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec

EMBEDDING, HEAD = VOCABULARY_TENSORS = ("word_embeddings.weight", "lm_head.weight")


def open_checkpoint(
    tag: Path, config: Config, context: ParallelContext, *, vocab_size: int, weights: str = WEIGHT
) -> CheckpointReader:
    """The checkpoint; with a mask token where masked diffusion starts from a model that never used one. A collective call.

    Args:
        tag: folder of the checkpoint.
        config: of the run that begins.
        context: this process.
        vocab_size: vocabulary before padding.
        weights: kind that is read as the weights.
    """
    reader = CheckpointReader(tag, weights)
    mask_id, padded = config.objective.mask_token_id, config.model.padded_vocab_size
    was_masked = reader.config.objective.mask_token_id is not None
    if config.run.finetune and not was_masked and mask_id is not None and padded is not None:
        return MaskedReader(tag, weights, context, size=vocab_size, mask_id=mask_id, rows=padded)
    return reader


class MaskedReader(CheckpointReader):
    """Reads an AR model with a mask token: its embedding is the mean of the token embeddings.

    The row of the mask token was never an input: it holds noise, or what the softmax pushed it to. The mean says "some
    token": it has the scale and the common direction of the embeddings, and where nothing else is known, the mean is
    the input with the least summed squared distance to all tokens. (AR models adapted to diffusion: arXiv 2410.17891.)

    Where the head has its own matrix, the row of the mask token becomes that of the padding: it is never a label, and the
    AR model has already learned to give such rows no probability. Rows that the new model has more are equal to it.

    The first process alone reads whole matrices, for their means; all read the rows that they hold.
    """

    def __init__(
        self, tag: Path, weights: str, context: ParallelContext, *, size: int, mask_id: int, rows: int
    ) -> None:
        """A collective call.

        Args:
            tag, weights: see :class:`CheckpointReader`.
            context: this process.
            size: tokens before padding; the mean runs over these rows, without the mask row.
            mask_id: row of the mask token.
            rows: of the new model.

        Raises:
            UserError: the vocabulary or the mask token does not fit the rows.
        """
        super().__init__(tag, weights)
        self._saved, self._mask_id, self._size = dict(self.specs), mask_id, size
        saved = self._spec(EMBEDDING).full_shape[0]
        require(
            0 < size <= saved <= rows and 0 <= mask_id < rows,
            f"vocabulary {size}, mask token {mask_id}, {saved} rows in the checkpoint and {rows} in the new model",
            "the rows must hold the vocabulary and the mask token, and none may be lost",
            "change --mask-token-id or --padded-vocab-size",
        )
        self._rows: dict[str, Tensor] = {}
        self._rows = context.gather_objects(dict(self._means()) if context.is_first_rank else {})[0]
        for name in self._rows:
            shape = rows, *self.specs[name].full_shape[1:]
            self.specs[name] = replace(self.specs[name], full_shape=shape, blocks=shape[:1])

    def read(self, fragment: Fragment) -> None:
        """Fill ``fragment.data``: saved rows from the checkpoint, new ones and that of the mask token with what they are."""
        name, data = fragment.name, fragment.data
        if fragment.kind != WEIGHT or name not in self._rows:
            super().read(fragment)
            return
        row, (rows, width), (all_rows, _) = self._rows[name], self._saved[name].full_shape, self.specs[name].full_shape
        # In the whole matrix: of the fragment, and of what of it was saved.
        start = fragment.start + fragment.tp_rank * (all_rows // fragment.tp_size) * width
        saved = min(max(rows * width - start, 0), len(data))
        if saved:
            super().read(replace(fragment, tp_rank=0, tp_size=1, start=start, data=data[:saved]))
        is_changed = name == EMBEDDING or self._mask_id >= self._size
        for first, last in ((rows, all_rows), (self._mask_id, self._mask_id + is_changed)):
            low, high = max(first * width - start, 0), min(last * width - start, len(data))
            if low < high:
                data[low:high] = row[torch.arange(start + low, start + high) % width].to(data.device)

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        """The row of the mask token and of new rows, [hidden] fp32, by tensor."""
        tokens = torch.arange(self._size) != self._mask_id
        yield EMBEDDING, self.tensor(EMBEDDING)[: self._size][tokens].mean(dim=0, dtype=torch.float64).float()
        if HEAD in self.specs:
            rows, width = self._saved[HEAD].full_shape
            unused = torch.empty(rows - self._size, width)
            self.read(Fragment(WEIGHT, HEAD, 0, 1, self._size * width, unused.view(-1)))
            yield HEAD, unused.mean(dim=0) if len(unused) else torch.zeros(width)

    def _spec(self, name: str) -> ShardSpec:
        return self._saved.get(name) or super()._spec(name)
