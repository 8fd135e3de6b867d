"""DeepSpeed stays in its room."""

from __future__ import annotations

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[3]
ROOM = REPO / "megatron" / "training" / "deepspeed"


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_no_other_room_imports_deepspeed() -> None:
    files = [*REPO.glob("megatron/**/*.py"), *REPO.glob("tools/*.py"), *REPO.glob("*.py")]
    importers = {path for path in files if "deepspeed" in imported(path)}
    assert importers and all(path.is_relative_to(ROOM) for path in importers), importers


def test_no_other_room_sees_the_marks_of_deepspeed() -> None:
    """It marks parameters as ``ds_…``; its engine and optimizer are private to ours."""
    for path in REPO.glob("megatron/**/*.py"):
        if not path.is_relative_to(ROOM):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not [name for name in names if name.startswith("ds_") or name in ("_deepspeed", "_hp_mapping")], path
