"""The ways to stop a run from outside: signals, a kill-switch file, a time limit, a launcher that is gone. All ranks agree.

In training what a rank wishes is added up with the losses of the step (:meth:`StopRequest.wishes`, :meth:`StopRequest.hear`),
which costs nothing. In a validation, which has no such sum, the hosts ask each other (:meth:`StopRequest.poll`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from megatron.config.schema import RunConfig
from megatron.parallel.connection import Connection
from megatron.parallel.context import ParallelContext, Poll

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Exit status of a run that was stopped before its end (EX_TEMPFAIL: start it again), so that `train && eval` stops too.
STOPPED_STATUS = 75


class StopRequest:
    """Knows whether this rank was told to stop, and hears from all ranks, without waiting for them, whether one of them was.

    A context manager: the signal handlers that were there before are put back on leaving.

    Attributes:
        reason: why to stop, once the ranks have agreed on it.
    """

    def __init__(self, context: ParallelContext, connection: Connection, run: RunConfig) -> None:
        """Args:
        context: this process.
        connection: tells whether a launcher of this process is gone, and is told that the process goes on.
        run: has the time limit, from the start of the program as in Megatron-LM, and the kill-switch file.
        """
        self.context, self.connection, self.run = context, connection, run
        minutes = run.exit_duration_in_mins
        self.deadline = None if minutes is None else connection.launch.began + 60 * minutes
        self.signal_name: str | None = None
        self.reason: str | None = None
        self._asking = None if context.control_group is None else Poll(context.control_group)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup asks to ignore it
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._asking is not None and kind is None:
            self._asking.end()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt  # Ctrl-C twice: do not wait for the checkpoint
        self.signal_name = signal.Signals(number).name

    def wishes(self) -> list[bool]:
        """Whether this rank was told to stop, by reason. Asked in every step and within a validation, which the watch
        hears of, too."""
        self.connection.beat()
        return [
            self.signal_name is not None,
            self.run.kill_switch_file is not None and Path(self.run.kill_switch_file).exists(),
            self.deadline is not None and time.monotonic() > self.deadline,
            self.connection.launch.is_abandoned,
        ]

    def hear(self, wishes: Sequence[float]) -> str | None:
        """Why to stop now, or None: what the sum of all ranks' :meth:`wishes` says. A process alone needs no sum."""
        self.reason = self.reason or self._reason(self.wishes() if self.context.world_size == 1 else wishes)
        return self.reason

    def poll(self) -> str | None:
        """Why to stop now, or None. A collective call: every rank makes the same calls in the same order.

        With several processes the answer is that to the question of the call before.
        """
        if self.reason is None:
            self.reason = self._reason(self._asking.ask(*self.wishes()) or () if self._asking else self.wishes())
        return self.reason

    def _reason(self, wishes: Sequence[float]) -> str | None:
        names = (
            str(self.signal_name or "a signal to another rank"),
            f"the kill-switch file {self.run.kill_switch_file}",
            "--exit-duration-in-mins",
            "the end of its launcher",
        )
        return next((name for wish, name in zip(wishes, names) if wish), None)
