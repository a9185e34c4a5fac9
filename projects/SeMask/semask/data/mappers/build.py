"""Which mapper a config asks for."""

import logging

from detectron2.config import CfgNode

from semask.data.mappers.instance import InstanceMapper
from semask.data.mappers.semantic import SemSegMapper
from semask.errors import ConfigError

logger = logging.getLogger(__name__)

# By ``INPUT.MAPPER``.
MAPPERS = {"sem_seg": SemSegMapper, "instances": InstanceMapper}


def build_mapper(cfg: CfgNode, is_train: bool) -> SemSegMapper | InstanceMapper:
    """The mapper that ``INPUT.MAPPER`` names; the log gets its augmentations.

    Args:
        cfg: with this project's keys.
        is_train: of the training data; else of the evaluation's.

    Raises:
        ConfigError: there is no such mapper, or it cannot be built from the config.
    """
    name = cfg.INPUT.MAPPER
    if name not in MAPPERS:
        raise ConfigError(f"INPUT.MAPPER is '{name}'; it can be {' or '.join(MAPPERS)}.")
    mapper = MAPPERS[name](cfg, is_train=is_train)
    purpose = "training" if is_train else "evaluation"
    logger.info("Augmentations in %s: %s", purpose, mapper.augmentations.augs)
    return mapper
