"""Configuration: one schema, from which flags, checks, ``run.json`` and the DeepSpeed settings follow."""

from megatron.config.cli import build_parser, config_from_dict, config_to_dict, parse
from megatron.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "build_parser",
    "config_from_dict",
    "config_to_dict",
    "parse",
]
