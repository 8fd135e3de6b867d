"""Reads tensors, or ranges of tensor-parallel shards, of a checkpoint that any layout wrote."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron.checkpoint.files import Fragment, check_use, read_manifest
from megatron.config import config_from_dict
from megatron.config.schema import WEIGHT, Config
from megatron.errors import UserError
from megatron.parallel.sharding import ShardSpec

KEY = re.compile(r"([^/]+)/(.+)/([0-9]+)-([0-9]+)/([0-9]+)")  # see Fragment.key


class CheckpointReader:
    """Reads tensors, or ranges of shards, of one tag. Files are mapped, so a rank reads only what it asks for.

    Attributes:
        path, manifest, config: of the tag.
        specs: whole shape and split of every tensor, by name.
        replaced: whole weights, fp32, that are read in place of the saved ones.
    """

    def __init__(self, tag: Path, weights: str = WEIGHT) -> None:
        """Args:
        tag: folder with a manifest.
        weights: kind that is read as the weights: the trained ones, or AVERAGE.

        Raises:
            UserError: no manifest, one of another format, a shard that cannot be read, or no weights of that kind.
        """
        self.path, self.weights = Path(tag), weights
        self.manifest = read_manifest(self.path)
        check_use(self.path, self.manifest, weights)
        self.config: Config = config_from_dict(self.manifest["config"])
        self.specs = {
            name: ShardSpec(tuple(t["shape"]), t["dim"], tuple(t["blocks"]))
            for name, t in self.manifest["tensors"].items()
        }
        self.replaced: dict[str, torch.Tensor] = {}
        self._files: dict[str, Any] = {}
        self._index: dict[tuple[str, str, int], list[tuple[int, str, str]]] = {}
        self._tp_sizes: dict[tuple[str, str], int] = {}
        self._read_headers()

    def tensor(self, name: str, kind: str = WEIGHT) -> torch.Tensor:
        """A whole tensor, fp32, on the CPU.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if kind == WEIGHT and name in self.replaced:
            return self.replaced[name]
        kind = self.weights if kind == WEIGHT else kind
        spec, tp_size = self._spec(name), self._tp_size(name, kind)
        shape = spec.local_shape(tp_size)
        numel = int(torch.Size(shape).numel())
        ranks = range(tp_size if spec.dim is not None else 1)
        shards = [self._flat(kind, name, rank, 0, numel).view(shape) for rank in ranks]
        return spec.combine(shards)

    def read(self, fragment: Fragment) -> None:
        """Fill ``fragment.data`` from the checkpoint, whatever layout wrote it."""
        name, data = fragment.name, fragment.data
        kind = self.weights if fragment.kind == WEIGHT else fragment.kind
        spec = self._spec(name)
        if name not in self.replaced and (spec.dim is None or self._tp_size(name, kind) == fragment.tp_size):
            rank = 0 if spec.dim is None else fragment.tp_rank
            data.copy_(self._flat(kind, name, rank, fragment.start, data.numel()))
        else:
            shard = spec.shard(self.tensor(name, fragment.kind), fragment.tp_rank, fragment.tp_size).reshape(-1)
            data.copy_(shard[fragment.start : fragment.start + data.numel()])

    def _spec(self, name: str) -> ShardSpec:
        if name not in self.specs:
            raise UserError(
                f"checkpoint {self.path} has no tensor {name}",
                "it was saved from another architecture",
                "load it with the model flags in its manifest.json",
            )
        return self.specs[name]

    def _tp_size(self, name: str, kind: str) -> int:
        if (kind, name) not in self._tp_sizes:
            raise UserError(
                f"checkpoint {self.path} has no {kind} of {name}",
                "it holds weights only or is incomplete",
                "pass --no-load-optim or --finetune to start with a fresh optimizer",
            )
        return self._tp_sizes[kind, name]

    def _read_headers(self) -> None:
        """Index what the shards hold: every key of the form kind/name/tp_rank-tp_size/start, whatever its kind."""
        for file_name in self.manifest["files"]:
            path = self.path / file_name
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} cannot be read ({error})", "a shard must be as it was written", "choose another --load-tag"
                ) from error
            self._files[file_name] = file
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if match := KEY.fullmatch(key):
                    kind, name, tp_rank, tp_size, start = match.groups()
                    self._tp_sizes[kind, name] = int(tp_size)
                    self._index.setdefault((kind, name, int(tp_rank)), []).append((int(start), file_name, key))
        for fragments in self._index.values():
            fragments.sort()

    def _flat(self, kind: str, name: str, tp_rank: int, start: int, numel: int) -> torch.Tensor:
        """Elements start … start + numel − 1 of one flattened shard."""
        pieces, position = [], start
        for first, file_name, key in self._index.get((kind, name, tp_rank), []):
            saved = self._files[file_name].get_slice(key)
            high = min(start + numel, first + saved.get_shape()[0])
            if first <= position < high:
                pieces.append((position, high, saved, first))
                position = high
        if position != start + numel:  # seen before memory is taken for what a manifest merely claims
            raise UserError(
                f"checkpoint {self.path}: {kind} of {name} has {position - start} of {numel} elements",
                "a shard is missing",
                "load another tag with --load-tag",
            )
        result = torch.empty(numel)
        for low, high, saved, first in pieces:
            result[low - start : high - start] = saved[low - first : high - first]
        return result
