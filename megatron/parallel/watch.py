"""A rank that waits for ever, seen from outside the wait: by a thread.

A collective of NCCL does not notice that a peer is gone, and a host that waits for it hears no signal. So a thread of each rank
looks whether one has left a message (:meth:`megatron.parallel.connection.Connection.leave`), and ends the process when the
rank has not come to its own end shortly after. And where a rank makes no step for most of the time that a collective may take, it
prints what all its threads are doing, while there still is something to see.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable

POLL_SECONDS = 5.0
GRACE_SECONDS = 10.0  # from a peer's message: most collectives fail by themselves, with more to say
NEAR = 0.9  # share of the time limit


class Watch:
    """Looks after one rank of several."""

    def __init__(self, *, timeout_seconds: float, news: Callable[[], str], end: Callable[[str], None]) -> None:
        """Args:
        timeout_seconds: limit of a collective.
        news: what peers that left had to say, or "".
        end: ends the process, because of such news.
        """
        self._limit, self._news, self._end = NEAR * timeout_seconds, news, end
        self._beat: float | None = None
        self._stopped = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self) -> None:
        """The rank goes on; from the first call on it is expected to say so."""
        self._beat = time.monotonic()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _look(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            waited = 0.0 if self._beat is None else time.monotonic() - self._beat
            if waited > self._limit:
                self._beat = None  # once, until it goes on
                print(f"no step for {waited / 60:.0f} minutes; what the threads do:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
            if (news := self._news()) and not self._stopped.wait(GRACE_SECONDS):
                return self._end(news)
        return None
