#!/usr/bin/env python3
"""Convert checkpoints: the published DeepSpeed layout, this repository's format, and Hugging Face folders.

The work is in megatron/commands/convert.py, which ``megatron convert`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("convert")
