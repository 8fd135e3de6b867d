"""What FSDP2 holds for one rank, in bytes, by the shapes of the model alone: plans ask before there is an engine.

A test counts every tensor of real engines and finds the same number, between steps and at the end of a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from megatron.config.schema import Config
from megatron.training.held import COUNT, FLOAT, Held, Shapes


@dataclass(frozen=True)
class Rows:
    """Parameters of which each data-parallel rank has as many rows, the last ones padded.

    Attributes:
        shapes: of whole parameters.
        dp_size: data-parallel ranks.
    """

    shapes: Shapes
    dp_size: int

    @property
    def padded(self) -> int:
        """Elements of one rank."""
        return sum(ceil(rows / self.dp_size) * prod(rest) for rows, *rest in self.shapes)

    @property
    def whole(self) -> int:
        """Elements where they are gathered."""
        return self.dp_size * self.padded

    def own(self, rank: int) -> list[int]:
        """Elements of each parameter that a rank has without padding; none where there are too few rows."""
        found = []
        for rows, *rest in self.shapes:
            most = ceil(rows / self.dp_size)
            found.append(min(most, max(0, rows - rank * most)) * prod(rest))
        return found


def held(config: Config, block: Shapes, outside: Shapes, *, num_blocks: int, dp_size: int, rank: int = 0) -> Held:
    """What the engine of one rank holds besides activations.

    Args:
        config: of the run, its global batch filled in.
        block: shapes of one block's parameters on a tensor-parallel rank.
        outside: of embedding, last norm and head.
        num_blocks: blocks of the model.
        dp_size: data-parallel ranks.
        rank: of these; the first has most.
    """
    run, optimizer = config.run, config.optimizer
    assert run.global_batch_size is not None
    width = 2 if run.bf16 else FLOAT
    every, one, ends = Rows(block * num_blocks + outside, dp_size), Rows(block, dp_size), Rows(outside, dp_size)
    own = every.own(rank)
    counters = FLOAT * (sum(map(bool, own)) + 1 + (optimizer.clip_grad > 0))  # steps, whether to skip, the divisor
    average = (FLOAT * sum(own) + COUNT) * (optimizer.ema_decay is not None)
    state = FLOAT * every.padded + 2 * FLOAT * sum(own) + counters + average
    between = {"weights": 0, "gradients": 0, "optimizer": state, "buckets": 0}
    keeps_weights = config.parallel.zero_stage < 3
    sums = FLOAT * sum(map(prod, every.shapes)) if run.global_batch_size > run.micro_batch_size * dp_size else 0
    is_gathered = dp_size > 1 and not (sums and keeps_weights)  # in this pass: what came last stays until its end
    weights = every.whole if keeps_weights else ends.whole + 2 * one.whole  # one computes, and the next one arrives
    forward = {
        **between,
        "weights": width * weights,
        "gradients": sums,
        "buckets": is_gathered * width * one.whole,
    }
    # Last come the gradients of what is outside the blocks: they are copied, in fp32, to be reduced.
    backward = {
        **between,
        "weights": width * ends.whole,
        "gradients": FLOAT * (every.padded - ends.padded) + (FLOAT if sums else width) * ends.whole,
        "buckets": FLOAT * (ends.whole + ends.padded),
    }
    return Held(between, forward, backward, {**between, "gradients": FLOAT * every.padded})
