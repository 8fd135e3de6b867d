"""Pretraining of causal and masked-diffusion language models on one tensor/pipeline-parallel transformer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.api import UserError, compare, find_runs, generate, load_model, load_run, log_likelihood, train

__version__ = "0.1.0"
__all__ = ["UserError", "compare", "find_runs", "generate", "load_model", "load_run", "log_likelihood", "train"]


def __getattr__(name: str) -> Any:
    """Names of ``megatron.api``, when they are asked for: ``import megatron`` imports nothing else."""
    if name not in __all__:
        raise AttributeError(f"module 'megatron' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("megatron.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
