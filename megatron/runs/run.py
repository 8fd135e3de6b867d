"""One run as reports, fits and sweeps see it: what was asked for, its training log and its learning curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config.schema import WEIGHT
from megatron.errors import UserError
from megatron.runs.counts import format_count
from megatron.runs.record import OVER_DOCUMENTS, Branch, Position, branch_of, kind_of
from megatron.runs.sums import halves, load_sums
from megatron.statistics import ValidationSums, mean_loss

OVER_SAMPLES = "samples"
"""``se_kind`` of older records, which took samples for independent: too small where they share documents."""


@dataclass(frozen=True)
class Validation(Position):
    """One validation.

    Attributes:
        step, samples, tokens, epoch, flops: where in the training.
        nll, nll_se: loss and its standard error, nats per token.
        label: what the loss is: "NLL (exact)", "NLL bound", or another text that is neither.
        num_mc, num_samples: noise draws a sample, and samples.
        bits_per_byte: None where the data do not say how many bytes of text a token stands for.
        num_documents: documents validated on; None in records that do not say.
        se_kind: what ``nll_se`` takes for independent, "documents" or (older records) "samples".
        estimator: how a bound was estimated (``--valid-estimator``); "" where the loss is exact.
        protocol: fingerprint of the data; "" where it was not recorded.
        sums: file under the run directory with the sums a (sample, document), or None.
        weights: kind of the weights that were validated: as trained ("weight"), or their average ("ema").
        degrees: of freedom of ``nll_se`` where few seeds say it; records do not tell those of documents.
    """

    nll: float
    nll_se: float
    label: str
    num_mc: int
    num_samples: int
    bits_per_byte: float | None
    num_documents: int | None = None
    se_kind: str = OVER_SAMPLES
    estimator: str = ""
    protocol: str = ""
    sums: str | None = None
    weights: str = WEIGHT
    degrees: float = math.inf

    @property
    def ppl(self) -> float:
        """Perplexity: exp(nll). Infinite where the exponent overflows."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def conditions(self) -> tuple[str, int, int, str, str]:
        """What must agree between two points of one curve."""
        return self.label, self.num_mc, self.num_samples, self.estimator, self.protocol

    @property
    def kind(self) -> str:
        """Label, draws and estimator, for people."""
        return kind_of(self.label, self.num_mc, self.estimator, self.weights)

    @property
    def full_label(self) -> str:
        """Label, and of which weights where they are averaged."""
        return kind_of(self.label, 1, "", self.weights)

    @property
    def error_unit(self) -> str:
        """What ± is over: "37 documents", or "160 samples"."""
        if self.se_kind == OVER_DOCUMENTS and self.num_documents is not None:
            return f"{self.num_documents:,} documents"
        return f"{self.num_samples:,} samples" if self.num_samples else "what its source does not say"


@dataclass(frozen=True)
class Result:
    """The number that a report gives for a run.

    ``chosen_apart``: the checkpoint was chosen on other documents than the number is of; otherwise the choice makes it look a
    little better than it is. ``degrees``: of freedom of ``nll_se``.
    """

    row: Validation
    nll: float
    nll_se: float
    error_unit: str
    degrees: float
    chosen_apart: bool = False


@dataclass(frozen=True)
class Run:
    """One training run, or an evaluation that was written to a folder of its own.

    Attributes:
        info: run.json.
        train: rows of the training log in order of steps, each with at least ``step`` and ``samples``.
        valid: the learning curve: validations with the most common estimator and data.
        averaged: the curve of the averaged weights, taken as that one was; empty without ``--ema-decay``.
        other_valid: what stands apart from the curve: validations with other settings (a last one with more draws), and
            evaluations of finished checkpoints. They are shown, and touch neither curve nor best.
        problems: what in the records could not be read, in words; see ``unreadable``.
        seeds: the seeds of which this run is the mean (``replicates.py``); empty for one run.
    """

    path: Path
    name: str
    info: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    valid: tuple[Validation, ...]
    other_valid: tuple[Validation, ...] = ()
    problems: tuple[str, ...] = ()
    seeds: tuple[int | None, ...] = ()
    averaged: tuple[Validation, ...] = ()

    @property
    def objective(self) -> str:
        """Name of what was trained."""
        return str(self.info["objective"])

    @property
    def label(self) -> str:
        """What the validation number is: "NLL (exact)", "NLL bound", or another text that is neither."""
        return str(self.info["label"])

    @property
    def is_exact(self) -> bool:
        """Whether the number is a likelihood itself."""
        return is_exact(self.label)

    @property
    def is_likelihood(self) -> bool:
        """Whether the number is a likelihood or a bound on it, so that it may be compared at all."""
        return is_likelihood(self.label)

    @property
    def is_evaluation(self) -> bool:
        """Whether the folder holds evaluations of some checkpoint and no training of its own."""
        return not self.train and not self.valid and bool(self.other_valid)

    @cached_property
    def branch(self) -> Branch | None:
        """Where this run left another one: its curve begins there; epochs, tokens and FLOPs count from that one's beginning."""
        return branch_of(self.info)

    @property
    def origin(self) -> str:
        """Of a branch the run that it left and the step, for people; "" of all others."""
        return f"branch of {Path(self.branch.run).name} at step {self.branch.step:,}" if self.branch else ""

    @property
    def source(self) -> str:
        """Whose run it is, where it was imported; "" for one of our own."""
        return str((self.info.get("imported") or {}).get("source", ""))

    @property
    def parameters(self) -> int:
        """All parameters; where a pipeline run did not count them, the compute formula's."""
        return int(self.info["parameters"].get("total") or self.compute_parameters)

    @property
    def compute_parameters(self) -> int:
        """Parameters N in FLOPs = 6*N*D."""
        return int(self.info["parameters"]["for_compute"])

    @property
    def unique_tokens(self) -> int:
        """Tokens of one epoch; 0 where the run had no training data."""
        return int(self.info["unique_tokens"] or 0)

    @property
    def train_flops(self) -> float:
        """Training compute 6*N*D that the run was asked for; 0 without training data."""
        return float(self.info["train_flops"] or 0)

    @property
    def epochs(self) -> float:
        """Epochs that the run was asked for; 0 without training data."""
        given = self.info.get("epochs")
        if given is None and self.unique_tokens:
            return float(self.info["train_tokens"]) / self.unique_tokens
        return float(given or 0)

    @property
    def seed(self) -> int | None:
        """Seed of the run, of the first one where it is a mean."""
        return self.setting("run", "seed")

    @property
    def size_name(self) -> str:
        """Preset name where the run used one, else the parameter count such as "0.9M"; "" where that is not known."""
        preset = self.setting("model", "model")
        return str(preset) if preset else format_count(self.parameters) if self.parameters else ""

    @property
    def title(self) -> str:
        """Objective and size, for legends and sentences."""
        mean = f" (mean of {len(self.seeds)} seeds)" if self.seeds else ""
        return f"{self.objective.upper()} {self.size_name}".rstrip() + mean + " (imported)" * bool(self.source)

    def setting(self, section: str, name: str) -> Any:
        """One field of the configuration, or None where it was not recorded."""
        return (self.info["config"].get(section) or {}).get(name)

    def curve_of(self, row: Validation) -> tuple[Validation, ...]:
        """The curve that a validation belongs to: of the weights as trained, or of their average."""
        return self.valid if row.weights == WEIGHT else self.averaged

    @cached_property
    def best(self) -> Validation | None:
        """The validation with the lowest finite NLL, of the weights as trained or averaged, or None before the first."""
        finite = [row for row in (*self.valid, *self.averaged) if math.isfinite(row.nll)]
        return min(finite, key=lambda row: row.nll) if finite else None

    @cached_property
    def result(self) -> Result | None:
        """The run's number: the checkpoint chosen on the selection half of the documents and reported on the other, where
        sums of every validation tell the halves apart; else the best validation itself."""
        best = self.best
        if best is None:
            return None
        if self.split is None:
            return Result(best, best.nll, best.nll_se, best.error_unit, best.degrees)
        row, _, report = min(self.split, key=lambda item: mean_loss(item[1]).value)
        reported = mean_loss(report)
        unit = f"{reported.num_documents:,} documents"
        return Result(row, reported.value, reported.error, unit, reported.degrees, chosen_apart=True)

    @property
    def validations(self) -> tuple[Validation, ...]:
        """Every validation that a choice is made from: of the weights as trained, and of their average."""
        return (*self.valid, *self.averaged)

    @cached_property
    def split(self) -> tuple[tuple[Validation, ValidationSums, ValidationSums], ...] | None:
        """Every one of ``validations`` with a finite loss, with the sums of its selection half, on which all choices are made,
        and of its report half; None where one of them has no such sums."""
        found = []
        for row in self.validations:
            if not math.isfinite(row.nll):  # never chosen
                continue
            sums = self.sums(row)
            parts = None if sums is None else halves(sums)
            if parts is None:
                return None
            found.append((row, *parts))
        return tuple(found)

    def sums(self, row: Validation) -> ValidationSums | None:
        """The sums kept beside a validation; None where there are none of just this number, where they are damaged, and for a
        mean of runs."""
        with suppress(UserError):
            sums = self._stored_sums(row)
            return sums if sums and math.isclose(mean_loss(sums).value, row.nll, rel_tol=1e-4) else None
        return None

    def _stored_sums(self, row: Validation) -> ValidationSums | None:
        if self.seeds or row.sums is None or not (self.path / row.sums).is_file():
            return None
        return load_sums(self.path / row.sums)

    @cached_property
    def unreadable(self) -> tuple[str, ...]:
        """What in the files could not be read, in words: of the records, and sums, without which the run goes on."""
        found = list(self.problems)
        for row in (*self.validations, *self.other_valid):
            try:
                self._stored_sums(row)
            except UserError as error:
                found.append(error.given)
        return tuple(found)

    @property
    def samples_done(self) -> int:
        """Samples at the last logged step; 0 before the first."""
        return max((int(row["samples"]) for row in self.train), default=0)

    @property
    def samples_planned(self) -> int:
        """Samples that the run was asked for, in whole global batches: with those it ends."""
        batch = int(self.setting("run", "global_batch_size") or 1)
        return int(self.info["train_samples"] or 0) // batch * batch

    @property
    def is_finished(self) -> bool:
        """Whether the last logged step reached the samples that are planned."""
        return max([self.samples_done, *(row.samples for row in self.valid)]) >= self.samples_planned

    def column(self, name: str, *, averaged: bool = False) -> np.ndarray:
        """One column of the validation curve, or of that of the averaged weights, as float64: ``column("nll")``."""
        values = [getattr(row, name) for row in (self.averaged if averaged else self.valid)]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def train_column(self, name: str) -> np.ndarray:
        """One column of the training rows as float64; missing values are NaN."""
        values = [row.get(name) for row in self.train]
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    def tokens_per_second(self) -> float | None:
        """Median training speed over the logged steps, which a slow first step or one stall does not move."""
        speed = self.train_column("tokens_per_second")
        speed = speed[np.isfinite(speed) & (speed > 0)]
        return float(np.median(speed)) if speed.size else None


def is_exact(label: str) -> bool:
    """Whether numbers of this label are likelihoods themselves."""
    return "exact" in label.lower()


def is_likelihood(label: str) -> bool:
    """Whether numbers of this label are likelihoods or bounds on them, so that they may be compared at all."""
    return is_exact(label) or label.lower().startswith("nll bound")
