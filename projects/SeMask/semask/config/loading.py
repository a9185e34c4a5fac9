"""Loading of config files, without running code from them.

For an unknown key, the error message names the most similar existing key.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from semask.config.detectron2_versions import remove_main_keys
from semask.config.keys import KEYS_VERSION, add_semask_config
from semask.config.shipped import config_path
from semask.errors import ConfigError
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

# What TASK was before SEMASK_VERSION 2.
OLD_TASK_KEY = "INPUT.MAPPER"

_KEY_AND_VALUE = re.compile(r"([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)=(.*)", re.DOTALL)

# Functions that complete a loaded config, such as 0 classes ("as the dataset").
Resolver = Callable[[CfgNode], None]
_resolvers: list[Resolver] = []


def register_resolver(resolver: Resolver) -> Resolver:
    """Register a function that completes every loaded config; they run in order of registration.

    It lets higher packages such as ``data``, which this module must not import, take part.

    Args:
        resolver: changes a config that is not frozen, in place; it may raise ``ConfigError``.

    Returns:
        ``resolver``, so that this can be a decorator.
    """
    _resolvers.append(resolver)
    return resolver


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def load_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Load a config: Detectron2's defaults, this project's keys, ``config_file``, ``overrides``.

    The datasets in ``DATASETS.FOLDERS`` are registered.

    Args:
        config_file: a YAML file, with Detectron2's ``_BASE_`` inheritance, or the name of a
            shipped config such as "ade20k/semask_swin_tiny_fpn"; "" for none.
        overrides: ``KEY, VALUE`` or ``KEY=VALUE``, as given on the command line.

    Returns:
        The merged config, not frozen.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, has a tag that would run code, an
            unknown key or a value of the wrong type, or describes datasets incorrectly.
    """
    cfg = get_cfg()
    add_semask_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    merge_overrides(cfg, overrides)
    return cfg


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    if not PathManager.isfile(config_file):
        config_file = config_path(config_file)
    try:
        with PathManager.open(config_file, "r") as file:
            content = _parse(file.read(), config_file)
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"Config file '{config_file}' must be a mapping of keys to values; it holds "
                f"{'nothing' if content is None else type(content).__name__}."
            )
        loaded = cfg.load_yaml_with_base(config_file, allow_unsafe=False)
        refusal = _not_sections(loaded, cfg) or _newer_version(loaded, cfg)
        changed = False
        if not refusal:
            changed = _take_over_mapper(loaded, config_file)
            changed |= remove_main_keys(loaded, cfg, config_file)
        if changed:
            cfg.merge_from_other_cfg(CfgNode(loaded))
        elif not refusal:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"Config file '{config_file}' is refused: it has a YAML tag that would run code "
            f"when loaded ({one_line(error)}). Write the value itself instead."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"'{config_file}' is not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"Config file '{config_file}' is its own _BASE_.") from error
    except ConfigError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise ConfigError(f"Config file '{config_file}': {_explain(cfg, error)}") from error
    if refusal:
        raise ConfigError(f"Config file '{config_file}' {refusal}")
    cfg.SEMASK_VERSION = KEYS_VERSION


def _parse(text: str, config_file: str) -> Any:
    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"Config file '{config_file}' is nested too deeply.") from error


def _take_over_mapper(loaded: dict[str, Any], config_file: str) -> bool:
    """Turn INPUT.MAPPER of the releases before SEMASK_VERSION 2 into TASK, in place.

    Args:
        loaded: the sections of a config file.
        config_file: its name, for messages.

    Returns:
        Whether the file has that key.

    Raises:
        ConfigError: INPUT.MAPPER has an unknown value.
    """
    mapper = (loaded.get("INPUT") or {}).pop(OLD_TASK_KEY.split(".")[1], None)
    if mapper is None:
        return False
    architecture = (loaded.get("MODEL") or {}).get("META_ARCHITECTURE", "")
    tasks = {
        "sem_seg": ("semantic",),
        "instances": ("panoptic", "instance") if "Panoptic" in architecture else ("instance",),
    }
    if mapper not in tasks:
        raise ConfigError(
            f"Config file '{config_file}': {OLD_TASK_KEY} is {mapper!r}; it is now TASK, and can "
            "be 'semantic', 'instance' or 'panoptic'."
        )
    if loaded.get("TASK") not in tasks[mapper]:  # a newer file based on it may set it already
        loaded["TASK"] = tasks[mapper][0]
    logger.info(
        "Config file '%s' is from an older release: its %s '%s' is now TASK '%s'.",
        *(config_file, OLD_TASK_KEY, mapper, loaded["TASK"]),
    )
    return True


def _not_sections(loaded: Mapping[str, Any], cfg: CfgNode) -> str:
    """The error message if a section is not a mapping of keys; otherwise ""."""
    for name, value in loaded.items():
        if isinstance(cfg.get(name), CfgNode) and not isinstance(value, Mapping):
            return f"sets '{name}' to {value!r}, but it is a section and must contain keys."
    return ""


def _newer_version(loaded: Mapping[str, Any], cfg: CfgNode) -> str:
    """The error message for a file of a newer release than the installed one; otherwise ""."""
    if loaded.get("SEMASK_VERSION", KEYS_VERSION) > KEYS_VERSION:
        return (
            f"is from a newer release of this project (SEMASK_VERSION {loaded['SEMASK_VERSION']}, "
            f"here {KEYS_VERSION}): update the project."
        )
    if loaded.get("VERSION", cfg.VERSION) > cfg.VERSION:
        return (
            f"is from a newer release of Detectron2 (VERSION {loaded['VERSION']}, here "
            f"{cfg.VERSION}): update Detectron2."
        )
    return ""


def split_overrides(overrides: Sequence[str]) -> list[str]:
    """Split overrides into a flat list of keys and values.

    Args:
        overrides: ``KEY, VALUE`` or ``KEY=VALUE``, in any mixture.

    Returns:
        ``[KEY, VALUE, KEY, VALUE, ...]``.

    Raises:
        ConfigError: a key has no value.
    """
    flat: list[str] = []
    for text in overrides:
        is_key = len(flat) % 2 == 0
        match = _KEY_AND_VALUE.fullmatch(text) if is_key else None
        flat += match.groups() if match else [text]
    if len(flat) % 2:
        option = next((text for text in flat if text.startswith("--")), "--resume")
        raise ConfigError(
            f"Overrides must be pairs KEY VALUE or KEY=VALUE; got {' '.join(overrides)}. "
            f"Put options such as {option} before them."
        )
    return flat


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Set keys of ``cfg``, which is not frozen, in place, and register its ``DATASETS.FOLDERS``.

    Args:
        cfg: a config with this project's keys.
        overrides: as for ``split_overrides``.

    Raises:
        ConfigError: a key does not exist, or a value is invalid or of the wrong type.
    """
    flat = split_overrides(overrides)
    if OLD_TASK_KEY in flat[::2]:
        raise ConfigError(
            f"Command-line override: {OLD_TASK_KEY} is now TASK, which can be 'semantic' (before: "
            "'sem_seg'), 'instance' or 'panoptic' (before: 'instances')."
        )
    try:
        cfg.merge_from_list(flat)
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"Command-line override: {_explain(cfg, error)}") from error
    for resolve in _resolvers:
        resolve(cfg)


def _explain(cfg: CfgNode, error: Exception) -> str:
    """yacs's error message, with the most similar existing key if a key does not exist."""
    # str() of a KeyError is the repr of its message
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    marker = "Non-existent "
    if marker not in text:
        return text
    wrong = text.split(marker, 1)[1].split(":", 1)[1].strip()
    known = list(_keys(cfg))
    near = difflib.get_close_matches(wrong, known, n=1) or [
        key for key in known if key.endswith("." + wrong.rsplit(".", 1)[-1])
    ]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"there is no key '{wrong}'.{hint}"
