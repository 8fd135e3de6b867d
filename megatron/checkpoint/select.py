"""Which checkpoint ``--load`` means: the one answer, for training, inference, conversion and upload.

The newest checkpoint of a run is the one that ``latest`` names, else the one that was written last. Each candidate is
tried on its own; one that cannot be used is skipped with words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.checkpoint.files import (
    BEST,
    LATEST,
    MANIFEST,
    NEXT,
    complaints,
    name_in,
    read_manifest,
    step_of,
    tag_folders,
)
from megatron.config.schema import WEIGHT
from megatron.errors import UserError, require

if TYPE_CHECKING:
    from megatron.parallel.context import ParallelContext

# A folder to try, and ""; or a file that names none, and why.
_Candidate = tuple[Path, str]


@dataclass(frozen=True)
class Selection:
    """The answer.

    Attributes:
        tag: folder of the checkpoint, or None where the folder holds none and a run starts fresh.
        manifest: that of the tag; empty without one.
        skipped: what was passed over though it is newer, each with its reason.
        weights: kind that was validated as the best one, where the best was asked for; else the trained weights.
    """

    tag: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    weights: str = WEIGHT

    @property
    def warning(self) -> str | None:
        """One line about what was skipped, or None."""
        return f"warning: skipped checkpoints: {'; '.join(self.skipped)}" if self.skipped else None


def select(load: str | Path, tag: str | None = None, *, checksums: bool = True) -> Selection:
    """The checkpoint that ``--load`` and ``--load-tag`` mean.

    Args:
        load: folder of a run, or of one tag.
        tag: name of a tag, "latest", or "best"; default: the newest that can be used.
        checksums: verify the contents of its files, not only their sizes.

    Raises:
        UserError: the tag asked for cannot be used, or none of several can; each is listed with its reason.
    """
    load = Path(load)
    found = _first_usable(load, _candidates(load, tag), partial(complaints, checksums=checksums))
    return replace(found, weights=str(_best(load).get("weights", WEIGHT))) if tag == "best" else found


def agree_on_checkpoint(load: str | Path, tag: str | None, context: ParallelContext) -> Selection:
    """:func:`select` with all checksums as a collective call: the first rank names, all ranks share the reading.

    Raises:
        UserError: on every rank, as in :func:`select`.
    """

    def all_complaints(path: Path) -> Iterable[str]:
        own = list(complaints(path, part=context.rank, parts=context.world_size))
        return dict.fromkeys(complaint for part in context.gather_objects(own) for complaint in part)

    load = Path(load)
    candidates: list[_Candidate] = []
    error: Exception | None = None
    if context.is_first_rank:  # file systems may show the others different folders
        try:
            candidates = list(_candidates(load, tag))
        except (UserError, OSError) as refused:
            error = refused
    candidates, error = context.gather_objects((candidates, error))[0]
    if error is not None:
        raise error
    return _first_usable(load, candidates, all_complaints)


def newest_first(run_dir: Path) -> list[tuple[Path, dict[str, Any] | None]]:
    """Folders of tags with their manifests from the newest on: that of ``latest``, those without a manifest that can be
    read (to be said), then by time of writing."""
    named = _named(run_dir)

    def recency(tag: tuple[Path, dict[str, Any] | None]) -> tuple[bool, bool, str, int]:
        path, manifest = tag
        written = str((manifest or {}).get("saved_at", ""))  # format 1 has none: by step
        return (path, "") == named, manifest is None, written, step_of(path)

    return sorted(((path, _manifest(path)) for path in tag_folders(run_dir)), key=recency, reverse=True)


def _manifest(tag: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(tag)
    except UserError:
        return None


def _candidates(load: Path, tag: str | None) -> Iterator[_Candidate]:
    """What to try, in order."""
    if (load / MANIFEST).is_file() or (step_of(load) >= 0 and load.is_dir() and not tag_folders(load)):
        require(
            tag in (None, load.name),
            f"--load {load} is one checkpoint and --load-tag is {tag}",
            "one of them names it",
            "drop --load-tag",
        )
        yield load, ""
        return
    if tag not in (None, LATEST):
        name = _best_tag(load) if tag == "best" else str(tag)
        require(
            Path(name).name == name,
            f"the tag {name}",
            f"it is the name of a folder in {load}",
            "pass such as global_step100",
        )
        yield load / name, ""
        return
    named = _named(load)
    if named is not None:
        yield named
    elif tag == LATEST:
        raise UserError(
            f"{load} has no file {LATEST}", "--load-tag latest reads it", "name the tag, or drop --load-tag"
        )
    if tag is None:
        yield from ((path, "") for path, _ in newest_first(load) if (path, "") != named)


def _best(load: Path) -> dict[str, Any]:
    """What best.json says; empty where it cannot be read."""
    try:
        return dict(json.loads((load / BEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _best_tag(load: Path) -> str:
    """Name of the checkpoint at the best validation."""
    try:
        name = f"global_step{int(_best(load)['step'])}"
    except (ValueError, TypeError, KeyError):
        name = ""
    require(
        bool(name) and (load / name).is_dir(),
        f"{load} keeps no checkpoint of its best validation" + (f" ({name})" if name else f" (no {BEST})"),
        "--load-tag best loads it",
        "train with --save-best, or name another tag",
    )
    return name


def _named(load: Path) -> _Candidate | None:
    """What ``latest`` names (or will, once an interrupted save is completed); None without such a file."""
    for file in (load / NEXT, load / LATEST):
        text = name_in(file)
        if text is None:
            continue
        is_name = step_of(text) >= 0 and Path(text).name == text
        if file.name == LATEST and not is_name:
            return file, f"it holds {text[:80]!r}, no name of a checkpoint of this project"
        if file.name == LATEST or (is_name and (load / text / MANIFEST).is_file()):
            return load / text, ""
    return None


def _first_usable(
    load: Path, candidates: Iterable[_Candidate], complaints_of: Callable[[Path], Iterable[str]]
) -> Selection:
    skipped: list[str] = []
    for path, reason in candidates:
        if reasons := reason or ", ".join(complaints_of(path)):
            skipped.append(f"{path.name} ({reasons})")
            continue
        if (path, "") == _named(load):  # later ones: somebody went back, or `latest` is damaged
            later = [tag for tag in tag_folders(load) if step_of(tag) > step_of(path)]
            skipped += [f"{tag.name} (`{LATEST}` names {path.name})" for tag in later]
        return Selection(path, read_manifest(path), tuple(skipped))
    there = [tag.name for tag in tag_folders(load)][-4:]
    others = f" (there: {', '.join(there)})" if there else ""
    require(
        not skipped,
        f"no checkpoint in {load} can be used: {'; '.join(skipped)}",
        "a checkpoint needs its manifest and every file as they were written",
        f"restore them, name another checkpoint{others}, or convert with tools/convert_checkpoint.py",
    )
    return Selection()
