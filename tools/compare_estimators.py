#!/usr/bin/env python3
"""Measure likelihood estimators on a trained masked diffusion model: cost, error, agreement of rankings.

The work is in megatron/commands/compare_estimators.py, which ``megatron compare-estimators`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("compare_estimators")
