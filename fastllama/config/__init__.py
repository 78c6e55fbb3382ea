"""The options of a run: typed groups, TOML recipes, and the rules between values.

Standard library only, so that the command line answers at once.
"""

from fastllama.config.names import known_keys, missing_table, nearest_key
from fastllama.config.options import (
    CheckpointConfig,
    Config,
    DataConfig,
    DataSource,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Stage,
    TrainingConfig,
    ValidationSet,
)
from fastllama.config.recipes import config_from_dict, load_recipe
from fastllama.config.rules import validate, validate_values

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Stage",
    "TrainingConfig",
    "ValidationSet",
    "config_from_dict",
    "known_keys",
    "load_recipe",
    "missing_table",
    "nearest_key",
    "validate",
    "validate_values",
]
