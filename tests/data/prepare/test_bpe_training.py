"""Training a tokenizer into a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.data.prepare.bpe_training import train_bpe
from megatron.errors import UserError

TEXTS = ["some text of a few words"] * 5


def test_what_lies_beside_the_tokenizer_is_kept(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (model / name).write_text("mine")
    tokenizer = train_bpe(TEXTS, vocab_size=260, folder=model)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]
    assert (model / "model.safetensors").read_text() == (model / "config.json").read_text() == "mine"
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in model.iterdir()) == names


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json; .*overwritten"):
        train_bpe(TEXTS, vocab_size=260, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
