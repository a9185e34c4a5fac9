"""What each sub-command of ``semask`` takes, and its help.

This module imports only the standard library, so that help and errors in the arguments appear
before PyTorch is loaded.
"""

import argparse
import os
from collections.abc import Callable

from semask.cli.options import KEY_VALUE, add_config, add_model, add_overrides, add_run


def train(parser: argparse.ArgumentParser) -> None:
    """Train a model and evaluate it, or with --eval-only evaluate it alone.

        semask train scenes/semask_scenes
        semask train CONFIG --num-gpus 8 SOLVER.BASE_LR 0.0002
        semask train CONFIG --resume OUTPUT_DIR DIR
        torchrun --nproc-per-node 8 --max-restarts 3 -m semask train CONFIG

    CONFIG is a file, or the name of a shipped config; any of its keys can be set at the end, as
    KEY VALUE or KEY=VALUE. Datasets are looked for in the folder that the environment variable
    DETECTRON2_DATASETS names. The last line printed is the path of the picture with predictions.
    Exit status: 0; 2 for a mistake in config, data or checkpoint, before anything is written where
    possible, and for a full disk; 1 after a loss that is not finite, or when another process of
    the run is gone; 130 after Ctrl-C and 143 after a SIGTERM, with a checkpoint to go on from.
    """
    add_run(parser)
    parser.add_argument("--eval-only", action="store_true", help="evaluate, without training")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove an earlier run's checkpoints from OUTPUT_DIR and begin anew",
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Evaluate a checkpoint on the config's DATASETS.TEST.

        semask evaluate CONFIG --weights model_final.pth
        semask evaluate CONFIG --resume OUTPUT_DIR DIR
        semask evaluate CONFIG --weights model_final.pth TEST.PROTOCOL multi_scale

    The same as `semask train --eval-only`. With --resume, the last checkpoint in OUTPUT_DIR is
    evaluated. Exit status: 0; 2 for a mistake in config, data or checkpoint, and for a full disk;
    1 when another process of the run is gone; 130 after Ctrl-C.
    """
    add_run(parser)
    parser.add_argument("--weights", metavar="FILE", help="as MODEL.WEIGHTS")
    parser.set_defaults(eval_only=True, overwrite=False)


def predict(parser: argparse.ArgumentParser) -> None:
    r"""Segment images and videos, or find the instances in them, with a trained model.

        semask predict photo.jpg --config CONFIG --weights model_final.pth
        semask predict photos 'more/**/*.png' --config CONFIG --weights model_final.pth \
            --output out --priors
        semask predict drive.mp4 --config CONFIG --weights model_final.pth
        semask predict photos --config CONFIG --weights model_final.pth \
            --opts TEST.PROTOCOL multi_scale

    CONFIG is a file, or the name of a shipped config. An input is an image, a video, a folder
    (with all that is below it) or a quoted pattern. The output folder gets, below the inputs' own
    paths relative to their common folder:

        overlay/NAME.png           the image with its coloured labels; overlay/NAME.mp4 for a video
        labels/NAME.png            the class index of each pixel; of videos with --video-labels
                                   only, labels/NAME/000000.png, ...
        prior2/NAME.png, prior3/   with --priors, the classes that each stage's prior names
        classes.json, legend.png   names and colours of the classes

    NAME has no suffix, unless two inputs would have the same one then ("a.jpg", "a.png"). With a
    detector there are in place of labels/:

        instances/NAME.json        boxes, scores and masks in COCO's result format; NAME is the
                                   image_id
        panoptic/NAME.png          of a panoptic model: the segments as COCO stores them, and
        panoptic/NAME.json         what each of them is

    Every file is complete or not there. Exit status: 0; 2 for a mistake in config, checkpoint or
    arguments, or where an input could not be read (the others are written all the same); 130 after
    Ctrl-C.
    """
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, video, folder, pattern")
    add_model(parser)
    parser.add_argument("--output", default="predictions", help="folder (default: %(default)s)")
    parser.add_argument("--device", help="default: a GPU where there is one, else the CPU")
    parser.add_argument("--alpha", type=float, default=0.5, help="opacity of the labels, 0 to 1")
    parser.add_argument(
        "--min-score", type=float, default=0.5, help="of the instances drawn (default: %(default)s)"
    )
    parser.add_argument("--priors", action="store_true", help="also draw the semantic priors")
    parser.add_argument(
        "--video-labels",
        action="store_true",
        help="also write the labels (instances) of each frame",
    )
    parser.add_argument(
        "--video-format", choices=("mp4", "avi"), default="mp4", help="H.264 or Motion JPEG"
    )


def demo(parser: argparse.ArgumentParser) -> None:
    """A local page to try a model: drop an image or a video and see what it predicts.

        semask demo --config CONFIG --weights model_final.pth
        semask demo --config CONFIG --weights model_final.pth --max-size 20MiB --opts KEY VALUE

    CONFIG is a file, or the name of a shipped config. The page shows the prediction over the image
    with an opacity slider, a legend, the name of what is under the pointer, the confidence and the
    priors of each stage, and has the files that `semask predict` writes to download. It needs
    `pip install 'semask[demo]'`, listens on this machine alone unless --host says otherwise, loads
    nothing from elsewhere, and removes what was uploaded as soon as it is predicted. Exit status:
    0; that is, after Ctrl-C or SIGTERM; 2 for a mistake in config, checkpoint or arguments, where
    gradio is missing, or where the port is taken.
    """
    add_model(parser)
    parser.add_argument("--device", help="default: a GPU where there is one, else the CPU")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--max-size", default="100MiB", metavar="SIZE", help="of an upload (default: %(default)s)"
    )
    parser.add_argument(
        "--max-megapixels",
        type=float,
        default=50,
        metavar="N",
        help="of an image, or a frame (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=300,
        metavar="N",
        help="of a video; the others are left out (default: %(default)s)",
    )
    parser.add_argument(
        "--min-score",
        type=float,
        default=0.5,
        help="of the instances drawn, at first (default: %(default)s)",
    )


def import_labels(parser: argparse.ArgumentParser) -> None:
    """Turn labels of other tools into a folder to train on.

        semask import PATH --output DIR
        semask import masks --images photos --palette labelmap.txt --output DIR
        semask import export.json --to folder --output DIR

    PATH is a folder, or an annotation file. Recognised are COCO (instances and panoptic), YOLO
    polygons, LabelMe, CVAT for images, Label Studio, Supervisely, Pascal VOC and other coloured or
    grey label maps; docs/own_data.md says what becomes of each. Where label maps have colours
    without names, DIR/palette.csv lists them, to be named and given as --palette. DIR gets images
    and annotations, and:

        classes.json       names and colours of the classes
        split.csv          where each image came from, and which part it belongs to
        import_notes.csv   everything that was left out or changed

    Then the data is checked as by `semask check`, and the last lines printed are the commands to
    look at it and to train on it. Exit status: 0; 1 where the check found something wrong; 2 for
    labels that cannot be imported or a mistake in the arguments, with no DIR; 130 after Ctrl-C.
    """
    parser.add_argument("path", metavar="PATH")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", default="", help="of the labels; default: recognised")
    parser.add_argument(
        "--to",
        choices=("folder", "coco"),
        default="",
        help="label maps of classes, or instances in COCO's format; default: what is nearest",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images, if it is another")
    parser.add_argument("--palette", metavar="FILE", help="colours and names of label maps")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="CLASS", help="names, in the order wanted"
    )
    parser.add_argument(
        "--unlabelled",
        choices=("background", "ignore"),
        default="background",
        help="what pixels in no outline are (default: %(default)s)",
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the images for validation, where the labels do not say (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    parser.add_argument("--link", action="store_true", help="hard links, not copies, of the images")


def prepare(parser: argparse.ArgumentParser) -> None:
    """Make the files for instance and panoptic segmentation of ADE20K and Cityscapes.

        semask prepare ade20k
        semask prepare cityscapes --workers 16

    From what is downloaded, below the folder that the environment variable DETECTRON2_DATASETS
    names; the files go beside it, and nothing that is there is changed:

        ADEChallengeData2016/ade20k_instance_{train,val}.json      from annotations_instance/
        ADEChallengeData2016/ade20k_panoptic_{train,val}{.json,/}  and annotations/
        cityscapes/gtFine/cityscapes_instance_{train,val}.json     from *_gtFine_instanceIds.png
        cityscapes/gtFine/cityscapes_panoptic_{train,val}{.json,/}

    Those of instances are in COCO's format with masks, those of segments in its panoptic format.
    Stuff is painted first and instances over it; a pixel of a thing without an instance is in no
    segment, and groups of Cityscapes are crowds. The datasets are then known as
    ade20k_instance_train, ade20k_panoptic_val, cityscapes_instance_train and so on. COCO needs
    nothing: its files are read as they are. Exit status: 0; 2 for files that are missing or cannot
    be used; 130 after Ctrl-C.
    """
    parser.add_argument("name", choices=("ade20k", "cityscapes"), help="of the dataset")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        metavar="N",
        help="processes; 0 = this one alone (default: %(default)s)",
    )


def check(parser: argparse.ArgumentParser) -> None:
    """What a dataset's files are like, and what is wrong with them.

        semask check ade20k_raw_sem_seg_val
        semask check --images DIR --labels DIR --classes road car tree
        semask check --images DIR --annotations FILE.json
        semask check --config CONFIG [KEY VALUE ...]

    The first form takes registered datasets, the last one those of a config's DATASETS.TRAIN and
    TEST; --annotations is a file in COCO's format for detection. Every image and label map is read
    as training reads it. The report lists files without counterpart, unreadable files, modes and
    sizes, sizes that differ between an image and its label map, label values that are no class,
    and how often each class occurs; for instances, boxes outside, polygons and masks that cannot
    be used, ids that are unknown or there twice, and images without annotations. It tells images
    that are nearly black, data without a labelled pixel or of one class alone, and with --config
    what else a training would refuse, such as categories that differ. Exit status: 0; 1 where
    something is wrong; 2 for a mistake in the arguments, or where --picture or --json cannot be
    written.
    """
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"datasets (or {KEY_VALUE} pairs)")
    add_config(parser)
    parser.add_argument("--images", metavar="DIR", help="folder of an own dataset's images")
    parser.add_argument("--labels", metavar="DIR", help="folder of its label maps")
    parser.add_argument("--annotations", metavar="FILE", help="or its instances, in COCO's format")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="its class names")
    parser.add_argument("--num-classes", type=int, metavar="K", help="or just their number")
    parser.add_argument("--ignore", type=int, default=255, help="its ignore value (255)")
    parser.add_argument("--image-ext", nargs="+", metavar="EXT", help="endings of its images")
    parser.add_argument("--label-ext", nargs="+", metavar="EXT", help="endings of its label maps")
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="look at N images, not at all"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw some images and label maps (PNG)")
    parser.add_argument("--rows", type=int, default=6, metavar="N", help="how many (6)")
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), metavar="N")


def convert(parser: argparse.ArgumentParser) -> None:
    """Turn a checkpoint into this project's names and a file that holds weights alone.

        semask convert swin_tiny_patch4_window7_224.pth swin_t.pth
        semask convert URL semask_t.safetensors --config ade20k/semask_swin_tiny_fpn
        semask convert output/run/model_final.pth averaged.pth --ema

    SOURCE is a file or URL: a published SeMask-FPN or Swin-FPN model, an ImageNet-pretrained Swin,
    or a checkpoint of a run of this project. TARGET ends in .pth or .safetensors. It prints which
    kind SOURCE is and what was left out. Training and evaluation also read all kinds unconverted.
    Exit status: 0; 2 for a mistake, with nothing written.
    """
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    add_config(parser, "refuse what does not fit the model of this config (name or file)")
    add_overrides(parser)
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged weights of a run (SOLVER.EMA)"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also read a .pkl of more than NumPy arrays, which can run any code: only from whom "
        "you trust",
    )


def analyze(parser: argparse.ArgumentParser) -> None:
    """Parameters, arithmetic and activation memory of a model, module by module.

        semask analyze ade20k/semask_swin_tiny_fpn
        semask analyze CONFIG --size 640 640 --depth 4
        semask analyze CONFIG --device cuda --batch-size 16
        semask analyze CONFIG --json MODEL.SWIN.EMBED_DIM 64

    CONFIG is a file, or the name of a shipped config. Without --device the shapes alone are
    followed: no GPU, no weights and no memory are needed, whatever the size of the model; a
    detector runs on the CPU, because which boxes it keeps depends on their values.
    Exit status: 0; 2 for a mistake in the config or the arguments.
    """
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("opts", nargs="*", metavar=KEY_VALUE, help="overrides of the config")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: the training crop"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="of the training step")
    parser.add_argument("--device", help="of the training step; default: meta, cpu for detectors")
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to list")
    parser.add_argument("--json", action="store_true", help="every module, as JSON")


def fit(parser: argparse.ArgumentParser) -> None:
    """What a training needs of a device's memory, and the settings that make it fit.

        semask fit ade20k/semask_swin_large_fpn --memory 24GiB
        semask fit ade20k/semask_swin_large_fpn --memory 24GiB --num-gpus 8
        semask fit CONFIG MODEL.DEVICE=cpu

    Peak memory of a training step for several numbers of images, as configured, in mixed precision
    and with activation checkpointing; its parts; the peak of an evaluation; and the KEY=VALUE pairs
    that make the config's own SOLVER.IMS_PER_BATCH fit, by SOLVER.ACCUMULATE_STEPS where needed.
    Nothing is trained: shapes alone are followed (a detector runs on the CPU), so a GPU is not
    needed. Counted are PyTorch's tensors; of --memory, 1 GiB (on the CPU 1.5) is left for the rest.
    Exit status: 0; 1 where not even one image fits; 2 for a mistake in config or arguments.
    """
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("opts", nargs="*", metavar=KEY_VALUE, help="overrides of the config")
    parser.add_argument(
        "--memory", metavar="SIZE", help="of one device, such as 24GiB; default: of this machine's"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="that share IMS_PER_BATCH")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of an image in evaluation, in pixels; default: like a training image",
    )


def export(parser: argparse.ArgumentParser) -> None:
    """Write the inference path of a trained model as an ONNX or a torch.export file.

        semask export --config CONFIG --weights model_final.pth --output model.onnx
        semask export --config CONFIG --weights model_final.pth --output model.pt2 --size 512 683
        semask export --config CONFIG --weights model_final.pth --output model.onnx --dynamic

    CONFIG is a file, or the name of a shipped config. Input "image": (1, 3, H, W) float32, 0..255,
    in the config's channel order (RGB in the shipped ones), resized to the fixed --size by the
    caller; with --dynamic (B, 3, H, W) of any number of images and any size from a smallest one on.
    Output "logits": (B, K, H, W). The file is compared with the model before the program ends, with
    --dynamic on several sizes, and PATH.parity.json keeps what came out. ONNX needs the packages
    onnx, onnxscript and, for the comparison, onnxruntime.
    Exit status: 0; 2 for a mistake in config, checkpoint or arguments, or a missing package.
    """
    add_model(parser)
    parser.add_argument("--output", required=True, help="the file to write: .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, in pixels; default: the training crop",
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="for any batch, height and width; default: --size"
    )


def plot(parser: argparse.ArgumentParser) -> None:
    """Draw the curves of one or several training runs, from their metrics.json, as one picture.

        semask plot output/scenes
        semask plot RUN_A RUN_B --output compared.png
        semask plot semask=RUN_A swin=RUN_B --output compared.pdf

    A run is a folder with a metrics.json, or such a file; NAME=RUN names it in the legend. Without
    --output a single run gets training.png beside its metrics.json. The suffix chooses the format
    (png, svg, pdf). The last line printed is the path of the picture. Where a run was resumed, what
    was done again counts once, and a line that a killed run has left unfinished is ignored with
    a warning. Exit status: 0; 2 for a file that is missing, empty or damaged, or a picture that
    cannot be written.
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
