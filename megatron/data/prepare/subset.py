"""Subsets of a data set: the first documents, documents up to a number of tokens, or a seeded random sample.

Random samples are nested: with one seed, the sample of 1,000 documents contains the sample of 100. Documents keep their
order in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedDataset, clean_prefix, read_meta
from megatron.data.prepare.rows import parse_row
from megatron.data.prepare.streams import COMPRESSIONS, read_json_lines
from megatron.data.prepare.word_cache import batch_encoder
from megatron.data.prepare.writer import IndexedDatasetWriter
from megatron.data.tokenizer import FILES, Tokenizer
from megatron.errors import UserError
from megatron.files import replace_file

_RUN_TOKENS = 1 << 26  # tokens copied at once


@dataclass(frozen=True)
class Selection:
    """Which documents: ``documents`` or ``tokens`` gives the size; a ``seed`` makes it a random sample."""

    documents: int | None = None
    tokens: int | None = None
    seed: int | None = None

    def choose(self, sizes: np.ndarray) -> np.ndarray:
        """Return the chosen documents in ascending order, int64.

        Args:
            sizes: tokens of each document; anything of the right length when ``tokens`` is None.

        Raises:
            ValueError: not exactly one size is given, or the data set is too small for it.
        """
        if (self.documents is None) == (self.tokens is None):
            raise UserError(
                f"--documents {self.documents} and --tokens {self.tokens} given",
                "a subset has one size",
                "pass one of them",
            )
        count = len(sizes)
        order = np.arange(count) if self.seed is None else np.random.default_rng(self.seed).permutation(count)
        if self.documents is not None:
            chosen = self.documents
            if not 0 < chosen <= count:
                raise UserError(
                    f"--documents {chosen} of a data set with {count:,}",
                    "the subset must lie in it",
                    "lower the number",
                )
        else:
            ends = np.cumsum(sizes[order], dtype=np.int64)
            total = int(ends[-1]) if count else 0
            limit = self.tokens or 0
            chosen = int(np.searchsorted(ends, limit, side="right"))
            if chosen == 0 or limit > total:
                raise UserError(
                    (
                        f"--tokens {self.tokens} of a data set with {total:,} tokens, its first chosen document "
                        f"having {(int(ends[0]) if count else 0):,}"
                    ),
                    "at least one document must fit and the data must reach",
                    "change --tokens",
                )
        return np.sort(order[:chosen]).astype(np.int64)

    def describe(self) -> str:
        """Return the rule in words."""
        size = f"{self.documents} documents" if self.documents is not None else f"documents up to {self.tokens} tokens"
        return f"first {size}" if self.seed is None else f"random {size}, seed {self.seed}"


def subset_indexed(source: str, output: str, selection: Selection) -> dict[str, Any]:
    """Copy chosen documents of PREFIX.bin/.idx into another data set.

    Args:
        source: prefix to read.
        output: prefix to write; it appears complete or not at all.
        selection: which documents.

    Returns:
        What was written: documents, tokens, source, rule, and ``data_path_line``. It is also part of OUTPUT.meta.json.

    Raises:
        ValueError: see :meth:`Selection.choose` and IndexedDataset; or ``output`` exists.
    """
    source, output = clean_prefix(source), clean_prefix(output)
    _refuse_existing(f"{output}.idx")
    data = IndexedDataset(source)
    chosen = selection.choose(data.sizes)
    sizes = np.asarray(data.sizes)[chosen]
    meta = dict(read_meta(source) or {})
    byte_lengths = _bytes_per_token(meta.get("tokenizer"), Path(source).parent)
    text_bytes = 0
    with IndexedDatasetWriter(output, data.dtype) as writer:
        for tokens, run_sizes in _runs(data, chosen, sizes):
            writer.add_documents(tokens, run_sizes)
            if byte_lengths is not None:
                text_bytes += int(byte_lengths[tokens].sum(dtype=np.int64))
        report = {"documents": len(chosen), "tokens": int(sizes.sum(dtype=np.int64))}
        meta.pop("text_bytes", None)  # that of the source; exact for the subset, or absent
        if byte_lengths is not None:
            report["text_bytes"] = text_bytes
        if isinstance(meta.get("tokenizer"), dict):
            meta["tokenizer"] = _moved(meta["tokenizer"], Path(source).parent, Path(output).parent)
        subset = {"source": source, "rule": selection.describe()}
        writer.close({"format": 1, **meta, **report, "subset": subset})
    return {**report, **subset, "data_path_line": f'"1.0 {output}"'}


def subset_jsonl(
    source: str, output: str, selection: Selection, *, tokenizer: Tokenizer | None = None, key: str = "text"
) -> dict[str, Any]:
    """Copy chosen lines of a JSONL file, byte for byte. Blank lines are no documents.

    Args:
        source: JSONL file to read; it may be compressed.
        output: JSONL file to write; it appears complete or not at all. OUTPUT.json beside it holds the report.
        selection: which documents; its ``tokens`` needs a tokenizer.
        tokenizer: counts tokens, one end of document for each included where the tokenizer has one.
        key: field with the text.

    Returns:
        What was written: documents, tokens (None without a tokenizer), source, rule and ``data_path_line``, the line
        that holds once the file is tokenised to a prefix of its name.
    """
    _refuse_existing(output)
    if selection.tokens is not None and tokenizer is None:
        raise UserError(
            f"--tokens {selection.tokens} of a JSONL file",
            "counting needs a tokenizer",
            "pass for instance --vocab-file and --merge-file, or use --documents",
        )
    if Path(output).suffix.lower() in COMPRESSIONS:
        raise UserError(f"--output {output}", "a subset is written as plain JSON lines", "leave its last suffix out")
    sizes = _document_sizes(source, tokenizer, key)
    chosen = selection.choose(sizes)
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    replace_file(output, lambda file: file.writelines(_chosen_lines(source, chosen)))
    tokens = int(sizes[chosen].sum(dtype=np.int64)) if tokenizer is not None else None
    prefix = f"{os.path.splitext(output)[0]}_{key}_document"
    report = {
        "documents": len(chosen),
        "tokens": tokens,
        "source": source,
        "rule": selection.describe(),
        "data_path_line": f'"1.0 {prefix}"',
    }
    replace_file(f"{output}.json", json.dumps(report, indent=1) + "\n")
    return report


def _documents(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) of the lines that are not blank."""
    return ((number, line) for number, line in enumerate(read_json_lines(Path(path)), 1) if line.strip())


def _chosen_lines(path: str, chosen: np.ndarray) -> Iterator[bytes]:
    """Yield the documents of the ascending indices ``chosen``; what follows the last one is not read."""
    wanted = iter(chosen.tolist())
    index = next(wanted, None)
    for place, (_, line) in enumerate(_documents(path)):
        if place == index:
            yield line.rstrip(b"\r\n") + b"\n"
            index = next(wanted, None)
            if index is None:
                return


def _document_sizes(path: str, tokenizer: Tokenizer | None, key: str) -> np.ndarray:
    """Return the tokens of every document (zeros without a tokenizer), int64."""
    if tokenizer is None:
        return np.zeros(sum(1 for _ in _documents(path)), np.int64)
    sizes: list[int] = []
    extra = int(tokenizer.eod_id is not None)
    documents, encode = _documents(path), batch_encoder(tokenizer)
    while batch := list(islice(documents, 1000)):
        texts = [_text(line, key, f"{path}, line {number}") for number, line in batch]
        sizes += [len(ids) + extra for ids in encode(texts)]
    return np.array(sizes, np.int64)


def _text(line: bytes, key: str, where: str) -> str:
    """Return the text of one JSON line that is not blank."""
    try:
        (text,) = parse_row(line, "line", [key]) or [""]
    except ValueError as error:
        raise UserError(
            f"{where}: {error}", "every line is a JSON object with that field as text", "pass --json-keys KEY"
        ) from error
    return text


def _runs(data: IndexedDataset, chosen: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens, sizes) of stretches of chosen documents that lie side by side, so that few copies are made."""
    if not len(chosen):
        return
    item = data.dtype.itemsize
    tokens = np.memmap(f"{data.prefix}.bin", mode="r", dtype=data.dtype)
    starts = np.asarray(data.pointers)[chosen] // item
    ends = np.cumsum(sizes, dtype=np.int64)
    breaks = (starts[1:] != starts[:-1] + sizes[:-1]) | (ends[1:] // _RUN_TOKENS != ends[:-1] // _RUN_TOKENS)
    bounds = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(chosen)]
    for first, last in pairwise(bounds):
        length = int(sizes[first:last].sum(dtype=np.int64))
        yield tokens[starts[first] : starts[first] + length], sizes[first:last]


def _bytes_per_token(spec: Any, folder: Path) -> np.ndarray | None:
    """Return the bytes of text of every uint16 id, int64, for byte-level vocabularies; None for the other kinds.

    Their tokens are fixed strings of bytes, so the bytes of a subset are exact without decoding it.
    """
    lengths = np.zeros(1 << 16, np.int64)
    if not isinstance(spec, dict):
        return None
    if spec.get("type") == "ByteTokenizer":
        lengths[:256] = 1
        return lengths
    vocab_file = folder / str(spec.get("vocab_file"))
    if spec.get("type") != "GPT2BPETokenizer" or not vocab_file.is_file():
        return None
    vocab: dict[str, int] = json.loads(vocab_file.read_text(encoding="utf-8"))
    if max(vocab.values()) >= len(lengths):
        return None
    for token, index in vocab.items():
        lengths[index] = 0 if token == "<|endoftext|>" else len(token)  # one character stands for one byte
    return lengths


def _refuse_existing(path: str) -> None:
    if os.path.exists(path):
        raise UserError(f"{path} exists", "a subset never replaces a data set", "remove it or choose another --output")


def _moved(spec: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    """Return a tokenizer spec whose relative files, relative to the folder ``old``, are relative to ``new``."""
    out = dict(spec)
    for key in FILES:
        if out.get(key) and (old / out[key]).exists():
            out[key] = os.path.relpath((old / out[key]).resolve(), new.resolve())
    return out
