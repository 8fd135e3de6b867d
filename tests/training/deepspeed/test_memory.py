"""What is said of DeepSpeed's memory is what real engines hold: every tensor that can be reached from one is counted."""

from __future__ import annotations

import gc
import itertools
import json
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.training.deepspeed.memory import Partition, held, optimizer_groups
from megatron.training.deepspeed.pipeline import blocks_of_stages
from megatron.training.held import Held

ATOMS = (type, types.ModuleType, types.CodeType, types.FrameType, str, bytes, int, float, type(None))


def storages(roots: Sequence[Any], without: Sequence[Any]) -> dict[int, int]:
    """Bytes of every storage that tensors reachable from ``roots`` have, by its address; not through ``without``."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    seen = {id(item): item for item in without}  # kept, because the next object may have the number of one that is gone
    found, waiting = {}, list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (*ATOMS, DeviceMesh)):  # a mesh is on the host
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            if isinstance(item, DTensor):
                waiting.append(item.to_local())
            elif item.device.type != "meta":
                found[item.untyped_storage()._cdata] = item.untyped_storage().nbytes()
            waiting += [item.__dict__, item._base, item.grad if item.is_leaf else None]
        elif isinstance(item, types.FunctionType):  # its globals are the whole program
            waiting += [item.__closure__, item.__defaults__]
        else:
            waiting += gc.get_referents(item)
    return found


def bytes_held(module: Any, others: Sequence[Any], without: Sequence[Any]) -> int:
    """Bytes of all tensors that a module and ``others`` lead to, but for rotary tables, which are counted apart."""
    from megatron.model.attention import RotaryEmbedding

    tables = [part for part in module.modules() if isinstance(part, RotaryEmbedding)]
    rotary = sum(t.untyped_storage().nbytes() for table in tables for t in (table.cos, table.sin))
    return sum(storages((module, *others), without).values()) - rotary


def census(argv: list[str]) -> dict[str, Any]:
    """Bytes that the engine of this rank holds, without rotary tables: ``between`` steps, and ``backward``, when the
    embedding has its gradient; with its parameters and settings."""
    from megatron.model.gpt import Embedding
    from megatron.training.main import main
    from megatron.training.step import Observer

    found: dict[str, Any] = {}

    class Counter(Observer):
        steps = passes = 0

        def built(self, engine: Any) -> None:
            self.engine = engine
            parameters = list(engine.module.parameters())
            found["parameters"] = [tuple(getattr(p, "ds_shape", p.shape)) for p in parameters]
            found["settings"] = engine._deepspeed._config._param_dict
            found["has_average"], found["is_pipeline"] = engine.shards.average is not None, engine.is_pipeline
            found["dp"] = (engine.context.dp.rank, engine.context.dp.size)
            for module in engine.module.modules():
                if isinstance(module, Embedding):
                    module.word_embeddings.weight.register_post_accumulate_grad_hook(self.embedding_done)

        def embedding_done(self, parameter: Any) -> None:
            self.passes += 1
            if self.passes == 2 * self.engine.num_micro_batches:  # the last one of the second step
                found["backward"] = self.count()

        def step_ended(self, result: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                found["between"] = self.count()

        def count(self) -> int:
            engine = self.engine
            # The engine of a pipeline also keeps the last micro-batches, and what travelled between stages.
            aside = [self, *[engine._deepspeed] * engine.is_pipeline]
            return bytes_held(engine.module, (engine.optimizer, engine._deepspeed, engine.shards), aside)

    assert main("mdm", argv, observer=Counter()) == 0
    return found


# Widths that no number of ranks divides, so that everything is padded.
SHAPE = {"hidden_size": 36, "num_attention_heads": 2, "ffn_hidden_size": 50, "micro_batch_size": 2, "train_iters": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"zero{stage} dp{dp}": (dp, {"bf16": True, "zero_stage": stage}) for stage in (1, 2, 3) for dp in (1, 2)},
    "zero2 dp2, one micro-batch": (2, {"bf16": True, "zero_stage": 2, "micro_batch_size": 4}),
    "zero1 dp2, kept": (2, {"bf16": True, "deepspeed": {"bf16": {"immediate_grad_update": False}}}),
    "zero3 dp2, all cut": (2, {"bf16": True, "zero_stage": 3, "deepspeed":
        {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}),
    "zero2 tp2": (2, {"bf16": True, "zero_stage": 2, "tp_size": 2}),
    "zero1 pp2": (2, {"bf16": True, "pp_size": 2}),
    "fp32 dp2": (2, {}),
    "fp32 pp2": (2, {"pp_size": 2, "num_layers": 3}),
    # The table of embeddings is more than a rank's part, so the second rank touches more than the first.
    "zero2 fp32 dp2, many tokens": (2, {"zero_stage": 2, "vocab_size": 1900}),
    **{f"host zero{stage} {'bf16' if low else 'fp32'} dp2": (2, {"cpu_optimizer": True, "zero_stage": stage, "bf16": low})
       for stage in (1, 2, 3) for low in (False, True)},
    "host zero2 fp32 dp2, one micro-batch": (2, {"cpu_optimizer": True, "zero_stage": 2, "micro_batch_size": 4}),
    "averaged zero1 dp2": (2, {"bf16": True, "ema_decay": 0.9}),
    "averaged zero3 dp2": (2, {"bf16": True, "zero_stage": 3, "ema_decay": 0.9}),
}  # fmt: skip
# While a pass runs it depends on the moment which tensors are whole, and on the stage which gradient comes last.
BETWEEN_ONLY = ("zero3 dp2, all cut", "zero1 pp2")


def claimed(found: dict[str, Any]) -> Held:
    """What is said of the engine that was counted."""
    rank, size = found["dp"]
    partition = Partition(optimizer_groups(found["parameters"]), size)
    options = {"is_pipeline": found["is_pipeline"], "has_average": found["has_average"]}
    own, most = (held(found["settings"], partition, rank=each, **options) for each in (rank, None))
    for name in ("between", "forward", "backward", "update"):  # what is planned with
        assert sum(getattr(own, name).values()) <= sum(getattr(most, name).values())
    return own


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_bytes_equal_the_census_of_a_real_engine(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, name: str
) -> None:
    size, changes = LAYOUTS[name]
    changes = {**SHAPE, **changes}
    if (file := changes.pop("deepspeed", None)) is not None:
        (tmp_path / "deepspeed.json").write_text(json.dumps(file))
        changes["deepspeed_config"] = tmp_path / "deepspeed.json"
    for found in pools(size).run(census, jobs.flags(token_files, tmp_path / "run", **changes)):
        said = claimed(found)
        assert found["between"] == sum(said.between.values()) + said.host, (name, said)
        if name not in BETWEEN_ONLY:
            assert found["backward"] == sum(said.backward.values()) + said.host, (name, said)


def test_stages_are_dealt_out_by_their_work() -> None:
    """No other way makes the slowest stage faster; of equal ones the first stages, which hold most activations, have fewest."""
    for layers, count, head in itertools.product((2, 3, 7, 24, 26), (1, 2, 3, 4), (0.0, 0.4, 1.0, 1.7, 30.0)):
        if count > layers:
            continue
        found = blocks_of_stages(layers, count, head=head)
        assert len(found) == count and sum(found) == layers and min(found) >= 1
        assert count == 1 or found[:-1] == sorted(found[:-1])

        def slowest(blocks: Sequence[int], head: float = head) -> float:
            return max([*blocks[:-1], blocks[-1] + head])

        cuts = itertools.combinations(range(1, layers), count - 1)
        every = [[b - a for a, b in itertools.pairwise((0, *cut, layers))] for cut in cuts] if layers < 24 else []
        assert all(slowest(found) <= slowest(other) for other in every)
    assert blocks_of_stages(24, 2, head=0.0) == [12, 12]
    assert blocks_of_stages(26, 4, head=1.7) == [7, 7, 7, 5]
    assert blocks_of_stages(26, 4, head=0.0) == [6, 6, 7, 7]
