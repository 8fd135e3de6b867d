"""Micro-batches of a rank for as long as they are wanted: loader processes that end with their trainer, however it ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import RawArray, RawValue
from types import FrameType, TracebackType
from typing import NoReturn

import torch
from torch.utils.data import DataLoader

from megatron.errors import Failure
from megatron.model.batch import ModelBatch
from megatron.screen import say

# How torch words it when a loader process died, or could not hand its batch over.
DIED = re.compile(r"DataLoader worker .*(killed|exited)", re.DOTALL)
LOST = re.compile(DIED.pattern + r"|shared memory|shm|Bus error|timed out|Too many open files|No space left", re.DOTALL)


# Seconds until a process that has not begun is taken for stuck, and replaced. They are forked, and a fork may catch a lock
# that no thread of the child will give back: Python 3.11 was seen to wait for that of its thread states, which gloo's
# threads take to let go of the tensors of a finished collective (docs/reliability.md).
PATIENCE = (15.0, 60.0, 300.0)
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # what a job is stopped by
PR_SET_PDEATHSIG = 1  # of Linux: the signal for a process whose parent has ended


class Workers:
    """How loader processes answer signals.

    Ctrl-C and a cluster's signals reach every process of a job, but the trainer answers them: it may need more batches
    before it stops. So workers ignore them, except SIGTERM once the trainer lets them go (or is gone itself):
    multiprocessing sends it at exit and waits for the process without limit. Until a worker knows this, what comes waits
    (:class:`Batches` starts it so): launchers signal whole process groups, and torch lets a stranger's SIGTERM end a worker.
    """

    def __init__(self) -> None:
        self._released, self._begun, self._trainer = RawValue("b", 0), RawArray("b", 0), os.getpid()
        atexit.register(self.release)  # before multiprocessing's own exit handler, which was registered earlier

    def expect(self, number: int) -> None:
        """So many are about to start, and are not to be ended."""
        self._released.value, self._begun = 0, RawArray("b", number)

    @property
    def have_begun(self) -> bool:
        """Whether all that were expected have set themselves up."""
        return all(self._begun)

    def release(self) -> None:
        """From now on SIGTERM ends the workers."""
        self._released.value = 1

    def __call__(self, worker: int) -> None:
        """Set up a worker (``worker_init_fn``), which is not to outlive its trainer: torch looks whether the parent that it finds
        at the beginning has changed, and waits for ever where the trainer was killed before."""
        with suppress(AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._trainer:
            os._exit(0)
        for number in STOPS:
            signal.signal(number, self._on_terminate if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        # A batch that cannot be handed over would be dropped by the queue, and the trainer would wait for it.
        Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)  # type: ignore[attr-defined]
        sys.excepthook = _broken_off
        self._begun[worker] = 1

    def _on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        if self._released.value or os.getppid() != self._trainer:
            os._exit(0)


def _cannot_hand_over(error: Exception, _batch: object) -> NoReturn:
    say(f"a loader process ends: {error}", to_errors=True)
    os._exit(1)  # which the trainer notices at once


def _broken_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, but for that of a trainer that was killed while it took a batch, which its own end tells."""
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def loss_of(error: BaseException) -> Failure | None:
    """What torch's word of a lost loader process means; None for other errors. It comes from a signal handler: anywhere."""
    return _loss(error) if isinstance(error, RuntimeError) and DIED.search(str(error)) else None


def _loss(error: BaseException) -> Failure:
    return Failure(
        f"the data loader lost a process ({' '.join(str(error).split())[-300:]})",
        "its processes hand batches over through /dev/shm and need memory and files for it",
        "enlarge /dev/shm (docker run --shm-size), lower --num-workers (0 needs none), or raise ulimit -n",
    )


@contextmanager
def _losses_named() -> Iterator[None]:
    """Turn what torch says of a lost loader process into a :class:`Failure`."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # The dataset's own errors come with "Caught ..."; a connection is only to a process that handed over a batch and ended.
        is_cut = isinstance(error, ConnectionError | EOFError) and not str(error).startswith("Caught")
        if is_cut or LOST.search(str(error)):
            raise _loss(error) from error
        raise


class Batches:
    """An iterator over the micro-batches of a loader; a context manager that ends its processes."""

    def __init__(self, loader: DataLoader, workers: Workers) -> None:
        """Start the processes.

        Args:
            loader: of :func:`megatron.data.loader.build_loader`.
            workers: what its processes were set up with.

        Raises:
            Failure: there is no room for them, or none begins.
        """
        self._workers = workers
        for seconds in PATIENCE:
            self._source = self._start(loader)
            with _losses_named():
                if self._have_begun(seconds):
                    return
            for process in self._processes:
                with suppress(RuntimeError):  # torch tells of a killed one
                    process.kill()
                    process.join()
            self._end_processes()
        raise Failure(
            f"a loader process did not begin within {PATIENCE[-1]:.0f} s, after {len(PATIENCE) - 1} that did not either",
            "its processes are copies of the trainer",
            "lower --num-workers (0 needs none), or see what holds up the machine",
        )

    def _start(self, loader: DataLoader) -> Iterator[ModelBatch[torch.Tensor]]:
        self._workers.expect(loader.num_workers)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which its processes inherit
        try:
            with _losses_named():
                return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _have_begun(self, seconds: float) -> bool:
        """Wait for that; one that died meanwhile is left for :meth:`__next__` to name."""
        deadline = time.monotonic() + seconds
        while not self._workers.have_begun and all(process.is_alive() for process in self._processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    @property
    def _processes(self) -> list[BaseProcess]:
        return getattr(self._source, "_workers", [])

    def __iter__(self) -> Iterator[ModelBatch[torch.Tensor]]:
        return self

    def __next__(self) -> ModelBatch[torch.Tensor]:
        """The next micro-batch.

        Raises:
            Failure: a loader process died or did not answer in time.
        """
        with _losses_named():
            return next(self._source)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the loader's processes now: none may hold up the exit of the trainer.

        Raises:
            Failure: the error is that a loader process died, which torch says wherever the trainer is at that moment.
        """
        self._end_processes()
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise _loss(error) from error

    def _end_processes(self) -> None:
        self._workers.release()
        shut_down = getattr(self._source, "_shutdown_workers", None)  # of the iterator with processes
        if shut_down is None:
            return
        shut_down()  # they leave by themselves within milliseconds; one that hangs is sent SIGTERM after 5 s
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
