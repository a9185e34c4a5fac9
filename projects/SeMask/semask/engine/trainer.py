"""Detectron2's DefaultTrainer with this project's data, optimizer, checkpoints and evaluation."""

import logging
import os
import traceback
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from semask.checkpoint import SeMaskCheckpointer, has_checkpoint, starts_partially
from semask.data.training_loader import (
    TrainingLoader,
    is_lost_loader,
)
from semask.data.unreadable import ReadableBatches
from semask.engine.batch_norm import broadcast_buffers, synchronize_batch_norm
from semask.engine.compilation import compile_for_training
from semask.engine.hooks import (
    EvaluationHook,
    FirstStepHook,
    PanelsHook,
    PriorLossWatch,
    UnreadableFilesHook,
)
from semask.engine.launch.distributed import watched_peers, wrap_ddp
from semask.engine.launch.ending import Interrupted, Preempted, StopHook, StopRequest
from semask.engine.launch.run_setup import (
    log_to_console,
    prepare_process,
    refuse_overwriting,
    remove_checkpoints,
    run_lock,
    write_config,
)
from semask.engine.loaders import build_test_loader, build_train_loader, log_batch_size
from semask.engine.restored import warn_of_random_weights, warn_of_restored, without_pretrained
from semask.engine.trackers import build_tracker_writers, tracked
from semask.engine.train_step import TrainStep
from semask.engine.weights import WeightAverage, best_checkpoints
from semask.errors import CheckpointError
from semask.inference.model_outputs import for_evaluators
from semask.ops.apply import apply_selected_fast_paths
from semask.solver import build_lr_scheduler, build_optimizer
from semask.tasks import build_task, evaluated_weights, inference_folder, write_reports
from semask.utils.precision import Precision, evaluation_autocast

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Builds everything from a config, trains, evaluates, and resumes exactly where it stopped.

    Attributes:
        ema: the averaged weights; None without ``SOLVER.EMA.ENABLED``.
        stop_agreed: whether any process of the run has been told to end; equal in all of them.
    """

    def __init__(self, cfg: CfgNode, *, resume: bool = False) -> None:
        """
        Args:
            cfg: frozen or not; it is not changed.
            resume: ``resume_or_load`` will be called with it. Where OUTPUT_DIR has a checkpoint,
                pre-trained weights are then not fetched.
        """
        # DefaultTrainer's own would wrap the model for GPUs and load checkpoints leniently.
        TrainerBase.__init__(self)
        log_to_console()
        self._config_to_write = cfg
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        log_batch_size(cfg)
        prepare_process(cfg)
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        self._without_pretrained = resume and has_checkpoint(cfg.OUTPUT_DIR)
        model = self.build_model(without_pretrained(cfg) if self._without_pretrained else cfg)
        optimizer = self.build_optimizer(cfg, model)
        precision = Precision.from_config(cfg)
        self.ema = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        compiled = compile_for_training(cfg, model, precision)
        model = wrap_ddp(model)
        self._trainer = TrainStep(
            model,
            self.build_train_loader(cfg),
            optimizer,
            precision=precision,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            compiled=compiled,
            output_dir=cfg.OUTPUT_DIR,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        averaged: dict[str, Any] = {} if self.ema is None else {"ema": self.ema}
        self.checkpointer = SeMaskCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            allow_pickle=cfg.MODEL.ALLOW_PICKLE,
            partial=starts_partially(cfg),
            trainer=weakref.proxy(self),
            **averaged,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.stop_agreed = False
        self._stop_request = StopRequest()
        self._best = best_checkpoints(cfg)
        self._resumed = False
        self._overwrite = False
        self._trackers = build_tracker_writers(cfg) if comm.is_main_process() else []
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, with this project's own around its evaluation."""
        hooks: list[HookBase | None] = []
        for hook in super().build_hooks():
            if not isinstance(hook, EvalHook):
                hooks.append(hook)
                continue
            is_main = comm.is_main_process()
            hooks += [FirstStepHook(self.cfg.MODEL.DEVICE), PriorLossWatch()] if is_main else []
            hooks += [
                StopHook(self._stop_request),
                EvaluationHook(self.cfg.TEST.EVAL_PERIOD, self.evaluate),
            ]
            hooks += [PanelsHook(self.cfg)] if is_main else []
            hooks += [UnreadableFilesHook(self.data_loader.unreadable)]
        return hooks

    @property
    def results(self) -> dict[str, Any]:
        """Results of the last evaluation, by task and name; empty before the first one."""
        return getattr(self, "_last_eval_results", {})

    def build_writers(self) -> list[EventWriter]:
        """Those of ``TRACKERS``, then Detectron2's, which remove the images from the storage."""
        return [*self._trackers, *super().build_writers()]

    def resume_or_load(self, resume: bool = True, overwrite: bool = False) -> None:
        """See ``DefaultTrainer.resume_or_load``.

        Args:
            resume: resume from the last checkpoint in OUTPUT_DIR, if there is one.
            overwrite: otherwise, start also where OUTPUT_DIR has checkpoints of an earlier
                run, which ``train`` then removes.

        Raises:
            CheckpointError: no checkpoint can be used, the last one has only weights or is of
                a later iteration than the last one of this run, or the processes have found
                different ones.
            ValueError: ``resume`` is False, and was True when the trainer was made.
            ConfigError: OUTPUT_DIR has checkpoints, and neither ``resume`` nor ``overwrite`` says
                what to do about them.
        """
        if self._without_pretrained and not resume:
            raise ValueError(
                "This trainer was made with resume=True and has no pre-trained weights"
            )
        folder = self.cfg.OUTPUT_DIR
        self._resumed, self._overwrite = resume, overwrite
        if not (resume or overwrite):
            refuse_overwriting(folder)
        self.iter = -1  # a checkpoint sets it
        super().resume_or_load(resume=resume)
        if resume and self.checkpointer.has_checkpoint() and self.iter < 0:
            raise CheckpointError(
                f"The last checkpoint in OUTPUT_DIR '{folder}' has only weights, so --resume "
                "cannot continue from it. Set MODEL.WEIGHTS to it in a run without --resume and "
                "with another OUTPUT_DIR."
            )
        self.iter = max(0, self.iter)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise CheckpointError(
                f"The processes would continue from different iterations ({starts}): OUTPUT_DIR "
                f"'{folder}' must be a folder shared by all machines."
            )
        if self.start_iter > self.max_iter:
            raise CheckpointError(
                f"The checkpoint in OUTPUT_DIR '{folder}' has been trained for {self.start_iter} "
                f"iterations, and SOLVER.MAX_ITER is {self.max_iter}: set a larger one to continue."
            )
        if resume:
            for best in self._best.values():
                best.restore()
        if self.start_iter == 0 and self.cfg.MODEL.EXPECTS_WEIGHTS and not self.cfg.MODEL.WEIGHTS:
            warn_of_random_weights(self._trainer.model)

    def train(self) -> Any:
        """Train to the end, or until a SIGTERM or Ctrl-C.

        Returns:
            As ``DefaultTrainer.train``.

        Raises:
            Preempted: after a SIGTERM, with a checkpoint written.
            Interrupted: after a Ctrl-C, the same; a second one raises KeyboardInterrupt at once.
            NonFiniteLossError: a loss is infinite or NaN.
            DataError: the data cannot be used.
            ConfigError: another run is writing to OUTPUT_DIR, it has checkpoints that this one
                would overwrite, or a tracker cannot begin a run.
        """
        with run_lock(self.cfg.OUTPUT_DIR, enabled=self.cfg.OUTPUT_DIR_LOCK):
            resumed = self._resumed
            self._begin()
            with (
                tracked(self._trackers, self.cfg.OUTPUT_DIR, resume=resumed),
                watched_peers() as left,
                self._stop_request.listening(),
            ):
                try:
                    results = super().train()
                except (Preempted, Interrupted):
                    left.set()  # other processes may end before the checkpoint is written
                    self._save_before_leaving()
                    raise
                finally:
                    self._trainer.close()
                comm.synchronize()  # the main process may be writing while the others are done
        return results

    def _begin(self) -> None:
        """Remove or refuse checkpoints of an earlier run, and write this run's config."""
        if self._overwrite and not self._resumed:
            if comm.is_main_process():
                remove_checkpoints(self.cfg.OUTPUT_DIR)
        elif not self._resumed:
            refuse_overwriting(self.cfg.OUTPUT_DIR)
        comm.synchronize()  # the main process may write from here on
        write_config(self._config_to_write)
        self._resumed = True  # from now on, checkpoints in OUTPUT_DIR are of this run

    def run_step(self) -> None:
        """One optimizer step."""
        self._trainer.iter = self.iter
        try:
            self.stop_agreed = self._trainer.run_step(
                stop=self._stop_request.received, after_backward=self.after_backward
            )
        except RuntimeError as error:
            if is_lost_loader(error):
                # While the iterator exists, PyTorch can raise the same error again at any moment.
                traceback.clear_frames(error.__traceback__)
                self._trainer.close()
            raise
        if self.ema is not None:
            self.ema.update()

    def after_backward(self) -> None:
        """Call the hooks' method of that name, which those of Detectron2's main branch have."""
        for hook in self._hooks:
            call = getattr(hook, "after_backward", None)
            if call is not None:
                call()

    def after_train(self) -> None:
        """Call the hooks; after a failure, errors in hooks are only logged, to not hide it."""
        if self.iter >= self.max_iter:
            super().after_train()
            return
        for hook in self._hooks:
            try:
                hook.after_train()
            except Exception as error:
                logger.warning("%s after the failure: %s", type(hook).__name__, error)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the weights, and the averaged ones beside them; keep the best of each.

        BatchNorm has the first process's statistics in all of them, which checkpoints have, too.
        """
        broadcast_buffers(self.model)
        if self.ema is not None:
            self.ema.broadcast_buffers()
        steps = min(self.iter + 1, self.max_iter)
        weights = f"of this training, which began with {self.cfg.MODEL.WEIGHTS or 'random ones'}"
        with (
            self._stop_request.at_once(),
            evaluated_weights(weights, steps, self.max_iter),
        ):
            results = self.test_with_average(self.cfg, self.model, self.ema)
        self._last_eval_results = results
        if comm.is_main_process():
            step = min(self.iter, self.max_iter - 1)
            scores = flatten_results_dict(results)
            for name, best in self._best.items():
                state = self.checkpointer.model.state_dict()
                if self.ema is not None and name.endswith("_ema"):
                    state = self.ema.weights()
                best.update(scores, state, step)
        return results

    @classmethod
    def test_with_average(
        cls, cfg: CfgNode, model: nn.Module, ema: WeightAverage | None = None
    ) -> dict[str, Any]:
        """``test``, and once more with the averaged weights, where there are any.

        Returns:
            As ``test``; the results of the averaged weights are its entry "ema". What their
            evaluation writes goes to OUTPUT_DIR/ema.
        """
        results = cls.test(cfg, model)
        if ema is None or not ema.started:
            return results
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        logger.info("The same with the averaged weights:")
        with ema.applied():
            averaged = cls.test(cfg, model)
        return {**results, "ema": averaged} if results else results

    def _save_before_leaving(self) -> None:
        """Write the checkpoint of a run that has been told to end; ``iter`` is its last step."""
        if self.iter < self.max_iter:  # otherwise it has been written
            self.checkpointer.save(f"model_{self.iter:07d}")
        if self.stop_agreed:  # all processes are here, and stay until it is written
            comm.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, place in the data, and schedule, all plain types.

        Detectron2 v0.6 leaves the optimizer out, and depending on the versions of Detectron2 and
        torch its hook leaves the schedule out.
        """
        return {
            **TrainerBase.state_dict(self),
            "_trainer": self._trainer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        warn_of_restored(state_dict["_trainer"], self.optimizer, self.cfg.SEED)
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on its device, in its fast form; its size is logged."""
        model = apply_selected_fast_paths(cfg, synchronize_batch_norm(build_model(cfg)))
        parts = ", ".join(
            f"{name} {_size(part)}"
            for name, part in model.named_children()
            if next(part.parameters(), None) is not None
        )
        logger.info(
            "%s: %s parameters (%s) on %s",
            cfg.MODEL.META_ARCHITECTURE,
            _size(model),
            parts,
            cfg.MODEL.DEVICE,
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """See :func:`semask.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        """See :func:`semask.solver.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainingLoader:
        """See :func:`semask.engine.loaders.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> ReadableBatches:
        """See :func:`semask.engine.loaders.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The evaluator of a dataset; its results go to OUTPUT_DIR/inference/DATASET."""
        folder = inference_folder(cfg, dataset_name)
        return build_task(cfg).build_evaluator(dataset_name, folder)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """See ``DefaultTrainer.test``; then the reports, where ``TEST.REPORT`` asks for them."""
        with evaluation_autocast(cfg):
            results = super().test(cfg, for_evaluators(model), evaluators)
            if evaluators is None and comm.is_main_process():
                write_reports(cfg, model)
        return results


def _size(module: nn.Module) -> str:
    """Number of parameters, as "1,234"."""
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
