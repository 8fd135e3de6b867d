#!/usr/bin/env python3
"""Encode text into Megatron token files: OUTPUT_KEY_document.bin, .idx and .meta.json.

The work is in megatron/commands/preprocess.py, which ``megatron data preprocess`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("preprocess")
