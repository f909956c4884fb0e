"""A whole run of tools/train_net.py on classification, as its users start it."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from run_utils import finish, rows, start
from sklearn.datasets import load_digits


def write_digits(root: Path) -> None:
    """The handwritten digits of the UCI repository as folders of PNG files, one in four to test."""
    bunch = load_digits()
    for i, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        folder = root / ("train" if i % 4 else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (image * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")


def test_real_digits_are_learned_and_the_best_checkpoint_is_that_of_the_least_error(tmp_path):
    write_digits(tmp_path)
    keys = {
        "DATASETS.IMAGE_FOLDERS": [[f"own_{s}", f"{tmp_path}/{s}"] for s in ("train", "test")],
        "DATASETS.TRAIN": ("own_train",),
        "DATASETS.TEST": ("own_test",),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.CLASSIFICATION.TRANSFORM": "resize",
        "INPUT.CLASSIFICATION.SIZE": 32,
        "INPUT.RANDOM_FLIP": "none",
        "MODEL.FEEDBACK.SCALE": "mean_abs",
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 10,
        "MODEL.RESNETS.OUT_FEATURES": ["res3"],
        "OUTPUT_DIR": "out",
        "SEED": 1,
        "SOLVER.OPTIMIZER": "AdamW",
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.IMS_PER_BATCH": 32,
        "SOLVER.MAX_ITER": 100,
        "SOLVER.STEPS": (80,),
        "TEST.EVAL_PERIOD": 50,
        "TEST.CLASSIFICATION.PER_CLASS": True,
    }
    words = ["--config-file", "imagenet_resnet18_ss.yaml"]
    words += [word for pair in keys.items() for word in pair]
    output = finish(start(*words, cwd=tmp_path))
    assert "100 steps of 32 images are 2.376 epochs of 1347 images" in output
    assert re.search(r"'own_train': 1347 images; of each class: 0 \(\d+\), 1 \(\d+\), 2", output)
    folder = tmp_path / "out"
    results = folder / "inference" / "own_test" / "classification_results.json"
    found = json.loads(results.read_text())
    assert found["images"] == 450
    assert found["top1_error"] < 5
    errors = {
        row["iteration"]: row["classification/top1_error"]
        for row in rows(folder)
        if "classification/top1_error" in row
    }
    assert list(errors) == [49, 100]  # that after the last step counts as 100
    assert errors[100] == found["top1_error"]
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert best["classes"] == list("0123456789")
    assert best["iteration"] == min(errors, key=errors.get)
    assert len([k for row in rows(folder) for k in row if "top1_error-" in k]) == 20
