"""What the tests of Hugging Face folders share."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron.config.schema import Config
from megatron.config.shape import Shape
from megatron.convert.hf_folder import ExportOptions
from megatron.inference.model import load_tensors
from megatron.model.batch import Inputs
from megatron.model.gpt import GPTModel
from megatron.model.mask import Causal, Full

NO_TOKENIZER = ExportOptions(with_tokenizer=False)


def our_logits(config: Config, tensors: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [batch, seq, rows] of our model with these canonical tensors."""
    rows = tensors["word_embeddings.weight"].shape[0]
    model_config = replace(config.model, padded_vocab_size=rows)
    model = GPTModel(Shape.of(model_config))
    load_tensors(model, tensors)
    with torch.no_grad():
        return model.eval().logits(Inputs(ids), Full() if config.objective.objective == "mdm" else Causal())


def some_ids(rows: int = 300, length: int = 32) -> torch.Tensor:
    """Random ids [3, length] below ``rows``."""
    return torch.randint(0, rows, (3, length), generator=torch.Generator().manual_seed(3))
