"""``torchrun`` that ends as its processes ended: the launcher of the example scripts. See megatron/commands/torchrun.py."""

from _run import door

if __name__ == "__main__":
    door("torchrun")
