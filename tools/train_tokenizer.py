#!/usr/bin/env python3
"""Train a small byte-level BPE on text and save it as a tokenizer folder for --tokenizer-model.

The work is in megatron/commands/train_tokenizer.py, which ``megatron data tokenizer`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("train_tokenizer")
