"""What differs between two runs: the guard that keeps a comparison of objectives from being one of something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from megatron.config import config_to_dict
from megatron.config.schema import Config, affects
from megatron.runs.run import Run

Weight = Literal["result", "unknown", "layout"]

_OBJECTIVE_FIELDS = frozenset({"run.num_mc", "run.valid_estimator"})
"""Belongs to how an objective is estimated, so it goes with the objective like the whole ``objective`` section."""

_TOKENIZER_FIELDS = frozenset(
    f"data.{name}" for name in ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
)


@dataclass(frozen=True)
class Difference:
    """One thing that differs between two runs.

    ``weight``: "result": it can change the numbers. "unknown": the records do not say whether it differs. "layout": it should
    not change the numbers.
    """

    field: str
    first: Any
    second: Any
    weight: Weight = "result"

    @property
    def layout(self) -> bool:
        """Whether it is one that should not change the numbers."""
        return self.weight == "layout"

    def __str__(self) -> str:
        if self.weight == "unknown":
            return f"{self.field}: unknown, {self.first!r} in both, of which the records keep no contents"
        return f"{self.field}: {self.first!r} against {self.second!r}"


def differences(first: Run, second: Run) -> list[Difference]:
    """What differs between two runs, apart from the objective and from where output goes; what matters comes first.

    AR and MDM runs of one comparison may differ in objective and attention only (the attention follows from the
    objective); everything of weight "result" is a confounder.
    """
    left, right = _flatten(first.info["config"]), _flatten(second.info["config"])
    found: list[Difference] = []
    by_content = _TOKENIZER_FIELDS if _fingerprint(first) and _fingerprint(second) else frozenset()
    for name in left.keys() | right.keys():
        layout = name.startswith("parallel.") or _affects(name) == "layout"
        if name in by_content or (_says_nothing(name) and not layout):
            continue
        one, other = (record.get(name, _defaults().get(name)) for record in (left, right))
        if one != other:
            found.append(Difference(name, one, other, "layout" if layout else "result"))
    found += _data_differences(first, second)
    for name, one, other in (
        ("start", _start(first), _start(second)),
        ("tokenizer", _fingerprint(first), _fingerprint(second)),
        ("noise scheme", first.info.get("noise_scheme", 1), second.info.get("noise_scheme", 1)),
        ("settings changed on the way", _changed(first), _changed(second)),
        ("data order", _order(first), _order(second)),
        ("tokens per epoch", first.unique_tokens, second.unique_tokens),
        ("parameters", first.parameters, second.parameters),
        ("validation estimator", _validated(first, "estimator") or None, _validated(second, "estimator") or None),
        ("validation samples", _validated(first, "num_samples"), _validated(second, "num_samples")),
        ("validation documents", _validated(first, "num_documents"), _validated(second, "num_documents")),
    ):
        may_lack = name in ("tokenizer", "validation estimator", "validation documents")
        if one != other and not (may_lack and None in (one, other)):
            found.append(Difference(name, one, other))
    order = ("result", "unknown", "layout")
    return sorted(found, key=lambda item: (order.index(item.weight), item.field))


def incomparable(first: Run, second: Run) -> str:
    """Why the losses of two runs are not measured by each other, in words; "" where nothing in the records speaks against it.

    Runs of others are compared within their source only (as in comparison.py), and losses on one validation set alone, in one
    tokenizer's tokens.
    """
    if first.source != second.source:
        one, other = (f"imported from {run.source}" if run.source else "our own" for run in (first, second))
        return f"{second.name} is {other}, {first.name} {one}: runs of two sources are not compared"
    found = [
        item for item in _data_differences(first, second) if item.field == "data.valid" and item.weight == "result"
    ]
    tokenizers = _fingerprint(first), _fingerprint(second)
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        found.append(Difference("tokenizer", tokenizers[0], tokenizers[1]))
    return f"judged on other validation data ({found[0]})" if found else ""


def matched_pairs(runs: Sequence[Run]) -> list[tuple[Run, Run, list[Difference]]]:
    """For each run of another objective than AR, the AR run of its source that it matches best, and what differs."""
    pairs = []
    for run in runs:
        baselines = [
            one for one in runs if one.objective == "ar" and not one.is_evaluation and one.source == run.source
        ]
        if run.objective == "ar" or run.is_evaluation or not baselines:
            continue
        partner = min(baselines, key=lambda other: len(differences(other, run)))
        pairs.append((partner, run, differences(partner, run)))
    return pairs


def _data_differences(first: Run, second: Run) -> list[Difference]:
    """Training and validation data by content where both records hold it, else by what was given."""
    found = []
    for part in ("train", "valid"):
        name = f"data.{part}"
        one, other = _recorded(first, part), _recorded(second, part)
        if one is not None and other is not None:
            has_samples = all("bin_sample" in entry for entry in [*one, *other])
            keys = ("idx_sha256", "bin_sample")[: 1 + has_samples]
            if _contents(one, keys) != _contents(other, keys):
                found.append(Difference(name, _described(one), _described(other)))
            elif _prefixes(one) != _prefixes(other):
                found.append(Difference(f"{name}, place", _prefixes(one), _prefixes(other), "layout"))
            continue
        given, also = _given(first, part), _given(second, part)
        if given != also:
            found.append(Difference(name, given, also))
        elif given is not None and given.startswith("file "):
            found.append(Difference(name, given, also, "unknown"))
    return found


def _recorded(run: Run, part: str) -> list[Mapping[str, Any]] | None:
    entries = (run.info.get("data") or {}).get(part)
    return None if entries is None else list(entries)


def _contents(entries: Sequence[Mapping[str, Any]], keys: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """Per corpus of a blend, in its order: share, documents, tokens, and fingerprints (without any, the place)."""
    total = sum(float(entry.get("weight") or 1) for entry in entries)
    return [
        (
            round(float(entry.get("weight") or 1) / total, 9),
            entry.get("documents"),
            entry.get("tokens"),
            *(entry.get(key) or entry.get("prefix") for key in keys),
        )
        for entry in entries
    ]


def _prefixes(entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [entry.get("prefix") for entry in entries]


def _described(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{share:.4g} of {entry.get('prefix')} ({entry.get('tokens')} tokens, .idx {str(entry.get('idx_sha256'))[:8]})"
        for (share, *_), entry in zip(_contents(entries), entries)
    )


def _given(run: Run, part: str) -> str | None:
    """Paths and weights as they were given, or the name of the file that lists them."""
    file = run.setting("data", f"{part}_data_path_file")
    if file:
        return f"file {file}"
    paths = run.setting("data", f"{part}_data_path")
    return None if not paths else " ".join(map(str, [paths] if isinstance(paths, str) else paths))


def _start(run: Run) -> str | None:
    """Whose weights a run began with; None for its own, also when it was continued."""
    load = run.setting("run", "load")
    if load is None or load == run.setting("run", "save"):
        return None
    tag = run.setting("run", "load_tag")
    kind = run.setting("run", "load_kind")
    alone = any(run.setting("run", name) for name in ("finetune", "no_load_optim")) and "without its optimizer"
    return " ".join(str(part) for part in (load, tag, kind, alone) if part)


def _changed(run: Run) -> dict[str, Any]:
    """Settings that later attempts changed, or that a branch has otherwise than the run before it: {name: [before, now]},
    without those that say nothing about numbers, and those of a branch's schedule, which are as if they had always been."""
    found: dict[str, Any] = {}
    own = run.branch.changed if run.branch else {}
    for name, change in own.items():
        is_of_branches = _affects(name) in ("schedule", "length") and name != "run.global_batch_size"
        if not (_says_nothing(name) or is_of_branches):
            found[name] = change
    for attempt in run.info.get("attempts") or []:
        found.update(
            {name: change for name, change in (attempt.get("changed") or {}).items() if not _says_nothing(name)}
        )
    return found


def _order(run: Run) -> str | None:
    """The length for which the order of the samples was planned, where it is not that of the run: of a branch."""
    planned = run.branch.order_samples if run.branch else None
    return None if planned in (None, run.info["train_samples"]) else f"planned for {planned:,} samples"


def _says_nothing(name: str) -> bool:
    """Whether a setting belongs to the objective, to the output or to the layout, or names what is compared by content
    (:func:`_start`, :func:`_data_differences`)."""
    says_nothing = _affects(name) in ("output", "layout", "identity") and name not in _TOKENIZER_FIELDS
    return says_nothing or name in _OBJECTIVE_FIELDS or name.startswith(("objective.", "parallel."))


def _affects(name: str) -> str:
    section, _, field = name.partition(".")
    return affects(section, field)


def _fingerprint(run: Run) -> str | None:
    return (run.info.get("tokenizer") or {}).get("fingerprint")


def _validated(run: Run, name: str) -> Any:
    return getattr(run.valid[-1], name) if run.valid else None


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


@cache
def _defaults() -> dict[str, Any]:
    """What a record that lacks a setting, because it is older, did."""
    return _flatten(config_to_dict(Config()))
