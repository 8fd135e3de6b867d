"""Waiting is said, and so is who is gone."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from layouts.pool import Process

from megatron.errors import Failure
from megatron.parallel import connection
from megatron.parallel.connection import Connection, PeerFailure, Watch, connect
from megatron.parallel.launch import Launch

HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet(rank: int, world_size: int, port: int, timeout_minutes: float, delay: float = 0.0) -> int:
    """Connect as a rank of a launcher without an agent; impatient."""
    connection.NOTICE_SECONDS = 0.5
    time.sleep(delay)
    try:
        found = connect(Launch(rank, world_size, rank, "127.0.0.1", port), timeout_minutes=timeout_minutes)
    except Failure as error:
        print(f"error: {error}")
        return 1
    print("hosts", *found.hosts, "shared" if found.is_shared else "alone")
    dist.barrier()
    found.leave()
    print("left", dist.is_initialized())
    return 0


def test_a_rank_that_waits_says_for_whom_until_all_are_there() -> None:
    port = free_port()
    first, third = Process(meet, 0, 3, port, 1.0), Process(meet, 2, 3, port, 1.0)
    first.wait_until(lambda: f"rank 0 on {HOST} waits for rank 1 of 3, to come to 127.0.0.1:{port}" in first.output)
    second = Process(meet, 1, 3, port, 1.0)
    assert [process.wait(60) for process in (first, second, third)] == [0, 0, 0]
    for process in (first, second, third):
        assert f"hosts {HOST} {HOST} {HOST} shared\nleft False" in process.output
        assert "waitForInput" not in process.output  # two lines a second of torch's
    assert "waits for rank 1" not in third.output  # one voice


def test_a_rank_that_is_never_joined_ends_in_words() -> None:
    process = Process(meet, 0, 4, free_port(), 0.03)
    assert process.wait(60) == 1
    assert "error: ranks 1-3 of 4 never came to 127.0.0.1:" in process.output
    assert "check the hosts of those ranks" in process.output


def test_a_meeting_place_that_nobody_opens_is_named() -> None:
    port = free_port()
    process = Process(meet, 1, 2, port, 0.03)
    assert process.wait(60) == 1
    assert f"rank 1 on {HOST} waits for rank 0, which opens 127.0.0.1:{port}" in process.output
    assert f"error: rank 1: nobody answers at 127.0.0.1:{port}; rank 0 opens it" in process.output


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = Process(meet, 0, 2, port, 1.0)
        assert process.wait(60) == 1
        assert f"error: rank 0 cannot open 127.0.0.1:{port}" in process.output and "free port" in process.output


def test_a_process_alone_needs_no_meeting_place() -> None:
    process = Process(meet, 0, 1, 0, 1.0)
    assert process.wait(60) == 0 and f"hosts {HOST} alone" in process.output


@pytest.fixture
def three() -> list[Connection]:
    """Three ranks as they see each other, by hand."""
    store = dist.HashStore()
    return [Connection(Launch(rank, 3, 0, "a", 1), ("a", "b", "c"), store) for rank in range(3)]


CLOSED = RuntimeError("[pair.cc:547] Connection closed by peer [10.0.0.7]:41522")


def test_a_rank_that_fails_is_named_with_its_host_and_reason(three: list[Connection]) -> None:
    three[1].leave(KeyError("token 7"))
    found = three[0].peer_failure(CLOSED)
    assert isinstance(found, PeerFailure) and found.exit_status == 1
    assert str(found) == (
        "rank 0 lost a peer: rank 1 on b failed (KeyError: 'token 7'); a run needs all its ranks; "
        "see the messages of that rank, then start again with --load"
    )
    three[0].leave(found)  # it fails because another did, which is no news
    assert "rank 0 on a" not in str(three[2].peer_failure(CLOSED))


QUOTED = (
    "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n" + "  File x\n" * 99
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(QUOTED + "OSError: no such shard\n"), "OSError: no such shard"),
        (RuntimeError("CUDA error: no room\nKernel errors might come later"), "RuntimeError: CUDA error: no room"),
        (KeyError("token 7"), "KeyError: 'token 7'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)  # fmt: skip
def test_an_error_of_many_lines_is_told_in_one_that_says_what_it_is(
    three: list[Connection], error: BaseException, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LAST_WORDS", str(tmp_path / "words"))
    three[1].leave(error)
    failure = three[0].peer_failure(CLOSED)
    assert failure is not None and f"rank 1 on b failed ({line}); a run" in str(failure)
    connection.show(error, rank=1)
    assert (tmp_path / "words").read_text() == f"error: rank 1 failed: {line}; its traceback is above\n"


def test_parting_ends_no_process(three: list[Connection]) -> None:
    """Whoever calls ``main()`` keeps the processes that it has started itself."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        three[1].leave(KeyError("token 7"))
        child.join(0.2)
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_of_a_killed_rank_the_address_is_told(three: list[Connection]) -> None:
    found = str(three[0].peer_failure(CLOSED))
    assert found.startswith("rank 0 lost a peer: a process at 10.0.0.7 is gone without a word")
    nccl = RuntimeError("NCCL error: remote process exited or there was a network error")
    assert "a process is gone without a word" in str(three[0].peer_failure(nccl))


def test_other_errors_stay_what_they_are(three: list[Connection]) -> None:
    assert three[0].peer_failure(RuntimeError("shapes differ")) is None
    assert three[0].peer_failure(ConnectionResetError("Connection reset by peer")) is None  # of a download, say
    assert Connection(Launch()).peer_failure(CLOSED) is None


def test_a_rank_whose_launcher_is_gone_does_not_wait() -> None:
    """Killed while its processes start, torchrun takes the meeting place along."""
    gone = ((os.getpid(), os.getppid() + 1),)
    began = time.monotonic()
    with pytest.raises(Failure, match="rank 1 waits, but its launcher is gone"):
        connect(Launch(1, 2, 1, "127.0.0.1", free_port(), 0, chain=gone))
    assert time.monotonic() - began < 5


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(connection, "GRACE_SECONDS", 0.1)


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_makes_no_step_shows_once_what_its_threads_do(capfd: pytest.CaptureFixture) -> None:
    looking = Watch(timeout_seconds=0.4, news=str, end=pytest.fail)
    time.sleep(0.5)
    assert capfd.readouterr().err == ""  # nothing is expected of it yet
    for _ in range(10):
        looking.beat()
        time.sleep(0.05)
    assert capfd.readouterr().err == ""
    time.sleep(0.8)
    looking.stop()
    shown = capfd.readouterr().err
    assert shown.count("no step for 0 minutes; what the threads do:") == 1
    assert "test_a_rank_that_makes_no_step" in shown and "in _look" in shown


@pytest.mark.usefixtures("impatient")
def test_what_a_peer_left_ends_the_rank_after_a_while() -> None:
    heard: list[str] = []
    has_ended = threading.Event()

    def end(news: str) -> None:
        heard.append(news)
        has_ended.set()

    began = time.monotonic()
    Watch(timeout_seconds=60, news=lambda: "rank 1 failed", end=end)
    assert has_ended.wait(5) and heard == ["rank 1 failed"]
    assert time.monotonic() - began >= 0.1


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_comes_to_its_own_end_is_left_alone() -> None:
    looking = Watch(timeout_seconds=60, news=lambda: "rank 1 failed", end=pytest.fail)
    time.sleep(0.06)
    looking.stop()
    time.sleep(0.2)
