"""The tokenizer of a Hugging Face folder: copied, or built from the files of the run; with a mask token for MDM."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.schema import DataConfig
from megatron.data.identity import check_tokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import UserError

MASK_TOKEN = "<|mask|>"
EOD_TOKEN = "<|endoftext|>"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def named_tokenizer(data: DataConfig, recorded: Mapping[str, Any]) -> DataConfig:
    """Return the settings with the tokenizer spelled out, where the run left it to its training data to name it.

    Runs on pre-tokenised data, or whose data are gone, keep what they have: perhaps no tokenizer. One that became another
    (``recorded``: what the run says of its own) is left out, with a warning.
    """
    if data.tokenizer_type is not None and data.vocab_size is not None and not recorded:
        return data  # such as that of an import
    try:
        tokenizer = build_tokenizer(data)
    except (ValueError, OSError):
        return data
    try:
        check_tokenizer(tokenizer, recorded)
    except UserError as error:
        print(f"warning: no tokenizer: {error}", file=sys.stderr, flush=True)
        return DataConfig(vocab_size=recorded.get("vocab_size"))
    spec = tokenizer.spec
    return DataConfig(
        tokenizer_type=spec["type"],
        vocab_file=spec.get("vocab_file"),
        merge_file=spec.get("merge_file"),
        tokenizer_model=spec.get("model"),
        vocab_size=tokenizer.vocab_size,
    )


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy the tokenizer files of a Hugging Face folder byte for byte. Returns whether it has a tokenizer.json."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return (folder / "tokenizer.json").is_file()


def tokenizer_size(folder: Path) -> int | None:
    """Return the number of ids (largest id + 1) of the tokenizer.json of a folder, or None without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    return 1 + max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values())


def write_tokenizer(
    data: DataConfig, folder: Path, *, mask_id: int | None, length: int, source: str | None = None
) -> bool:
    """Write the tokenizer of a run.

    Args:
        data: tokenizer settings of the run.
        folder: where the files go.
        mask_id: id of the mask token (MDM); the tokenizer gets one with exactly this id.
        length: tokens that the model was trained with, written as ``model_max_length``.
        source: Hugging Face folder or hub name to use instead of the settings of the run.

    Returns:
        Whether there is a tokenizer; runs on pre-tokenised data have none unless ``source`` gives it.

    Raises:
        ValueError: its files are not there, or it cannot have a mask token of that id.
    """
    local = Path(source or data.tokenizer_model or "")
    if (source or data.tokenizer_type == "HFTokenizer") and (local / "tokenizer.json").is_file():
        copy_tokenizer(local, folder)
        if mask_id is None or _mask_id(folder) == mask_id:
            return True
    tokenizer = _build(data, source)
    if tokenizer is None:
        return False
    if mask_id is not None:
        _add_mask(tokenizer, mask_id)
    if source is None and tokenizer.eos_token is None:  # a bare tokenizer.json does not say which token it is
        eod = build_tokenizer(data).eod_id
        tokenizer.eos_token = None if eod is None else tokenizer.convert_ids_to_tokens(eod)
    if tokenizer.model_max_length > 10**9:
        tokenizer.model_max_length = length
    tokenizer.save_pretrained(str(folder))
    _name_class(folder / "tokenizer_config.json")
    return True


def _name_class(path: Path) -> None:
    """Write the class by the name that transformers 4 and 5 both know."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def end_of_document(folder: Path) -> int | None:
    """Return the id of the token that ends a document, as the tokenizer of a folder names it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)).eos_token_id


def _build(data: DataConfig, source: str | None) -> Any:
    """Make the ``transformers`` tokenizer of the settings; None for pre-tokenised data."""
    from transformers import PreTrainedTokenizerFast

    kind = data.tokenizer_type
    if source:
        return _named(source)
    if kind == "GPT2BPETokenizer":
        if not (
            data.vocab_file and data.merge_file and Path(data.vocab_file).is_file() and Path(data.merge_file).is_file()
        ):
            raise UserError(
                f"the GPT-2 tokenizer files are {data.vocab_file} and {data.merge_file}, not found here",
                "the export needs them",
                "run ./download.sh --gpt2 and pass --vocab-file and --merge-file, or pass --tokenizer NAME",
            )
        vocab = json.loads(Path(data.vocab_file).read_text(encoding="utf-8"))
        lines = Path(data.merge_file).read_text(encoding="utf-8").split("\n")
        merges = [
            (left, right) for left, _, right in (line.partition(" ") for line in lines) if right and left != "#version:"
        ]
        return PreTrainedTokenizerFast(tokenizer_object=_byte_level(vocab, merges), **_specials(EOD_TOKEN))
    if kind == "ByteTokenizer":
        return PreTrainedTokenizerFast(tokenizer_object=_bytes_tokenizer(), **_specials(EOD_TOKEN))
    if kind == "HFTokenizer" and data.tokenizer_model:
        path = Path(data.tokenizer_model)
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return _named(data.tokenizer_model)
    if kind == "SentencePieceTokenizer":
        raise UserError(
            f"the run used the SentencePiece model {data.tokenizer_model}",
            "it is not converted here",
            "pass --tokenizer with a Hugging Face tokenizer of the same ids, or --no-tokenizer",
        )
    return None


def _named(name: str) -> Any:
    """The tokenizer of a folder, or of a name on the hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of the hub, the library or the files: each has classes of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the tokenizer {name} cannot be loaded ({reason})",
            "it is a Hugging Face folder, or a name on the hub",
            "check the name and the network, pass --tokenizer with another one, or --no-tokenizer",
        ) from error


def _specials(token: str) -> dict[str, str]:
    """Name the end-of-document token as start, end, unknown and padding."""
    return {"bos_token": token, "eos_token": token, "unk_token": token, "pad_token": token}


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """Make the byte-level BPE of GPT-2 from its vocabulary and merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _bytes_tokenizer() -> Any:
    """Make the byte tokenizer: id = byte value, 256 = end of document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: value for value, character in enumerate(_byte_characters())} | {EOD_TOKEN: 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level tokenizers use for each of the 256 bytes (GPT-2's table)."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(value) if value in plain else chr(next(shifted)) for value in range(256)]


def _mask_id(folder: Path) -> int | None:
    """Return the id of the mask token that a written tokenizer has."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder)).mask_token_id


def _add_mask(tokenizer: Any, mask_id: int) -> None:
    """Give the tokenizer a mask token with this id; ids between its end and the mask become reserved tokens."""
    from transformers import AddedToken

    size = len(tokenizer)
    if mask_id < size:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_id)
    else:
        if mask_id > size:
            tokenizer.add_tokens([f"<|reserved_{index}|>" for index in range(size, mask_id)], special_tokens=True)
        # It stands for a token with the space before it, if there is one: so that space is part of it.
        mask = AddedToken(MASK_TOKEN, lstrip=True, rstrip=False, normalized=False, special=True)
        tokenizer.add_special_tokens({"mask_token": mask})
    if tokenizer.mask_token_id != mask_id:
        raise UserError(
            f"the mask token of the run is id {mask_id}, the tokenizer made it {tokenizer.mask_token_id}",
            "they must agree",
            "pass --tokenizer with a tokenizer whose ids are those of the training data",
        )
