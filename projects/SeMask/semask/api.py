"""The public names of the package; importing it loads PyTorch, Detectron2 and all registered
classes.
"""

from semask import compat

compat.apply()  # before anything that imports Detectron2

from semask import data, evaluation, modeling, solver, tasks  # noqa: E402  (each registers its classes)
from semask.config import (  # noqa: E402
    add_semask_config,
    config_names,
    config_path,
    load_config,
)
from semask.errors import ConfigError  # noqa: E402
from semask.inference.hub import from_pretrained, save_pretrained  # noqa: E402
from semask.inference.instance_predictor import InstancePredictor  # noqa: E402
from semask.inference.prediction import InstancePrediction, Prediction  # noqa: E402
from semask.inference.predictor import Predictor  # noqa: E402

__all__ = [
    "ConfigError",
    "InstancePrediction",
    "InstancePredictor",
    "Prediction",
    "Predictor",
    "add_semask_config",
    "compat",
    "config_names",
    "config_path",
    "data",
    "evaluation",
    "from_pretrained",
    "load_config",
    "modeling",
    "save_pretrained",
    "solver",
    "tasks",
]
