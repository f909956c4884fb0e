"""What a training step costs by any rule or learner, apart from the machine it runs on."""

import tempfile

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from ss_detectron.data import register_coco_from_config, register_image_folders_from_config
from ss_detectron.engine import Trainer


def multiply_adds(cfg: CfgNode) -> float:
    """
    Counts the multiply-adds per image of a training step, on real images and the CPU: those of
    matrix products and convolutions, forward, backward and of what feedback and inverses learn by,
    not the work that goes element by element. With inverses and model in turns, it is the mean of
    both kinds of step.

    Raises:
        FileNotFoundError: the data sets are not there.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED, cfg.TEST.ALIGNMENT_PERIOD = "cpu", False, 0
    steps = 2 if cfg.MODEL.LEARNER.SCHEDULE == "alternating" else 1
    cfg.MODEL.LEARNER.PERIOD = min(cfg.MODEL.LEARNER.PERIOD, 1)
    register_coco_from_config(cfg)
    register_image_folders_from_config(cfg)
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:
        trainer = Trainer(cfg)
        with EventStorage() as trainer.storage:
            trainer.iter = 0
            for _ in range(steps):  # learners look at the first pass
                trainer.run_step()
            with FlopCounterMode(display=False) as counter:
                for _ in range(steps):
                    trainer.run_step()
    images = steps * cfg.SOLVER.IMS_PER_BATCH
    return counter.get_total_flops() / 2 / images
