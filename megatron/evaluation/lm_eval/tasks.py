"""Task names, data sets and local JSONL tasks for lm-eval.

A local task is a file of JSON objects, one a line, whose fields say what kind it is:

* ``{"query", "choices", "gold"}``: multiple choice (metrics acc, acc_norm);
* ``{"context", "continuation"}``: LAMBADA kind (acc: the continuation is what greedy decoding gives; perplexity);
* ``{"prompt", "answer"}``, optionally ``"until"`` and ``"max_gen_toks"``: generation (exact_match);
* ``{"text"}``: likelihood of whole texts (word and byte perplexity, bits per byte).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import UserError

# The nine tasks of arXiv 2507.15857: our name -> (lm-eval's name, data set on the Hugging Face hub).
PAPER_TASKS = {
    "arc_easy": ("arc_easy", "allenai/ai2_arc"),
    "boolq": ("boolq", "aps/super_glue"),
    "copa": ("copa", "aps/super_glue"),
    "hellaswag": ("hellaswag", "Rowan/hellaswag"),
    "piqa": ("piqa", "baber/piqa"),
    "race": ("race", "EleutherAI/race"),
    "winogrande": ("winogrande", "allenai/winogrande"),
    "sciq": ("sciq", "allenai/sciq"),
    "lambada": ("lambada_openai", "EleutherAI/lambada_openai"),
}

FIELDS = {
    "multiple_choice": {"query", "choices", "gold"},
    "loglikelihood": {"context", "continuation"},
    "generate_until": {"prompt", "answer"},
    "loglikelihood_rolling": {"text"},
}


def parse_task_list(names: str) -> list[str]:
    """Split ``--task_list a,b,file.jsonl``; ``all`` means the nine tasks of the paper."""
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    return list(PAPER_TASKS) if tasks == ["all"] else tasks


def task_spec(name: str) -> str | dict[str, Any]:
    """What lm-eval's task manager loads: a task name, or the configuration of a local JSONL file."""
    if name.endswith(".jsonl"):
        return local_task(Path(name))
    return PAPER_TASKS[name][0] if name in PAPER_TASKS else name


def local_task(path: Path) -> dict[str, Any]:
    """Configuration of a local JSONL task, named after its file.

    Raises:
        ValueError: the file is missing or empty, a line is no JSON object, or the fields fit no kind of task.
    """
    items = read_jsonl(path)
    kind = next((kind for kind, fields in FIELDS.items() if fields <= set(items[0])), None)
    if kind is None:
        kinds = "; ".join(", ".join(sorted(fields)) for fields in FIELDS.values())
        raise UserError(f"{path} has fields {sorted(items[0])}", f"a task needs one of: {kinds}", "rename the fields")
    for number, item in enumerate(items, 1):
        if not FIELDS[kind] <= set(item):
            missing = sorted(FIELDS[kind] - set(item))
            raise UserError(
                f"{path} line {number} has no {missing}", f"all lines are {kind} items like the first", "complete it"
            )
    config: dict[str, Any] = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": kind,
        "target_delimiter": " ",
        "metadata": {"version": 1.0, "source": path.name},
    }
    return {**config, **_fields(kind, items[0])}


def _fields(kind: str, first: dict[str, Any]) -> dict[str, Any]:
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
        until = first.get("until", ["\n"])
        arguments = {"until": [until] if isinstance(until, str) else list(until), "do_sample": False}
        arguments["max_gen_toks"] = int(first.get("max_gen_toks", 64))
        metric = {"metric": "exact_match", "ignore_case": False, "ignore_punctuation": False, **mean}
        return {
            "doc_to_text": "prompt", "doc_to_target": "answer", "generation_kwargs": arguments, "metric_list": [metric]
        }  # fmt: skip
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    metrics = [{"metric": name, "aggregation": _rolling_aggregation(name), "higher_is_better": False} for name in names]
    return {"doc_to_text": "", "doc_to_target": "text", "metric_list": metrics}


def _rolling_aggregation(metric: str) -> str:
    return "bits_per_byte" if metric == "bits_per_byte" else "weighted_perplexity"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ValueError: see :func:`local_task`.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file", "a .jsonl task is read from disk", "correct the path")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} line {number} is not JSON ({error.msg})", "every line is one object", "correct it"
            ) from error
        if not isinstance(item, dict):
            raise UserError(
                f"{path} line {number} is a {type(item).__name__}", "every line is one JSON object", "correct it"
            )
        items.append(item)
    if not items:
        raise UserError(f"{path} is empty", "a task needs at least one item", "add lines")
    return items


def task_loader(names: Sequence[str], refused: Mapping[str, str] | None = None) -> Any:
    """A task manager for lm-eval that says how to get a data set that cannot be fetched.

    Args:
        names: tasks that will be loaded; lm-eval's own are indexed (which takes seconds) only where one is among them.
        refused: reason by output type ("multiple_choice", ...) for tasks that cannot run with the flags given.
    """
    from lm_eval.tasks import TaskManager

    class TaskLoader(TaskManager):  # defined here because lm-eval is an optional extra
        def load(self, task_list: Any) -> Any:
            """Load names, files and configurations one by one."""
            loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in [task_list] if isinstance(task_list, str) else list(task_list):
                part = self._load_one(name)
                for key in loaded:
                    loaded[key].update(part.get(key, {}))
            for task_name, task in loaded["tasks"].items():
                if reason := (refused or {}).get(task.OUTPUT_TYPE):
                    raise ValueError(f"task {task_name} is of kind {task.OUTPUT_TYPE}; {reason}")
            return loaded

        def _load_one(self, name: Any) -> Any:
            spec = task_spec(name) if isinstance(name, str) else name
            if isinstance(spec, str) and spec not in self.all_tasks:
                raise UserError(
                    f"task {name!r} is not known",
                    f"a task is one of {', '.join(PAPER_TASKS)}, any task of lm-eval, or a .jsonl file",
                    "correct --task_list",
                )
            try:
                return super().load([spec])
            except Exception as error:  # datasets and the hub raise errors of a dozen kinds
                if isinstance(spec, dict):
                    raise
                raise ValueError(_fetch_message(name, error)) from error

    return TaskLoader(include_defaults=any(not name.endswith(".jsonl") for name in names))


def _fetch_message(name: str, error: Exception) -> str:
    source = PAPER_TASKS[name][1] if name in PAPER_TASKS else "of this task"
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    reason = " ".join(str(error).split())[:200]
    return (
        f"task {name}: the data set {source} could not be loaded ({type(error).__name__}: {reason}); it comes from the Hugging "
        f"Face hub or from the cache in {home}; run `python tools/evaluate_downstream.py --fetch_only --task_list {name}` on a "
        "machine with network, copy that cache here (or set HF_HOME to it) and set HF_HUB_OFFLINE=1, or give a local .jsonl task"
    )
