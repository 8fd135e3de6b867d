"""The order in which a data set is read: Megatron's, bit for bit, without loops over samples.

All epochs of documents are shuffled together into one stream of tokens; sample k is the ``seq_length + 1`` tokens from
``k * seq_length`` on (neighbours share one token); then the samples are shuffled. When less than 80 % of the last epoch
is needed, that epoch is kept apart: its documents and samples are shuffled among themselves and come last, so that
training over E.1 epochs does not read some documents E+1 times before others E times.

megatron/data/order_cache.py keeps the maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron.errors import UserError
from megatron.screen import Progress

_CHUNK = 1 << 22  # documents per step of the boundary search: bounds its memory


@dataclass(frozen=True)
class OrderPlan:
    """All that the order depends on, apart from the document sizes.

    Attributes:
        seed: seed of the shuffles.
        seq_length: tokens per sample, without the one of overlap.
        tokens_per_epoch: tokens of all documents.
        num_epochs: epochs that the maps cover.
        first_part_samples: samples that are shuffled together first; the rest, from the last epoch, come after them.
        total_samples: samples that the maps hold.
    """

    seed: int
    seq_length: int
    tokens_per_epoch: int
    num_epochs: int
    first_part_samples: int
    total_samples: int

    @property
    def separate_last_epoch(self) -> bool:
        """Whether the last epoch is shuffled apart."""
        return self.first_part_samples < self.total_samples


def plan_order(*, tokens_per_epoch: int, num_samples: int | None, seq_length: int, seed: int) -> OrderPlan:
    """Return how many epochs ``num_samples`` samples need and whether the last one is kept apart.

    ``num_samples=None`` means one epoch, every sample once.

    Raises:
        ValueError: a non-positive size, or one epoch is asked for and is shorter than one sample.
    """
    if seq_length < 1 or (num_samples is not None and num_samples < 1):
        raise UserError(f"{num_samples} samples of {seq_length} tokens", "both must be at least 1", "raise them")
    if tokens_per_epoch < 1:
        raise UserError("the data set has no tokens", "it needs at least one", "check the input of the preprocessing")

    def samples_in(num_epochs: int) -> int:
        return (num_epochs * tokens_per_epoch - 1) // seq_length

    if num_samples is None:
        num_epochs, separate = 1, False
        if samples_in(1) < 1:
            raise UserError(
                f"the data set has {tokens_per_epoch} tokens and seq_length is {seq_length}",
                "one pass needs at least one token more than that",
                "use more data or a smaller --seq-length",
            )
    else:
        num_epochs = -(-(num_samples * seq_length + 1) // tokens_per_epoch)
        from_last = num_samples - samples_in(num_epochs - 1) if num_epochs > 1 else 0
        separate = num_epochs > 1 and from_last < int(0.80 * samples_in(1))
    total = samples_in(num_epochs)
    first = samples_in(num_epochs - 1) if separate else total
    return OrderPlan(seed, seq_length, tokens_per_epoch, num_epochs, first, total)


def build_document_order(num_documents: int, plan: OrderPlan, rng: np.random.RandomState) -> np.ndarray:
    """Return the document of each place in the stream, int32 [num_epochs * num_documents]."""
    together = plan.num_epochs - int(plan.separate_last_epoch)
    order = np.tile(np.arange(num_documents, dtype=np.int32), plan.num_epochs)
    rng.shuffle(order[: together * num_documents])
    rng.shuffle(order[together * num_documents :])  # where there is nothing apart, this draws nothing
    return order


def build_sample_starts(sizes: np.ndarray, document_order: np.ndarray, plan: OrderPlan) -> np.ndarray:
    """Return where samples start, int64 [total_samples + 1, 2]: place in ``document_order`` and token offset there.

    Sample k reads from row k up to and including the token of row k+1. A token's place is found by binary search in the
    running sum of document sizes, one chunk of documents after the other.
    """
    starts = np.zeros((plan.total_samples + 1, 2), dtype=np.int64)
    row, tokens_before = 1, 0  # row 0 is the start of the stream, also when the first document is empty
    progress = Progress("building the data order", len(document_order), unit="documents")
    for begin in progress.over(range(0, len(document_order), _CHUNK), each=_CHUNK):
        ends = tokens_before + np.cumsum(sizes[document_order[begin : begin + _CHUNK]], dtype=np.int64)
        # The rows k that lie in this chunk: k * seq_length < ends[-1].
        stop = min(plan.total_samples + 1, -(-int(ends[-1]) // plan.seq_length))
        if stop > row:
            positions = np.arange(row, stop, dtype=np.int64) * plan.seq_length
            place = np.searchsorted(ends, positions, side="right")
            before = np.concatenate([[tokens_before], ends])
            starts[row:stop, 0] = begin + place
            starts[row:stop, 1] = positions - before[place]
            row = stop
        tokens_before = int(ends[-1])
    return starts


def build_sample_order(plan: OrderPlan, rng: np.random.RandomState) -> np.ndarray:
    """Return the order of samples, uint32 [total_samples] (int64 where uint32 is too small)."""
    dtype = np.uint32 if plan.total_samples < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(plan.total_samples, dtype=dtype)
    rng.shuffle(order[: plan.first_part_samples])
    rng.shuffle(order[plan.first_part_samples :])
    return order


@dataclass(frozen=True)
class IndexMaps:
    """The three maps of one order; see the functions that build them for shapes.

    Attributes:
        document_order: int32, document of each place in the stream (Megatron: doc_idx).
        sample_starts: int64 [n + 1, 2] (Megatron: sample_idx).
        sample_order: uint32 [n] (Megatron: shuffle_idx).
    """

    document_order: np.ndarray
    sample_starts: np.ndarray
    sample_order: np.ndarray


def build_maps(sizes: np.ndarray, plan: OrderPlan) -> IndexMaps:
    """Build all three maps. The random stream is Megatron's: document shuffles first, then sample shuffles."""
    rng = np.random.RandomState(plan.seed)
    document_order = build_document_order(len(sizes), plan, rng)
    sample_starts = build_sample_starts(sizes, document_order, plan)
    return IndexMaps(document_order, sample_starts, build_sample_order(plan, rng))
