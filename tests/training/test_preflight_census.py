"""Preflight against real engines: what it says of a command line is what a run of that command line holds, byte for byte.

``memory.py`` of each engine is told the shapes of real parameters in ``deepspeed/test_memory.py`` and ``fsdp2/test_memory.py``;
here preflight finds shapes, stages and tables by itself, of models and objectives that are not the usual ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from training.deepspeed.test_memory import SHAPE, bytes_held


def census(objective: str, argv: list[str], world: int) -> dict[str, Any]:
    """Bytes that the engine of this rank holds between steps, and its rotary tables, each with what preflight says."""
    from megatron.model.attention import RotaryEmbedding
    from megatron.objectives import parse
    from megatron.training.main import main
    from megatron.training.preflight import case_of, footprints, held_by, num_parameters
    from megatron.training.step import Observer

    found: dict[str, Any] = {}

    class Counter(Observer):
        steps = 0

        def built(self, engine: Any) -> None:
            self.engine = engine

        def step_ended(self, result: Any) -> None:
            self.steps += 1
            if self.steps < 2:
                return
            engine, case = self.engine, case_of(parse(argv, objective=objective, world_size=world), world)
            stage = engine.context.pp.rank
            if case.layout.engine == "fsdp2":
                others, aside = (engine.optimizer, engine._own, engine.shards), [self, engine]
            else:
                others = (engine.optimizer, engine._deepspeed, engine.shards)
                aside = [self, *[engine._deepspeed] * engine.is_pipeline]
            tables = [part for part in engine.module.modules() if isinstance(part, RotaryEmbedding)]
            storages = {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for r in tables for t in (r.cos, r.sin)
            }
            held = held_by(case, stage)
            said = sum(held.between.values()) + held.host
            rotary = {each.parts["rotary"] for each in footprints(case) if each.stage == stage}
            found["dp_rank"] = engine.context.dp.rank
            found["state"] = bytes_held(engine.module, others, aside), said
            found["rotary"] = {sum(storages.values())}, rotary
            found["parameters"] = num_parameters(case)

    assert main(objective, argv, observer=Counter()) == 0
    return found


CLASSIC = {
    "normalization": "layernorm",
    "no_swiglu": True,
    "no_use_rotary_position_embeddings": True,
    "no_disable_bias_linear": True,
    "max_position_embeddings": 41,
}
GROUPED = {
    "num_attention_heads": 4,
    "kv_channels": 6,
    "num_query_groups": 2,
    "untie_embeddings_and_output_weights": True,
}
PACKED = {"reset_position_ids": True, "reset_attention_mask": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries, untied, tp2": ("ar", {"tp_size": 2, **GROUPED}),
    "classic, zero2": ("ar", {"zero_stage": 2, **CLASSIC}),
    "classic, zero3, averaged": ("mdm", {"zero_stage": 3, "ema_decay": 0.9, **CLASSIC}),
    "classic, fsdp2 zero3 tp2, averaged": (
        "mdm",
        {"engine": "fsdp2", "zero_stage": 3, "tp_size": 2, "ema_decay": 0.9, **CLASSIC},
    ),
    "packed, fsdp2 in fp32": ("ar", {"engine": "fsdp2", "bf16": False, "ema_decay": 0.5, **PACKED}),
    "mir_ar, zero2, averaged": ("mir_ar", {"zero_stage": 2, "ema_decay": 0.9}),
    "block diffusion, fsdp2": ("block_diffusion", {"engine": "fsdp2", "block_size": 8}),
    "dual": ("dual", {}),
    "uneven pipeline, untied": ("ar", {"num_layers": 3, "pp_size": 2, "untie_embeddings_and_output_weights": True}),
    "uneven pipeline, recomputed": ("mdm", {"num_layers": 5, "pp_size": 2, "recompute_activations": True}),
    "tp2 without sequence parallelism": ("mdm", {"tp_size": 2, "no_sequence_parallel": True}),
    "odd vocabulary, fsdp2": ("mdm", {"engine": "fsdp2", "vocab_size": 507, "padded_vocab_size": 509}),
    "optimizer in host memory": ("mdm", {"cpu_optimizer": True, "zero_stage": 2, "ema_decay": 0.9}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_bytes_equal_the_census_of_the_run(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, name: str
) -> None:
    objective, changes = CASES[name]
    argv = jobs.flags(token_files, tmp_path, **{"bf16": True, **SHAPE, **changes})
    found = pools(2).run(census, objective, argv, 2)
    for each in found:
        if each["dp_rank"] == 0:  # which holds most
            assert each["state"][0] == each["state"][1]
            assert each["rotary"][0] == each["rotary"][1]
    manifest = json.loads((tmp_path / "global_step2" / "manifest.json").read_text())
    assert found[0]["parameters"] == sum(prod(tensor["shape"]) for tensor in manifest["tensors"].values())
