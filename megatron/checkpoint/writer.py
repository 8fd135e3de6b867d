"""Checkpoints that belong to no layout.

Every rank writes what it holds: flat ranges of its tensor-parallel shards of weights (fp32 masters) and optimizer
moments, under their canonical names, in one safetensors file. A reader puts any tensor, or any range of any shard,
together again, so a run saved with one tensor/pipeline/data/ZeRO layout continues in any other. Nothing is unpickled.

    RUN/global_step100/shard-00000.safetensors   keys "kind/name/tp_rank-tp_size/start", flat fp32
    RUN/global_step100/manifest.json             step, samples, config, tensors, files with sizes and checksums, its own
    RUN/latest                                   text: global_step100

A tag is written under another name and renamed when its manifest is complete; ``latest`` moves last. An interrupted
save therefore leaves the earlier checkpoints as they were, and :mod:`megatron.checkpoint.upkeep` clears it away.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron.checkpoint.files import LATEST, NEXT, Fragment, write_manifest
from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.errors import Failure
from megatron.files import replace_file, sha256_of
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec

Result = TypeVar("Result")


def write_checkpoint(
    run_dir: Path,
    *,
    fragments: Iterable[Fragment],
    specs: Mapping[str, ShardSpec],
    state: dict[str, Any],
    context: ParallelContext,
) -> Path:
    """Write one tag; a collective call.

    Args:
        run_dir: folder of the run.
        fragments: what this rank holds and no other rank writes.
        specs: shape and split of this rank's tensors.
        state: ``step``, ``consumed_samples``, ``optimizer_steps``, ``config`` (a Config) and anything else for JSON, such
            as ``run_id``. The time of writing is added as ``saved_at``.
        context: this process.

    Returns:
        The folder of the tag.

    Raises:
        Failure: on every rank, if any rank could not write. The tag does not exist then, older ones are untouched.
    """
    tag = run_dir / f"global_step{state['step']}"
    scratch = run_dir / f"{tag.name}.saving"
    error, written = _attempt(lambda: _write_shard(scratch, fragments, context))
    reports = context.gather_objects((error, written, dict(specs)))
    failure = next((f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report[0]), None)
    if failure is None and context.is_first_rank:
        tensors = {name: spec for report in reports for name, spec in report[2].items()}
        files = {name: file for report in reports for name, file in report[1].items()}
        failure, _ = _attempt(lambda: _publish(run_dir, scratch, tag, _manifest(state, tensors, files)))
    failure = context.gather_objects(failure)[0]
    if failure is not None:
        if context.is_first_rank:
            shutil.rmtree(scratch, ignore_errors=True)
        raise Failure(
            f"checkpoint {tag} could not be written ({failure})",
            "saving needs a writable folder with room for 12 to 16 bytes per parameter",
            "free space, change --save, or raise ulimit -n; earlier checkpoints are complete and untouched",
        )
    return tag


def _attempt(action: Callable[[], Result]) -> tuple[str | None, Result | None]:
    """Run; an error of the operating system comes back as text, because other ranks must hear of it."""
    try:
        return None, action()
    except Failure as error:
        return error.given, None
    except OSError as error:
        return f"{error.filename}: {error.strerror}" if error.filename else f"{type(error).__name__}: {error}", None


def _write_shard(scratch: Path, fragments: Iterable[Fragment], context: ParallelContext) -> dict[str, Any]:
    """Returns name, size and checksum of the file, as the manifest lists it."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"shard-{context.rank:05d}.safetensors"
    tensors = {f.key: f.data.detach().to("cpu", torch.float32).contiguous() for f in fragments}
    save_tensors(path, tensors)
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}}


def _manifest(state: dict[str, Any], tensors: Mapping[str, ShardSpec], files: dict[str, Any]) -> dict[str, Any]:
    described = {
        name: {"shape": list(spec.full_shape), "dim": spec.dim, "blocks": list(spec.blocks)}
        for name, spec in sorted(tensors.items())
    }
    config: Config = state["config"]
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return {**state, "saved_at": now, "config": config_to_dict(config), "tensors": described, "files": files}


def _publish(run_dir: Path, scratch: Path, tag: Path, manifest: dict[str, Any]) -> None:
    for path in scratch.iterdir():  # shards of an earlier, interrupted save with more ranks
        if path.name not in manifest["files"]:
            path.unlink()
    write_manifest(scratch, manifest)
    replace_file(run_dir / NEXT, tag.name)
    replaced = run_dir / f"{tag.name}.replaced"
    if tag.exists():  # of the same step, before the run was set back; deleted only when the new one stands
        shutil.rmtree(replaced, ignore_errors=True)
        tag.rename(replaced)
    try:
        scratch.rename(tag)
    except OSError:
        if replaced.exists():
            replaced.rename(tag)
        (run_dir / NEXT).unlink(missing_ok=True)
        raise
    os.replace(run_dir / NEXT, run_dir / LATEST)
    shutil.rmtree(replaced, ignore_errors=True)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to the disk, with the permissions that the umask gives (the library makes 0600).

    Raises:
        Failure: it could not be written.
    """
    try:
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(tensors, path, metadata)
        path.chmod(mode)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise Failure(
            f"{path} could not be written ({error})",
            "tensors need a writable folder with room for them",
            "free space or choose another folder",
        ) from error
