#!/usr/bin/env python3
"""Fit scaling laws to run directories: parameters with 95 % intervals, held-out errors, and a file for tools/plan.py.

The work is in megatron/commands/fit.py, which ``megatron fit`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("fit")
