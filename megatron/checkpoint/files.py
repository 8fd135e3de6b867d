"""Files of a checkpoint: fragments, the manifest that certifies itself and them, and their verification."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.config.schema import WEIGHT
from megatron.errors import UserError, require
from megatron.files import read_object, replace_file, sha256_of

if TYPE_CHECKING:  # who only asks what a folder holds does not wait for torch
    import torch

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best.json"  # which step's validation is the best of the run
NEXT = "latest.next"  # what `latest` will hold when the save in progress is through: it outlives a kill between the renames
FORMAT = 2  # 2 carries a checksum of itself; 1, without it, is still read
SEAL = "sha256"
AVERAGED_FROM = "averaged_from"  # field of the manifest of a mean of checkpoints: which ones
AVERAGE_UPDATES = "average_updates"  # field of the manifest where there is an average: updates that it has seen
_RULE, _FIX = "a manifest must be as it was written", "restore it, or choose another --load-tag"
ABANDONED = "abandoned"  # folder of branches that a run has left
VALIDATIONS = "validations"  # folder of the sums behind the validations of a run
ORIGIN = "huggingface"  # folder of a run with the config.json and tokenizer from which it was imported


@dataclass(frozen=True)
class Fragment:
    """A flat range of one tensor-parallel shard, as one rank holds it.

    Attributes:
        kind: WEIGHT, AVERAGE, "exp_avg", "exp_avg_sq" or "momentum"; readers leave kinds alone that they do not ask for.
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


def grouped(keys: Iterable[str]) -> dict[str, list[str]]:
    """Keys of fragments as the manifest lists them: names of fragments under the kinds, joined by spaces, that each of them
    has."""
    kinds: dict[str, list[str]] = {}
    for key in sorted(keys):
        kind, name = key.split("/", 1)
        kinds.setdefault(name, []).append(kind)
    groups: dict[str, list[str]] = {}
    for name, held in kinds.items():
        groups.setdefault(" ".join(held), []).append(name)
    return groups


def ungrouped(groups: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """The inverse of :func:`grouped`."""
    return (f"{kind}/{name}" for kinds, names in groups.items() for name in names for kind in kinds.split(" "))


def step_of(tag: str | Path) -> int:
    """The step in the name of a tag; −1 where it is no name of a tag."""
    match = re.fullmatch(r"global_step([0-9]{1,18})", Path(tag).name)
    return int(match.group(1)) if match else -1


def tag_folders(run_dir: Path) -> list[Path]:
    """Folders of a run that are named like a tag, complete or not, highest step first."""
    tags = [path for path in run_dir.glob("global_step*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(tags, key=step_of, reverse=True)


def name_in(file: Path) -> str | None:
    """What a file such as ``latest`` says; None without it."""
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None


def delete_tag(folder: Path) -> None:
    """Delete a tag, its manifest first: half-deleted it is no checkpoint. Of a link, what it names stays.

    Raises:
        OSError: not all of it could be deleted.
    """
    if folder.is_symlink():
        folder.unlink()
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_manifest(tag: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest, sealed with a checksum of its own content."""
    content = json.loads(json.dumps({**manifest, "format": FORMAT}))
    replace_file(tag / MANIFEST, json.dumps({**content, SEAL: _seal_of(content)}, indent=1))


def read_manifest(tag: Path) -> dict[str, Any]:
    """The manifest of a tag, certified by its own checksum (format 1 had none; its fields are checked by type).

    The tokenizer that an imported run keeps is named where it lies now.

    Raises:
        UserError: it is absent, unreadable, damaged or of a format that this version does not know.
    """
    path = tag / MANIFEST
    if not path.is_file():
        kind = "a DeepSpeed checkpoint" if list(tag.glob("mp_rank_*")) else "no checkpoint of this project"
        raise UserError(
            f"{tag} has no {MANIFEST} ({kind if tag.is_dir() else 'there is no such folder'})",
            "a checkpoint is complete only with its manifest",
            "convert others with tools/convert_checkpoint.py, or choose another --load",
        )
    manifest = read_object(path, rule=_RULE, fix=_FIX)
    version, rule = manifest.get("format"), f"this version reads 1 to {FORMAT}"
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise UserError(f"{path} has format {version!r}", rule, "update the project, or load another")
    if (version > 1 or SEAL in manifest) and manifest.get(SEAL) != _seal_of(manifest):
        raise _damaged(path, "fails its own checksum")
    if wrong := [name for name, is_valid in _FIELDS.items() if not _holds(is_valid, manifest.get(name))]:
        raise _damaged(path, f"holds no valid {', '.join(wrong)}")
    data, kept = manifest["config"].get("data", {}), tag.resolve().parent / ORIGIN
    if Path(str(data.get("tokenizer_model"))).name == ORIGIN and kept.is_dir():
        data["tokenizer_model"] = str(kept)  # of the run, wherever that was moved to
    return manifest


def check_use(tag: Path, manifest: Mapping[str, Any], weights: str, *, goes_on: bool = False) -> None:
    """Check what is wanted of a checkpoint.

    Args:
        tag, manifest: which one.
        weights: kind of weights.
        goes_on: training is to go on from it, as the run that wrote it.

    Raises:
        UserError: it holds no such weights, or belongs to no run.
    """
    given, rule = f"checkpoint {tag} has no averaged weights ({weights})", "a run keeps their average with --ema-decay"
    has_them = weights == WEIGHT or AVERAGE_UPDATES in manifest
    require(has_them, given, rule, "load its trained weights (--load-kind weight), or another checkpoint")
    is_mean = f"{tag} is a mean of checkpoints"
    require(
        not (goes_on and AVERAGED_FROM in manifest), is_mean, "it belongs to no run", "start from it with --finetune"
    )


def complaints(tag: Path, *, part: int = 0, parts: int = 1, checksums: bool = True) -> Iterator[str]:
    """What keeps a tag from being used: its manifest, or files of it.

    Args:
        tag: folder of the tag.
        part, parts: check every ``parts``-th file from ``part`` on, to share the work between ranks.
        checksums: read the files; otherwise only their sizes are compared.
    """
    try:
        files = sorted(read_manifest(tag)["files"].items())
    except UserError as error:
        yield error.given
        return
    for name, expected in files[part::parts]:
        path = tag / name
        try:
            if not path.is_file():
                yield f"{name} is missing"
            elif path.stat().st_size != expected["bytes"]:
                yield f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            elif checksums and sha256_of(path) != expected["sha256"]:
                yield f"{name} fails its checksum"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror or error})"


def _seal_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of all but the seal, whatever its layout on the page."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} {how}", _RULE, _FIX)


def _holds(is_valid: Callable[[Any], bool], value: Any) -> bool:
    """Whether a value passes its check; one of another type fails in it."""
    try:
        return is_valid(value)
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_tensor(tensor: Any) -> bool:
    """Whether these are the fields of a :class:`ShardSpec`."""
    shape, dim, blocks = tensor["shape"], tensor["dim"], tensor["blocks"]
    is_counted = isinstance(shape, list) and isinstance(blocks, list) and all(map(_is_count, [*shape, *blocks]))
    return is_counted and (dim is None or (_is_count(dim) and sum(blocks) == shape[dim]))


def _is_files(value: Any) -> bool:
    """Whether these are plain names, at least one, with sizes, checksums and, in tags of today, the keys that they hold."""
    return bool(value) and all(
        Path(name).name == name
        and _is_count(file["bytes"])
        and isinstance(file["sha256"], str)
        and all(isinstance(each, str) for names in file.get("keys", {}).values() for each in names)
        for name, file in value.items()
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "consumed_samples": _is_count,
    "optimizer_steps": _is_count,
    AVERAGE_UPDATES: lambda value: value is None or _is_count(value),
    "config": lambda value: all(isinstance(section, dict) for section in value.values()),
    "tensors": lambda value: all(map(_is_tensor, value.values())),
    "files": _is_files,
}
