"""Run a sweep here, several runs at once (slurm.py: as jobs). Killing it at any time loses at most unsaved steps."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

from megatron.errors import Failure, require
from megatron.files import one_at_a_time
from megatron.scaling.sweep.definition import Sweep
from megatron.scaling.sweep.state import claim, is_finished, lock, read_attempts
from megatron.scaling.sweep.sweep_run import SweepRun

ROOT = Path(__file__).resolve().parents[3]
POLL_SECONDS = 2.0
WATCH_SECONDS = 0.5
# Of a terminal, of SLURM ahead of a time limit, and of a terminal that is closed: trainers are in sessions of their own.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Chain:
    """Runs that follow each other; the next one may depend on what the last one showed.

    Attributes:
        name: of the first of them, under which it is told that no next one could be had.
        runs: gives the next run when the last one is over. It ends where that one is not.
        outcome: what came of a run, in a word; "" where it needs another start.
        watch: looks at a run while it trains, and may stop it through its file.
    """

    name: str
    runs: Iterator[SweepRun]
    outcome: Callable[[SweepRun], str] = lambda run: "finished" if is_finished(run) else ""
    watch: Callable[[SweepRun], None] | None = None


@dataclass
class Runner:
    """Starts the runs of a sweep and waits for them.

    Attributes:
        sweep: what to run.
        jobs: runs at the same time.
        devices_per_job: GPUs that each job sees (CUDA_VISIBLE_DEVICES), of those that this program sees; 0: all of them.
        attempts: starts of one run before it counts as failed, in this call.
        say: where progress lines go.
    """

    sweep: Sweep
    jobs: int = 1
    devices_per_job: int = 0
    attempts: int = 2
    say: Callable[[str], None] = print
    _children: dict[str, subprocess.Popen] = field(default_factory=dict)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def run(self, runs: Sequence[SweepRun]) -> dict[str, str]:
        """Bring every run to its end. Returns {run name: "finished" | "skipped" | "failed" | "stopped"}.

        A branch fails with its trunk. A run that another process trains is waited for. Signals to stop (``STOPS``) are passed
        on; the training processes save and stop.

        Raises:
            ValueError: a directory belongs to another configuration (before anything starts).
        """
        for run in runs:
            claim(run)
        make_subsets(self.sweep, runs, self.say)
        names = {run.name for run in runs}
        trunks = [run for run in runs if run.trunk is None or run.trunk.name not in names]
        results = self.follow([Chain(trunk.name, _with_branches(trunk, runs)) for trunk in trunks])
        for run in runs:
            has_failed = run.trunk is not None and results.get(run.trunk.name) == "failed"
            results.setdefault(run.name, "failed" if has_failed else "stopped")
        return {run.name: results[run.name] for run in runs}

    def follow(self, chains: Sequence[Chain]) -> dict[str, str]:
        """Bring every chain to its end, ``jobs`` of them at a time and taking turns.

        Returns:
            {run name: its outcome, or "skipped" | "failed" | "stopped"}.

        Raises:
            UserError: there are fewer GPUs than the jobs need.
        """
        slots = range(min(self.jobs, len(chains)))
        for slot in slots:
            self._environment(slot)
        pending: list[tuple[Chain, SweepRun | None]] = [(chain, None) for chain in chains]
        results: dict[str, str] = {}
        threads = [threading.Thread(target=self._work, args=(slot, pending, results)) for slot in slots]
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # nohup
        previous = {number: signal.signal(number, self._stop) for number in {*STOPS} - ignored}
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # a bare join would keep signals waiting
                    thread.join(0.2)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return results

    def _work(self, slot: int, pending: list[tuple[Chain, SweepRun | None]], results: dict[str, str]) -> None:
        """Take runs until none is left; one that somebody else trains goes back to the end of the queue."""
        while not self._stopping.is_set():
            with self._guard:
                if not pending:
                    return
                chain, run = pending.pop(0)
            try:
                if run is None and (run := next(chain.runs, None)) is None:
                    continue
                with lock(run) as descriptor:
                    if descriptor is None:
                        with self._guard:
                            pending.append((chain, run))
                        self._stopping.wait(POLL_SECONDS)
                        continue
                    results[run.name] = self._bring_to_end(chain, run, slot=slot, descriptor=descriptor)
            except (OSError, ValueError) as error:  # the other runs go on
                name = chain.name if run is None else run.name
                self.say(f"{name}: failed: {error}")
                results[name] = "failed"
            with self._guard:
                pending.append((chain, None))

    def _bring_to_end(self, chain: Chain, run: SweepRun, *, slot: int, descriptor: int) -> str:
        if outcome := chain.outcome(run):
            self.say(f"{run.name}: already {outcome}, skipped")
            return "skipped"
        for _ in range(self.attempts):
            if self._stopping.is_set():
                return "stopped"
            status = self._attempt(run, slot, descriptor, watch=chain.watch)
            if outcome := chain.outcome(run):
                self.say(f"{run.name}: {outcome}")
                return outcome
            if self._stopping.is_set():
                return "stopped"
            ending = f"exit status {status}" if status else "stopped before its last step"
            self.say(f"{run.name}: {ending}: {last_line(run.folder / 'log.txt')} (all of it: {run.folder / 'log.txt'})")
        return "failed"

    def _attempt(
        self, run: SweepRun, slot: int, descriptor: int, *, watch: Callable[[SweepRun], None] | None = None
    ) -> int:
        """One start of the training program; its output is appended to RUN/log.txt."""
        command = command_line(self.sweep, run)
        environment = self._environment(slot)
        starts = sum(record["returncode"] is None for record in read_attempts(run))
        self.say(f"{run.name}: started (attempt {starts + 1})")
        started = time.time()
        _note(run, {"started": started, "returncode": None})
        run.stop_file.unlink(missing_ok=True)
        with open(run.folder / "log.txt", "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C reaches it once, through _stop. The lock goes along.
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                pass_fds=[descriptor], start_new_session=True,
            )  # fmt: skip
            with self._guard:
                self._children[str(run.stop_file)] = child
            if self._stopping.is_set():
                self._pass_on()
            while (status := _status(child, None if watch is None else WATCH_SECONDS)) is None:
                if watch is not None:
                    watch(run)
            with self._guard:
                del self._children[str(run.stop_file)]
        _note(run, {"started": started, "seconds": round(time.time() - started, 1), "returncode": status})
        return status

    def _environment(self, slot: int) -> dict[str, str]:
        """Variables of the job in ``slot``: where the code is, its GPUs, and its share of the CPU cores.

        Threads of several jobs that spin while they wait would hold each other's cores: two jobs of two threads on two cores
        were measured to train 5.6 times slower than two jobs of one thread.
        """
        environment = dict(
            os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        )
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        if self.devices_per_job:
            numbers = range(slot * self.devices_per_job, (slot + 1) * self.devices_per_job)
            given = environment.get("CUDA_VISIBLE_DEVICES")  # of a scheduler, or to leave GPUs to others
            seen = [name for name in (given or "").split(",") if name.strip()]
            require(given is None or len(seen) >= numbers.stop, f"{self.devices_per_job} GPUs a job, {slot + 1} jobs or more",
                    f"CUDA_VISIBLE_DEVICES={given}", "ask for fewer --jobs or --devices-per-job")  # fmt: skip
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(n) if given is None else seen[n] for n in numbers)
        return environment

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.say("stopping: the training processes save and end")
        self._pass_on(insist=self._stopping.is_set())
        self._stopping.set()

    def _pass_on(self, *, insist: bool = False) -> None:
        """Stop the trainers: by a signal where one is our child, else by its file, because launchers kill the trainers of a
        step that takes long soon after a signal (docs/training.md). ``insist``: by a signal in any case."""
        for stop_file, child in list(self._children.items()):
            if insist or len(self.sweep.launcher) == 1:
                child.terminate()
            else:
                Path(stop_file).touch()


def _with_branches(trunk: SweepRun, runs: Sequence[SweepRun]) -> Iterator[SweepRun]:
    """A run, and when it is finished its branches among ``runs``."""
    yield trunk
    if is_finished(trunk):
        yield from (run for run in runs if run.trunk is not None and run.trunk.name == trunk.name)


def _status(child: subprocess.Popen, seconds: float | None) -> int | None:
    """Exit status of a process; None where it goes on for longer than ``seconds``."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _note(run: SweepRun, record: dict[str, object]) -> None:
    """Append to the run's attempts; a line torn by a kill is ended first."""
    file = run.folder / "attempts.jsonl"
    torn = file.exists() and not file.read_bytes().endswith(b"\n")
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(("\n" if torn else "") + json.dumps(record) + "\n")


def last_line(log: Path) -> str:
    """What a program said last: its error, where there is one (launchers print more below it), else its last line."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        attempt = file.read().decode(errors="replace").rpartition("\n$ ")[2].partition("\n")[2]
    lines = [line.strip() for line in attempt.split("\n") if line.strip()]
    *_, last = "no output", *lines[-1:], *(line for line in lines if line.startswith("error: "))
    return last


def command_line(sweep: Sweep, run: SweepRun) -> list[str]:
    """The words that start one run; variables such as $SLURM_NNODES in the launcher are filled in."""
    # Those of this environment, on PATH or not, also behind srun. Our torchrun ends with the status of its processes.
    found = {
        "python": [sys.executable],
        "torchrun": [sys.executable, *_program("tools/_torchrun.py", "megatron.commands.torchrun")],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed"))],
    }
    words = [part for word in sweep.launcher for part in found.get(word, [os.path.expandvars(word)])]
    objective = "mdm" if run.program == "pretrain_mdm.py" else "ar"
    program = _program(run.program, "megatron", "train", "--objective", objective)
    if "deepspeed" in sweep.launcher:
        program = [{"-m": "--module"}.get(word, word) for word in program]
    return [*words, *program, *run.arguments()]


def _program(script: str, *module: str) -> list[str]:
    """What stands after the interpreter to start a program: its script, or its module where there is no checkout."""
    path = ROOT / script
    return [str(path)] if path.is_file() else ["-m", *module]


def make_subsets(sweep: Sweep, runs: Sequence[SweepRun], say: Callable[[str], None] = print) -> None:
    """Cut the missing data subsets from the sweep's source with tools/make_subset.py (complete or absent).

    A subset that another process (a task of the same array) is cutting is waited for.

    Raises:
        Failure: the tool failed.
    """
    if sweep.subset_source is None:
        return
    for prefix, tokens in sorted({(str(run.flags["train-data-path"]), run.unique_tokens) for run in runs}):
        if Path(prefix + ".idx").exists():
            continue
        waiting = f"waiting for the subset {prefix}, which another process is cutting"
        with one_at_a_time(Path(prefix + ".lock"), waiting=partial(say, waiting)):
            if not Path(prefix + ".idx").exists():
                say(f"cutting {tokens:,} tokens from {sweep.subset_source}")
                _cut(sweep.subset_source, prefix, tokens)


def _cut(source: str, prefix: str, tokens: int) -> None:
    tool = [sys.executable, *_program("tools/make_subset.py", "megatron", "data", "subset")]
    words = [*tool, "--input", source, "--output", prefix, "--tokens", str(tokens)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().removeprefix("error: ")
        raise Failure(
            f"no subset of {tokens} tokens could be cut ({reason})", "runs need their data", "mend that and start again"
        )
