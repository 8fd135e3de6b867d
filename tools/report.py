#!/usr/bin/env python3
"""Turn run directories into a report: one HTML page that needs no other file, and its figures as PNG and SVG.

The work is in megatron/commands/report.py, which ``megatron report`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("report")
