"""Loader processes: what they answer, and what is said of one that is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from megatron.data.batches import Batches, Workers, loss_of
from megatron.errors import Failure

REPO = Path(__file__).resolve().parents[2]


class Numbers(Dataset[torch.Tensor]):
    """A few samples; making one may fail."""

    def __init__(self, make: Callable[[int], torch.Tensor] = torch.tensor) -> None:
        self._make = make

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._make(index)


class Slow(Workers):
    """Processes that are at their start for a while, as on a busy machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __call__(self, worker: int) -> None:
        (self._folder / str(os.getpid())).touch()
        time.sleep(1)
        super().__call__(worker)


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "HUP"])
def test_a_stop_of_the_whole_group_does_not_end_a_process_that_starts(name: str, tmp_path: Path) -> None:
    workers, begun = Slow(tmp_path), []

    def stop() -> None:  # the trainer waits for those that start
        while len(pids := [path.name for path in tmp_path.iterdir()]) < 2:
            time.sleep(0.01)
        begun.append(workers.have_begun)
        subprocess.run(["kill", f"-{name}", *pids], check=True)  # by another process than the trainer, as a launcher

    thread = threading.Thread(target=stop)
    thread.start()
    with Batches(DataLoader(Numbers(), batch_size=2, num_workers=2, worker_init_fn=workers), workers) as batches:
        thread.join()
        assert [len(batch) for batch in batches] == [2, 2, 2, 2] and begun == [False]


@pytest.mark.parametrize(
    ("seconds", "make"),
    [(0, "torch.tensor"), (0, "lambda index: time.sleep(3600)"), (1, "torch.tensor")],
    ids=["while it waits", "while it works", "while it starts"],
)
def test_a_process_ends_with_a_trainer_that_is_killed(seconds: int, make: str, tmp_path: Path) -> None:
    """Also with one that was killed before the process could look who its trainer is."""
    program = f"""
import os, sys, time, pathlib, torch
from torch.utils.data import DataLoader
from data.test_batches import Numbers
from megatron.data.batches import Batches, Workers

class Starting(Workers):
    def __call__(self, worker):
        pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
        time.sleep({seconds})
        super().__call__(worker)

workers = Starting()
batches = Batches(DataLoader(Numbers({make}), num_workers=2, worker_init_fn=workers), workers)
time.sleep(3600)
"""
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    trainer = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        time.sleep(0.01)
        assert trainer.poll() is None
    time.sleep(0 if seconds else 0.5)
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes left")
        time.sleep(0.05)


def broken_off(index: int) -> torch.Tensor:
    """A sample of a process whose trainer dies while it takes a batch."""
    (address, _key) = resource_sharer.DupFd(0)._id  # type: ignore[attr-defined]
    with socket.socket(socket.AF_UNIX) as trainer:
        trainer.connect(address)
    time.sleep(0.1)
    return torch.tensor(index)


def test_a_batch_whose_taker_dies_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers()
    with Batches(DataLoader(Numbers(broken_off), num_workers=1, worker_init_fn=workers), workers) as batches:
        assert len(list(batches)) == 8
    assert capfd.readouterr().err == ""


class Stuck(Workers):
    """The first processes never begin, as one whose fork caught a lock."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__()
        self._folder, self._number = folder, number

    def __call__(self, worker: int) -> None:
        (self._folder / str(os.getpid())).touch()
        if len(list(self._folder.iterdir())) <= self._number:
            time.sleep(3600)
        super().__call__(worker)


def test_processes_that_do_not_begin_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.batches.PATIENCE", (0.5, 20.0))
    workers = Stuck(tmp_path, 1)
    with Batches(DataLoader(Numbers(), batch_size=2, num_workers=1, worker_init_fn=workers), workers) as batches:
        assert torch.cat(list(batches)).tolist() == list(range(8))
    stuck, second = sorted(int(path.name) for path in tmp_path.iterdir())
    assert not Path(f"/proc/{stuck}").exists() and not Path(f"/proc/{second}").exists()
    monkeypatch.setattr("megatron.data.batches.PATIENCE", (0.1, 0.2))
    never = Stuck(tmp_path, 100)
    with pytest.raises(Failure, match="did not begin"):
        Batches(DataLoader(Numbers(), num_workers=1, worker_init_fn=never), never)


class Dying(Workers):
    """Processes that end before they have begun, as one without memory does."""

    def __call__(self, worker: int) -> None:
        os._exit(1)


def test_a_process_that_dies_before_it_has_begun_is_named() -> None:
    """torch tells of it from a signal handler, so anywhere: the trainer asks of every error whether it is that."""
    workers = Dying()
    with pytest.raises(Failure, match="the data loader lost a process"):
        list(Batches(DataLoader(Numbers(), num_workers=1, worker_init_fn=workers), workers))
    assert "lost a process" in str(loss_of(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")))
    assert loss_of(RuntimeError("Timed out waiting 30000ms")) is None
    assert loss_of(ValueError("DataLoader worker (pid 7) is killed by signal: Killed.")) is None


def cut(_index: int) -> torch.Tensor:
    """An error of the dataset that is worded as that of a connection."""
    raise ConnectionResetError(104, "Connection reset by peer")


def test_an_error_of_the_data_keeps_its_traceback() -> None:
    workers = Workers()
    loader = DataLoader(Numbers(cut), num_workers=1, worker_init_fn=workers)
    with Batches(loader, workers) as batches, pytest.raises(ConnectionResetError, match="Caught"):
        next(batches)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_cut_connection_is_a_lost_process(error: Exception) -> None:
    """Which of several signs of it the trainer meets first is chance."""

    def gone():
        raise error
        yield

    workers = Workers()
    batches = Batches(DataLoader(Numbers()), workers)
    batches._source = gone()
    with pytest.raises(Failure, match="/dev/shm"):
        next(batches)


def test_a_killed_process_is_named() -> None:
    program = """
import os, signal, torch
from torch.utils.data import DataLoader
from megatron.data.batches import Batches, Workers
workers = Workers()
batches = Batches(DataLoader(list(range(10**6)), num_workers=2, worker_init_fn=workers), workers)
with batches:
    next(batches)
    os.kill(batches._source._workers[0].pid, signal.SIGKILL)
    for _ in batches: pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "Failure: the data loader lost a process" in done.stderr
