"""The config of a run: dataclasses read from YAML, every problem listed at once. Imports no torch."""

from megadpo.config.architecture import Architecture
from megadpo.config.check import check_layout, layers_per_stage, stated_world_size
from megadpo.config.load import as_dict, build_config, load_config, save_resolved
from megadpo.config.metric import MetricName, parse_duration_s, parse_metric_name
from megadpo.config.problems import EXIT_REFUSED, ConfigError, DataError, Problem, UserError
from megadpo.config.schema import Config

__all__ = [
    "EXIT_REFUSED",
    "Architecture",
    "Config",
    "ConfigError",
    "DataError",
    "MetricName",
    "Problem",
    "UserError",
    "as_dict",
    "build_config",
    "check_layout",
    "layers_per_stage",
    "load_config",
    "parse_duration_s",
    "parse_metric_name",
    "save_resolved",
    "stated_world_size",
]
