"""The ``megatron`` command: every verb starts its program, from any folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.commands import console
from megatron.commands.running import status_of

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and nothing else of the checkout: what ``pip install .`` puts on the path."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "work")]
    command += ["build_py", "--build-lib", str(folder / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    return folder / "lib"


def megatron(*words: str, cwd: Path, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The console entry as pip writes it."""
    program = "import sys; from megatron.commands.console import entry; sys.argv[0] = 'megatron'; entry()"
    environment = {**os.environ, "PYTHONPATH": str(package), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)


HELPED = """
import contextlib, io, sys
from megatron.commands import console
from megatron.commands.running import status_of
for verb in console.VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = status_of(lambda: console.main([*verb.split(), "--help"]))
        except SystemExit as end:
            status = end.code
    print(f"== {verb} == {status} {'torch' in sys.modules}")
    print(out.getvalue())
"""


def test_every_verb_has_help_in_80_columns_with_an_example_and_without_torch(installed: Path, tmp_path: Path) -> None:
    """Of the installed package, in one process, which has never loaded torch by the end."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "80"}
    command = [sys.executable, "-c", HELPED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr
    _, *parts = re.split(r"^== (.*) == (\S+ \S+)\n", done.stdout, flags=re.MULTILINE)
    pages = {verb: (ending, text) for verb, ending, text in zip(parts[::3], parts[1::3], parts[2::3])}
    assert list(pages) == list(console.VERBS)
    for verb, (ending, text) in pages.items():
        assert ending == "0 False", verb
        assert text.startswith(f"usage: megatron {verb} "), text[:80]
        assert max(map(len, text.splitlines())) <= 80, verb
        shown, _, examples = text.partition("  examples:\n")
        assert f"    megatron {verb} " in examples or "    ./download.sh " in examples, verb
        lines = re.sub(r" \\\n +", " ", examples).strip().splitlines()  # as a shell joins them
        begins = {shlex.split(line, comments=True)[0] for line in lines}
        assert begins <= {"megatron", "torchrun", "./download.sh"}, verb
        assert not re.findall(r"^  --\S+(?: \S+)?\n(?=  -|\n|$)", text, re.MULTILINE), f"{verb}: flags without a word"
        named = set(re.findall(r"(?<= )--[\w-]+", examples)) - {"--nproc-per-node"}
        of_training = {
            "--model",
            "--bf16",
            "--objective",
            "--micro-batch-size",
            "--tensor-model-parallel-size",
            "--load",
        }
        assert not {flag for flag in named - of_training if flag not in shown} - {"--num-mc"}, verb


def test_an_installed_package_holds_every_file_that_is_no_code(installed: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "megatron"], cwd=ROOT, capture_output=True, text=True, timeout=20
    ).stdout
    missing = [name for name in tracked.split() if not (installed / name).is_file() and (ROOT / name).is_file()]
    assert not missing


SWEEP = """
name: two
output: runs
grid:
  objective: [ar, mdm]
  model: {tiny: {num-layers: 1, hidden-size: 32, num-attention-heads: 2}}
  unique_tokens: [2000]
  epochs: [1]
data: {2000: train}
vocab_size: 257
flags: {seq-length: 32, micro-batch-size: 4}
launcher: LAUNCHER
"""


@pytest.mark.parametrize(
    ("launcher", "words"),
    [("python", "-m megatron train"), ("torchrun --standalone", "-m megatron.commands.torchrun --standalone -m megatron train"),
     ("deepspeed", "--module megatron train")],
)  # fmt: skip
def test_a_sweep_of_the_installed_package_starts_its_modules(
    launcher: str, words: str, installed: Path, tmp_path: Path
) -> None:
    """There is no tools/ and no pretrain_*.py beside it."""
    (tmp_path / "sweep.yaml").write_text(
        SWEEP.replace("LAUNCHER", launcher).replace("2000: train", "2000: my data/train")
    )
    done = megatron("sweep", "sweep.yaml", "list", cwd=tmp_path, package=installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" --train-data-path 'my data/train' ") == 2  # what is printed runs
    assert done.stdout.count(f" {words} --objective ") == 2, done.stdout
    assert ".py" not in done.stdout
    if launcher == "python":
        done = megatron("sweep", "sweep.yaml", "slurm", cwd=tmp_path, package=installed)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "use the checkout" in done.stderr


def test_preflight_names_the_flag_that_starts_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        console.main(["doctor", "--preflight", "--help"])
    assert capsys.readouterr().out.startswith("usage: megatron doctor --preflight [flags]\n")


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
