"""Compatibility with config files written under another version of Detectron2."""

import logging
from typing import Any

from detectron2.config import CfgNode

from semask.errors import ConfigError

logger = logging.getLogger(__name__)

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
            *(config_file, ", ".join(removed)),
        )
    return bool(removed)


def float32_precision(cfg: CfgNode) -> str:
    """``FLOAT32_PRECISION`` of Detectron2's main branch, for matrix products on GPUs; "" =
    unchanged.

    Raises:
        ConfigError: the value is unknown to PyTorch.
    """
    precision = cfg.get("FLOAT32_PRECISION", "") or cfg.MODEL.get("FLOAT32_PRECISION", "")
    if precision not in ("", "highest", "high", "medium"):
        raise ConfigError(
            f"FLOAT32_PRECISION is '{precision}'; set it to 'highest', 'high' or 'medium'."
        )
    return precision
