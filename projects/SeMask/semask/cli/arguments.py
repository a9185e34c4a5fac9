"""The arguments and the help of each sub-command of ``semask``.

This module imports only the standard library, so that help and errors in the arguments appear
before PyTorch is loaded.
"""

import argparse
import os
from collections.abc import Callable

from semask.cli.options import (
    KEY_VALUE,
    add_config,
    add_configured,
    add_min_score,
    add_model,
    add_overrides,
    add_predictor,
    add_run,
    add_size,
)


def train(parser: argparse.ArgumentParser) -> None:
    """Train a model and evaluate it, or with --eval-only only evaluate it.

        semask train scenes/semask_scenes
        semask train CONFIG --num-gpus 8 SOLVER.BASE_LR 0.0002
        semask train CONFIG --resume OUTPUT_DIR DIR
        torchrun --nproc-per-node 8 --max-restarts 3 -m semask train CONFIG

    CONFIG is a file, or the name of a shipped config; any of its keys can be overridden, as
    KEY VALUE or KEY=VALUE. Datasets are read from the folder in the environment variable
    DETECTRON2_DATASETS. The last line printed is the path of the picture with predictions.
    Exit status: 0; 2 for a mistake in config, data or checkpoint, if possible before anything is
    written, and for a full disk; 1 after a loss that is not finite, or when another process of the
    run has ended; 130 after Ctrl-C and 143 after a SIGTERM, with a checkpoint to resume from.
    """
    add_run(parser)
    parser.add_argument("--eval-only", action="store_true", help="evaluate without training")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove an earlier run's checkpoints from OUTPUT_DIR and start over",
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Evaluate a checkpoint on the config's DATASETS.TEST.

        semask evaluate CONFIG --weights model_final.pth
        semask evaluate CONFIG --resume OUTPUT_DIR DIR
        semask evaluate CONFIG --weights model_final.pth TEST.PROTOCOL multi_scale

    The same as `semask train --eval-only`. With --resume, the last checkpoint in OUTPUT_DIR is
    evaluated. Exit status: 0; 2 for a mistake in config, data or checkpoint, and for a full disk;
    1 when another process of the run has ended; 130 after Ctrl-C.
    """
    add_run(parser)
    parser.add_argument("--weights", metavar="FILE", help="checkpoint, sets MODEL.WEIGHTS")
    parser.set_defaults(eval_only=True, overwrite=False)


def predict(parser: argparse.ArgumentParser) -> None:
    r"""Segment images and videos with a trained model.

        semask predict photo.jpg --config CONFIG --weights model_final.pth
        semask predict photos 'more/**/*.png' --config CONFIG --weights model_final.pth \
            --output out --priors
        semask predict drive.mp4 --config CONFIG --weights model_final.pth
        semask predict photos --config CONFIG --weights model_final.pth \
            --opts TEST.PROTOCOL multi_scale

    CONFIG is a file, or the name of a shipped config. An input is an image, a video, a folder
    (including its subfolders) or a quoted glob pattern. The output folder keeps the inputs' paths
    relative to their common folder, in:

        overlay/NAME.png           the image with its coloured labels; overlay/NAME.mp4 for a video
        labels/NAME.png            the class index of each pixel; for videos labels/NAME/000000.png,
                                   ..., only with --video-labels
        prior2/NAME.png, prior3/   with --priors, the predicted classes of each stage's prior
        classes.json, legend.png   names and colours of the classes

    NAME has no suffix, unless two names would collide ("a.jpg", "a.png"). An instance or panoptic
    model writes, instead of labels/:

        instances/NAME.json        boxes, scores and masks in COCO's result format; NAME is the
                                   image_id
        panoptic/NAME.png          for a panoptic model, the segments in COCO's panoptic format,
        panoptic/NAME.json         and their categories

    Files are written atomically. Exit status: 0; 2 for a mistake in config, checkpoint or
    arguments, or if an input could not be read (the others are still written); 130 after Ctrl-C.
    """
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image, video, folder or pattern"
    )
    add_predictor(parser)
    parser.add_argument(
        "--output", default="predictions", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--alpha", type=float, default=0.5, help="opacity of the labels, 0 to 1")
    add_min_score(parser)
    parser.add_argument("--priors", action="store_true", help="also draw the semantic priors")
    parser.add_argument(
        "--video-labels",
        action="store_true",
        help="also write the labels or instances of each frame",
    )
    parser.add_argument(
        "--video-format", choices=("mp4", "avi"), default="mp4", help="H.264 or Motion JPEG"
    )


def demo(parser: argparse.ArgumentParser) -> None:
    """Serve a local page to try a model on images and videos.

        semask demo --config CONFIG --weights model_final.pth
        semask demo --config CONFIG --weights model_final.pth --max-size 20MiB --opts KEY VALUE

    CONFIG is a file, or the name of a shipped config. The page shows the prediction over the image
    with an opacity slider, a legend, the class name under the pointer, the confidence and the
    prior of each stage, and offers the files that `semask predict` writes for download. It needs
    `pip install 'semask[demo]'`, listens only on this machine unless --host is set, loads nothing
    from other servers, and deletes each upload after its prediction. Ctrl-C or SIGTERM ends it.
    Exit status: 0; 2 for a mistake in config, checkpoint or arguments, if gradio is missing, or if
    the port is in use.
    """
    add_predictor(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 accepts other machines (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="default: the first free port from 7860")
    parser.add_argument(
        "--max-size", default="100MiB", metavar="SIZE", help="maximum upload (default: %(default)s)"
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=50,
        metavar="N",
        help="maximum size of an image or a frame (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=300,
        metavar="N",
        help="maximum frames of a video; later ones are skipped (default: %(default)s)",
    )
    add_min_score(parser, "initial value for drawn instances")


def import_labels(parser: argparse.ArgumentParser) -> None:
    """Convert labels of other tools into a dataset to train on.

        semask import PATH --output DIR
        semask import masks --images photos --palette labelmap.txt --output DIR
        semask import export.json --to folder --output DIR

    PATH is a folder, or an annotation file. Recognised formats are COCO (instances and panoptic),
    YOLO polygons, LabelMe, CVAT for images, Label Studio, Supervisely, Pascal VOC and other
    coloured or grey label maps. If the colours of label maps have no names, DIR/palette.csv lists
    them: name them and pass the file as --palette.
    DIR contains images and annotations, and:

        classes.json       names and colours of the classes
        split.csv          the source and the split of each image
        import_notes.csv   everything that was left out or changed

    Then the data is checked as by `semask check`, and the last lines printed are the commands to
    view it and to train on it. Exit status: 0; 1 if the check found a problem; 2 for labels that
    cannot be imported or a mistake in the arguments, without creating DIR; 130 after Ctrl-C.
    """
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", default="", help="of the labels (default: detected)")
    parser.add_argument(
        "--to",
        choices=("folder", "coco"),
        default="",
        help="label maps, or instances in COCO's format; default: the closer to the source",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images, if not in PATH")
    parser.add_argument("--palette", metavar="FILE", help="colours and names of label maps")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="class names, in order"
    )
    parser.add_argument(
        "--unlabelled",
        choices=("background", "ignore"),
        default="background",
        help="label of pixels outside all outlines (default: %(default)s)",
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of images for validation, if the labels have no split (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random split (default: 0)")
    parser.add_argument(
        "--link", action="store_true", help="hard-link the images instead of copying"
    )


def prepare(parser: argparse.ArgumentParser) -> None:
    """Create the annotation files for instance and panoptic segmentation of ADE20K and Cityscapes.

        semask prepare ade20k
        semask prepare cityscapes --workers 16

    Reads the downloaded dataset in the folder in the environment variable DETECTRON2_DATASETS and
    writes these files next to it. Existing files are not changed: remove one to have it written
    again.

        ADEChallengeData2016/ade20k_instance_{train,val}.json      from annotations_instance/
        ADEChallengeData2016/ade20k_panoptic_{train,val}{.json,/}  and annotations/
        cityscapes/gtFine/cityscapes_instance_{train,val}.json     from *_gtFine_instanceIds.png
        cityscapes/gtFine/cityscapes_panoptic_{train,val}{.json,/}

    Instances are in COCO's format with masks, panoptic segments in its panoptic format. Instances
    are painted over stuff; a pixel of a thing class without an instance is in no segment, and
    Cityscapes' groups are crowds. The datasets are registered as ade20k_instance_train,
    ade20k_panoptic_val, cityscapes_instance_train and so on. COCO needs no preparation. Exit
    status: 0; 2 for files that are missing or cannot be used; 130 after Ctrl-C.
    """
    parser.add_argument("name", choices=("ade20k", "cityscapes"), help="of the dataset")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="worker processes; 0 = none (default: %(default)s)",
    )


def check(parser: argparse.ArgumentParser) -> None:
    """Check a dataset's files and report what is wrong with them.

        semask check ade20k_raw_sem_seg_val
        semask check --images DIR --labels DIR --classes road car tree
        semask check --images DIR --annotations FILE.json
        semask check --config CONFIG [KEY VALUE ...]

    The first form checks registered datasets, the last one those of a config's DATASETS.TRAIN and
    TEST; --annotations is a file in COCO's detection format. Every image and label map is read as
    in training. The report lists files without counterpart, unreadable files, modes and sizes,
    images and label maps of different sizes, label values that are not classes, and how often each
    class occurs; for instances, boxes outside the image, unusable polygons and masks, unknown or
    duplicate ids, and images without annotations. It also reports nearly black images, data
    without labelled pixels or with a single class, and with --config what else a training would
    refuse, such as categories that differ. Exit status: 0; 1 if something is wrong; 2 for a
    mistake in the arguments, or if --picture or --json cannot be written.
    """
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"datasets (or {KEY_VALUE} pairs)")
    add_config(parser)
    parser.add_argument("--images", metavar="DIR", help="folder of the images of your own dataset")
    parser.add_argument("--labels", metavar="DIR", help="folder of its label maps")
    parser.add_argument("--annotations", metavar="FILE", help="its instances, in COCO's format")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="its class names")
    parser.add_argument("--num-classes", type=int, metavar="K", help="number of its classes")
    parser.add_argument("--ignore", type=int, default=255, help="its ignore value (default: 255)")
    parser.add_argument("--image-ext", nargs="+", metavar="EXT", help="suffixes of its images")
    parser.add_argument("--label-ext", nargs="+", metavar="EXT", help="suffixes of its label maps")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="check only N images")
    parser.add_argument("--picture", metavar="FILE", help="draw some images and label maps (PNG)")
    parser.add_argument(
        "--rows", type=int, default=6, metavar="N", help="images to draw (default: 6)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to FILE")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), metavar="N")


def convert(parser: argparse.ArgumentParser) -> None:
    """Convert a checkpoint to this project's parameter names, without training state.

        semask convert swin_tiny_patch4_window7_224.pth swin_t.pth
        semask convert URL semask_t.safetensors --config ade20k/semask_swin_tiny_fpn
        semask convert output/run/model_final.pth averaged.pth --ema

    SOURCE is a file or URL: a published SeMask-FPN or Swin-FPN model, an ImageNet-pretrained Swin,
    or a checkpoint of a run of this project. TARGET ends in .pth or .safetensors. The kind of
    SOURCE and what was left out are printed. Training and evaluation also read all kinds without
    conversion. Exit status: 0; 2 for a mistake, with nothing written.
    """
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    add_config(parser, "check that the weights fit the model of this config (name or file)")
    add_overrides(parser)
    parser.add_argument(
        "--ema", action="store_true", help="use the averaged weights of a run (SOLVER.EMA)"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read a .pkl with more than NumPy arrays, which can run arbitrary code: only if "
        "you trust its author",
    )


def analyze(parser: argparse.ArgumentParser) -> None:
    """List parameters, multiply-adds and activation memory of a model, module by module.

        semask analyze ade20k/semask_swin_tiny_fpn
        semask analyze CONFIG --size 640 640 --depth 4
        semask analyze CONFIG --device cuda --batch-size 16
        semask analyze CONFIG --json MODEL.SWIN.EMBED_DIM 64

    CONFIG is a file, or the name of a shipped config. Without --device only shapes are computed, on
    the meta device: no GPU, weights or memory are needed, whatever the size of the model; a
    detector runs on the CPU, because the boxes that it keeps depend on their values.
    Exit status: 0; 2 for a mistake in the config or the arguments.
    """
    add_configured(parser)
    add_size(parser, "default: the training crop")
    parser.add_argument("--batch-size", type=int, default=1, help="of the training step")
    parser.add_argument("--device", help="of the training step; default: meta, cpu for detectors")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to list")
    parser.add_argument("--json", action="store_true", help="every module, as JSON")


def fit(parser: argparse.ArgumentParser) -> None:
    """Estimate the device memory of a training, and list settings that make it fit.

        semask fit ade20k/semask_swin_large_fpn --memory 24GiB
        semask fit ade20k/semask_swin_large_fpn --memory 24GiB --num-gpus 8
        semask fit CONFIG MODEL.DEVICE=cpu

    Prints the peak memory of a training step for several batch sizes, as configured, in mixed
    precision and with activation checkpointing; its parts; the peak of an evaluation; and the
    KEY=VALUE pairs that make the config's SOLVER.IMS_PER_BATCH fit, with SOLVER.ACCUMULATE_STEPS
    if needed. Nothing is trained: only shapes are computed (a detector runs on the CPU), so no GPU
    is needed. PyTorch's tensors are counted, and 1 GiB of --memory (1.5 on the CPU) is reserved
    for the rest. Exit status: 0; 1 if not even one image fits; 2 for a mistake in config or
    arguments.
    """
    add_configured(parser)
    parser.add_argument(
        "--memory", metavar="SIZE", help="of one device, such as 24GiB (default: this machine's)"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs that share IMS_PER_BATCH")
    add_size(parser, "image size in evaluation, in pixels (default: that of training)")


def export(parser: argparse.ArgumentParser) -> None:
    """Write the inference path of a trained model as an ONNX or a torch.export file.

        semask export --config CONFIG --weights model_final.pth --output model.onnx
        semask export --config CONFIG --weights model_final.pth --output model.pt2 --size 512 683
        semask export --config CONFIG --weights model_final.pth --output model.onnx --dynamic

    CONFIG is a file, or the name of a shipped config. Input "image": (1, 3, H, W) float32, 0..255,
    in the config's channel order (RGB in the shipped ones), resized to the fixed --size by the
    caller; with --dynamic (B, 3, H, W), for any batch size and any image size above a minimum.
    Output "logits": (B, K, H, W). The exported file is then compared with the model, with --dynamic
    at several sizes, and PATH.parity.json records the result. ONNX needs the packages onnx,
    onnxscript and, for the comparison, onnxruntime.
    Exit status: 0; 2 for a mistake in config, checkpoint or arguments, or a missing package.
    """
    add_model(parser)
    parser.add_argument("--output", required=True, help="the file to write: .onnx or .pt2")
    add_size(parser, "image size, in pixels (default: the training crop)")
    parser.add_argument("--dynamic", action="store_true", help="accept any batch, height and width")


def plot(parser: argparse.ArgumentParser) -> None:
    """Plot the curves of one or several training runs, from their metrics.json.

        semask plot output/scenes
        semask plot RUN_A RUN_B --output compared.png
        semask plot semask=RUN_A swin=RUN_B --output compared.pdf

    A run is a folder with a metrics.json, or such a file; NAME=RUN names it in the legend. Without
    --output the plot of a single run is training.png next to its metrics.json. The suffix
    determines the format (png, svg, pdf). The last line printed is the path of the picture. If a
    run was resumed, repeated iterations count once; an incomplete last line of a killed run is
    ignored with a warning. Exit status: 0; 2 for a file that is missing, empty or damaged, or a
    picture that cannot be written.
    """
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", metavar="FILE", help="the picture")


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "demo": demo,
    "import": import_labels,
    "prepare": prepare,
    "check": check,
    "convert": convert,
    "analyze": analyze,
    "fit": fit,
    "export": export,
    "plot": plot,
}
