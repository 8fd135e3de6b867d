"""Configuration: one schema, from which flags, checks, ``run.json`` and the DeepSpeed settings follow."""

from megatron.config.cli import build_parser, config_from_dict, config_to_dict, parse, values_of
from megatron.config.schema import Config, ModelConfig

__all__ = ["Config", "ModelConfig", "build_parser", "config_from_dict", "config_to_dict", "parse", "values_of"]
