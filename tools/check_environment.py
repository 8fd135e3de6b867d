#!/usr/bin/env python3
"""Compare the packages of the running Python with what ``setup.py`` asks for. Needs only pip; used by install.sh.

The work is in megatron/commands/doctor.py, which ``megatron doctor`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("doctor")
