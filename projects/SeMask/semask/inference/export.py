"""The inference path as a graph of its own: `torch.export` and ONNX.

The graph takes one image of a fixed size and gives logits of that size. Reading, resizing to
``INPUT.SCALE`` and back to the original size, and the argmax stay outside.
"""

import importlib.util
import inspect
import io
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from semask.errors import ConfigError, UserError
from semask.inference.model_outputs import evaluating
from semask.modeling import SeMaskSegmentor
from semask.modeling.heads.base import semantic_scores
from semask.utils.files import replacing

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
ONNX_PACKAGES = ("onnx", "onnxscript")


class ExportError(UserError):
    """The model cannot be exported on this installation; the message says what is missing."""


class ImageToLogits(nn.Module):
    """What is exported: normalisation, backbone, head, resizing to the image's size."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: a SeMaskSegmentor.

        Raises:
            ConfigError: the model is of another class.
        """
        super().__init__()
        if not isinstance(model, SeMaskSegmentor):
            raise ConfigError(
                f"A {type(model).__name__} cannot be exported: set MODEL.META_ARCHITECTURE to "
                "'SeMaskSegmentor'."
            )
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """
        Args:
            image: (1, C, H, W) float32, 0..255, in the channel order of ``INPUT.FORMAT``.

        Returns:
            Logits, (1, K, H, W) float32; of mask classification its class scores.
        """
        model = self.model
        features = model.backbone(model.padded((image - model.pixel_mean) / model.pixel_std))
        size = (image.shape[-2], image.shape[-1])
        scores = semantic_scores(model.head_prediction(features), model.padded_size(size))
        return scores[..., : size[0], : size[1]]


def export_program(model: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The inference path as `torch.export` has it.

    Args:
        model: a SeMaskSegmentor; its mode is the same afterwards.
        size: height and width of the image, in pixels.

    Returns:
        ``program.module()(image)``; see :class:`ImageToLogits` for input and output.

    Raises:
        ConfigError: the model or the size is not as described.
    """
    if min(size) < 1:
        raise ConfigError(f"The image's size has to be positive, not {size[0]}x{size[1]}.")
    network = ImageToLogits(model)
    channels = len(network.model.pixel_mean)
    image = torch.zeros(1, channels, *size, device=network.model.device)
    with evaluating(model):
        return torch.export.export(network.eval(), (image,))


def save_program(model: nn.Module, size: tuple[int, int], path: str | os.PathLike[str]) -> None:
    """Write `export_program` to a ``.pt2`` file for `torch.export.load`, complete or not at all."""
    content = io.BytesIO()  # not every release of PyTorch writes to a file object
    torch.export.save(export_program(model, size), content)
    with replacing(os.fspath(path)) as file:
        file.write(content.getbuffer())


def save_onnx(model: nn.Module, size: tuple[int, int], path: str | os.PathLike[str]) -> None:
    """Write the inference path to one ``.onnx`` file, weights included; complete or not at all.

    The input is called "image" and the output "logits".

    Args:
        model: a SeMaskSegmentor; its mode is the same afterwards.
        size: height and width of the image, in pixels.
        path: the file; missing folders are made.

    Raises:
        ConfigError: the model or the size is not as described.
        ExportError: a package is missing, or PyTorch is older than 2.5.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs more packages: pip install {' '.join(missing)}")
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise ExportError(f"ONNX needs PyTorch 2.5 or newer; this is {torch.__version__}.")
    program = export_program(model, size)
    # Attention as plain products: what the fused kernels leave in memory has another layout than
    # the ONNX exporter takes for granted.
    with sdpa_kernel(SDPBackend.MATH):
        program = program.run_decompositions()
    exported: Any = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME], verbose=False
    )
    with replacing(os.fspath(path)) as file:
        file.write(exported.model_proto.SerializeToString())


def largest_difference(
    model: nn.Module, size: tuple[int, int], path: str | os.PathLike[str]
) -> float:
    """How far an exported file's logits are from the model's, on an image of noise.

    Args:
        model: what has been exported.
        size: height and width that it has been exported for.
        path: a ``.pt2`` file, or an ``.onnx`` file, which needs onnxruntime.

    Returns:
        The largest absolute difference.

    Raises:
        ExportError: onnxruntime is missing.
    """
    network = ImageToLogits(model)
    channels = len(network.model.pixel_mean)
    image = 255 * torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))
    on_device = image.to(network.model.device)
    with evaluating(model):
        expected = network(on_device)
        if os.fspath(path).endswith(".onnx"):
            found = _run_onnx(path, image)
        else:
            found = torch.export.load(os.fspath(path)).module()(on_device)
    return float((found.cpu() - expected.cpu()).abs().max())


def _run_onnx(path: str | os.PathLike[str], image: Tensor) -> Tensor:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("Checking an ONNX file needs: pip install onnxruntime") from error
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT_NAME], {INPUT_NAME: image.numpy()})
    return torch.from_numpy(logits)
