#!/usr/bin/env python3
"""Split own text into OUT/train.jsonl and OUT/validation.jsonl by document, without leakage.

The work is in megatron/commands/split.py, which ``megatron data split`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("split")
