"""What is said of FSDP2's memory is what real engines hold: every tensor that can be reached from one is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import jobs
from layouts.pool import WorkerPool

from megatron.training.fsdp2.memory import held
from training.deepspeed.test_memory import SHAPE, bytes_held


def census(argv: list[str]) -> dict[str, Any]:
    """Bytes that the engine of this rank holds, without rotary tables: ``between`` steps, and ``forward``, behind the last block
    of the last micro-batch; with what is said of them."""
    from megatron.training.main import main
    from megatron.training.step import Observer

    found: dict[str, Any] = {}

    class Counter(Observer):
        steps = passes = 0

        def built(self, engine: Any) -> None:
            model, dp = engine.module, engine.context.dp
            block, every = ([tuple(p.to_local().shape) for p in part.parameters()] for part in (model.layers[0], model))
            whole = [tuple(p.shape) for p in model.parameters()]
            first = every.index(block[0])
            count = len(model.layers) * len(block)
            outside = (*whole[:first], *whole[first + count :])
            block = whole[first : first + len(block)]
            options = {"num_blocks": len(model.layers), "dp_size": dp.size, "rank": dp.rank}
            found["said"] = held(engine.config, tuple(block), outside, **options)
            self.engine = engine
            model.final_layernorm.register_forward_pre_hook(self.blocks_done)

        def blocks_done(self, module: Any, given: Any) -> None:
            self.passes += 1
            if self.passes == 2 * self.engine.num_micro_batches:  # the last one of the second step
                found["forward"] = self.count()

        def step_ended(self, result: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                found["between"] = self.count()

        def count(self) -> int:
            engine = self.engine
            return bytes_held(engine.module, (engine.optimizer, engine._own, engine.shards), [self, engine])

    assert main("mdm", argv, observer=Counter()) == 0
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {"bf16": True}),
    "dp2": (2, {"bf16": True}),
    "dp2, one micro-batch": (2, {"bf16": True, "micro_batch_size": 4, "clip_grad": 0}),
    "zero3 tp2 dp2": (4, {"bf16": True, "zero_stage": 3, "tp_size": 2}),
    "fp32 dp2, averaged": (2, {"ema_decay": 0.9}),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_bytes_equal_the_census_of_a_real_engine(
    pools: Callable[[int], WorkerPool], token_files: Path, tmp_path: Path, name: str
) -> None:
    size, changes = LAYOUTS[name]
    argv = jobs.flags(token_files, tmp_path / "run", engine="fsdp2", **{**SHAPE, **changes})
    for found in pools(size).run(census, argv):
        said = found["said"]
        assert found["between"] == sum(said.between.values()), said.between
        if "zero_stage" not in changes:  # there it depends on the moment which blocks are whole
            assert found["forward"] == sum(said.forward.values()), said.forward
