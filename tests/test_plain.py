"""The plain model equals the reference, and the plain data pipeline the project's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from plain import PlainPipeline, PlainSegmentor, plain_loss
from plain.head import resize
from plain_comparison import config
from reference import CASES, load_arrays, load_meta, reference_state_dict, weights
from semask.checkpoint import convert_state_dict
from semask.data.mappers.semantic import SemSegMapper
from test_equality_train import FILE, inputs, norm, set_batch_norm


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest) -> Iterator[tuple[str, PlainSegmentor]]:
    """A case and its model with the reference's weights, in float64, without dropout."""
    case = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    meta = load_meta(case)
    spec, head = meta["backbone"], meta["head"]
    model = PlainSegmentor(
        embed_dim=spec["embed_dim"],
        depths=spec["depths"],
        num_heads=spec["num_heads"],
        window_size=spec["window_size"],
        semantic_attention=spec.get("semantic_attention", ["none"] * 4),
        semantic_blocks=spec.get("semantic_blocks", [0] * 4),
        semantic_window_size=spec.get("semantic_window_size"),
        num_classes=head["num_classes"],
        conv_dims=head["channels"],
        prior_loss_weight=head.get("prior_loss_weight") or 0.0,
        drop_path_rate=0.0,
        semantic_dropout=0.0,
        head_dropout=0.0,
    )
    state, _ = convert_state_dict(reference_state_dict(case))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    yield case, model.double()
    torch.set_num_threads(threads)


def recorded(model: PlainSegmentor, image: Tensor) -> dict[str, tuple[Tensor, int, int]]:
    """The arrays that the fixtures name: (NCHW tensor, channels and side of ``summarize``)."""
    arrays: dict[str, tuple[Tensor, int, int]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tokens = output[0] if isinstance(output, tuple) else output
            height, width = output[1:] if name == "patch_embed" else args[1:3]
            maps = tokens.view(len(tokens), height, width, -1).permute(0, 3, 1, 2)
            arrays[name] = (maps, 16, 8)

        return hook

    backbone: Any = model.backbone
    handles = [backbone.patch_embed.register_forward_hook(keep("patch_embed"))]
    for i, stage in enumerate(backbone.stages):
        handles.append(stage.blocks[-1].register_forward_hook(keep(f"stage{i}.blocks")))
        if stage.semantic_layer is not None:
            handles.append(stage.semantic_layer.register_forward_hook(keep(f"stage{i}.semantic")))
    with torch.no_grad():
        features = backbone(image)
        logits, prior = model.logits(image)
    for handle in handles:
        handle.remove()
    for name, feature in features.items():
        stage = int(name[-1]) - 2
        arrays[f"feat{stage}" if name.startswith("res") else f"prior{stage}"] = (feature, 16, 8)
    if prior is not None:
        arrays["prior"] = (prior, 32, 16)
    arrays["logits"] = (logits, 32, 16)
    arrays["resized"] = (resize(logits, image.shape[-2:]), 24, 16)
    return arrays


@pytest.mark.parametrize("size", ["128x128", "101x137"])
def test_plain_forward_equals_the_reference(
    reference: tuple[str, PlainSegmentor], size: str
) -> None:
    case, model = reference
    expected = load_arrays(case, f"eval_{size}.npz")
    spec = load_meta(case)["files"][f"eval_{size}.npz"]["image"]
    image = weights.make_image(spec["batch"], spec["height"], spec["width"], seed=spec["seed"])
    arrays = recorded(model.eval(), torch.from_numpy(image).double())
    compared = set()
    for name, (array, channels, side) in arrays.items():
        for key, value in weights.summarize(name, array.numpy(), channels, side).items():
            relative = 1e-8 if key.endswith(".stats") else 1e-7
            np.testing.assert_allclose(value, expected[key], relative, 1e-6, err_msg=key)
            compared.add(key)
    assert compared == set(expected)


def test_plain_losses_and_gradients_equal_the_reference(
    reference: tuple[str, PlainSegmentor],
) -> None:
    case, model = reference
    expected = load_arrays(case, FILE)
    images, labels = inputs(case)
    model.train().zero_grad()
    set_batch_norm(model, training=False)

    def close(key: str, value: Tensor) -> None:
        np.testing.assert_allclose(
            value.detach().numpy(), expected[key], rtol=1e-6, atol=1e-9, err_msg=key
        )

    losses = model.losses(images, labels)
    total = torch.stack(list(losses.values())).sum()
    close("loss", total)
    close("loss_ce", losses["loss_sem_seg"])
    if "loss_cate" in expected:
        close("loss_cate", losses["loss_prior"])
    total.backward()
    parameters = dict(model.named_parameters())
    reference_names = list(load_meta(case)["state_dict"])
    numbers, _ = convert_state_dict({n: torch.tensor(i) for i, n in enumerate(reference_names)})
    own_names = {reference_names[int(number)]: name for name, number in numbers.items()}
    names = [key.split(":", 1)[1] for key in expected if key.startswith("grad_norm:")]
    assert names
    for name in names:
        gradient = parameters[own_names[name]].grad
        assert gradient is not None
        close(f"grad_norm:{name}", gradient.norm())
        close(f"grad_head:{name}", gradient.flatten()[:32])
    close("grad_norm_all", norm(parameters.values()))
    with torch.no_grad():
        logits, _ = model.logits(images)
        for pixels in (2000, 100000):
            if f"ohem{pixels}.loss_ce" in expected:
                close(f"ohem{pixels}.loss_ce", plain_loss(logits, labels, ohem_pixels=pixels))
        set_batch_norm(model, training=True)
        losses = model.losses(images, labels)
        close("bn_train.loss", torch.stack(list(losses.values())).sum())


@pytest.mark.parametrize("limit", [1.0, 0.75])
@pytest.mark.parametrize("sampling", ["choice", "range"])
def test_plain_pipeline_gives_the_mapper_s_images(
    tmp_path: Path, sampling: str, limit: float
) -> None:
    rng = np.random.default_rng(0)
    for index in range(2):
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((96, 70 + 10 * index), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{index}.jpg")
        label = rng.integers(0, 5, (picture.height // 10, picture.width // 12), dtype=np.uint8)
        label[0] = 255
        Image.fromarray(label).resize(picture.size, Image.Resampling.NEAREST).save(
            tmp_path / f"{index}.png"
        )
    cfg = config()
    cfg.INPUT.SCALE = [256, 64]
    cfg.INPUT.SCALE_SAMPLING = sampling
    cfg.INPUT.SCALE_FACTORS = [0.5, 1.75]
    cfg.INPUT.CROP.SIZE = [64, 64]
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = limit
    mapper = SemSegMapper(cfg, is_train=True)
    plain = PlainPipeline(
        scale=cfg.INPUT.SCALE,
        factors=cfg.INPUT.SCALE_FACTORS,
        sampling=sampling,
        crop=cfg.INPUT.CROP.SIZE,
        max_category_area=limit,
    )
    for seed in range(40):
        record = {
            "file_name": str(tmp_path / f"{seed % 2}.jpg"),
            "sem_seg_file_name": str(tmp_path / f"{seed % 2}.png"),
        }
        np.random.seed(seed)
        got = mapper(record)
        np.random.seed(seed)
        want = plain(record)
        for key in ("image", "sem_seg"):
            assert torch.equal(got[key].float(), want[key].float()), (seed, key)
            assert got[key].dtype == want[key].dtype
