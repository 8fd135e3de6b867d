"""Which checkpoint ``--load`` means: the one answer, for training, inference, conversion and upload.

The newest checkpoint of a run is the one that ``latest`` names, else the one that was written last. Each candidate is
tried on its own; one that cannot be used is skipped with words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.checkpoint.files import LATEST, MANIFEST, NEXT, damaged_files, read_manifest, step_of, tag_folders
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.warm_start import AutoregressiveStart
from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.parallel.context import ParallelContext


@dataclass(frozen=True)
class Selection:
    """The answer.

    Attributes:
        tag: folder of the checkpoint, or None where the folder holds none and a run starts fresh.
        manifest: that of the tag.
        skipped: name and reason of everything newer that was passed over.
    """

    tag: Path | None = None
    manifest: dict[str, Any] | None = None
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def warning(self) -> str | None:
        """One line about what was skipped, or None."""
        if not self.skipped:
            return None
        return "warning: skipped checkpoints: " + "; ".join(f"{name} ({reason})" for name, reason in self.skipped)


@dataclass(frozen=True)
class _Candidate:
    """A folder to try, or (``path`` None) something that names none, and why."""

    name: str
    path: Path | None = None
    reason: str = ""


def select(load: str | Path, tag: str | None = None, *, checksums: bool = True) -> Selection:
    """The checkpoint that ``--load`` and ``--load-tag`` mean.

    Args:
        load: folder of a run, or of one tag.
        tag: name of a tag, or "latest"; default: the newest that can be used.
        checksums: verify the contents of its files, not only their sizes.

    Raises:
        UserError: the tag asked for cannot be used, or none of several can; each is listed with its reason.
    """

    def complaints(path: Path) -> list[str]:
        return _complaints(path, checksums=checksums)

    return _first_usable(Path(load), _candidates(Path(load), tag), complaints)


def agree_on_checkpoint(load: str | Path, tag: str | None, context: ParallelContext) -> Selection:
    """:func:`select` with all checksums as a collective call: the first rank names, all ranks share the reading.

    Raises:
        UserError: on every rank, as in :func:`select`.
    """

    def complaints(path: Path) -> list[str]:
        own = _complaints(path, part=context.rank, parts=context.world_size)
        return list(dict.fromkeys(complaint for part in context.gather_objects(own) for complaint in part))

    return _first_usable(Path(load), _from_first_rank(_candidates(Path(load), tag), context), complaints)


def named_tag(run_dir: Path) -> Path | None:
    """The folder that ``latest`` names (or will, once an interrupted save is completed); it need not be there."""
    found = _named(run_dir)
    return None if found is None else found.path


def newest_first(run_dir: Path) -> list[Path]:
    """Folders of tags from the newest on: that of ``latest``, unreadable ones (to be said), then by time of writing."""
    named = named_tag(run_dir)

    def recency(path: Path) -> tuple[bool, bool, str, int]:
        step = step_of(path) or 0
        if path == named:
            return True, True, "", step
        try:
            return False, False, str(read_manifest(path).get("saved_at", "")), step  # format 1: by step
        except UserError:
            return False, True, "", step

    return sorted(tag_folders(run_dir), key=recency, reverse=True)


def _candidates(load: Path, tag: str | None) -> Iterator[_Candidate]:
    """What to try, in order."""
    if (load / MANIFEST).is_file() or (step_of(load) is not None and load.is_dir() and not tag_folders(load)):
        if tag not in (None, load.name):
            raise UserError(
                f"--load {load} is one checkpoint and --load-tag is {tag}", "one of them names it", "drop --load-tag"
            )
        yield _Candidate(load.name, load)
        return
    if tag not in (None, LATEST):
        if Path(str(tag)).name != tag:
            raise UserError(f"--load-tag {tag}", "it is the name of a folder in --load", "pass such as global_step100")
        yield _Candidate(str(tag), load / str(tag))
        return
    named = _named(load)
    if named is not None:
        yield named
    elif tag == LATEST:
        raise UserError(
            f"{load} has no file {LATEST}", "--load-tag latest reads it", "name the tag, or drop --load-tag"
        )
    if tag is None:
        for path in newest_first(load):
            if named is None or path != named.path:
                yield _Candidate(path.name, path)


def _named(load: Path) -> _Candidate | None:
    """What ``latest`` names; None without such a file."""
    for file in (load / NEXT, load / LATEST):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace").strip()
        path = load / text if step_of(Path(text)) is not None and Path(text).name == text else None
        if file.name == LATEST and path is None:
            return _Candidate(LATEST, None, f"it holds {text[:80]!r}, no name of a checkpoint of this project")
        if path is not None and (file.name == LATEST or (path / MANIFEST).is_file()):
            return _Candidate(path.name, path)
    return None


def _complaints(path: Path, *, part: int = 0, parts: int = 1, checksums: bool = True) -> list[str]:
    """What keeps a tag from being used, as far as this part of its files shows."""
    try:
        return list(damaged_files(path, part=part, parts=parts, checksums=checksums))
    except UserError as error:
        return [error.given]


def _first_usable(
    load: Path, candidates: Iterable[_Candidate], complaints_of: Callable[[Path], list[str]]
) -> Selection:
    skipped: list[tuple[str, str]] = []
    for candidate in candidates:
        complaints = [candidate.reason] if candidate.path is None else complaints_of(candidate.path)
        if candidate.path is not None and not complaints:
            if not skipped and candidate.path == named_tag(load):
                skipped = _newer(load, candidate.path)
            return Selection(candidate.path, read_manifest(candidate.path), tuple(skipped))
        skipped.append((candidate.name, ", ".join(complaints)))
    if skipped:
        raise UserError(
            f"no checkpoint in {load} can be used: " + "; ".join(f"{name} ({reason})" for name, reason in skipped),
            "a checkpoint needs its manifest and every file as they were written",
            "restore them, choose another --load or --load-tag, or convert with tools/convert_checkpoint.py",
        )
    return Selection()


def _newer(load: Path, named: Path) -> list[tuple[str, str]]:
    """Tags of later steps than the one that ``latest`` names: somebody went back, or the file is damaged."""
    later = [path for path in tag_folders(load) if (step_of(path) or 0) > (step_of(named) or 0)]
    return [(path.name, f"`{LATEST}` names {named.name}") for path in later]


def _from_first_rank(candidates: Iterator[_Candidate], context: ParallelContext) -> Iterator[_Candidate]:
    """The first rank's candidates, or its error, on every rank: file systems may show them different folders."""
    while True:
        item: _Candidate | Exception | None = None
        if context.is_first_rank:
            try:
                item = next(candidates, None)
            except (UserError, OSError) as error:
                item = error
        item = context.gather_objects(item)[0]
        if isinstance(item, Exception):
            raise item
        if item is None:
            return
        yield item


def open_checkpoint(tag: Path, config: Config, *, vocab_size: int) -> CheckpointReader | AutoregressiveStart:
    """The checkpoint itself, or with a mask token where masked diffusion starts from a model that never used one."""
    reader = CheckpointReader(tag)
    mask_id, padded = config.objective.mask_token_id, config.model.padded_vocab_size
    was_masked = reader.config.objective.mask_token_id is not None
    if not config.run.finetune or was_masked or mask_id is None or padded is None:
        return reader
    return AutoregressiveStart(reader, vocab_size=vocab_size, mask_id=mask_id, padded_vocab_size=padded)
