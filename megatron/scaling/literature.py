"""Published coefficients and figures, with their sources. None of them was measured here.

What is *not* published (or not known to us) is said here too: arXiv 2507.15857 reports the critical-compute line and
data half-lives, but the full coefficient sets of its two laws, from which the line was computed, are not available to
this project. The line therefore cannot be derived here; it is quoted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
BESIROGLU = Coefficients(
    CHINCHILLA,
    (1.81686, 482.00572, 0.34781, 2085.4342, 0.36585),
    "Besiroglu et al. 2024 (arXiv 2404.10102), AR on MassiveText: 240 points read off Hoffmann's figure",
)
MUENNIGHOFF = Coefficients(
    DATA_CONSTRAINED,
    (math.exp(0.6254804), math.exp(6.255414), 0.3526596, math.exp(7.3049974), 0.3526596, 15.387756, 5.309743),
    "Muennighoff et al. 2023 (arXiv 2305.16264, appendix A; unrounded from their notebook), AR on C4",
)
MDM_REPEATED = Coefficients(
    DATA_CONSTRAINED,
    (*QUOKKA.theta, 500.0, math.inf),
    "Quokka (arXiv 2510.03280) with R_D = 500 of arXiv 2507.15857; no R_N is published, so excess parameters keep "
    "their full value",
)

_GIDD = "GIDD scaling (arXiv 2512.10858), {}; N without embeddings, vocabulary of 131k, before annealing"
GIDD = {
    name: Coefficients(CHINCHILLA, theta, _GIDD.format(what))
    for name, what, theta in (
        ("gidd_masked", "masked diffusion", (2.17, 222.0, 0.292, 1920.0, 0.367)),
        ("gidd_low_uniform", "hybrid of low uniform noise", (2.25, 477.0, 0.335, 1880.0, 0.365)),
        ("gidd_balanced", "balanced hybrid", (2.27, 626.0, 0.35, 1520.0, 0.353)),
        ("gidd_high_uniform", "hybrid of high uniform noise", (2.21, 303.0, 0.307, 1500.0, 0.352)),
        ("gidd_uniform", "uniform diffusion", (2.19, 294.0, 0.305, 1340.0, 0.346)),
    )
}
KIM = Coefficients(
    CHINCHILLA,
    (3.43, 0.05 * 1e9**1.02, 1.02, 0.0, 1.0),
    "Kim et al. 2025 (arXiv 2509.14786, from reviews of it), AR with tuned weight decay, epochs and rate on 200M unique "
    "tokens: 3.43 + 0.05/N^1.02, N in billions; it holds at that amount of data only",
)
KIM_ASYMPTOTES = {"single": 3.43, "ensemble": 3.34, "ensemble, tuned as one": 3.27, "ensemble of large models": 3.17}
"""arXiv 2509.14786 at 200M unique tokens: what models of any size, ensembles of any number, and both together tend to; seeds
±0.02."""

LITERATURE: dict[str, Coefficients] = {
    "hoffmann": HOFFMANN,
    "besiroglu": BESIROGLU,
    "muennighoff": MUENNIGHOFF,
    "kim": KIM,
    "quokka": QUOKKA,
    **GIDD,
}
"""Published laws by name, for ``tools/fit_laws.py --published``."""

PUBLISHED = {"ar": MUENNIGHOFF, "mdm": MDM_REPEATED}
"""What the planner uses for an objective when no fit is given."""

PUBLISHED_RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "ar": {"parameters": (7.1e6, 8.67e9), "tokens": (1e8, 9e11)},
    "mdm": {},
}
"""Of the runs behind these coefficients: the 182 of arXiv 2305.16264's fit; those of Quokka are not known to this project."""


@dataclass(frozen=True)
class Frontier:
    """Lowest loss that a budget of C FLOPs reaches, ``floor + 10^log10_factor * C^exponent``, and how it is spent there:
    N ~ C^by_size, D ~ C^by_tokens."""

    floor: float
    log10_factor: float
    exponent: float
    by_size: float
    by_tokens: float

    def loss(self, flops: float) -> float:
        """Loss in nats per token."""
        return self.floor + 10 ** (self.log10_factor + self.exponent * math.log10(flops))


GIDD_FRONTIERS = {
    "gidd_masked": Frontier(2.153, 2.347, -0.1313, 0.588, 0.412),
    "gidd_low_uniform": Frontier(2.178, 2.41, -0.1345, 0.563, 0.437),
    "gidd_balanced": Frontier(2.122, 2.297, -0.1263, 0.567, 0.433),
    "gidd_high_uniform": Frontier(2.013, 2.084, -0.1117, 0.614, 0.386),
    "gidd_uniform": Frontier(1.94, 2.018, -0.1065, 0.625, 0.375),
}
"""arXiv 2512.10858: fitted there to the best runs of each budget, apart from the laws above."""

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
