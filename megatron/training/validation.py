"""Validation: the same samples and the same noise every time; sums a (sample, document), from which every error follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from megatron.data.dataset import BlendedDataset, GPTDataset, build_dataset
from megatron.data.loader import build_loader, build_packing, micro_batches
from megatron.model.arithmetic import parameters_for_compute
from megatron.objectives.base import NO_BOUND, CausalDecoding, Objective, is_exact
from megatron.parallel.connection import Connection
from megatron.runs.provenance import this_attempt
from megatron.runs.record import ValidRow, write_evaluation
from megatron.statistics import OVER_DOCUMENTS, ValidationSums, mean_loss
from megatron.training.deepspeed.engine import Engine
from megatron.training.observer import Observer
from megatron.training.plan import Plan
from megatron.training.progress import Progress
from megatron.training.reporting import Screen
from megatron.training.setup import build, introduce
from megatron.training.stop import StopRequest

if TYPE_CHECKING:
    from megatron.training.folder import RunFolder

# The order of validation samples does not follow --seed: runs with different seeds are judged on the same samples.
VALIDATION_SEED = 1234
# Micro-batches in one pass of the pipeline: enough to fill it, few enough to keep the results of a pass small.
MICRO_BATCHES_PER_PASS = 8


class Probe(Protocol):
    """Something else that is measured with every validation (``--gap-task``)."""

    def __call__(self, plan: Plan, engine: Engine) -> Callable[[], dict[str, Any]]:
        """Prepare on a built engine; the result is called with every validation and gives fields of its row."""
        ...


class Validator:
    """Validates a run, where it has validation data."""

    def __init__(self, plan: Plan, engine: Engine, *, probe: Probe | None, screen: Screen) -> None:
        """Args:
        plan: the run.
        engine: holds the model.
        probe: what else is measured.
        screen: hears when there are fewer samples than were asked for.
        """
        self.plan, self.engine, self.objective = plan, engine, plan.objective
        self.eval_interval = plan.settings.run.eval_interval
        self._dataset: GPTDataset | BlendedDataset | None = None
        if not plan.sources.valid or plan.settings.run.eval_iters == "0":
            return
        self._dataset = self._open(screen)
        self._packing = build_packing(plan.settings.data)
        self._halves: np.ndarray | None = None
        self._probe = None if plan.settings.run.gap_task is None or probe is None else probe(plan, engine)

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether the run validates after this step."""
        if self._dataset is None:
            return False
        return is_last or (self.eval_interval is not None and step > 0 and step % self.eval_interval == 0)

    def run(self, folder: RunFolder, stop: StopRequest) -> str | None:
        """Validate and record it. Returns why it was broken off, or None."""
        measured = self.measure(stop)
        if measured is None:
            return stop.reason
        row, sums = measured
        folder.add_validation(ValidRow(**folder.position(), **row, best=False), lambda: sums.with_halves(self.halves()))
        return None

    def measure(self, stop: StopRequest | None = None) -> tuple[dict[str, Any], ValidationSums] | None:
        """Average the loss over samples and noise draws; a collective call, the same result on every rank.

        Args:
            stop: looked at between passes; None: never.

        Returns:
            Fields of a :class:`ValidRow` and the sums behind them; None when it was broken off.
        """
        assert self._dataset is not None
        evaluated = self.objective.for_eval()
        draws = 1 if is_exact(evaluated) else self.plan.settings.run.num_mc
        entries: list[tuple[np.ndarray, ...]] = []
        for draw in range(draws):
            view = self.objective.for_eval(draw, draws)
            with self.engine.evaluating(view):
                if not self._one_draw(view, entries, stop):
                    return None
        gathered = [entry for part in self.engine.context.gather_objects(entries) for entry in part]
        columns = [np.concatenate(column) for column in zip(*gathered)]
        sums = ValidationSums.collect(*columns, draws=0 if is_exact(evaluated) else draws)
        return {**self._fields(sums, evaluated.label, draws), **({} if self._probe is None else self._probe())}, sums

    def _open(self, screen: Screen) -> GPTDataset | BlendedDataset:
        """The validation samples, each once: asking for more than there are gives them all."""
        plan = self.plan
        arguments: dict[str, Any] = {
            "seq_length": plan.shape.seq_length,
            "seed": VALIDATION_SEED,
            "name": "valid",
            "cache_path": plan.settings.data.data_cache_path,
        }
        eval_iters = plan.settings.run.eval_iters
        wanted = None if eval_iters == "full" else int(eval_iters) * plan.layout.global_batch_size
        everything = build_dataset(plan.sources.valid, num_samples=None, **arguments)
        if wanted is None or wanted >= everything.num_samples:
            if wanted is not None and wanted > everything.num_samples:
                screen.print(
                    f"validation: all {everything.num_samples} samples, each once (--eval-iters asks for {wanted})"
                )
            return everything
        return build_dataset(plan.sources.valid, num_samples=wanted, **arguments)

    def _one_draw(self, objective: Objective, entries: list[tuple[np.ndarray, ...]], stop: StopRequest | None) -> bool:
        """Sums of this rank's samples under one draw of the noise. Returns whether it was carried through."""
        assert self._dataset is not None
        context, dataset, layout = self.engine.context, self._dataset, self.plan.layout
        share = {"micro_batch_size": layout.micro_batch_size, "first_sample": 0, "last_sample": dataset.num_samples}
        ids = micro_batches(**share, dp_rank=context.dp.rank, dp_size=context.dp.size)
        workers = self.plan.settings.data.num_workers
        with build_loader(dataset, objective, context, **share, num_workers=workers, packing=self._packing) as batches:
            while indices := [i for micro_batch in islice(ids, MICRO_BATCHES_PER_PASS) for i in micro_batch]:
                losses = self.engine.eval_step(batches, num_micro_batches=len(indices) // layout.micro_batch_size)
                if context.tp.rank == 0 and losses.numel():
                    entries.append(self._sums(np.array(indices), losses.double().numpy(), objective))
                if stop is not None and stop.poll() is not None:
                    return False
        return True

    def _sums(self, indices: np.ndarray, losses: np.ndarray, objective: Objective) -> tuple[np.ndarray, ...]:
        """Entries of :class:`ValidationSums` from the losses of tokens.

        Args:
            indices: [rows] samples; those past the end fill up the last round and are dropped.
            losses: [rows, seq] what each label adds.
            objective: tells which token of the sample a label is.
        """
        assert self._dataset is not None
        kept = indices < self._dataset.num_samples
        first_label = 1 if isinstance(objective.decoding, CausalDecoding) else 0
        seq_length = losses.shape[1]
        documents = np.stack([self._dataset.pieces(index).documents for index in indices[kept].tolist()])
        documents = documents[:, first_label : first_label + seq_length]
        if self._packing.eod_id is not None:
            inputs = np.stack([self._dataset[index] for index in indices[kept].tolist()])[:, :seq_length]
            documents = np.where(inputs == self._packing.eod_id, -1, documents)
        sums = ValidationSums.of_tokens(indices[kept], documents, losses[kept])
        return sums.sample, sums.document, sums.tokens, sums.loss

    def _fields(self, sums: ValidationSums, label: str, draws: int) -> dict[str, Any]:
        """Fields of a validation row."""
        assert self._dataset is not None
        estimate = mean_loss(sums)
        return {
            "nll": estimate.value,
            "nll_se": estimate.error if math.isfinite(estimate.error) else None,
            "label": label,
            "num_mc": draws,
            "num_samples": sums.num_samples,
            "num_documents": sums.num_documents,
            "se_kind": OVER_DOCUMENTS,
            **likelihood_fields(estimate.value, label=label, bytes_per_token=self._dataset.text_bytes_per_token),
        }

    def halves(self) -> np.ndarray:
        """Whether each validation document is of the selection half, bool [documents]."""
        from megatron.data.identity import selection_half

        assert self._dataset is not None
        if self._halves is None:
            parts = self._dataset.datasets if isinstance(self._dataset, BlendedDataset) else [self._dataset]
            self._halves = selection_half(*(part.documents for part in parts))
        return self._halves


def likelihood_fields(nll: float, *, label: str, bytes_per_token: float | None) -> dict[str, float | None]:
    """``ppl`` and ``bits_per_byte``: names for a likelihood, so None for a loss that is none, or where bytes are unknown."""
    is_likelihood = label != NO_BOUND
    per_byte = None if bytes_per_token is None else nll / math.log(2) / bytes_per_token
    return {
        "ppl": math.exp(min(nll, 700.0)) if is_likelihood else None,
        "bits_per_byte": per_byte if is_likelihood else None,
    }


def evaluate_checkpoint(
    plan: Plan, connection: Connection, *, observer: Observer | None = None, probe: Probe | None = None
) -> str | None:
    """Validate a checkpoint (``--skip-train``): a record of its own beside the run, which stays as it is.

    Returns:
        Why it was broken off, or None.
    """
    context, engine, start = build(plan, connection, observer)
    screen = Screen(total_steps=1, first_step=0, enabled=context.is_first_rank)
    unique_tokens = start.manifest.get("unique_tokens", plan.sources.unique_tokens)
    progress = Progress.of(start.manifest, unique_tokens=unique_tokens) if start.manifest else Progress()
    introduce(plan, start, progress, screen, label=plan.objective.for_eval().label)
    validator = Validator(plan, engine, probe=probe, screen=screen)
    with StopRequest(context, minutes=plan.settings.run.exit_duration_in_mins) as stop:
        measured = validator.measure(stop)
        if measured is None:
            screen.print(f"stopped by {stop.reason}; nothing was recorded")
            return stop.reason
    fields, sums = measured
    position = progress.position(
        unique_tokens=unique_tokens, parameters=parameters_for_compute(plan.shape, plan.vocabulary.size)
    )
    row = ValidRow(**position, **fields, best=False)
    screen.valid_line(row)
    if context.is_first_rank:
        path = _record(plan, start.tag, row, sums.with_halves(validator.halves()), context.device)
        screen.print(f"recorded in {path}")
    return None


def _record(plan: Plan, tag: Path | None, row: ValidRow, sums: ValidationSums, device: torch.device) -> Path:
    run = plan.settings.run
    name = f"step{row.step}_{row.label.split()[0].lower()}_{row.num_mc}x{row.num_samples}"
    record = {
        "format": 1,
        "run_id": plan.start.manifest.get("run_id"),
        "checkpoint": None if tag is None else tag.name,
        "objective": plan.settings.objective.objective,
        "protocol": {"eval_iters": run.eval_iters, "num_mc": row.num_mc, "num_samples": row.num_samples,
                     "seq_length": plan.shape.seq_length, "valid": plan.sources.fingerprints["valid"]},
        "result": asdict(row),
        "attempt": asdict(this_attempt(layout=plan.layout.sizes(), device=device)),
    }  # fmt: skip
    path = write_evaluation(plan.run_dir, record, name=name)
    sums.save(path.with_suffix(".npz"))
    return path
