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
The same by torchrun, on GPUs or CPUs; it can start a failed run anew, which then goes on:
    torchrun --nproc-per-node 8 --max-restarts 3 train_net.py --config-file CONFIG
The CPU although there is a GPU:
    python train_net.py --config-file CONFIG MODEL.DEVICE cpu
Go on after an interruption (same command and OUTPUT_DIR):
    python train_net.py --resume --config-file CONFIG OUTPUT_DIR DIR
Evaluate a checkpoint:
    python train_net.py --eval-only --config-file CONFIG MODEL.WEIGHTS FILE

Any key of the config can be set at the end as KEY VALUE. Datasets are looked for in the folder
that the environment variable DETECTRON2_DATASETS names. The last line printed is the path of the
picture with predictions. Exit status: 0; 2 for a mistake in config, data or checkpoint, before
anything is written where possible, and for a full disk; 1 after a loss that is not finite, or when
another process of the run is gone; 130 after Ctrl-C; 143 after a SIGTERM, with a checkpoint to go
on from.
"""

import argparse
import sys
from collections.abc import Sequence

import semask  # first: it makes older releases of Detectron2 importable

# isort: split
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm

from semask.engine import (
    Torchrun,
    Trainer,
    check_run,
    evaluate,
    exit_statuses,
    ignore_storage_warning,
    joined,
    once_per_machine,
    passed_on,
    resolve_device,
    resumes,
    run_lock,
    set_up_run,
)
from semask.tasks import build_task


def setup(args: argparse.Namespace, torchrun: Torchrun | None = None) -> CfgNode:
    """The config of the run, on a device that exists."""
    if args.config_file:
        args.config_file = semask.config_path(args.config_file)  # a path or a shipped name
    cfg = semask.load_config(args.config_file, args.opts)
    explicit = "MODEL.DEVICE" in args.opts
    num_gpus = args.num_gpus if torchrun is None else args.num_gpus * args.num_machines
    resolve_device(cfg, num_gpus, explicit=explicit, torchrun=torchrun)
    cfg.freeze()
    return cfg


def check(cfg: CfgNode, args: argparse.Namespace, torchrun: Torchrun | None = None) -> None:
    """Refuse what cannot work; nothing has been written yet."""
    world_size = torchrun.world_size if torchrun else max(1, args.num_gpus * args.num_machines)
    check_run(
        cfg,
        world_size=world_size,
        eval_only=args.eval_only,
        resume=args.resume,
        restarted=torchrun is not None and torchrun.restarts > 0,
    )


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of the run."""
    semask.data.register_config_folders(cfg)  # those that ``launch`` starts know the config alone
    with run_lock(cfg.OUTPUT_DIR, enabled=cfg.OUTPUT_DIR_LOCK):
        set_up_run(cfg, args)
        if args.eval_only:
            evaluate(cfg, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=resumes(cfg.OUTPUT_DIR, asked=args.resume))
            trainer.train()
        path = build_task(cfg).panels_path()
        if path is not None and comm.is_main_process():
            print(path, flush=True)


def process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """``main``, with one message instead of a traceback for what a user can mend."""
    ignore_storage_warning()
    with exit_statuses():
        main(cfg, args)


def run(argv: Sequence[str] | None = None) -> int:
    """The whole program; see the top of this file for the exit status it returns."""
    args = default_argument_parser(epilog=__doc__).parse_args(argv)
    torchrun = Torchrun.from_environment()
    try:
        with exit_statuses():
            cfg = setup(args, torchrun)
            starts_others = torchrun is None and args.num_gpus * args.num_machines > 1
            with joined(torchrun, cfg.MODEL.DEVICE), passed_on(enabled=starts_others):
                once_per_machine(lambda: check(cfg, args, torchrun), torchrun)
                launch(
                    process,
                    args.num_gpus if torchrun is None else 1,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(cfg, args),
                )
    except SystemExit as error:
        return int(error.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(run())
