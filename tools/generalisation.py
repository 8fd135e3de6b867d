#!/usr/bin/env python3
"""Losses of every kept checkpoint on documents that the run was trained on and on others, with the same masks.

The work is in megatron/commands/generalisation.py, which ``megatron generalisation`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("generalisation")
