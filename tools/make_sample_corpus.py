#!/usr/bin/env python3
"""Write train.jsonl and validation.jsonl from the documentation of Python's standard library (about 2 MB).

The work is in megatron/commands/sample_corpus.py, which ``megatron data sample`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("sample_corpus")
