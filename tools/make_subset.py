#!/usr/bin/env python3
"""Make a smaller data set: the first documents, documents up to a number of tokens, or a seeded random sample.

The work is in megatron/commands/subset.py, which ``megatron data subset`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("subset")
