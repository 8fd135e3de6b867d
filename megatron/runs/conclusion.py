"""What a set of runs shows, in plain English."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.schema import WEIGHT
from megatron.runs.comparison import comparisons, conditioning_gap, epoch_text, gap_between, overfitting, plus_minus
from megatron.runs.counts import format_count
from megatron.runs.matching import Difference, differences
from megatron.runs.run import OVER_SAMPLES, Run


def conclusion(runs: Sequence[Run]) -> list[str]:
    """Paragraphs: who is ahead for which data, what the numbers are, and how far they carry."""
    text = [_compare_text(first, second) for first, second in comparisons(runs)]
    validated = [run for run in runs if run.best is not None]
    if not text:
        text = [f"On {format_count(run.unique_tokens)} unique tokens, {_best_text(run)}." for run in validated][:6]
    evaluated = [_evaluation_text(run) for run in runs if run.is_evaluation][:6]
    if not text:
        return evaluated or ["No run has been validated yet, so there is nothing to conclude."]
    text += evaluated
    no_likelihood = [run.name for run in runs if not run.is_likelihood]
    if no_likelihood:
        text.append(f"Not ranked, because their number is no likelihood: {', '.join(no_likelihood)}.")
    return [*text, _scale_text(validated)]


def _compare_text(first: Run, second: Run) -> str:
    """One paragraph about the best AR run and the best run of another objective on the same data."""
    gap = gap_between(first, second)
    size = f"{plus_minus(abs(gap.value), gap.error)} nats/token, {gap.how}"
    name, bound = second.objective.upper(), not second.is_exact
    if not gap.is_real:
        verdict = f"the two cannot be told apart (a difference of {size})" + (
            f"; {name}'s number is an upper bound, so it is no worse than this and may be better" if bound else ""
        )
    elif gap.value < 0:
        verdict = f"{name} is ahead by {size}" + (
            "; its number is an upper bound on its NLL, so its true lead is at least that" if bound else ""
        )
    else:
        verdict = f"AR is ahead by {size}" + (
            f"; {name}'s number is an upper bound, so its true NLL may be lower and the gap smaller or even reversed"
            if bound
            else ""
        )
    text = (
        f"On {format_count(first.unique_tokens)} unique tokens, {_best_text(first)}; {_best_text(second)}. "
        f"At their best, {verdict}."
    )
    return text + _conditioning_text(first, second) + _matching_text(first, second)


def _conditioning_text(first: Run, second: Run) -> str:
    given = conditioning_gap(first, second)
    if given is None:
        return ""
    length = first.setting("model", "seq_length")
    return (
        f" AR is scored on tokens 1 to {length} of a sample given token 0, {second.objective.upper()} on tokens 0 to "
        f"{length - 1} given nothing, which favours AR by at most {given:.3f} nats/token."
    )


def _matching_text(first: Run, second: Run) -> str:
    found = differences(first, second)
    real = [item for item in found if item.weight == "result"]
    unknown = [item for item in found if item.weight == "unknown"]
    text = ""
    if real:
        text += f" These two runs are not a matched pair: they also differ in {_listed(real)}."
    if unknown:
        text += f" Whether they differ in {_listed(unknown)} is unknown: the records do not say."
    return text


def _evaluation_text(run: Run) -> str:
    """What was measured of a checkpoint whose training is not among the runs: its evaluation with the smallest error."""
    row = min(run.other_valid, key=lambda row: row.nll_se if row.nll_se == row.nll_se else float("inf"))
    return (
        f"{run.name} is an evaluation: {run.title} at step {row.step:,} has {row.full_label} "
        f"{plus_minus(row.nll, row.nll_se)} nats/token over {row.error_unit}."
    )


def _best_text(run: Run) -> str:
    turn, result = overfitting(run), run.result
    assert turn is not None
    assert result is not None
    tail = {True: "and overfits after that", False: "and does not overfit within the run"}[turn.rises]
    if turn.at_end:
        tail = "and was still improving at the end" if run.is_finished else "and is still training"
    kind = "exact validation NLL" if run.is_exact else "validation NLL bound"
    kind += "" if result.row.weights == WEIGHT else " (averaged weights)"
    return (
        f"{run.title} reaches its best {kind} of {plus_minus(result.nll, result.nll_se)} nats/token "
        f"at epoch {epoch_text(result.row.epoch)} ({result.row.flops:.1e} FLOPs) {tail}"
    )


def _scale_text(runs: Sequence[Run]) -> str:
    """How far the numbers carry: scale, seeds, what ± covers, and how the best was chosen."""
    sizes = [run.parameters for run in runs]
    flops = max(run.train_flops for run in runs)
    span = " to ".join(dict.fromkeys(format_count(size) for size in (min(sizes), max(sizes))))
    text = f"Scale: {span} parameters, at most {flops:.1e} training FLOPs a run. "
    if flops < 1e18:
        text += (
            "This is far below the scale of the published comparisons (1e18 to 1e21 FLOPs, arXiv 2507.15857), so it "
            "shows the behaviour of these runs and not which objective wins at that scale. "
        )
    text += _error_text(runs)
    if not all(run.result is None or run.result.chosen_apart for run in runs):
        text += (
            " The best validation of a run was chosen on the data that it is reported on, which flatters it a little."
        )
    return text


def _error_text(runs: Sequence[Run]) -> str:
    kinds = {row.se_kind for run in runs for row in run.valid}
    text = (
        "All runs share one seed: " if len({run.seed for run in runs}) == 1 and not any(r.seeds for r in runs) else ""
    )
    if kinds == {OVER_SAMPLES}:
        text += (
            "± is the standard error over validation samples and noise draws, too small where samples share documents; "
        )
    elif OVER_SAMPLES in kinds:
        text += (
            "± is the standard error over validation documents and noise draws, of older records over samples (too small "
            "where samples share documents); "
        )
    else:
        text += "± is the standard error over validation documents and noise draws; "
    if any(run.seeds for run in runs):
        return text + "the spread between training seeds is in it where a run is the mean of several, and only there."
    return text + "the spread between training seeds is not in it."


def _listed(items: Sequence[Difference]) -> str:
    names = [item.field for item in items]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more fields" if len(names) > 4 else "")
