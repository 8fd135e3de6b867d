"""What a set of runs shows: overfitting, gaps between runs with their errors, and a table row per run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron.runs.counts import format_count
from megatron.runs.run import Result, Run, Validation
from megatron.runs.sums import difference, halves, reach, t_quantile, welch
from megatron.statistics import ValidationSums, mean_loss

FIRST_TOKEN_SCORED = frozenset({"mdm", "exact_count_mdm", "block_diffusion", "maskgit", "uniform_diffusion"})
"""Objectives that score all S tokens of a sample given nothing; the others score S tokens given the one before."""


@dataclass(frozen=True)
class Gap:
    """A difference of two validation losses, nats per token.

    ``error``: NaN where that of a loss is not known; ``reach``: half of its 95 % interval, of what is known; ``how``: where the
    error comes from.
    """

    value: float
    error: float
    reach: float
    how: str

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves zero out."""
        return abs(self.value) > self.reach


@dataclass(frozen=True)
class Overfitting:
    """``best`` is the validation that the result is of. ``rises``: the last validation lies above it beyond the error of the
    difference. ``at_end``: the best of several validations is the last one, so training longer may still help."""

    best: Validation
    rises: bool
    at_end: bool
    rise: float

    def text(self) -> str:
        """It in a few words, for a table."""
        if self.rises:
            return f"from epoch {epoch_text(self.best.epoch)}"
        return "no, still improving at the end" if self.at_end else "no rise beyond the error"


def overfitting(run: Run) -> Overfitting | None:
    """Where a run starts to overfit, or None before its first validation.

    Paired by document where the sums of both validations are kept, over the documents that did not choose the best where there
    are such: on those that did, the best of many lies below the last by chance, too. Otherwise the two errors are added, although
    both share samples and noise: that test errs towards "no overfitting".
    """
    if run.result is None:
        return None
    best = run.result.row
    last = [row for row in run.curve_of(best) if math.isfinite(row.nll)][-1]
    if last is best:
        return Overfitting(best, rises=False, at_end=len(run.curve_of(best)) > 1, rise=0.0)
    apart = run.result.chosen_apart
    gap = _gap(best, last, sums=(_judged(run, best, apart=apart), _judged(run, last, apart=apart)))
    return Overfitting(best, rises=gap.is_real and gap.value > 0, at_end=False, rise=gap.value)


def gap_between(first: Run, second: Run) -> Gap:
    """The result of ``second`` minus that of ``first``, paired by document where the sums of both are kept.

    Both runs have a result.
    """
    one, other = first.result, second.result
    assert one is not None
    assert other is not None
    if one.chosen_apart != other.chosen_apart or not _share_data(one.row, other.row):
        return _gap(one, other)
    apart = one.chosen_apart
    return _gap(one, other, sums=(_judged(first, one.row, apart=apart), _judged(second, other.row, apart=apart)))


def gap_at(first: Run, one: Validation, second: Run, other: Validation) -> Gap:
    """Validation ``other`` of ``second`` minus ``one`` of ``first``, paired by document where the sums of both are kept."""
    return _gap(one, other, sums=(first.sums(one), second.sums(other)) if _share_data(one, other) else (None, None))


def summary_row(run: Run) -> dict[str, str]:
    """One row of the report's table; column names with units are the keys."""
    result, turn, speed = run.result, overfitting(run), run.tokens_per_second()
    copies = 2 if run.objective == "block_diffusion" else 1  # [noised; clean]
    passes = copies * (result.row.num_mc if result else 1)
    state = "evaluation only" if run.is_evaluation else "" if run.is_finished else "unfinished"
    imported = f"imported: {run.source}" if run.source else ""
    notes = ", ".join(note for note in (run.origin, state, imported) if note)
    row = {
        "Run": run.name + f" ({notes})" * bool(notes),
        "Objective": run.objective.upper(),
        "Parameters": format_count(run.parameters) if run.parameters else "–",
        "Unique tokens": format_count(run.unique_tokens) if run.unique_tokens else "–",
        "Epochs": epoch_text(run.epochs) if run.unique_tokens else "–",
        "Seed": f"mean of {', '.join(map(str, run.seeds))}" if run.seeds else str(run.seed),
        "Training FLOPs": f"{run.train_flops:.2e}" if run.unique_tokens else "–",
        "Best validation, nats/token": "–",
        "± over": "–",
        "Kind": run.label if result is None else result.row.kind,
        "Bits per byte": "–",
        "Perplexity": "–",
        "Step of best": "–",
        "Overfits": "–",
        "Scoring FLOPs per token": f"{2.0 * run.compute_parameters * passes:.1e}" if run.compute_parameters else "–",
        "Tokens/s": f"{speed:,.0f}" if speed else "–",
    }
    if result is not None and turn is not None:
        row["Best validation, nats/token"] = plus_minus(result.nll, result.nll_se)
        row["± over"] = result.error_unit
        if run.is_likelihood:
            at_most = "" if run.is_exact else "≤ "
            bits = result.row.bits_per_byte
            row["Bits per byte"] = "–" if bits is None else f"{at_most}{bits * result.nll / result.row.nll:.3f}"
            row["Perplexity"] = f"{at_most}{math.exp(min(result.nll, 700.0)):.4g}"
        row["Step of best"] = f"{result.row.step:,}"
        row["Overfits"] = turn.text()
    return row


def comparisons(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """(best AR run, best run of another objective) for every unique-token budget and other objective, in this order. Runs without
    a validation or training data, or whose number is no likelihood, do not take part; imported runs meet those of their source
    only."""
    rivals: dict[tuple[int, str, str], list[Run]] = {}
    for run in runs:
        if run.best is not None and run.is_likelihood and run.unique_tokens:
            rivals.setdefault((run.unique_tokens, run.objective, run.source), []).append(run)
    best = {key: best_of(group) for key, group in rivals.items()}
    pairs = []
    for (unique, objective, source), run in sorted(best.items()):
        baseline = best.get((unique, "ar", source))
        if objective != "ar" and baseline is not None:
            pairs.append((baseline, run))
    return pairs


def best_of(runs: Sequence[Run]) -> Run:
    """The run with the lowest validation: on the half of the documents that chooses, where all runs tell it apart."""
    if all(run.split for run in runs):
        return min(runs, key=lambda run: min(mean_loss(chosen).value for _, chosen, _ in run.split or ()))
    return min(runs, key=lambda run: run.best.nll if run.best else math.inf)


def conditioning_gap(ar: Run, other: Run) -> float | None:
    """What scoring rules give AR at most, nats per token; None where they are the same or not known.

    AR is scored on tokens 1 to S of a sample given token 0, diffusion on tokens 0 to S − 1 given nothing. So the latter pays
    for one token without context where AR pays for one with all of it: at most ln V instead of about AR's mean, over S tokens.
    """
    length = ar.setting("model", "seq_length")
    vocabulary = ar.setting("data", "vocab_size") or ar.setting("model", "padded_vocab_size")
    is_given_nothing = other.objective in FIRST_TOKEN_SCORED and not other.setting("objective", "shifted_labels")
    if not length or not vocabulary or not is_given_nothing or ar.result is None:
        return None
    return max(0.0, math.log(vocabulary) - ar.result.nll) / length


def plus_minus(value: float, error: float) -> str:
    """ "3.710 ± 0.004", with the digits that the error carries; without a finite error only the value."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3f}"
    digits = min(6, max(2, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def epoch_text(value: float) -> str:
    """An epoch count as text."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _gap(
    first: Validation | Result,
    second: Validation | Result,
    *,
    sums: tuple[ValidationSums | None, ValidationSums | None] = (None, None),
) -> Gap:
    value = second.nll - first.nll
    if sums[0] is not None and sums[1] is not None and len(set(sums[0].sample) & set(sums[1].sample)):
        paired = difference(sums[0], sums[1])
        return Gap(paired.value, paired.error, reach(paired), f"paired over {paired.num_documents:,} documents")
    known = [row for row in (first, second) if math.isfinite(row.nll_se)]
    error = math.hypot(*(row.nll_se for row in known))
    quantile = t_quantile(0.975, welch(*((row.nll_se**2, row.degrees) for row in known))) if known else 0.0
    half = max(2.0, quantile) * error
    if len(known) < 2:
        return Gap(value, math.nan, half, "whose error is not known")
    return Gap(value, error, half, "from two errors added, as if the runs were judged on different samples")


def _share_data(one: Validation, other: Validation) -> bool:
    """Whether samples of one number are one sample: records from before data were recorded ("") are taken to say so."""
    return one.protocol == other.protocol or "" in (one.protocol, other.protocol)


def _judged(run: Run, row: Validation, *, apart: bool) -> ValidationSums | None:
    """The sums of a validation, ``apart`` those of the half of its documents that chose nothing; None where they are not kept."""
    sums = run.sums(row)
    if sums is None or not apart:
        return sums
    split = halves(sums)
    return None if split is None else split[1]
