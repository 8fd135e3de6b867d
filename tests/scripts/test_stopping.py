"""A stop sent to an example script reaches the trainer, whatever launcher stands between, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples_scaling/training/ar/140m_100M.sh"
STOPPED = 75


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """A script in a session of its own, by which what it leaves behind is found."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**clean, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


def pids_left_behind(session: int) -> dict[int, str]:
    """Command lines of the processes of a session that still run, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has just ended
    return {pid: words for pid, words in found.items() if words}  # one that is being torn down has none


def left_behind(session: int) -> list[str]:
    """Their command lines."""
    return list(pids_left_behind(session).values())


def wait_for(path: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("launcher", "processes", "number"),
    [("srun", 1, signal.SIGUSR1), ("torchrun", 2, signal.SIGTERM), ("deepspeed", 2, signal.SIGUSR1)],
)
def test_a_stop_is_saved_under_every_launcher(
    launcher: str, processes: int, number: signal.Signals, token_files: Path, tmp_path: Path
) -> None:
    """Default workers and settings; the signal goes to the script alone, as SLURM or systemd send it."""
    run_dir, begin, job = tmp_path / "run", [str(SCRIPT)], {}
    if launcher == "srun":  # a job of SLURM on one node; srun hands on what it is sent
        for name, text in (
            ("srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"'),
            ("scontrol", 'echo "scontrol $*"'),
            ("squeue", 'date -d "+100 minutes" +%FT%T'),
        ):
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        begin = [str(REPO / "examples_scaling/training/multi_node.sh"), "training/ar/140m_100M.sh"]
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}
        job["PATH"], launcher = f"{tmp_path}:{os.environ['PATH']}", "python"
    process = start(
        ["bash", *begin, "--num-layers", "1", "--hidden-size", "32", "--num-attention-heads", "2"],
        LAUNCHER=launcher, GPUS_PER_NODE=str(processes), RUN_DIR=str(run_dir), SEQ_LENGTH="32", LOG_INTERVAL="1",
        TRAIN_DATA=str(token_files / "train"), VALID_DATA=str(token_files / "valid"), EPOCHS="1000",
        TOKENIZER_FLAGS="--tokenizer-type NullTokenizer --vocab-size 500", MICRO_BATCH_SIZE="2", GLOBAL_BATCH_SIZE="4",
        **job,
    )  # fmt: skip
    try:
        wait_for(run_dir / "metrics.jsonl", process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == STOPPED, output
        if job:
            output, _, again = output.partition("scontrol requeue 7")
            assert again == "\njob 7 is queued again\n"
        assert output.rstrip().endswith("stopped; the same command continues")
        assert "Traceback" not in output
        assert (run_dir / (run_dir / "latest").read_text().strip() / "manifest.json").exists()
        assert not (tmp_path / "run.stop").exists()
        assert left_behind(process.pid) == []
    finally:  # launchers begin groups of their own, which would train on for ever
        while left := pids_left_behind(process.pid):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


# What the scripts do, with a stand-in for the trainer: it says "ready", and ends with 75 when its file appears.
TRAINER = """import pathlib, sys, time
print("ready", flush=True)
while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)
sys.exit(int(sys.argv[2]))"""


def supervised(tmp_path: Path, status: int, stop_file: str = "run.stop") -> subprocess.Popen[str]:
    body = f'source "{REPO}/examples_scaling/common.sh"; STOP_FILE="$1"; supervise "$2" -c "$3" run.stop {status}; echo next'
    command = ["bash", "-c", body, "script", stop_file, sys.executable, TRAINER]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("status", [75, 0])
def test_a_stopped_script_does_not_go_on(number: signal.Signals, status: int, tmp_path: Path) -> None:
    process = supervised(tmp_path, status)
    process.send_signal(number)
    output = process.communicate(timeout=20)[0]
    assert (process.returncode, output) == (STOPPED, "stopped; the same command continues\n")
    assert list(tmp_path.iterdir()) == []


def test_the_end_and_a_failure_keep_their_status(tmp_path: Path) -> None:
    for status, said in ((0, "next\n"), (1, ""), (2, "")):
        process = supervised(tmp_path, status)
        (tmp_path / "run.stop").touch()
        assert (process.communicate(timeout=20)[0], process.returncode) == (said, status)
        (tmp_path / "run.stop").unlink()


def test_ctrl_c_twice_ends_at_once(tmp_path: Path) -> None:
    process = supervised(tmp_path, 75, stop_file="nobody-looks")
    process.send_signal(signal.SIGINT)
    wait_until = time.monotonic() + 10
    while not (tmp_path / "nobody-looks").exists() and time.monotonic() < wait_until:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert left_behind(process.pid) == []


def test_a_tool_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    process = supervised(tmp_path, 75, stop_file="")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert left_behind(process.pid) == []


def test_a_stop_while_texts_are_written_ends_the_laptop_script(tmp_path: Path) -> None:
    """A tool saves nothing and dies of the signal; a failure of its own only leaves the report without texts."""
    body = (
        f'cd "{tmp_path}"; program="$1"; set --; source "{REPO}/examples_scaling/common.sh"; RUN_DIR=. PROMPT=a; mkdir -p ar\n'
        f'source "{REPO}/examples_scaling/quickstart/text.sh"\n'
        'tool() { echo ready >&2; supervise python3 -c "$program"; }; write_samples ar; echo next'
    )
    for program, is_stopped, status, said in (
        ("import time; time.sleep(60)", True, 128 + signal.SIGTERM, ""),
        ("raise SystemExit(1)", False, 0, "next\n"),
    ):
        process = start(["bash", "-c", body, "script", program])
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        if is_stopped:
            time.sleep(0.5)  # until the program runs in its group
            process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=20)[0], process.returncode) == (said, status)
        assert list((tmp_path / "ar").iterdir()) == [] and left_behind(process.pid) == []


@pytest.mark.parametrize(
    ("status", "expected", "said"),
    [
        ("75", 75, ""),
        ("2", 2, "error: a; b; c\n"),
        ("-9", 137, "was ended by SIGKILL; the system does that when memory"),
    ],
)
def test_torchrun_ends_as_its_processes_ended_with_one_error_at_the_end(
    status: str, expected: int, said: str, tmp_path: Path
) -> None:
    """By hand torchrun has the last word itself: its summary then shows what a process had to say."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\nfrom megatron.parallel.launch import complain\nstatus = int(sys.argv[1])\n"
        "complain('error: a; b; c') if status == 2 else None\n"
        "sys.exit(status) if status >= 0 else os.kill(os.getpid(), -status)\n"
    )
    tail = ["--standalone", "--nproc-per-node", "2", str(program), status]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    launchers = [[str(REPO / "tools/_torchrun.py")], *([["-m", "torch.distributed.run"]] if status == "2" else [])]
    started = [
        subprocess.Popen(
            [sys.executable, *words, *tail], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for words in launchers
    ]
    endings = [(*process.communicate(timeout=100), process.returncode) for process in started]
    out, errors, code = endings[0]
    assert (out, code) == ("", expected), errors
    assert said in errors and errors.count("\n") == (1 if said else 0) and "Traceback" not in errors
    for _, by_hand, code in endings[1:]:
        assert code == 1
        assert by_hand.rstrip("= \n").endswith("traceback : error: a; b; c")


@pytest.mark.parametrize(
    ("number", "why"), [(9, "SIGKILL; the system does that when memory"), (11, "SIGSEGV; a fault of compiled code")]
)
def test_a_rank_that_was_killed_is_named_though_the_others_miss_it_first(number: int, why: str, tmp_path: Path) -> None:
    """What they say of it is hearsay, and names no rank; it may reach torchrun before it sees the rank go."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom megatron.parallel.launch import complain\n"
        "if os.environ['RANK'] == '1':\n"
        "    while not os.path.exists('said'): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), int(sys.argv[1]))\n"
        "complain('error: rank 0 lost a peer: a process is gone without a word (killed, or its host is down); a; b')\n"
        "open('said', 'w')\n"
        "time.sleep(60)\n"
    )
    command = [
        sys.executable,
        str(REPO / "tools/_torchrun.py"),
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
        str(number),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    ending = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert ending.returncode == 128 + number
    assert ending.stderr.startswith(f"error: rank 1 was ended by {why}") and ending.stderr.count("\n") == 1


def test_torchrun_passes_usr1_on_and_does_not_end_before_its_processes(tmp_path: Path) -> None:
    """A time limit of SLURM may send it to every process of a job; torchrun's own default would end it and leave them behind."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGUSR1, lambda *_: (time.sleep(1), sys.exit(75)))\n"
        "open(os.environ['RANK'], 'w').write('ready'); time.sleep(60)\n"
    )
    command = [sys.executable, str(REPO / "tools/_torchrun.py"), "--standalone", "--nproc-per-node", "2", str(program)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    for rank in "01":
        end = time.monotonic() + 60
        while not (tmp_path / rank).exists() and time.monotonic() < end:
            time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == STOPPED
    assert left_behind(process.pid) == []
