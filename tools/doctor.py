#!/usr/bin/env python3
"""What is installed, what of this machine holds up a run, and (--preflight) whether a run fits on GPUs that need not be here.

The work is in megatron/commands/doctor.py, which ``megatron doctor`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("doctor")
