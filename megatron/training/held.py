"""What an engine holds for one rank, in bytes: plans ask before there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace

FLOAT, COUNT = 4, 8
Parts = dict[str, int]
# Of a rank's parameters, in the order of the module.
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Held:
    """Bytes of one rank by part: weights, gradients, optimizer (masters, moments, counters), buckets.

    Attributes:
        between: what stays from step to step.
        forward: when the last backward pass of a step begins.
        backward: at the end of a backward pass, before anything is reduced or freed.
        update: while gradients are reduced and weights updated.
        host: pinned host memory of an optimizer that is kept there.
    """

    between: Parts
    forward: Parts
    backward: Parts
    update: Parts
    host: int = 0

    def with_state(self, more: int, *, on_host: bool) -> Held:
        """The same with more bytes of optimizer state."""
        if on_host:
            return replace(self, host=self.host + more)
        moments = (self.between, self.forward, self.backward, self.update)
        between, forward, backward, update = ({**parts, "optimizer": parts["optimizer"] + more} for parts in moments)
        return Held(between, forward, backward, update, self.host)
