"""Whole runs of tools/train_net.py on classification, as its users start them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_utils import finish, rows, start
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The handwritten digits of the UCI repository as folders of PNG files, one in four to test."""
    root = tmp_path_factory.mktemp("digits")
    bunch = load_digits()
    for i, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        folder = root / ("train" if i % 4 else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def options(root: Path, **changes) -> list[str]:
    """KEY VALUE ... of a small ResNet-18 run on the class folders below ``root``."""
    keys = {
        "DATASETS.IMAGE_FOLDERS": [["own_train", f"{root}/train"], ["own_test", f"{root}/test"]],
        "DATASETS.TRAIN": ("own_train",),
        "DATASETS.TEST": ("own_test",),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.CLASSIFICATION.TRANSFORM": "resize",
        "INPUT.CLASSIFICATION.SIZE": 32,
        "INPUT.RANDOM_FLIP": "none",
        "MODEL.FEEDBACK.SCALE": "mean_abs",
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 10,
        "OUTPUT_DIR": "out",
        "SEED": 1,
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.IMS_PER_BATCH": 32,
        "SOLVER.STEPS": (),
        "TEST.EVAL_PERIOD": 0,
    }
    return [str(word) for pair in (keys | changes).items() for word in pair]


def results(folder: Path) -> dict:
    return json.loads((folder / "inference" / "classification_results.json").read_text())


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a run by sign-symmetry, evaluated twice."""
    here = tmp_path_factory.mktemp("run")
    changes = {
        "SOLVER.MAX_ITER": 100,
        "SOLVER.STEPS": (80,),
        "TEST.EVAL_PERIOD": 50,
        "TEST.CLASSIFICATION.PER_CLASS": True,
    }
    words = ["--config-file", "imagenet_resnet18_ss.yaml", *options(digits, **changes)]
    return here / "out", finish(start(*words, cwd=here))


def test_real_digits_are_learned(run):
    folder, output = run
    assert "100 steps of 32 images are 2.376 epochs of 1347 images" in output
    found = results(folder)
    assert found["images"] == 450
    assert found["top1_error"] < 5


def test_the_best_checkpoint_is_that_of_the_least_error(run):
    folder, _ = run
    errors = {
        row["iteration"]: row["classification/top1_error"]
        for row in rows(folder)
        if "classification/top1_error" in row
    }
    assert list(errors) == [49, 100]  # that after the last step counts as 100
    assert errors[100] == results(folder)["top1_error"]
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert best["iteration"] == min(errors, key=errors.get)
    assert len([k for row in rows(folder) for k in row if "top1_error-" in k]) == 20


def test_two_processes_evaluate_every_image_as_one_does(run, digits, tmp_path):
    keys = {"MODEL.WEIGHTS": run[0] / "model_final.pth", "TEST.CLASSIFICATION.PER_CLASS": True}
    words = ["--config-file", "imagenet_resnet18_ss.yaml", "--eval-only", "--num-gpus", 2]
    finish(start(*words, *options(digits, **keys), cwd=tmp_path))
    assert results(tmp_path / "out") == results(run[0])
