"""Who waits for ever is seen, and ended where a peer is gone."""

from __future__ import annotations

import threading
import time

import pytest

from megatron.parallel import connection
from megatron.parallel.connection import Watch


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(connection, "GRACE_SECONDS", 0.1)


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


def test_a_rank_that_comes_to_its_own_end_is_left_alone() -> None:
    looking = Watch(timeout_seconds=60, news=lambda: "rank 1 failed", end=pytest.fail)
    time.sleep(0.06)
    looking.stop()
    time.sleep(0.2)
