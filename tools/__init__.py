"""Doors to the programs of ``megatron``; each is run as ``python tools/NAME.py``."""
