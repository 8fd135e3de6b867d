"""Requests of lm-eval on their way to the scorers: groups of answers, random streams, and what is refused."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance

from megatron.errors import UserError
from megatron.evaluation.adaptive import Ranking

REFUSED = float("-inf")  # the log-likelihood of a refused request: it wins no comparison
SHOWN = 5  # refusals of a task that are printed one by one


class Group:
    """Requests that are scored together: the answers of one question.

    Args:
        key: task and item; the answers of a question share their noise by it.
        task: that the estimates are counted for.
        needs_greedy: whether greedy decoding is asked for (not for whole texts).
        ranking: how the metrics choose among the answers; None where they need the likelihoods themselves.
    """

    def __init__(self, *, key: str, task: str, needs_greedy: bool = True, ranking: Ranking | None = None) -> None:
        self.key = key
        self.task = task
        self.indices: list[list[int]] = []  # request numbers of each different answer
        self.strings: list[tuple[str, ...]] = []
        self.tokens: list[tuple[list[int], list[int]]] = []
        self.needs_greedy = needs_greedy
        self.ranking = ranking

    def add(self, index: int, strings: Sequence[str], tokens: tuple[list[int], list[int]]) -> None:
        """Add request number ``index``: its texts and its (context, target) ids.

        An answer that is there already is scored once: lm-eval repeats requests to give all ranks as many, and two equal
        answers would race for ever.
        """
        if tuple(strings) in self.strings:
            self.indices[self.strings.index(tuple(strings))].append(index)
            return
        self.indices.append([index])
        self.strings.append(tuple(strings))
        self.tokens.append(tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(len(context) + len(target) for context, target in self.tokens)


class Refusals:
    """Requests that cannot be run, by task and item. The evaluation goes on without them.

    The program leaves their items out of every metric; under lm-eval's own command their likelihood is ``-inf`` and their
    text empty.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, dict[str, str]] = defaultdict(dict)

    def add(self, instance: Instance, error: UserError) -> None:
        """Note a request and why it is refused; the first ones of a task are printed."""
        task, item = str(instance.task_name), str(instance.doc_id)
        instance.refused = str(error)  # type: ignore[attr-defined]  # read by tasks.attend
        if item in self.reasons[task]:
            return
        self.reasons[task][item] = str(error)
        if len(self.reasons[task]) <= SHOWN:
            print(f"refused: task {task} item {item}: {error}", file=sys.stderr, flush=True)

    def merge(self, others: Sequence[Refusals]) -> dict[str, dict[str, str]]:
        """The refusals of several ranks as JSON: reason by item, by task."""
        total: dict[str, dict[str, str]] = {}
        for other in others:
            for task, reasons in other.reasons.items():
                total.setdefault(task, {}).update(reasons)
        return {task: dict(sorted(reasons.items(), key=lambda pair: (len(pair[0]), pair[0]))) for task, reasons in
                sorted(total.items())}  # fmt: skip


def place_of(instance: Instance) -> tuple[str, Any]:
    """The question that a request belongs to: task and item; its own text where there is no item."""
    if instance.doc_id is None:
        return "text", instance.args[0]
    return str(instance.task_name), instance.doc_id


def stream_names(requests: Sequence[Instance]) -> list[str]:
    """A name for the random stream of every request: task, item and repeat.

    lm-eval asks for repeats by giving a request several times, so the repeat is counted. A stream is a function of nothing
    else: not of the place in a batch, nor of what was generated before an interruption.
    """
    seen: Counter[tuple[Any, ...]] = Counter()
    names = []
    for instance in requests:
        place = (*place_of(instance), instance.idx)
        names.append(f"{place[0]}/{place[1]}/{place[2]}/{seen[place]}")
        seen[place] += 1
    return names


def stream_number(name: str) -> int:
    """The sample number (see ``TokenSampling.generators``) of a named stream."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
