"""Train or validate: the program of pretrain_gpt.py and pretrain_mdm.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron.commands.running import begin, missing_package, out_of_memory

if TYPE_CHECKING:
    import torch

    from megatron.training.engine import Engine
    from megatron.training.plan import Plan


def main(objective: str = "ar", argv: Sequence[str] | None = None, *, raise_errors: bool = False) -> int:
    """Run the program with ``objective`` as its default; returns the exit status (see :func:`megatron.training.main.main`)."""
    begin()
    try:
        from megatron.training.main import main as train

        return train(objective, argv, probe=answer_gap, raise_errors=raise_errors)
    except ModuleNotFoundError as error:
        return missing_package(error)
    except (MemoryError, RuntimeError) as error:
        if raise_errors or (status := out_of_memory(error)) is None:
            raise
        return status


def answer_gap(plan: Plan, engine: Engine) -> Callable[[], dict[str, Any]]:
    """The probe of ``--gap-task``: training knows nothing of evaluation, so the two meet here."""
    from megatron.evaluation.gap import gap_metric
    from megatron.inference.logits import at_tokens
    from megatron.model.batch import Inputs
    from megatron.model.gpt import GPTModel
    from megatron.objectives.base import CausalDecoding

    model, objective = engine.module, engine.objective.for_eval()
    assert isinstance(model, GPTModel)  # pipeline stages are refused with the flag

    def rows(input_ids: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        return model.logits(Inputs(input_ids), objective.attention_mask, positions=positions)

    decoding = objective.decoding
    return gap_metric(
        plan.settings,
        logits_fn=rows if isinstance(decoding, CausalDecoding) else at_tokens(rows, decoding.shift),
        evaluating=lambda: engine.evaluating(objective),
        device=engine.context.device,
    )
