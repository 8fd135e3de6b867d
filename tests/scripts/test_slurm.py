"""README's SLURM line on a real SLURM of two nodes on this host: SLURM=1 as root, with slurm-wlm and munge (10 minutes)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import local_slurm
import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples_scaling/training/multi_node.sh"
SHAPE = ["--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2"]
SECONDS = 900  # on a machine with other work

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("SLURM") or os.geteuid() != 0 or bool(local_slurm.missing()),
        reason=f"SLURM=1 as root runs it; missing here: {', '.join(local_slurm.missing()) or 'nothing'}",
    ),
]


class Cluster:
    """A user of it, who submits from a folder that is not the repository."""

    def __init__(self, environment: dict[str, str], folder: Path, token_files: Path) -> None:
        self.folder = folder
        self.environment = {
            **environment, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": "2", "SEQ_LENGTH": "32",
            "MICRO_BATCH_SIZE": "2", "GLOBAL_BATCH_SIZE": "8", "LOG_INTERVAL": "10", "TRAIN_DATA": str(token_files / "train"),
            "VALID_DATA": str(token_files / "valid"), "TOKENIZER_FLAGS": "--tokenizer-type NullTokenizer --vocab-size 500",
        }  # fmt: skip

    def call(self, *words: str, **variables: str) -> str:
        environment = {**self.environment, **variables}
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, run: Path, *options: str, **variables: str) -> str:
        """The number of a job of README's line."""
        words = ["sbatch", "--parsable", "--nodes", "2", "--mem", "2000", *options, str(SCRIPT)]
        return self.call(*words, "training/mdm/140m_100M.sh", *SHAPE, RUN_DIR=str(run), **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def log(self, number: str) -> str:
        file = self.folder / f"megatron-{number}.log"
        return file.read_text() if file.exists() else ""

    def wait(self, number: str, what: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        end = time.monotonic() + SECONDS
        while not what(job := self.job(number)):
            assert time.monotonic() < end, f"{job}\n{self.log(number)}"
            time.sleep(1)
        return job


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, token_files: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("submitted")
    with local_slurm.two_nodes(tmp_path_factory.mktemp("slurm")) as environment:
        yield Cluster(environment, folder, token_files)


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if row.get("kind", "train") == "train"]


def trainers(run: Path) -> list[dict[str, str]]:
    """Node, rank and cores of the processes that train into a folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(run) not in (folder / "cmdline").read_text() or "pretrain_" not in (folder / "cmdline").read_text():
                continue
            variables = dict(line.split("=", 1) for line in (folder / "environ").read_text().split("\0") if "=" in line)
            cores = re.findall(r"Cpus_allowed_list:\s*(\S+)", (folder / "status").read_text())
            found.append({"node": variables["SLURMD_NODENAME"], "rank": variables.get("RANK", ""), "cores": cores[0]})
        except OSError:
            continue
    return found


def is_over(job: dict[str, str]) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def test_a_job_is_stopped_queued_again_and_finished_with_one_log(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = cluster.submit(run, "--time", "60", EPOCHS="12")
    cluster.wait(number, lambda job: is_over(job) or bool(steps(run)))
    found = trainers(run)
    assert {(each["node"], each["rank"]) for each in found if each["rank"]} == {
        ("n1", "0"), ("n1", "1"), ("n2", "2"), ("n2", "3"),
    }  # fmt: skip
    assert {each["cores"] for each in found} == {f"0-{(os.cpu_count() or 1) - 1}"}, "all ranks on one core"
    cluster.call("scancel", "--batch", "--signal=USR1", number)
    job = cluster.wait(number, lambda job: is_over(job) or job["Restarts"] == "1")
    assert job["JobState"] not in ("FAILED", "CANCELLED"), cluster.log(number)
    job = cluster.wait(number, is_over)
    log = cluster.log(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log
    assert re.findall(r"^== job (\d+), start (\d)", log, re.MULTILINE) == [(number, "1"), (number, "2")]
    assert f"job {number} is queued again" in log
    counted = steps(run)
    assert counted == sorted(set(counted)), "no step twice"
    assert sorted(path.name for path in (run / "logs").iterdir()) == [f"{number}.0", f"{number}.1"]
    assert len([*(run / "logs").glob(f"{number}.1/node[01]/*/attempt_0/[01]/stdout.log")]) == 4
    assert trainers(run) == []


def test_a_job_ends_before_its_limit_and_scancel_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """Half of six minutes: the run's own clock, because --signal comes later. What scancel ends saves and stays away."""
    run = tmp_path / "run"
    number = cluster.submit(run, "--time", "6", "--signal=B:USR1@5", EPOCHS="100000")
    job = cluster.wait(number, lambda job: is_over(job) or job["Restarts"] == "1")
    assert not is_over(job), cluster.log(number)
    assert "to stop after 3.0 minutes" in cluster.log(number) or "to stop after 2.9 minutes" in cluster.log(number)
    before = steps(run)[-1]
    cluster.wait(number, lambda job: is_over(job) or steps(run)[-1] > before + 20)
    cluster.call("scancel", number)
    job = cluster.wait(number, is_over)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1"), cluster.log(number)
    end = time.monotonic() + 60
    while trainers(run) and time.monotonic() < end:
        time.sleep(0.5)
    assert trainers(run) == []
    saved = int((run / "latest").read_text().strip().removeprefix("global_step"))
    assert saved > before, "scancel saves"


def test_every_sweep_is_accepted(cluster: Cluster) -> None:
    for file in sorted((REPO / "examples_scaling/sweeps").glob("*.yaml")):
        words = [
            sys.executable,
            str(REPO / "tools/sweep.py"),
            str(file),
            "slurm",
            "--output",
            str(cluster.folder / file.stem),
        ]
        script = cluster.call(*words).split()[-1]
        # This host has two cores, 4 GB and no GPU.
        words = ["sbatch", "--test-only", "--gpus-per-node=0", "--cpus-per-task=2", script]
        done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
