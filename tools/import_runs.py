#!/usr/bin/env python3
"""Runs of others as run directories: rows of a CSV table, or TensorBoard logs, marked as imported with source and licence.

The work is in megatron/commands/import_runs.py, which ``megatron import`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("import_runs")
