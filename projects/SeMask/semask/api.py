"""The public names of the package: ``semask.NAME`` is what is imported here.

Importing this module loads PyTorch, Detectron2 and all registered classes.
"""

# ruff: noqa: E402, F401

from semask import compat

compat.apply()  # before anything that imports Detectron2

from semask import data, evaluation, modeling, solver, tasks  # each registers its classes
from semask.config import add_semask_config, config_names, config_path, load_config
from semask.errors import ConfigError
from semask.inference.hub import from_pretrained, save_pretrained
from semask.inference.instance_predictor import InstancePredictor
from semask.inference.prediction import InstancePrediction, Prediction
from semask.inference.predictor import Predictor
