"""Tables and notes of the report page, as HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import read_object
from megatron.runs.comparison import plus_minus
from megatron.runs.counts import format_count
from megatron.runs.matching import Difference, matched_pairs
from megatron.runs.reading import readable
from megatron.runs.run import Run, is_exact, is_likelihood
from megatron.scaling.fit import Fit
from megatron.scaling.multiplier import Baseline, of_run
from megatron.scaling.sweep.search import FAILED, GIVEN_UP
from megatron.scaling.sweep.verdict import RESULT_FILE


def section(title: str, body: str) -> str:
    """A headed part of the page."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def table(rows: Sequence[Mapping[str, str]], name: str) -> str:
    """An HTML table called ``name`` for readers who hear the page; it scrolls sideways where it is too wide."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{html.escape(value)}</th>' if index == 0 else _cell(value)
            for index, value in enumerate(row.values())
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="{html.escape(name)}" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: str) -> str:
    """A number and its error stay in one line."""
    kind = ' class="number"' if "±" in value else ""
    return f"<td{kind}>{html.escape(value)}</td>"


def problems_html(runs: Sequence[Run], left_out: Sequence[str]) -> str:
    """What could not be read: of these runs, and beside them."""
    problems = [*left_out, *(problem for run in runs for problem in run.unreadable)]
    notes = [f"Not read: {problem}." for problem in problems]
    return "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def evaluations_html(runs: Sequence[Run]) -> str:
    """What stands apart from the curves: validations with other settings, and evaluations of finished checkpoints."""
    rows = []
    for run in runs:
        for row in run.other_valid:
            known, at_most = is_likelihood(row.label), "" if is_exact(row.label) else "≤ "
            bits = row.bits_per_byte
            rows.append(
                {
                    "Run": run.name,
                    "Objective": run.objective.upper(),
                    "Step": f"{row.step:,}",
                    "Nats/token": plus_minus(row.nll, row.nll_se),
                    "± over": row.error_unit,
                    "Samples": f"{row.num_samples:,}",
                    "Kind": row.kind,
                    "Perplexity": f"{at_most}{row.ppl:.4g}" if known else "–",
                    "Bits per byte": f"{at_most}{bits:.3f}" if known and bits is not None else "–",
                    "Protocol": row.protocol or "–",
                }
            )
    if not rows:
        return ""
    return section("Evaluations", "<p>They touch neither a curve nor a best.</p>" + table(rows, "Evaluations"))


def pairs_html(runs: Sequence[Run]) -> str:
    """The table of matched pairs."""
    pairs = matched_pairs(runs)
    if not pairs:
        return "<p>There is no pair of AR and another objective among these runs.</p>"
    parts = [
        "<p>Two runs of one comparison may differ in objective (and the attention that comes with it) only. "
        "Compared for every other run is the AR run closest to it:</p><ul>"
    ]
    for first, second, found in pairs:
        names = f"<b>{html.escape(first.name)}</b> and <b>{html.escape(second.name)}</b>"
        parts.append(f"<li>{names}: {_differences_html(found)}</li>")
    return "".join(parts) + "</ul>"


def _differences_html(found: Sequence[Difference]) -> str:
    of_weight = {
        weight: "; ".join(html.escape(str(item)) for item in found if item.weight == weight)
        for weight in ("result", "unknown", "layout")
    }
    text = "matched: only the objective differs."
    if of_weight["result"]:
        text = f'<span class="warn">not matched</span>: {of_weight["result"]}.'
    elif of_weight["unknown"]:
        text = "nothing else differs in what the records say."
    if of_weight["unknown"]:
        text += f" {of_weight['unknown']}."
    if of_weight["layout"]:
        text += f" Layout differs too, which should not change the numbers: {of_weight['layout']}."
    return text


def searches_html(runs: Sequence[Run]) -> str:
    """Of runs that stand beside the result of a search (``search.json``): whether their settings were chosen with equal budgets,
    and what was; nothing of others."""
    parts = []
    for folder in dict.fromkeys(run.path.parent for run in runs):
        try:
            record = json.loads((folder / RESULT_FILE).read_bytes())
            rows = [_search_row(search) for search in record["searches"]]
            parts += [f"<p>{html.escape(str(line))}.</p>" for line in record["budgets"]] + [table(rows, "Searches")]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # none, or not one of ours
    return section("Searches", "".join(parts)) if parts else ""


def _search_row(search: Mapping[str, Any]) -> dict[str, str]:
    outcomes = [str(trial["outcome"]) for trial in search["trials"]]
    chosen, report = search["chosen"], search["report_nll"]
    error = search["report_nll_se"]
    return {
        "Search from": str(search["search"]),
        "Trials": f"{len(outcomes)} of {search['planned_trials']}",
        "Given up": str(outcomes.count(GIVEN_UP)),
        "Diverged": str(outcomes.count(FAILED)),
        "FLOPs": f"{sum(float(trial['flops']) for trial in search['trials']):.3g}",
        "Chosen": "–" if chosen is None else Path(str(chosen)).name,
        "Nats/token, report half": "–" if report is None else plus_minus(report, math.nan if error is None else error),
    }


def laws_html(fits: Sequence[Fit]) -> str:
    """Parameters of fitted laws with intervals and held-out errors; nothing without fits."""
    if not fits:
        return ""
    rows = []
    for fit in fits:
        errors = [fit.noise, fit.cross_validation, fit.extrapolation]
        shown = ["–" if value is None else f"{value:.2%}" for value in errors]
        rows.append(
            {
                "Objective": fit.objective.upper() + (f" (imported: {fit.source})" if fit.source else ""),
                "Kind": fit.label,
                "Law": fit.law.equation,
                "Parameters, 95 % intervals": ", ".join(f"{name} = {fit.interval(name)}" for name in fit.law.names),
                "Losses (runs)": f"{fit.num_points} ({fit.num_runs})",
                "R²": "–" if fit.r_squared is None else f"{fit.r_squared:.3f}",
                "Residual": shown[0],
                "Left-out runs": shown[1],
                "Largest left-out runs": shown[2],
            }
        )
    warnings = "".join(
        f'<p><span class="warn">Do not trust the law of {html.escape(fit.objective.upper())}</span>: {html.escape(text)}.</p>'
        for fit in fits
        for text in fit.doubts
    )
    return section(
        "Laws",
        table(rows, "Laws")
        + warnings
        + "<p>A law says nothing about sizes, budgets and epochs far from these runs.</p>",
    )


def multipliers_html(runs: Sequence[Run], baseline: Baseline | None) -> str:
    """With how many times its data the baseline reaches each run's loss; nothing without a baseline."""
    if baseline is None:
        return ""
    rows = []
    for run in runs:
        found = of_run(run, baseline)
        if found is None or run.result is None:
            continue
        is_open = found.refusal or (found.at_least and found.at_most)
        reached = "–" if is_open else f"{found.side}{format_count(found.equivalent_tokens)}"
        rows.append(
            {
                "Run": run.name,
                "Unique tokens": format_count(run.unique_tokens),
                "Nats/token": plus_minus(run.result.nll, run.result.nll_se),
                "The baseline needs": reached,
                "Times the data, 95 % interval": found.text(),
            }
        )
    known = "; ".join(
        f"{format_count(unique)} tokens {plus_minus(loss, error)}"
        for unique, loss, error in zip(baseline.unique_tokens, baseline.losses, baseline.errors)
    )
    text = (
        f"<p>A run with a multiplier x equals {html.escape(baseline.name)} with x times its unique data, by interpolation "
        f"between {known}. x is one from below (≥) where the run's loss is a bound, from above (≤) where the baseline's are. "
        f"The interval has the noise of the run and of the baseline{'' if baseline.errors.all() else ', as far as it is known'}; "
        "∞ and 0 are ends beyond its rows.</p>"
    )
    return section("Data efficiency", text + table(rows, "Data efficiency"))


def downstream_html(runs: Sequence[Run], left_out: list[str]) -> str:
    """A table of lm-eval style results (``RUN/downstream*.json``); nothing when no run has them. ``left_out`` receives which
    cannot be read."""
    scores = dict(readable(lambda run: (run.name, load_downstream(run.path)), runs, left_out))
    scores = {name: tasks for name, tasks in scores.items() if tasks}
    if not scores:
        return ""
    names = sorted({task for tasks in scores.values() for task in tasks})
    rows = []
    for run in runs:
        if run.name in scores:
            cells = {"Run": run.name, "Objective": run.objective.upper()}
            cells.update({name: scores[run.name].get(name, "–") for name in names})
            rows.append(cells)
    return section("Downstream", table(rows, "Downstream") + "<p>± is the standard error over the items of a task.</p>")


def load_downstream(folder: Path) -> dict[str, str]:
    """``{"task metric": "0.512 ± 0.014"}`` from the lm-eval results in ``folder``.

    The metric of a task is acc_norm where there is one, else acc, else its first number.

    Raises:
        UserError: a file is not JSON or has no "results".
    """
    found: dict[str, str] = {}
    for file in sorted(folder.glob("downstream*.json")):
        rule, fix = (
            'an lm-eval result is JSON with a "results" object',
            "delete it or write it again with the evaluation tool",
        )
        results = read_object(file, rule=rule, fix=fix).get("results")
        if not isinstance(results, dict) or not all(isinstance(metrics, dict) for metrics in results.values()):
            raise UserError(f"{file} has none", rule, fix)
        for task, metrics in results.items():
            values = {name.split(",")[0]: value for name, value in metrics.items() if isinstance(value, (int, float))}
            plain = [name for name in values if not name.endswith("_stderr")]
            if not plain:
                continue
            metric = next((name for name in ("acc_norm", "acc") if name in values), plain[0])
            error = values.get(f"{metric}_stderr", math.nan)
            found[f"{task} {metric}"] = f"{values[metric]:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")
    return found


def notes_html() -> str:
    """The notes under the figures."""
    notes = (
        "<b>NLL (exact)</b> is the negative log-likelihood that an autoregressive model gives to held-out text. "
        "<b>NLL bound</b> is an upper bound on it, estimated by random masking: the model's true NLL is at or below "
        "it. A bound below an exact NLL therefore shows that the bounded model is better; a bound above it decides "
        "nothing by itself.",
        "<b>±</b> is one standard error over the validation documents (and noise draws, for bounds): what other documents of "
        "this kind would change. Records of older versions say samples instead, which is too small where samples share "
        "documents; the column says which. Differences whose 95 % interval holds zero are not called differences; where both "
        "runs keep their sums by document they are paired. Runs that differ only in their seed are drawn and compared as "
        "their mean; its ± also holds the spread between the seeds.",
        "<b>Best validation</b>: chosen on one half of the documents and reported on the other where the runs keep both; "
        "else on the documents that it is reported on, which flatters it a little.",
        "<b>AR and diffusion are scored on tokens one apart</b>: AR on tokens 1 to S of a sample given token 0, diffusion on "
        "tokens 0 to S − 1 given nothing. This favours AR by at most (ln V − NLL)/S nats/token, V the vocabulary.",
        "<b>Overfits from epoch e</b>: the last validation lies above the best one, at epoch e, beyond the error of the "
        "difference, on the documents that did not choose the best where the runs keep both halves.",
        "<b>Training FLOPs</b> are 6·N·D with N the parameters of the compute formula (4Lh² + 3Lh·ffn + 6Lh + Vh; less with "
        "grouped queries or GELU) and D the training tokens, repeated ones included, twice where a token is computed twice.",
        "<b>Scoring FLOPs per token</b> are 2·N for one pass (4·N for block diffusion, which reads the clean text, too), times "
        "the number of noise draws of a bound. Generating "
        "costs 2·N a token with a key/value cache (AR), and 2·N times the number of denoising steps a token without "
        "one (MDM): up to the sequence length when every step reveals one token.",
        "<b>Perplexity</b> is exp(NLL), <b>bits per byte</b> is NLL / ln 2 / (bytes of text per token); only the latter "
        "can be compared between tokenizers.",
        "Validations along a run are taken before its learning rate has decayed; a run planned for that many epochs "
        "would end a little lower.",
    )
    return "<ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>"
