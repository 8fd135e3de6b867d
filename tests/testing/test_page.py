"""docs/conformance.md names what there is; tests/scripts/test_documented_commands.py runs its examples."""

from __future__ import annotations

import re
from pathlib import Path

from megatron.testing import checks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"


def test_every_check_has_its_row_and_is_shown() -> None:
    text = PAGE.read_text(encoding="utf-8")
    there = {name for name in vars(checks) if name.startswith("check_")}
    assert set(re.findall(r"^\| `(check_\w+)`", text, re.MULTILINE)) == there
    assert set(re.findall(r"checks\.(check_\w+)", text)) == there
