#!/usr/bin/env python3
"""Generate text with a checkpoint or an export; masked diffusion shows its text being uncovered (docs/generation.md).

python tools/generate.py --load RUN --prompt "The cat" --max-new-tokens 32
python tools/generate.py --load RUN --prompt "The cat" --infix "on the mat." --max-new-tokens 6
python tools/generate.py --load RUN --prompt "The [MASK:2] sat on the [MASK]."
"""

from _run import door

if __name__ == "__main__":
    door("generate")
