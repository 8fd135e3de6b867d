"""Reads tensors, or ranges of tensor-parallel shards, of a checkpoint that any layout wrote.

The manifest says which file holds which fragments, so a rank opens the files of what it is to hold, and reads from them the
bytes of that and no others.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from pathlib import Path

import torch

from megatron.checkpoint.files import Fragment, check_use, read_manifest, ungrouped
from megatron.config import config_from_dict
from megatron.config.schema import WEIGHT, Config
from megatron.errors import UserError
from megatron.parallel.sharding import ShardSpec

KEY = re.compile(r"([^/]+)/(.+)/([0-9]+)-([0-9]+)/([0-9]+)")  # see Fragment.key
OPEN_FILES = 256  # at a time, of one checkpoint


class ShardFile:
    """An open safetensors file of flat fp32 tensors.

    Attributes:
        ranges: offset of the first byte and number of elements of the fp32 tensors, by key.
    """

    def __init__(self, path: Path) -> None:
        """Raises:
        UserError: it cannot be opened, or holds no table of tensors.
        """
        self.path, self._descriptor = path, -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            start = 8 + int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            size = os.fstat(self._descriptor).st_size
            if not 8 < start <= size:
                raise ValueError(f"a header that ends at byte {start} of {size}")
            header = json.loads(os.pread(self._descriptor, start - 8, 8))
            found = {key: tensor["data_offsets"] for key, tensor in header.items() if tensor.get("dtype") == "F32"}
            self.ranges = {key: (start + int(low), (int(high) - int(low)) // 4) for key, (low, high) in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(error) from error

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, key: str, first: int, data: torch.Tensor) -> None:
        """Fill ``data`` [n], fp32 in one piece on the CPU, with elements from ``first`` on.

        Raises:
            UserError: the disk fails, or the file ends before.
        """
        wanted = data.view(torch.uint8).numpy().data
        position = self.ranges[key][0] + 4 * first
        try:
            while wanted:
                count = os.preadv(self._descriptor, [wanted], position)
                if count == 0:
                    raise ValueError(f"it ends at byte {position}")
                wanted, position = wanted[count:], position + count
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} cannot be read ({error})", "a shard must be as it was written", "choose another --load-tag"
        )


class CheckpointReader:
    """Reads tensors, or ranges of shards, of one tag.

    Attributes:
        path, manifest, config: of the tag.
        specs: whole shape and split of every tensor, by name.
    """

    def __init__(self, tag: Path, weights: str = WEIGHT) -> None:
        """Args:
        tag: folder with a manifest.
        weights: kind that is read as the weights: the trained ones, or AVERAGE.

        Raises:
            UserError: no manifest, one of another format, no weights of that kind, or, in a tag without a map of its keys, a
                shard that cannot be read.
        """
        self.path, self.weights = Path(tag), weights
        self.manifest = read_manifest(self.path)
        check_use(self.path, self.manifest, weights)
        self.config: Config = config_from_dict(self.manifest["config"])
        self.specs = {
            name: ShardSpec(tuple(t["shape"]), t["dim"], tuple(t["blocks"]))
            for name, t in self.manifest["tensors"].items()
        }
        self._files: dict[str, ShardFile] = {}
        self._index: dict[tuple[str, str, int], list[tuple[int, str, str]]] = {}
        self._tp_sizes: dict[tuple[str, str], int] = {}
        self._find_fragments()

    def tensor(self, name: str, kind: str = WEIGHT) -> torch.Tensor:
        """A whole tensor, fp32, on the CPU.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        kind = self.weights if kind == WEIGHT else kind
        spec = self._spec(name)
        shards = range(self._tp_size(name, kind) if spec.dim is not None else 1)
        numel = torch.Size(spec.full_shape).numel()
        held = sum(self._held(fragment) for rank in shards for fragment in self._index.get((kind, name, rank), []))
        if held < numel:  # seen before memory is taken for what a manifest merely claims
            raise self._missing(kind, name, held, numel)
        whole = torch.empty(spec.full_shape)
        self.read(Fragment(kind, name, 0, 1, 0, whole.view(-1)))
        return whole

    def read(self, fragment: Fragment) -> None:
        """Fill ``fragment.data`` from the checkpoint, whatever layout wrote it."""
        name, data = fragment.name, fragment.data
        spec, (tp_rank, tp_size), first = self._spec(name), (fragment.tp_rank, fragment.tp_size), fragment.start
        kind = self.weights if fragment.kind == WEIGHT else fragment.kind
        is_direct = data.device.type == "cpu" and data.dtype == torch.float32 and data.is_contiguous()
        flat = data.detach() if is_direct else torch.empty(data.numel())
        saved_size = self._tp_size(name, kind)
        for part in spec.rectangles(tp_rank, tp_size, first, first + data.numel(), saved_size=saved_size):
            runs = flat.as_strided(
                (part.rows, part.width), (part.stride, 1), flat.storage_offset() + part.start - first
            )
            if part.rows > 1 and part.width == part.source_stride:  # all of the rows there
                block = torch.empty(part.rows * part.width)
                self._fill((kind, name, part.rank), part.source_start, block)
                runs.copy_(block.view(runs.shape))
                continue
            for row in range(part.rows):
                self._fill((kind, name, part.rank), part.source_start + row * part.source_stride, runs[row])
        if not is_direct:
            data.copy_(flat)

    def _spec(self, name: str) -> ShardSpec:
        """Of the tensor as it was saved."""
        if name not in self.specs:
            raise UserError(
                f"checkpoint {self.path} has no tensor {name}",
                "it was saved from another architecture",
                "load it with the model flags in its manifest.json",
            )
        return self.specs[name]

    def _tp_size(self, name: str, kind: str) -> int:
        size = self._tp_sizes.get((kind, name), 0)
        if size == 0 or any(block % size for block in self._spec(name).blocks):
            raise UserError(
                f"checkpoint {self.path} has no {kind} of {name}",
                "it holds weights only or is incomplete",
                "pass --no-load-optim or --finetune to start with a fresh optimizer",
            )
        return size

    def _find_fragments(self) -> None:
        """Index what the shards hold, whatever its kind: by the manifest, or by the file where that does not say it."""
        for file_name, listed in self.manifest["files"].items():
            keys = ungrouped(listed["keys"]) if "keys" in listed else self._file(file_name).ranges
            for key in keys:
                if match := KEY.fullmatch(key):
                    kind, name, tp_rank, tp_size, start = match.groups()
                    self._tp_sizes[kind, name] = int(tp_size)
                    self._index.setdefault((kind, name, int(tp_rank)), []).append((int(start), file_name, key))
        for fragments in self._index.values():
            fragments.sort()

    def _file(self, name: str) -> ShardFile:
        if name not in self._files:
            if len(self._files) == OPEN_FILES:
                del self._files[next(iter(self._files))]  # the one that was opened first
            self._files[name] = ShardFile(self.path / name)
        return self._files[name]

    def _held(self, fragment: tuple[int, str, str]) -> int:
        """How many elements a fragment has."""
        _, file_name, key = fragment
        return self._file(file_name).ranges.get(key, (0, 0))[1]

    def _fill(self, shard: tuple[str, str, int], start: int, data: torch.Tensor) -> None:
        """Read elements ``start`` … of one flattened shard (kind, name, rank) into ``data`` [n]."""
        position, end = start, start + data.numel()
        fragments = self._index.get(shard, [])
        behind = bisect_left(fragments, (start + 1,))  # the first that begins behind ``start``
        for fragment in fragments[max(0, behind - 1) :]:
            if position == end or fragment[0] > position:
                break
            first, file_name, key = fragment
            high = min(end, first + self._held(fragment))
            if position < high:
                self._file(file_name).read(key, position - first, data[position - start : high - start])
                position = high
        if position != end:
            raise self._missing(shard[0], shard[1], position - start, data.numel())

    def _missing(self, kind: str, name: str, found: int, wanted: int) -> UserError:
        return UserError(
            f"checkpoint {self.path}: {kind} of {name} has {found} of {wanted} elements",
            "a shard is missing",
            "load another tag with --load-tag",
        )
