#!/usr/bin/env python
"""Generate text with a checkpoint or an export; masked diffusion shows its text being uncovered (docs/generation.md).

python tools/generate.py --load RUN --prompt "The cat" --max-new-tokens 32
python tools/generate.py --load RUN --prompt "The cat" --infix "on the mat." --max-new-tokens 6
python tools/generate.py --load RUN --prompt "The [MASK:2] sat on the [MASK]."
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools._run import run


def main() -> int:
    """Generate as the flags say."""
    from megatron.generation.command import run_generate

    return run_generate()


if __name__ == "__main__":
    run(main)
