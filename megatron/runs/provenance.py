"""Where a run happened: command line, commit, versions, host, device."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

import megatron
from megatron.runs.record import Attempt

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "apex", "flash-attn-3", "flash-attn-4", "liger-kernel")
CHECKOUT = Path(__file__).resolve().parents[2]


def this_attempt(*, layout: dict[str, int | str], device: torch.device) -> Attempt:
    """Describe this start of the program; where it begins and what changed is for the caller to add."""
    is_gpu = device.type == "cuda"
    return Attempt(
        started=now(),
        command=list(sys.argv),
        commit=commit(CHECKOUT),
        version=megatron.__version__,
        host=socket.gethostname(),
        layout=layout,
        versions=versions(),
        device=torch.cuda.get_device_name() if is_gpu else platform.processor() or "CPU",
    )


def now() -> str:
    """Local time with its offset, ISO 8601, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def commit(folder: Path) -> str | None:
    """Commit of a checkout, with ``+`` where tracked files differ from it; None where there is no checkout or no git."""
    if not (folder / ".git").exists():
        return None
    try:
        found = _git(folder, "rev-parse", "HEAD")
        return found + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python, the packages that numbers depend on and, on GPUs, of CUDA, NCCL and the driver."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # names the CUDA build, which the metadata of PyPI's package do not
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        driver = Path("/proc/driver/nvidia/version")
        if driver.is_file():
            found["driver"] = driver.read_text().splitlines()[0].split("  ")[1].strip()
    return found
