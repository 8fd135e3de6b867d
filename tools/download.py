#!/usr/bin/env python3
"""Download data sets, the published checkpoints and the GPT-2 tokenizer. `./download.sh --help` shows the options.

The work is in megatron/commands/download.py, which ``megatron hub download`` starts too.
"""

from _run import door

if __name__ == "__main__":
    door("download")
