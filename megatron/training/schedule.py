"""How long a run is and how its learning rate goes: everything counts samples, so nothing depends on the layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.config.option import LARGEST
from megatron.config.schema import Config, OptimizerConfig
from megatron.errors import UserError, require
from megatron.runs.record import Branch
from megatron.training.plan import Layout, Schedule

# What is left of the height above --min-lr when a share x of the decay is over, by the names of Megatron-LM.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def learning_rate(samples: int, config: OptimizerConfig) -> float:
    """Rate after ``samples`` samples: linear warm-up, then decay to ``min_lr``, as in Megatron-LM.

    ``s ≤ warmup: lr · s / warmup``; then ``min + (lr − min) · shape((s − b) / (n − b))`` up to s = n, and ``min`` behind it. b,
    where the decay begins, is the end of the warm-up, for WSD (warm-up, stable, decay) ``n − wsd_decay``. The inverse square
    root is ``max(min, lr · √(max(warmup, 1) / s))``. Step k uses ``s = (k − 1) · global_batch``, so with a warm-up the first
    step has rate 0.

    Args:
        samples: training samples consumed before the step.
        config: resolved: the lengths in samples are set.
    """
    warmup, end, style = config.lr_warmup_samples, config.lr_decay_samples, config.lr_decay_style
    assert end is not None
    if warmup > 0 and samples <= warmup:
        return config.lr * samples / warmup
    if style == "constant":
        return config.lr
    if samples > end:
        return config.min_lr
    if style == "inverse-square-root":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / max(samples, 1)))
    begin = warmup
    if style == "WSD":
        assert config.lr_wsd_decay_samples is not None
        begin, style = end - config.lr_wsd_decay_samples, config.lr_wsd_decay_style
        if samples <= begin:
            return config.lr  # to the bit what a constant rate is: a branch may leave a run that has one
    return config.min_lr + (config.lr - config.min_lr) * SHAPES[style]((samples - begin) / (end - begin))


def plan_schedule(
    flags: Config, layout: Layout, *, unique_tokens: int, before: dict[str, Any], branch: Branch | None
) -> Schedule:
    """The lengths of a run in samples.

    Args:
        flags: as given.
        layout: has the global batch.
        unique_tokens: of one epoch.
        before: manifest of the checkpoint that goes on; empty at the beginning.
        branch: where the run left another one, or None; an evaluation has no length that this could limit.

    Raises:
        UserError: lengths that no run can have.
    """
    run, optimizer, batch = flags.run, flags.optimizer, layout.global_batch_size
    branch = None if run.skip_train else branch
    samples = run.train_samples or (run.train_iters or 0) * batch
    if run.train_epochs is not None:
        samples = round(run.train_epochs * unique_tokens / flags.model.seq_length)
    if run.skip_train:
        samples = samples or batch
    require(
        batch <= samples <= LARGEST,
        f"{samples} training samples {'are less than one' if samples < batch else 'with a'} global batch of {batch}",
        f"a run has at least one step, and at most {LARGEST:.0e} samples",
        "change its length or --global-batch-size",
    )
    consumed = 0 if run.skip_train else before.get("consumed_samples", 0)
    require(
        samples >= consumed,
        f"the checkpoint in {run.load} has trained on {consumed} samples, this run is to end at {samples}",
        "a run that goes on cannot end before where it stands",
        "train longer, or name an earlier checkpoint",
    )
    order = samples if branch is None else branch.order_samples
    require(
        samples <= order,
        f"the branch is to end at {samples} samples, and the run that it leaves was planned for {order}",
        "a branch reads on in the data order of that run, which ends there",
        "end it earlier, or plan the stable run longer than any branch",
    )
    end = optimizer.lr_decay_samples or samples
    warmup = _warmup(optimizer, end, before=before if branch else {})
    require(
        warmup < end or optimizer.lr_decay_style == "constant",
        f"the warm-up of {warmup:g} samples leaves nothing of the {end} decay samples",
        "warm-up must be shorter",
        "lower --lr-warmup-samples",
    )
    is_wsd = optimizer.lr_decay_style == "WSD" and not run.skip_train
    decay = _wsd_decay(optimizer, end, warmup=warmup, branch=branch) if is_wsd else None
    lengths = replace(optimizer, lr_warmup_samples=warmup, lr_decay_samples=end, lr_wsd_decay_samples=decay)
    return Schedule(samples, order, lengths)


def _warmup(optimizer: OptimizerConfig, end: int, *, before: dict[str, Any]) -> float:
    """Samples of warm-up. A branch has that of the run that it left, also where a fraction of another length says it."""
    fraction = optimizer.lr_warmup_fraction
    if fraction is None:
        return optimizer.lr_warmup_samples
    saved = before.get("config", {}).get("optimizer", {})
    return saved["lr_warmup_samples"] if saved.get("lr_warmup_fraction") == fraction else fraction * end


def _wsd_decay(optimizer: OptimizerConfig, end: int, *, warmup: float, branch: Branch | None) -> int:
    decay = optimizer.lr_wsd_decay_samples
    if decay is None and branch is not None:
        decay = end - branch.samples
    if decay is None:
        raise UserError(
            "--lr-decay-style WSD without --lr-wsd-decay-samples",
            "the decay at its end has a length of its own",
            "pass for instance a tenth of the training samples",
        )
    require(
        0 <= decay <= end - warmup,
        f"the decay of {decay} samples does not fit between the warm-up of {warmup:g} and the end of the decay at {end}",
        "WSD warms up, is stable and decays, in this order",
        "lower --lr-wsd-decay-samples or raise --lr-decay-samples",
    )
    return decay
