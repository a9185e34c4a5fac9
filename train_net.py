#!/usr/bin/env python3
r"""Train and evaluate SeMask, or evaluate only.

One GPU, or the CPU if there is none: python train_net.py --config-file
    configs/scenes/semask_scenes.yaml
Eight GPUs of one machine:
    python train_net.py --num-gpus 8 --config-file CONFIG
Two machines of eight GPUs each:
    (first)  python train_net.py --num-gpus 8 --num-machines 2 --machine-rank 0 \
                 --dist-url tcp://FIRST:PORT --config-file CONFIG
    (second) the same with --machine-rank 1
The same with torchrun, on GPUs or CPUs; it can restart a failed run, which then resumes: torchrun
    --nproc-per-node 8 --max-restarts 3 train_net.py --config-file CONFIG
The CPU even if there is a GPU: python train_net.py --config-file CONFIG MODEL.DEVICE cpu
Resume after an interruption (same command and OUTPUT_DIR): python train_net.py --resume
    --config-file CONFIG OUTPUT_DIR DIR
Evaluate a checkpoint:
    python train_net.py --eval-only --config-file CONFIG MODEL.WEIGHTS FILE

Any key of the config can be overridden at the end as KEY VALUE. Datasets are read from the folder
in the environment variable DETECTRON2_DATASETS. The last line printed is the path of the picture
with predictions. Exit status: 0; 2 for a mistake in config, data or checkpoint, if possible before
anything is written, and for a full disk; 1 after a loss that is not finite, or when another process
of the run has ended; 130 after Ctrl-C and 143 after a SIGTERM, with a checkpoint to resume from.
"""

import sys
from collections.abc import Sequence

from semask.cli import main


def run(argv: Sequence[str] | None = None) -> int:
    """``semask train``; see the top of this file for the exit status it returns."""
    return main.run("train", argv, prog="train_net.py")


if __name__ == "__main__":
    sys.exit(run())
