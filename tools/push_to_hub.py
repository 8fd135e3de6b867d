#!/usr/bin/env python3
"""Upload a run to the Hugging Face hub: weights for transformers, run.json, metrics.jsonl and a model card.

The work is in megatron/commands/push.py, which ``megatron hub push`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("push")
