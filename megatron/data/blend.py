"""Blends: which data set each sample comes from, and the spelling of blends on the command line and in files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.config.option import LARGEST
from megatron.config.schema import DataConfig
from megatron.data.indexed import clean_prefix
from megatron.errors import UserError, require

_BLOCK = 4096  # samples per row of running counts
_MAX_LANES = 8192
_MIN_LANE = 512  # steps per lane


def read_data_path_file(path: str | Path) -> list[str]:
    """Return the items of a data path file: one line such as ``"1.0 path/prefix"`` or ``"0.3 a" "0.7 b"``.

    Prefixes are relative to the working directory, as on the command line.

    Raises:
        UserError: the file is missing, or does not hold exactly one line with balanced quotes.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")  # behind the mark that some editors write
        lines = [line for line in text.split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the data path file {path} ({error})", "it must be a text file", "check the path"
        ) from error
    try:
        if len(lines) == 1:
            return shlex.split(lines[0])
        problem = f"{len(lines)} lines"
    except ValueError as error:
        problem = str(error).lower()
    raise UserError(
        f"data path file {path}: {problem}",
        "it must hold one line of quoted pairs",
        'write for example "0.3 path/a" "0.7 path/b"',
    )


def parse_blend(items: Sequence[str]) -> list[tuple[float, str]]:
    """Return (weight, prefix) pairs, weights as written.

    Accepted: one prefix; ``WEIGHT PREFIX WEIGHT PREFIX …`` as separate items; ``"WEIGHT PREFIX"``, one item a pair.

    Raises:
        UserError: anything else, or a weight that is not a positive number.
    """
    words: list[str] = []
    for item in map(str.strip, items):
        pair = item.split(maxsplit=1)
        # Only an item that begins with a number is a pair: a prefix may hold spaces.
        words += pair if len(pair) == 2 and _as_weight(pair[0]) is not None else [item]
    if len(words) == 1 and words[0] and _as_weight(words[0]) is None:
        words = ["1", *words]
    pairs = [(_as_weight(weight), prefix) for weight, prefix in zip(words[::2], words[1::2])]
    known = [(weight, clean_prefix(prefix)) for weight, prefix in pairs if weight is not None and prefix]
    require(
        words and len(words) == 2 * len(known),
        f"data path {' '.join(items)!r}",
        "it must be one prefix, or pairs of a weight and a prefix",
        "write for example 0.3 path/a 0.7 path/b",
    )
    bad = [prefix for weight, prefix in known if not 0 < weight <= LARGEST]
    require(
        not bad,
        f"weight of {', '.join(bad)} in {' '.join(items)!r}",
        f"weights are above 0 and at most {LARGEST:.0e}",
        "drop it or correct its weight",
    )
    return known


def prefixes_of(*blends: Sequence[str]) -> list[str]:
    """Return the prefixes of all blends, each once; an empty blend has none. Raises as :func:`parse_blend` does."""
    return list(dict.fromkeys(prefix for paths in blends if paths for _, prefix in parse_blend(paths)))


def data_paths(config: DataConfig, kind: str) -> list[str]:
    """Return the blend for ``kind``, train or valid, of flags or of a record, which says what a file meant; empty where none is
    named.

    Raises:
        UserError: a wrong data path file.
    """
    direct, file = getattr(config, f"{kind}_data_path"), getattr(config, f"{kind}_data_path_file")
    return list(direct) if direct or not file else read_data_path_file(file)


def data_prefixes(config: DataConfig) -> list[str]:
    """Return the prefixes that the flags name, those of the training data first. Raises as :func:`data_paths` does."""
    return prefixes_of(data_paths(config, "train"), data_paths(config, "valid"))


def _as_weight(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return None if os.path.exists(word + ".idx") else value  # a data set may be called "2024"


def blend_order(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """Return the data set of each sample, uint8 (or uint16) [num_samples], by Megatron's rule of the largest deficit.

    Sample n goes to the data set whose count lags most behind its share: the first d with the largest
    ``weights[d] * max(n, 1) - count[d]`` in float64. That is a recurrence over samples; it runs here in numpy, exactly,
    1e8 samples in seconds:

    * the samples are cut into lanes that all advance together, one numpy step per place in the lane;
    * a lane starts from the counts that rounding the shares gives. They may differ by one from the true counts, but two
      runs of the rule from different counts soon meet (their squared distance never grows) and then stay equal;
    * a lane whose start was not the true end of the lane before it runs again from there, until all fit. What is
      returned is therefore the result of the recurrence, whatever the starting guess was worth.

    Args:
        weights: positive; they are normalised here.
    """
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum()
    length = max(_MIN_LANE, -(-num_samples // _MAX_LANES))
    begins = np.arange(0, num_samples, length)
    start = _rounded_shares(share, begins)
    end = np.empty_like(start)
    dtype = np.uint8 if len(share) <= 256 else np.uint16
    order = np.empty((len(begins), length), dtype=dtype)
    todo = np.arange(len(begins))
    while len(todo):
        order[todo], end[:, todo] = _run_lanes(share, start[:, todo], begins[todo], length, dtype=dtype)
        todo = np.flatnonzero((end[:, :-1] != start[:, 1:]).any(axis=0)) + 1
        start[:, todo] = end[:, todo - 1]
    return order.ravel()[:num_samples]


def _rounded_shares(share: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return counts [datasets, len(totals)] that add up to each total: largest remainders are rounded up."""
    exact = share[:, None] * totals
    counts = np.floor(exact)
    missing = totals - counts.sum(axis=0)
    rank = np.argsort(np.argsort(counts - exact, axis=0, kind="stable"), axis=0, kind="stable")
    return counts + (rank < missing)


def _run_lanes(
    share: np.ndarray, counts: np.ndarray, begins: np.ndarray, length: int, *, dtype: type[np.generic]
) -> tuple[np.ndarray, np.ndarray]:
    """Apply the rule ``length`` times in each lane; return choices [lanes, length] and end counts [datasets, lanes]."""
    counts = counts.copy()
    lanes = np.arange(len(begins))
    picks = np.empty((length, len(begins)), dtype=dtype)
    for step in range(length):
        pick = np.argmax(share[:, None] * np.maximum(begins + step, 1.0) - counts, axis=0)
        picks[step] = pick
        counts[pick, lanes] += 1
    return picks.T, counts


class BlendOrder:
    """Random access into a blend: ``order[i]`` is (data set, index within that data set).

    Keeps one byte per sample and a row of counts per 4,096 samples; the index is counted within a block when asked for.

    Attributes:
        counts: samples drawn from each data set, int64 [datasets].
    """

    def __init__(self, choices: np.ndarray, num_datasets: int) -> None:
        """Index ``choices``, the data set of each sample, integers [samples]."""
        self._choices = choices
        rows = -(-len(choices) // _BLOCK)
        counts = np.zeros((rows + 1, num_datasets), dtype=np.int64)
        edges = np.arange(0, len(choices), _BLOCK)
        for dataset in range(num_datasets):
            counts[1:, dataset] = np.cumsum(np.add.reduceat(choices == dataset, edges, dtype=np.int64)) if rows else 0
        self._before = counts
        self.counts = counts[-1]

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, index: int) -> tuple[int, int]:
        dataset = int(self._choices[index])
        block = index // _BLOCK
        within = int(np.count_nonzero(self._choices[block * _BLOCK : index] == dataset))
        return dataset, int(self._before[block, dataset]) + within
