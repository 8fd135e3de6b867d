"""What the example scripts do on clusters: SLURM jobs and host files, played by stand-ins (test_slurm.py: by a real SLURM)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_example_scripts import EXAMPLES, dry_run, dry_run_of, split_command

MULTI_NODE = EXAMPLES / "training/multi_node.sh"


def fake_program(path: Path, text: str) -> None:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def slurm_job(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A dry run of the copy of multi_node.sh that sbatch makes; fakes play the cluster and the second of three nodes."""
    job = folder / "spool" / "slurm_script"
    job.parent.mkdir(exist_ok=True)
    shutil.copy(MULTI_NODE, job)
    step = "SLURM_STEP_NUM_NODES=3 SLURM_NODEID=1 SLURM_STEP_NODELIST=n[0-2]"
    fake_program(
        folder / "srun",
        f'echo "$@" >{folder}/srun.txt; while [[ "$1" == --* ]]; do shift; done; {step} exec "$@"\n',
    )
    fake_program(folder / "scontrol", f'echo "   Command={MULTI_NODE} training/x.sh"\n')
    fake_program(folder / "squeue", 'date -d "+100 minutes" +%FT%T\n')
    given = {
        "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "31207", "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_ON_NODE": "96", "SLURM_SUBMIT_DIR": "/nonexistent", "GPUS_PER_NODE": "8", "VIRTUAL_ENV": "/nonexistent",
    }  # fmt: skip
    return dry_run_of(job, *words, **{**given, **variables})


def test_slurm_job_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    """From any folder, with all cores of a node, an end before that of the job, and a port and logs of its own."""
    (tmp_path / "modules").write_text('export FROM_MODULES=1; echo "$UNSET_BY_MODULES"; false\n')
    done = slurm_job(
        tmp_path, "training/mdm/2298m_tp2_pp2.sh", RUN_DIR="/runs/x", SETUP=str(tmp_path / "modules"),
        CONTAINER="env LD_LIBRARY_PATH=/opt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    launcher, program, flags = split_command(shlex.split(done.stdout.splitlines()[-1]))
    options = f"--nproc-per-node 8 --nnodes 3 --node-rank 1 --master-addr {socket.gethostname()} --master-port 21207"
    assert (Path(launcher[1]).name, program) == ("_torchrun.py", "pretrain_mdm.py")
    assert " ".join(launcher[2:]) == f"{options} --log-dir /runs/x/logs/31207.0/node1 --tee 3"
    assert flags[flags.index("--exit-duration-in-mins") + 1] in ("89.9", "90.0")  # ten minutes before the end
    given = (tmp_path / "srun.txt").read_text().split()
    assert "--cpus-per-task=96" in given  # srun does not inherit it
    assert given[-5:-3] == ["env", "LD_LIBRARY_PATH=/opt"]
    short = slurm_job(tmp_path, "training/mdm/2298m_tp2_pp2.sh", STOP_MINUTES="60").stdout.split()
    assert short[short.index("--exit-duration-in-mins") + 1] in ("49.9", "50.0")  # half of a short job


@pytest.mark.parametrize(
    ("status", "stop", "minutes", "queued"),
    [
        (75, "USR1", "", True),  # --signal before the limit, or a person
        (130, "USR1", "", True),  # of a sweep
        (0, "USR1", "", True),  # the end came as the signal did: the next start sees it
        (75, "", "0", True),  # its time was up
        (75, "", "9", False),  # somebody touched RUN_DIR.stop
        (75, "", "", False),
        (75, "USR1 TERM", "", False),  # scancel
        (138, "USR1", "", False),  # nothing was saved: it would never get further
        (1, "USR1", "", False),
        (1, "", "0", False),
        (0, "", "0", False),
    ],
)
def test_a_job_is_queued_again_when_its_time_was_up(
    status: int, stop: str, minutes: str, queued: bool, tmp_path: Path
) -> None:
    fake_program(tmp_path / "scontrol", 'echo "scontrol $*"\n')
    kills = "".join(f"kill -{name} $PPID; sleep 0.3; " for name in stop.split())
    body = f'source "{EXAMPLES}/common.sh"; as_job bash -c \'trap "" TERM; {kills}exit {status}\''
    done = subprocess.run(
        ["bash", "-c", body, "job"], capture_output=True, text=True, timeout=60,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "EXIT_DURATION_IN_MINS": minutes},
    )  # fmt: skip
    assert ("scontrol requeue 7" in done.stdout) == queued, done.stdout + done.stderr
    assert done.returncode == (75 if status == 0 and stop else status)


def test_torch_knows_the_variables_of_hang_dumps() -> None:
    """TORCH_FR_DUMP_TEMP_FILE is named in its binaries only, which take too long to search: looked up by hand for 2.13."""
    import torch

    names = set(re.findall(r"\b(TORCH_(?:FR|NCCL)_\w+)=", (EXAMPLES / "cluster.sh").read_text()))
    folder = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    headers = "".join((folder / f"{name}.hpp").read_text() for name in ("FlightRecorder", "ProcessGroupNCCL"))
    assert {name for name in names if f'"{name}"' not in headers} == {"TORCH_FR_DUMP_TEMP_FILE"}


def test_slurm_log_goes_where_a_folder_is() -> None:
    """SLURM makes no folder for --output, and a job whose log cannot be opened ends without a word."""
    options = [line for line in MULTI_NODE.read_text().splitlines() if line.startswith("#SBATCH ")]
    (output,) = re.findall(r"--output=(\S+)", " ".join(options))
    assert "/" not in output


def test_hostfile_starts_deepspeed(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nn0 slots=8\n\nn1 slots=8  # the second")
    words = dry_run(MULTI_NODE, "training/ar/140m_100M.sh", HOSTFILE=str(hosts))
    launcher, program, flags = split_command(words)
    assert (Path(launcher[0]).name, launcher[-1], program) == ("deepspeed", str(hosts), "pretrain_gpt.py")
    assert "--bf16" in flags  # the machine that submits may have no GPU


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "HOSTFILE={hosts}; it names a file; check the name"),
        ("", "{hosts} names no host; a line is: host slots=8; fill it in"),
        ("n0 slots=8\nn1 slot=8\n", "{hosts}, line 2: n1 slot=8; a line is: host slots=8; mend the line"),
        ("n0\n", "{hosts}, line 1: n0; a line is: host slots=8; mend the line"),
        ("n0 slots=0\n", "{hosts}, line 1: n0 slots=0; a host has at least one slot; mend or remove the line"),
        ("n0 slots=8\nn0 slots=8\n", "{hosts}, line 2: n0 again; a host has one line; remove one of them"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    """DeepSpeed would train on one node without a word."""
    hosts = tmp_path / "hosts"
    if text is not None:
        hosts.write_text(text)
    with pytest.raises(AssertionError, match=re.escape(message.format(hosts=hosts))):
        dry_run(MULTI_NODE, "training/ar/140m_100M.sh", HOSTFILE=str(hosts))


def test_several_hosts_need_pdsh(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "basename", "pwd", "sed", "env", "cat", "tr", "uname", "id", "rm"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    hosts = tmp_path / "hosts"
    hosts.write_text("n0 slots=8\nn1 slots=8\n")
    done = subprocess.run(
        ["bash", str(MULTI_NODE), "training/ar/140m_100M.sh"], capture_output=True, text=True, timeout=60,
        env={"PATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix, "HOSTFILE": str(hosts)},
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{hosts} names several hosts, and there is no pdsh; deepspeed reaches them through pdsh" in done.stderr


@pytest.mark.parametrize(
    ("variables", "flags", "said"),
    [
        (
            {"GPUS_PER_NODE": "8", "NNODES": "2"},
            [],
            ["16 processes: tp 1 x pp 1 x dp 16, ZeRO 1, bf16", "dp 16 x 2 acc"],
        ),
        ({"GPUS_PER_NODE": "8", "NNODES": "3"}, [], ["error: ", "24"]),
        ({"GPUS_PER_NODE": "8x"}, [], ["error: ", "GPUS_PER_NODE=8x NNODES=1; both are whole numbers from 1; mend"]),
        ({}, ["--log-intervall", "3"], ["error: ", "--log-interval"]),
    ],
    ids=["two-nodes", "wrong-batch", "wrong-number", "wrong-flag"],
)
def test_a_dry_run_checks_and_names_the_target(variables: dict[str, str], flags: list[str], said: list[str]) -> None:
    """On a machine without GPUs too: what is given is meant, and is refused now rather than after hours in a queue."""
    done = dry_run_of(EXAMPLES / "training/ar/140m_100M.sh", *flags, **variables)
    assert done.returncode == (2 if "error: " in said else 0), done.stderr
    assert not done.stderr.startswith("Traceback")
    assert all(text in done.stderr for text in said), done.stderr
    assert ("--bf16" in done.stdout.split()) == (bool(variables) and done.stdout != "")


def test_multi_node_needs_slurm_or_a_hostfile() -> None:
    """Except for a dry run, which says what would run on one of the nodes."""
    words = ["bash", str(MULTI_NODE), "training/ar/140m_100M.sh"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"]})
    assert (done.returncode, done.stdout) == (2, "")
    assert "neither a SLURM job nor HOSTFILE; several nodes need one of them; see --help" in done.stderr
    words = dry_run(MULTI_NODE, "examples_scaling/training/ar/140m_100M.sh", NNODES="4", GPUS_PER_NODE="8")
    assert " ".join(words[2:6]) == "--nproc-per-node 8 --nnodes 4"
    with pytest.raises(
        AssertionError, match=r"training script training/nothing\.sh; it is named from examples_scaling/; for"
    ):
        dry_run(MULTI_NODE, "training/nothing.sh")
