"""Whole runs of tools/train_net.py on classification, as its users start them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from run_utils import finish, model_of, rows, start
from sklearn.datasets import load_digits

from ss_detectron.data import generate_shapes


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


@pytest.mark.parametrize("kind", [pytest.param("bp", marks=pytest.mark.slow), "ss"])
def test_real_digits_are_learned(kind, digits, tmp_path):
    steps = {"SOLVER.MAX_ITER": 100, "SOLVER.STEPS": (80,)}
    words = ["--config-file", f"imagenet_resnet18_{kind}.yaml", *options(digits, **steps)]
    output = finish(start(*words, cwd=tmp_path))
    epochs = [row["epoch"] for row in rows(tmp_path / "out") if "epoch" in row]
    assert epochs[-1] == pytest.approx(100 * 32 / 1347)
    assert "SOLVER.STEPS: after epochs 1.901" in output
    found = results(tmp_path / "out")
    assert found["images"] == 450
    assert found["top1_error"] < 5
    (logged,) = [r for r in rows(tmp_path / "out") if "classification/top1_error" in r]
    assert logged["classification/top1_error"] == found["top1_error"]
    assert (tmp_path / "out" / "model_best.pth").is_file()


# A trained classifier, and what becomes of it ----------------------------------------------------

WIDTH = ["MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"]


@pytest.fixture(scope="module")
def fa_run(tmp_path_factory, digits) -> Path:
    """The folder of a run of feedback alignment over two evaluations, on few of the digits."""
    here = tmp_path_factory.mktemp("fa")
    changes = {
        "SOLVER.MAX_ITER": 4,
        "SOLVER.ACCUMULATION_STEPS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 2,
        "TEST.CLASSIFICATION.PER_CLASS": True,
    }
    words = ["--config-file", "imagenet_resnet18_fa.yaml", *options(digits, **changes)]
    finish(start(*words, cwd=here))
    return here / "out"


def test_best_checkpoint_is_that_of_the_least_error(fa_run):
    errors = {
        row["iteration"]: row["classification/top1_error"]
        for row in rows(fa_run)
        if "classification/top1_error" in row
    }
    assert len(errors) == 2
    best = torch.load(fa_run / "model_best.pth", weights_only=True)
    assert best["iteration"] == min(errors, key=errors.get)
    assert len([k for row in rows(fa_run) for k in row if "top1_error-" in k]) == 20


def test_two_processes_evaluate_every_image_as_one_does(fa_run, digits, tmp_path):
    # 5 batches of 7 and a rest, shared out over two processes, 19 and 18 images.
    root = tmp_path / "few"
    for label in range(10):
        folder = root / "test" / str(label)
        folder.mkdir(parents=True)
        files = sorted((digits / "test" / str(label)).iterdir())
        for file in files[: 3 + (label < 7)]:
            (folder / file.name).symlink_to(file)
    changes = {
        "MODEL.WEIGHTS": fa_run / "model_final.pth",
        "TEST.CLASSIFICATION.IMS_PER_BATCH": 7,
        "TEST.CLASSIFICATION.PER_CLASS": True,
    }
    words = ["--config-file", "imagenet_resnet18_fa.yaml", "--eval-only"]
    runs = []
    for processes in (1, 2):
        here = tmp_path / str(processes)
        here.mkdir()
        more = ["--num-gpus", processes, *options(root, **changes)]
        output = finish(start(*words, *more, cwd=here))
        assert "images were evaluated" not in output  # which would say that some are missing
        runs.append(results(here / "out"))
    assert runs[0] == runs[1]
    assert runs[0]["images"] == 37


def test_classifiers_backbone_goes_on_in_a_detector(fa_run, tmp_path):
    shapes = generate_shapes(tmp_path / "sets", train=4, val=2, size=64)
    words = ["--config-file", "retinanet_R_18_fa.yaml", *WIDTH]
    for key, value in {
        "MODEL.WEIGHTS": fa_run / "model_final.pth",
        "DATASETS.COCO_INSTANCES": [
            ["tiny", f"{shapes}/annotations/instances_train.json", f"{shapes}/train"]
        ],
        "DATASETS.TRAIN": ("tiny",),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.STEPS": (),
        "OUTPUT_DIR": "out",
    }.items():
        words += [key, str(value)]
    output = finish(start(*words, cwd=tmp_path))
    assert "not found in the checkpoint" in output and "head" in output

    classifier = model_of(fa_run, "model_final.pth")
    detector = model_of(tmp_path / "out", "model_final.pth")
    backbone = {n.removeprefix("backbone."): v for n, v in classifier.items() if "backbone" in n}
    assert sum("feedback_weight" in name for name in backbone) == 20
    learned = 0
    for name, value in backbone.items():
        if "num_batches_tracked" in name:  # which frozen norms do without
            continue
        here = detector[f"backbone.bottom_up.{name}"]
        # Frozen: the stem, the first stage, and all norms; feedback is fixed.
        if name.startswith(("stem", "res2")) or "norm" in name or "feedback" in name:
            torch.testing.assert_close(here, value, rtol=0, atol=0)
        else:
            learned += not torch.equal(here, value)
    assert learned == 20 - 1 - 4


def test_another_number_of_classes_is_refused_unless_the_last_layer_starts_anew(
    fa_run, digits, tmp_path
):
    root = tmp_path / "two"
    for split in ("train", "test"):
        for label in "01":
            folder = root / split / label
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(digits / split / label)
    changes = {
        "MODEL.WEIGHTS": fa_run / "model_final.pth",
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 2,
        "SOLVER.MAX_ITER": 1,
    }
    words = ["--config-file", "imagenet_resnet18_fa.yaml"]
    process = start(*words, *options(root, **changes), cwd=tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "linear.weight" in output and "(10, 512)" in output and "(2, 512)" in output
    assert "WEIGHTS_EXCEPT" in output

    changes["MODEL.WEIGHTS_EXCEPT"] = ["linear"]
    finish(start(*words, *options(root, **changes), cwd=tmp_path))
    assert model_of(tmp_path / "out", "model_final.pth")["linear.weight"].shape == (2, 512)
