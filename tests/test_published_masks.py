"""Published mask models, by names and shapes: they fit exactly, are refused, or initialise a
model.
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

from reference_masks import CASES, Parts, build_pixel_decoder, load_meta
from semask.checkpoint import (
    SeMaskCheckpointer,
    read_checkpoint,
    starts_partially,
    write_checkpoint,
)
from semask.config import add_semask_config, load_config
from semask.errors import CheckpointError, ConfigError
from semask.modeling.backbone.windows import relative_position_index
from toy_model import Toy, same, saved, values

MASKFORMER, MASK2FORMER, FAPN, MSFAPN = CASES


def published(case: str, semantic: bool = True) -> dict[str, Tensor]:
    """Placeholders for everything in a published file, by its names, with the computed buffers."""
    state: dict[str, Tensor] = {}
    for name, shape in load_meta(case)["state_dict"].items():
        if ".semantic_layer." in name and not semantic:
            continue
        state[name] = torch.zeros(()).expand(shape)
        if name.endswith("relative_position_index"):
            state[name] = relative_position_index(7)
        elif name == "criterion.empty_weight":
            state[name] = torch.tensor([1.0] * (shape[0] - 1) + [0.1])
    return state


def facebook_file(path: Path, case: str) -> Path:
    """A file as Facebook released it: NumPy arrays without semantic layers, some older names."""
    state = published(case, semantic=False)
    for new, old in (
        ("predictor.query_feat.", "predictor.static_query."),
        ("sem_seg_head.pixel_decoder.", "sem_seg_head." if case == MASKFORMER else None),
    ):
        if old is not None:
            state = {name.replace(new, old): value for name, value in state.items()}
    arrays = {name: np.zeros(1, np.float32) for name in state}
    arrays |= {
        name: value.numpy() if value.stride() != (0,) * value.ndim else broadcast(value)
        for name, value in state.items()
    }
    content = {"model": arrays, "__author__": "third_party"}
    path.write_bytes(pickle.dumps(content))
    return path


def broadcast(value: Tensor) -> np.ndarray[Any, Any]:
    return np.zeros(tuple(value.shape), np.float16)


def meta_model(case: str, **options: Any) -> Parts:
    with torch.device("meta"):
        return Parts(case, **options)


def refusal(case: str, path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        SeMaskCheckpointer(meta_model(case, **options)).check(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_semask_files_fit_exactly(tmp_path: Path, case: str, wrapped: bool) -> None:
    state = published(case)
    if wrapped:
        state = {f"module.{name}": value for name, value in state.items()}
    path = saved(tmp_path / "m.pth", {"model": state, "optimizer": {}, "iteration": 159999})
    SeMaskCheckpointer(meta_model(case), complete=True).check(str(path))

    last = "sem_seg_head.pixel_decoder.mask_features.bias"
    prefix = "module." if wrapped else ""
    del state[prefix + last]
    saved(path, {"model": {**state, f"{prefix}sem_seg_head.pixel_decoder.new": torch.ones(1)}})
    message = refusal(case, path)
    assert f"1 missing from the checkpoint: {last}" in message
    assert "1 not in the model: sem_seg_head.pixel_decoder.new" in message


@pytest.mark.parametrize("case", [MASKFORMER, MASK2FORMER])
def test_facebook_files_fit_exactly(tmp_path: Path, case: str) -> None:
    path = facebook_file(tmp_path / "model_final.pkl", case)
    SeMaskCheckpointer(meta_model(case, semantic=False), complete=True).check(str(path))


def published_mask2former(size: str, classes: int, queries: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of Facebook's Mask2Former with Swin: those of its paper's Swin and
    decoder, written out by their sizes."""
    width, depth, window = {
        "tiny": (96, 6, 7),
        "small": (96, 18, 7),
        "base": (128, 18, 12),
        "large": (192, 18, 12),
    }[size]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, *columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, *columns), (rows,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    linear("backbone.patch_embed.proj", width, 3, 4, 4)
    norm("backbone.patch_embed.norm", width)
    for stage, blocks in enumerate((2, 2, depth, 2)):
        channels = width * 2**stage
        for number in range(blocks):
            block = f"backbone.layers.{stage}.blocks.{number}"
            norm(f"{block}.norm1", channels)
            norm(f"{block}.norm2", channels)
            linear(f"{block}.attn.qkv", 3 * channels, channels)
            linear(f"{block}.attn.proj", channels, channels)
            linear(f"{block}.mlp.fc1", 4 * channels, channels)
            linear(f"{block}.mlp.fc2", channels, 4 * channels)
            table = ((2 * window - 1) ** 2, channels // 32)
            shapes[f"{block}.attn.relative_position_bias_table"] = table
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
        if stage < 3:
            step = f"backbone.layers.{stage}.downsample"
            shapes[f"{step}.reduction.weight"] = (2 * channels, 4 * channels)
            norm(f"{step}.norm", 4 * channels)
        norm(f"backbone.norm{stage}", channels)

    decoder = "sem_seg_head.pixel_decoder"
    for level in range(3):  # res5 first
        linear(f"{decoder}.input_proj.{level}.0", 256, width * 2 ** (3 - level), 1, 1)
        norm(f"{decoder}.input_proj.{level}.1", 256)
    shapes[f"{decoder}.transformer.level_embed"] = (3, 256)
    for number in range(6):
        layer = f"{decoder}.transformer.encoder.layers.{number}"
        for name, rows in (
            *(("sampling_offsets", 192), ("attention_weights", 96)),
            *(("value_proj", 256), ("output_proj", 256)),
        ):
            linear(f"{layer}.self_attn.{name}", rows, 256)
        norm(f"{layer}.norm1", 256)
        norm(f"{layer}.norm2", 256)
        linear(f"{layer}.linear1", 1024, 256)
        linear(f"{layer}.linear2", 256, 1024)
    for name, columns in (("adapter_1", (width, 1, 1)), ("layer_1", (256, 3, 3))):
        shapes[f"{decoder}.{name}.weight"] = (256, *columns)
        norm(f"{decoder}.{name}.norm", 256)
    linear(f"{decoder}.mask_features", 256, 256, 1, 1)

    predictor = "sem_seg_head.predictor"
    for number in range(9):
        for kind, attention in (("self", "self_attn"), ("cross", "multihead_attn")):
            layer = f"{predictor}.transformer_{kind}_attention_layers.{number}"
            shapes[f"{layer}.{attention}.in_proj_weight"] = (768, 256)
            shapes[f"{layer}.{attention}.in_proj_bias"] = (768,)
            linear(f"{layer}.{attention}.out_proj", 256, 256)
            norm(f"{layer}.norm", 256)
        layer = f"{predictor}.transformer_ffn_layers.{number}"
        linear(f"{layer}.linear1", 2048, 256)
        linear(f"{layer}.linear2", 256, 2048)
        norm(f"{layer}.norm", 256)
    norm(f"{predictor}.decoder_norm", 256)
    shapes[f"{predictor}.query_feat.weight"] = (queries, 256)
    shapes[f"{predictor}.query_embed.weight"] = (queries, 256)
    shapes[f"{predictor}.level_embed.weight"] = (3, 256)
    linear(f"{predictor}.class_embed", classes + 1, 256)
    for number in range(3):
        linear(f"{predictor}.mask_embed.layers.{number}", 256, 256)
    shapes["criterion.empty_weight"] = (classes + 1,)
    return shapes


def test_names_and_shapes_are_those_of_the_fixture() -> None:
    known = load_meta(MASK2FORMER)["state_dict"]
    plain = {name: tuple(shape) for name, shape in known.items() if ".semantic_" not in name}
    assert published_mask2former("tiny", 150, 100) == plain


FACEBOOKS = {
    **{
        f"{dataset}/swin_{size}_mask2former": (size, classes, 100)
        for size in ("tiny", "small", "base", "large")
        for dataset, classes in (("ade20k", 150), ("cityscapes", 19))
    },
    **{
        f"coco/swin_{size}_mask2former_{task}": (size, classes, 200 if size == "large" else 100)
        for size in ("tiny", "small", "base", "large")
        for task, classes in (("instance", 80), ("panoptic", 133))
    },
    "ade20k/swin_large_mask2former_instance": ("large", 100, 200),
    "ade20k/swin_large_mask2former_panoptic": ("large", 150, 200),
    "cityscapes/swin_large_mask2former_instance": ("large", 8, 200),
    "cityscapes/swin_large_mask2former_panoptic": ("large", 19, 200),
}


@pytest.mark.parametrize("name", FACEBOOKS)
def test_facebooks_models_fit_their_configs(tmp_path: Path, name: str) -> None:
    size, classes, queries = FACEBOOKS[name]
    state: dict[str, Tensor] = {}
    for key, shape in published_mask2former(size, classes, queries).items():
        key = key.replace("predictor.query_feat.", "predictor.static_query.")
        state[key] = torch.zeros(()).expand(shape)
        if key.endswith("relative_position_index"):
            state[key] = relative_position_index(12 if size in ("base", "large") else 7)
    state["criterion.empty_weight"] = torch.tensor([1.0] * classes + [0.1])
    path = saved(tmp_path / "model_final.pth", {"model": state})

    def model(config: str) -> nn.Module:
        cfg = load_config(config)
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            return build_model(cfg)

    SeMaskCheckpointer(model(name), complete=True).check(str(path))
    semask = SeMaskCheckpointer(model(name.replace("/swin", "/semask_swin")), complete=True)
    with pytest.raises(CheckpointError, match=rf"such as {name}\."):
        semask.check(str(path))


# Tensors in a published file, buffers and parameters with two names included: spec-masks F.1.
LARGE = {MASKFORMER: 546, MASK2FORMER: 694, MSFAPN: 701, FAPN: 621}


def large(case: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published SeMask-L of a case, from those of its SeMask-T."""
    tiny = {name: tuple(shape) for name, shape in load_meta(case)["state_dict"].items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tiny.items():
        if name.endswith("relative_position_index"):
            shape = (144, 144)
        elif name.endswith("relative_position_bias_table"):
            shape = (23**2, 2 * shape[1])
        elif name.startswith("backbone."):
            shape = tuple(side if side % 96 else 2 * side for side in shape)
        elif len(shape) > 1 and re.search(r"\.(adapter_|layer_|input_proj\.|align_)", name):
            shape = (shape[0], shape[1] if shape[1] % 96 else 2 * shape[1], *shape[2:])
        shapes[name] = shape
    for name in list(shapes):
        if name.startswith("backbone.layers.2.blocks.0."):
            for block in range(6, 18):
                copy = name.replace(".blocks.0.", f".blocks.{block}.")
                shapes[copy] = shapes[name]
    return shapes


@pytest.mark.parametrize("case", CASES)
def test_the_published_large_models_fit_their_configs(tmp_path: Path, case: str) -> None:
    state: dict[str, Tensor] = {}
    for name, shape in large(case).items():
        state[name] = torch.zeros(()).expand(shape)
        if name.endswith("relative_position_index"):
            state[name] = relative_position_index(12)
        elif name == "criterion.empty_weight":
            state[name] = torch.tensor([1.0] * 150 + [0.1])
    assert len(state) == LARGE[case]
    path = saved(tmp_path / "model_final.pth", {"model": state})
    decoder = {FAPN: "mask2former_fapn", MSFAPN: "mask2former_msfapn"}.get(case, case.split("_")[2])
    cfg = load_config(f"ade20k/semask_swin_large_{decoder}")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    SeMaskCheckpointer(model, complete=True).check(str(path))


@pytest.mark.parametrize("case", [MASKFORMER, MASK2FORMER])
def test_a_plain_model_is_no_semask_model_but_a_start(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = facebook_file(tmp_path / "model_final.pkl", case)
    message = refusal(case, path)
    assert "44 missing" in message
    assert "residual stream" in message
    assert "MODEL.WEIGHTS_MODE to 'initialise'" in message
    assert f"such as ade20k/swin_tiny_{case.split('_')[2]}." in message

    caplog.set_level(logging.INFO)
    checkpointer = SeMaskCheckpointer(meta_model(case), partial=True)
    checkpointer.check(str(path))
    assert "44 tensors" in caplog.text
    found = re.findall(
        rf"Initialised from '{re.escape(str(path))}': (\d+) of the (\d+) tensors of the (.+)",
        caplog.text,
    )
    counts = {part: (int(fitting), int(whole)) for fitting, whole, part in found}
    assert set(counts) == {"backbone", "pixel decoder", "head"}
    assert counts["backbone"][1] - counts["backbone"][0] == 44
    for part in ("pixel decoder", "head"):
        assert counts[part][0] == counts[part][1] > 0
    with pytest.raises(CheckpointError):
        checkpointer.check(str(path), strict=True)
    with pytest.raises(CheckpointError):  # nothing can be predicted with it
        SeMaskCheckpointer(meta_model(case), complete=True, partial=True).check(str(path))


@pytest.mark.parametrize(
    ("file", "model", "decoder"),
    [
        (FAPN, MSFAPN, "mask2former_fapn"),
        (MSFAPN, FAPN, "mask2former_msfapn"),
        (MASK2FORMER, MSFAPN, "mask2former"),
        (MASKFORMER, MASK2FORMER, "maskformer"),
    ],
)
def test_another_decoder_is_named_with_its_config(
    tmp_path: Path, file: str, model: str, decoder: str
) -> None:
    message = refusal(model, saved(tmp_path / "m.pth", {"model": published(file)}))
    assert f"decoder is '{decoder}'" in message
    assert f"Its config is ade20k/semask_swin_tiny_{decoder}." in message


def test_other_classes_are_refused_and_start_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "m.pth", {"model": published(MASK2FORMER)})
    message = refusal(MASK2FORMER, path, num_classes=19)
    assert "150 classes and the model 19" in message
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES to 150" in message

    caplog.set_level(logging.INFO)
    SeMaskCheckpointer(meta_model(MASK2FORMER, num_classes=19), partial=True).check(str(path))
    assert "18 tensors" in caplog.text
    assert "sem_seg_head.predictor.class_embed.weight" in caplog.text


def test_another_decoder_as_a_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "m.pth", {"model": published(MASK2FORMER)})
    caplog.set_level(logging.INFO)
    SeMaskCheckpointer(meta_model(MSFAPN), partial=True).check(str(path))
    assert "7 tensors" in caplog.text
    assert "align_1.dcpack_L2.weight" in caplog.text


def test_buffers_are_compared(tmp_path: Path) -> None:
    index = "backbone.layers.0.blocks.0.attn.relative_position_index"
    for name in (index, "criterion.empty_weight"):
        state = published(MASKFORMER)
        state[name] = state[name].flip(0)
        path = saved(tmp_path / "m.pth", {"model": state})
        assert name in refusal(MASKFORMER, path)


def test_any_weight_of_no_object_is_accepted(tmp_path: Path) -> None:
    """It belongs to the training that wrote the file, and this model's is the config's."""
    state = published(MASKFORMER)
    state["criterion.empty_weight"][-1] = 0.4
    path = saved(tmp_path / "m.pth", {"model": state})
    SeMaskCheckpointer(meta_model(MASKFORMER), complete=True).check(str(path))


def test_the_norm_of_the_convolution_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guide = "sem_seg_head.pixel_decoder.align_1.offset.norm.weight"
    layer = "sem_seg_head.pixel_decoder.layer_1.norm.weight"
    state = {**published(MSFAPN), guide: torch.full((256,), 2.0), layer: torch.full((256,), 3.0)}
    model = Parts(MSFAPN)
    SeMaskCheckpointer(model).load(str(saved(tmp_path / "m.pth", {"model": state})))
    for name in (guide, layer):
        assert torch.equal(model.get_parameter(name), torch.full((256,), 3.0))
    assert guide in caplog.text


def test_shared_parameters_survive_safetensors(tmp_path: Path) -> None:
    source, target = build_pixel_decoder(MSFAPN), build_pixel_decoder(MSFAPN)
    path = str(tmp_path / "m.safetensors")
    write_checkpoint(path, {"model": source.state_dict()})
    target.load_state_dict(read_checkpoint(path)["model"])
    assert same(values(source), values(target))


def test_an_unknown_mode() -> None:
    cfg = get_cfg()
    add_semask_config(cfg)
    assert not starts_partially(cfg)
    cfg.MODEL.WEIGHTS_MODE = "initialise"
    assert starts_partially(cfg)
    cfg.MODEL.WEIGHTS_MODE = "maybe"
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS_MODE"):
        starts_partially(cfg)


def test_own_checkpoint_with_other_classes_as_a_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = Toy(classes=3), Toy(classes=5)
    before = values(model)
    path = saved(tmp_path / "own.pth", {"model": values(source)})
    caplog.set_level(logging.INFO)
    SeMaskCheckpointer(model, partial=True).load(str(path))
    assert "4 tensors" in caplog.text
    for name, value in values(model).items():
        expected = values(source)[name]
        assert torch.equal(value, expected if expected.shape == value.shape else before[name])


def test_a_backbone_of_another_size_is_no_start(tmp_path: Path) -> None:
    path = saved(tmp_path / "own.pth", {"model": values(Toy(dim=8))})
    model = Toy(dim=4)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"own\.pth.*WEIGHTS_MODE"):
        SeMaskCheckpointer(model, partial=True).load(str(path))
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_resuming_is_strict(tmp_path: Path) -> None:
    SeMaskCheckpointer(Toy(classes=3), str(tmp_path)).save("model_0")
    checkpointer = SeMaskCheckpointer(Toy(classes=5), str(tmp_path), partial=True)
    with pytest.raises(CheckpointError, match="3 classes"):
        checkpointer.resume_or_load("", resume=True)
