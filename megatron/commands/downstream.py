"""Evaluate a checkpoint of any layout, or a Hugging Face export, on downstream tasks (docs/evaluation.md)."""

from __future__ import annotations


def main() -> int:
    """Evaluate as the flags say; returns the exit status."""
    from megatron.evaluation.lm_eval.flags import build_downstream_parser

    build_downstream_parser().parse_args()  # --help and wrong flags answer before torch is imported
    from megatron.evaluation.lm_eval.command import run_downstream

    return run_downstream()
