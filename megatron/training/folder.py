"""What a training run writes beside its checkpoints. Every rank has one; the first one's writes, the others' share answers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from types import TracebackType
from typing import Any
from uuid import uuid4

from megatron.checkpoint.files import BEST, VALIDATIONS
from megatron.checkpoint.upkeep import remove_old_checkpoints, set_back
from megatron.checkpoint.writer import Saving
from megatron.config import config_to_dict
from megatron.data.blend import parse_blend
from megatron.data.dataset import text_bytes_per_token
from megatron.errors import Failure
from megatron.files import make_folder, replace_file, written_whole
from megatron.model.arithmetic import total_parameters
from megatron.parallel.context import ParallelContext
from megatron.runs.provenance import now, this_attempt
from megatron.runs.record import RECORD, STOPPED, RunRecord, TrainRow, ValidRow
from megatron.statistics import ValidationSums
from megatron.training.engine import Engine
from megatron.training.plan import Plan, Sources, Start
from megatron.training.progress import Interval, Progress
from megatron.training.reporting import MetricsLog, Screen, measured

BRANCH = "megatron.training.branch"  # imported where one begins


class RunFolder:
    """The run directory of a run that trains.

    Attributes:
        run_id: of this run alone; the same on every rank.
        validated_steps: steps whose validation is recorded, the same on every rank.
        is_best: whether the last validation is the best so far, the same on every rank.
    """

    def __init__(
        self, plan: Plan, start: Start, progress: Progress, context: ParallelContext, *, screen: Screen
    ) -> None:
        """Continue the record of the run, or begin one; a collective call.

        Args:
            plan: the run.
            start: the checkpoint that was loaded, if any.
            progress: where the run stands.
            context: this process.
            screen: for people.
        """
        self.plan, self.progress, self.context, self.screen = plan, progress, context, screen
        self.is_best = False
        self._saving: tuple[Saving, float, float] | None = None  # when it began, and how long training waited then
        self._log: MetricsLog | None = None
        self._record: RunRecord | None = None
        if context.is_first_rank:
            (plan.run_dir / STOPPED).unlink(missing_ok=True)
            moved: list[str] = []
            if start.is_continued and start.tag is not None and plan.settings.run.save is not None:
                moved = set_back(plan.run_dir, start.tag)  # with the metrics: a kill must not part the two
            for line in moved:
                screen.print(line)
            self._record = self._continued(start)
            self._record.write(plan.run_dir)
            for line in import_module(BRANCH).announce(self._record, plan.run_dir) if start.is_branching else []:
                screen.print(line)
            is_branch = bool(moved or start.changed)
            self._log = MetricsLog(plan.run_dir, plan.settings, last_step=progress.step, is_branch=is_branch)
            self._remember_best()
        own = (self._record and self._record.run_id, self._log and self._log.file.validated)
        self.run_id, self.validated_steps = context.gather_objects(own)[0]

    def position(self) -> dict[str, Any]:
        """The fields that every row begins with."""
        return self.progress.position(unique_tokens=self.plan.sources.unique_tokens, compute=self.plan.compute)

    def write(self, row: TrainRow) -> None:
        """Record and print a log line."""
        if self._log is not None:
            self._log.write(row)
        self.screen.train_line(row)

    def add_validation(self, rows: list[ValidRow], sums: Callable[[], list[ValidationSums]]) -> None:
        """Record and print a validation, and remember the best one.

        Args:
            rows: its lines, that of the trained weights last.
            sums: makes the sums a (sample, document) behind each; asked on the first rank only.
        """
        if self._log is not None:
            folder = self.plan.run_dir / VALIDATIONS
            paths = [folder / f"step{row.step}{row.suffix}.npz" for row in rows]
            with written_whole(paths[0]):
                make_folder(folder)
            for path, own in zip(paths, sums()):
                own.save(path)
            best = self._log.file.best(*rows)
            rows = [replace(row, best=best is row, sums=f"{VALIDATIONS}/{path.name}") for row, path in zip(rows, paths)]
            for row in rows:
                self._log.write(row)
            self._remember_best()
        self.is_best = self.context.gather_objects(any(row.best for row in rows))[0]
        for row in rows:
            self.screen.valid_line(row)
        self._prune()

    def save(self, engine: Engine, interval: Interval, *, at_once: bool) -> bool:
        """Write a checkpoint if one is due, and complete one that was begun; a collective call.

        Args:
            engine: weights and moments.
            interval: log interval in the middle of which the run may be.
            at_once: whatever ``--save-interval`` says.

        Returns:
            Whether it was written; with ``--async-save``, begun.
        """
        plan, progress, run = self.plan, self.progress, self.plan.settings.run
        is_due = at_once or (run.save_interval is not None and progress.step % run.save_interval == 0)
        is_due = is_due and run.save is not None
        if self._saving is not None and (is_due or self._saving[0].is_written()):
            self._complete()
        if not is_due:
            return False
        started = time.perf_counter()
        interval.store()
        state = {
            **asdict(progress),
            "run_id": self.run_id,
            "noise_seed": plan.seeds.noise,
            "noise_scheme": plan.seeds.scheme,
            "unique_tokens": plan.sources.unique_tokens,
            "data": plan.sources.fingerprints,
            "tokenizer": plan.vocabulary.tokenizer,
            "config": plan.settings,
            "branch": plan.start.branch and asdict(plan.start.branch),
        }
        saving = engine.save(plan.run_dir, state)
        self._saving = saving, started, time.perf_counter() - started
        if not run.async_save:
            self._complete()
        return True

    def _complete(self) -> None:
        """Publish the checkpoint that was begun, if any; a collective call.

        Raises:
            Failure: a rank could not write its file.
        """
        if self._saving is None:
            return
        (saving, started, seconds), self._saving = self._saving, None
        tag, took = saving.publish(), time.perf_counter() - started
        beside = f" ({seconds:.1f} s of them waited for)" if self.plan.settings.run.async_save else ""
        self.screen.print(f"saved {tag} in {took:.1f} s{beside}")
        self._prune()

    def _remember_best(self) -> None:
        """Name the best validation of this branch, as its metrics tell it, in best.json; on the first rank."""
        assert self._log is not None
        best, path, progress = self._log.file.best(), self.plan.run_dir / BEST, self.progress
        progress.best_step, progress.best_text = (None, "") if best is None else (best.step, measured(best))
        if best is not None:
            fields = ("step", "weights", "nll", "nll_se", "label", "estimator", "num_mc")
            replace_file(path, json.dumps({name: getattr(best, name) for name in fields}))
        else:
            path.unlink(missing_ok=True)

    def _prune(self) -> None:
        """Delete checkpoints beyond ``--keep-last``, but not the best one; and none until that one is there, if it is to come: a
        kill would leave neither it nor the best one before it."""
        run, best = self.plan.settings.run, self.progress.best_step
        is_coming = self._saving is not None or (run.save_best and best == self.progress.step)
        is_early = is_coming and not (self.plan.run_dir / f"global_step{best}").is_dir()
        if run.keep_last is not None and self._record is not None and not is_early:
            for line in remove_old_checkpoints(self.plan.run_dir, keep_last=run.keep_last, keep={best}):
                self.screen.print(line)

    def end(self, reason: str | None) -> None:
        """Complete the last checkpoint, record how the run ended, and say it in the last line; a collective call."""
        self._complete()
        progress, run_dir = self.progress, self.plan.run_dir
        is_saved = self.plan.settings.run.save is not None
        if self._record is not None:
            ended = {"reason": reason or "end", "step": progress.step, "time": now()}
            attempts = [*self._record.attempts[:-1], replace(self._record.attempts[-1], ended=ended)]
            self._record = replace(self._record, attempts=attempts)
            self._record.write(run_dir)
            if reason is not None:
                stopped = {"reason": reason, "step": progress.step, "saved": is_saved}
                replace_file(run_dir / STOPPED, json.dumps(stopped))
        if reason is not None:
            saved = f"checkpoint of step {progress.step} saved" if is_saved else "no --save, so nothing was saved"
            self.screen.print(f"stopped by {reason} at step {progress.step}; {saved}")
            return
        best = f"; best validation {progress.best_text} at step {progress.best_step}" if progress.best_text else ""
        self.screen.print(f"done: {progress.step} steps{best}; metrics in {run_dir}")

    def leave(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Flush and close the sinks. After an error a process alone completes the checkpoint that it began before; several do
        not, because the others may be gone."""
        if isinstance(error, Exception) and self.context.world_size == 1:
            with suppress(Failure):
                self._complete()
        if self._log is not None:
            self._log.close()

    def _continued(self, start: Start) -> RunRecord:
        """The record of this run with one more attempt, or a new one."""
        plan, schedule = self.plan, self.plan.schedule
        is_same = start.is_continued and not start.is_branching
        found = RunRecord.read(plan.run_dir)
        if found is None and (path := plan.run_dir / RECORD).exists():
            path.replace(path.with_suffix(".json.damaged"))
            self.screen.print(f"warning: {path} cannot be read; it is kept as {path.name}.damaged and begun anew")
        tokens, unique_tokens = schedule.train_samples * plan.shape.seq_length, plan.sources.unique_tokens
        saved_id = start.manifest.get("run_id") if is_same else None
        attempt = replace(
            this_attempt(layout=plan.layout.sizes(), device=self.context.device),
            from_step=self.progress.step,
            from_samples=self.progress.consumed_samples,
            from_tag=None if start.tag is None else str(start.tag),
            changed={name: list(values) for name, values in start.changed.items()},
        )
        length: dict[str, Any] = {
            "unique_tokens": unique_tokens,
            "train_samples": schedule.train_samples,
            "train_tokens": tokens,
            "epochs": tokens / unique_tokens if unique_tokens else 0.0,
            "train_flops": plan.compute * tokens,
        }
        if found is not None and is_same:  # else it was killed before its first checkpoint, and begins again
            run_id = found.run_id or saved_id or uuid4().hex
            return replace(found, **length, run_id=run_id, attempts=[*found.attempts, attempt])
        return RunRecord(
            objective=str(plan.settings.objective.objective),
            label=plan.objective.for_eval().label,
            train_label=plan.objective.label,
            config=config_to_dict(plan.settings),
            parameters={**total_parameters(plan.shape), "for_compute": plan.parameters},
            **length,
            layout=attempt.layout,
            versions=attempt.versions,
            device=attempt.device,
            started=attempt.started,
            text_bytes_per_token=bytes_per_token(plan.sources),
            run_id=saved_id or uuid4().hex,
            noise_scheme=plan.seeds.scheme,
            data=plan.sources.fingerprints,
            tokenizer=plan.vocabulary.tokenizer,
            attempts=[attempt],
            origins=dict(plan.origins),
            branch=start.branch,
        )


def bytes_per_token(sources: Sources) -> float | None:
    """Bytes of text per token of the training data (the validation data's without any), where one prefix records them."""
    prefixes = [prefix for _, prefix in parse_blend(sources.train or sources.valid)]
    return text_bytes_per_token(prefixes[0]) if len(prefixes) == 1 else None
