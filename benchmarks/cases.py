"""The benchmark cases: the rows of the table, each a list of cases."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

# The shipped configs of the compared models; any other name is also a config.
MODELS = {
    "semask-t": "ade20k/semask_swin_tiny_fpn",
    "semask-l": "ade20k/semask_swin_large_fpn",
    "swin-t": "ade20k/swin_tiny_fpn",
}
# The same with mask-classification decoders.
MASK_MODELS = {
    "semask-t mask2former": "ade20k/semask_swin_tiny_mask2former",
    "semask-t maskformer": "ade20k/semask_swin_tiny_maskformer",
    "semask-t fapn": "ade20k/semask_swin_tiny_mask2former_fapn",
    "semask-t msfapn": "ade20k/semask_swin_tiny_mask2former_msfapn",
}
MASK2FORMER = "semask-t mask2former"
# Other encoders, and the peer of benchmarks/peers.py that each is compared with.
ENCODER_MODELS = {
    "semask mit-b0": "ade20k/semask_mit_b0_fpn",
    "semask mit-b2": "ade20k/semask_mit_b2_fpn",
    "semask convnext-t": "ade20k/semask_convnext_tiny_fpn",
}
ENCODER_PEERS = {
    "semask mit-b0": "segformer-b1",
    "semask mit-b2": "segformer-b2",
    "semask convnext-t": "smp fpn swin-t",
}
SIDES = ("fast", "plain")
LARGE = ("semask-l",)


@dataclass(frozen=True)
class Case:
    """One computation that all sides perform.

    Attributes:
        model: a key of ``MODELS``, or a config.
        kind: "inference" (to logits of the image's size), "labels" (to the class of each of its
            pixels) or "training" (a step with AdamW).
        batch, height, width: of the input, in pixels.
        classes: K; 0 = from the config.
        dtype: "float32", "tf32", "bfloat16" or "float16".
        device: "cpu" or "cuda".
        threads: number of threads of an operation on the CPU.
        opts: further overrides of the config, KEY VALUE pairs.
        apart: run the sides one after the other, as they do not fit into memory together.
        sides: "fast", "plain", and peers of benchmarks/peers.py.
        label_side: side of the square blocks of one class in the label maps, in pixels.
    """

    model: str
    kind: str
    batch: int
    height: int
    width: int
    classes: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    opts: tuple[str, ...] = ()
    apart: bool = False
    sides: tuple[str, ...] = SIDES
    label_side: int = 32

    @property
    def config(self) -> str:
        """The config's name or path."""
        names = {**MODELS, **MASK_MODELS, **ENCODER_MODELS}
        return names.get(self.model, self.model)

    def as_dict(self) -> dict[str, Any]:
        """All fields in plain types, for JSON."""
        return asdict(self)


def case_of(fields: dict[str, Any]) -> Case:
    """Restore a case from the fields of ``as_dict``, also after JSON."""
    lists = ("opts", "sides")
    own: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in fields.items()}
    return Case(**own)


@dataclass(frozen=True)
class Extent:
    """The extent of the rows.

    Attributes:
        models: for the rows that compare models; the first one also serves the other rows.
        size: side of the images, in pixels.
        sizes, classes: of the rows that vary them.
        inference_batches, training_batches: batch sizes.
        training_batch: batch size of the training step.
        wide: (height, width) of the large image of the memory row; labels are made of one twice
            as high and wide, in the row of mask classification, too.
    """

    models: tuple[str, ...] = ("semask-t", "semask-l", "swin-t")
    size: int = 512
    sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    classes: tuple[int, ...] = (19, 150, 1000)
    inference_batches: tuple[int, ...] = (1, 8)
    training_batches: tuple[int, ...] = (1, 2, 4)
    training_batch: int = 2
    wide: tuple[int, int] = (1024, 2048)


def on_gpu(extent: Extent) -> Extent:
    """The batch sizes that fill a GPU."""
    return replace(extent, training_batches=(4, 8, 16, 32), training_batch=16)


def quick(extent: Extent) -> Extent:
    """About a minute on two cores: checks that everything runs, without useful timings."""
    return replace(
        extent,
        models=extent.models[:1],
        size=256,
        sizes=(128, 256),
        classes=(19,),
        inference_batches=(1,),
        training_batches=(1,),
        training_batch=1,
        wide=(256, 512),
    )


def inference(base: Case, extent: Extent) -> list[Case]:
    """Each model, one image and several."""
    return [
        replace(base, model=model, batch=batch)
        for model in extent.models
        for batch in extent.inference_batches
        if batch == 1 or model not in LARGE or base.device != "cpu"
    ]


def training(base: Case, extent: Extent) -> list[Case]:
    """A step of each model."""
    return [
        replace(
            base,
            model=model,
            kind="training",
            batch=extent.training_batch,
            apart=model in LARGE,
        )
        for model in extent.models
    ]


def memory(base: Case, extent: Extent) -> list[Case]:
    """Memory of inference, of a training step, and of a large image."""
    cases = [
        case
        for case in (*inference(base, extent), *training(base, extent))
        if case.kind == "training" or case.batch == 1
    ]
    height, width = extent.wide
    large = replace(base, height=height, width=width)
    # Labels do not need the logits of all pixels.
    labels = replace(large, kind="labels", height=2 * height, width=2 * width, apart=True)
    return [*cases, large, labels]


def size(base: Case, extent: Extent) -> list[Case]:
    """Inference of square images of several sizes."""
    return [replace(base, height=side, width=side) for side in extent.sizes]


def classes(base: Case, extent: Extent) -> list[Case]:
    """Inference and training with several numbers of classes."""
    return [
        replace(base, kind=kind, classes=number)
        for kind in ("inference", "training")
        for number in extent.classes
    ]


def batch(base: Case, extent: Extent) -> list[Case]:
    """Training steps with several batch sizes."""
    return [replace(base, kind="training", batch=number) for number in extent.training_batches]


def masks(base: Case, extent: Extent) -> list[Case]:
    """Mask2Former's decoder compared with transformers', and on a large image.

    The images have some fifteen classes each instead of a hundred as in the other rows, because
    each class is a mask. The plain form would store all masks of the large image at full size.
    """
    case = replace(base, model=MASK2FORMER, label_side=max(8, extent.size // 4))
    beside = replace(case, sides=(*SIDES, "transformers"))
    height, width = extent.wide
    return [
        beside,
        replace(beside, kind="training", batch=extent.training_batch),
        replace(case, kind="labels", height=2 * height, width=2 * width, sides=("fast",)),
    ]


def decoders(base: Case, extent: Extent) -> list[Case]:
    """The cost of each mask-classification decoder on the same backbone."""
    case = replace(base, label_side=max(8, extent.size // 4), sides=("fast",))
    return [
        replace(case, model=model, kind=kind, batch=batch)
        for kind, batch in (("inference", 1), ("training", extent.training_batch))
        for model in MASK_MODELS
    ]


def encoders(base: Case, extent: Extent) -> list[Case]:
    """Other encoders with the FPN decoder, each compared with another project's model."""
    models = [model for model in ENCODER_MODELS if model in extent.models] or ENCODER_MODELS
    return [
        replace(base, model=model, kind=kind, batch=batch, sides=("fast", ENCODER_PEERS[model]))
        for model in models
        for kind, batch in (("inference", 1), ("training", extent.training_batch))
    ]


# Rows whose cases run models; the others are in measure.py and data.py.
MODEL_ROWS: dict[str, Callable[[Case, Extent], Sequence[Case]]] = {
    "inference": inference,
    "training": training,
    "memory": memory,
    "size": size,
    "classes": classes,
    "batch": batch,
    "masks": masks,
    "decoders": decoders,
    "encoders": encoders,
}
ROWS = (*MODEL_ROWS, "data", "startup")
