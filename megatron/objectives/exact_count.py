"""Masked diffusion with an exact number of masked tokens (Ou et al., arXiv 2406.03736; Nie et al., arXiv 2502.09992,
equation 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron import randomness as noise
from megatron.objectives.mdm import MaskedDiffusion, TimeOptions


@dataclass(frozen=True)
class ExactCountMDM(MaskedDiffusion):
    """m ~ U{1 … L} tokens of a sequence of L, chosen uniformly, are masked; each weighs L / m.

    In expectation ``Σ_masked (L / m) · ce / L`` is the bound of masked diffusion without the floor on p: integrating the
    linear schedule over t leaves each m with the same probability 1/(L + 1) and weight 1/p becomes (L + 1)/m, and m = 0
    adds nothing. The number of masked tokens has no variance left for given t. Times are stratified, so m is too.
    """

    Options: ClassVar[type] = TimeOptions

    def masks_and_weights(self, sample_ids: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Exactly m masked tokens a row, see :meth:`MaskedDiffusion.masks_and_weights`."""
        counts = 1 + np.floor(self.times(sample_ids) * seq_length).astype(np.int64)  # t < 1, so at most L
        is_masked = np.zeros((len(sample_ids), seq_length), dtype=bool)
        for row, (sample, count) in enumerate(zip(sample_ids.tolist(), counts)):
            random = noise.generator(self.seed, noise.Purpose.NOISE, sample)
            is_masked[row, random.permutation(seq_length)[:count]] = True
        return is_masked, is_masked * (seq_length / counts).astype(np.float32)[:, None]
