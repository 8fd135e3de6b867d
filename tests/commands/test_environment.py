"""The lines about this machine: each is ok, or says what to do."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.commands import doctor, environment
from megatron.commands.environment import Finding

Usage = namedtuple("Usage", "total used free")


def test_every_line_is_ok_or_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    found = list(environment.lines())
    assert len(found) == len(environment.CHECKS) == 15
    assert all(line.endswith("  ok") or "  fix: " in line for line in found)
    assert list(tmp_path.iterdir()) == []
    named = {line.split()[0] for line in found}
    assert {"driver", "GPUs", "NCCL", "/dev/shm", "open", "cores", "clock", "disk", "hub", "versions"} <= named


def refuse(*arguments: Any, **options: Any) -> Any:
    raise OSError("not today")


def has_driver(patch: pytest.MonkeyPatch, version: str) -> None:
    patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    patch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=version))


FAULTS: dict[str, tuple[Callable[[], Finding], Callable[[pytest.MonkeyPatch], None], str]] = {
    "driver asleep": (environment.driver, lambda patch: has_driver(patch, ""), "load the driver"),
    "wheel of the CPU": (environment.driver, lambda patch: has_driver(patch, "580.82\n"), "install a torch wheel"),
    "small /dev/shm": (
        environment.shared_memory,
        lambda patch: patch.setattr(shutil, "disk_usage", lambda place: Usage(2**26, 0, 2**26)),
        "--shm-size",
    ),
    "few files": (
        environment.files,
        lambda patch: patch.setattr(resource, "getrlimit", lambda what: (1024, 524288)),
        "ulimit -n 524288",
    ),
    "one core of many": (
        environment.cores,
        lambda patch: (
            patch.setattr(os, "sched_getaffinity", lambda pid: {0}),
            patch.setattr(os, "cpu_count", lambda: 96),
        )[0],
        "--cpus-per-task",
    ),
    "clock": (environment.clock, lambda patch: patch.setattr(time, "time", lambda: 1e9), "synchronise the clocks"),
    "full disk": (
        environment.disk,
        lambda patch: patch.setattr(shutil, "disk_usage", lambda place: Usage(2**30, 2**30, 0)),
        "free space",
    ),
    "no name": (environment.host, lambda patch: patch.setattr(socket, "gethostbyname", refuse), "/etc/hosts"),
    "no hub": (environment.hub, lambda patch: patch.setattr(urllib.request, "urlopen", refuse), "HF_ENDPOINT"),
    "no hub package": (
        environment.hub,
        lambda patch: patch.setitem(sys.modules, "huggingface_hub.constants", None),
        "install.sh",
    ),
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_has_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    check, break_it, cure = FAULTS[name]
    with monkeypatch.context() as patch:
        break_it(patch)
        finding = check()
    assert cure in finding.fix, finding


def test_the_machine_is_told_where_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.setattr(doctor, "satisfied", lambda item: not item.startswith("datasets"))
    assert doctor.main() == 1
    told = capsys.readouterr().out
    assert "MISSING (needs datasets" in told and "this machine:" in told and "/dev/shm" in told


def test_gpus_that_differ_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device)])
    assert "CUDA_VISIBLE_DEVICES" in environment.gpus().fix
    names[1] = names[0]
    assert environment.gpus() == Finding("GPUs", "2 x NVIDIA H100 80GB HBM3")
