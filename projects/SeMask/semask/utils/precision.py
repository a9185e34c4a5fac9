"""Mixed precision: ``SOLVER.AMP`` for training, ``TEST.AMP`` for evaluation; parts in float32."""

import contextlib
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.optim import Optimizer

from semask.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(cfg: CfgNode, section: str) -> torch.dtype | None:
    """The dtype of matrix products and convolutions; None = the parameters' dtype.

    Args:
        cfg: ``AMP`` of the section, and ``MODEL.DEVICE``.
        section: "SOLVER" or "TEST".

    Raises:
        ConfigError: the device does not support it; the message names the key.
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
    """The autocast context of evaluation and prediction, by ``TEST.AMP``.

    Raises:
        ConfigError: see :func:`amp_dtype`.
    """
    dtype = amp_dtype(cfg, "TEST")
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype=dtype)


class Precision:
    """Mixed precision, or float32 throughout.

    float16 has a small exponent range: the loss is scaled up before the backward pass, and a step
    whose gradients overflow is skipped (Mixed Precision Training, arXiv 1710.03740). bfloat16 needs
    neither. Losses are computed in float32 in both.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """
        Args:
            device: type of the model's device, "cuda" or "cpu".
            dtype: of matrix products and convolutions; None = the parameters' dtype.
        """
        self._device = device
        self._dtype = dtype
        self._scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Precision":
        """The precision of ``SOLVER.AMP`` on ``MODEL.DEVICE``.

        Raises:
            ConfigError: the device does not support it.
        """
        return cls(torch.device(cfg.MODEL.DEVICE).type, amp_dtype(cfg, "SOLVER"))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The autocast context of a forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of the loss."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters."""
        if self._scaler.is_enabled():
            # A fused optimizer would unscale the gradients itself, after they have been clipped.
            self._scaler.unscale_(optimizer)
        self._scaler.step(optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The state of the loss scale; empty if there is none."""
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, unless it or this object has no loss scale."""
        if state_dict and self._scaler.is_enabled():
            self._scaler.load_state_dict(state_dict)


def check_precision(cfg: CfgNode) -> None:
    """Check that the device supports ``SOLVER.AMP`` and ``TEST.AMP``.

    Raises:
        ConfigError: the device does not support one; the message names key and device.
    """
    for section in ("SOLVER", "TEST"):
        amp_dtype(cfg, section)


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


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which operations on ``device`` keep the type of their inputs."""
    if not torch.amp.is_autocast_available(device.type):  # such as the meta device
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x if x.dtype.itemsize >= 4 else x.float()
