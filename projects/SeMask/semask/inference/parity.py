"""The difference between an exported file and its model, measured and written beside it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semask.inference.export import (
    INPUT_NAME,
    OPEN_AXES,
    OUTPUT_NAME,
    ExportError,
    ImageToLogits,
)
from semask.inference.model_outputs import evaluating
from semask.utils.files import replacing

# Packages whose versions are recorded: the results of an exported file depend on them.
_PACKAGES = ("semask", "torch", "timm", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Parity:
    """One comparison, on random images.

    Attributes:
        batch, height, width: of the images.
        largest_difference: of the logits, absolute.
        equal_labels: share of the pixels with the same class, 0..1.
    """

    batch: int
    height: int
    width: int
    largest_difference: float
    equal_labels: float


def compared_sizes(
    size: tuple[int, int], least: int, *, dynamic: bool = False
) -> list[tuple[int, int, int]]:
    """Batches, heights and widths to compare an export with.

    Args:
        size: height and width of the export.
        least: the smallest height and width that the export accepts.
        dynamic: add larger and smaller sizes, sizes that are not multiples of 32, and larger
            batches.
    """
    if not dynamic:
        return [(1, *size)]
    height, width = (max(least, side) for side in size)
    lower, narrower = (max(least, 2 * side // 3 + 1) for side in size)
    return [(1, height, width), (3, lower, narrower), (1, height + 37, max(least, width // 2 + 45))]


def compare_export(
    model: nn.Module, sizes: Sequence[tuple[int, int, int]], path: str | os.PathLike[str]
) -> list[Parity]:
    """Compare an exported file's logits with the model's.

    Args:
        model: the exported model.
        sizes: (batch, height, width) of each comparison.
        path: a ``.pt2`` file, or an ``.onnx`` file, which needs onnxruntime.

    Raises:
        ExportError: onnxruntime is missing.
    """
    network = ImageToLogits(model)
    channels = len(network.model.pixel_mean)
    run = _runner(path)
    found = []
    with evaluating(model):
        for seed, (batch, height, width) in enumerate(sizes):
            generator = torch.Generator().manual_seed(seed)
            image = 255 * torch.rand(batch, channels, height, width, generator=generator)
            image = image.to(network.model.device)
            expected, logits = network(image).cpu(), run(image).cpu()
            difference = float((logits - expected).abs().max())
            equal = float((logits.argmax(1) == expected.argmax(1)).double().mean())
            found.append(Parity(batch, height, width, difference, equal))
    return found


def can_compare(path: str | os.PathLike[str]) -> bool:
    """Whether the package that runs such a file is installed."""
    is_onnx = os.fspath(path).endswith(".onnx")
    return not is_onnx or importlib.util.find_spec("onnxruntime") is not None


def save_parity(
    path: str | os.PathLike[str], found: Sequence[Parity], description: dict[str, Any]
) -> str:
    """Write ``PATH.parity.json`` beside an exported file.

    Args:
        path: of the exported file.
        found: the comparisons; empty if the file could not be run.
        description: of input and output, written unchanged.

    Returns:
        The path of the written file.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    content = {
        "file": os.path.basename(os.fspath(path)),
        **description,
        "compared": [asdict(parity) for parity in found],
        "versions": versions,
    }
    target = f"{os.fspath(path)}.parity.json"
    with replacing(target) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    return target


def describe(
    channels: int, classes: int, size: tuple[int, int], *, dynamic: bool
) -> dict[str, Any]:
    """Names and shapes of input and output; dynamic axes by name."""
    sides: list[int | str] = [*size]
    batch: int | str = 1
    if dynamic:
        batch, sides = OPEN_AXES[0], [OPEN_AXES[2], OPEN_AXES[3]]
    return {
        "input": {"name": INPUT_NAME, "shape": [batch, channels, *sides]},
        "output": {"name": OUTPUT_NAME, "shape": [batch, classes, *sides]},
    }


def _runner(path: str | os.PathLike[str]) -> Callable[[Tensor], Tensor]:
    if not os.fspath(path).endswith(".onnx"):
        program: Callable[[Tensor], Tensor] = torch.export.load(os.fspath(path)).module()
        return program
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("Comparing an ONNX file needs: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: image.cpu().numpy()})
        return torch.from_numpy(logits)

    return run
