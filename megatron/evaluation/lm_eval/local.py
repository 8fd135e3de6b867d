"""Local tasks: a file of JSON objects, one a line, whose fields say what kind it is.

* ``{"query", "choices", "gold"}``: multiple choice (metrics acc, acc_norm);
* ``{"context", "continuation"}``: LAMBADA kind (acc: the continuation is what greedy decoding gives; perplexity);
* ``{"prompt", "answer"}``, optionally ``"until"`` and ``"max_gen_toks"``, each line its own: generation (exact_match);
* ``{"text"}``: likelihood of whole texts (word and byte perplexity, bits per byte).

The file is read by this module and not by ``datasets``, whose columns have one type each and whose lines end at characters
that JSON allows within a string.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from megatron.data.jsonl import read_items
from megatron.errors import UserError, require

GENERATION = {"until": ["\n"], "max_gen_toks": 64, "do_sample": False}
FIELDS = {
    "multiple_choice": {"query", "choices", "gold"},
    "loglikelihood": {"context", "continuation"},
    "generate_until": {"prompt", "answer"},
    "loglikelihood_rolling": {"text"},
}


class Documents(list[dict[str, Any]]):
    """The items of a file; ``features`` is what lm-eval asks of a data set."""

    @property
    def features(self) -> dict[str, None]:
        """Names of all fields."""
        return dict.fromkeys(name for item in self for name in item)


class LocalTask(ConfigurableTask):
    """The task of one JSONL file, named after it.

    Args:
        path: the file.

    Raises:
        UserError: no such file, a line that is no item, or fields that fit no kind of task.
    """

    def __init__(self, path: Path) -> None:
        kind, items = read_task(path)
        self.dataset = {"test": Documents(items)}
        self._is_ready = False
        self._flags: dict[str, Any] = {}
        super().__init__(config={
            "task": path.stem, "test_split": "test", "output_type": kind, "target_delimiter": " ",
            "metadata": {"version": 1.0, "source": path.name}, **_settings(kind),
        })  # fmt: skip
        self._is_ready = True

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Nothing: the items are here."""

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> list[str]:
        """The choices. While it is built, lm-eval looks at their first letters, which an empty answer has not."""
        choices = super().doc_to_choice(doc, doc_to_choice)
        return choices if self._is_ready else [choice or " " for choice in choices]

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        """Also remember what ``--gen_kwargs`` sets, which stands above a line's own settings, and check the examples."""
        if key == "num_fewshot":
            items = len(self.dataset["test"])
            require(
                (value or 0) < items,
                f"--num_fewshot {value} with {self.config.task}, which has {items} items",
                "examples are other items of the file",
                f"pass at most {items - 1}",
            )
        if key == "generation_kwargs":
            self._flags.update(value)
        super().set_config(key, value, update)

    def construct_requests(self, doc: dict, ctx: str | list[str], **kwargs: Any) -> list[Instance] | Instance:
        """Requests of one item; a generation stops where its own line says."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        if isinstance(requests, Instance) and requests.request_type == "generate_until":
            own = {name: doc[name] for name in ("until", "max_gen_toks") if name in doc}
            requests.arguments = (requests.arguments[0], {**requests.arguments[1], **own, **self._flags})
        return requests


def read_task(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Kind (lm-eval's output type) and items of a local task, all fields checked.

    Raises:
        UserError: see :class:`LocalTask`.
    """
    numbered = read_items(path)
    first = set(numbered[0][1])
    kind = next((kind for kind, fields in FIELDS.items() if fields <= first), None)
    if kind is None:
        kinds = "; ".join(", ".join(sorted(fields)) for fields in FIELDS.values())
        raise UserError(f"{path} has fields {sorted(first)}", f"a task needs one of: {kinds}", "rename the fields")
    for number, item in numbered:
        if missing := sorted(FIELDS[kind] - set(item)):
            raise UserError(
                f"{path} line {number} has no {missing}", f"all lines are {kind} items like the first", "complete it"
            )
    for number, item in numbered:
        for name, (rule, fits) in CHECKS[kind].items():
            if name in item and not fits(item):
                raise UserError(f"{path} line {number}: {name} is {item[name]!r}", f"it is {rule}", "correct it")
    items = [item for _, item in numbered]
    if kind == "loglikelihood_rolling" and not any(item["text"] for item in items):
        raise UserError(f"{path} holds empty texts only", "a perplexity is a mean over bytes", "add texts")
    if kind == "generate_until":
        items = [{**item, "until": [until]} if isinstance(until := item.get("until"), str) else item for item in items]
    return kind, items


def _is_text(name: str) -> tuple[str, Callable[[dict[str, Any]], bool]]:
    return "a text", lambda item: isinstance(item[name], str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_gold(item: dict[str, Any]) -> bool:
    gold, choices = item["gold"], item["choices"]
    golds = gold if isinstance(gold, list) and gold else [gold]
    return all(g in choices if isinstance(g, str) else _is_count(g) and 0 <= g < len(choices) for g in golds)


# For each kind the fields that are checked: what each must be, in words and as a predicate of the item.
CHECKS: dict[str, dict[str, tuple[str, Callable[[dict[str, Any]], bool]]]] = {
    "multiple_choice": {
        "query": _is_text("query"),
        "choices": ("a list of texts", lambda item: _is_texts(item["choices"])),
        "gold": ("the index of the right choice, from 0", _is_gold),
    },
    "loglikelihood": {"context": _is_text("context"), "continuation": _is_text("continuation")},
    "loglikelihood_rolling": {"text": _is_text("text")},
    "generate_until": {
        "prompt": _is_text("prompt"),
        "answer": ("a text or a list of texts", lambda item: isinstance(item["answer"], str) or _is_texts(item["answer"])),
        "until": (
            "a text or a list of texts",
            lambda item: isinstance(item["until"], str) or item["until"] == [] or _is_texts(item["until"]),
        ),
        "max_gen_toks": (
            "a positive number of tokens",
            lambda item: _is_count(item["max_gen_toks"]) and item["max_gen_toks"] > 0,
        ),
    },
}  # fmt: skip


def _settings(kind: str) -> dict[str, Any]:
    """The part of lm-eval's configuration that depends on the kind."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    if kind == "multiple_choice":
        metrics = [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]
        return {"doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": metrics}
    if kind == "loglikelihood":
        metrics = [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **mean},
        ]
        return {"doc_to_text": "context", "doc_to_target": "continuation", "metric_list": metrics}
    if kind == "generate_until":
        metric = {"metric": "exact_match", "ignore_case": False, "ignore_punctuation": False, **mean}
        arguments = {**GENERATION, "until": list(GENERATION["until"])}  # type: ignore[call-overload]
        return {
            "doc_to_text": "prompt", "doc_to_target": "answer", "generation_kwargs": arguments, "metric_list": [metric]
        }  # fmt: skip
    aggregations = {
        "word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity", "bits_per_byte": "bits_per_byte"
    }  # fmt: skip
    metrics = [
        {"metric": name, "aggregation": aggregation, "higher_is_better": False}
        for name, aggregation in aggregations.items()
    ]
    return {"doc_to_text": "", "doc_to_target": "text", "metric_list": metrics}
