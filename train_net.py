#!/usr/bin/env python3
r"""Train and evaluate SeMask, or evaluate only.

One GPU, or the CPU where there is none:
    python train_net.py --config-file configs/scenes/semask_scenes.yaml
Eight GPUs of one machine:
    python train_net.py --num-gpus 8 --config-file CONFIG
Two machines of eight GPUs each:
    (first)  python train_net.py --num-gpus 8 --num-machines 2 --machine-rank 0 \
                 --dist-url tcp://FIRST:PORT --config-file CONFIG
    (second) the same with --machine-rank 1
The CPU although there is a GPU:
    python train_net.py --config-file CONFIG MODEL.DEVICE cpu
Go on after an interruption (same command and OUTPUT_DIR):
    python train_net.py --resume --config-file CONFIG OUTPUT_DIR DIR
Evaluate a checkpoint:
    python train_net.py --eval-only --config-file CONFIG MODEL.WEIGHTS FILE

Any key of the config can be set at the end as KEY VALUE. Datasets are looked for in the folder
that the environment variable DETECTRON2_DATASETS names. The last line printed is the path of the
picture with predictions. Exit status: 0; 2 for a mistake in config, data or checkpoint, before
anything is written where possible; 130 after Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

import semask  # first: it makes older releases of Detectron2 importable

# isort: split
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from semask.checkpoint import CheckpointError, SeMaskCheckpointer
from semask.config import ConfigError
from semask.data.reading import DataError
from semask.engine import Trainer, check_run, draw_panels, panels_path, resolve_device

USER_ERRORS = (ConfigError, DataError, CheckpointError)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of the run, checked; nothing has been written yet."""
    cfg = semask.load_config(args.config_file, args.opts)
    resolve_device(cfg, args.num_gpus, explicit="MODEL.DEVICE" in args.opts)
    check_run(
        cfg,
        world_size=max(1, args.num_gpus * args.num_machines),
        eval_only=args.eval_only,
        resume=args.resume,
    )
    cfg.freeze()
    return cfg


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of the run."""
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="semask")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = SeMaskCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        Trainer.test(cfg, model)
        if comm.is_main_process():
            draw_panels(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
    path = panels_path(cfg)
    if path is not None and comm.is_main_process():
        print(path, flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; see the top of this file for the exit status it returns."""
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args(argv)
    try:
        cfg = setup(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted; --resume goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _message(error: Exception) -> str:
    """The error's own words, also where a data loading process has put a traceback around them."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.rsplit(f"{type(error).__name__}: ", 1)[-1]
    return text


if __name__ == "__main__":
    sys.exit(run())
