"""Files of a run directory: manifests, tags, verification, atomic replacement."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"


KINDS = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A flat range of one tensor-parallel shard, as one rank holds it.

    Attributes:
        kind: "weight", "exp_avg" or "exp_avg_sq".
        name: canonical name of the tensor.
        tp_rank, tp_size: which shard.
        start: first element of the range in the flattened shard.
        data: [n] fp32; saving reads it, loading writes it.
    """

    kind: str
    name: str
    tp_rank: int
    tp_size: int
    start: int
    data: torch.Tensor

    @property
    def key(self) -> str:
        """Name inside the file."""
        return f"{self.kind}/{self.name}/{self.tp_rank}-{self.tp_size}/{self.start}"


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_manifest(tag: Path) -> dict[str, Any]:
    """The manifest of a tag.

    Raises:
        ValueError: it is absent, unreadable or of another format.
    """
    path = tag / MANIFEST
    if not path.is_file():
        kind = "a DeepSpeed checkpoint" if list(tag.glob("mp_rank_*")) else "no checkpoint of this project"
        raise UserError(
            f"{tag} has no {MANIFEST} ({kind})",
            "a checkpoint is complete only with its manifest",
            "convert others with tools/convert_checkpoint.py, or choose another --load",
        )
    try:
        manifest = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})", "it must be JSON", "choose another --load-tag") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')}", f"this version reads {FORMAT}", "update the project"
        )
    return manifest


def checkpoint_tags(run_dir: Path) -> list[Path]:
    """Folders of complete tags, newest step first."""
    tags = [path for path in run_dir.glob("global_step*") if (path / MANIFEST).is_file() and _step_of(path) is not None]
    return sorted(tags, key=lambda path: _step_of(path) or 0, reverse=True)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"global_step(\d+)", path.name)
    return int(match.group(1)) if match else None


def damaged_files(tag: Path, *, part: int = 0, parts: int = 1, checksums: bool = True) -> Iterator[str]:
    """Complaints about the files of a tag.

    Args:
        tag: folder with a manifest.
        part, parts: check every ``parts``-th file from ``part`` on, to share the work between ranks.
        checksums: read the files; otherwise only their sizes are compared.
    """
    files = sorted(read_manifest(tag)["files"].items())
    for name, expected in files[part::parts]:
        path = tag / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != expected["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        elif checksums and file_checksum(path) != expected["sha256"]:
            yield f"{name} fails its checksum"


def find_checkpoint(load: Path, tag: str | None = None, *, checksums: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``--load`` and ``--load-tag`` mean.

    Args:
        load: folder of a run, or of one tag.
        tag: name of a tag, or "latest"; default: the newest one that verifies.
        checksums: verify contents, not only sizes.

    Returns:
        The folder of the tag, or None where the run has no checkpoint yet; and what was skipped and why.

    Raises:
        ValueError: the tag asked for is absent or damaged, or every checkpoint is.
    """
    if (load / MANIFEST).is_file():
        candidates = [load]
    elif tag is not None:
        name = (load / "latest").read_text().strip() if tag == "latest" and (load / "latest").is_file() else tag
        read_manifest(load / name)
        candidates = [load / name]
    else:
        candidates = checkpoint_tags(load)
        if not candidates and (load / "latest").is_file():
            read_manifest(load / (load / "latest").read_text().strip())  # says what kind of checkpoint it is
    skipped: list[str] = []
    for candidate in candidates:
        complaints = list(damaged_files(candidate, checksums=checksums))
        if not complaints:
            return candidate, skipped
        skipped.append(f"{candidate.name}: {'; '.join(complaints)}")
    if skipped:
        raise UserError(
            f"no checkpoint in {load} can be used ({' | '.join(skipped)})",
            "files must match their manifest",
            "restore them or choose another --load",
        )
    return None, skipped


def remove_old_checkpoints(run_dir: Path, *, keep_last: int, keep: set[int]) -> None:
    """Delete all but the newest ``keep_last`` tags and those of the steps in ``keep``."""
    for tag in checkpoint_tags(run_dir)[keep_last:]:
        if _step_of(tag) not in keep:
            (tag / MANIFEST).unlink()  # first, so that a half-deleted tag is no checkpoint
            shutil.rmtree(tag)
