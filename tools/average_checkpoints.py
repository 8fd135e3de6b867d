#!/usr/bin/env python3
"""Average the weights of checkpoints: the last ones of a run, or any set of one architecture.

The work is in megatron/commands/average.py, which ``megatron average`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("average")
