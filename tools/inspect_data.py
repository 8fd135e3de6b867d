#!/usr/bin/env python3
"""Describe a data set and verify it: tokens per epoch, lengths, duplicates. Exit status 1 if it is damaged.

The work is in megatron/commands/inspect_data.py, which ``megatron data inspect`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("inspect_data")
