"""Mixed precision on a device: ``SOLVER.AMP`` of training and ``TEST.AMP`` of evaluation."""

import contextlib
from typing import Any

import torch
from detectron2.config import CfgNode

from semask.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(cfg: CfgNode, section: str) -> torch.dtype | None:
    """What matrix products and convolutions are computed in; None = as the parameters.

    Args:
        cfg: ``AMP`` of the section, and ``MODEL.DEVICE``.
        section: "SOLVER" or "TEST".

    Raises:
        ConfigError: the device cannot compute in it; the message names the key.
    """
    amp, device = cfg[section].AMP, torch.device(cfg.MODEL.DEVICE).type
    if not amp.ENABLED:
        return None
    key = f"{section}.AMP"
    if amp.PRECISION not in DTYPES:
        raise ConfigError(f"{key}.PRECISION is '{amp.PRECISION}'; use 'bfloat16' or 'float16'.")
    if device not in ("cuda", "cpu"):
        raise ConfigError(
            f"{key}.ENABLED needs a CUDA device or the CPU, but the model is on '{device}'."
        )
    if device == "cpu" and amp.PRECISION == "float16":
        raise ConfigError(
            f"{key}.PRECISION is 'float16', which needs a CUDA device, but the model is on the "
            f"CPU: use 'bfloat16' there, or set {key}.ENABLED to False."
        )
    if device == "cuda" and amp.PRECISION == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"{key}.PRECISION is 'bfloat16', which this GPU does not support: use 'float16'."
        )
    return DTYPES[amp.PRECISION]


def evaluation_autocast(cfg: CfgNode) -> contextlib.AbstractContextManager[Any]:
    """The context of evaluation and prediction, as ``TEST.AMP`` asks for.

    Raises:
        ConfigError: see :func:`amp_dtype`.
    """
    dtype = amp_dtype(cfg, "TEST")
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=dtype)
