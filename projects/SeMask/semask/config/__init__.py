"""The configuration: its keys, loading of files, and the shipped configs."""

from semask.config.keys import add_semask_config
from semask.config.loading import (
    config_names,
    config_path,
    load_config,
    merge_overrides,
    register_resolver,
    split_overrides,
)

__all__ = [
    "add_semask_config",
    "config_names",
    "config_path",
    "load_config",
    "merge_overrides",
    "register_resolver",
    "split_overrides",
]
