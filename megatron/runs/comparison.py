"""What a set of runs shows: overfitting, matched pairs, a table row per run, and the conclusion in plain English."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.runs.reading import Run, Validation, format_count

SIGNIFICANT_SE = 2.0
"""Differences beyond this many standard errors are called real."""

_OBJECTIVE_FIELDS = ("run.num_mc",)
"""Belongs to how an objective is estimated, so it goes with the objective like the whole ``objective`` section."""

_OUTPUT_FIELDS = frozenset(
    {
        "run.save",
        "run.load",
        "run.load_tag",
        "run.save_interval",
        "run.keep_last",
        "run.log_interval",
        "run.exit_duration_in_mins",
        "run.kill_switch_file",
    }
)
"""Where things are written and how often they are logged; so do all tensorboard and wandb options."""

_LAYOUT_FIELDS = frozenset(
    {
        "run.micro_batch_size",
        "model.padded_vocab_size",
        "data.num_workers",
        "data.data_cache_path",
        "data.train_data_path_file",
        "data.valid_data_path_file",
    }
)
"""How the work is spread; the same numbers come out by design, up to rounding. So does the ``parallel`` section."""


@dataclass(frozen=True)
class Overfitting:
    """``best`` is the lowest validation. ``rises``: the last validation lies above it by more than 2 standard errors
    of the difference. ``at_end``: the best validation is the last one, so training longer may still help."""

    best: Validation
    rises: bool
    at_end: bool
    rise: float

    def text(self) -> str:
        if self.rises:
            return f"from epoch {_epoch(self.best.epoch)}"
        return "no, still improving at the end" if self.at_end else "no rise beyond the error"


@dataclass(frozen=True)
class Difference:
    """One configuration field that differs between two runs. ``layout``: should not change the numbers."""

    field: str
    first: Any
    second: Any
    layout: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {self.first!r} against {self.second!r}"


def overfitting(run: Run) -> Overfitting | None:
    """Where a run starts to overfit, or None before its first validation.

    The two validations share samples and noise, so their difference has less error than the two standard errors
    added in quadrature: the test errs towards "no overfitting".
    """
    best = run.best
    if best is None:
        return None
    last = [row for row in run.valid if math.isfinite(row.nll)][-1]
    rise = last.nll - best.nll
    error = math.hypot(_finite(last.nll_se), _finite(best.nll_se))
    return Overfitting(best, rises=rise > SIGNIFICANT_SE * error and rise > 0, at_end=last is best, rise=rise)


def differences(first: Run, second: Run) -> list[Difference]:
    """Configuration fields that differ between two runs, apart from the objective and from where output goes.

    AR and MDM runs of one comparison may differ in objective and attention only (the attention follows from the
    objective); everything this returns without ``layout`` is a confounder.
    """
    left, right = _flatten(first.info["config"]), _flatten(second.info["config"])
    found = []
    for name in sorted(left.keys() | right.keys()):
        if name.startswith("objective.") or name in _OBJECTIVE_FIELDS or name in _OUTPUT_FIELDS:
            continue
        if "tensorboard" in name or "wandb" in name:
            continue
        if left.get(name) != right.get(name):
            layout = name.startswith("parallel.") or name in _LAYOUT_FIELDS
            found.append(Difference(name, left.get(name), right.get(name), layout))
    for name, one, other in (
        ("tokens per epoch", first.unique_tokens, second.unique_tokens),
        ("parameters", first.parameters, second.parameters),
        ("validation samples", _validation_samples(first), _validation_samples(second)),
    ):
        if one != other:
            found.append(Difference(name, one, other))
    return sorted(found, key=lambda item: item.layout)


def confounders(first: Run, second: Run) -> list[Difference]:
    """The differences that can change the result."""
    return [item for item in differences(first, second) if not item.layout]


def matched_pairs(runs: Sequence[Run]) -> list[tuple[Run, Run, list[Difference]]]:
    """For each run of another objective than AR, the AR run that it matches best, and what differs between them."""
    baselines = [run for run in runs if run.objective == "ar"]
    pairs = []
    for run in runs:
        if run.objective == "ar" or not baselines:
            continue
        partner = min(baselines, key=lambda other: len(differences(other, run)))
        pairs.append((partner, run, differences(partner, run)))
    return pairs


def summary_row(run: Run) -> dict[str, str]:
    """One row of the report's table; column names with units are the keys."""
    best, turn, speed = run.best, overfitting(run), run.tokens_per_second()
    draws = best.num_mc if best and not run.is_exact else 1
    row = {
        "Run": run.name + ("" if run.is_finished else " (unfinished)"),
        "Objective": run.objective.upper(),
        "Parameters": format_count(run.parameters),
        "Unique tokens": format_count(run.unique_tokens),
        "Epochs": _epoch(run.epochs),
        "Seed": f"mean of {', '.join(map(str, run.seeds))}" if run.seeds else str(run.seed),
        "Training FLOPs": f"{float(run.info['train_flops']):.2e}",
        "Best validation, nats/token": "–",
        "Kind": run.label if run.is_exact or best is None else f"{run.label} ({best.num_mc} draws)",
        "Bits per byte": "–",
        "Perplexity": "–",
        "Step of best": "–",
        "Overfits": "–",
        "Scoring FLOPs per token": f"{2.0 * run.compute_parameters * draws:.1e}",
        "Tokens/s": f"{speed:,.0f}" if speed else "–",
    }
    if best is not None and turn is not None:
        row["Best validation, nats/token"] = plus_minus(best.nll, best.nll_se)
        at_most = "" if run.is_exact else "≤ "
        row["Bits per byte"] = f"{at_most}{best.bits_per_byte:.3f}" if best.bits_per_byte is not None else "–"
        row["Perplexity"] = f"{at_most}{best.ppl:.4g}"
        row["Step of best"] = f"{best.step:,}"
        row["Overfits"] = turn.text()
    return row


def comparisons(runs: Iterable[Run]) -> list[tuple[Run, Run]]:
    """(best AR run, best run of another objective) for every unique-token budget and other objective, best first by
    validation. Runs without a validation, or whose number is no likelihood, do not take part."""
    best: dict[tuple[int, str], Run] = {}
    for run in runs:
        if run.best is None or not run.is_likelihood:
            continue
        key = (run.unique_tokens, run.objective)
        champion = best.get(key)
        if champion is None or champion.best is None or run.best.nll < champion.best.nll:
            best[key] = run
    pairs = []
    for (unique, objective), run in sorted(best.items()):
        baseline = best.get((unique, "ar"))
        if objective != "ar" and baseline is not None:
            pairs.append((baseline, run))
    return pairs


def conclusion(runs: Sequence[Run]) -> list[str]:
    """Paragraphs of plain English: who is ahead for which data, what the numbers are, and how far they carry."""
    text = [_compare_text(first, second) for first, second in comparisons(runs)]
    if not text:
        text = [_single_text(run) for run in runs if run.best is not None][:6]
    if not text:
        return ["No run has been validated yet, so there is nothing to conclude."]
    no_likelihood = [run.name for run in runs if not run.is_likelihood]
    if no_likelihood:
        text.append(f"Not ranked, because their number is no likelihood: {', '.join(no_likelihood)}.")
    return [*text, _scale_text(runs)]


def plus_minus(value: float, error: float) -> str:
    """ "3.710 ± 0.004", with the digits that the error carries; without a finite error only the value."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:.3f}"
    digits = min(6, max(2, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _compare_text(first: Run, second: Run) -> str:
    """One paragraph about the best AR run and the best run of another objective on the same data."""
    assert first.best is not None
    assert second.best is not None
    gap = second.best.nll - first.best.nll
    error = math.hypot(_finite(first.best.nll_se), _finite(second.best.nll_se))
    size = f"{abs(gap):.3f} ± {error:.3f} nats/token"
    name, bound = second.objective.upper(), not second.is_exact
    if gap < -SIGNIFICANT_SE * error:
        verdict = f"{name} is ahead by {size}" + (
            "; its number is an upper bound on its NLL, so its true lead is at least that" if bound else ""
        )
    elif gap > SIGNIFICANT_SE * error:
        verdict = f"AR is ahead by {size}" + (
            f"; {name}'s number is an upper bound, so its true NLL may be lower and the gap smaller or even reversed"
            if bound
            else ""
        )
    else:
        verdict = f"the two cannot be told apart (a difference of {size})" + (
            f"; {name}'s number is an upper bound, so it is no worse than this and may be better" if bound else ""
        )
    text = (
        f"On {format_count(first.unique_tokens)} unique tokens, {_best_text(first)}; {_best_text(second)}. "
        f"At their best, {verdict}."
    )
    confounding = confounders(first, second)
    if confounding:
        text += f" These two runs are not a matched pair: they also differ in {_listed(confounding)}."
    return text


def _best_text(run: Run) -> str:
    turn = overfitting(run)
    assert turn is not None
    tail = {True: "and overfits after that", False: "and does not overfit within the run"}[turn.rises]
    if turn.at_end:
        tail = "and was still improving at the end" if run.is_finished else "and is still training"
    kind = "exact validation NLL" if run.is_exact else "validation NLL bound"
    return (
        f"{run.title} reaches its best {kind} of {plus_minus(turn.best.nll, turn.best.nll_se)} nats/token "
        f"at epoch {_epoch(turn.best.epoch)} ({turn.best.flops:.1e} FLOPs) {tail}"
    )


def _single_text(run: Run) -> str:
    return f"On {format_count(run.unique_tokens)} unique tokens, {_best_text(run)}."


def _scale_text(runs: Sequence[Run]) -> str:
    """How far the numbers carry: scale, seeds, and what ± covers."""
    sizes = [run.parameters for run in runs]
    flops = max(float(run.info["train_flops"]) for run in runs)
    span = (
        format_count(min(sizes))
        if min(sizes) == max(sizes)
        else f"{format_count(min(sizes))} to {format_count(max(sizes))}"
    )
    text = f"Scale: {span} parameters, at most {flops:.1e} training FLOPs a run. "
    if flops < 1e18:
        text += (
            "This is far below the scale of the published comparisons (1e18 to 1e21 FLOPs, arXiv 2507.15857), so it "
            "shows the behaviour of these runs and not which objective wins at that scale. "
        )
    if len({run.seed for run in runs}) == 1 and not any(run.seeds for run in runs):
        text += "All runs share one seed: "
    text += "± is the standard error over validation samples and noise draws; "
    if any(run.seeds for run in runs):
        return text + "the spread between training seeds is in it where a run is the mean of several, and only there."
    return text + "the spread between training seeds is not in it."


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _validation_samples(run: Run) -> int | None:
    return run.valid[-1].num_samples if run.valid else None


def _listed(items: Sequence[Difference]) -> str:
    names = [item.field for item in items]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more fields" if len(names) > 4 else "")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _epoch(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
