"""Detectron2's default trainer with what asymmetric feedback adds."""

import logging
import os
import weakref
from collections.abc import Sized
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.catalog import MetadataCatalog
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ss_detectron.checkpoint.checkpointer import FeedbackCheckpointer
from ss_detectron.checkpoint.files import archive_previous_run, atomic_write
from ss_detectron.config import choose, runs_on_cpu
from ss_detectron.data import (
    build_classification_test_loader,
    build_classification_train_loader,
    build_detection_test_loader,
    build_resumable_detection_train_loader,
)
from ss_detectron.data.catalog import class_names
from ss_detectron.evaluation.classification import ClassificationEvaluator
from ss_detectron.evaluation.coco import DetectionEvaluator
from ss_detectron.layers import feedback_report, mirror_feedback, reset_feedback
from ss_detectron.learners import Learner, build_learner
from ss_detectron.modeling.compilation import compile_parts
from ss_detectron.solver.build import build_optimizer
from ss_detectron.solver.schedule import schedule_in_epochs
from ss_detectron.utils.comm import share_buffers
from ss_detectron.utils.random_state import (
    get_random_state,
    kept_random_state,
    set_random_state,
)

from .checks import check_conversion
from .hooks import (
    AlignmentHook,
    BestCheckpointer,
    EpochLogger,
    FirstStepLogger,
    PeriodicCheckpointer,
)
from .loss_normalizer import get_loss_normalizers, set_loss_normalizers
from .preemption import PreemptionHook
from .train_loop import StepTrainer

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """
    Train as Detectron2's default trainer does, by MODEL.LEARNER.NAME and with asymmetric feedback,
    on one or several CPU processes as well.

    Args:
        cfg: of :func:`~ss_detectron.engine.setup`.

    Attributes:
        model: not wrapped.
        learner: what fills the model's gradients, not wrapped.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's constructor, but for the learner, DistributedDataParallel on the CPU
        # (which takes no device_ids), mixed precision on the CPU, and the checkpointer.
        TrainerBase.__init__(self)
        for name in ("detectron2", "ss_detectron"):
            if not logging.getLogger(name).isEnabledFor(logging.INFO):
                setup_logger(name=name)
        self._given_cfg = cfg
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        learner = build_learner(cfg, model).to(cfg.MODEL.DEVICE)
        optimizer = self.build_optimizer(cfg, model)
        for group in learner.own_parameter_groups():
            optimizer.add_param_group(group)
        data_loader = self.build_train_loader(cfg)
        images = getattr(data_loader, "dataset", None)
        if isinstance(images, Sized):
            self.cfg = cfg = schedule_in_epochs(cfg, len(images))
        elif cfg.SOLVER.EPOCHS or cfg.SOLVER.STEP_EPOCHS:
            raise ValueError(
                "SOLVER.EPOCHS, STEP_EPOCHS: the loader does not say how many images it has; set "
                "SOLVER.MAX_ITER and STEPS"
            )

        on_cpu = runs_on_cpu(cfg)
        device_ids = {"device_ids": None} if on_cpu else {}
        wrapped = create_ddp_model(learner, broadcast_buffers=False, **device_ids)
        if comm.get_world_size() > 1:
            # Each rank initialised its weights by a seed of its own, and made feedback from them.
            reset_feedback(model)
        self._trainer = StepTrainer(
            wrapped,
            data_loader,
            optimizer,
            passes=cfg.SOLVER.ACCUMULATION_STEPS,
            mixed_precision=cfg.SOLVER.AMP.ENABLED,
            device=self._device.type,
            skips=cfg.SOLVER.MAX_SKIPPED_STEPS,
        )
        # DefaultTrainer leaves its hooks out of this one.
        self._trainer.after_backward = self.after_backward

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(
            cfg,
            model,
            classes=class_names(cfg.DATASETS.TRAIN),
            # The first to be loaded: the trainer's has an optimiser of the learner's parameters.
            learner=SimpleNamespace(
                state_dict=learner.own_state_dict, load_state_dict=learner.load_own_state_dict
            ),
            trainer=weakref.proxy(self),
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._evaluation_due = False
        self.register_hooks(self.build_hooks())

    @property
    def learner(self) -> Learner:
        return self._trainer.learner

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Go on from the last checkpoint in OUTPUT_DIR, if ``resume`` and there is one, as if the run
        had not been interrupted; else load MODEL.WEIGHTS and nothing else, and have feedback learn
        from noise, by MODEL.FEEDBACK.MIRROR_SAMPLES.

        Raises:
            OSError, ValueError: there is a checkpoint, and none that a run like this one can go on
                from; see :meth:`FeedbackCheckpointer.resume_or_load`.
        """
        resume = resume and self.checkpointer.has_checkpoint()
        saved = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if not resume:
            if samples := self.cfg.MODEL.FEEDBACK.MIRROR_SAMPLES:
                logger.info(
                    "The feedback of %d layers has learned from noise what their weights are%s.",
                    mirror_feedback(self.model, samples),
                    ", in place of any that MODEL.WEIGHTS has" * bool(self.cfg.MODEL.WEIGHTS),
                )
            return
        if not self.start_iter:
            raise ValueError(
                f"the checkpoint to resume from in {self.cfg.OUTPUT_DIR} holds weights, but no "
                "state of a training: name it in MODEL.WEIGHTS of another run, without --resume"
            )
        period = self.cfg.TEST.EVAL_PERIOD
        at_evaluation = period > 0 and self.start_iter % period == 0
        self._evaluation_due = at_evaluation and not saved.get("evaluated", False)
        ranks = saved.get("ranks", [])
        if len(ranks) == comm.get_world_size():
            own = ranks[comm.get_rank()]
            set_loss_normalizers(self.model, own["loss_normalizer"])
            set_random_state(own["random"], self._device)
        else:
            logger.warning(
                "The checkpoint is of %d processes, and these are %d: random numbers and loss "
                "normalisers begin anew, and the run differs from one that was not interrupted.",
                len(ranks),
                comm.get_world_size(),
            )

    def save_checkpoint(self) -> None:
        """Save a checkpoint at the end of an iteration, evaluated; every rank has to call it."""
        more = {"iteration": self.iter, "evaluated": True, "ranks": self.gather_rank_states()}
        self.checkpointer.save(f"model_{self.iter:07d}", **more)

    def gather_rank_states(self) -> list[dict[str, Any]]:
        """Return what each rank has of its own, on the main one; every rank has to call it."""
        random, normalizers = get_random_state(self._device), get_loss_normalizers(self.model)
        return comm.gather({"random": random, "loss_normalizer": normalizers})

    @property
    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop, the same on all ranks."""
        return self._trainer.stop_agreed

    def state_dict(self) -> dict[str, Any]:
        """Return DefaultTrainer's, the seed of feedback, and where the loaders are."""
        state = {**super().state_dict(), "feedback_seed": self.cfg.MODEL.FEEDBACK.SEED}
        for name, loader in self._loaders().items():
            if hasattr(loader, "state_dict"):
                state[name] = loader.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Go on where another trainer was, with the config's own settings of the optimiser and the
        schedule: what ends by diverging is to go on with a lower learning rate.
        """
        super().load_state_dict(state_dict)
        self.start_iter = self.iter + 1
        if isinstance(self.scheduler, LRMultiplier):
            groups = self.optimizer.param_groups
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            for group, rate in zip(groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate
        for name, loader in self._loaders().items():
            if name in state_dict and hasattr(loader, "load_state_dict"):
                loader.load_state_dict(state_dict[name])
            else:
                said = "The order of the images (%s) begins anew: there is no state of its loader."
                logger.warning(said, name)

    def _loaders(self) -> dict[str, Any]:
        """The loaders of training images, by the name of their state in a checkpoint."""
        loaders = {"data": self._trainer.data_loader}
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN) and hasattr(hook, "_data_loader"):
                loaders["precise_bn_data"] = hook._data_loader
        return loaders

    def train(self) -> Any:
        """
        Train as DefaultTrainer does. What an earlier run has left in OUTPUT_DIR is archived, and
        the config written to its config.yaml.
        """
        folder = self.cfg.OUTPUT_DIR
        if self.start_iter == 0:
            if comm.is_main_process() and (archive := archive_previous_run(folder)):
                logger.warning("The files of an earlier run are now in %s.", archive)
            comm.synchronize()
        elif self.start_iter >= self.max_iter:
            logger.warning(
                "The run in %s is finished, after %d of SOLVER.MAX_ITER %d iterations: nothing is "
                "trained. To go on, set a larger SOLVER.MAX_ITER, or SOLVER.EPOCHS.",
                folder,
                self.start_iter,
                self.max_iter,
            )
        # What is scripted, such as Detectron2's focal loss, is optimised after its first calls and
        # then rounds otherwise: a resumed run would differ. On the CPU it costs nothing to go
        # without; a GPU is not exact to the bit in any case.
        optimized = torch.jit.optimized_execution(not runs_on_cpu(self.cfg))
        with optimized, self.checkpointer.explain_full_disk():
            if comm.is_main_process() and not 0 < self.max_iter <= self.start_iter:
                with atomic_write(os.path.join(folder, "config.yaml")) as file:
                    file.write(self._given_cfg.dump().encode())
            return super().train()

    def before_train(self) -> None:
        """Make up for an evaluation that the interrupted run may not have finished, as well."""
        super().before_train()
        if not self._evaluation_due or self.start_iter >= self.max_iter:
            return
        logger.info("Resumed after the step of an evaluation, which is done first.")
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks:
            if isinstance(hook, (hooks.EvalHook, hooks.BestCheckpointer, hooks.PeriodicWriter)):
                hook.after_step()
        self.iter = self.storage.iter = self.start_iter

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # Detectron2's hooks would take a failure in the last step for the end of training.
            kinds = (hooks.EvalHook, hooks.BestCheckpointer)
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, kinds)]
        # A finished run that is resumed takes no step, and is not one step further for it.
        self.iter = min(self.iter, self.max_iter)
        # Ends the loader's workers. Killed at Python's exit, they would leave temporary folders.
        self._trainer._data_loader_iter_obj = None
        super().after_train()

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """
        Evaluate the main rank's model, which is saved, on DATASETS.TEST. Training goes on with the
        random numbers it would have had.
        """
        share_buffers(model)
        with kept_random_state(torch.device(cfg.MODEL.DEVICE)):
            return super().test(cfg, model, evaluators)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.cfg.MODEL.DEVICE)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scale to another number of processes as Detectron2 does, SOLVER.LAST_LAYER as well."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            scaled.defrost()
            scale = scaled.SOLVER.IMS_PER_BATCH / cfg.SOLVER.IMS_PER_BATCH
            scaled.SOLVER.LAST_LAYER.BASE_LR *= scale
            scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        Build the model on its device, as MODEL.CHANNELS_LAST and MODEL.COMPILED say.

        Raises:
            ValueError: MODEL.FEEDBACK names a rule, or excludes layers, to no effect, or nothing
                of the model can be compiled.
        """
        model = build_model(cfg)
        logger.debug("Model:\n%s", model)
        report = feedback_report(model)
        check_conversion(cfg, model, report)
        logger.info("Which layers learn by which rule:\n%s", report)
        if cfg.MODEL.CHANNELS_LAST:
            # Feedback follows its weight. That of the weights gives that of all feature maps.
            model.to(memory_format=torch.channels_last)
        if cfg.MODEL.COMPILED:
            compile_parts(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build SOLVER.OPTIMIZER, see :func:`~ss_detectron.solver.build.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Build SOLVER.LR_SCHEDULER_NAME, one of Detectron2's."""
        names = "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
        choose(cfg, "SOLVER.LR_SCHEDULER_NAME", *names)
        return super().build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_checkpointer(
        cls, cfg: CfgNode, model: nn.Module, **checkpointables: Any
    ) -> FeedbackCheckpointer:
        """Build what saves and loads the model, and what else is to be saved with it."""
        return FeedbackCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            weights_except=cfg.MODEL.WEIGHTS_EXCEPT,
            trusted_weights=cfg.MODEL.TRUSTED_WEIGHTS,
            **checkpointables,
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """
        Build the endless loader of DATASETS.TRAIN, whose batches follow from SEED. A batch has the
        images of one pass, see SOLVER.ACCUMULATION_STEPS.
        """
        if _is_classification(cfg.DATASETS.TRAIN[0]):
            return build_classification_train_loader(cfg)
        return build_resumable_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the loader of one data set, each image once over all processes."""
        if _is_classification(dataset_name):
            return build_classification_test_loader(cfg, dataset_name)
        return build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """
        Build the evaluator for the data set's evaluator_type; it writes to inference/NAME.

        Raises:
            NotImplementedError: there is none for that type.
        """
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        if kind == "coco":
            api = choose(cfg, "TEST.COCO_API", "fastest", "hotcoco", "pycocotools")
            return DetectionEvaluator(dataset_name, output_dir=folder, coco_api=api)
        if kind == "classification":
            return ClassificationEvaluator(
                dataset_name, per_class=cfg.TEST.CLASSIFICATION.PER_CLASS, output_dir=folder
            )
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise NotImplementedError(
            f"data set {dataset_name!r} has evaluator_type {kind!r}, and this trainer evaluates "
            "'coco', 'pascal_voc' and 'classification': override Trainer.build_evaluator"
        )

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Build Detectron2's hooks and this package's; the first test set's AP or error is best."""
        built = super().build_hooks()
        solver, test = self.cfg.SOLVER, self.cfg.TEST
        # Detectron2's is the main rank's, and saves nothing of the others.
        built = [hook for hook in built if not isinstance(hook, hooks.PeriodicCheckpointer)]
        place = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        kept = solver.CHECKPOINT_MAX_TO_KEEP
        latest = PeriodicCheckpointer(self.checkpointer, solver.CHECKPOINT_PERIOD, keep=kept)
        built.insert(place, latest)
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            names = self.cfg.DATASETS.TEST
            metric, mode = "bbox/AP", "max"
            if _is_classification(names[0]):
                metric, mode = "classification/top1_error", "min"
            if len(names) > 1:
                metric = f"{names[0]}/{metric}"
            # After the evaluation, before the writers.
            best = BestCheckpointer(test.EVAL_PERIOD, self.checkpointer, metric, mode)
            built.insert(len(built) - 1, best)
        if test.ALIGNMENT_PERIOD:
            built.insert(0, AlignmentHook(test.ALIGNMENT_PERIOD))
        images = getattr(self._trainer.data_loader, "dataset", None)
        if isinstance(images, Sized):
            built.insert(
                0, EpochLogger(solver.IMS_PER_BATCH, len(images), chosen=bool(solver.EPOCHS))
            )
        built.insert(0, FirstStepLogger())
        return [*built, PreemptionHook()]


def _is_classification(dataset_name: str) -> bool:
    return MetadataCatalog.get(dataset_name).get("evaluator_type") == "classification"
