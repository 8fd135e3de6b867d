#!/usr/bin/env python3
"""Every likelihood of one model or several on the same tokens, and whether one is better than another.

The work is in megatron/commands/likelihood.py, which ``megatron likelihood`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("likelihood")
