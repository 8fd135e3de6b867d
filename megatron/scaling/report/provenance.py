"""Where runs come from: settings, data by content, commit, and the command line of every attempt; samples of their text."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.runs.run import Run
from megatron.scaling.report.tables import section, table

MAX_SAMPLES = 4
"""Samples shown of a run."""
_OUTPUT = ("save", "load", "dir", "path", "file", "wandb", "tensorboard", "kill_switch")
"""Settings with one of these in their names are places; the command lines have them."""


def provenance_html(runs: Sequence[Run]) -> str:
    """Settings, data and attempts of all runs."""
    return section("Settings", _settings_html(runs)) + section("Data", _data_html(runs)) + _attempts_html(runs)


def samples_html(runs: Sequence[Run]) -> str:
    """Texts that runs wrote, side by side: lines of ``tools/generate.py --json`` in ``RUN/samples*.jsonl``."""
    shown = [(run, read_samples(run.path)) for run in runs]
    columns = [
        f'<div class="sample"><h3>{html.escape(run.title)}: {html.escape(run.name)}</h3>'
        + "".join(
            f'<blockquote tabindex="0" aria-label="sample of {html.escape(run.name)}">'
            f"<b>{html.escape(prompt)}</b>{html.escape(_squeezed(text))}</blockquote>"
            for prompt, text in samples[:MAX_SAMPLES]
        )
        + "</div>"
        for run, samples in shown
        if samples
    ]
    if not columns:
        return ""
    note = "<p>Prompts are bold. A few samples show what a model writes, not how good it is; "
    note += "several blank lines are shown as one.</p>"
    return section("Samples", f'{note}<div class="panels">{"".join(columns)}</div>')


def _squeezed(text: str) -> str:
    """A model that has learned little writes pages of blank lines."""
    return re.sub(r"\n\s*\n\s*\n", "\n\n", text)


def read_samples(folder: Path) -> list[tuple[str, str]]:
    """(prompt, text) of every sample in ``folder``; a text that repeats its prompt, as one with gaps does, has none.

    Lines that are no sample are passed over: a report does not fail for them.
    """
    found = []
    for file in sorted(folder.glob("samples*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                prompt, text = str(entry["prompt"]), str(entry["text"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            found.append(("" if "[MASK" in prompt or text.startswith(prompt) else prompt, text))
    return found


def flat_settings(run: Run) -> dict[str, str]:
    """{"optimizer.lr": "0.003"}: every setting that has a value and is no place."""
    found = {}
    for part, values in run.info["config"].items():
        for name, value in (values if isinstance(values, Mapping) else {}).items():
            if value is not None and not any(word in name for word in _OUTPUT):
                found[f"{part}.{name}"] = f"{value:g}" if isinstance(value, float) else str(value)
    return found


def _settings_html(runs: Sequence[Run]) -> str:
    settings = [flat_settings(run) for run in runs]
    names = sorted(set().union(*settings))
    same = [name for name in names if len({values.get(name) for values in settings}) == 1]
    rows = [
        {"Setting": name, **{_key(run, runs): values.get(name, "–") for run, values in zip(runs, settings)}}
        for name in names
        if name not in same
    ]
    text = table(rows, "Settings that differ") if rows else ""
    shared = "".join(
        f"<li><code>{html.escape(name)}</code> {html.escape(settings[0][name])}</li>" for name in same if settings
    )
    opened = " open" if len(runs) == 1 else ""
    title = "Settings" if len(runs) == 1 else "Settings that all runs share"
    return (
        text + f'<details{opened}><summary>{title} ({len(same)})</summary><ul class="settings">{shared}</ul></details>'
    )


def _key(run: Run, runs: Sequence[Run]) -> str:
    """Name of a run's column; its place where runs that were not found together share a name."""
    return run.name if [other.name for other in runs].count(run.name) == 1 else str(run.path)


def _data_html(runs: Sequence[Run]) -> str:
    """One row per data set, and one per tokenizer; runs with the same one share it."""
    datasets: dict[tuple[str, ...], list[str]] = {}
    tokenizers: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for part, entries in (run.info.get("data") or {}).items():
            for entry in entries:
                datasets.setdefault(_dataset(part, entry), []).append(run.name)
        if found := run.info.get("tokenizer"):
            key = (str(found.get("vocab_size") or "–"), str(found.get("fingerprint") or "not recorded"))
            tokenizers.setdefault(key, []).append(run.name)
    names = ("Part", "Name", "Share", "Tokens", "Documents", "Fingerprint (SHA-256 of the .idx)")
    text = table([{"Runs": ", ".join(who), **dict(zip(names, row))} for row, who in datasets.items()], "Data")
    rows = [
        {"Runs": ", ".join(who), "Vocabulary": size, "Fingerprint of the tokenizer": fingerprint}
        for (size, fingerprint), who in tokenizers.items()
    ]
    text += table(rows, "Tokenizers")
    return text or "<p>The records do not name the data.</p>"


def _dataset(part: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    def count(name: str) -> str:
        return f"{entry[name]:,}" if isinstance(entry.get(name), int) else "–"

    weight = entry.get("weight")
    return (
        part,
        Path(str(entry.get("prefix", "–"))).name,
        "–" if weight is None else f"{weight:g}",
        count("tokens"),
        count("documents"),
        str(entry.get("idx_sha256") or "–"),
    )


def _attempts_html(runs: Sequence[Run]) -> str:
    """Every start of the program: when, where it began, on what, from which commit, and its command line."""
    parts = []
    for run in runs:
        attempts = run.info.get("attempts") or [run.info]
        blocks = "".join(_attempt(entry) for entry in attempts)
        commits = sorted({str(entry["commit"])[:12] for entry in attempts if entry.get("commit")})
        title = f"{run.name}{', ' * bool(run.origin)}{run.origin}: {len(attempts)} attempt{'s' * (len(attempts) > 1)}"
        title += f", commit {', '.join(commits)}" if commits else ""
        left = [f"{Path(link['run']).name} at step {link['step']}" for link in run.info.get("branches") or []]
        blocks += f"<p>Branches: {html.escape(', '.join(left))}.</p>" if left else ""
        parts.append(f"<details><summary>{html.escape(title)}</summary>{blocks}</details>")
    return section("Provenance", "".join(parts))


def _attempt(entry: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (entry.get("versions") or {}).items())
    imported = entry.get("imported") or {}
    facts = {
        "Imported from": imported.get("source"),
        "Licence": imported.get("licence"),
        "File": imported and f"{imported.get('file')} (SHA-256 {str(imported.get('sha256'))[:16]})",
        "Started": entry.get("started"),
        "From step": entry.get("from_step"),
        "Commit": entry.get("commit"),
        "Device": entry.get("device"),
        "Layout": ", ".join(f"{name} {size}" for name, size in (entry.get("layout") or {}).items()),
        "Versions": versions,
        "Changed": "; ".join(f"{name}: {was} → {now}" for name, (was, now) in (entry.get("changed") or {}).items()),
        "Ended": ", ".join(f"{name} {value}" for name, value in (entry.get("ended") or {}).items()),
    }
    items = "".join(
        f"<li>{name}: {html.escape(str(value))}</li>" for name, value in facts.items() if value not in (None, "", {})
    )
    command = entry.get("command")
    line = f"<pre><code>{html.escape(shlex.join(map(str, command)))}</code></pre>" if command else ""
    return f"<ul>{items}</ul>{line}"
