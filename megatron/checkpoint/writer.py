"""Checkpoints that belong to no layout.

Every rank writes what it holds: flat ranges of its tensor-parallel shards of weights (fp32 masters) and optimizer
moments, under their canonical names, in one safetensors file. A reader puts any tensor, or any range of any shard,
together again, so a run saved with one tensor/pipeline/data/ZeRO layout continues in any other. Nothing is unpickled.

    RUN/global_step100/shard-00000.safetensors   keys "kind/name/tp_rank-tp_size/start", flat fp32
    RUN/global_step100/manifest.json             step, samples, config, tensors, files (size, checksum, keys), its own checksum
    RUN/latest                                   text: global_step100

A tag is written under another name and renamed when its manifest is complete; ``latest`` moves last. An interrupted
save therefore leaves the earlier checkpoints as they were, and :mod:`megatron.checkpoint.upkeep` clears it away.

Either the ranks wait for their files, or each copies what it holds to host memory and a thread of its own writes it while
training goes on (``--async-save``); manifest and renames come later then, in the same way, when all files are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from megatron.checkpoint.files import LATEST, NEXT, Fragment, grouped, write_manifest
from megatron.config import config_to_dict
from megatron.config.schema import Config
from megatron.errors import Failure
from megatron.files import make_folder, replace_file, written_whole
from megatron.parallel.context import ParallelContext, Poll
from megatron.parallel.sharding import ShardSpec

BLOCK = 1 << 22  # bytes of a file that are hashed and written at a time
# As safetensors names them.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


class Staging:
    """Host memory for what a rank saves, kept from save to save, because to pin it takes long."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, fragments: Iterable[Fragment]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        """Start to copy: the tensors of the file, and when they are there; None: now.

        Whatever the device is given from now on comes after the copies, so that it may change what was copied.
        """
        found = list(fragments)
        is_on_device = any(fragment.data.is_cuda for fragment in found)
        sizes = [fragment.data.numel() for fragment in found]
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.float32, pin_memory=is_on_device)
        parts = self._buffer[: sum(sizes)].split(sizes)
        for part, fragment in zip(parts, found):
            part.copy_(fragment.data.detach(), non_blocking=True)
        copied = torch.cuda.Event() if is_on_device else None
        if copied is not None:
            copied.record()
        return {fragment.key: part for part, fragment in zip(parts, found)}, copied


class Saving:
    """One tag on its way to the disk. Every rank makes one, and all of them complete it together.

    Attributes:
        tag: the folder that it becomes.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        fragments: Iterable[Fragment],
        specs: Mapping[str, ShardSpec],
        state: dict[str, Any],
        context: ParallelContext,
        staging: Staging | None = None,
    ) -> None:
        """Write this rank's file, or begin to.

        Args:
            run_dir: folder of the run.
            fragments: what this rank holds and no other rank writes.
            specs: shape and split of this rank's tensors.
            state: ``step``, ``consumed_samples``, ``optimizer_steps``, ``config`` (a Config) and anything else for JSON, such
                as ``run_id``. The time of writing is added as ``saved_at``.
            context: this process.
            staging: copy the fragments there, and write them in a thread; None: write them now.
        """
        self._specs, self._state, self._context = specs, state, context
        self.tag = run_dir / f"global_step{state['step']}"
        self._scratch = run_dir / f"{self.tag.name}.saving"
        self._written: dict[str, Any] = {}
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._poll = None if context.control_group is None else Poll(context.control_group)
        if staging is None:
            self._write(lambda: {f.key: f.data.detach().to("cpu", torch.float32).contiguous() for f in fragments})
            return
        tensors, copied = staging.copy(fragments)

        def arrived() -> dict[str, torch.Tensor]:
            if copied is not None:
                copied.synchronize()
            return tensors

        self._thread = Thread(target=self._write, args=(arrived,), daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether the files of all ranks are there, or have failed; a collective call that waits for nobody. With several
        processes the answer is that to the call before."""
        is_there = self._thread is None or not self._thread.is_alive()
        return is_there if self._poll is None else self._poll.ask(not is_there) == [False]

    def publish(self) -> Path:
        """Wait for the files of all ranks and complete the tag; a collective call.

        Returns:
            The folder of the tag.

        Raises:
            Failure: on every rank, if any rank could not write. The tag does not exist then, older ones are untouched.
            BaseException: what else went wrong where this rank wrote.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and not isinstance(self._error, Failure):
            raise self._error
        if self._poll is not None:
            self._poll.end()
        context, scratch = self._context, self._scratch
        failure = None if self._error is None else f"rank {context.rank}: {self._error.given}"
        reports = context.gather_objects((failure, self._written, dict(self._specs)), everywhere=False)
        failure = next((report[0] for report in reports if report[0]), None)
        if failure is None and context.is_first_rank:
            tensors = {name: spec for report in reports for name, spec in report[2].items()}
            files = {name: file for report in reports for name, file in report[1].items()}
            try:
                _publish(self.tag.parent, scratch, self.tag, _manifest(self._state, tensors, files))
            except (Failure, OSError) as error:
                failure = error.given if isinstance(error, Failure) else str(error)
        failure = context.gather_objects(failure)[0]
        if failure is not None:
            if context.is_first_rank:
                shutil.rmtree(scratch, ignore_errors=True)
            raise Failure(
                f"checkpoint {self.tag} could not be written ({failure})",
                "saving needs a writable folder with room for 12 to 16 bytes per parameter",
                "free space, change --save, or raise ulimit -n; earlier checkpoints are complete and untouched",
            )
        return self.tag

    def _write(self, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        try:
            self._written = _write_shard(self._scratch, tensors(), self._context)
        # No thread may keep it: of a full disk all ranks must hear, of others the process fails.
        except BaseException as error:
            self._error = error


def _write_shard(scratch: Path, tensors: dict[str, torch.Tensor], context: ParallelContext) -> dict[str, Any]:
    """Returns name, size, checksum and keys of the file, as the manifest lists it."""
    path = scratch / f"shard-{context.rank:05d}.safetensors"
    with written_whole(path):
        make_folder(scratch.parent)
        scratch.mkdir(exist_ok=True)
        checksum = save_file(tensors, path)
        return {path.name: {"bytes": path.stat().st_size, "sha256": checksum, "keys": grouped(tensors)}}


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
    try:
        if tag.exists():  # of the same step, before the run was set back; deleted only when the new one stands
            shutil.rmtree(replaced, ignore_errors=True)
            tag.rename(replaced)
        scratch.rename(tag)
    except OSError:
        if replaced.exists():
            replaced.rename(tag)
        (run_dir / NEXT).unlink(missing_ok=True)
        raise
    os.replace(run_dir / NEXT, run_dir / LATEST)
    shutil.rmtree(replaced, ignore_errors=True)


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    """Write the file that ``safetensors.torch.save_file`` writes, byte for byte, to the disk; other threads run meanwhile, as in
    the library they do not.

    Returns:
        Its SHA-256, in hexadecimal, of what was to be written: nothing is read again.

    Raises:
        OSError: it could not be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for part in (head, *(_bytes_of(tensors[name]) for name in order)):
            for begin in range(0, len(part), BLOCK):
                block = part[begin : begin + BLOCK]
                digest.update(block)
                _write_all(file, block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_all(file: FileIO, block: memoryview) -> None:
    """A nearly full disk takes part of a block, and says at the next one why."""
    while block:
        block = block[file.write(block) :]
