"""Masked diffusion with an exact number of masked tokens (Ou et al., arXiv 2406.03736; Nie et al., arXiv 2502.09992,
equation 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.objectives.mdm import MaskedDiffusion, TimeOptions


@dataclass(frozen=True)
class ExactCountMDM(MaskedDiffusion):
    """m ~ U{1 … L} tokens of a sequence of L, chosen uniformly, are masked; each weighs L / m.

    In expectation ``Σ_masked (L / m) · ce / L`` is the bound of masked diffusion without the floor on p: integrating the
    linear schedule over t leaves each m with the same probability 1/(L + 1) and weight 1/p becomes (L + 1)/m, and m = 0
    adds nothing. The number of masked tokens has no variance left for given t. Times are stratified, so m is too.
    """

    Options: ClassVar[type] = TimeOptions

    @property
    def has_exact_counts(self) -> bool:
        """Always."""
        return True
