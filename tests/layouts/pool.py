"""Processes for tests: persistent gloo worker pools, and single processes that may be killed.

Everything is forked from one server that has imported torch and DeepSpeed, so a process costs milliseconds instead of
seconds. A pool runs picklable functions on every rank and gives their results back; DeepSpeed's process groups are
forgotten between jobs, so that each job may use another layout. A job that hangs costs its pool, and the test fails
with the stack of every rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The second line is what DeepSpeed imports when an engine is built, the third what is ours.
PRELOAD = [
    *("pytest", "torch", "deepspeed", "deepspeed.pipe", "torch._inductor.compile_fx", "safetensors.torch"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer", "numpy.ma"),
    *("megatron.training.train", "megatron.training.deepspeed.engine", "megatron.training.fsdp2.engine"),
    *("megatron.objectives.ar", "megatron.objectives.mdm"),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}
START_SECONDS = 240.0  # the first start imports torch and DeepSpeed, on cores that others use too
GRACE_SECONDS = 5.0


class JobFailed(AssertionError):
    """A job raised, died or hung; the message holds what every rank had to say."""


def server() -> Any:
    """The multiprocessing context whose fork server has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _environment(ENVIRONMENT):  # the server keeps the environment it was started with
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# Engines of ZeRO 3, of last stages and of jobs that failed stay alive (hooks of C++ tensors hold them), each with its groups,
# whose threads look for messages a hundred times a second. New workers are forked in less than a second.
JOBS_PER_GENERATION = 32


class WorkerPool:
    """``size`` processes in one gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._generation = 0
        self._jobs = 0

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 150.0) -> list[Any]:
        """Run ``function(*arguments)`` on every rank.

        Args:
            function: importable by name, as its arguments are picklable.
            arguments: the same for every rank (which can ask torch.distributed who it is).
            timeout: seconds after which the stacks are printed and the pool is killed.

        Returns:
            Results in rank order.

        Raises:
            JobFailed: a rank raised, died or did not answer. The pool starts afresh with the next job.
        """
        if self._jobs == JOBS_PER_GENERATION:
            self.close()
        if not self._processes:
            self._start()
        self._jobs += 1
        if all(process.is_alive() for process in self._processes):
            for log in self._logs:
                os.truncate(log, 0)
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send((list(sys.path), timeout))
                    pipe.send((function, arguments))
                except BrokenPipeError:
                    self._processes[rank].join(GRACE_SECONDS)
                    status = self._processes[rank].exitcode
                    raise JobFailed(self._report({rank: f"had ended between two jobs, with status {status}"})) from None
            return self._collect(timeout)
        except BaseException:
            self.close()
            raise

    def output(self, rank: int) -> str:
        """What a rank printed in the last job."""
        return self._logs[rank].read_text()

    def close(self) -> None:
        """Kill the workers."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._jobs = [], [], 0

    def _start(self) -> None:
        context = server()
        self._generation += 1
        folder = Path(self._folder.name)
        self._logs = [folder / f"rank{rank}.{self._generation}.log" for rank in range(self.size)]
        rendezvous = folder / f"rendezvous.{self._generation}"
        for rank, log in enumerate(self._logs):
            log.touch()
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(rendezvous), str(log), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._collect(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _collect(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout + GRACE_SECONDS  # the workers print their stacks first
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(zip(self._pipes, range(self.size)))
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), remaining):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self._processes[rank].join(GRACE_SECONDS)
                    ok, value = False, f"the process ended with status {self._processes[rank].exitcode}"
                (answers if ok else failures)[rank] = value
            if failures:  # the others may be waiting for the one that failed
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank in waiting.values():
            failures[rank] = "did not answer; its stack is in its output"
        if failures:
            if waiting:
                self._dump_stacks()
            raise JobFailed(self._report(failures))
        return [answers[rank] for rank in range(self.size)]

    def _dump_stacks(self) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGUSR2)
        time.sleep(0.5)

    def _report(self, failures: dict[int, str]) -> str:
        parts = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
        parts += [f"--- output of rank {rank}\n{log.read_text()[-6000:]}" for rank, log in enumerate(self._logs)]
        return "\n".join(parts)


def _serve(rank: int, size: int, rendezvous: str, log: str, pipe: Connection) -> None:
    """A worker: join the group, then run jobs until the pipe closes."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    prepare_process(log, {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})  # they meet in a file
    import torch

    linear = torch.nn.functional.linear
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(minutes=3)
    )
    gc.collect()
    gc.freeze()  # the collection after each job looks at what jobs made, not at all that was imported
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            sys.path[:], timeout = pipe.recv()  # where the test modules are
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, file=sys.stderr)
        try:
            function, arguments = pipe.recv()
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        forget_process_groups()
        torch.nn.functional.linear = linear  # ZeRO-3 puts its own function there
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch would send tensors as open files, and run out of them


def forget_process_groups() -> None:
    """Undo what ``deepspeed.initialize`` leaves in the process, except for the default group."""
    import torch.distributed as dist
    from deepspeed.runtime.pipe import p2p
    from deepspeed.utils import groups
    from torch.distributed.distributed_c10d import _world

    p2p._groups = p2p._grid = None
    groups._release_process_group_references()  # what deepspeed.comm.destroy_process_group() does for its part
    for group in [group for group in _world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)
    gc.collect()


def prepare_process(log: str, environment: dict[str, str]) -> None:
    """Settings of a forked process: output to a file, stacks on SIGUSR2, one thread; no collection looks at what the server
    imported, which would copy its memory."""
    gc.freeze()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=sys.stderr)
    faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
    os.environ.update({**ENVIRONMENT, **environment})
    import torch

    torch.set_num_threads(1)


class Process:
    """One process of its own that runs a function, such as ``main()``, and may be signalled and killed."""

    def __init__(self, function: Callable[..., int | None], *arguments: Any, environment: dict[str, str] | None = None):
        """Start ``sys.exit(function(*arguments))``; the function is importable by name."""
        handle, log = tempfile.mkstemp(prefix="process_", suffix=".log")
        os.close(handle)
        self.log = Path(log)
        self._process = server().Process(target=_run, args=(log, environment or {}, function, arguments), daemon=True)
        self._process.start()

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def wait_until(self, condition: Callable[[], Any], timeout: float = 120.0) -> None:
        """Return as soon as the condition holds; fail if the process ends before, or takes too long."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.is_running or time.monotonic() > deadline:
                self.stop()
                raise JobFailed(f"the process ended or hung before the awaited moment:\n{self.output[-6000:]}")
            time.sleep(0.002)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit status (negative: the signal that ended it); past the limit its stacks fail the test."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.signal(signal.SIGUSR2)
            time.sleep(0.5)
            self.stop()
            raise JobFailed(f"the process did not end within {timeout} s:\n{self.output[-6000:]}")
        status = int(self._process.exitcode)
        return status

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()


def _run(log: str, environment: dict[str, str], function: Callable[..., int | None], arguments: tuple) -> None:
    prepare_process(log, environment)
    sys.exit(function(*arguments))
