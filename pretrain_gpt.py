"""Pretrain an autoregressive language model (``--help`` lists every flag)."""

import sys

from megatron.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main("ar"))
