"""From a data set to micro-batches: which rank sees which sample, and in which order.

Step k trains on samples k·B … (k + 1)·B − 1 of the stream, whatever the layout: micro-batch m of data-parallel rank r
takes the samples from ``k·B + (m · dp_size + r) · micro_batch_size``, as in Megatron. So a run resumes from the number of
samples alone, also with another number of ranks. The objective prepares the batch in the loader's processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron.data.batches import Batches, Workers
from megatron.data.dataset import Pieces
from megatron.data.packing import ONE_STREAM, Packing, places_in_documents
from megatron.model.batch import ModelBatch, Samples
from megatron.objectives.base import Objective
from megatron.parallel.context import ParallelContext


class TokenDataset(Protocol):
    """Anything that gives ``[seq + 1]`` int64 tokens by index, and says where they come from."""

    def __getitem__(self, index: int) -> np.ndarray: ...

    def pieces(self, index: int) -> Pieces: ...


class MicroBatchSampler(Sampler[list[int]]):
    """Stream indices of each micro-batch of one data-parallel rank."""

    def __init__(
        self, *, first_sample: int, last_sample: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        """Args:
        first_sample: samples already consumed.
        last_sample: end of the stream; a last incomplete round is filled with indices past it.
        micro_batch_size: samples per micro-batch.
        dp_rank, dp_size: place among the data-parallel ranks.
        """
        self.first_sample, self.last_sample = first_sample, last_sample
        self.micro_batch_size = micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.dp_size
        for start in range(self.first_sample, self.last_sample, stride):
            first = start + self.dp_rank * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))

    def __len__(self) -> int:
        stride = self.micro_batch_size * self.dp_size
        return -(-(self.last_sample - self.first_sample) // stride)


class _Indexed(NamedTuple):
    """One sample: its tokens [seq + 1], its index in the stream, and the segment of each token where that is asked for."""

    tokens: np.ndarray
    sample_id: int
    segment_ids: np.ndarray | None


class _WithIndex(Dataset):
    """Samples with their stream index. Indices past the end repeat the last sample; evaluation drops them."""

    def __init__(self, dataset: TokenDataset, last_sample: int, packing: Packing) -> None:
        self.dataset, self.last_sample, self.packing = dataset, last_sample, packing

    def __getitem__(self, index: int) -> _Indexed:
        row = min(index, self.last_sample - 1)
        segments = self.dataset.pieces(row).places if self.packing.asks_for_documents else None
        return _Indexed(self.dataset[row], index, segments)


class _Prepare:
    """Collate function: stack the samples and let the objective make the batch (picklable)."""

    def __init__(self, objective: Objective, packing: Packing) -> None:
        self.objective, self.packing = objective, packing

    def __call__(self, items: list[_Indexed]) -> ModelBatch[torch.Tensor]:
        return as_tensors(self.objective.prepare(self._samples(items)))

    def _samples(self, items: list[_Indexed]) -> Samples:
        packing = self.packing
        tokens = np.stack([item.tokens for item in items])
        segments = None
        if packing.asks_for_documents:
            segments = np.stack([item.segment_ids for item in items if item.segment_ids is not None])
        return Samples(
            tokens,
            np.array([item.sample_id for item in items]),
            loss_mask=None if packing.eod_id is None else tokens != packing.eod_id,
            segment_ids=segments if packing.reset_attention else None,
            position_ids=places_in_documents(segments) if packing.reset_positions and segments is not None else None,
        )


def as_tensors(batch: ModelBatch[np.ndarray]) -> ModelBatch[torch.Tensor]:
    """The batch of an objective as tensors of the same types."""
    return batch.map(lambda array: torch.from_numpy(np.require(array, requirements=("C", "W"))))


def to_device(batch: ModelBatch[torch.Tensor], device: torch.device) -> ModelBatch[torch.Tensor]:
    """The batch on ``device``; from pinned memory the copies do not block."""
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def build_loader(
    dataset: TokenDataset,
    objective: Objective,
    context: ParallelContext,
    *,
    micro_batch_size: int,
    last_sample: int,
    first_sample: int = 0,
    num_workers: int = 2,
    packing: Packing = ONE_STREAM,
    timeout_seconds: float = 0,
) -> Batches:
    """Micro-batches of this rank, in order; use it as a context manager, which ends its processes.

    Args:
        dataset: samples.
        objective: prepares them.
        context: this process.
        micro_batch_size: samples per micro-batch.
        last_sample: end of the stream.
        first_sample: samples already consumed.
        num_workers: processes that prepare (0: this process).
        packing: how documents within a sample are treated.
        timeout_seconds: limit of the wait for one batch; 0: none.
    """
    sampler = MicroBatchSampler(
        first_sample=first_sample,
        last_sample=last_sample,
        micro_batch_size=micro_batch_size,
        dp_rank=context.dp.rank,
        dp_size=context.dp.size,
    )
    workers = Workers()
    loader = DataLoader(
        _WithIndex(dataset, last_sample, packing),
        batch_sampler=sampler,
        collate_fn=_Prepare(objective, packing),
        num_workers=num_workers,
        pin_memory=context.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=workers,
        timeout=timeout_seconds if num_workers else 0,
    )
    return Batches(loader, workers)
