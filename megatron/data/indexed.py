"""Megatron's memory-mapped token files, ``MMIDIDX`` version 1: PREFIX.bin holds tokens, PREFIX.idx where documents lie.

PREFIX.idx, little-endian: magic ``MMIDIDX\\0\\0``, version uint64 = 1, token dtype code uint8, number of sequences
n uint64, length m of the document list uint64, sizes int32 [n] (tokens), pointers int64 [n] (bytes into PREFIX.bin),
document list int64 [m] (index of each document's first sequence, then n). One sequence is one document here.

``PREFIX@0.969:0.999`` is a part of the documents, by fractions, cut as megatron-core's ``--split`` does.

PREFIX.meta.json (optional, ours) says which tokenizer made the tokens, how many bytes of text they stand for, the largest
id, and the SHA-256 of both files and of itself.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import struct
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from megatron.errors import UserError, require
from megatron.files import read_object

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes; 6 and 7 are floating point, which no token is.
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_PART = re.compile(r"@(\d+(?:\.\d+)?(?:e-\d+)?):(\d+(?:\.\d+)?(?:e-\d+)?)$")
_CHUNK = 1 << 16  # documents checked at once: they stay in the processor's cache
# Entries of PREFIX.meta.json that programs read; each may be absent or null.
_ENTRIES = {"vocab_size": int, "eod_id": int, "largest_id": int, "tokens": int, "text_bytes": int,
            "tokenizer": dict, "digests": dict}  # fmt: skip
SEAL = "sha256"  # entry of PREFIX.meta.json: digest of all other entries


class DamagedData(UserError):
    """Files of a data set that contradict each other or the format."""


def clean_prefix(path: str | Path) -> str:
    """Return the prefix of a data set; a trailing ``.bin`` or ``.idx`` is dropped."""
    text = os.path.expanduser(str(path))
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def whole_prefix(path: str | Path) -> str:
    """Return the prefix of the files, also where ``path`` names a part of their documents."""
    return clean_prefix(_PART.sub("", str(path)))


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """Return the contents of PREFIX.meta.json, or None where there is none (published data has none).

    Raises:
        UserError: the file is not a JSON object, not what was written, or holds an entry of a wrong type.
    """
    path = Path(whole_prefix(prefix) + ".meta.json")
    if not path.exists():
        return None
    rule, fix = "it must be as tools/preprocess_data.py wrote it", "delete it to do without"
    meta = read_object(path, rule=rule, fix=fix)
    wrong = [name for name, kind in _ENTRIES.items() if type(meta.get(name)) not in (kind, NoneType)]
    require(not wrong, f"{path} holds no valid {', '.join(wrong)}", rule, fix)
    seal = meta.pop(SEAL, None)
    if seal is not None and seal != seal_of(meta):
        raise DamagedData(
            f"{path} is not as it was written (its checksum differs)",
            "vocabulary and tokenizer are read from it",
            f'make the data again, or remove the entry "{SEAL}" if it was changed on purpose',
        )
    return meta


def seal_of(meta: dict[str, Any]) -> str:
    """Return the checksum of the entries of a PREFIX.meta.json, in hexadecimal."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


class IndexedDataset:
    """Read-only, memory-mapped documents. Cheap to pickle: another process maps the files again.

    Attributes:
        prefix: of the files.
        name: the prefix, with the part of the documents that is meant.
        sizes: int32 [documents], tokens per document.
        pointers: int64 [documents], byte offset of each document in PREFIX.bin.
        doc_idx: int64 [m], first sequence of each document, then the number of sequences.
        dtype: token dtype on disk.
        tokens: tokens of all documents, one after the other, [num_tokens].
        num_tokens: tokens in all documents.
        part: first document and the one behind the last, where only some of those in the files are meant; else None.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.idx and PREFIX.bin, and check that they fit together (the tokens themselves are not read).

        Raises:
            UserError: a file is missing.
            DamagedData: no MMIDIDX version 1 index, another length than the index says, or pointers that are not the
                running sum of the sizes.
        """
        self._open(prefix)
        self._check_documents()
        self._take_part()

    def _open(self, prefix: str | Path) -> None:
        part = _PART.search(str(prefix))
        self.prefix = whole_prefix(prefix)
        self.name = self.prefix + (part[0] if part else "")
        self.part: tuple[int, int] | None = None
        for suffix in (".idx", ".bin"):
            if not os.path.isfile(self.prefix + suffix):
                given = f"no data at {self.prefix}: {self.prefix + suffix} does not exist"
                rule = "a data path is the common part of PREFIX.bin and PREFIX.idx"
                raise UserError(given, rule, _remedy(self.prefix))
        self._read_index(Path(self.prefix + ".idx"))
        self._map_tokens(Path(self.prefix + ".bin"))

    def _read_index(self, path: Path) -> None:
        found = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if head[: len(MAGIC)] != MAGIC:
            raise DamagedData(
                f"{path} starts with {head[: len(MAGIC)]!r} ({found} bytes)",
                f"a Megatron index starts with {MAGIC!r}",
                "make the data again with tools/preprocess_data.py",
            )
        if len(head) < HEADER.size:
            raise _truncated(path, HEADER.size, found)
        _, version, code, count, doc_count = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise DamagedData(
                f"{path} has version {version} and dtype code {code}",
                "only version 1 with integer tokens (codes 1-5 and 8) can be read",
                "make the data again with tools/preprocess_data.py",
            )
        expected = HEADER.size + 12 * count + 8 * doc_count
        if found not in (expected, expected + count):  # Megatron-Core appends one mode byte per sequence to some files
            raise _truncated(path, expected, found)
        raw = np.memmap(path, mode="r", dtype=np.uint8)
        self.dtype = np.dtype(DTYPES[code])
        ends = np.cumsum([HEADER.size, 4 * count, 8 * count, 8 * doc_count])
        self.sizes: np.ndarray = raw[ends[0] : ends[1]].view(np.int32)
        self.pointers: np.ndarray = raw[ends[1] : ends[2]].view(np.int64)
        self.doc_idx: np.ndarray = raw[ends[2] : ends[3]].view(np.int64)
        self.num_tokens = int(self.sizes.sum(dtype=np.int64))

    def _map_tokens(self, path: Path) -> None:
        found = path.stat().st_size
        size = self.dtype.itemsize
        expected = int(self.pointers[-1]) + int(self.sizes[-1]) * size if len(self.sizes) else 0
        if found != expected:
            raise _truncated(path, expected, found)
        # An empty file cannot be mapped.
        self.tokens = np.memmap(path, mode="r", dtype=self.dtype) if found else np.zeros(0, self.dtype)

    def _check_documents(self) -> None:
        """Check what ``__getitem__`` relies on: documents lie one after the other, from the first byte on."""
        end = 0
        for begin in range(0, len(self.sizes), _CHUNK):
            sizes = self.sizes[begin : begin + _CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(sizes)
            wrong = np.flatnonzero((self.pointers[begin : begin + _CHUNK] != ends - sizes) | (sizes < 0))
            if len(wrong):
                document = begin + int(wrong[0])
                raise DamagedData(
                    f"{self.prefix}.idx puts document {document} of {self.sizes[document]} tokens at byte "
                    f"{self.pointers[document]}",
                    f"the sizes before it put it at byte {int((ends - sizes)[wrong[0]])}",
                    "copy the index again, or make the data again with tools/preprocess_data.py",
                )
            end = int(ends[-1])
        starts = self.doc_idx
        if len(starts) == 0 or starts[0] != 0 or starts[-1] != len(self.sizes) or (starts[1:] < starts[:-1]).any():
            raise DamagedData(
                f"the document list of {self.prefix}.idx is out of order",
                f"it runs from 0 to the number of documents, {len(self.sizes)}",
                "copy the index again, or make the data again with tools/preprocess_data.py",
            )

    def _take_part(self) -> None:
        """Keep the documents of the part that the name asks for: after the checks, which are of whole files."""
        self._first_byte, match = 0, _PART.search(self.name)
        if match is None:
            return
        begin, end = (round(float(text) * len(self)) for text in match.groups())
        require(
            begin < end <= len(self),
            f"{self.name} means documents {begin} to {end} of {len(self)}",
            "a part runs between two fractions of the documents, and holds some",
            "write for example PREFIX@0:0.9",
        )
        self.part, self._first_byte = (begin, end), int(self.pointers[begin])
        self.sizes, self.pointers = self.sizes[begin:end], self.pointers[begin:end]
        self.num_tokens, first = int(self.sizes.sum(dtype=np.int64)), self._first_byte // self.dtype.itemsize
        self.tokens = self.tokens[first : first + self.num_tokens]

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return document ``index`` as tokens [size] in the dtype on disk (a view of the mapped file)."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return ``length`` tokens of document ``index`` from ``offset`` on (default: to its end), a view [length].

        Raises:
            IndexError: the document or the range does not exist.
        """
        size = int(self.sizes[index])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise IndexError(f"tokens {offset}:{stop} of document {index}, which has {size} tokens, in {self.prefix}")
        start = (int(self.pointers[index]) - self._first_byte) // self.dtype.itemsize
        return self.tokens[start + offset : start + stop]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["prefix"])  # the process that sent it has checked the documents
        self._take_part()


def _remedy(prefix: str) -> str:
    """What to do about missing data: a similar name that is there, the download, or making it."""
    folder, name = (prefix, "") if os.path.isdir(prefix) else os.path.split(prefix)
    there = [path.stem for path in sorted(Path(folder).glob("*.idx")) if path.stem != name]
    similar = [other for other in there if other.startswith(name)] or difflib.get_close_matches(name, there, cutoff=0.8)
    if similar:
        return f"did you mean {os.path.join(folder, similar[0])}?"
    make = "./download.sh for the paper's data" if name.startswith("gpt2tok_") else "tools/preprocess_data.py"
    return f"check the path, or run {make}"


def _truncated(path: Path, expected: int, found: int) -> DamagedData:
    return DamagedData(
        f"{path} has {found} bytes",
        f"its index says {expected} bytes, so it is {'truncated' if found < expected else 'of another data set'}",
        "copy PREFIX.bin and PREFIX.idx again, both from one data set, or make them again with tools/preprocess_data.py",
    )
