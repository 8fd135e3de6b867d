"""The list of branches in the run.json of a run that others left."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from megatron.errors import Failure
from megatron.files import one_at_a_time, replace_file
from megatron.runs.record import RECORD, RECORD_LOCK, Link


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
