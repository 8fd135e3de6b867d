#!/usr/bin/env python3
"""Which of AR and masked diffusion to train on given data and compute, how large and how long, and what it costs.

The work is in megatron/commands/plan.py, which ``megatron plan`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("plan")
