"""Pretraining of causal and masked-diffusion language models on one tensor/pipeline-parallel transformer."""

__version__ = "0.1.0"
