"""Validation: the same samples and the same noise every time; sums a (sample, document), from which every error follows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from megatron.config.schema import EXACT_COUNT
from megatron.data.dataset import BlendedDataset, GPTDataset, build_dataset
from megatron.data.identity import selection_half
from megatron.data.loader import Share, build_loader, build_packing
from megatron.objectives.base import EXACT, NO_BOUND, Objective, is_exact
from megatron.randomness import VALIDATION_SEED
from megatron.runs.record import VALID, VALID_AVERAGE, WEIGHTS, ValidRow
from megatron.screen import Progress
from megatron.statistics import Estimate, ValidationSums, mean_loss
from megatron.training.engine import Engine
from megatron.training.folder import RunFolder
from megatron.training.plan import Plan
from megatron.training.reporting import Screen
from megatron.training.stop import StopRequest

# Micro-batches in one pass of the pipeline: enough to fill it, few enough to keep the results of a pass small.
MICRO_BATCHES_PER_PASS = 8
# Something else that is measured with every validation (``--gap-task``): it prepares itself on a built engine, and what it
# returns is called each time and gives fields of the row.
Probe = Callable[[Plan, Engine], Callable[[], dict[str, Any]]]
# Fields of a ValidRow, and the sums behind them.
Measured = tuple[dict[str, Any], ValidationSums]
# Columns of ValidationSums by micro-batches: of the objective's own loss, and of one that its training adds.
Entries = tuple[list[tuple[np.ndarray, ...]], list[tuple[np.ndarray, ...]]]


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
        names = ("weight", "idx_sha256", "bin_sample")
        content = [[part[name] for name in names] for part in plan.sources.fingerprints["valid"]]
        self._data = hashlib.sha256(json.dumps([content, plan.shape.seq_length]).encode()).hexdigest()[:12]
        iterations = plan.settings.run.eval_iters
        self.has_data = bool(plan.sources.valid) and (iterations == "full" or int(iterations) > 0)
        if self.has_data:
            self._dataset = _open(plan, screen)
            self._packing = build_packing(plan.settings.data)
            self._probe = None if plan.settings.run.gap_task is None or probe is None else probe(plan, engine)

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether the run validates after this step."""
        interval = self.plan.settings.run.eval_interval
        return self.has_data and (is_last or (interval is not None and step > 0 and step % interval == 0))

    def run(self, folder: RunFolder, stop: StopRequest) -> str | None:
        """Validate and record it. Returns why it was broken off, or None."""
        measured = self.measure(stop)
        if measured is None:
            return stop.reason
        rows = [ValidRow(**folder.position(), **fields, best=False) for fields, _ in measured]
        folder.add_validation(rows, lambda: [sums.with_halves(self.halves) for _, sums in measured])
        return None

    def measure(self, stop: StopRequest) -> list[Measured] | None:
        """Average the loss over samples and noise draws; a collective call, the same result on every rank.

        Args:
            stop: looked at between passes.

        Returns:
            What was measured, first of the averaged weights where a run keeps them, last of the trained ones; None when it was
            broken off.
        """
        found = []
        for kind in self._kinds:
            with self.engine.averaged() if kind == VALID_AVERAGE else nullcontext():
                measured = self._measure(kind, stop)
            if measured is None:
                return None
            found.append(measured)
        return found

    @property
    def _kinds(self) -> list[str]:
        """Kinds of rows of a validation. An evaluation has the weights that it loaded, and trains none."""
        if self.plan.settings.run.skip_train:
            return [kind for kind, weights in WEIGHTS.items() if weights == self.plan.start.weights]
        return [VALID] if self.engine.shards.average is None else [VALID_AVERAGE, VALID]

    def _measure(self, kind: str, stop: StopRequest) -> Measured | None:
        """Fields of a row of this kind, and the sums behind them; None when it was broken off."""
        evaluated, beside = self.objective.for_eval(), self.objective.beside
        measured = self._losses(evaluated, stop)
        other = None if beside is None or measured is None else self._losses(beside, stop)
        if measured is None or (beside is not None and other is None):
            return None
        sums, added = measured
        draws, estimator = self._draws(evaluated)
        estimate, label = mean_loss(sums), evaluated.label
        # Without the ends of documents, which have no bytes, a scored token has more than one of the data: how many is not known.
        rate = None if self._packing.eod_id is not None else self._dataset.text_bytes_per_token
        fields = {
            "kind": kind,
            "nll": estimate.value,
            "nll_se": estimate.error if math.isfinite(estimate.error) else None,
            "label": label,
            "estimator": estimator,
            "num_mc": draws,
            "num_samples": sums.num_samples,
            "num_documents": sums.num_documents,
            "data": self._data,
            **likelihood_fields(estimate.value, label=label, bytes_per_token=rate),
            **({} if added is None else added_fields(mean_loss(added), label=EXACT)),
            **({} if beside is None or other is None else added_fields(mean_loss(other[0]), label=beside.label)),
        }
        return fields | ({} if self._probe is None else self._probe()), sums

    def _draws(self, evaluated: Objective) -> tuple[int, str]:
        """How many draws of the noise are averaged, and by which estimator; an exact likelihood has one and none."""
        run = self.plan.settings.run
        return (1, "") if is_exact(evaluated) else (run.num_mc, str(run.valid_estimator))

    def _losses(self, evaluated: Objective, stop: StopRequest) -> tuple[ValidationSums, ValidationSums | None] | None:
        """Sums of the objective's own loss, and of one that its training adds; None when it was broken off."""
        draws, estimator = self._draws(evaluated)
        entries: Entries = [], []
        context, one_round = self.engine.context, self.plan.layout.micro_batch_size * self.engine.context.dp.size
        # What fills up the last round is read, too.
        total = draws * math.ceil(self._dataset.num_samples / one_round) * one_round
        with Progress("validation", total, unit="samples", enabled=context.is_first_rank) as progress:
            for draw in range(draws):
                view = evaluated.for_eval(draw, draws)
                with self.engine.evaluating(view):
                    if not self._one_draw(view, entries, stop, progress):
                        return None
        gathered = context.gather_objects(entries)
        own, added = ([entry for part in gathered for entry in part[kind]] for kind in (0, 1))
        return _collect(own, draws=draws if estimator else 0), _collect(added, draws=0) if added else None

    def _one_draw(self, objective: Objective, entries: Entries, stop: StopRequest, progress: Progress) -> bool:
        """Sums of this rank's samples under one draw of the noise. Returns whether it was carried through."""
        context, dataset, layout, seq = self.engine.context, self._dataset, self.plan.layout, self.plan.shape.seq_length
        share = Share(context.dp, layout.micro_batch_size, dataset.num_samples)
        ids = iter(share)
        how: dict[str, Any] = {
            "device": context.device,
            "num_workers": self.plan.settings.data.num_workers,
            "packing": self._packing,
            "timeout_seconds": 60 * self.plan.settings.parallel.distributed_timeout_minutes,
        }
        with build_loader(dataset, objective, share, **how) as batches:
            while indices := [i for micro_batch in islice(ids, MICRO_BATCHES_PER_PASS) for i in micro_batch]:
                losses = self.engine.eval_step(batches, num_micro_batches=len(indices) // layout.micro_batch_size)
                # All of a pass may lie past the end, where another rank has the last samples.
                if context.tp.rank == 0 and losses.numel() and indices[0] < dataset.num_samples:
                    where, values = np.array(indices), losses.double().numpy()
                    entries[0].append(self._sums(where, values[:, :seq], objective))
                    if values[:, seq:].any():
                        entries[1].append(self._sums(where, values[:, seq:], None))
                progress.update(len(indices) * context.dp.size)
                if stop.poll() is not None:
                    return False
        return True

    def _sums(self, indices: np.ndarray, losses: np.ndarray, objective: Objective | None) -> tuple[np.ndarray, ...]:
        """Entries of :class:`ValidationSums` from the losses of tokens.

        Args:
            indices: [rows] samples; those past the end fill up the last round and are dropped.
            losses: [rows, seq] what each label adds.
            objective: tells which token of the sample a label is; None: the next one, as in all that is added.
        """
        kept = indices < self._dataset.num_samples
        first_label = 1 if objective is None else objective.decoding.shift
        seq_length = losses.shape[1]
        documents = np.stack([self._dataset.pieces(index).documents for index in indices[kept].tolist()])
        weights = np.ones((len(documents), seq_length))
        if objective and self.plan.settings.run.valid_estimator == EXACT_COUNT:
            weights = objective.token_weights(indices[kept], seq_length)
        documents = documents[:, first_label : first_label + seq_length]
        if self._packing.eod_id is not None:
            inputs = np.stack([self._dataset[index] for index in indices[kept].tolist()])[:, :seq_length]
            documents = np.where(inputs == self._packing.eod_id, -1, documents)
        sums, excess = (ValidationSums.of_tokens(indices[kept], documents, x) for x in (losses[kept], weights - 1))
        return sums.sample, sums.document, sums.tokens, sums.loss, excess.loss

    @cached_property
    def halves(self) -> np.ndarray:
        """Whether each validation document is of the selection half, bool [documents]."""
        parts = self._dataset.datasets if isinstance(self._dataset, BlendedDataset) else [self._dataset]
        return selection_half(*(part.documents for part in parts))


def _open(plan: Plan, screen: Screen) -> GPTDataset | BlendedDataset:
    """The validation samples, each once: asking for more than there are gives them all."""
    options: dict[str, Any] = {
        "seq_length": plan.shape.seq_length,
        "seed": VALIDATION_SEED,
        "name": "valid",
        "cache_path": plan.settings.data.data_cache_path,
    }
    everything = build_dataset(plan.sources.valid, num_samples=None, **options)
    if plan.settings.run.eval_iters == "full":
        return everything
    there, wanted = everything.num_samples, int(plan.settings.run.eval_iters) * plan.layout.global_batch_size
    if wanted > there:
        screen.print(f"validation: all {there} samples, each once (--eval-iters asks for {wanted})")
    return everything if wanted >= there else build_dataset(plan.sources.valid, num_samples=wanted, **options)


def _collect(entries: list[tuple[np.ndarray, ...]], *, draws: int) -> ValidationSums:
    return ValidationSums.collect(*(np.concatenate(column) for column in zip(*entries)), draws=draws)


def added_fields(estimate: Estimate, *, label: str) -> dict[str, float | None]:
    """What the same weights are worth in another way: as AR the exact NLL of the next token, else the bound of masked
    diffusion; nats, with the error over documents."""
    name, error = "ar" if label == EXACT else "mdm", estimate.error if math.isfinite(estimate.error) else None
    return {f"{name}_nll": estimate.value, f"{name}_nll_se": error}


def likelihood_fields(nll: float, *, label: str, bytes_per_token: float | None) -> dict[str, float | None]:
    """``ppl`` and ``bits_per_byte``: names for a likelihood, so None for a loss that is none, or where bytes are unknown."""
    if label == NO_BOUND:
        return {"ppl": None, "bits_per_byte": None}
    per_byte = None if bytes_per_token is None else nll / math.log(2) / bytes_per_token
    return {"ppl": math.exp(min(nll, 700.0)), "bits_per_byte": per_byte}
