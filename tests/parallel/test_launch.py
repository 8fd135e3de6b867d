"""What is made of the launcher's variables, and that nobody else reads them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.errors import UserError
from megatron.parallel.connection import connect
from megatron.parallel.launch import Launch, local_device

REPO = Path(__file__).resolve().parents[2]
WORLD = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_without_a_launcher_a_process_is_alone() -> None:
    assert Launch.from_environment({}) == Launch()
    assert Launch.from_environment({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "2"}) == Launch(local_rank=2)
    assert Launch.from_environment({"WORLD_SIZE": ""}).is_first_rank


def test_a_launchers_variables() -> None:
    launch = Launch.from_environment(WORLD)
    assert launch == Launch(3, 4, 1, "node0", 29500)
    assert not launch.is_first_rank and launch.meeting_place == "node0:29500"
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert Launch.from_environment({**WORLD, **agent}).agent_attempt == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "first"}, "RANK is 'first'; it is a whole number; start with torchrun"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE is '4.0'; it is a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "4"}, "RANK is 4 with WORLD_SIZE 4; ranks count from 0"),
        ({"RANK": "-1"}, "RANK is -1"),
        ({"RANK": ""}, "RANK is missing with WORLD_SIZE 4; ranks count from 0; start with torchrun"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is -1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is missing with WORLD_SIZE 4; the ranks meet there"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is ; a port is in 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_wrong_variables_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Launch.from_environment({**WORLD, **changes})


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it meets others, which would wait for it; CUDA says "invalid device ordinal"."""
    chosen: list[torch.device] = []
    for name, answer in (("is_available", lambda: True), ("device_count", lambda: 2), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, answer)
    assert local_device(Launch(local_rank=1)) == torch.device("cuda", 1) == chosen[0]
    with pytest.raises(UserError, match=r"LOCAL_RANK is 2, and this process sees 2 GPUs; .*; start no more"):
        connect(Launch(2, 3, 2, "127.0.0.1", 1))


def test_flags_can_be_checked_without_torch() -> None:
    program = "import sys, megatron.parallel.launch as l; l.Launch.from_environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, timeout=60).returncode == 0


def test_nobody_else_reads_the_launchers_variables() -> None:
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    readers = set()
    for path in [*REPO.glob("megatron/**/*.py"), *REPO.glob("tools/*.py"), *REPO.glob("*.py")]:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if texts & names:
            readers.add(str(path.relative_to(REPO)))
    # DeepSpeed asserts that LOCAL_RANK is set.
    assert readers == {"megatron/parallel/launch.py", "megatron/training/deepspeed/settings.py"}
