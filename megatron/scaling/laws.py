"""The laws that are fitted and compared, by name, and published coefficients of one.

Which losses each can show: ``can_rise`` says whether epochs can be too many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron.scaling.chinchilla import CHINCHILLA, DATA_CONSTRAINED
from megatron.scaling.memorisation import MEMORISATION
from megatron.scaling.penalty import PRESCRIPTIVE, U_SHAPED
from megatron.scaling.points import Array, Law, Points, Reference

__all__ = [
    "CHINCHILLA",
    "DATA_CONSTRAINED",
    "LAWS",
    "MEMORISATION",
    "PRESCRIPTIVE",
    "U_SHAPED",
    "Coefficients",
    "Law",
    "Points",
    "Reference",
]

LAWS: dict[str, Law] = {law.name: law for law in (CHINCHILLA, DATA_CONSTRAINED, PRESCRIPTIVE, U_SHAPED, MEMORISATION)}


@dataclass(frozen=True)
class Coefficients:
    """Published values of one law. ``theta`` in the order of the law's ``names``; R_N may be infinite (N' = N), and a
    coefficient may be 0 (its term is not there)."""

    law: Law
    theta: tuple[float, ...]
    source: str
    values: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", dict(zip(self.law.names, self.theta)))

    def loss(self, parameters: object, tokens: object, unique_tokens: object) -> Array:
        """Loss in nats per token; arguments broadcast; shape [points]."""
        with np.errstate(divide="ignore"):  # a coefficient of 0
            phi = self.law.to_phi(np.array([self.theta]), Reference())
        return self.law.loss(phi, Points.of(parameters, tokens, unique_tokens), Reference())[0][0]
