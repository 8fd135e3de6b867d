"""What a data set is, by content: fingerprints for records, and the checks that data and vocabulary belong together."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.schema import DataConfig
from megatron.data.blend import parse_blend, prefixes_of
from megatron.data.indexed import DamagedData, IndexedDataset, read_meta, whole_prefix
from megatron.data.tokenizer import Tokenizer
from megatron.errors import UserError, require
from megatron.files import sha256_of
from megatron.statistics import fingerprint, half_of

_BLOCK_BYTES = 1 << 22
SCAN_LIMIT_BYTES = 1 << 31  # of a .bin without a record of its largest id that is read at the start: about a second


def tokenizer_fingerprint(tokenizer: Tokenizer, *, without: Collection[int] = ()) -> str:
    """Return a hash of the vocabulary: equal where every id stands for the same token, wherever the files lie.

    Args:
        tokenizer: of a run, data or an export.
        without: ids that stand for no text, such as the mask token that an export adds.

    Returns:
        32 hexadecimal digits; ``"ids:SIZE"`` for a NullTokenizer, which knows no tokens.
    """
    vocabulary = tokenizer.vocabulary()
    if vocabulary is None:
        return f"ids:{tokenizer.vocab_size}"
    items = sorted((token, number) for token, number in vocabulary.items() if number not in without)
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:32]


def check_tokenizer(tokenizer: Tokenizer, recorded: Mapping[str, Any]) -> None:
    """Check that a tokenizer is that of a run, whose data or files may have been made anew.

    Args:
        tokenizer: as the settings of the run, or its data, name it now.
        recorded: ``vocab_size`` and ``fingerprint`` of then, as far as they are known.

    Raises:
        UserError: it is another one.
    """
    now = {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer_fingerprint(tokenizer)}
    changed = [name for name, value in now.items() if recorded.get(name) not in (None, value)]
    require(
        not changed,
        f"{tokenizer.name} is not the tokenizer of the run, which had "
        + ", ".join(f"{name} {recorded[name]} (now {now[name]})" for name in changed),
        "ids mean what they meant in training",
        "name the tokenizer of then",
    )


def data_fingerprint(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a data path means, by content.

    Args:
        paths: one prefix or a blend, as ``parse_blend`` reads it.

    Returns:
        One record a set, in order: part (first document and the one behind the last; only where not all are meant), prefix
        (absolute, links resolved), weight (normalised), documents, tokens,
        idx_sha256 (SHA-256 of PREFIX.idx: it holds the lengths of all documents) and bin_sample (SHA-256 of tokens from
        all over PREFIX.bin: documents of equal lengths may hold other tokens).

    Raises:
        UserError: a wrong blend, or missing or damaged data.
    """
    pairs = parse_blend(paths)
    total = sum(weight for weight, _ in pairs)
    records = []
    for weight, prefix in pairs:
        data = IndexedDataset(prefix)
        records.append(
            {
                "prefix": os.path.realpath(data.name),
                "weight": weight / total,
                "documents": len(data),
                "tokens": data.num_tokens,
                "idx_sha256": sha256_of(f"{data.prefix}.idx"),
                "bin_sample": _sample_digest(data.tokens),
                **({"part": list(data.part)} if data.part else {}),
            }
        )
    return records


def _sample_digest(tokens: np.ndarray) -> str:
    """Return the SHA-256 of 64 pieces of 8,192 tokens each, evenly spaced (of all tokens where there are fewer)."""
    length, digest = 8192, hashlib.sha256()
    starts = np.linspace(0, max(0, len(tokens) - length), 64).astype(np.int64)
    for start in sorted(set(starts.tolist())):
        digest.update(np.ascontiguousarray(tokens[start : start + length]).data)
    return digest.hexdigest()


def with_absolute_paths(data: DataConfig, *, train: Sequence[str], valid: Sequence[str]) -> DataConfig:
    """Return the data section with files by absolute path, so that a record means the same from any folder.

    Args:
        data: as given.
        train, valid: the blends that it means, also where a file lists them.
    """

    def path(value: str | None) -> str | None:
        file = os.path.expanduser(value or "")
        return os.path.abspath(file) if os.path.exists(file) else value

    names = ("vocab_file", "merge_file", "tokenizer_model", "train_data_path_file", "valid_data_path_file")
    found: dict[str, Any] = {name: path(getattr(data, name)) for name in names}
    for name, blend in (("train", train), ("valid", valid)):
        pairs = [(str(weight), os.path.abspath(prefix)) for weight, prefix in (parse_blend(blend) if blend else [])]
        found[f"{name}_data_path"] = [word for pair in pairs for word in pair][0 if len(pairs) > 1 else 1 :]
    return replace(data, **found)


def check_apart(train: Sequence[dict[str, Any]], valid: Sequence[dict[str, Any]]) -> None:
    """Refuse validation data that are training data, or a copy of them.

    Args:
        train, valid: records of :func:`data_fingerprint`.

    Raises:
        UserError: which are equal.
    """
    for part, trained in product(valid, train):
        if _share_documents(part, trained):
            raise UserError(
                f"the validation data {part['prefix']} are the training data {trained['prefix']}",
                "a validation loss is of text that the model has not seen",
                "split the text with tools/split_data.py, or pass --allow-training-data-in-validation",
            )


def _share_documents(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two sets have equal contents, or are parts of one with documents in common."""
    if "part" not in first and "part" not in second:
        return all(first[key] == second[key] for key in ("idx_sha256", "bin_sample"))
    (begin, end), (other_begin, other_end) = (part.get("part", (0, part["documents"])) for part in (first, second))
    are_of_one = whole_prefix(first["prefix"]) == whole_prefix(second["prefix"])
    return are_of_one and max(begin, other_begin) < min(end, other_end)


def check_vocabulary(*blends: Sequence[str], vocab_size: int, fingerprints: Sequence[str] = ()) -> None:
    """Refuse data of different tokenizers, and ids outside the vocabulary.

    The largest id is read from PREFIX.meta.json. Where that does not record it, PREFIX.bin is read, spread evenly over at
    most ``SCAN_LIMIT_BYTES`` of it.

    Args:
        blends: data paths of training, validation, …; an empty one counts for nothing.
        vocab_size: every id must be below it.
        fingerprints: of the tokenizer of the run (``tokenizer_fingerprint``), with and without tokens that stand for no text;
            none, or those of a NullTokenizer, where the run has only ids: then all data must have been made with one
            tokenizer, whichever.

    Raises:
        UserError: which data set was made with another tokenizer than which, or holds which id.
    """
    prefixes = prefixes_of(*blends)
    makers = {prefix: maker for prefix in prefixes if (maker := _maker(prefix)) is not None}
    if own := [fingerprint for fingerprint in fingerprints if not fingerprint.startswith("ids:")]:
        known = {maker.get("fingerprint") for maker in makers.values()}
        fingerprint = next((each for each in own if each in known), own[0])
        makers = {"the tokenizer of this run": {"ids": vocab_size, "fingerprint": fingerprint}, **makers}
    for name, maker in makers.items():
        first_name, first = next(iter(makers.items()))
        shared = maker.keys() & first.keys()
        require(
            all(maker[entry] == first[entry] for entry in shared & {"fingerprint"} or shared),
            f"{name} was made with {_described(maker)}",
            f"{first_name} has {_described(first)}, and ids must mean one thing",
            "preprocess it again with the same tokenizer, or give other data",
        )
    for prefix in prefixes:
        _check_ids(prefix, vocab_size)


def _maker(prefix: str) -> dict[str, Any] | None:
    """The tokenizer of a data set, as far as its PREFIX.meta.json tells: older ones have no fingerprint, which decides alone."""
    meta = read_meta(prefix) or {}
    is_ids = (meta.get("tokenizer") or {}).get("type") == "NullTokenizer"  # which say nothing of what they stand for
    if is_ids or meta.get("vocab_size") is None:
        return None
    entries = {"ids": "vocab_size", "fingerprint": "tokenizer_fingerprint", "end of document": "eod_id"}
    return {name: meta[entry] for name, entry in entries.items() if meta.get(entry) is not None}


def _described(maker: dict[str, Any]) -> str:
    rest = "".join(f", {name} {value}" for name, value in maker.items() if name != "ids")
    return f"a vocabulary of {maker['ids']} ids{rest}"


def _check_ids(prefix: str, vocab_size: int) -> None:
    recorded = (read_meta(prefix) or {}).get("largest_id")
    blocks = _blocks(prefix) if recorded is None else [np.array(recorded)] * (recorded >= 0)  # -1: no tokens
    wrong = next((int(i) for block in blocks for i in (block.min(), block.max()) if not 0 <= i < vocab_size), None)
    require(
        wrong is None,
        f"{prefix}.bin holds the id {wrong}",
        f"no id is negative, and ids must be below the size of the vocabulary, {vocab_size}",
        "give the tokenizer (or --vocab-size) that the data were made with",
    )


def _blocks(prefix: str) -> Iterator[np.ndarray]:
    """Yield the tokens of PREFIX.bin in blocks; of a large file only some, evenly spaced."""
    data = IndexedDataset(prefix)
    length = _BLOCK_BYTES // data.dtype.itemsize
    blocks = -(-data.num_tokens // length)
    step = max(1, -(-blocks * _BLOCK_BYTES // SCAN_LIMIT_BYTES))
    for block in range(0, blocks, step):
        yield data.tokens[block * length : (block + 1) * length]


def verify_data(*blends: Sequence[str], say: Callable[[str], object] = print) -> None:
    """Read all data once, compare them with the digests in PREFIX.meta.json and say a line a data set.

    Args:
        blends: data paths, as in :func:`check_vocabulary`.

    Raises:
        UserError: a data set records no digests.
        DamagedData: a file is not what was written.
    """
    for prefix in dict.fromkeys(whole_prefix(prefix) for prefix in prefixes_of(*blends)):
        recorded = (read_meta(prefix) or {}).get("digests")
        if not recorded:
            raise UserError(
                f"{prefix}.meta.json records no digests",
                "--verify-data compares with what was written",
                f"record what is there now: tools/inspect_data.py --record {prefix}, or leave --verify-data out",
            )
        for problem in digest_problems(prefix, recorded):
            raise DamagedData(
                problem, "its tokens must be those that were written", "copy it again, or preprocess again"
            )
        say(f"{prefix}: intact ({Path(prefix + '.bin').stat().st_size / 1e6:,.1f} MB read)")


def digest_problems(prefix: str, recorded: dict[str, str]) -> list[str]:
    """Return a sentence for each file of a data set whose SHA-256 is not the recorded one."""
    return [
        f"{prefix}.{suffix} is not as it was written (its checksum differs)"
        for suffix in ("idx", "bin")
        if recorded.get(suffix) not in (None, sha256_of(f"{prefix}.{suffix}"))
    ]


def selection_half(*parts: IndexedDataset) -> np.ndarray:
    """Return whether each document is of the selection half, bool [documents], all parts one after the other."""
    halves = [half_of(fingerprint(part[index])) == "selection" for part in parts for index in range(len(part))]
    return np.array(halves, dtype=bool)
