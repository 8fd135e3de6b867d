"""The tokenizer protocol and the choice of a tokenizer from flags or from what the data says about itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron.data.blend import parse_blend, read_data_path_file
from megatron.data.indexed import read_meta
from megatron.data.tokenizer_types import (
    ByteTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    gpt2_bpe,
    hf_tokenizer,
)
from megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.config.schema import DataConfig

TYPES = ("GPT2BPETokenizer", "HFTokenizer", "SentencePieceTokenizer", "ByteTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        name: short name for people.
        vocab_size: number of ids, before any padding; every id is below it.
        eod_id: id that ends a document; None when the tokenizer has none.
        mask_id: id of a mask token of the tokenizer's own; None when it has none (the usual case).
    """

    name: str
    vocab_size: int
    eod_id: int | None
    mask_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts; the fast way to encode."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; ids outside the vocabulary (mask, padding) give nothing."""

    def spec(self) -> dict[str, Any]:
        """Return what tokenizer_from_spec needs to build this tokenizer again, as JSON values."""

    def vocabulary(self) -> dict[str, int] | None:
        """Return the id of every token, as the tokenizer spells tokens; None when it knows only ids."""


def build_tokenizer(config: DataConfig) -> Tokenizer:
    """Return the tokenizer that the flags name, or else the one that the training data names in PREFIX.meta.json.

    Raises:
        ValueError: the flags contradict each other or the data, name nothing, or files are missing.
    """
    metas = _data_metas(config)
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
        ValueError: an unknown type, a missing entry or a missing file.
    """
    kind = next((name for name in TYPES if name.lower() == str(spec.get("type", "")).lower()), None)
    needs = {
        "GPT2BPETokenizer": ("vocab_file", "merge_file"),
        "HFTokenizer": ("model",),
        "SentencePieceTokenizer": ("model",),
        "NullTokenizer": ("vocab_size",),
    }
    if kind is None:
        raise UserError(
            f"tokenizer type {spec.get('type')!r}", f"it must be one of {', '.join(TYPES)}", "choose one of them"
        )
    flags = {"model": "--tokenizer-model"}
    for entry in needs.get(kind, ()):
        if spec.get(entry) is None:
            flag = flags.get(entry, "--" + entry.replace("_", "-"))
            raise UserError(f"{kind} without {flag}", "it cannot be built without", f"add {flag}")
    if kind == "GPT2BPETokenizer":
        return gpt2_bpe(spec["vocab_file"], spec["merge_file"])
    if kind == "HFTokenizer":
        return hf_tokenizer(spec["model"])
    if kind == "SentencePieceTokenizer":
        return SentencePieceTokenizer(spec["model"])
    return NullTokenizer(int(spec["vocab_size"])) if kind == "NullTokenizer" else ByteTokenizer()


def portable_spec(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Return the spec with files relative to ``folder``, so that data and tokenizer can be moved together."""
    spec = tokenizer.spec()
    for key in ("vocab_file", "merge_file", "model"):
        if spec.get(key) and os.path.exists(spec[key]):
            spec[key] = os.path.relpath(os.path.realpath(spec[key]), folder.resolve())
    return spec


def _data_metas(config: DataConfig) -> dict[str, dict[str, Any]]:
    """Return prefix → PREFIX.meta.json of the data that has one, training data first."""
    metas = {}
    sources = (
        (config.train_data_path, config.train_data_path_file),
        (config.valid_data_path, config.valid_data_path_file),
    )
    for paths, file in sources:
        items = list(paths) if paths else read_data_path_file(file) if file else []
        for _, prefix in parse_blend(items) if items else []:
            meta = read_meta(prefix)
            if meta is not None:
                metas[prefix] = meta
    return metas


def _spec_of(config: DataConfig, metas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kind = config.tokenizer_type
    files = {"vocab_file": config.vocab_file, "merge_file": config.merge_file, "model": config.tokenizer_model}
    if kind is None and (config.vocab_file or config.merge_file):
        kind = "GPT2BPETokenizer"
    elif kind is None and config.tokenizer_model:
        kind = "HFTokenizer"
    if kind is not None:
        used = {"gpt2bpetokenizer": ("vocab_file", "merge_file"), "hftokenizer": ("model",)}
        used["sentencepiecetokenizer"] = used["hftokenizer"]
        unused = [key for key, value in files.items() if value and key not in used.get(kind.lower(), ())]
        if unused:
            raise UserError(
                f"{unused[0]} {files[unused[0]]} with {kind}, which does not read it",
                "give one tokenizer",
                "drop the flag or change --tokenizer-type",
            )
        return {"type": kind, "vocab_size": config.vocab_size, **files}
    for prefix, meta in metas.items():
        if isinstance(meta.get("tokenizer"), dict):
            spec = dict(meta["tokenizer"])
            for key in ("vocab_file", "merge_file", "model"):
                beside = Path(prefix).parent / str(spec.get(key))
                if spec.get(key) and beside.exists():
                    spec[key] = os.path.normpath(beside)
            return spec
    raise UserError(
        "no tokenizer: neither a flag nor the data (PREFIX.meta.json) names one",
        "the vocabulary must be known",
        "add --vocab-file and --merge-file (GPT-2 BPE), --tokenizer-model, or --tokenizer-type ByteTokenizer",
    )
