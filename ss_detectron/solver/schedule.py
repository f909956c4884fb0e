"""A schedule in passes over the training images."""

import logging

from detectron2.config import CfgNode

__all__ = ["schedule_in_epochs"]

logger = logging.getLogger(__name__)


def schedule_in_epochs(cfg: CfgNode, images: int) -> CfgNode:
    """
    Return a config whose iterations follow from SOLVER.EPOCHS and SOLVER.STEP_EPOCHS; ``cfg``
    itself where neither is set.

    MAX_ITER follows from EPOCHS. STEPS keep their share of it, unless STEP_EPOCHS sets them; of few
    images, those fall away that coincide or do not come before MAX_ITER.
    CHECKPOINT_PERIOD and TEST.EVAL_PERIOD become whole epochs, as many as keep their share and one
    at least; an EVAL_PERIOD of 0 stays. WARMUP_ITERS stays up to a tenth of the schedule.

    Args:
        cfg: scaled to the number of processes already.
        images: of an epoch.
    """
    if not (cfg.SOLVER.EPOCHS or cfg.SOLVER.STEP_EPOCHS):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    solver, test = cfg.SOLVER, cfg.TEST
    epoch = images / solver.IMS_PER_BATCH

    def iterations(epochs: float) -> int:
        return max(1, round(epochs * epoch))

    if epochs := solver.EPOCHS:
        share = epochs / solver.MAX_ITER
        solver.STEPS = tuple(iterations(step * share) for step in solver.STEPS)
        solver.CHECKPOINT_PERIOD = iterations(max(1, round(solver.CHECKPOINT_PERIOD * share)))
        if test.EVAL_PERIOD:
            test.EVAL_PERIOD = iterations(max(1, round(test.EVAL_PERIOD * share)))
        solver.MAX_ITER = iterations(epochs)
        solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, solver.MAX_ITER // 10)
    if solver.STEP_EPOCHS:
        solver.STEPS = tuple(map(iterations, solver.STEP_EPOCHS))
    steps, last = solver.STEPS, solver.MAX_ITER
    solver.STEPS = tuple(sorted({step for step in steps if step < last}))
    if len(solver.STEPS) < len(steps):
        lost = "SOLVER.STEPS %s: those that coincide or do not come before MAX_ITER %d fall away."
        logger.warning(lost, steps, last)
    if images < solver.IMS_PER_BATCH:
        logger.warning(
            "A batch of %d images goes over the %d there are more than once: choose a smaller "
            "SOLVER.IMS_PER_BATCH, and SOLVER.BASE_LR to go with it.",
            solver.IMS_PER_BATCH,
            images,
        )
    keys = ("MAX_ITER", "STEPS", "WARMUP_ITERS", "CHECKPOINT_PERIOD")
    said = ", ".join(f"{key} {solver[key]}" for key in keys)
    logger.info("In epochs of %d images: %s, EVAL_PERIOD %d.", images, said, test.EVAL_PERIOD)
    cfg.freeze()
    return cfg
