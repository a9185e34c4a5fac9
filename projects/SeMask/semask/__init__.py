"""SeMask: semantically masked transformers for semantic segmentation (arXiv 2112.12782)."""

from . import compat

compat.apply()  # before anything that imports Detectron2

from . import data, evaluation, modeling, solver  # noqa: E402  (each registers its classes)
from .config import ConfigError, add_semask_config, load_config  # noqa: E402
from .config_files import config_names, config_path  # noqa: E402
from .instance_prediction import InstancePrediction  # noqa: E402
from .instance_predictor import InstancePredictor  # noqa: E402
from .prediction import Prediction  # noqa: E402
from .predictor import Predictor  # noqa: E402

__version__ = "0.1.0"

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
    "load_config",
    "modeling",
    "solver",
]
