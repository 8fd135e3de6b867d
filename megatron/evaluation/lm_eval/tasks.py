"""Task names, data sets and local JSONL tasks for lm-eval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.usage import suggestion
from megatron.errors import Failure, UserError, require
from megatron.evaluation.names import PAPER_TASKS

if TYPE_CHECKING:
    from megatron.evaluation.adaptive import Ranking


def parse_task_list(names: str) -> list[str]:
    """Split ``--task_list a,b,file.jsonl``; ``all`` means the nine tasks of the paper."""
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    return list(PAPER_TASKS) if tasks == ["all"] else tasks


# Metrics that need the winner of a question and nothing else; with any other, every likelihood counts.
WINNER_METRICS = {"acc", "f1", "mcc", "acc_norm"}


def ranking_of(task: Any) -> Ranking | None:
    """How a multiple-choice task ranks its answers; None where its metrics need more than the winner."""
    metrics = set(getattr(task, "_metric_fn_list", {}))
    own = getattr(getattr(task, "config", None), "process_results", None)  # code of the task may look at anything
    if task.OUTPUT_TYPE != "multiple_choice" or own is not None or not metrics or not metrics <= WINNER_METRICS:
        return None
    per_character = "acc_norm" in metrics
    if per_character and getattr(task, "multiple_input", False):
        return None  # the lengths are those of texts that are not the continuations
    from megatron.evaluation.adaptive import Ranking  # with torch, which a program wants after its flags

    return Ranking(per_character, delimiter=task.config.target_delimiter)


def attend(task: Any) -> Any:
    """Tell the requests of a task what ranks them, and leave items out of its metrics whose requests were refused."""
    build, iterate = task.build_all_requests, task.doc_iterator

    def build_all_requests(**options: Any) -> None:
        build(**options)
        ranking = ranking_of(task)
        for instance in task.instances:
            instance.ranking = ranking

    def doc_iterator(**options: Any) -> Any:
        refused = {
            instance.doc_id
            for instance in getattr(task, "_instances", None) or ()
            if getattr(instance, "refused", None)
        }
        return (pair for pair in iterate(**options) if pair[0] not in refused)

    task.build_all_requests, task.doc_iterator = build_all_requests, doc_iterator
    return task


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
            source: dict[str, Any] = {}
            for name in [task_list] if isinstance(task_list, str) else list(task_list):
                part = self._load_one(name)
                for task in part.get("tasks", {}):
                    check_apart(task, source.setdefault(task, name), name)
                for key in loaded:
                    loaded[key].update(part.get(key, {}))
            for task_name, task in loaded["tasks"].items():
                if reason := (refused or {}).get(task.OUTPUT_TYPE):
                    raise UserError(
                        f"task {task_name} is of kind {task.OUTPUT_TYPE}", reason, "drop the flag or the task"
                    )
                attend(task)
            return loaded

        def _load_one(self, name: Any) -> Any:
            if isinstance(name, str) and name.endswith(".jsonl"):
                from megatron.evaluation.lm_eval.local import LocalTask

                local = LocalTask(Path(name))
                return {"tasks": {local.config.task: local}}
            spec = PAPER_TASKS[name][0] if name in PAPER_TASKS else name
            if isinstance(spec, str) and spec not in self.all_tasks:
                raise UserError(
                    f"task {name!r} is not known",
                    f"a task is one of {', '.join(PAPER_TASKS)}, any task of lm-eval, or a .jsonl file",
                    suggestion(name, PAPER_TASKS) or "correct --task_list",
                )
            try:
                return super().load([spec])
            except Exception as error:  # datasets and the hub raise errors of a dozen kinds
                if not isinstance(spec, str):
                    raise
                raise _not_fetched(name, error) from error

    return TaskLoader(include_defaults=any(not name.endswith(".jsonl") for name in names))


def check_apart(task: str, first: Any, second: Any) -> None:
    """Refuse a file whose task has the name of another one: results are kept by it, and one of them would be lost."""
    is_local = any(isinstance(name, str) and name.endswith(".jsonl") for name in (first, second))
    require(
        first == second or not is_local,
        f"{first} and {second} are both the task {task}",
        "a file is the task of its name, and results are told apart by it",
        "rename one of them, or evaluate them one by one",
    )


def _not_fetched(name: str, error: Exception) -> Failure:
    source = PAPER_TASKS[name][1] if name in PAPER_TASKS else "of this task"
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    reason = " ".join(str(error).split())[:200]
    return Failure(
        f"task {name}: the data set {source} could not be loaded ({type(error).__name__}: {reason})",
        f"it comes from the Hugging Face hub or from the cache in {home}",
        f"run `python tools/evaluate_downstream.py --fetch_only --task_list {name}` on a machine with network, copy that "
        "cache here (or set HF_HOME to it) and set HF_HUB_OFFLINE=1, or give a local .jsonl task",
    )
