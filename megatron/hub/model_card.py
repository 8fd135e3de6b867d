"""The model card (README.md) of an uploaded run, written from its run.json and metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.errors import UserError

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
        ValueError: no run.json, or it is not JSON.
    """
    path = run / "run.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error})",
            "the model card is written from it",
            "give the folder that was passed as --save",
        ) from error
    rows = []
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run
            if row.get("kind") == "valid":
                rows.append(row)
    return info, sorted(rows, key=lambda row: row["step"])


def model_card(run: Path, *, repo_id: str, step: int, family: str | None, license_name: str | None = None) -> str:
    """Write the card.

    Args:
        run: run directory.
        repo_id: where it goes, for the example.
        step: step of the uploaded weights.
        family: "ar" or "mdm" for a Hugging Face export, None when only this repository's format is uploaded.
        license_name: identifier for the header; none is claimed without it.

    Returns:
        Markdown with a YAML header.
    """
    info, rows = read_run_records(run)
    parts = [
        _header(family, license_name),
        f"# {repo_id.split('/')[-1]}\n",
        _summary(info, step),
        _table("Model", _model_rows(info)),
        _table("Training", _training_rows(info)),
        _results(rows, step, str(info.get("label", ""))),
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
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _header(family: str | None, license_name: str | None) -> str:
    lines = ["---"]
    if family is not None:
        lines += ["library_name: transformers", f"pipeline_tag: {'text-generation' if family == 'ar' else 'fill-mask'}"]
    if license_name:
        lines.append(f"license: {license_name}")
    tag = "masked-diffusion" if family == "mdm" else "autoregressive" if family == "ar" else "pretraining"
    return "\n".join([*lines, "tags:", f"- {tag}", "- data-constrained-pretraining", "---", ""])


def _summary(info: dict[str, Any], step: int) -> str:
    kinds = {
        "ar": "An autoregressive language model (next-token prediction, causal attention).",
        "mdm": "A masked diffusion language model (random mask ratio, bidirectional attention).",
    }
    text = kinds.get(
        info.get("objective", ""), f"A language model trained with the objective `{info.get('objective')}`."
    )
    source = f" Converted from `{Path(info['converted_from']).name}`." if info.get("converted_from") else ""
    return f"{text} Weights of step {step:,}.{source}\n"


def _model_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    model, parameters = info["config"]["model"], info["parameters"]
    rows = [
        ("parameters", _count(parameters.get("total"))),
        ("parameters counted for compute", _count(parameters.get("for_compute"))),
        (
            "layers, width, heads x channels",
            "{num_layers}, {hidden_size}, {num_attention_heads} x {kv_channels}".format(**model),
        ),
        ("feed-forward width", _count(model["ffn_hidden_size"])),
        ("sequence length", _count(model["seq_length"])),
        ("vocabulary rows (with padding)", _count(model.get("padded_vocab_size"))),
    ]
    mask = info["config"]["objective"].get("mask_token_id")
    return [*rows, ("mask token id", str(mask))] if mask is not None else rows


def _training_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    run, optimizer = info["config"]["run"], info["config"]["optimizer"]
    unique = info.get("unique_tokens")
    rows = [("unique tokens", _count(unique)), ("epochs", f"{info['epochs']:.4g}")] if unique else []
    if info.get("train_tokens"):
        rows += [("tokens seen", _count(info["train_tokens"])), ("compute (6ND)", f"{info['train_flops']:.3g} FLOPs")]
    rows.append(("global batch", f"{run['global_batch_size']} samples"))
    if not info.get("converted_from"):  # a conversion knows the model, not how it was optimised
        rate = f"{optimizer['lr']:g} to {optimizer['min_lr']:g}, {optimizer['lr_decay_style']}"
        rows += [
            ("learning rate", rate),
            ("weight decay", f"{optimizer['weight_decay']:g}"),
            ("seed", str(run["seed"])),
        ]
    rows.append(("precision", "bf16" if run["bf16"] else "fp32"))
    versions = ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items())
    return [*rows, ("device", str(info.get("device"))), *([("versions", versions)] if versions else [])]


def _results(rows: list[dict[str, Any]], step: int, label: str) -> str:
    """Show validations: the best one, that of the uploaded step, and a thinned curve."""
    if not rows:
        return "## Results\n\nNo validation was logged for this run.\n"
    best = min(rows, key=lambda row: row["nll"])
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
    for row in shown:
        notes = [note for note, is_true in (("best", row is best), ("these weights", row["step"] == step)) if is_true]
        byte = f"{row['bits_per_byte']:.4f}" if row.get("bits_per_byte") else ""
        lines.append(
            f"| {row['step']:,} | {row['epoch']:.3g} | {row['tokens']:,} | {row['nll']:.4f} | {row['nll_se']:.4f} | "
            f"{row['ppl']:.2f} | {byte} | {', '.join(notes)} |"
        )
    return "\n".join(lines) + "\n"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _count(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
