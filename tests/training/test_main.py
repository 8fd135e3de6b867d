"""What the entry point prints of an error: our own as one message, anything else with its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config import parse
from megatron.training.main import _is_expected


def test_own_error_is_expected() -> None:
    with pytest.raises(ValueError, match="pass --model") as caught:
        parse([], objective="ar")
    assert _is_expected(caught.value)


def test_error_of_a_library_in_a_clone_called_megatron_is_not(tmp_path: Path) -> None:
    file = tmp_path / "megatron" / ".venv" / "library.py"
    with pytest.raises(ValueError, match="odd") as caught:
        exec(compile("raise ValueError('odd')", file, "exec"))
    assert not _is_expected(caught.value)
