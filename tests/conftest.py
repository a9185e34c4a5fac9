"""Fixtures of all tests."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import semask  # noqa: F401  (before Detectron2, here and in any test module)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

import tiny

REPOSITORY = Path(__file__).resolve().parents[1]

# What `make quick` leaves out: files and tests, one a line, as `pytest --durations=0` names them.
SLOW = REPOSITORY / "tests" / "slow.txt"

# Small tensors gain nothing from more threads, and the results depend on their number.
torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests; an entry without [...] is for every parameter."""
    lines = SLOW.read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    for item in items:
        path, parameters, rest = item.nodeid.partition("[")  # parameters may have slashes, too
        test = path.rpartition("/")[2]
        if slow & {test + parameters + rest, test, test.partition("::")[0]}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every test, alone or in a whole run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Restore the loggers after each test, as a run configures them."""
    with tiny.own_loggers():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: the tensors are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def catalogs() -> Iterator[None]:
    """Remove everything that a test has registered."""
    tables = (DatasetCatalog.data, MetadataCatalog.data)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real photographs and all reference numbers, next to the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder 'shared' beside the checkout, which is not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_is_not_ignored() -> None:
    """Shells start background jobs with SIGINT ignored, which Python and its children keep."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
