"""The ``megatron`` command: every verb starts its program, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.commands import console
from megatron.commands.running import status_of

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))


def megatron(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The console entry as pip writes it."""
    program = "import sys; from megatron.commands.console import entry; sys.argv[0] = 'megatron'; entry()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("verb", list(console.VERBS))
def test_every_verb_has_help_under_its_own_name(verb: str, tmp_path: Path) -> None:
    done = megatron(*verb.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].startswith(f"usage: megatron {verb} ")


def test_help_fits_a_terminal_and_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(lambda: console.main(["--help"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert {verb for verb in console.VERBS if any(line.startswith(f"  {verb} ") for line in lines)} == set(
        console.VERBS
    )


@pytest.mark.parametrize(
    ("words", "cure"),
    [(["trian"], "megatron train"), (["data", "inspct"], "megatron data inspect"), (["hub"], "megatron hub download"),
     (["data", "--help"], "megatron data sample"), (["xyzzy"], "see megatron --help")],
)  # fmt: skip
def test_a_wrong_verb_gets_one_line_with_the_right_one(
    words: list[str], cure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(lambda: console.main(words)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert cure in error


def test_every_tool_is_a_verb_and_every_verb_a_tool() -> None:
    doors = {
        module
        for tool in TOOLS
        for module in [(ROOT / f"tools/{tool}.py").read_text().split('door("')[1].split('"')[0]]
    }
    assert {module for module, _ in console.VERBS.values()} - doors == {"pretrain", "compare"}
    assert doors <= {module for module, _ in console.VERBS.values()}


@pytest.mark.parametrize("program", ["pretrain_mdm.py", "tools/report.py", "tools/preprocess_data.py"])
def test_a_python_without_packages_is_told_where_they_are(program: str, tmp_path: Path) -> None:
    """The first thing after the first README command: python3 without the environment."""
    words = {"pretrain_mdm.py": ["--model", "7M"], "tools/report.py": [str(tmp_path)]}.get(
        program, ["--input", "x", "--output-prefix", "y"]
    )
    command = [sys.executable, "-S", "-E", str(ROOT / program), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "source .venv/bin/activate" in done.stderr
    assert done.stderr.count("\n") == 1
