"""Published coefficients and figures, with their sources. None of them was measured here.

What is *not* published (or not known to us) is said here too: arXiv 2507.15857 reports the critical-compute line and
data half-lives, but the full coefficient sets of its two laws, from which the line was computed, are not available to
this project. The line therefore cannot be derived here; it is quoted.
"""

from __future__ import annotations

import math

from megatron.config.schema import ModelConfig
from megatron.config.shape import Shape
from megatron.model.arithmetic import parameters_for_compute
from megatron.scaling.laws import CHINCHILLA, DATA_CONSTRAINED, Coefficients

# Vocabulary with which arXiv 2507.15857 counts parameters (GPT-2, not padded).
PAPER_VOCAB_SIZE = 50257


def preset_parameters(name: str, vocab_size: int = PAPER_VOCAB_SIZE) -> int:
    """Parameters N of a preset, as the paper counts them."""
    return parameters_for_compute(Shape.of(ModelConfig(model=name, padded_vocab_size=vocab_size)), vocab_size)


HOFFMANN = Coefficients(
    CHINCHILLA, (1.69, 406.4, 0.34, 410.7, 0.28), "Hoffmann et al. 2022 (arXiv 2203.15556), AR on MassiveText"
)
QUOKKA = Coefficients(
    CHINCHILLA, (2.413, 798.6, 0.379, 4604.9, 0.378), "Quokka (arXiv 2510.03280), MDM, compute-constrained law"
)
MUENNIGHOFF = Coefficients(
    DATA_CONSTRAINED,
    (1.87, 521.0, 0.353, 1488.0, 0.353, 15.39, 5.31),
    "Muennighoff et al. 2023 (arXiv 2305.16264, appendix A), AR on C4",
)
MDM_REPEATED = Coefficients(
    DATA_CONSTRAINED,
    (*QUOKKA.theta, 500.0, math.inf),
    "Quokka (arXiv 2510.03280) with R_D = 500 of arXiv 2507.15857; no R_N is published, so excess parameters keep "
    "their full value",
)

PUBLISHED = {"ar": MUENNIGHOFF, "mdm": MDM_REPEATED}
"""What the planner uses for an objective when no fit is given."""

PUBLISHED_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "ar": {"parameters": (7.1e6, 8.67e9), "tokens": (1e8, 9e11)},
    "mdm": {},
}
"""Of the runs behind these coefficients: the 182 of arXiv 2305.16264's fit; those of Quokka are not known to this project."""

PAPER_BEST = {"ar": ("140M", 50.0, 3.71), "mdm": ("425M", 500.0, 3.55)}
"""arXiv 2507.15857 on 100M unique tokens of C4: preset, epochs and the validation loss of the best run."""
PAPER_BEST_UNIQUE_TOKENS = 100e6

CRITICAL_SLOPE, CRITICAL_INTERCEPT = 0.460, -7.052
"""log10 U[M tokens] = 0.460 * log10 C - 7.052 (arXiv 2507.15857): on this line MDM and AR reach the same loss."""

CRITICAL_RANGE_TOKENS = (25e6, 500e6)
"""Unique tokens of the small C4 subsets published with arXiv 2507.15857; far beyond them the line is an extrapolation."""

QUOKKA_EPOCHS = (0.39, 0.55)
"""Quokka: overfitting of MDM sets in at e ~ U^0.39 / N^0.55. The factor is not published as a number; the example
there (a 10B model on 1T unique tokens tolerates about 1,100 epochs) fixes it."""
_QUOKKA_EXAMPLE = (1e10, 1e12, 1100.0)


def critical_flops(unique_tokens: float) -> float:
    """FLOPs above which MDM beats AR for this much unique data, on the published line: C ~ U^(1/0.460) = U^2.174."""
    return float(10 ** ((math.log10(unique_tokens / 1e6) - CRITICAL_INTERCEPT) / CRITICAL_SLOPE))


def critical_unique_tokens(flops: float) -> float:
    """Unique tokens below which MDM beats AR for this much compute, on the published line."""
    return float(10 ** (CRITICAL_SLOPE * math.log10(flops) + CRITICAL_INTERCEPT) * 1e6)


def quokka_overfitting_epochs(parameters: float, unique_tokens: float) -> float:
    """Epochs after which an MDM starts to overfit, from Quokka's exponents and its one worked example."""
    by_unique, by_parameters = QUOKKA_EPOCHS
    n, u, epochs = _QUOKKA_EXAMPLE
    return epochs * (unique_tokens / u) ** by_unique / (parameters / n) ** by_parameters
