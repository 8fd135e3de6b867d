"""Data sets of training samples: one prefix in Megatron's order, or a weighted blend of several."""

from __future__ import annotations

import math
import operator
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.data.blend import BlendOrder, blend_order, parse_blend, prefixes_of
from megatron.data.indexed import IndexedDataset, read_meta
from megatron.data.order import default_cache_folders, load_or_build_maps, plan_order
from megatron.errors import UserError

_HEADROOM = 1.005  # Megatron asks each data set of a blend for this much more than its share


class Pieces(NamedTuple):
    """Where each token of a sample comes from.

    Attributes:
        documents: [seq + 1] int64, index of its document in the data set (in a blend: in all parts, one after the other; those
            of a prefix that is named again keep their numbers).
        places: [seq + 1] int64, from 0: which piece of the sample it is in. A document after itself is two pieces.
    """

    documents: np.ndarray
    places: np.ndarray


class GPTDataset:
    """Samples of ``seq_length + 1`` tokens cut from one data set, in Megatron's order (see megatron/data/order.py).

    Attributes:
        num_samples: samples asked for; ``len()`` may be larger, because maps cover whole epochs.
        tokens_per_epoch: tokens of the data set, each counted once.
        num_epochs: passes over the data that ``num_samples`` samples make.
        text_bytes_per_token: bytes of the original text per token; None when PREFIX.meta.json is absent.
        plan: epochs and parts of the order.
    """

    def __init__(
        self,
        prefix: str,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        name: str = "train",
        cache_path: str | None = None,
    ) -> None:
        """Open PREFIX.bin/.idx and load or build its index maps.

        Args:
            prefix: common part of PREFIX.bin and PREFIX.idx.
            num_samples: samples needed; None for one epoch.
            seq_length: tokens per sample without the one of overlap.
            seed: seed of the order.
            name: what the samples are for; only part of the cache folder's name.
            cache_path: folder of cached index maps; default: index-cache/ beside the data, or a temporary folder.

        Raises:
            UserError: the files are missing or damaged, or too short (see IndexedDataset and plan_order).
        """
        self.documents = IndexedDataset(prefix)
        self.seq_length = seq_length
        self.name = name
        self.tokens_per_epoch = self.documents.num_tokens
        tokens, source = self.tokens_per_epoch, self.documents.name
        self.plan = plan_order(
            tokens_per_epoch=tokens, num_samples=num_samples, seq_length=seq_length, seed=seed, source=source
        )
        self.num_samples = self.plan.total_samples if num_samples is None else num_samples
        self.num_epochs = self.num_samples * seq_length / self.tokens_per_epoch
        self.text_bytes_per_token = text_bytes_per_token(self.documents.prefix)
        folders = [Path(cache_path).expanduser()] if cache_path else []
        folders += default_cache_folders(self.documents.prefix)
        self.maps = load_or_build_maps(self.documents.sizes, self.plan, name=name, folders=folders)

    def __len__(self) -> int:
        """Return the number of samples that exist, at least ``num_samples``."""
        return self.plan.total_samples

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sample ``index`` of the shuffled stream, int64 [seq_length + 1].

        Raises:
            IndexError: the index is negative or not below ``len()``.
        """
        parts = [self.documents.get(document, begin, length) for document, begin, length in self._parts(index)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.int64)

    def pieces(self, index: int) -> Pieces:
        """Return the document of each token of sample ``index``. Raises IndexError as reading it does."""
        documents, _, lengths = zip(*self._parts(index))
        return Pieces(np.repeat(documents, lengths), np.repeat(np.arange(len(lengths)), lengths))

    def _parts(self, index: int) -> list[tuple[int, int, int]]:
        """Return (document, first token, tokens) of every piece of a sample."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = int(self.maps.sample_order[index])
        (first, begin), (last, end) = self.maps.sample_starts[row : row + 2].tolist()
        documents = self.maps.document_order[first : last + 1].tolist()
        stops = [*self.documents.sizes[documents[:-1]].tolist(), end + 1]  # the last one is read up to ``end``
        begins = [begin] + [0] * (last - first)
        return [(document, start, stop - start) for document, start, stop in zip(documents, begins, stops)]


class BlendedDataset:
    """Several data sets mixed by weight; sample i is the next unread sample of the one that lags most behind its share.

    Attributes:
        datasets: the parts.
        weights: normalised, they add up to one.
        num_samples, tokens_per_epoch, num_epochs, text_bytes_per_token: as in GPTDataset, over all parts together.
    """

    def __init__(self, weights: Sequence[float], datasets: Sequence[GPTDataset], choices: np.ndarray) -> None:
        """Mix samples.

        Args:
            weights: of the data sets, as many.
            datasets: the parts.
            choices: data set of each sample, integers [samples], as ``blend_order`` gives them.

        Raises:
            UserError: a data set has too few samples.
        """
        self.datasets = list(datasets)
        self.weights = (np.asarray(weights, dtype=np.float64) / np.sum(weights)).tolist()
        self.order = BlendOrder(choices, len(datasets))
        for dataset, needed in zip(self.datasets, self.order.counts):
            if needed > len(dataset):
                raise UserError(
                    f"{dataset.documents.name} has {len(dataset)} samples",
                    f"the blend needs {needed} of it",
                    "build it with more samples",
                )
        # Where the documents of each part begin: parts of one prefix have the same ones, which say nothing new of each other.
        ends = np.cumsum([0, *(len(part.documents) for part in datasets)]).tolist()
        prefixes = [os.path.realpath(part.documents.name) for part in datasets]
        self._first_documents = [ends[prefixes.index(prefix)] for prefix in prefixes]
        self.num_samples = len(self.order)
        self.tokens_per_epoch = unique_tokens(dataset.documents for dataset in self.datasets)
        self.num_epochs = self.num_samples * self.datasets[0].seq_length / self.tokens_per_epoch
        rates = [dataset.text_bytes_per_token for dataset in self.datasets]
        known = [rate for rate in rates if rate is not None]
        drawn = self.order.counts / max(1, len(self.order))
        self.text_bytes_per_token = float(np.dot(drawn, known)) if len(known) == len(rates) else None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.order)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sample ``index``, int64 [seq_length + 1]. Raises IndexError outside 0 … len()-1."""
        dataset, place = self._place(index)
        return self.datasets[dataset][place]

    def pieces(self, index: int) -> Pieces:
        """Return the document of each token of sample ``index``; see :class:`Pieces`."""
        dataset, place = self._place(index)
        own = self.datasets[dataset].pieces(place)
        return own._replace(documents=own.documents + self._first_documents[dataset])

    def _place(self, index: int) -> tuple[int, int]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.order[index]


def build_dataset(
    paths: Sequence[str],
    *,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    name: str,
    cache_path: str | None = None,
) -> GPTDataset | BlendedDataset:
    """Build the data set that a data path names. Safe in many processes at once; uses no collectives.

    Args:
        paths: one prefix, or a blend as parse_blend reads it. One prefix with a weight is that prefix.
        num_samples: samples needed; None for every sample once (in a blend: of every part, whatever its weight).
        seq_length, seed, name, cache_path: as in GPTDataset; all parts of a blend share them.

    Raises:
        UserError: a wrong blend, or missing, damaged or too short data.
    """
    pairs = parse_blend(paths)
    if len(pairs) == 1:
        return GPTDataset(pairs[0][1], num_samples, seq_length, seed, name, cache_path)
    weights = [weight for weight, _ in pairs]
    needed: list[int | None] = [None] * len(pairs)
    if num_samples is not None:
        choices = blend_order(weights, num_samples)
        total = np.sum(weights, dtype=np.float64)  # Python's sum() rounds otherwise from 3.12 on; the order must not
        # Never fewer than blend_order draws, which are below share + 1.
        needed = [math.ceil(num_samples * (weight / total) * _HEADROOM) for weight in weights]
    datasets = [
        GPTDataset(prefix, samples, seq_length, seed, name, cache_path) for (_, prefix), samples in zip(pairs, needed)
    ]
    if num_samples is None:  # part after part
        choices = np.repeat(np.arange(len(pairs)), [len(dataset) for dataset in datasets])
    return BlendedDataset(weights, datasets, choices)


def describe(dataset: GPTDataset | BlendedDataset) -> str:
    """Return lines for a person: tokens per epoch, samples and epochs, of the whole and of the parts of a blend."""
    parts = dataset.datasets if isinstance(dataset, BlendedDataset) else [dataset]
    lines = [
        f"{parts[0].name} data: {dataset.tokens_per_epoch:,} tokens per epoch, {dataset.num_samples:,} samples of "
        f"{parts[0].seq_length:,} tokens = {dataset.num_epochs:.2f} epochs"
    ]
    if isinstance(dataset, BlendedDataset):
        for part, weight, samples in zip(parts, dataset.weights, dataset.order.counts):
            epochs = samples * part.seq_length / part.tokens_per_epoch
            lines.append(
                f"  {part.documents.name}: weight {weight:.4f}, {part.tokens_per_epoch:,} tokens per epoch, "
                f"{samples:,} samples = {epochs:.2f} epochs"
            )
    return "\n".join(lines)


def count_unique_tokens(paths: Sequence[str]) -> int:
    """Return the tokens of a data path, see :func:`unique_tokens`, 0 of an empty one; builds no index maps.

    Raises:
        UserError: a wrong blend, or missing or damaged data.
    """
    return unique_tokens(map(IndexedDataset, prefixes_of(paths)))


def unique_tokens(parts: Iterable[IndexedDataset]) -> int:
    """Return the tokens of some data, every document counted once however often its file, or a part that holds it, is named."""
    total, ends = 0, defaultdict[str, int](int)  # of each file, the document behind the last that was counted
    for part in sorted(parts, key=lambda part: part.part or (0, len(part))):
        begin, end = part.part or (0, len(part))
        counted = ends[file := os.path.realpath(part.prefix)]
        total += int(part.sizes[max(0, counted - begin) :].sum(dtype=np.int64))
        ends[file] = max(counted, end)
    return total


def text_bytes_per_token(prefix: str) -> float | None:
    """Return the bytes of original text per token (EOD tokens count, with 0 bytes), or None: not recorded, or no text."""
    meta = read_meta(prefix) or {}
    return meta["text_bytes"] / meta["tokens"] if meta.get("tokens") and meta.get("text_bytes") else None
