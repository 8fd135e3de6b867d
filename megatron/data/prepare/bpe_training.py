"""Training of a small byte-level BPE, for corpora without a tokenizer of their own (the laptop quickstart)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from megatron.data.tokenizer_types import GPT2_EOD, FastTokenizer, hf_tokenizer
from megatron.errors import UserError

MIN_VOCAB = 257  # every byte and the end-of-document token


def train_bpe(texts: Iterable[str], *, vocab_size: int, folder: str | Path) -> FastTokenizer:
    """Train a GPT-2-style byte-level BPE and save it as a Hugging Face tokenizer folder.

    The folder (tokenizer.json, tokenizer_config.json) appears complete or not at all; an older one is replaced. The end
    of a document is ``<|endoftext|>``, id 0. Small texts may give fewer ids than asked for.

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".tmp", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        backend.save(str(temporary / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": GPT2_EOD, "unk_token": GPT2_EOD}
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return hf_tokenizer(str(folder))
