"""Compares a model with its faster forms and without, through its public interface alone."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from semask.config.loading import load_config
from semask.ops.apply import apply_fast_paths, select_fast_paths

CONFIG = str(Path(__file__).parents[2] / "configs" / "ade20k" / "semask_swin_tiny_fpn.yaml")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def config(**overrides: Any) -> CfgNode:
    """A small SeMask from the shipped config, without randomness; ``SWIN__DEPTHS`` is a key's
    name.
    """
    settings: dict[str, Any] = {
        "DEVICE": "cpu",
        "SWIN__EMBED_DIM": 8,
        "SWIN__DEPTHS": [2, 2, 2, 1],
        "SWIN__NUM_HEADS": [1, 2, 2, 4],
        "SWIN__WINDOW_SIZE": 4,
        "SWIN__DROP_PATH_RATE": 0.0,
        "SEMASK__DROPOUT": 0.0,
        "SEM_SEG_HEAD__NUM_CLASSES": 6,
        "SEM_SEG_HEAD__CONVS_DIM": 8,
        "SEM_SEG_HEAD__DROPOUT": 0.0,
        "SEM_SEG_HEAD__NORM": "BN",
        **overrides,
    }
    pairs = [("MODEL." + key.replace("__", "."), value) for key, value in settings.items()]
    return load_config(CONFIG, [item for pair in pairs for item in pair])


def randomize(model: nn.Module) -> None:
    """Set weights with which every part has an effect, and attention is neither flat nor
    one-hot.
    """
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            noise = noise.square() + 0.5
        elif name.endswith("bias") or name.endswith("running_mean"):
            noise = 0.2 * noise
        elif value.ndim == 1:
            noise = 1 + 0.2 * noise
        elif name.endswith(("query.weight", "key.weight")):
            noise = 1.5 * noise / (value.shape[1] ** 2 * value.shape[0]) ** 0.25
        elif not name.endswith("bias_table"):
            noise = noise / value[0].numel() ** 0.5
        value.copy_(noise)


def pair(cfg: CfgNode, dtype: torch.dtype) -> tuple[Any, Any]:
    """A config's model with all forms that "auto" chooses, and exactly the plain one.

    Their weights are equal.
    """
    plain_cfg = cfg.clone()
    plain_cfg.MODEL.FAST_PATHS = "none"
    model, plain = build_model(cfg), build_model(plain_cfg)
    apply_fast_paths(model, select_fast_paths(cfg))
    randomize(model)
    plain.load_state_dict(model.state_dict())
    return model.to(dtype), plain.to(dtype)


def batch(
    *sizes: tuple[int, int], classes: int = 6, ignored: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Images with labels, a part of them ignored; all of them in the images ``ignored``."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        coarse = torch.randint(0, classes, (height // 4 + 1, width // 4 + 1), generator=generator)
        label = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width].clone()
        label[: height // 5] = 255
        if index in ignored:
            label[:] = 255
        samples.append({"image": image, "sem_seg": label, "height": height + 9, "width": width - 3})
    return samples


def assert_close(got: Tensor, want: Tensor, what: str, *, scale: float | None = None) -> None:
    """Equal within the tolerance of the type, relative to ``scale`` or the largest entry."""
    assert got.shape == want.shape, what
    assert got.dtype == want.dtype, what
    if scale is None:
        scale = want.abs().max().item()
    error = (got.detach() - want.detach()).abs().max().item()
    assert error <= TOLERANCE[want.dtype] * scale, f"{what}: {error:.2e} at a scale of {scale:.2e}"


def assert_equal_gradients(model: nn.Module, plain: nn.Module) -> None:
    """Of all parameters, relative to the largest entry of their layer.

    By layer, as the gradient of a key's bias is 0 but for rounding, and that of gamma a sum in
    which much cancels.
    """
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == set(gradients)
    for name, parameter in model.named_parameters():
        want = gradients[name]
        assert (parameter.grad is None) == (want is None), name
        if parameter.grad is not None and want is not None:
            scale = layer_scale(gradients, name.rpartition(".")[0])
            assert_close(parameter.grad, want, f"gradient of {name}", scale=scale)


def layer_scale(gradients: dict[str, Tensor | None], layer: str) -> float:
    """The largest entry of the gradients of a layer and what is inside it."""
    inside = (g for name, g in gradients.items() if g is not None and name.startswith(f"{layer}."))
    return max(gradient.abs().max().item() for gradient in inside)


def assert_equal_training(
    model: Any, plain: Any, samples: list[dict[str, Any]], batch_norm: bool = True
) -> None:
    """Losses, gradients and BatchNorm statistics of one step in training mode."""
    for each in (model, plain):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(batch_norm)
        each.zero_grad()
    got, want = model(samples), plain(samples)
    assert set(got) == set(want)
    for name in want:
        assert_close(got[name], want[name], name)
    for losses in (got, want):
        torch.stack(list(losses.values())).sum().backward()
    assert_equal_gradients(model, plain)
    state = model.state_dict()
    for name, value in plain.state_dict().items():
        if "running" in name:
            assert_close(state[name], value, name)


def assert_equal_predictions(model: Any, plain: Any, samples: list[dict[str, Any]]) -> None:
    """Logits at the original size and the prior's, in evaluation mode."""
    for each in (model, plain):
        each.eval()
    with torch.no_grad():
        got, want = model(samples), plain.inference(samples, return_priors=True)
        with_priors = model.inference(samples, return_priors=True)
    for index, expected in enumerate(want):
        assert_close(got[index]["sem_seg"], expected["sem_seg"], f"logits {index}")
        found = with_priors[index]
        assert found.keys() == expected.keys()
        assert found["priors"].keys() == expected["priors"].keys()
        for name in {"sem_seg", "prior"} & expected.keys():
            assert_close(found[name], expected[name], f"{name} {index}")
        for name, prior in expected["priors"].items():
            assert_close(found["priors"][name], prior, name)
