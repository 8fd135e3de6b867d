"""From a data set to micro-batches: which rank sees which sample, and in which order.

Step k trains on samples k·B … (k + 1)·B − 1 of the stream, whatever the layout: micro-batch m of data-parallel rank r
takes the samples from ``k·B + (m · dp_size + r) · micro_batch_size``, as in Megatron. So a run resumes from the number of
samples alone, also with another number of ranks. The objective prepares the batch in the loader's processes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron.model.batch import ModelBatch
from megatron.objectives.base import Objective
from megatron.parallel.context import ParallelContext


class TokenDataset(Protocol):
    """Anything that gives ``[seq + 1]`` int64 tokens by index."""

    def __getitem__(self, index: int) -> np.ndarray: ...


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


class _WithIndex(Dataset):
    """Pairs of tokens and stream index. Indices past the end repeat the last sample; evaluation drops them."""

    def __init__(self, dataset: TokenDataset, last_sample: int) -> None:
        self.dataset, self.last_sample = dataset, last_sample

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.dataset[min(index, self.last_sample - 1)], index


class _Prepare:
    """Collate function: stack the tokens and let the objective make the batch (picklable)."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, items: list[tuple[np.ndarray, int]]) -> ModelBatch:
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in items]))
        return self.objective.prepare(tokens, torch.tensor([index for _, index in items]))


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ctrl-C and a cluster's signals reach every process of the job; the trainer answers them, its workers follow."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def build_loader(
    dataset: TokenDataset,
    objective: Objective,
    context: ParallelContext,
    *,
    micro_batch_size: int,
    last_sample: int,
    first_sample: int = 0,
    num_workers: int = 2,
) -> DataLoader:
    """Micro-batches of this rank, in order, prepared by ``num_workers`` processes (0: in this process)."""
    sampler = MicroBatchSampler(
        first_sample=first_sample,
        last_sample=last_sample,
        micro_batch_size=micro_batch_size,
        dp_rank=context.dp_rank,
        dp_size=context.dp_size,
    )
    return DataLoader(
        _WithIndex(dataset, last_sample),
        batch_sampler=sampler,
        collate_fn=_Prepare(objective),
        num_workers=num_workers,
        pin_memory=context.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
