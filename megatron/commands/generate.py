"""Generate text with a checkpoint or an export; masked diffusion shows its text being uncovered (docs/generation.md)."""

from __future__ import annotations


def main() -> int:
    """Generate as the flags say; returns the exit status."""
    from megatron.generation.flags import build_generate_parser

    build_generate_parser().parse_args()  # --help and wrong flags answer before torch is imported
    from megatron.generation.command import run_generate

    return run_generate()
