"""Processes that know each other: how they meet, and how they part.

Nobody waits in silence: a process that waits for others says for whom, and one whose peer is gone says who left.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import groupby
from typing import NoReturn

import torch.distributed as dist

from megatron.errors import Failure
from megatron.parallel.launch import Launch, complain, local_device
from megatron.screen import say

POLL_SECONDS = 5.0
GRACE_SECONDS = 10.0  # from a peer's message: most collectives fail by themselves, with more to say
NEAR = 0.9  # share of the time limit


class Watch:
    """Looks after one rank of several from outside of what it waits for: by a thread.

    A collective of NCCL does not notice that a peer is gone, and a host that waits for it hears no signal. So the thread looks
    whether one has left a message (:meth:`Connection.leave`), and ends the process when the rank has not come to its own end
    shortly after. And where a rank makes no step for most of the time that a collective may take, it prints what all its threads
    are doing, while there still is something to see.
    """

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
                say(f"no step for {waited / 60:.0f} minutes; what the threads do:", to_errors=True)
                faulthandler.dump_traceback(sys.stderr)
            if (news := self._news()) and not self._stopped.wait(GRACE_SECONDS):
                return self._end(news)
        return None


AGENT_SECONDS = 60.0
ARRIVED, COMPLETE = "arrived", "complete"  # how many ranks are there; a key that is there once all are
LEFT = "left"  # key of the first rank that went after an error: which, and why
NOTICE_SECONDS = 15.0  # before the first line; each next one comes after twice as long
# How gloo, NCCL and the store word it when the other end of a connection is gone.
GONE = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|remote process exited|socket closed|"
    r"recvvalue failed|sendbytes failed|got 0 bytes|failed to recv|pair closure",
    re.IGNORECASE,
)


class PeerFailure(Failure):
    """Another rank is gone, and this one cannot go on without it."""


@dataclass(frozen=True)
class Connection:
    """The connected processes: who they are, and what became of them.

    Attributes:
        launch: this process.
        hosts: host name of every rank.
        store: the key-value store where they met; None where they were connected by someone else, who also parts them.
        watch: ends this process when it waits for one that is gone; None for a process alone.
    """

    launch: Launch
    hosts: tuple[str, ...] = ()
    store: dist.Store | None = field(default=None, repr=False)
    watch: Watch | None = field(default=None, repr=False)

    @property
    def is_shared(self) -> bool:
        """Whether :func:`connect` has tied this process to others."""
        return self.store is not None and self.launch.world_size > 1

    def beat(self) -> None:
        """Tell the watch that this process goes on."""
        if self.watch is not None:
            self.watch.beat()

    def leave(self, error: BaseException | None = None) -> None:
        """Part from the others.

        After an error nothing is destroyed: that would wait for peers that may be waiting for this process. They are told
        why it goes; the caller then ends the process (:func:`end_process`).
        """
        if self.watch is not None:
            self.watch.stop()
        if error is None:
            if self.store is not None:
                dist.destroy_process_group()
            return
        if self.store is None or isinstance(error, PeerFailure):
            return
        reason = f"rank {self.launch.rank} on {self.hosts[self.launch.rank]} failed ({in_a_line(error)})"
        with suppress(RuntimeError):  # its keeper is gone: nobody is left to be told
            self.store.compare_set(LEFT, "", reason)
        if self.watch is not None and self.launch.keeps_meeting_place:
            time.sleep(POLL_SECONDS + 1)  # the message is gone with this process

    def peer_failure(self, error: BaseException) -> PeerFailure | None:
        """One line for an error that only says that a peer is gone; None for any other error.

        The peer is named as far as it can be known: a rank that failed has left a message, of one that was killed the
        connection may tell the address.
        """
        if self.launch.world_size == 1 or not isinstance(error, RuntimeError) or not GONE.search(str(error)):
            return None
        found = self._news()
        if not found:
            address = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
            found = f"a process{f' at {address[1]}' if address else ''} is gone without a word (killed, or its host is down)"
        return self._lost(found)

    def _news(self) -> str:
        """What the first rank that left after an error had to say."""
        if self.store is None:
            return ""
        try:
            return self.store.get(LEFT).decode() if self.store.check([LEFT]) else ""
        except RuntimeError:  # no answer
            is_kept = self.launch.agent_attempt is None
            return f"rank 0 on {self.hosts[0]} is gone, and with it the meeting place" if is_kept else ""

    def _end(self, news: str) -> None:
        """End this process, which waits for one that is gone."""
        complain(f"error: {self._lost(news)}", is_speaker=True)
        end_process(PeerFailure.exit_status)

    def _lost(self, news: str) -> PeerFailure:
        return PeerFailure(
            f"rank {self.launch.rank} lost a peer: {news}",
            "a run needs all its ranks",
            "see the messages of that rank, then start again with --load",
        )


def is_connected() -> bool:
    """Whether this process is one of several that are connected: its end is no private matter."""
    return dist.is_initialized() and dist.get_world_size() > 1


def show(error: BaseException, *, rank: int) -> None:
    """Print the traceback of a rank that failed, and see to it that the error is the last thing on the screen."""
    traceback.print_exception(error)
    complain(f"error: rank {rank} failed: {in_a_line(error)}; its traceback is above", is_speaker=False)


def in_a_line(error: BaseException) -> str:
    """Kind and message of an error, or how the traceback ends that it quotes (of a loader process)."""
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    return text.splitlines()[-1 if "Traceback (most recent call last)" in text else 0][:500]


def end_process(status: int) -> NoReturn:
    """End this process at once, with its children: Python's way out would wait for peers that wait for this process."""
    for child in multiprocessing.active_children():  # loader workers would outlive it
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # closed or full
            stream.flush()
    os._exit(status)


def connect(launch: Launch, *, timeout_minutes: float = 30.0) -> Connection:
    """Start the default process group, gloo on the CPU and NCCL on CUDA, once every rank is there.

    Every rank calls at the meeting place; whoever waits long says for whom.

    Args:
        launch: this process.
        timeout_minutes: limit of the wait, and of every later collective.

    Raises:
        UserError: this host has fewer accelerators than processes.
        Failure: ranks are missing after the limit, or the meeting place cannot be opened.
    """
    if dist.is_initialized():
        return Connection(launch)
    device, timeout = local_device(launch), timedelta(minutes=timeout_minutes)
    store: dist.Store = dist.HashStore()
    hosts: tuple[str, ...] = (socket.gethostname(),)
    if launch.world_size > 1:
        store = _open_store(launch, timeout)
        hosts = _roll_call(launch, store, timeout)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    connection = Connection(launch, hosts, store)
    if launch.world_size == 1:
        return connection
    return replace(
        connection, watch=Watch(timeout_seconds=60 * timeout_minutes, news=connection._news, end=connection._end)
    )


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Open the meeting place, or call there until it opens."""
    assert launch.master_addr is not None and launch.master_port is not None
    is_keeper, address = launch.keeps_meeting_place, (launch.master_addr, launch.master_port)
    if not is_keeper:
        _wait_for_answer(launch, address, timeout)
    try:
        store = dist.TCPStore(*address, is_master=is_keeper, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
        raise Failure(
            f"rank {launch.rank} cannot {'open' if is_keeper else 'call at'} {launch.meeting_place} "
            f"({str(error).splitlines()[0]})",
            "the ranks meet at MASTER_ADDR:MASTER_PORT, a free port of rank 0's host",
            "choose another port or address",
        ) from error
    return dist.PrefixStore(f"megatron/attempt_{launch.agent_attempt or 0}", store)


def _wait_for_answer(launch: Launch, address: tuple[str, int], timeout: timedelta) -> None:
    """Call at the meeting place until somebody answers. An agent of torchrun keeps it from before its processes start."""
    by_agent = launch.agent_attempt is not None
    limit = min(timeout, timedelta(seconds=AGENT_SECONDS)) if by_agent else timeout
    keeper, rule = "rank 0", "rank 0 opens it within --distributed-timeout-minutes"
    if by_agent:
        keeper, rule = "the agent of torchrun", "the agent of torchrun keeps it open"

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(address, timeout=NOTICE_SECONDS):
            return True
        return False

    if not _wait(launch, answers, limit, lambda: f"{keeper}, which opens {launch.meeting_place}"):
        raise Failure(
            f"rank {launch.rank}: nobody answers at {launch.meeting_place}",
            rule,
            "check that rank 0 runs, its address, and the network between the hosts",
        )


def _roll_call(launch: Launch, store: dist.Store, timeout: timedelta) -> tuple[str, ...]:
    """Host name of every rank, once all have given theirs; the first of those that wait says who is missing."""
    keys = [f"host/{rank}" for rank in range(launch.world_size)]

    def absent() -> str:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        ranks = f"{'rank' if len(missing) == 1 else 'ranks'} {_ranges(missing)} of {launch.world_size}"
        return ranks if missing else ""

    def awaited() -> str:
        is_first = not any(store.check([key]) for key in keys[: launch.rank])
        ranks = absent() if is_first else ""
        return f"{ranks}, to come to {launch.meeting_place}" if ranks else ""

    try:
        store.set(keys[launch.rank], socket.gethostname())
        if store.add(ARRIVED, 1) == launch.world_size:  # the last one tells the others, which ask for one key
            store.set(COMPLETE, "")
        if _wait(launch, lambda: store.check([COMPLETE]), timeout, awaited) or not (ranks := absent()):
            return tuple(name.decode() for name in store.multi_get(keys))
    except RuntimeError as error:
        raise Failure(
            f"rank {launch.rank} lost {launch.meeting_place} while it waited",
            "who keeps the meeting place stays until the end",
            "see the messages of the launcher and of rank 0, then start again",
        ) from error
    raise Failure(
        f"{ranks} never came to {launch.meeting_place}",
        "all ranks start within --distributed-timeout-minutes",
        "check the hosts of those ranks, the host file and the firewall",
    )


def _wait(launch: Launch, is_over: Callable[[], bool], limit: timedelta, whom: Callable[[], str]) -> bool:
    """Ask until the wait is over; say for ``whom`` it is, if anybody, after NOTICE_SECONDS, and again after twice as long.

    Returns:
        Whether it was over within the limit.

    Raises:
        Failure: the launcher is gone meanwhile.
    """
    began = said = time.monotonic()
    patience = NOTICE_SECONDS
    while not is_over():
        if launch.is_abandoned:
            raise Failure(
                f"rank {launch.rank} waits, but its launcher is gone",
                "the other ranks will not come without it",
                "start the job again",
            )
        now = time.monotonic()
        if now - began >= limit.total_seconds():
            return False
        if now - said >= patience:
            said, patience = now, 2 * patience
            if awaited := whom():
                say(f"rank {launch.rank} on {socket.gethostname()} waits for {awaited}", to_errors=True)
        time.sleep(0.2)
    return True


def _ranges(ranks: list[int]) -> str:
    """``0, 2-5``."""
    runs = ([rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]))
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
