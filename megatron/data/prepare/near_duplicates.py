"""Which documents repeat each other: shared runs of words, counted exactly, the same on every machine.

A run is ``RUN_WORDS`` words in a row, in lower case and without punctuation; in Chinese, Japanese and Korean a character
is a word. Two documents are near-duplicates when at least a given part of the shorter one's runs are in the other, so
that a page inside a longer one counts too. (Jaccard similarity, the usual measure, misses that one.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

RUN_WORDS = 8
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_NEIGHBOURS = 8  # of one run's documents, those this near in input order are compared; groups chain them
_MAX_WORDS = 1 << 21  # remembered


class RunHashes:
    """Turns texts into the hashes of their runs of words.

    Attributes:
        keep_one_in: of all runs, those whose hash is in this part of all hashes are kept, in every document the same
            (FracMinHash, Irber et al. 2022): 1 keeps all; more saves memory and makes overlaps estimates.
    """

    def __init__(self, keep_one_in: int = 1) -> None:
        """Keep one run in ``keep_one_in``."""
        self.keep_one_in = keep_one_in
        self._words: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """Return the hashes of the runs of a text, uint64 [distinct runs], ascending; at least one.

        A text of fewer words is one run; one without words is known by its characters.
        """
        words = _WORD.findall(text.lower()) or [text.strip()]
        if len(self._words) > _MAX_WORDS:
            self._words.clear()
        known = self._words
        ids = np.fromiter((known.get(word) or self._add(word) for word in words), np.uint64, len(words))
        length = min(RUN_WORDS, len(ids))
        hashes = np.full(len(ids) - length + 1, length, np.uint64)
        for place in range(length):
            hashes = hashes * _FACTOR + ids[place : len(ids) - length + 1 + place]
        hashes = np.unique(_mixed(hashes))
        if self.keep_one_in == 1:
            return hashes
        return hashes[: max(1, int(np.searchsorted(hashes, np.uint64((1 << 64) // self.keep_one_in))))]

    def _add(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") or 1
        self._words[word] = value
        return value


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread values evenly over all 64 bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Runs:
    """The runs of all documents, indexed.

    Attributes:
        sizes: distinct runs of each document, int64 [documents].
    """

    def __init__(self, hashes: Sequence[np.ndarray]) -> None:
        """Index what ``RunHashes`` gave for each document."""
        self.sizes = np.array([len(part) for part in hashes], np.int64)
        _, self._ids = np.unique(np.concatenate(hashes), return_inverse=True)
        self._documents = np.repeat(np.arange(len(hashes)), self.sizes)
        self._occurrences = np.bincount(self._ids)

    def groups(self, threshold: float) -> np.ndarray:
        """Return a number for each document, int64 [documents]: near-duplicates, and theirs, share it.

        Args:
            threshold: part of the shorter document's runs that the two must share, above 0 and at most 1.
        """
        count = len(self.sizes)
        order = np.lexsort((self._documents, self._ids))
        ids, documents = self._ids[order], self._documents[order]
        keys = [np.zeros(0, np.int64)]
        for step in range(1, _NEIGHBOURS + 1):
            same = ids[step:] == ids[:-step]
            keys.append(documents[:-step][same] * count + documents[step:][same])
        pairs, shared = np.unique(np.concatenate(keys), return_counts=True)
        first, second = pairs // count, pairs % count
        near = shared >= threshold * np.minimum(self.sizes[first], self.sizes[second])
        return joined(count, zip(first[near].tolist(), second[near].tolist()))

    def overlap(self, chosen: np.ndarray) -> np.ndarray:
        """Return for each document the part of its runs that a document outside ``chosen`` holds too.

        Args:
            chosen: bool [documents].

        Returns:
            float64 [documents]; only the entries of chosen documents mean anything.
        """
        inside = np.bincount(self._ids[chosen[self._documents]], minlength=len(self._occurrences))
        outside = (self._occurrences - inside)[self._ids] > 0
        return np.bincount(self._documents, outside, len(self.sizes)) / self.sizes


def joined(count: int, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """The connected parts of a graph of ``count`` documents, each named by its first one, int64 [documents]."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(index) for index in range(count)], np.int64)
