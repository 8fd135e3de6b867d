#!/usr/bin/env python3
"""A sweep is one YAML file (docs/scaling.md): list it, price it, run it here or on SLURM, show where it stands.

The work is in megatron/commands/sweep.py, which ``megatron sweep`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("sweep")
