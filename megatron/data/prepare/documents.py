"""The documents of text files, read as often as they are needed: for looking at them, and for copying some of them.

Empty documents and exact copies of an earlier one are left out and counted. Documents may be cut into passages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.prepare.near_duplicates import RunHashes
from megatron.data.prepare.readers import Batch, Source, read_batches, total_bytes
from megatron.data.prepare.rows import parse_row
from megatron.data.tokenizer import Tokenizer
from megatron.errors import UserError
from megatron.files import replace_file
from megatron.screen import Progress

_ALL_RUNS_BYTES = 1 << 26  # of input, whose runs of words are all kept; of more, a part that needs as much memory
_SHOWN_ERRORS = 20
_BYTES_PER_TOKEN = 4  # of English, with a vocabulary of ten thousands


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Attributes:
        key: entry of a JSON object, or column, that holds the text.
        text_split: see readers.read_batches.
        skip_errors: leave malformed rows out instead of refusing them.
    """

    key: str = "text"
    text_split: str = "file"
    skip_errors: bool = False


@dataclass(frozen=True)
class Document:
    """A text and where it comes from."""

    source: str
    text: str


@dataclass
class Scan:
    """Of each document its bytes, a rank that orders documents at random and its runs of words; and what was left out."""

    sizes: list[int]
    ranks: list[bytes]
    runs: list[np.ndarray]
    copies: int = 0
    empty: int = 0


class Documents:
    """Reads the documents, as often as they are needed, always the same.

    Attributes:
        total_bytes: size of the files.
        passage_characters: longer documents are cut into passages of about this length; None: never.
        malformed: rows that were no text, in the last reading; ``errors`` describes the first of them.
    """

    def __init__(self, sources: Sequence[Source], options: ReadOptions, *, seed: int) -> None:
        """Read ``sources``; ``seed`` decides the ranks of a scan."""
        self._sources, self._options, self._seed = sources, options, seed
        self.total_bytes = sum(source.path.stat().st_size for source in sources if source.path.is_file())
        self.passage_characters: int | None = None
        self.malformed = 0
        self.errors: list[str] = []

    def scan(self) -> Scan:
        """Look at every document once. Raises UserError for malformed rows, unless they are to be left out."""
        scan = Scan([], [], [])
        hashes = RunHashes(1 + self.total_bytes // _ALL_RUNS_BYTES)
        for document in self._distinct(scan, "reading"):
            raw = document.text.encode()
            scan.sizes.append(len(raw))
            key = str(self._seed).encode()
            scan.ranks.append(hashlib.blake2b(raw, digest_size=16, key=key).digest())
            scan.runs.append(hashes(document.text))
        if self.malformed and not self._options.skip_errors:
            raise self._refused()
        return scan

    def write(self, path: Path, wanted: np.ndarray, tokenizer: Tokenizer | None) -> dict[str, int]:
        """Write the wanted documents; bool [documents] as they were scanned."""
        side = {"documents": int(wanted.sum()), "text_bytes": 0, "tokens": 0}

        def lines(file: Any) -> None:
            for document, is_wanted in zip(self._distinct(Scan([], [], []), f"writing {path.name}"), wanted.tolist()):
                if is_wanted:
                    side["text_bytes"] += len(document.text.encode())
                    if tokenizer is not None:
                        side["tokens"] += len(tokenizer.encode(document.text)) + (tokenizer.eod_id is not None)
                    row = {"text": document.text, "source": document.source}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

        replace_file(path, lines)
        if tokenizer is None:
            side["tokens"] = side["text_bytes"] // _BYTES_PER_TOKEN
        return side

    def _distinct(self, scan: Scan, doing: str) -> Iterator[Document]:
        """Yield the documents (or passages) that are neither empty nor copies of an earlier one; count the others."""
        seen: set[bytes] = set()
        for whole in self._all(scan, doing):
            for document in _passages(whole, self.passage_characters):
                if not document.text.strip():  # between two cuts
                    continue
                digest = hashlib.blake2b(document.text.strip().encode(), digest_size=16).digest()
                if digest in seen:
                    scan.copies += 1
                else:
                    seen.add(digest)
                    yield document

    def _all(self, scan: Scan, doing: str) -> Iterator[Document]:
        self.malformed, self.errors = 0, []
        with Progress(doing, total_bytes(self._sources), unit="B") as progress:
            for source in self._sources:
                name = os.fsencode(source.path.name).decode("utf-8", "replace")  # a name need not be text
                for batch in read_batches(source, [self._options.key], text_split=self._options.text_split):
                    for number, text in self._texts(batch, scan):
                        yield Document(f"{name}:{number}", text)
                    progress.update(batch.bytes_read)

    def _texts(self, batch: Batch, scan: Scan) -> Iterator[tuple[int, str]]:
        """Yield (number, text) of the rows that hold one; count the others."""
        for number, raw in enumerate(batch.rows, start=batch.first):
            try:
                row = parse_row(raw, batch.unit, [self._options.key])
            except ValueError as error:
                self.malformed += 1
                if len(self.errors) < _SHOWN_ERRORS:
                    self.errors.append(f"{batch.source}, {batch.unit} {number}: {error}")
                continue
            if row is not None and row[0].strip():
                yield number, row[0]
            else:
                scan.empty += row is not None

    def _refused(self) -> UserError:
        more = self.malformed - len(self.errors)
        shown = [f"  {error}" for error in self.errors] + [f"  and {more:,} more"] * (more > 0)
        return UserError(
            "\n".join([f"{self.malformed:,} rows or files are not text that can be read:", *shown]),
            "all input must be, or be left out on purpose, so nothing was written",
            "mend them, name the key of the text with --json-keys KEY, or leave them out with --skip-errors "
            '(laptop.sh: SPLIT_FLAGS="--json-keys KEY")',
        )


def _passages(document: Document, characters: int | None) -> Iterator[Document]:
    """Cut a long document at ends of paragraphs, else of lines, sentences or words; nothing is lost."""
    text, start, number = document.text, 0, 0
    while characters is not None and len(text) - start > characters * 3 // 2:
        low, high = start + characters // 2, start + characters * 3 // 2
        ends = (text.rfind(mark, low, high) + len(mark) for mark in ("\n\n", "\n", ". ", " ") if mark in text[low:high])
        end = next(ends, high)
        number += 1
        yield Document(f"{document.source}#{number}", text[start:end])
        start = end
    yield Document(f"{document.source}#{number + 1}" if number else document.source, text[start:])
