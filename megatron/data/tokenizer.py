"""The choice of a tokenizer, from flags or from what the data says about itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config.schema import DataConfig
from megatron.data.blend import data_prefixes
from megatron.data.indexed import read_meta
from megatron.data.tokenizer_types import (
    ByteTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    gpt2_bpe,
    hf_tokenizer,
)
from megatron.errors import UserError, require

# Kind of tokenizer → what builds it, and the entries of a spec that it takes.
KINDS: dict[str, tuple[Callable[..., Tokenizer], tuple[str, ...]]] = {
    "GPT2BPETokenizer": (gpt2_bpe, ("vocab_file", "merge_file")),
    "HFTokenizer": (hf_tokenizer, ("model",)),
    "SentencePieceTokenizer": (SentencePieceTokenizer, ("model",)),
    "ByteTokenizer": (ByteTokenizer, ()),
    "NullTokenizer": (NullTokenizer, ("vocab_size",)),
}
FILES = {"vocab_file": "--vocab-file", "merge_file": "--merge-file", "model": "--tokenizer-model"}  # entries and flags


def build_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that the flags name, or else the one that the training data names in PREFIX.meta.json.

    Raises:
        UserError: the flags contradict each other or the data, name nothing, or files are missing.
    """
    metas = {prefix: meta for prefix in data_prefixes(config) if (meta := read_meta(prefix)) is not None}
    tokenizer = tokenizer_from_spec(_spec_of(config, metas))
    if config.vocab_size is not None and config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"--vocab-size {config.vocab_size}, but {tokenizer.name} has {tokenizer.vocab_size} ids",
            "they must agree",
            "leave --vocab-size out (it is for NullTokenizer)",
        )
    for prefix, meta in metas.items():
        made = (meta.get("vocab_size", tokenizer.vocab_size), meta.get("eod_id", tokenizer.eod_id))
        if tokenizer.eod_id is not None and made != (tokenizer.vocab_size, tokenizer.eod_id):
            raise UserError(
                f"{prefix} was made with a tokenizer of {made[0]} ids and EOD {made[1]}",
                f"{tokenizer.name} has {tokenizer.vocab_size} and {tokenizer.eod_id}",
                "use the tokenizer of the data or preprocess again",
            )
    return tokenizer


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that :meth:`Tokenizer.spec` described.

    Raises:
        UserError: an unknown type, a missing entry or a missing file.
    """
    kind = _kind(str(spec.get("type", "")))
    build, entries = KINDS[kind]
    for entry in entries:
        flag = FILES.get(entry, "--vocab-size")
        require(spec.get(entry) is not None, f"{kind} without {flag}", "it cannot be built without", f"add {flag}")
    return build(*(spec[entry] for entry in entries))


def _kind(name: str) -> str:
    """The kind of tokenizer that is called ``name`` in any case."""
    kind = next((kind for kind in KINDS if kind.lower() == name.lower()), None)
    if kind is None:
        raise UserError(f"tokenizer type {name!r}", f"it must be one of {', '.join(KINDS)}", "choose one of them")
    return kind


def _spec_of(config: DataConfig, metas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kind = config.tokenizer_type
    files = {"vocab_file": config.vocab_file, "merge_file": config.merge_file, "model": config.tokenizer_model}
    if kind is None and (config.vocab_file or config.merge_file):
        kind = "GPT2BPETokenizer"
    elif kind is None and config.tokenizer_model:
        kind = "HFTokenizer"
    if kind is not None:
        for entry, file in files.items():
            require(
                not file or entry in KINDS[_kind(kind)][1],
                f"{FILES[entry]} {file} with {kind}, which does not read it",
                "give one tokenizer",
                "drop the flag or change --tokenizer-type",
            )
        return {"type": kind, "vocab_size": config.vocab_size, **files}
    for prefix, meta in metas.items():
        if isinstance(meta.get("tokenizer"), dict):
            spec = dict(meta["tokenizer"])
            for entry in FILES:
                beside = Path(prefix).parent / str(spec.get(entry))
                if spec.get(entry) and beside.exists():
                    spec[entry] = os.path.normpath(beside)
            return spec
    raise UserError(
        "no tokenizer: neither a flag nor the data (PREFIX.meta.json) names one",
        "the vocabulary must be known",
        "add --vocab-file and --merge-file (GPT-2 BPE), --tokenizer-model, or --tokenizer-type ByteTokenizer",
    )
