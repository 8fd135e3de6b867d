"""Data: tokenizers, Megatron ``.bin/.idx`` files, the order of samples, blends. See docs/data.md."""
