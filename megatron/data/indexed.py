"""Megatron's memory-mapped token files, ``MMIDIDX`` version 1: PREFIX.bin holds tokens, PREFIX.idx where documents lie.

PREFIX.idx, little-endian: magic ``MMIDIDX\\0\\0``, version uint64 = 1, token dtype code uint8, number of sequences
n uint64, length m of the document list uint64, sizes int32 [n] (tokens), pointers int64 [n] (bytes into PREFIX.bin),
document list int64 [m] (index of each document's first sequence, then n). One sequence is one document here.

PREFIX.meta.json (optional, ours) says which tokenizer made the tokens, how many bytes of text they stand for, the largest
id, and the SHA-256 of both files and of itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron.errors import Failure, UserError
from megatron.files import replace_file, sha256_of, sync_folder, written_whole

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64, 8: np.uint16,
}  # fmt: skip
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
_MAX_UINT16_VOCAB = 65500  # Megatron's limit: it leaves a few ids for special tokens
_CHUNK = 1 << 16  # documents checked at once: they stay in the processor's cache
_SEAL = "sha256"  # entry of PREFIX.meta.json: digest of all other entries


class DamagedData(UserError):
    """Files of a data set that contradict each other or the format."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the token dtype that Megatron chooses: uint16 for a vocabulary under 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _MAX_UINT16_VOCAB else np.int32)


def clean_prefix(path: str | Path) -> str:
    """Return the prefix of a data set; a trailing ``.bin`` or ``.idx`` is dropped."""
    text = os.path.expanduser(str(path))
    return text[:-4] if text.endswith((".bin", ".idx")) else text


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """Return the contents of PREFIX.meta.json, or None where there is none (published data has none).

    Raises:
        DamagedData: the file is not a JSON object, or not what was written.
    """
    path = Path(clean_prefix(prefix) + ".meta.json")
    try:
        meta = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedData(
            f"{path} is not JSON ({error})",
            "it must be as tools/preprocess_data.py wrote it",
            "delete it to do without",
        ) from error
    if not isinstance(meta, dict):
        raise DamagedData(
            f"{path} holds a {type(meta).__name__}", "it must hold a JSON object", "delete it to do without"
        )
    seal = meta.pop(_SEAL, None)
    if seal is not None and seal != _seal_of(meta):
        raise DamagedData(
            f"{path} is not as it was written (its checksum differs)",
            "vocabulary and tokenizer are read from it",
            f'make the data again, or remove the entry "{_SEAL}" if it was changed on purpose',
        )
    return meta


def write_meta(prefix: str | Path, meta: dict[str, Any]) -> None:
    """Replace PREFIX.meta.json. Raises Failure when it cannot be written."""
    replace_file(clean_prefix(prefix) + ".meta.json", _sealed(meta))


def _sealed(meta: dict[str, Any]) -> bytes:
    meta = json.loads(json.dumps(meta))  # as it will be read
    return json.dumps({**meta, _SEAL: _seal_of(meta)}, indent=1).encode() + b"\n"


def _seal_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


class IndexedDataset:
    """Read-only, memory-mapped documents. Cheap to pickle: another process maps the files again.

    Attributes:
        sizes: int32 [documents], tokens per document.
        pointers: int64 [documents], byte offset of each document in PREFIX.bin.
        doc_idx: int64 [m], first sequence of each document, then the number of sequences.
        dtype: token dtype on disk.
        tokens: tokens of all documents, one after the other, [num_tokens].
        num_tokens: tokens in all documents.
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

    def _open(self, prefix: str | Path) -> None:
        self.prefix = clean_prefix(prefix)
        for suffix in (".idx", ".bin"):
            if not os.path.isfile(self.prefix + suffix):
                raise UserError(
                    f"no data at {self.prefix}: {self.prefix + suffix} does not exist",
                    "a data path is the common part of PREFIX.bin and PREFIX.idx",
                    "check the path or make the data with tools/preprocess_data.py",
                )
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
        if version != 1 or code not in DTYPES or not np.issubdtype(DTYPES[code], np.integer):
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
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start + offset : start + stop]

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["prefix"])  # the process that sent it has checked the documents


def _truncated(path: Path, expected: int, found: int) -> DamagedData:
    return DamagedData(
        f"{path} has {found} bytes",
        f"its index says {expected} bytes, so it is {'truncated' if found < expected else 'of another data set'}",
        "copy PREFIX.bin and PREFIX.idx again, both from one data set, or make them again with tools/preprocess_data.py",
    )


class IndexedDatasetWriter:
    """Writes one data set; the files appear complete or not at all, whatever kills the process.

    Everything goes to ``PREFIX.bin.tmp`` and ``PREFIX.idx.tmp``. :meth:`close` makes them durable and renames them, the
    index last: without an index there is no data set. Use as a context manager: an exception leaves nothing behind.
    Leftovers of a killed writer have names ending in ``.tmp``; the next writer replaces them.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type[np.generic]) -> None:
        """Start writing tokens of ``dtype``.

        Raises:
            UserError: the dtype has no code, or another process is writing the same data set.
            Failure: the folder cannot be written.
        """
        self.prefix = clean_prefix(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise UserError(
                f"dtype {self.dtype}", f"an index can name {sorted(map(str, _CODES))}", "use uint16 or int32"
            )
        with written_whole(self.prefix):
            os.makedirs(os.path.dirname(os.path.abspath(self.prefix)), exist_ok=True)
            self._bin = open(self.prefix + ".bin.tmp", "ab")  # noqa: SIM115 - closed by close() or abort()
        _lock(self._bin, self.prefix)
        self._bin.truncate(0)
        self._sizes: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._largest = -1
        self.num_documents = 0
        self.num_tokens = 0

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Append one document: token ids [n]."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, sizes: np.ndarray) -> None:
        """Append many documents at once.

        Args:
            tokens: ids of all of them, one after the other, integers [sum(sizes)].
            sizes: tokens of each, integers [documents].

        Raises:
            ValueError: the lengths disagree, or an id does not fit the dtype.
        """
        if len(tokens) != int(sizes.sum()):
            raise UserError(
                f"{len(tokens)} tokens for sizes that add up to {int(sizes.sum())}",
                "they must be equal",
                "pass tokens and sizes of the same documents",
            )
        limits = np.iinfo(self.dtype)
        if tokens.dtype != self.dtype and len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise UserError(
                f"token ids {tokens.min()} to {tokens.max()}",
                f"{self.dtype} holds {limits.min} to {limits.max}",
                "use int32",
            )
        raw = np.ascontiguousarray(tokens, self.dtype)
        if len(raw):
            with written_whole(self.prefix):
                self._bin.write(raw.data)
            self._digest.update(raw.data)
            self._largest = max(self._largest, int(raw.max()))
        self._sizes.append(sizes.astype(np.int32))
        self.num_documents += len(sizes)
        self.num_tokens += len(tokens)

    def close(self, meta: dict[str, Any] | None = None) -> None:
        """Finish the data set. Disk errors remove the temporary files.

        Args:
            meta: becomes PREFIX.meta.json, with largest_id and the digests of the files added; None writes none.

        Raises:
            Failure: the files could not be written; an older data set of this name is as it was.
        """
        try:
            with written_whole(self.prefix):
                self._write_temporaries(meta)
        except BaseException:
            self.abort()
            raise
        # An older data set of this name stops existing first, so that no moment shows a mixture of the two.
        for suffix in (".idx", ".meta.json"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        os.replace(self.prefix + ".bin.tmp", self.prefix + ".bin")
        if meta is not None:
            os.replace(self.prefix + ".meta.json.tmp", self.prefix + ".meta.json")
        os.replace(self.prefix + ".idx.tmp", self.prefix + ".idx")
        sync_folder(Path(self.prefix).parent)
        self._bin.close()

    def _write_temporaries(self, meta: dict[str, Any] | None) -> None:
        _sync(self._bin)
        written, wanted = os.fstat(self._bin.fileno()).st_size, self.num_tokens * self.dtype.itemsize
        if written != wanted:  # on a file system whose locks do not reach the other machine
            raise Failure(
                f"{self.prefix}.bin.tmp has {written} bytes instead of {wanted}",
                "one writer per data set",
                "wait for the other process that writes it, or choose another output prefix",
            )
        with open(self.prefix + ".idx.tmp", "wb") as file:
            self._write_index(file)
            _sync(file)
        if meta is not None:
            digests = {"bin": self._digest.hexdigest(), "idx": sha256_of(self.prefix + ".idx.tmp")}
            with open(self.prefix + ".meta.json.tmp", "wb") as file:
                file.write(_sealed({**meta, "largest_id": self._largest, "digests": digests}))
                _sync(file)

    def _write_index(self, file: BinaryIO) -> None:
        sizes = np.concatenate(self._sizes) if self._sizes else np.zeros(0, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self.dtype.itemsize
        file.write(HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(sizes), len(sizes) + 1))
        file.write(sizes.data)
        file.write(np.concatenate([np.zeros(1, np.int64), ends])[: len(sizes)].data)
        file.write(np.arange(len(sizes) + 1, dtype=np.int64).data)

    def abort(self) -> None:
        """Remove everything written so far."""
        for suffix in (".bin.tmp", ".idx.tmp", ".meta.json.tmp"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk refuses the buffered rest again; it is thrown away anyway
            self._bin.close()

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bin.closed:
            return
        if kind is None:
            self.close()
        else:
            self.abort()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO, prefix: str) -> None:
    """Keep a second writer out. The lock goes with the process; file systems without locks do without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process is writing {prefix}",
            "one writer per data set",
            "wait for it or choose another output prefix",
        ) from None
    except OSError:
        pass
