"""Every configuration key this project adds to Detectron2's, and how a config file is read.

``add_semask_config`` is the one place that lists the keys. ``load_config`` reads a YAML file
without ever running code from it and turns a mistyped key into a sentence.
"""

import difflib
from collections.abc import Iterator, Sequence

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager


class ConfigError(ValueError):
    """A configuration file or override that cannot be used; the message says where and why."""


def add_semask_config(cfg: CfgNode) -> None:
    """Add the keys of this project to ``cfg`` (a Detectron2 ``get_cfg()``), in place."""
    # ---- Swin transformer (arXiv 2103.14030); lists have one entry per stage ----
    cfg.MODEL.SWIN = CfgNode()
    # Channels of the first stage; they double at each following stage.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Swin blocks and attention heads of each stage.
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Side of the attention window, in tokens.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden width of a block's MLP, as a multiple of its channels.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Dropout after projections and MLP layers, on attention weights, and stochastic depth
    # (which rises linearly from 0 to this rate over all blocks).
    cfg.MODEL.SWIN.DROP_RATE = 0.0
    cfg.MODEL.SWIN.ATTN_DROP_RATE = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3
    # Learned absolute position embedding, and the image side it is made for.
    cfg.MODEL.SWIN.ABSOLUTE_POS_EMBED = False
    cfg.MODEL.SWIN.PRETRAIN_IMAGE_SIZE = 224
    # Features returned, among "res2".."res5" (strides 4, 8, 16, 32).
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Stages that are not trained: 0 = all are trained, 1 = the patch embedding is frozen,
    # 2 = also the first stage, and so on (Detectron2's meaning of MODEL.BACKBONE.FREEZE_AT).
    cfg.MODEL.SWIN.FREEZE_AT = 0
    # Recompute a stage's activations in the backward pass instead of keeping them.
    cfg.MODEL.SWIN.ACTIVATION_CHECKPOINT = [False, False, False, False]

    # ---- SeMask's semantic layers (arXiv 2112.12782, section 3) ----
    cfg.MODEL.SEMASK = CfgNode()
    # Semantic attention of each stage: "window", "global" or "none" (none anywhere = plain Swin).
    cfg.MODEL.SEMASK.ATTENTION = ["window", "window", "global", "global"]
    # Chained semantic attention blocks of each stage; 0 is the same as "none".
    cfg.MODEL.SEMASK.NUM_BLOCKS = [1, 1, 1, 1]
    # Side of the semantic window; 0 = as MODEL.SWIN.WINDOW_SIZE.
    cfg.MODEL.SEMASK.WINDOW_SIZE = 0
    # Classes of the semantic-prior maps; 0 = as MODEL.SEM_SEG_HEAD.NUM_CLASSES.
    cfg.MODEL.SEMASK.NUM_CLASSES = 0
    # Dropout at the end of a semantic attention block.
    cfg.MODEL.SEMASK.DROPOUT = 0.1

    # ---- heads and losses (beside Detectron2's MODEL.SEM_SEG_HEAD keys) ----
    # Channel dropout in front of the last convolution.
    cfg.MODEL.SEM_SEG_HEAD.DROPOUT = 0.1
    # Weight of the semantic-prior loss; 0 leaves the prior head out.
    cfg.MODEL.SEM_SEG_HEAD.PRIOR_LOSS_WEIGHT = 0.4
    # Denominator of the cross entropy: "all" pixels (as published) or "valid" (not ignored) ones.
    cfg.MODEL.SEM_SEG_HEAD.LOSS_REDUCTION = "all"
    # Online hard example mining: pixels kept per image (100000 as published); 0 = off.
    cfg.MODEL.SEM_SEG_HEAD.OHEM_PIXELS = 0

    # ---- input (beside Detectron2's INPUT.FORMAT, INPUT.CROP and INPUT.RANDOM_FLIP) ----
    # The image is resized, aspect ratio kept, by min(long / longer side, short / shorter side).
    cfg.INPUT.SCALE = [2048, 512]
    # In training that scale is multiplied by one of these factors ("choice") or by one drawn
    # uniformly between the two given ("range").
    cfg.INPUT.SCALE_FACTORS = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    cfg.INPUT.SCALE_SAMPLING = "choice"
    # Random brightness, contrast, saturation and hue.
    cfg.INPUT.PHOTOMETRIC_DISTORTION = True
    # INPUT.CROP.SIZE is (height, width) in pixels, and what smaller images are padded to.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0

    # ---- solver ----
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BETAS = [0.9, 0.999]
    cfg.SOLVER.EPS = 1e-8
    # Exponent of SOLVER.LR_SCHEDULER_NAME "WarmupPolyLR".
    cfg.SOLVER.POLY_LR_POWER = 1.0

    # ---- evaluation ----
    # Images drawn beside their labels after each evaluation; 0 = none.
    cfg.TEST.NUM_PANELS = 8


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def load_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults, this project's keys, then ``config_file``, then ``overrides``.

    Args:
        config_file: a YAML file, with Detectron2's ``_BASE_`` inheritance; "" for none.
        overrides: flat ``[KEY, VALUE, ...]`` as given on the command line.

    Returns:
        The merged config, not frozen.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, carries a tag that would run code,
            or has a key that does not exist or a value of another type.
    """
    cfg = get_cfg()
    add_semask_config(cfg)
    if config_file:
        if not PathManager.isfile(config_file):
            raise ConfigError(f"Config file '{config_file}' does not exist.")
        try:
            cfg.merge_from_file(config_file, allow_unsafe=False)
        except yaml.constructor.ConstructorError as error:
            raise ConfigError(
                f"Config file '{config_file}' is refused: it carries a YAML tag that would run "
                f"code when loaded ({_one_line(error)}). Write the value out instead."
            ) from error
        except yaml.YAMLError as error:
            raise ConfigError(f"'{config_file}' is not valid YAML: {_one_line(error)}") from error
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError, OSError) as error:
            raise ConfigError(f"Config file '{config_file}': {_explain(cfg, error)}") from error
    if len(overrides) % 2:
        raise ConfigError(f"Overrides come in pairs KEY VALUE; got {' '.join(overrides)}")
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"Command-line override: {_explain(cfg, error)}") from error
    return cfg


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(cfg: CfgNode, error: Exception) -> str:
    """yacs's complaint, with the nearest existing key where a key does not exist."""
    text = _one_line(error).strip("'\"")
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
