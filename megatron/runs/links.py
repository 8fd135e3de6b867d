"""Links between runs, kept in both run.json: a branch names the run that it left, and that run lists its branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

RECORD = "run.json"
RECORD_LOCK = ".run.json.lock"  # held for a moment by whoever changes run.json: the run itself, and branches of it
Record = TypeVar("Record")


@dataclass(frozen=True)
class Link:
    """Another run: its folder, its run id, and the checkpoint (and step) that it shares with this one."""

    run: str
    run_id: str
    tag: str
    step: int


@dataclass(frozen=True)
class Branch(Link):
    """Where a run left another one (``--branch-from``); kept in run.json and in its checkpoints.

    Attributes:
        samples: consumed by then.
        order_samples: that the data order of both is planned for.
        changed: settings that differ from there on, ``section.name`` → [before, now].
    """

    samples: int
    order_samples: int
    changed: dict[str, list[Any]] = field(default_factory=dict)


def branch_of(values: Mapping[str, Any]) -> Branch | None:
    """The branch that a manifest or a run.json records."""
    found = values.get("branch")
    return None if found is None else of_known_fields(Branch, found)


def of_known_fields(cls: type[Record], values: dict[str, Any]) -> Record:
    """A record from JSON; fields of other versions are passed over.

    Raises:
        TypeError: a field is missing.
    """
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in known})
