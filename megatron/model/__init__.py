"""The transformer. It knows no objective, only which keys a query may attend to (``mask.py``)."""

from megatron.model.gpt import GPTModel, build_layers
from megatron.model.mask import AttentionMask, Causal, Full, RandomKeyDrop

__all__ = ["AttentionMask", "Causal", "Full", "GPTModel", "RandomKeyDrop", "build_layers"]
