"""The shipped config files, and loading of config files, without running code from them.

For an unknown key, the error message names the most similar existing key.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from semask.config.keys import KEYS_VERSION, add_semask_config
from semask.errors import ConfigError
from semask.utils.text import one_line

logger = logging.getLogger(__name__)

# An installed package contains the folder; in a checkout it is at the top level.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[4] / "configs")

# What TASK was before SEMASK_VERSION 2.
OLD_TASK_KEY = "INPUT.MAPPER"
# The panoptic meta-architectures of the releases that had it.
_OLD_PANOPTIC = ("PanopticFPN", "SeMaskPanopticFPN")

_KEY_AND_VALUE = re.compile(r"([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)=(.*)", re.DOTALL)

# Functions that complete a loaded config, such as 0 classes ("as the dataset").
Resolver = Callable[[CfgNode], None]
_resolvers: list[Resolver] = []

# Keys that are in Detectron2's main branch but not in release v0.6, with main's defaults.
MAIN_KEYS: dict[str, Any] = {
    "DATALOADER.REPEAT_SQRT": True,
    "FLOAT32_PRECISION": "",
    "MODEL.FLOAT32_PRECISION": "",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": 50,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "SOLVER.BASE_LR_END": 0.0,
    "SOLVER.NUM_DECAYS": 3,
    "SOLVER.RESCALE_INTERVAL": False,
}


def config_folder() -> Path:
    """The folder of the shipped config files.

    Raises:
        ConfigError: this installation has none.
    """
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise ConfigError(
        "This installation of semask has no config files. Install it from a checkout "
        "with 'pip install .', or give the path of a file."
    )


def config_names() -> list[str]:
    """The names that `config_path` accepts, such as ``"ade20k/semask_swin_tiny_fpn"``."""
    folder = config_folder()
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def config_path(name: str | os.PathLike[str]) -> str:
    """The path of a config file.

    Args:
        name: a path, or the name of a shipped config such as ``"ade20k/semask_swin_tiny_fpn"``,
            with or without ``.yaml``.

    Returns:
        ``name`` itself if such a file exists, otherwise the path of the shipped file.

    Raises:
        ConfigError: there is neither; the message lists similar names.
    """
    given = os.fspath(name)
    if os.path.isfile(given):
        return given
    stem = given.removesuffix(".yaml").removeprefix("configs/")
    known = config_names()
    if stem in known:
        return str(config_folder() / f"{stem}.yaml")
    near = difflib.get_close_matches(stem, known, n=3, cutoff=0.4) or known
    raise ConfigError(
        f"There is no config file '{given}', nor a shipped config of that name. "
        f"Similar names are: {', '.join(near)}."
    )


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


def _entries(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their values, sections included."""
    for key, value in cfg.items():
        yield prefix + key, value
        if isinstance(value, CfgNode):
            yield from _entries(value, f"{prefix}{key}.")


def load_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Load a config: Detectron2's defaults, this project's keys, ``config_file``, ``overrides``.

    Then all registered resolvers are called, as by :func:`merge_overrides`.

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
        with PathManager.open(config_file, "r", encoding="utf-8") as file:
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
        "instances": ("panoptic", "instance")
        if architecture in _OLD_PANOPTIC
        else ("instance", "panoptic"),
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
        config_file,
        OLD_TASK_KEY,
        mapper,
        loaded["TASK"],
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
    """Set keys of ``cfg``, which is not frozen, in place, then call all registered resolvers.

    The resolvers register the datasets of ``DATASETS.FOLDERS`` and the like, and fill in numbers
    of classes; see :func:`register_resolver`.

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
        cfg.merge_from_list(_with_numbers_as_text(cfg, flat))
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"Command-line override: {_explain(cfg, error)}") from error
    for resolve in _resolvers:
        resolve(cfg)


def _with_numbers_as_text(cfg: CfgNode, flat: Sequence[str]) -> list[str]:
    """Quote numbers for keys that are texts: OUTPUT_DIR=2024 names a folder."""
    texts = {key for key, value in _entries(cfg) if isinstance(value, str)}
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return [
        part
        for key, value in pairs
        for part in (key, repr(value) if key in texts and _is_number(value) else value)
    ]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _explain(cfg: CfgNode, error: Exception) -> str:
    """yacs's error message, with the most similar existing key if a key does not exist."""
    # str() of a KeyError is the repr of its message
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    marker = "Non-existent "
    if marker not in text:
        return text
    wrong = text.split(marker, 1)[1].split(":", 1)[1].strip()
    known = [key for key, _ in _entries(cfg)]
    near = difflib.get_close_matches(wrong, known, n=1) or [
        key for key in known if key.endswith("." + wrong.rsplit(".", 1)[-1])
    ]
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"there is no key '{wrong}'.{hint}"


def remove_main_keys(loaded: dict[str, Any], cfg: CfgNode, config_file: str) -> bool:
    """Remove keys that only Detectron2's main branch has if they have its defaults, in place.

    Args:
        loaded: the sections of a config file.
        cfg: a config of the installed Detectron2.
        config_file: the file's name, for messages.

    Returns:
        Whether a key was removed.

    Raises:
        ConfigError: such a key has another value than main's default.
    """
    removed = []
    for key, default in MAIN_KEYS.items():
        *path, name = key.split(".")
        section: Any = loaded
        known: Any = cfg
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
            known = known[part]
        if not isinstance(section, dict) or name not in section or name in known:
            continue
        if section[name] != default:
            raise ConfigError(
                f"Config file '{config_file}': {key} {section[name]!r} needs Detectron2's main "
                f"branch; the installed Detectron2 does not have the key. Remove it, or set it to "
                f"{default!r}."
            )
        del section[name]
        removed.append(key)
    if removed:
        logger.info(
            "Config file '%s' was written under Detectron2's main branch. The installed "
            "Detectron2 does not know %s, which the file leaves at main's defaults.",
            config_file,
            ", ".join(removed),
        )
    return bool(removed)
