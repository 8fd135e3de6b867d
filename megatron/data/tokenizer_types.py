"""The kinds of tokenizers; megatron/data/tokenizer.py chooses between them.

Text is encoded as it is: no special token is added, and text that spells one (``<|endoftext|>`` in a document) is
encoded as ordinary text, so that a document cannot forge an end of document.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

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
    """

    name: str
    vocab_size: int
    eod_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts; the fast way to encode."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; ids outside the vocabulary (mask, padding) give nothing."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return what tokenizer_from_spec needs to build this tokenizer again, as JSON values."""
        ...

    def vocabulary(self) -> dict[str, int] | None:
        """Return the id of every token, as the tokenizer spells tokens; None when it knows only ids."""
        ...


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
        self._spec = spec
        self.name = f"{spec['type']}({Path(spec.get('model') or spec['vocab_file']).name})"
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1  # ids may have holes
        self.eod_id = backend.token_to_id(eod) if eod else None

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def spec(self) -> dict[str, Any]:
        return dict(self._spec)

    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    def __init__(self, model: str) -> None:
        """Load ``model``. Raises ValueError when the file cannot be read or sentencepiece is not installed."""
        processor = _import("sentencepiece").SentencePieceProcessor()
        try:
            processor.Load(str(_existing(model, "--tokenizer-model")))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{model} ({error})", "it must be a SentencePiece model", "check --tokenizer-model"
            ) from error
        self._processor = processor
        self._model = model
        self.name = f"SentencePieceTokenizer({Path(model).name})"
        self.vocab_size = int(processor.vocab_size())
        self.eod_id = processor.eos_id() if processor.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def spec(self) -> dict[str, Any]:
        return {"type": "SentencePieceTokenizer", "model": self._model}

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0-255 are bytes, 256 is the end of a document. Needs no files."""

    name = "ByteTokenizer"
    vocab_size = 257
    eod_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def spec(self) -> dict[str, Any]:
        return {"type": "ByteTokenizer"}

    def vocabulary(self) -> dict[str, int]:
        return {**{f"byte {index}": index for index in range(256)}, "end of document": 256}


class NullTokenizer(Tokenizer):
    """For text that is token ids already, separated by spaces. Knows only the size of the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        """Accept ids below ``vocab_size``."""
        self.vocab_size = vocab_size
        self.name = f"NullTokenizer({vocab_size})"

    def encode(self, text: str) -> list[int]:
        """Return the numbers in ``text``. Raises ValueError for words that are not ids of the vocabulary."""
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
        return " ".join(str(int(i)) for i in ids)

    def spec(self) -> dict[str, Any]:
        return {"type": "NullTokenizer", "vocab_size": self.vocab_size}

    def vocabulary(self) -> None:
        return None


def gpt2_bpe(vocab_file: str, merge_file: str) -> FastTokenizer:
    """Return GPT-2's byte-level BPE from vocab.json (encoder.json) and merges.txt (vocab.bpe).

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    tokenizers = _import("tokenizers")
    for path, flag in ((vocab_file, "--vocab-file"), (merge_file, "--merge-file")):
        _existing(path, flag)
    try:
        backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocab_file, merge_file))
    except Exception as error:
        raise UserError(
            f"cannot read a BPE from {vocab_file} and {merge_file} ({error})",
            "they must be GPT-2's vocab.json and merges.txt",
            "check --vocab-file and --merge-file",
        ) from error
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    spec = {"type": "GPT2BPETokenizer", "vocab_file": vocab_file, "merge_file": merge_file}
    return FastTokenizer(backend, spec, eod=GPT2_EOD)


def hf_tokenizer(model: str) -> FastTokenizer:
    """Return a Hugging Face tokenizer.

    Args:
        model: a folder with tokenizer.json, such a file itself, or a name on the hub (downloaded or from its cache).

    Raises:
        ValueError: it cannot be found, or has no tokenizer.json.
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
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise UserError(
            f"{file} ({error})", "it must be a tokenizer.json of the tokenizers library", "check --tokenizer-model"
        ) from error
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


def _is_short_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 18  # Python refuses to read very long ones


def _existing(path: str, flag: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"{flag} {path} does not exist", "it must be a readable file", "check the path")
    return found


def _import(module: str) -> Any:
    """Import an optional library when it is needed: reading pre-tokenised data needs none of them."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed", "this tokenizer needs it", f"run pip install {module}") from error
