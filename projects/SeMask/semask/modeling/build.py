"""A model from a config, with errors that a user can correct."""

import detectron2.modeling
import torch
from detectron2.config import CfgNode
from torch import nn

from semask.errors import ConfigError, UserError
from semask.utils.text import one_line


def build_model(cfg: CfgNode) -> nn.Module:
    """Detectron2's ``build_model``.

    Raises:
        ConfigError: no model can be built from the config, also where Detectron2 or a module of
            its registries says so by an error of another type.
        UserError: as the parts of the model raise it, such as a checkpoint that is missing.
    """
    try:
        model: nn.Module = detectron2.modeling.build_model(cfg)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise _refusal(cfg, error) from error
    except (RuntimeError, ArithmeticError) as error:
        # On a real device it may be an error of the device.
        if isinstance(error, NotImplementedError) or torch.device(cfg.MODEL.DEVICE).type != "meta":
            raise
        raise _refusal(cfg, error) from error
    return model


def _refusal(cfg: CfgNode, error: Exception) -> ConfigError:
    reason = one_line(error).strip("'\"").rstrip(".")
    if isinstance(error, KeyError) and " " not in reason:
        reason = (
            f"it has nothing named '{reason}'; perhaps the features of MODEL.BACKBONE.NAME "
            f"'{cfg.MODEL.BACKBONE.NAME}' do not fit the heads"
        )
    return ConfigError(f"The model cannot be built from this config: {reason}.")
