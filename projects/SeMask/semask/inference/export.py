"""Export of the inference path: `torch.export` and ONNX.

The graph maps a batch of images to logits of the same height and width, for one fixed size or any.
Reading, resizing to ``INPUT.SCALE`` and back to the original size, and the argmax stay outside.
"""

import contextlib
import importlib.util
import inspect
import io
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, backends, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from semask.errors import ConfigError, UserError
from semask.inference.model_outputs import evaluating
from semask.modeling import SeMaskSegmentor
from semask.modeling.heads.base import semantic_scores
from semask.ops.apply import plain_forms
from semask.utils.files import replacing
from semask.utils.text import one_line

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
ONNX_PACKAGES = ("onnx", "onnxscript")
# The axes of (B, C, H, W) that are dynamic in a dynamic export.
OPEN_AXES = {0: "batch", 2: "height", 3: "width"}
# Lower bounds of height and width for a dynamic graph, tried in this order. A graph assumes maps of
# more than one row, column and window: below 33 pixels the map of stride 32 has one token, and a
# window of 7 tokens there is 224 pixels wide.
LEAST_OPEN_SIDES = (33, 65, 129, 257, 513)


class ExportError(UserError):
    """The model cannot be exported on this installation; the message says what is missing."""


class SizeDependentError(ExportError):
    """The traced operations depend on the size of the example input."""


class ImageToLogits(nn.Module):
    """The exported module: normalisation, backbone, head, resizing to the image's size."""

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
            image: (B, C, H, W) float32, 0..255, in the channel order of ``INPUT.FORMAT``.

        Returns:
            (B, K, H, W) float32 logits; for mask classification, the class scores.
        """
        model = self.model
        features = model.backbone(model.padded((image - model.pixel_mean) / model.pixel_std))
        size = (image.shape[-2], image.shape[-1])
        scores = semantic_scores(model.head_prediction(features), model.padded_size(size))
        rows, columns = scores.shape[-2:]
        return F.pad(scores, (0, size[1] - columns, 0, size[0] - rows))  # negative padding crops


def export_program(
    model: nn.Module, size: tuple[int, int], *, dynamic: bool = False
) -> torch.export.ExportedProgram:
    """Export the inference path with `torch.export`.

    Args:
        model: a SeMaskSegmentor; its mode is the same afterwards.
        size: height and width of the image, in pixels.
        dynamic: export with dynamic batch, height and width, of at least :func:`least_side` pixels.
            ``size`` is then not used.

    Returns:
        ``program.module()(image)``; see :class:`ImageToLogits` for input and output.

    Raises:
        ConfigError: the model or the size is not as described.
        ExportError: a dynamic graph is not possible for this model or this PyTorch.
    """
    if min(size) < 1:
        raise ConfigError(f"The image's size has to be positive, not {size[0]}x{size[1]}.")
    network = ImageToLogits(model)
    with evaluating(model):
        if dynamic:
            return _open_program(network.eval())
        image = torch.zeros(1, _channels(network), *size, device=network.model.device)
        return torch.export.export(network.eval(), (image,))


def least_side(program: torch.export.ExportedProgram) -> int:
    """The smallest height and width that a dynamic graph accepts; 1 for a graph of a fixed size."""
    bounds = [int(bound.lower) for bound in program.range_constraints.values()]
    return max(bounds, default=1)


def _channels(network: ImageToLogits) -> int:
    return len(network.model.pixel_mean)


def _open_program(network: ImageToLogits) -> torch.export.ExportedProgram:
    """A graph for any batch, height and width."""
    kind = type(network.model.backbone).__name__
    for least in LEAST_OPEN_SIDES:
        # Height and width must differ at every stride, or torch.export treats them as one
        # dimension.
        sides = (3 * least + 5, 4 * least + 4)
        image = torch.zeros(2, _channels(network), *sides, device=network.model.device)
        axes = {
            axis: torch.export.Dim(name, min=least if axis else 1)
            for axis, name in OPEN_AXES.items()
        }
        try:
            # Faster forms branch on the size; the plain ones do not.
            with plain_forms(network), _open_sizes(kind):
                program = torch.export.export(
                    network, (image,), dynamic_shapes={"image": axes}, strict=False
                )
        except SizeDependentError:
            if least == LEAST_OPEN_SIDES[-1]:
                raise
            continue
        _allow_one_image(program)
        return program
    raise AssertionError("LEAST_OPEN_SIDES is empty")


def _allow_one_image(program: torch.export.ExportedProgram) -> None:
    """Remove the condition that a batch has more than one image.

    It comes from the memory layout that a convolution would choose for the traced batch. At run
    time the convolution chooses its own layout, and the values do not depend on it.
    """
    conditions: list[str] = getattr(program, "_guards_code", None) or []
    program._guards_code = [each for each in conditions if not each.endswith(".size()[0] > 1")]


@contextlib.contextmanager
def _open_sizes(network: str) -> Iterator[None]:
    """Trace a graph without specialising it to the size of the example input.

    Raises:
        ExportError: PyTorch is too old.
        SizeDependentError: the model branches on a size.
    """
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        raise ExportError(
            f"A dynamic export needs a newer PyTorch than {torch.__version__}, which would fix "
            "parts of the size in the graph. Export a fixed size, without --dynamic."
        )
    from torch._dynamo.exc import UserError as TracedSizeError
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    patch = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    # These libraries choose a kernel by the batch size; the exported operation is the same.
    mkldnn, nnpack = (part.flags(enabled=False) for part in (backends.mkldnn, backends.nnpack))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TF32 acceleration")  # of Intel GPUs, by `flags`
            with patch, mkldnn, nnpack:
                yield
    except (TracedSizeError, GuardOnDataDependentSymNode) as error:
        reason = one_line(error)[:300]
        raise SizeDependentError(
            f"This model ({network}) cannot be exported with dynamic sizes, because it branches on "
            f"the image's size ({reason}). Export a fixed size, without --dynamic."
        ) from error


def save_program(
    model: nn.Module,
    size: tuple[int, int],
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
) -> int:
    """Write `export_program` to a ``.pt2`` file for `torch.export.load`, atomically.

    Returns:
        See :func:`least_side`.
    """
    program = export_program(model, size, dynamic=dynamic)
    content = io.BytesIO()  # not every release of PyTorch writes to a file object
    torch.export.save(program, content)
    with replacing(os.fspath(path)) as file:
        file.write(content.getbuffer())
    return least_side(program)


def save_onnx(
    model: nn.Module,
    size: tuple[int, int],
    path: str | os.PathLike[str],
    *,
    dynamic: bool = False,
) -> int:
    """Write the inference path to one ``.onnx`` file, weights included, atomically.

    The input is named "image" and the output "logits"; dynamic axes are "batch", "height", "width".

    Args:
        model: a SeMaskSegmentor; its mode is the same afterwards.
        size: height and width of the image, in pixels.
        path: the file; missing folders are created.
        dynamic: see :func:`export_program`.

    Returns:
        See :func:`least_side`.

    Raises:
        ConfigError: the model or the size is not as described.
        ExportError: a package is missing, PyTorch is older than 2.5, ONNX lacks an operation, or as
            for :func:`export_program`.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs more packages: pip install {' '.join(missing)}")
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise ExportError(f"ONNX needs PyTorch 2.5 or newer; this is {torch.__version__}.")
    program = export_program(model, size, dynamic=dynamic)
    least = least_side(program)
    # Attention as plain matrix products: the outputs of fused kernels have another memory layout
    # than the ONNX exporter assumes.
    with sdpa_kernel(SDPBackend.MATH):
        program = program.run_decompositions()
    exported: Any = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME], verbose=False
    )
    proto = exported.model_proto
    if dynamic:
        for value in (*proto.graph.input, *proto.graph.output):
            for axis, name in OPEN_AXES.items():
                value.type.tensor_type.shape.dim[axis].dim_param = name
    with replacing(os.fspath(path)) as file:
        file.write(proto.SerializeToString())
    return least
