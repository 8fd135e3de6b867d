"""From a data set to micro-batches: which rank sees which sample, and in which order.

Step k trains on samples k·B … (k + 1)·B − 1 of the stream, whatever the layout: micro-batch m of data-parallel rank r
takes the samples from ``k·B + (m · dp_size + r) · micro_batch_size``, as in Megatron. So a run resumes from the number of
samples alone, also with another number of ranks. The objective prepares the batch in the loader's processes.

:class:`Packing` says what the boundaries of documents mean inside a sample that holds several: ``--reset-position-ids``,
``--reset-attention-mask`` and ``--eod-mask-loss``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron.config.schema import DataConfig
from megatron.data.batches import Batches, Workers
from megatron.data.blend import data_prefixes
from megatron.data.dataset import Pieces
from megatron.data.indexed import read_meta
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import UserError, require
from megatron.model.batch import ModelBatch, Samples, places_in_documents
from megatron.objectives.base import Objective
from megatron.parallel.context import Axis


@dataclass(frozen=True)
class Packing:
    """How samples that hold several documents are treated. The default is one stream of tokens, as in Megatron.

    Boundaries are those of the data set, not the EOD tokens, which a text may lack or contain.

    Attributes:
        reset_positions: positions begin again at 0 with every document.
        reset_attention: tokens see their own document only.
        eod_id: tokens of this id have no loss as inputs (what follows them is another document); None: all tokens have.
    """

    reset_positions: bool = False
    reset_attention: bool = False
    eod_id: int | None = None


ONE_STREAM = Packing()


def build_packing(config: DataConfig) -> Packing:
    """The treatment that the flags ask for.

    Raises:
        UserError: ``--eod-mask-loss`` where neither data nor tokenizer say which token ends a document.
    """
    eod_id = _eod_id(config) if config.eod_mask_loss else None
    return Packing(config.reset_position_ids, config.reset_attention_mask, eod_id)


def _eod_id(config: DataConfig) -> int:
    metas = (read_meta(prefix) or {} for prefix in data_prefixes(config))
    recorded = {meta["eod_id"] for meta in metas if meta.get("eod_id") is not None}
    require(
        len(recorded) <= 1,
        f"the data end their documents with the tokens {sorted(recorded)}",
        "--eod-mask-loss needs one",
        "preprocess the data with one tokenizer, or drop the flag",
    )
    eod_id = next(iter(recorded), None)
    if eod_id is None:
        with suppress(UserError):  # said below, with what it was needed for
            eod_id = build_tokenizer(config).eod_id
    if eod_id is None:
        raise UserError(
            "--eod-mask-loss, but neither PREFIX.meta.json nor the tokenizer names an end-of-document token",
            "the token must be known to be left out of the loss",
            "pass the tokenizer of the data (--vocab-file and --merge-file, or --tokenizer-model), or drop the flag",
        )
    return eod_id


class TokenDataset(Protocol):
    """Anything that gives ``[seq + 1]`` int64 tokens by index, and says where they come from."""

    def __getitem__(self, index: int) -> np.ndarray: ...

    def pieces(self, index: int) -> Pieces:
        """The documents that a sample is cut from."""


@dataclass(frozen=True)
class Share:
    """The samples of one data-parallel rank: iterating over it yields the stream indices of each micro-batch.

    Attributes:
        dp: place among the data-parallel ranks.
        micro_batch_size: samples per micro-batch.
        last_sample: end of the stream; a last incomplete round is filled with indices past it.
        first_sample: samples already consumed.
    """

    dp: Axis
    micro_batch_size: int
    last_sample: int
    first_sample: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first_sample, self.last_sample, self.micro_batch_size * self.dp.size):
            first = start + self.dp.rank * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))


class _MicroBatches(Dataset):
    """Micro-batches by the stream indices of their samples, prepared by the objective."""

    def __init__(self, dataset: TokenDataset, objective: Objective, packing: Packing, *, last_sample: int) -> None:
        self.dataset, self.objective, self.packing, self.last_sample = dataset, objective, packing, last_sample

    def __getitem__(self, indices: list[int]) -> ModelBatch[torch.Tensor]:
        """Indices past the end repeat the last sample; evaluation drops them."""
        rows, packing = [min(index, self.last_sample - 1) for index in indices], self.packing
        tokens = np.stack([self.dataset[row] for row in rows])
        segments = None
        if packing.reset_positions or packing.reset_attention:
            segments = np.stack([self.dataset.pieces(row).places for row in rows])
        samples = Samples(
            tokens,
            np.array(indices),
            loss_mask=None if packing.eod_id is None else tokens != packing.eod_id,
            segment_ids=segments if packing.reset_attention else None,
            position_ids=places_in_documents(segments) if packing.reset_positions and segments is not None else None,
        )
        return as_tensors(self.objective.prepare(samples))


def as_tensors(batch: ModelBatch[np.ndarray]) -> ModelBatch[torch.Tensor]:
    """The batch of an objective as tensors of the same types."""
    return batch.map(lambda array: torch.from_numpy(np.require(array, requirements=("C", "W"))))


def to_device(batch: ModelBatch[torch.Tensor], device: torch.device) -> ModelBatch[torch.Tensor]:
    """The batch on ``device``; from pinned memory the copies do not block."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def build_loader(
    dataset: TokenDataset,
    objective: Objective,
    share: Share,
    *,
    device: torch.device,
    num_workers: int = 2,
    packing: Packing = ONE_STREAM,
    timeout_seconds: float = 0,
) -> Batches:
    """Micro-batches of this rank, in order; use it as a context manager, which ends its processes.

    Args:
        dataset: samples.
        objective: prepares them.
        share: which of them, and in which micro-batches.
        device: of this process.
        num_workers: processes that prepare (0: this process).
        packing: how documents within a sample are treated.
        timeout_seconds: limit of the wait for one batch; 0: none.
    """
    workers = Workers()
    loader = DataLoader(
        _MicroBatches(dataset, objective, packing, last_sample=share.last_sample),
        sampler=share,  # type: ignore[arg-type]
        batch_size=None,  # what the sampler gives are whole micro-batches
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        # Whatever the program around us prefers: Workers counts on the trainer for a parent, and on its held-back signals.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=workers,
        timeout=timeout_seconds if num_workers else 0,
    )
    return Batches(loader, workers)
