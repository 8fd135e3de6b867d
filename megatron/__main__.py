"""``python -m megatron``: the ``megatron`` command where it is not installed."""

from megatron.commands.console import entry

if __name__ == "__main__":
    entry()
