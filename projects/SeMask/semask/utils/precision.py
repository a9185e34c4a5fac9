"""Mixed precision: ``SOLVER.AMP`` of training and ``TEST.AMP`` of evaluation."""

import contextlib
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.optim import Optimizer

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


class Precision:
    """Mixed precision, or float32 throughout.

    float16 has few exponents: its loss is scaled up before the backward pass, and a step whose
    gradients overflow is left out (Mixed Precision Training, arXiv 1710.03740). bfloat16 needs
    neither. The losses are computed in float32 in both.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """
        Args:
            device: type of the device that the model is on, "cuda" or "cpu".
            dtype: of the matrix products and convolutions; None = as the parameters.
        """
        self._device = device
        self._dtype = dtype
        self._scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Precision":
        """That of ``SOLVER.AMP`` on ``MODEL.DEVICE``.

        Raises:
            ConfigError: the device cannot compute in it.
        """
        return cls(torch.device(cfg.MODEL.DEVICE).type, amp_dtype(cfg, "SOLVER"))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters."""
        if self._scaler.is_enabled():
            # A fused optimizer would unscale by itself, behind the clipping of the gradients.
            self._scaler.unscale_(optimizer)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The scale; empty where there is none."""
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, unless one of the two has no scale."""
        if state_dict and self._scaler.is_enabled():
            self._scaler.load_state_dict(state_dict)


def check_precision(cfg: CfgNode) -> None:
    """Refuse what ``SOLVER.AMP`` or ``TEST.AMP`` asks for and the device cannot do.

    Raises:
        ConfigError: it names key and device.
    """
    for section in ("SOLVER", "TEST"):
        amp_dtype(cfg, section)
