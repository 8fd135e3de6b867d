"""Runs that several files evaluate; files with others of their own call them ``runs``, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation import tiny


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an untrained AR and an MDM run with a tokenizer of 400 tokens, by objective."""
    folder = tmp_path_factory.mktemp("requests")
    tokenizer = tiny.build_tokenizer_file(folder / "tokenizer", 400)
    return {
        name: tiny.make_run(folder / name, tiny.config_for(name, tokenizer, vocab_size=400, seq_length=64), scale=2.0)
        for name in ("ar", "mdm")
    }
