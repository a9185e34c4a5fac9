"""What code can change for the rest of the process."""

import logging
import os
import random
import sys
import warnings
from typing import Any

import numpy
import PIL.Image
import torch


def snapshot() -> dict[str, Any]:
    """Global state, by its name."""
    numbers: Any = numpy.random.get_state()
    return {
        "warnings": list(warnings.filters),
        "variables": dict(os.environ),
        "random": random.getstate(),
        "numpy.random": numbers[1].tolist(),
        "torch.random": torch.get_rng_state().tolist(),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "import": (list(sys.path), list(sys.meta_path), "pkg_resources" in sys.modules),
        "hooks": (sys.excepthook, sys.displayhook),
        "numpy": set(vars(numpy)),
        "PIL.Image": set(vars(PIL.Image)),
    }
