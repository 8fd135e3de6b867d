"""Checkpoints that belong to no layout.

Every rank writes what it holds: flat ranges of its tensor-parallel shards of weights (fp32 masters) and optimizer
moments, under their canonical names, in one safetensors file. A reader puts any tensor, or any range of any shard,
together again, so a run saved with one tensor/pipeline/data/ZeRO layout continues in any other. Nothing is unpickled.

    RUN/global_step100/shard-00000.safetensors   keys "kind/name/tp_rank-tp_size/start", flat fp32
    RUN/global_step100/manifest.json             step, samples, config, tensors, files with sizes and checksums
    RUN/latest                                   text: global_step100

A tag is written under another name and renamed when its manifest is complete; ``latest`` moves last. An interrupted
save therefore leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron.checkpoint.files import FORMAT, MANIFEST, Fragment, file_checksum
from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.errors import UserError
from megatron.files import write_atomically
from megatron.parallel.context import ParallelContext
from megatron.parallel.sharding import ShardSpec


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
        state: ``step``, ``consumed_samples``, ``optimizer_steps``, ``config`` (a Config) and anything else for JSON.
        context: this process.

    Returns:
        The folder of the tag.

    Raises:
        OSError: on every rank, if any rank could not write; the tag does not exist then, older ones are untouched.
    """
    tag = run_dir / f"global_step{state['step']}"
    scratch = run_dir / f"{tag.name}.saving"
    error, written = _attempt(lambda: _write_shard(scratch, fragments, context))
    reports = context.gather_objects((error, written, dict(specs)))
    failure = next((f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report[0]), None)
    if failure is None and context.is_first_rank:
        tensors = {name: spec for report in reports for name, spec in report[2].items()}
        files = {report[1]["name"]: {k: report[1][k] for k in ("bytes", "sha256")} for report in reports}
        failure, _ = _attempt(lambda: _publish(run_dir, scratch, tag, _manifest(state, tensors, files)))
    failure = context.gather_objects(failure)[0]
    if failure is not None:
        if context.is_first_rank:
            shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(
            f"checkpoint {tag} could not be written ({failure}); saving needs a writable folder with room for 12 bytes per "
            "parameter; free space or change --save; earlier checkpoints are complete and untouched"
        )
    return tag


def _attempt(action: Any) -> tuple[str | None, Any]:
    """Run; an error of the operating system comes back as text, because other ranks must hear of it."""
    try:
        return None, action()
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own RuntimeError
        return f"{type(error).__name__}: {error}", None
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            return f"{type(error).__name__}: {error}", None
        raise


def _write_shard(scratch: Path, fragments: Iterable[Fragment], context: ParallelContext) -> dict[str, Any]:
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"shard-{context.rank:05d}.safetensors"
    tensors = {f.key: f.data.detach().to("cpu", torch.float32).contiguous() for f in fragments}
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_checksum(path)}


def _manifest(state: dict[str, Any], tensors: Mapping[str, ShardSpec], files: dict[str, Any]) -> dict[str, Any]:
    described = {
        name: {"shape": list(spec.full_shape), "dim": spec.dim, "blocks": list(spec.blocks)}
        for name, spec in sorted(tensors.items())
    }
    config: Config = state["config"]
    return {"format": FORMAT, **state, "config": config_to_dict(config), "tensors": described, "files": files}


def _publish(run_dir: Path, scratch: Path, tag: Path, manifest: dict[str, Any]) -> None:
    for path in scratch.iterdir():  # shards of an earlier, interrupted save with more ranks
        if path.name not in manifest["files"]:
            path.unlink()
    write_atomically(scratch / MANIFEST, json.dumps(manifest, indent=1))
    replaced = run_dir / f"{tag.name}.replaced"
    if tag.exists():  # of the same step, before the run was set back; deleted only when the new one stands
        shutil.rmtree(replaced, ignore_errors=True)
        tag.rename(replaced)
    try:
        scratch.rename(tag)
    except OSError:
        if replaced.exists():
            replaced.rename(tag)
        raise
    write_atomically(run_dir / "latest", tag.name)
    shutil.rmtree(replaced, ignore_errors=True)


def save_full_checkpoint(run_dir: Path, config: Config, tensors: Mapping[str, torch.Tensor], *, step: int = 0) -> Path:
    """Write a weights-only checkpoint from whole tensors under their canonical names (conversions end here).

    Raises:
        ValueError: names or shapes are not those of the model in ``config``.
        OSError: the folder cannot be written.
    """
    from megatron.model import Full, GPTModel

    with torch.device("meta"):
        parameters = dict(GPTModel(config.model, mask=Full()).named_parameters())
    specs = {p.canonical_name: p.shard_spec for p in parameters.values()}  # type: ignore[attr-defined]
    if missing := sorted(set(specs) - set(tensors)):
        raise UserError(
            f"tensors {missing} are missing", "the model has them", "check the source and its configuration"
        )
    if extra := sorted(set(tensors) - set(specs)):
        raise UserError(
            f"tensors {extra} are not part of the model", "nothing is dropped silently", "check the configuration"
        )
    for name, spec in specs.items():
        if tuple(tensors[name].shape) != spec.full_shape:
            raise UserError(
                f"{name} has shape {tuple(tensors[name].shape)}", f"the model has {spec.full_shape}", "check the sizes"
            )
    fragments = [Fragment("weight", name, 0, 1, 0, tensors[name].reshape(-1)) for name in specs]
    state = {"step": step, "consumed_samples": 0, "optimizer_steps": 0, "config": config}
    return write_checkpoint(Path(run_dir), fragments=fragments, specs=specs, state=state, context=ParallelContext())
