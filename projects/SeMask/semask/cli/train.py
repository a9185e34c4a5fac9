"""``semask train`` and ``semask evaluate``: a run, in one process or several."""

import argparse

from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm

from semask.cli.main import import_modules
from semask.config import load_config, split_overrides
from semask.data import register_config_folders
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
from semask.engine.fit import explained_out_of_memory, log_expected_memory
from semask.tasks import build_task


def setup(args: argparse.Namespace, torchrun: Torchrun | None = None) -> CfgNode:
    """Load the config of the run and check its device."""
    import_modules(args.imports)
    cfg = load_config(args.config or "", args.opts)
    explicit = "MODEL.DEVICE" in split_overrides(args.opts)[::2]
    num_gpus = args.num_gpus if torchrun is None else args.num_gpus * args.num_machines
    resolve_device(cfg, num_gpus, explicit=explicit, torchrun=torchrun)
    cfg.freeze()
    return cfg


def check(cfg: CfgNode, args: argparse.Namespace, torchrun: Torchrun | None = None) -> None:
    """Check everything that can be checked before anything is written."""
    world_size = torchrun.world_size if torchrun else max(1, args.num_gpus * args.num_machines)
    check_run(
        cfg,
        world_size=world_size,
        eval_only=args.eval_only,
        resume=args.resume,
        restarted=torchrun is not None and torchrun.restarts > 0,
        overwrite=args.overwrite,
    )


def main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Run one process of the training."""
    register_config_folders(cfg)  # processes started by ``launch`` get only the config
    with run_lock(cfg.OUTPUT_DIR, enabled=cfg.OUTPUT_DIR_LOCK):
        set_up_run(cfg, args)
        if args.eval_only:
            evaluate(cfg, resume=args.resume)
        else:
            if comm.is_main_process():
                log_expected_memory(cfg, comm.get_world_size())
            resume = resumes(cfg.OUTPUT_DIR, asked=args.resume)
            trainer = Trainer(cfg, resume=resume)
            torchrun = Torchrun.from_environment()
            restarted = torchrun is not None and torchrun.restarts > 0
            trainer.resume_or_load(
                resume=resume,
                overwrite=args.overwrite or restarted,  # checked at the first start
            )
            trainer.train()
        path = build_task(cfg).panels_path()
        if path is not None and comm.is_main_process():
            print(path, flush=True)


def process(cfg: CfgNode, args: argparse.Namespace) -> None:
    """``main``, with a message instead of a traceback for errors that a user can correct."""
    ignore_storage_warning()
    with (
        exit_statuses(),
        explained_out_of_memory(cfg, comm.get_world_size(), eval_only=args.eval_only),
    ):
        import_modules(args.imports)  # not yet done in processes started by ``launch``
        main(cfg, args)


def run(args: argparse.Namespace) -> int:
    """Run everything; returns the exit status, as listed in ``arguments.train``."""
    if getattr(args, "weights", None):
        args.opts += ["MODEL.WEIGHTS", args.weights]
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
