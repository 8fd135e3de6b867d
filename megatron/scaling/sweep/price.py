"""What a run of a sweep takes, by the arithmetic of ``megatron doctor --preflight``: model FLOPs with attention, hours and
dollars at the stated utilisation, and memory of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.scaling.sweep.definition import dollars, hours
from megatron.scaling.sweep.sweep_run import SweepRun
from megatron.training.preflight import case_of, footprints


@dataclass(frozen=True)
class Price:
    """What one run takes.

    Attributes:
        flops: of the model, attention counted, recomputation not: what utilisation is a share of.
        hours: on the devices of the price, or None where the sweep names none.
        dollars: in all, or None without a price of an hour.
        bytes: of the fullest GPU where one replica trains alone: at most, as ZeRO shares more among more.
    """

    flops: float
    hours: float | None
    dollars: float | None
    bytes: int


def price_of(run: SweepRun, price: Mapping[str, Any]) -> Price:
    """The price of one run.

    Args:
        run: of the sweep.
        price: its assumptions; see :func:`megatron.scaling.sweep.definition.hours`.

    Raises:
        UserError: flags that the run would be refused for.
    """
    case = case_of(run.parsed(), run.replica, vocab_size=run.vocab_size)
    flops = case.flops_per_token * run.unique_tokens * run.epochs * run.added_share
    return Price(flops, hours(flops, price), dollars(flops, price), footprints(case)[0].total)
