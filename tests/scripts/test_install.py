"""install.sh: what it decides, what it prints, and what it never breaks. Nothing is downloaded here."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# An environment whose "pip" only writes down what it was asked for. STATE holds the requirements still missing.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *check_environment.py*) cat "$FAKE_STATE" ;;
  "-m pip --version") ;;
  *"-m pip"*--dry-run*) exit "$FAKE_DRY_RUN" ;;
  *"-m pip"*install*torch==*) echo "$*" >>"$FAKE_LOG"; sed -i.bak /torch/d "$FAKE_STATE" ;;
  *"-m pip"*install*) echo "$*" >>"$FAKE_LOG"; : >"$FAKE_STATE" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_install(*arguments: str, script: Path = REPO / "install.sh", **environment: str) -> subprocess.CompletedProcess:
    """Run install.sh in the environment of the tests, or in the one that the keywords name."""
    env = {**os.environ, "VIRTUAL_ENV": sys.prefix, **environment}
    env = {name: value for name, value in env.items() if value != "" and not name.startswith("CONDA")}
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """Keywords for run_install: an environment without packages and a machine without nvidia-smi's answer."""
    write_program(tmp_path / "env/bin/python", FAKE_PYTHON)
    write_program(tmp_path / "path/nvidia-smi", "#!/bin/sh\nexit 9\n")
    (tmp_path / "state").write_text("torch>=2.11,<2.15\nnumpy>=1.26\n")
    return {
        "VIRTUAL_ENV": str(tmp_path / "env"),
        "FAKE_STATE": str(tmp_path / "state"),
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_DRY_RUN": "0",
        "REAL_PYTHON": sys.executable,
        "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}",
        "TORCH_INDEX_URL": "",
        "TORCH_VERSION": "",
    }


def pip_calls(fake: dict[str, str]) -> list[str]:
    return Path(fake["FAKE_LOG"]).read_text().splitlines()


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the CPU build has a name of its own on Linux only")


@linux_only
def test_cpu_build_from_pips_own_configuration(fake: dict[str, str]) -> None:
    result = run_install("--deps-only", **fake)
    assert result.returncode == 0, result.stderr
    torch, rest = pip_calls(fake)
    assert "torch==2.13.0+cpu" in torch
    assert "--extra-index-url" not in torch
    assert rest.endswith("numpy>=1.26")


@linux_only
def test_cpu_build_from_the_public_index_where_pip_has_none(fake: dict[str, str]) -> None:
    assert run_install("--deps-only", **{**fake, "FAKE_DRY_RUN": "1"}).returncode == 0
    assert "torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu" in pip_calls(fake)[0]


def test_gpu_takes_the_default_build(fake: dict[str, str], tmp_path: Path) -> None:
    write_program(tmp_path / "path/nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    assert run_install("--deps-only", **fake).returncode == 0
    assert pip_calls(fake)[0].endswith("install torch==2.13.0")


def test_index_and_version_of_torch_can_be_chosen(fake: dict[str, str]) -> None:
    chosen = {"TORCH_INDEX_URL": "https://example.org/cu126", "TORCH_VERSION": "2.12.1"}
    assert run_install("--deps-only", **{**fake, **chosen}).returncode == 0
    assert "torch==2.12.1 --extra-index-url https://example.org/cu126" in pip_calls(fake)[0]


def test_failed_installation_is_an_error(fake: dict[str, str], tmp_path: Path) -> None:
    write_program(tmp_path / "env/bin/python", FAKE_PYTHON.replace('echo "$*" >>"$FAKE_LOG"; :', "exit 1; :"))
    result = run_install("--deps-only", **fake)
    assert result.returncode == 1
    assert "pip could not install: numpy>=1.26; " in result.stderr


def test_satisfied_environment_takes_about_a_second_and_calls_no_pip() -> None:
    start = time.monotonic()
    result = run_install("--deps-only", PIP_NO_INDEX="1")
    assert result.returncode == 0, result.stderr
    assert "installing" not in result.stdout
    assert time.monotonic() - start < 5  # 0.4 s on an idle machine


def test_check_names_versions_and_fallbacks() -> None:
    result = run_install("--check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "deepspeed        0.19.8         ok" in result.stdout
    for name in ("apex", "fa3", "fa4", "liger"):
        assert name in result.stdout


def test_check_fails_on_a_missing_package(tmp_path: Path) -> None:
    """A copy of the repository whose setup.py asks for what no one has."""
    for name in ("install.sh", "setup.py", "tools/_run.py", "tools/check_environment.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "megatron", tmp_path / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    setup = (tmp_path / "setup.py").read_text().replace('"numpy>=1.26"', '"numpy>=1.26", "no-such-package>=3"')
    (tmp_path / "setup.py").write_text(setup)
    result = run_install("--check", script=tmp_path / "install.sh")
    assert result.returncode == 1
    assert "MISSING (needs no-such-package>=3)" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--nonsense"], {}, "unknown option --nonsense"),
        (["--with"], {}, "--with has no value"),
        (["--with", "nonsense"], {}, "--with nonsense; the choices are eval, logging, test, apex, fa3, fa4, liger"),
        ([], {"VIRTUAL_ENV": "/nonexistent"}, "VIRTUAL_ENV is /nonexistent, which has no bin/python"),
    ],
)
def test_wrong_use_is_an_error(arguments: list[str], environment: dict[str, str], message: str) -> None:
    result = run_install(*arguments, **environment)
    assert result.returncode != 0
    assert message in result.stderr


def test_unsupported_python_names_the_range(tmp_path: Path) -> None:
    old = '#!/bin/sh\ncase "$*" in *version_info*) exit 1;; esac\necho Python 3.8.1\n'
    write_program(tmp_path / "env/bin/python", old)
    result = run_install(VIRTUAL_ENV=str(tmp_path / "env"))
    assert result.returncode == 1
    assert "is Python 3.8.1; this project runs on Python 3.10 to 3.13; " in result.stderr


@pytest.mark.parametrize("has_gpu", [False, True])
def test_accelerators_never_break_anything(has_gpu: bool, tmp_path: Path) -> None:
    """Without a GPU nothing is tried; with one, the build fails here (no package index)."""
    write_program(tmp_path / "nvidia-smi", "#!/bin/sh\n" + ("echo 'GPU 0: x'" if has_gpu else "exit 9") + "\n")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    environment |= {"APEX_SOURCE": str(tmp_path / "no-apex"), "FA3_SOURCE": str(tmp_path / "no-fa3")}
    result = run_install("--deps-only", "--with", "apex,fa3,fa4", "--with=liger", **environment)
    assert result.returncode == 0, result.stderr
    reason = "its build failed, see above" if has_gpu else "no NVIDIA GPU here"
    for name, distribution in {
        "apex": "apex",
        "fa3": "flash-attn-3",
        "fa4": "flash-attn-4",
        "liger": "liger-kernel",
    }.items():
        if not list(metadata.distributions(name=distribution)):
            assert f"{name}: not installed ({reason}), falling back to " in result.stdout


def test_a_package_of_our_name_is_said(tmp_path: Path) -> None:
    """megatron-core has a package called megatron too: which of the two is imported is no guess."""
    (tmp_path / "megatron_core-0.16.1.dist-info").mkdir()
    (tmp_path / "megatron_core-0.16.1.dist-info/METADATA").write_text("Name: megatron-core\nVersion: 0.16.1\n")
    (tmp_path / "megatron/core").mkdir(parents=True)  # without an __init__, as theirs
    command = [sys.executable, str(REPO / "tools/check_environment.py")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert f"megatron-core 0.16.1 is installed and has a package called megatron too; ours is {REPO}" in done.stdout


DOCKERFILE = REPO / "docs/docker/Dockerfile"


@pytest.mark.parametrize("cuda", ["0", "1"])
def test_the_step_of_the_image_that_installs(tmp_path: Path, cuda: str) -> None:
    """Here everything is installed already; a pip that only speaks stands for the build with CUDA."""
    step = DOCKERFILE.read_text().replace("\\\n", " ").partition("cache/pip ")[2].splitlines()[0]
    (tmp_path / "pip").write_text('#!/bin/sh\necho "pip $*"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "CUDA": cuda, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["sh", "-c", step.replace("install.sh --with", "install.sh --deps-only --with")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert "everything needed is installed" in done.stdout
    assert bool(re.search(r"^pip install torch==2\.\d+\.\d+$", done.stdout, re.MULTILINE)) == (cuda == "1"), done.stdout


def test_a_command_of_the_image_has_the_folders_that_it_uses() -> None:
    """They are in no image, so each comes from outside: data where some are read or fetched, runs where something trains."""
    lines = re.findall(r"^#   (docker run .*)", DOCKERFILE.read_text(), re.MULTILINE)
    assert any("train_" in line for line in lines) and any("download.sh" in line for line in lines)
    for line in lines:
        for folder in ("data", *["runs"] * ("train_" in line)):
            assert f'-v "$PWD/{folder}:/workspace/{folder}"' in line, line


def test_what_runs_leave_in_the_checkout_is_in_neither_commit_nor_image() -> None:
    def entries(name: str) -> set[str]:
        return {line.strip("/") for line in (REPO / name).read_text().splitlines()}

    scripts = "".join(path.read_text() for path in REPO.glob("examples_scaling/**/*.sh"))
    folders = {"data", "exports", "reports", *re.findall(r"\b(results|runs)/", scripts)}
    assert {"results", "runs"} <= folders <= entries(".gitignore") & entries("docs/docker/Dockerfile.dockerignore")


def test_the_image_builds_for_each_python_and_argument_that_it_names() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^FROM python:3\.1[0-3]-", text, re.MULTILINE)
    assert set(re.findall(r"--build-arg (\w+)=", text)) == set(re.findall(r"^ARG (\w+)=", text, re.MULTILINE))
