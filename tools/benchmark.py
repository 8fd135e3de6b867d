#!/usr/bin/env python3
"""Measure training speed: tokens/s, TFLOP/s, MFU, step time and peak memory, as JSON.

The work is in megatron/commands/benchmark.py, which ``megatron benchmark`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("benchmark")
