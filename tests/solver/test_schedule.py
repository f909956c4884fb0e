"""Schedules in epochs, against what the configs say in iterations."""

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.solver import build_lr_scheduler  # noqa: E402
from modeling_utils import load_config  # noqa: E402

from ss_detectron.engine import Trainer  # noqa: E402
from ss_detectron.solver.schedule import schedule_in_epochs  # noqa: E402

IMAGENET, CIFAR, COCO = 1_281_167, 50_000, 117_266
"""Images; of COCO those with objects."""


def schedule(cfg):
    solver = cfg.SOLVER
    periods = solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    return solver.MAX_ITER, *solver.STEPS, *periods, solver.WARMUP_ITERS


@pytest.mark.parametrize(
    ("config", "images"), [("imagenet_resnet18_ss", IMAGENET), ("cifar10_resnet18_ss", CIFAR)]
)
def test_the_published_epochs_are_the_configs_iterations(config, images):
    cfg = load_config(f"{config}.yaml")
    assert schedule_in_epochs(cfg, images) is cfg
    for epochs in ({"EPOCHS": 50}, {"EPOCHS": 50, "STEP_EPOCHS": (10, 20, 30, 40)}):
        words = [word for key, value in epochs.items() for word in (f"SOLVER.{key}", value)]
        made = schedule_in_epochs(load_config(f"{config}.yaml", *words), images)
        assert schedule(made) == pytest.approx(schedule(cfg), abs=1)
        # Of a config that was made so already, the same follows.
        assert schedule(schedule_in_epochs(made, images)) == schedule(made)
        assert made.is_frozen()


@pytest.mark.parametrize("processes", [1, 8, 16])
def test_epochs_do_not_depend_on_the_number_of_processes(processes):
    words = "SOLVER.EPOCHS", 12, "SOLVER.STEP_EPOCHS", (8, 11), "TEST.EVAL_PERIOD", 10000
    cfg = load_config("retinanet_ss.yaml", *words)
    cfg = schedule_in_epochs(Trainer.auto_scale_workers(cfg, processes), COCO)
    epoch = COCO / (2 * processes)
    expected = [12 * epoch, 8 * epoch, 11 * epoch, epoch, epoch, 1000 * 8 / processes]
    assert schedule(cfg) == tuple(map(round, expected))


def test_a_small_set_has_a_schedule_of_the_same_shape():
    cfg = schedule_in_epochs(load_config("retinanet_ss.yaml", "SOLVER.EPOCHS", 20), 100)
    # 125 iterations: the steps at 2/3 and 8/9, a checkpoint each epoch, no evaluation before the
    # end, and a warm-up of a tenth.
    assert schedule(cfg) == (125, 83, 111, 6, 0, 12)


@pytest.mark.parametrize(
    ("config", "images", "epochs", "iterations", "steps"),
    [
        ("imagenet_resnet18_ss", 8, {"EPOCHS": 30, "STEP_EPOCHS": (15, 25)}, 1, ()),
        ("imagenet_resnet18_ss", 600, {"EPOCHS": 1}, 2, (1,)),
        ("imagenet_resnet18_ss", 256, {"EPOCHS": 8, "STEP_EPOCHS": (2, 3, 8, 9)}, 8, (2, 3)),
        ("retinanet_scratch_ss", 2, {"EPOCHS": 1}, 1, ()),
    ],
)
def test_steps_that_few_images_do_not_tell_apart_fall_away(
    config, images, epochs, iterations, steps, caplog
):
    words = [word for key, value in epochs.items() for word in (f"SOLVER.{key}", value)]
    cfg = schedule_in_epochs(load_config(f"{config}.yaml", *words), images)
    assert (iterations, steps) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS)
    build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], lr=1.0))
    assert "coincide or do not come before MAX_ITER" in caplog.text
    assert ("smaller SOLVER.IMS_PER_BATCH" in caplog.text) == (images < cfg.SOLVER.IMS_PER_BATCH)


def test_step_epochs_alone_leave_the_rest():
    before = load_config("cifar10_resnet18_ss.yaml", "SOLVER.STEP_EPOCHS", (25,))
    cfg = schedule_in_epochs(before, CIFAR)
    assert cfg.SOLVER.STEPS == (4883,)
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST) == (before.SOLVER.MAX_ITER, before.TEST)
