"""Pretrain a masked diffusion language model (``--help`` lists every flag)."""

import sys

from megatron.training.main import main

if __name__ == "__main__":
    sys.exit(main(objective="mdm"))
