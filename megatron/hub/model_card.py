"""The model card (README.md) of an uploaded run, written from its run.json and metrics.jsonl."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron.config.schema import WEIGHT
from megatron.files import read_object
from megatron.runs.record import METRICS, RECORD, WEIGHTS, read_rows

CURVE_ROWS = 12  # validations shown

USAGE = {
    "ar": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}")
inputs = tokenizer("The weather today is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=True)[0]))""",
    "mdm": """from transformers import pipeline

fill = pipeline("fill-mask", model="{repo}")
print(fill(f"The weather today is {{fill.tokenizer.mask_token}}."))""",
}


def read_run_records(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read run.json and the validations of metrics.jsonl, in order of steps.

    Raises:
        UserError: no run.json, or it is not JSON.
    """
    path = run / RECORD
    info = read_object(path, rule="the model card is written from it", fix="give the folder that was passed as --save")
    rows = [row for row in read_rows(run / METRICS) if row["kind"] in WEIGHTS]
    return info, sorted(rows, key=lambda row: row["step"])


def model_card(
    run: Path, *, repo_id: str, step: int, family: str | None, weights: str = WEIGHT, license_name: str | None = None
) -> str:
    """Write the card.

    Args:
        run: run directory.
        repo_id: where it goes, for the example.
        step: step of the uploaded weights.
        family: "ar" or "mdm" for a Hugging Face export, None when only this repository's format is uploaded.
        weights: kind of the uploaded weights, ``weight`` or ``ema``: the results are of validations of that kind.
        license_name: identifier for the header; none is claimed without it.

    Returns:
        Markdown with a YAML header.
    """
    info, rows = read_run_records(run)
    parts = [
        _header(family, license_name),
        f"# {repo_id.split('/')[-1]}\n",
        _summary(info, step, weights),
        _table("Model", _model_rows(info)),
        _table("Training", _training_rows(info)),
        _results([row for row in rows if WEIGHTS[row["kind"]] == weights], step, str(info.get("label", ""))),
    ]
    if family is not None:
        parts.append("## Use\n\n```python\n" + USAGE[family].format(repo=repo_id) + "\n```\n")
    return "\n".join(part for part in parts if part)


def without_local_paths(value: Any) -> Any:
    """Return a JSON value whose absolute paths are cut to their last part: they mean nothing elsewhere."""
    if isinstance(value, dict):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_local_paths(item) for item in value]
    return re.sub(r"^(--[\w-]+=)?(/.*)", _shortened, value, flags=re.DOTALL) if isinstance(value, str) else value


def _shortened(found: re.Match[str]) -> str:
    """A path, or a flag with one, as a command line holds it."""
    return (found[1] or "") + Path(found[2]).name


def _header(family: str | None, license_name: str | None) -> str:
    lines = ["---"]
    if family is not None:
        lines += ["library_name: transformers", f"pipeline_tag: {'text-generation' if family == 'ar' else 'fill-mask'}"]
    if license_name:
        lines.append(f"license: {license_name}")
    tag = "masked-diffusion" if family == "mdm" else "autoregressive" if family == "ar" else "pretraining"
    return "\n".join([*lines, "tags:", f"- {tag}", "- data-constrained-pretraining", "---", ""])


def _summary(info: dict[str, Any], step: int, weights: str) -> str:
    kinds = {
        "ar": "An autoregressive language model (next-token prediction, causal attention).",
        "mdm": "A masked diffusion language model (random mask ratio, bidirectional attention).",
    }
    text = kinds.get(
        info.get("objective", ""), f"A language model trained with the objective `{info.get('objective')}`."
    )
    source = f" Converted from `{Path(info['converted_from']).name}`." if info.get("converted_from") else ""
    which = "Weights" if weights == WEIGHT else "Averaged weights (--ema-decay)"
    return f"{text} {which} of step {step:,}.{source}\n"


def _model_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    model, parameters = _section(info, "config", "model"), _section(info, "parameters")
    sizes = [_count(model.get(name)) for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels")]
    rows = [
        ("parameters", _count(parameters.get("total"))),
        ("parameters counted for compute", _count(parameters.get("for_compute"))),
        ("layers, width, heads x channels", "{}, {}, {} x {}".format(*sizes)),
        ("feed-forward width", _count(model.get("ffn_hidden_size"))),
        ("sequence length", _count(model.get("seq_length"))),
        ("vocabulary rows (with padding)", _count(model.get("padded_vocab_size"))),
    ]
    mask = _section(info, "config", "objective").get("mask_token_id")
    return [*rows, ("mask token id", str(mask))] if mask is not None else rows


def _training_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    run, optimizer = _section(info, "config", "run"), _section(info, "config", "optimizer")
    unique = info.get("unique_tokens")
    rows = [("unique tokens", _count(unique)), ("epochs", _number(info.get("epochs"), ".4g"))] if unique else []
    if info.get("train_tokens"):
        flops = _number(info.get("train_flops"), ".3g")
        rows += [("tokens seen", _count(info["train_tokens"])), ("compute (6ND)", f"{flops} FLOPs")]
    rows.append(("global batch", f"{_count(run.get('global_batch_size'))} samples"))
    if not info.get("converted_from"):  # a conversion knows the model, not how it was optimised
        first, last = (_number(optimizer.get(name), "g") for name in ("lr", "min_lr"))
        rows += [
            ("learning rate", f"{first} to {last}, {optimizer.get('lr_decay_style') or 'unknown'}"),
            ("weight decay", _number(optimizer.get("weight_decay"), "g")),
            ("seed", _number(run.get("seed"), ".0f")),
        ]
    rows.append(("precision", "bf16" if run.get("bf16") else "fp32"))
    versions = ", ".join(f"{name} {version}" for name, version in _section(info, "versions").items())
    device = str(info.get("device") or "unknown")
    return [*rows, ("device", device), *([("versions", versions)] if versions else [])]


def _results(rows: list[dict[str, Any]], step: int, label: str) -> str:
    """Show validations: the best one, that of the uploaded step, and a thinned curve."""
    if not rows:
        return "## Results\n\nNo validation of these weights was logged.\n"
    best = min(rows, key=lambda row: row["nll"] if _is_number(row.get("nll")) else math.inf)
    spread = max(1, -(-len(rows) // CURVE_ROWS))
    shown = [row for index, row in enumerate(rows) if index % spread == 0 or row is rows[-1] or row in (best,)]
    if (here := next((row for row in rows if row["step"] == step), None)) is not None and here not in shown:
        shown = sorted([*shown, here], key=lambda row: row["step"])
    lines = [
        "## Results\n",
        f"Validation loss in nats a token, {label}."
        + (" A bound lies above the true likelihood." if "bound" in label else ""),
        "",
        "| step | epochs | tokens | loss | standard error | perplexity | bits per byte | |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    forms = {
        "step": ",.0f",
        "epoch": ".3g",
        "tokens": ",.0f",
        "nll": ".4f",
        "nll_se": ".4f",
        "ppl": ".2f",
        "bits_per_byte": ".4f",
    }
    for row in shown:
        notes = [note for note, is_true in (("best", row is best), ("these weights", row["step"] == step)) if is_true]
        cells = [_number(row.get(name), form, absent="") for name, form in forms.items()]
        lines.append(f"| {' | '.join(cells)} | {', '.join(notes)} |")
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _section(info: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a part of a record, empty where it is absent or null."""
    value: Any = info
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any, form: str, *, absent: str = "unknown") -> str:
    """Format a number; what is null, absent or no number is said to be so."""
    return format(value, form) if _is_number(value) else absent


def _count(value: Any) -> str:
    return _number(value, ",.0f")
