"""What reports do with the sums of validations: read them, take halves, pair two runs, and give intervals."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

from megatron.errors import UserError, require
from megatron.statistics import Array, Estimate, ValidationSums, combined

_COLUMNS = ("sample", "document", "tokens", "loss")


def load_sums(path: str | Path) -> ValidationSums:
    """Read what :meth:`ValidationSums.save` wrote.

    Raises:
        UserError: damaged, or another kind of file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        draws = int(arrays.pop("draws"))
        sums = ValidationSums(**{name: arrays[name] for name in (*_COLUMNS, *arrays)}, draws=draws)
    except Exception as error:  # numpy and zip meet damaged bytes with errors of many kinds
        raise UserError(
            f"{path} cannot be read ({error})", "it holds the sums of one validation", "delete it or validate again"
        ) from None
    require(
        sums.sample.ndim == 1 and len({array.shape for array in arrays.values()}) == 1,
        f"{path} holds arrays of different lengths",
        "sums have one sample, document, tokens and loss an entry",
        "delete it or validate again",
    )
    return sums


def take(sums: ValidationSums, kept: Array) -> ValidationSums:
    """The entries for which ``kept`` [entries], bool, holds."""
    columns = {name: value[kept] for name, value in vars(sums).items() if isinstance(value, Array)}
    return ValidationSums(**columns, draws=sums.draws)


def halves(sums: ValidationSums) -> tuple[ValidationSums, ValidationSums] | None:
    """Sums of the selection half and of the report half; None where they are not known or one of them is empty."""
    chosen = sums.in_selection
    if chosen is None or chosen.all() or not chosen.any():
        return None
    return take(sums, chosen), take(sums, ~chosen)


def difference(first: ValidationSums, second: ValidationSums) -> Estimate:
    """Loss per token of ``second`` minus that of ``first``, paired: what makes a document hard for both cancels.

    Only samples that both have scored count. Token counts may differ (AR does not score the first token of a sample).

    Raises:
        UserError: the two share no sample.
    """
    common = np.intersect1d(first.sample, second.sample)
    require(
        len(common),
        "two validations without a common sample",
        "a paired difference needs the same samples",
        "validate both runs on the same data",
    )
    first, second = (take(sums, np.isin(sums.sample, common)) for sums in (first, second))
    return combined((1, second), (-1, first))


def reach(estimate: Estimate) -> float:
    """Half of the 95 % interval ``value ± t·error``, t of Student's distribution: wider at few documents."""
    return t_quantile(0.975, estimate.degrees) * estimate.error


def welch(*parts: tuple[float, float]) -> float:
    """Degrees of freedom of a sum of independent variances, each (variance, its degrees) (Welch 1947); infinite where no part has
    a finite number."""
    total, uncertain = (sum(values) for values in zip(*((own, own**2 / degrees) for own, degrees in parts)))
    return total**2 / uncertain if uncertain > 0 else math.inf


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t at ``degrees`` ≥ 1 of freedom (any real number; else NaN), to 1e-4 of itself.

    With t = √ν·tan θ the density of θ is cos^(ν − 1) θ, which is smooth, so that a fine table of its integral is enough.
    """
    if not degrees >= 1:
        return math.nan
    if degrees > 1e6:
        return NormalDist().inv_cdf(probability)
    theta = np.linspace(0.0, min(math.pi / 2, 40 / math.sqrt(degrees)), 20_001)
    density = np.cos(theta) ** (degrees - 1)
    mass = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    angle = np.interp(abs(2 * probability - 1) * mass[-1], mass, theta)
    return math.copysign(math.sqrt(degrees) * math.tan(angle), probability - 0.5)
