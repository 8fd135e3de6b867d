"""The writer of token files (see megatron/data/indexed.py): complete or not there at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron.data.indexed import DTYPES, HEADER, MAGIC, SEAL, clean_prefix, seal_of
from megatron.errors import Failure, UserError
from megatron.files import replace_file, sha256_of, sync_folder, written_whole

_CODES = {np.dtype(name): code for code, name in DTYPES.items()}
_MAX_UINT16_VOCAB = 65500  # Megatron's limit: it leaves a few ids for special tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the token dtype that Megatron chooses: uint16 for a vocabulary under 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _MAX_UINT16_VOCAB else np.int32)


def write_meta(prefix: str | Path, meta: dict[str, Any]) -> None:
    """Replace PREFIX.meta.json. Raises Failure when it cannot be written."""
    replace_file(clean_prefix(prefix) + ".meta.json", _sealed(meta))


def _sealed(meta: dict[str, Any]) -> bytes:
    meta = json.loads(json.dumps(meta))  # as it will be read
    return json.dumps({**meta, SEAL: seal_of(meta)}, indent=1).encode() + b"\n"


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
        self._largest, self._has_meta = -1, False
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
        """Finish the data set: :meth:`prepare` and :meth:`publish`."""
        self.prepare(meta)
        self.publish()

    def prepare(self, meta: dict[str, Any] | None = None) -> None:
        """Put everything on the disk under temporary names. Disk errors remove them.

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
        self._has_meta = meta is not None

    def publish(self) -> None:
        """Give what :meth:`prepare` wrote its names."""
        # An older data set of this name stops existing first, so that no moment shows a mixture of the two.
        for suffix in (".idx", ".meta.json"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        os.replace(self.prefix + ".bin.tmp", self.prefix + ".bin")
        if self._has_meta:
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
            with contextlib.suppress(OSError):  # the error that brought us here is the one to be told
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
        # A writer that ended after we opened the file has renamed it: it is finished data now, and not to be emptied.
        is_taken = not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        is_taken = True
    except OSError:
        is_taken = False
    if is_taken:
        file.close()
        raise UserError(
            f"another process is writing {prefix}",
            "one writer per data set",
            "wait for it or choose another output prefix",
        )
