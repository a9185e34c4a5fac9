"""Training with recomputed activations equals training with stored ones."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from semask.modeling import SemanticLayer, SeMaskSwin
from semask.modeling.backbone.swin import SwinBlock
from semask.ops import window
from semask.ops.apply import apply_fast_paths
from semask.ops.semantic_layer import RecomputedSemanticLayer
from semask.ops.swin import RecomputedSwinBlock

DIM = 12


def blocks(**settings: Any) -> tuple[SwinBlock, SwinBlock]:
    """The same block, with everything kept and recomputed."""
    torch.manual_seed(0)
    settings = {"dim": DIM, "num_heads": 3, "window_size": 4, "shift": 0, **settings}
    plain, fast = (SwinBlock(**settings).double() for _ in range(2))
    apply_fast_paths(fast, {"recomputed"})
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    fast.load_state_dict(plain.state_dict())
    return plain.train(), fast.train()


def step(block: nn.Module, x: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Output and gradients, of all that has one."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = block(x)
    block.zero_grad()
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = {"x": x.grad, **{name: each.grad for name, each in block.named_parameters()}}
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    return {"out": out.detach(), **found}


@pytest.mark.parametrize(("height", "width"), [(9, 13), (8, 8), (1, 6)])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("tokens", [1, 70, 150, 10**6])  # rows of windows or whole maps
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_block(
    height: int,
    width: int,
    shift: int,
    tokens: int,
    drop_path: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(window, "CHUNK_TOKENS", tokens)
    plain, fast = blocks(shift=shift, drop_path=drop_path)
    x = torch.randn(3, height, width, DIM, dtype=torch.float64, requires_grad=True)
    expected = step(plain, x)
    assert len(expected) == 2 + len(list(plain.parameters()))
    torch.testing.assert_close(step(fast, x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", ["norm1", "attn.qkv", "relative_position", "mlp.fc2.bias"])
@pytest.mark.parametrize("with_input", [False, True])
def test_frozen_parameters_have_no_gradient(trained: str, with_input: bool) -> None:
    pair = blocks(shift=2)
    for block in pair:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(trained in name)
    x = torch.randn(2, 6, 7, DIM, dtype=torch.float64, requires_grad=with_input)
    expected, result = (step(block, x) for block in pair)
    assert set(result) == set(expected)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_mixed_precision_is_that_of_the_forward_pass() -> None:
    plain, fast = (block.float() for block in blocks(shift=2))
    x = torch.randn(2, 9, 7, DIM, requires_grad=True)
    dtypes = set()

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        dtypes.add(output.dtype)

    for block in (plain, fast):
        block.mlp.fc1.register_forward_hook(note)
    steps = []
    for block in (plain, fast):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block(x)
        steps.append([out, *torch.autograd.grad(out.sum(), [x, *block.parameters()])])
    assert dtypes == {torch.bfloat16}
    for expected, result in zip(*steps, strict=True):
        assert result.dtype == expected.dtype
        scale = expected.abs().max()
        torch.testing.assert_close(result / scale, expected / scale, rtol=0, atol=3e-2)


def test_nothing_but_the_input_is_kept() -> None:
    _, fast = blocks(drop_path=0.1)
    x = torch.randn(2, 16, 16, DIM, dtype=torch.float64, requires_grad=True)
    tokens, pairs = 2 * 16 * 16, 16**2  # of the maps, and in a window
    # The input, the scale of two branches for each token, position bias and its index.
    kept = kept_for_the_gradient(fast, x)
    assert x.numel() <= kept <= x.numel() + 2 * tokens + 3 * pairs + pairs


def kept_for_the_gradient(module: nn.Module, x: Tensor) -> int:
    """Numbers that are kept, without parameters."""
    parameters = {each.untyped_storage().data_ptr() for each in module.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = module(x)
    assert held is not None
    return sum(kept.values())


def test_semantic_layer_keeps_its_input_alone() -> None:
    x = torch.randn(1, 16, 16, DIM, requires_grad=True)
    settings: dict[str, Any] = {"dim": DIM, "num_classes": 5, "window_size": 4}
    assert kept_for_the_gradient(SemanticLayer(**settings), x) > 4 * x.numel()
    fast = apply_fast_paths(SemanticLayer(**settings), {"recomputed"})
    assert kept_for_the_gradient(fast, x) == x.numel()


def test_layers_with_hooks_compute_themselves() -> None:
    """Pruning, for instance, sets a layer's weight before each call."""
    steps = []
    for block in blocks():
        prune.random_unstructured(block.mlp.fc2, "weight", amount=0.0)
        block.mlp.fc2.weight_mask[::2] = 0
        x = torch.randn(2, 6, 7, DIM, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        x.data.normal_()
        steps.append([step(block, x) for _ in range(2)])
    for expected, result in zip(*steps, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_hooks_of_parameters_are_called_once() -> None:
    x = torch.randn(2, 16, 16, DIM, dtype=torch.float64, requires_grad=True)
    pair = blocks()
    for block in pair:
        block.mlp.fc1.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    expected, result = (step(block, x) for block in pair)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_only_where_nothing_is_drawn_inside() -> None:
    for rate in ({"dropout": 0.1}, {"attention_dropout": 0.1}):
        plain, fast = blocks(**rate)
        x = torch.randn(2, 9, 9, DIM, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(step(fast, x), step(plain, x), rtol=0, atol=0)


def test_second_derivatives_are_refused() -> None:
    _, fast = blocks()
    x = torch.randn(1, 4, 4, DIM, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("attention", list(product(("window", "global"), repeat=2)))
@pytest.mark.parametrize("checkpointed", [False, True])
def test_backbone_with_dropout_in_its_semantic_layers(
    attention: tuple[str, str], checkpointed: bool
) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (2, 2, 1),
        "num_heads": (2, 4, 4),
        "window_size": 4,
        "semantic_attention": (*attention, "global"),
        "semantic_blocks": (2, 1, 1),
        "semantic_classes": 5,
        "out_features": ("res2", "res3", "res4"),
        "activation_checkpoint": (checkpointed, False, False),
        "semantic_dropout": 0.5,
    }
    plain, fast = (SeMaskSwin(**settings).double() for _ in range(2))
    apply_fast_paths(fast, {"recomputed"})
    chosen = [
        [isinstance(block, RecomputedSwinBlock) for block in stage.blocks]
        for stage in fast.encoder.stages
    ]
    assert chosen == [[True, True], [True, True], [False]]
    layers = fast.semantic_layers.values()
    semantic = [isinstance(layer, RecomputedSemanticLayer) for layer in layers]
    assert semantic == [not checkpointed, True, False]
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 50, 39, dtype=torch.float64)

    def everything(backbone: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        out = backbone(image)
        sum(each.square().mean() for each in out.values()).backward()
        gradients = {name: each.grad for name, each in backbone.named_parameters()}
        return {**out, **gradients, "random state": torch.get_rng_state()}

    expected = everything(plain.train())
    torch.testing.assert_close(everything(fast.train()), expected, rtol=1e-9, atol=1e-9)
