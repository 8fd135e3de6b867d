"""The kinds of tokenizers, and the choice between them, from flags or from what the data says about itself.

Text is encoded as it is: no special token is added, and text that spells one (``<|endoftext|>`` in a document) is
encoded as ordinary text, so that a document cannot forge an end of document.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron.config.schema import DataConfig
from megatron.data.blend import data_prefixes
from megatron.data.indexed import read_meta
from megatron.errors import UserError, require
from megatron.files import read_object

GPT2_EOD = "<|endoftext|>"
_EOD_NAMES = (GPT2_EOD, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_HF_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        name: short name for people.
        vocab_size: number of ids, before any padding; every id is below it.
        eod_id: id that ends a document; None when the tokenizer has none.
        spec: what tokenizer_from_spec needs to build this tokenizer again, JSON values; not to be changed.
    """

    name: str
    vocab_size: int
    eod_id: int | None = None
    spec: dict[str, Any]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts; the fast way to encode."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; ids outside the vocabulary (mask, padding) give nothing."""

    def vocabulary(self) -> dict[str, int] | None:
        """Return the id of every token, as the tokenizer spells tokens; None when it knows only ids."""


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library: GPT-2 BPE from two files, or a tokenizer.json.

    Attributes:
        backend: the library's, a tokenizers.Tokenizer.
    """

    def __init__(self, backend: Any, spec: dict[str, Any], *, eod: str | None) -> None:
        """Wrap ``backend``; ``eod`` is a token string of its vocabulary."""
        backend.no_truncation()  # a tokenizer.json may ask for both; they would silently change the data
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend = backend
        self.spec = spec
        self.name = f"{spec['type']}({Path(spec.get('model') or spec['vocab_file']).name})"
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have holes
        self.eod_id = backend.token_to_id(eod) if eod else None

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Tokenizer`; by several threads of the library."""
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`; special tokens are shown."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones too."""
        return self.backend.get_vocab(with_added_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    def __init__(self, model: str) -> None:
        """Load ``model``. Raises UserError when the file cannot be read or sentencepiece is not installed."""
        processor = _import("sentencepiece").SentencePieceProcessor()
        file = _existing(model, "--tokenizer-model")
        with _loading(model, "it must be a SentencePiece model", "check --tokenizer-model"):
            processor.Load(file)
        self._processor = processor
        self.spec = {"type": "SentencePieceTokenizer", "model": model}
        self.name = f"SentencePieceTokenizer({Path(model).name})"
        self.vocab_size = int(processor.vocab_size())
        self.eod_id = processor.eos_id() if processor.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        """See :class:`Tokenizer`."""
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Tokenizer`."""
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def vocabulary(self) -> dict[str, int]:
        """The id of every piece."""
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0-255 are bytes, 256 is the end of a document. Needs no files."""

    name = "ByteTokenizer"
    vocab_size = 257
    eod_id = 256
    spec = {"type": "ByteTokenizer"}  # noqa: RUF012 (not to be changed)

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; what is no UTF-8 becomes U+FFFD, and other ids give nothing."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def vocabulary(self) -> dict[str, int]:
        """Names for all 257 ids."""
        return {**{f"byte {index}": index for index in range(256)}, "end of document": 256}


class NullTokenizer(Tokenizer):
    """For text that is token ids already, separated by spaces. Knows only the size of the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        """Accept ids below ``vocab_size``."""
        self.vocab_size = vocab_size
        self.name = f"NullTokenizer({vocab_size})"
        self.spec = {"type": "NullTokenizer", "vocab_size": vocab_size}

    def encode(self, text: str) -> list[int]:
        """Return the numbers in ``text``. Raises UserError for words that are not ids of the vocabulary."""
        words = text.split()
        bad = next((word for word in words if not (_is_short_number(word) and int(word) < self.vocab_size)), None)
        if bad is not None:
            raise UserError(
                f"{bad[:40]!r} is no token id",
                f"NullTokenizer reads ids 0 to {self.vocab_size - 1} separated by spaces",
                "choose another --tokenizer-type for text",
            )
        return [int(word) for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as numbers with spaces between them."""
        return " ".join(str(int(i)) for i in ids)

    def vocabulary(self) -> None:
        """None: it knows only ids."""
        return None


def gpt2_bpe(vocab_file: str, merge_file: str) -> FastTokenizer:
    """Return GPT-2's byte-level BPE from vocab.json (encoder.json) and merges.txt (vocab.bpe).

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    tokenizers = _import("tokenizers")
    files = _existing(vocab_file, "--vocab-file"), _existing(merge_file, "--merge-file")
    given = f"cannot read a BPE from {vocab_file} and {merge_file}"
    with _loading(given, "they must be GPT-2's vocab.json and merges.txt", "check --vocab-file and --merge-file"):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*files))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    spec = {"type": "GPT2BPETokenizer", "vocab_file": vocab_file, "merge_file": merge_file}
    return FastTokenizer(backend, spec, eod=GPT2_EOD)


def hf_tokenizer(model: str) -> FastTokenizer:
    """Return a Hugging Face tokenizer.

    Args:
        model: a folder with tokenizer.json, such a file itself, or a name on the hub (downloaded or from its cache).

    Raises:
        UserError: it cannot be found, or has no tokenizer.json.
    """
    tokenizers = _import("tokenizers")
    path = Path(model).expanduser()
    if not path.exists():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise UserError(
                f"--tokenizer-model {model} does not exist", "a path must be a folder or a file", "check the path"
            )
        path = _from_hub(model)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no tokenizer.json in {model}",
            "a Hugging Face tokenizer needs one",
            "for a SentencePiece .model file use --tokenizer-type SentencePieceTokenizer, for vocab.json "
            "and merges.txt use --vocab-file and --merge-file",
        )
    with _loading(str(file), "it must be a tokenizer.json of the tokenizers library", "check --tokenizer-model"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    vocab = backend.get_vocab(with_added_tokens=True)
    eod = next((name for name in _EOD_NAMES if name in vocab), None)
    for config in (path / name for name in _HF_CONFIGS):
        rule, fix = "it belongs to the tokenizer", "download it again, or delete it to do without"
        named = read_object(config, rule=rule, fix=fix).get("eos_token") if config.is_file() else None
        named = named.get("content") if isinstance(named, dict) else named
        require(named is None or isinstance(named, str), f"{config} has the eos_token {named!r}", "it is a text", fix)
        eod = named or eod
    return FastTokenizer(backend, {"type": "HFTokenizer", "model": model}, eod=eod)


def _from_hub(name: str) -> Path:
    """Return the folder of the hub's cache that holds the files of a tokenizer."""
    hub = _import("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["tokenizer.json", *_HF_CONFIGS]))
    except Exception as error:
        raise UserError(
            f"tokenizer {name}: no such file or folder, and the hub gave {type(error).__name__}",
            "--tokenizer-model is a folder, a tokenizer.json or a hub name",
            "check it and the network (or HF_HOME, the cache)",
        ) from error


@contextmanager
def _loading(given: str, rule: str, fix: str) -> Iterator[None]:
    """Say in our words what a library has against a file."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{given} ({error})", rule, fix) from error


def _is_short_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 18  # Python refuses to read very long ones


def _existing(path: str, flag: str) -> str:
    found = os.path.expanduser(path)
    require(os.path.isfile(found), f"{flag} {path} does not exist", "it must be a readable file", "check the path")
    return found


def _import(module: str) -> Any:
    """Import an optional library when it is needed: reading pre-tokenised data needs none of them."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed", "this tokenizer needs it", f"run pip install {module}") from error


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
        UserError: the flags contradict each other or name nothing, or files are missing. That data were made with it is checked
            by :func:`megatron.data.identity.check_vocabulary`, where they are read.
    """
    tokenizer = tokenizer_from_spec(_spec_of(config))
    require(
        config.vocab_size in (None, tokenizer.vocab_size),
        f"--vocab-size {config.vocab_size}, but {tokenizer.name} has {tokenizer.vocab_size} ids",
        "they must agree",
        "leave --vocab-size out (it is for NullTokenizer)",
    )
    return tokenizer


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that :attr:`Tokenizer.spec` described.

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


def _spec_of(config: DataConfig) -> dict[str, Any]:
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
    for prefix in data_prefixes(config):
        if spec := dict((read_meta(prefix) or {}).get("tokenizer") or {}):
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
