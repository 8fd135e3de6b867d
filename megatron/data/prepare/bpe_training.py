"""Training of a small byte-level BPE, for corpora without a tokenizer of their own (the laptop quickstart)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from megatron.data.tokenizer import GPT2_EOD, FastTokenizer, hf_tokenizer
from megatron.errors import UserError
from megatron.files import replace_file, replace_folder

MIN_VOCAB = 257  # every byte and the end-of-document token


def train_bpe(texts: Iterable[str], *, vocab_size: int, folder: str | Path) -> FastTokenizer:
    """Train a GPT-2-style byte-level BPE and save it as a Hugging Face tokenizer folder.

    A new folder (tokenizer.json, tokenizer_config.json) appears complete or not at all; in one that holds a tokenizer.json
    these two files are replaced, and nothing else is touched. The end of a document is ``<|endoftext|>``, id 0. Small texts
    may give fewer ids than asked for.

    Args:
        texts: training texts.
        vocab_size: ids, the end-of-document token included; at least 257.
        folder: where to save.

    Raises:
        ValueError: the vocabulary is too small, or ``folder`` exists and is no tokenizer folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB:
        raise UserError(
            f"vocab_size {vocab_size}",
            f"a byte-level BPE needs {MIN_VOCAB} ids for bytes and end of document",
            "raise it or use --tokenizer-type ByteTokenizer",
        )
    folder = Path(folder)
    if folder.exists() and not (folder / "tokenizer.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and holds no tokenizer.json", "it would be overwritten", "choose a new folder"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[GPT2_EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": GPT2_EOD, "unk_token": GPT2_EOD}
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=1) + "\n",
    }
    if folder.exists() and any(folder.iterdir()):  # what else lies there, such as a model, is not ours
        for name, text in files.items():
            replace_file(folder / name, text)
    else:
        with replace_folder(folder) as fresh:
            for name, text in files.items():
                (fresh / name).write_text(text, encoding="utf-8")
    return hf_tokenizer(str(folder))
