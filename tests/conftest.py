"""What all tests share."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import semask  # noqa: F401  (before any test module imports Detectron2)

REPOSITORY = Path(__file__).resolve().parents[1]

# Small tensors gain nothing from more threads, and the results depend on their number.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, alone or in a whole run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real photographs and all reference numbers, beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' beside the checkout, which is not there")
    return folder
