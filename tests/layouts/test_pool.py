"""The worker pool itself: it must not turn a failure or a hang into a pass, or into a stuck test session."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from layouts.pool import JobFailed, Process, WorkerPool


def add_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()  # waits for a rank that never comes


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def sleep_in_here() -> None:
    time.sleep(600)


def make_groups() -> int:
    """A group that the next job must not find, and the number of groups found."""
    from torch.distributed.distributed_c10d import _world

    found = len(_world.pg_map)
    dist.new_group([0, 1])
    dist.barrier()  # one that ended would take its side down while the other still connects
    return found


def exit_with(status: int) -> int:
    print("about to leave")
    return status


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_results_come_in_rank_order_and_groups_do_not_outlive_a_job(pool: WorkerPool) -> None:
    assert pool.run(add_ranks, 10) == [21, 21]
    assert pool.run(os.getpid) == pool.run(os.getpid)
    assert pool.run(make_groups) == [1, 1]
    assert pool.run(make_groups) == [1, 1]


@pytest.mark.parametrize(
    ("job", "complaint"), [(fail_on_rank_one, "rank one is unwell"), (die_on_rank_one, "status 7")]
)
def test_a_failing_rank_fails_the_job_and_the_pool_comes_back(pool: WorkerPool, job: object, complaint: str) -> None:
    with pytest.raises(JobFailed, match=complaint):
        pool.run(job, timeout=60)  # type: ignore[arg-type]
    assert pool.run(add_ranks, 0) == [1, 1]


def test_a_hanging_job_is_killed_and_shows_its_stack(pool: WorkerPool) -> None:
    started = time.monotonic()
    with pytest.raises(JobFailed, match="sleep_in_here"):
        pool.run(sleep_in_here, timeout=1)
    assert time.monotonic() - started < 60
    assert pool.run(add_ranks, 0) == [1, 1]


def test_a_process_reports_status_and_output() -> None:
    process = Process(exit_with, 3)
    assert process.wait() == 3
    assert "about to leave" in process.output
