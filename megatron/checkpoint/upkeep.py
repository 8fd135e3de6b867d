"""Keeping a run directory in order: going back, what killed processes left, and checkpoints that are no longer wanted.

All of it is for one process at a time: the first rank, under the run's lock. What is not a checkpoint of this project is
never touched. Every function returns lines to print.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.files import (
    ABANDONED,
    LATEST,
    MANIFEST,
    NEXT,
    VALIDATIONS,
    complaints,
    delete_tag,
    name_in,
    step_of,
    tag_folders,
)
from megatron.checkpoint.select import newest_first
from megatron.errors import Failure
from megatron.files import make_folder, replace_file

OWN_FILE = re.compile(r"shard-[0-9]{5,}\.safetensors|manifest\.json|\.?manifest\.json[\w.]*\.tmp")
# Those of megatron.files, and of its predecessor.
OWN_TEMPORARY = re.compile(r"\.[\w.\-]+\.[0-9]+\.[0-9a-f]{8}\.tmp|(?:latest|run\.json|best\.json)\.tmp")


def set_back(run_dir: Path, tag: Path) -> list[str]:
    """Make ``tag`` the newest checkpoint of the run; call it once between loading and the first save.

    Checkpoints of later steps belong to a branch that is left now (``--load-tag``, or a fall back to an older one) and
    move to ``abandoned/``, from the last to the first; then ``latest`` names ``tag``. Killed in between, it can be done again.

    Args:
        run_dir: folder of the run that is about to save.
        tag: what was loaded. Of another folder: nothing is done.

    Raises:
        Failure: a folder could not be moved.
    """
    if tag.resolve().parent != run_dir.resolve() or step_of(tag) < 0:
        return []
    later = [path for path in tag_folders(run_dir) if step_of(path) > step_of(tag)]
    is_stale = name_in(run_dir / LATEST) != tag.name
    try:
        if later and (metrics := run_dir / "metrics.jsonl").is_file():  # its rows go from the run's own with the branch
            shutil.copyfile(metrics, _free_name(run_dir / ABANDONED, metrics.name))
        for path in later:
            path.rename(_free_name(run_dir / ABANDONED, path.name))
        if is_stale:
            replace_file(run_dir / LATEST, tag.name)
    except OSError as error:
        raise Failure(
            f"{error.filename or run_dir} could not be changed ({error.strerror or error})",
            "going back moves later checkpoints aside",
            "make the run directory writable, or train into another --save",
        ) from error
    said = []
    if later:
        names = ", ".join(path.name for path in later)
        said.append(f"moved {names} to {run_dir / ABANDONED}: a branch that this run leaves; delete it when you like")
    if is_stale:
        said.append(f"`{LATEST}` names {tag.name} now")
    return ["; ".join(said)] if said else []


def remove_old_checkpoints(run_dir: Path, *, keep_last: int, keep: set[int | None]) -> list[str]:
    """Delete the checkpoints of this run but the newest ``keep_last`` and those of the steps in ``keep``.

    The one that ``latest`` names is the newest. Those of another run (by run id) or without a readable manifest are
    neither counted nor deleted. What cannot be deleted is said, and no reason to end a run.
    """
    known = [(tag, manifest.get("run_id")) for tag, manifest in newest_first(run_dir) if manifest is not None]
    own = [tag for tag, run_id in known if run_id in (None, known[0][1])]  # format 1 had no run ids
    lines: list[str] = []
    for tag in own[keep_last:]:
        if step_of(tag) not in keep:
            with _errors_said(tag, lines):
                delete_tag(tag)
    return lines


def sweep_leftovers(run_dir: Path) -> list[str]:
    """Complete or undo what killed processes began; call it at start, before a checkpoint is chosen.

    A save that was killed between its renames is completed, or the tag whose place it took is put back; other halves
    (``.saving``, ``.replaced``, temporary files, half-deleted tags) are deleted where they hold nothing but our files.
    """
    lines: list[str] = []
    named = name_in(run_dir / NEXT)
    for path in sorted(run_dir.glob("global_step*.*"), reverse=True):  # .saving before .replaced
        tag, ending = path.with_suffix(""), path.suffix
        if ending not in (".saving", ".replaced") or step_of(tag) < 0 or not path.is_dir():
            continue
        with _errors_said(path, lines):
            if not tag.exists() and (ending == ".replaced" or named == tag.name) and _is_complete(path):
                path.rename(tag)
                lines.append(f"completed {tag}, which a killed save had left as {path.name}")
            else:
                lines.append(_delete_if_own(path, "an interrupted save"))
    if named is not None:
        with _errors_said(run_dir / NEXT, lines):
            lines += _complete_latest(run_dir, named)
    latest = step_of(name_in(run_dir / LATEST) or "")
    for tag in tag_folders(run_dir):
        # One without a manifest that is older than `latest` was being deleted; a later one is said when a tag is chosen.
        if step_of(tag) < latest and not (tag / MANIFEST).exists():
            with _errors_said(tag, lines):
                lines.append(_delete_if_own(tag, "a half-deleted checkpoint"))
    for path in sorted([*run_dir.glob("*.tmp"), *(run_dir / VALIDATIONS).glob("*.tmp")]):
        if OWN_TEMPORARY.fullmatch(path.name) and path.is_file():
            with _errors_said(path, lines):
                path.unlink()
                lines.append(f"removed {path} (a temporary file)")
    return lines


def _is_complete(folder: Path) -> bool:
    """Whether a folder has a manifest, and the files that it lists in their sizes."""
    return not any(complaints(folder, checksums=False))


def _complete_latest(run_dir: Path, named: str) -> list[str]:
    if step_of(named) < 0 or not _is_complete(run_dir / named):
        (run_dir / NEXT).unlink()
        return []
    os.replace(run_dir / NEXT, run_dir / LATEST)
    return [f"`{LATEST}` names {named} now: its save was interrupted at the last moment"]


def _delete_if_own(folder: Path, what: str) -> str:
    """Delete a folder of nothing but our files; another one is left. Returns the line that says which."""
    foreign = sorted(path.name for path in folder.iterdir() if not OWN_FILE.fullmatch(path.name) or path.is_dir())
    if foreign:
        return f"left {folder} ({what}) alone: it holds {', '.join(foreign[:5])}"
    delete_tag(folder)
    return f"removed {folder} ({what})"


@contextmanager
def _errors_said(path: Path, lines: list[str]) -> Iterator[None]:
    """Go on after an error of the operating system, with a line: tidying is no reason to end a run."""
    try:
        yield
    except OSError as error:
        lines.append(f"warning: {path} could not be removed or renamed ({error.strerror or error})")


def _free_name(folder: Path, name: str) -> Path:
    make_folder(folder)
    taken = {path.name for path in folder.iterdir()}
    names = [name, *(f"{name}.{number}" for number in range(2, len(taken) + 3))]
    return folder / next(each for each in names if each not in taken)
