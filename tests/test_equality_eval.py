"""Every array of the reference's forward passes, in float64 and float32."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference import CASES, Model, build_reference, load_arrays, load_meta, weights
from semask.modeling.layers.resize import resize

SIZES = ("128x128", "101x137")


def record(model: nn.Module, image: Tensor) -> dict[str, tuple[Tensor, int, int]]:
    """All arrays that the fixtures name: (NCHW tensor, channels and side of ``summarize``)."""
    arrays: dict[str, tuple[Tensor, int, int]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            arrays[name] = (tokens.permute(0, 3, 1, 2), 16, 8)

        return hook

    backbone: Any = model.backbone
    encoder = backbone.encoder
    handles = [encoder.stem.patch_embed.register_forward_hook(keep("patch_embed"))]
    for i, stage in enumerate(encoder.stages):
        handles.append(stage.register_forward_hook(keep(f"stage{i}.blocks")))
    for name, layer in backbone.semantic_layers.items():
        handles.append(layer.register_forward_hook(keep(f"stage{int(name[3:]) - 2}.semantic")))
    with torch.no_grad():
        features = backbone(image, return_priors=True)
        head: Any = model.sem_seg_head
        logits = head.predict(features)["logits"]
        supervision = head.prior_supervision
        size = (image.shape[-2], image.shape[-1])
        prior = None if supervision is None else supervision.decode(features, size)
    for handle in handles:
        handle.remove()
    for i in range(4):
        arrays[f"feat{i}"] = (features[f"res{i + 2}"], 16, 8)
        if f"prior{i + 2}" in features:
            arrays[f"prior{i}"] = (features[f"prior{i + 2}"], 16, 8)
    if prior is not None:
        arrays["prior"] = (prior, 32, 16)
    arrays["logits"] = (logits, 32, 16)
    arrays["resized"] = (resize(logits, (image.shape[-2], image.shape[-1])), 24, 16)
    return arrays


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest) -> tuple[str, Model]:
    """A case and its model, which takes seconds to build."""
    return request.param, build_reference(request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("size", SIZES)
def test_forward_equals_reference(
    reference: tuple[str, Model], size: str, dtype: torch.dtype
) -> None:
    case, model = reference
    meta = load_meta(case)
    entry = meta["files"][f"eval_{size}.npz"]
    expected = load_arrays(case, f"eval_{size}.npz")
    spec = entry["image"]
    image = weights.make_image(spec["batch"], spec["height"], spec["width"], seed=spec["seed"])
    arrays = record(model.to(dtype), torch.from_numpy(image).to(dtype))

    assert set(arrays) == set(entry["arrays"])
    compared = set()
    for name, (array, channels, side) in arrays.items():
        got = weights.summarize(name, array.double().numpy(), channels, side)
        tolerance = 1e-6
        if dtype == torch.float32:
            own_error = meta["float32_max_abs_diff"][f"eval_{size}.npz"][name]
            tolerance = min(1e-4, 10 * own_error)
        for key, value in got.items():
            want = expected[key]
            if key.endswith(".shape"):
                assert np.array_equal(value, want), key
            elif key.endswith(".stats"):
                relative = 1e-8 if dtype == torch.float64 else 1e-4
                assert np.allclose(value, want, rtol=relative, atol=tolerance), key
            else:
                # the grids are stored in float32
                error = np.abs(value.astype(np.float64) - want).max()
                assert error <= tolerance + 1e-7 * np.abs(want).max(), f"{key}: {error:.2e}"
            compared.add(key)
    assert compared == set(expected)
