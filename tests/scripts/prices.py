"""What an example takes and costs, by this project's own arithmetic, in the words of the examples and of README."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron.config import Config
from megatron.objectives import build_objective, with_vocabulary
from megatron.objectives.base import compute_per_token
from megatron.scaling.literature import preset_parameters
from megatron.scaling.sweep.definition import dollars, hours

# The assumptions, which README names: training only, at 40 % of the peak of eight H100, 3 dollars an hour each.
PRICE = {"device": "H100", "devices": 8, "mfu": 0.4, "dollars": 3}
MARK = "estimated, not measured"
C4_100M_TOKENS = 99_952_399
BILLION = 10**9


def first_line(path: Path) -> str:
    """Its first line of comment."""
    return next(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))


def phrase(flops: float, *, amount: str = "", devices: int = 8, mfu: float = PRICE["mfu"]) -> str:
    """Of so many FLOPs: ``11 h and $260 on 8 H100``. Two digits are more than it is worth."""
    price = {**PRICE, "devices": devices, "mfu": mfu}
    time, cost = hours(flops, price), dollars(flops, price)
    assert time is not None and cost is not None
    rounded = [f"{float(f'{value:.2g}'):,g}" for value in (time, cost)]
    return f"{rounded[0]} h and ${rounded[1]}{amount} on {devices} H100" + f" at {mfu:.0%}" * (mfu != PRICE["mfu"])


def phrase_of_passes(script: Path) -> str:
    """2·N for every token that passes through the run that a script takes by default: how many, its tasks and texts decide."""
    model = "140M" if "arm_best_on_100m" in script.read_text(encoding="utf-8") else "425M"
    amount, devices = " a billion tokens through the model", 1 if script.name == "generate.sh" else 8
    return phrase(2.0 * preset_parameters(model) * BILLION, amount=amount, devices=devices)


def phrase_of(config: Config) -> str:
    """6·N·D for training; 2·N for every token and draw of a validation, which has no backward pass."""
    parameters = preset_parameters(str(config.model.model))
    if config.run.skip_train:
        return phrase(2.0 * parameters * config.run.num_mc * BILLION, amount=" a billion tokens")
    flags = with_vocabulary(config.objective, 50257, size=50257, padded=50304)
    objective = build_objective(replace(config, objective=flags))
    per_token = compute_per_token(parameters, objective)
    if parameters > 10**9:  # on data of one's own
        return phrase(per_token * BILLION, amount=" a billion tokens")
    assert config.run.train_epochs is not None
    return phrase(per_token * C4_100M_TOKENS * config.run.train_epochs)
