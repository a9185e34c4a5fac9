"""The faster forms of the backbone equal the plain ones, for every size of parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from largest import Largest
from semask.modeling import SemanticAttention, SemanticLayer, SeMaskSwin
from semask.modeling.backbone.swin import PatchEmbed, PatchMerging, SwinBlock
from semask.modeling.backbone.windows import WindowAttention
from semask.ops import semantic_layer, window
from semask.ops.apply import FAST_PATHS, apply_fast_paths

# One module of each plain class that has a form, and what goes in; sides are odd.
MODULES: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    PatchEmbed: (lambda: PatchEmbed(embed_dim=6), (2, 3, 33, 30)),
    PatchMerging: (lambda: PatchMerging(6), (2, 9, 7, 6)),
    SwinBlock: (
        lambda: SwinBlock(dim=12, num_heads=3, window_size=4, shift=2, drop_path=0.4),
        (3, 9, 13, 12),
    ),
    WindowAttention: (
        lambda: WindowAttention(dim=12, num_heads=3, window_size=4, shift=1),
        (2, 9, 13, 12),
    ),
    SemanticAttention: (lambda: SemanticAttention(dim=6, num_classes=9, dropout=0), (3, 11, 6)),
    SemanticLayer: (
        lambda: SemanticLayer(dim=12, num_classes=5, window_size=4, num_blocks=2),
        (2, 9, 13, 12),
    ),
}
FORMS = [
    (name, plain)
    for name, path in FAST_PATHS.items()
    for plain in path.forms
    if plain.__module__.startswith("semask.modeling.backbone")
]


def tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    return [each for each in outputs if each is not None]


def results(module: nn.Module, x: Tensor) -> list[Any]:
    """In training with the gradients, in evaluation with and without them."""
    found: list[Any] = []
    for training, gradients in ((True, True), (False, True), (False, False)):
        module.train(training).zero_grad()
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            outputs = tensors(module(leaf))
        found += [each.detach() for each in outputs]
        if gradients:
            torch.stack([(each * each.detach().sin()).sum() for each in outputs]).sum().backward()
            found += [leaf.grad, *(each.grad for each in module.parameters())]
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tokens", [1, 40, 10**6])
@pytest.mark.parametrize(("name", "plain_class"), FORMS)
def test_module(
    name: str,
    plain_class: type[nn.Module],
    tokens: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(window, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 8 * 33 * tokens)
    torch.manual_seed(0)
    build, shape = MODULES[plain_class]
    plain, fast = build().to(dtype), build().to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    apply_fast_paths(fast, {name})
    assert type(fast) is FAST_PATHS[name].forms[plain_class]
    assert list(fast.state_dict()) == list(plain.state_dict())
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(shape, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for value, expected in zip(results(fast, x), results(plain, x), strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            value / scale, expected / scale, rtol=0, atol=tolerance, check_stride=False
        )


@pytest.mark.parametrize("tokens", [1, 33, 100, 200, 1000])  # rows of windows or whole maps
@pytest.mark.parametrize("return_priors", [False, True])
def test_size_of_the_chunks_changes_nothing(
    tokens: int, return_priors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "semantic_attention": ("window", "global"),
        "semantic_blocks": (2, 1),
        "semantic_classes": 5,
        "out_features": ("res2", "res3"),
        "activation_checkpoint": (False, False),
    }
    plain, fast = (SeMaskSwin(**settings).double().eval() for _ in range(2))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    apply_fast_paths(fast, FAST_PATHS)
    fast.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 50, 39, dtype=torch.float64)
    monkeypatch.setattr(window, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 30_000 if tokens == 33 else 1)
    with torch.inference_mode():
        expected, result = plain(image, return_priors), fast(image, return_priors)
    assert ("prior2" in result) == return_priors
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("height", "width", "shift"), [(9, 5, 2), (8, 8, 0), (13, 4, 1), (1, 9, 2)]
)
@pytest.mark.parametrize("tokens", [1, 40, 100, 1000])
def test_parts_of_the_windows_are_all_of_them(
    height: int, width: int, shift: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "CHUNK_TOKENS", tokens)
    layout = window.window_layout(3, height, width, 4, shift, torch.device("cpu"))
    values = torch.arange(1.0, 3 * height * width + 1)[:, None]
    expected = window.gather_windows(window.append_zero(values), layout)
    parts = list(window.window_parts(layout))
    cut = [window.gather_windows(window.append_zero(part.take(values)), part) for part in parts]
    assert torch.equal(torch.cat(cut), expected)
    back = torch.zeros_like(values)
    for part, windows in zip(parts, cut, strict=True):
        part.put(window.scatter_windows(windows, part), back)
    assert torch.equal(back, values)


@pytest.mark.parametrize("names", [{"split"}, {"folded"}, {"split", "folded"}], ids=sorted)
def test_semantic_attention_in_and_behind_mixed_precision(
    names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept between calls is of the parameters' own precision, whichever comes first."""
    torch.manual_seed(0)
    monkeypatch.setattr(semantic_layer, "SIMILARITY_BYTES", 100)
    plain, fast = (SemanticLayer(dim=8, num_classes=20, window_size=None).eval() for _ in range(2))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    fast.load_state_dict(plain.state_dict())
    apply_fast_paths(fast, names)
    x = torch.randn(2, 9, 7, 8)
    for mixed in (True, False, True, False):
        for return_prior in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                expected, result = (tensors(each(x, return_prior)) for each in (plain, fast))
            assert [each.dtype for each in result] == [each.dtype for each in expected]
            tolerance = 2e-2 if mixed else 1e-5
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_products_follow_the_parameters() -> None:
    torch.manual_seed(0)
    plain, fast = (SemanticAttention(dim=6, num_classes=9).double().eval() for _ in range(2))
    apply_fast_paths(fast, {"folded"})
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    for _ in range(2):
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        fast.load_state_dict(plain.state_dict())
        with torch.inference_mode():
            torch.testing.assert_close(fast(x, False), plain(x, False))
    for parameter in (*plain.parameters(), *fast.parameters()):
        parameter.data.mul_(0.5)  # which no version tells
    with torch.inference_mode():
        torch.testing.assert_close(fast.eval()(x, False), plain(x, False))


@pytest.mark.parametrize("names", [set(), {"chunked"}], ids=["plain", "chunked"])
def test_bands_make_no_second_map(names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "CHUNK_TOKENS", 8)
    layers: list[tuple[nn.Module, Tensor]] = [
        (PatchEmbed(embed_dim=8), torch.randn(1, 3, 64, 64)),
        (PatchMerging(8), torch.randn(1, 16, 16, 8)),
    ]
    for layer, x in layers:
        apply_fast_paths(layer, names)
        with torch.inference_mode(), Largest() as largest:
            out = layer.eval()(x)
        large = sum(number for size, number in largest.sizes.items() if size >= out.numel())
        assert (large == 1) == bool(names)  # the result alone
