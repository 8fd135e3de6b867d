"""The transformer. It knows no objective, only which keys a query may attend to (``mask.py``)."""

from megatron.model.gpt import GPTModel, build_layers
from megatron.model.mask import AttentionMask, BlockDiffusion, Causal, Full, RandomKeyDrop, Segments

__all__ = ["AttentionMask", "BlockDiffusion", "Causal", "Full", "GPTModel", "RandomKeyDrop", "Segments", "build_layers"]
