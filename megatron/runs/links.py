"""Links between runs, kept in both run.json: a branch names the run that it left, and that run lists its branches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from megatron.errors import Failure
from megatron.files import one_at_a_time, replace_file

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


def add_branch(run_dir: Path, link: Link, *, parent_id: str) -> str | None:
    """Put a branch on the list of a run, which may be training; one of the same folder is replaced.

    Args:
        run_dir: folder of the run.
        link: to the branch.
        parent_id: run id of the run: another one there is left alone; "" of checkpoints that have none.

    Returns:
        Why it could not be done, or None. That is no reason to end the branch: its own record has the link, too.
    """
    try:
        with one_at_a_time(run_dir / RECORD_LOCK):
            values = json.loads((run_dir / RECORD).read_bytes())  # whole: a newer version may know more fields
            if parent_id and values.get("run_id") != parent_id:
                return "its run.json is of another run"
            others = [other for other in values.get("branches", []) if other.get("run") != link.run]
            replace_file(run_dir / RECORD, json.dumps({**values, "branches": [*others, asdict(link)]}, indent=1))
    except (OSError, ValueError, AttributeError, Failure) as error:
        return str(error)
    return None


def of_known_fields(cls: type[Record], values: dict[str, Any]) -> Record:
    """A record from JSON; fields of other versions are passed over.

    Raises:
        TypeError: a field is missing.
    """
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: value for name, value in values.items() if name in known})
