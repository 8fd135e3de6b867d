"""What is in a data set, and whether it is intact."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from megatron.data.identity import digest_problems
from megatron.data.indexed import IndexedDataset, read_meta
from megatron.data.prepare.writer import write_meta
from megatron.errors import UserError
from megatron.files import sha256_of


def inspect(
    prefix: str, *, vocab_size: int | None = None, eod_id: int | None = None, duplicates: bool = True
) -> dict[str, Any]:
    """Read a whole data set once and describe it.

    Args:
        prefix: common part of PREFIX.bin and PREFIX.idx.
        vocab_size: ids must be below it; default: PREFIX.meta.json, if there is one.
        eod_id: end-of-document id; default: PREFIX.meta.json, if there is one.
        duplicates: also count documents that repeat an earlier one, token for token (8 bytes of memory a document).

    Returns:
        tokens_per_epoch, documents, token_bytes (on disk), length (min, mean, median, p99, max), histogram (list of
        [first length, last length, documents, tokens] with powers of two), largest_id, documents_ending_in_eod (or
        None), duplicate_documents and duplicate_tokens (or None), text_bytes_per_token (or None) and ``problems``:
        what is wrong, as sentences; empty for an intact data set.

    Raises:
        UserError: the files cannot be opened as a data set at all.
    """
    data = IndexedDataset(prefix)
    meta = read_meta(prefix) or {}
    vocab_size = meta.get("vocab_size") if vocab_size is None else vocab_size
    eod_id = meta.get("eod_id") if eod_id is None else eod_id
    sizes = np.asarray(data.sizes, np.int64)
    problems = _index_problems(sizes) + _meta_problems(data, meta)
    problems += digest_problems(data.prefix, meta.get("digests") or {})
    report: dict[str, Any] = {
        "prefix": data.prefix,
        "tokens_per_epoch": data.num_tokens,
        "documents": len(sizes),
        "dtype": str(data.dtype),
        "token_bytes": data.num_tokens * data.dtype.itemsize,
        "length": _lengths(sizes),
        "histogram": histogram(sizes),
    }
    largest, ends, repeated, repeated_tokens = _read_all(data, sizes, duplicates)
    report["largest_id"] = largest
    ending = int((ends == eod_id).sum()) if eod_id is not None else None
    report["documents_ending_in_eod"] = ending
    report["duplicate_documents"], report["duplicate_tokens"] = repeated, repeated_tokens
    text_bytes = meta.get("text_bytes")
    report["text_bytes_per_token"] = text_bytes / data.num_tokens if text_bytes and data.num_tokens else None
    if vocab_size is not None and largest >= vocab_size:
        problems.append(f"the largest id is {largest}, the vocabulary has {vocab_size}")
    if ending is not None and meta.get("append_eod") and ending != len(sizes):
        problems.append(
            f"{len(sizes) - ending} documents do not end in {eod_id}, although the metadata says that all do"
        )
    report["problems"] = problems
    return report


def record(report: dict[str, Any]) -> None:
    """Add what :func:`inspect` found to PREFIX.meta.json: documents, tokens, the largest id and the digests of the files.

    For published data and those of older versions; damaged data are refused.
    """
    prefix = report["prefix"]
    if report["problems"]:
        raise UserError(f"{prefix} is damaged", "only intact data are recorded", "mend it or make it again")
    found = {"documents": report["documents"], "tokens": report["tokens_per_epoch"], "largest_id": report["largest_id"]}
    digests = {part: sha256_of(f"{prefix}.{part}") for part in ("bin", "idx")}
    write_meta(prefix, {"format": 1, **(read_meta(prefix) or {}), **found, "digests": digests})


def histogram(sizes: np.ndarray) -> list[list[int]]:
    """Count documents and tokens by length.

    Args:
        sizes: tokens of each document, int64 [documents].

    Returns:
        Rows [first, last, documents, tokens] for lengths 0, 1, 2-3, 4-7, …; only those that occur.
    """
    exponents = np.where(sizes > 0, np.frexp(np.maximum(sizes, 1).astype(np.float64))[1], 0)
    rows = []
    for exponent in np.unique(exponents).tolist():
        inside = exponents == exponent
        first, last = (0, 0) if exponent == 0 else (1 << (exponent - 1), (1 << exponent) - 1)
        rows.append([first, last, int(inside.sum()), int(sizes[inside].sum())])
    return rows


def _lengths(sizes: np.ndarray) -> dict[str, float]:
    """Summarise the lengths of documents."""
    if not len(sizes):
        return {}
    median, p99 = np.percentile(sizes, [50, 99])
    return {
        "min": int(sizes.min()),
        "mean": float(sizes.mean()),
        "median": float(median),
        "p99": float(p99),
        "max": int(sizes.max()),
    }


def _index_problems(sizes: np.ndarray) -> list[str]:
    """Say what is odd about the sizes; that pointers and sizes agree was checked on opening."""
    if len(sizes) == 0:
        return ["there are no documents"]
    return [f"{int((sizes == 0).sum())} documents are empty"] if (sizes == 0).any() else []


def _meta_problems(data: IndexedDataset, meta: dict[str, Any]) -> list[str]:
    """Compare PREFIX.meta.json with the files."""
    found = {"documents": len(data.sizes), "tokens": data.num_tokens}
    return [
        f"the metadata says {meta[name]} {name}, the files have {value}"
        for name, value in found.items()
        if meta.get(name) not in (None, value)
    ]


def _read_all(
    data: IndexedDataset, sizes: np.ndarray, duplicates: bool
) -> tuple[int, np.ndarray, int | None, int | None]:
    """Read every token: largest id, last id of each document, repeated documents and their tokens."""
    largest = -1
    ends = np.full(len(sizes), -1, np.int64)
    digests = np.zeros(len(sizes), np.uint64)
    for index in range(len(sizes)):
        tokens = data.get(index)
        if len(tokens):
            ends[index] = tokens[-1]
            largest = max(largest, int(tokens.max()))
        if duplicates:
            digest = hashlib.blake2b(np.ascontiguousarray(tokens).data, digest_size=8).digest()
            digests[index] = int.from_bytes(digest, "little")
    if not duplicates:
        return largest, ends, None, None
    _, first = np.unique(digests, return_index=True)
    is_repeated = np.ones(len(sizes), bool)
    is_repeated[first] = False
    return largest, ends, int(is_repeated.sum()), int(sizes[is_repeated].sum())
