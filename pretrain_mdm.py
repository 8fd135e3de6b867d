"""Pretrain a masked-diffusion language model (``--help`` lists every flag)."""

import sys

from megatron.commands.pretrain import pretrain

if __name__ == "__main__":
    sys.exit(pretrain(objective="mdm"))
