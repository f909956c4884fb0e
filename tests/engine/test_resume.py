"""A run that was killed and resumed is the run that was not, bit for bit."""

import json
import signal
from pathlib import Path

import pytest
import torch
from core_utils import each_rule
from modeling_utils import resnet
from run_utils import SECONDS, assert_equal, end, finish, rows, start

from ss_detectron import LEARNER_REGISTRY
from ss_detectron.data import generate_shapes, generate_shapes_cls

RECORDED = Path(__file__).parents[1] / "recorded_run.py"
COMMON = (
    *("SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 3),
    *("SOLVER.WARMUP_ITERS", 4, "SOLVER.IMS_PER_BATCH", 4),
    *resnet(50, res2=16, stem=16, width=4),
)
DETECTION = (
    *("--config-file", "quick/shapes_retinanet_ss.yaml", *COMMON),
    *("INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.MIN_SIZE_TEST", 48),
    # Something is found after three steps too.
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.NORM", ""),
    *("MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.NORM", ""),
)
# Crops and flips drawn at random.
CLASSIFICATION = (
    *("--config-file", "quick/shapes_resnet18_ss.yaml", *COMMON),
    *("INPUT.CLASSIFICATION.TRANSFORM", "resized_crop", "INPUT.CLASSIFICATION.SIZE", 32),
    *("INPUT.CLASSIFICATION.RESIZE", 36, "INPUT.RANDOM_FLIP", "horizontal"),
)
IN_TRAINING = {"KILL_AFTER": "4"}
TASKS = {"detection": DETECTION, "classification": CLASSIFICATION}


@pytest.fixture(autouse=True, scope="module")
def datasets(tmp_path_factory):
    """Small ones: eight steps are more than an epoch."""
    folder = tmp_path_factory.mktemp("datasets")
    generate_shapes(folder, train=20, val=8)
    generate_shapes_cls(folder, train=20, val=20)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DETECTRON2_DATASETS", str(folder))
        yield


def losses_of(folder):
    """(rank, iteration) -> each of its losses, in both lives of a run."""
    found = {}
    for file in sorted(folder.glob("losses.*.json")):
        for row in map(json.loads, file.read_text().splitlines()):
            found.setdefault((file.name, row.pop("iteration")), []).append(row)
    return found


def evaluations_of(folder):
    """(iteration, metric) -> value."""
    return {
        (row["iteration"], key): value
        for row in rows(folder)
        for key, value in row.items()
        if key.startswith(("bbox", "classification"))
    }


def assert_resumes_exactly(tmp_path, task, kill, options=(), processes=1):
    words = ["--num-gpus", processes, *TASKS[task], *options]

    def run(folder, *more, **environment):
        words_ = [*more, *words, "OUTPUT_DIR", tmp_path / folder]
        return start(*words_, cwd=tmp_path, script=RECORDED, **environment)

    killed = run("killed", **kill)
    try:
        output, _ = killed.communicate(timeout=SECONDS)
    finally:
        end(killed)
    assert killed.returncode == -signal.SIGKILL, output[-5000:]
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000002.pth"
    whole, resumed = run("whole"), run("killed", "--resume")
    finish(whole)
    assert "Resumed after" in finish(resumed) or kill == IN_TRAINING

    checkpoints = [
        torch.load(tmp_path / folder / "model_final.pth", weights_only=True)
        for folder in ("whole", "killed")
    ]
    assert len(checkpoints[0]["ranks"]) == processes
    assert_equal(*checkpoints)
    whole, resumed = (losses_of(tmp_path / folder) for folder in ("whole", "killed"))
    assert len(whole) == 8 * processes
    lives = [life for step in resumed.values() for life in step]
    repeated = 2 if kill == IN_TRAINING else 0  # after the checkpoint
    assert len(lives) == len(whole) + repeated * processes
    for step, (expected,) in whole.items():
        assert all(life == expected for life in resumed[step]), step
    assert any("total_loss" in row for (row,) in whole.values())
    whole, resumed = (evaluations_of(tmp_path / folder) for folder in ("whole", "killed"))
    assert {iteration for iteration, _ in whole} == {5, 8}  # the writer comes by every 20 steps
    assert {key: repr(value) for key, value in whole.items()} == {
        key: repr(value) for key, value in resumed.items()
    }
    if task == "detection":
        whole, resumed = (
            (tmp_path / folder / "inference/shapes_val/coco_instances_results.json").read_text()
            for folder in ("whole", "killed")
        )
        assert len(json.loads(whole)) > 8
        assert whole == resumed


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    options = ("MODEL.FEEDBACK.RULE", "brsf", "DATALOADER.NUM_WORKERS", 2)
    assert_resumes_exactly(tmp_path, "detection", IN_TRAINING, options)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "classification"])
@each_rule
def test_every_rule(task, rule, tmp_path):
    options = ("MODEL.FEEDBACK.RULE", rule)
    assert_resumes_exactly(tmp_path, task, {"KILL_IN_EVALUATION": "1"}, options)


# Images in memory, and a network of which every learner can tell the blocks.
CHAIN = (
    *("MODEL.BACKBONE.NAME", "build_feedback_fc_backbone", "MODEL.CHAIN.LAYERS", "[8, 6, 5]"),
    *("MODEL.FEEDBACK.RULE", "bp"),
    *("DATALOADER.IN_MEMORY", True, "INPUT.CLASSIFICATION.TRANSFORM", "pad_crop"),
    *("INPUT.CLASSIFICATION.SIZE", 48),  # the images'
    *("MODEL.LEARNER.SCHEDULE", "alternating", "MODEL.LEARNER.PERIOD", 2),
)


@pytest.mark.slow
@pytest.mark.parametrize("learner", [name for name, _ in LEARNER_REGISTRY])
def test_every_learner(learner, tmp_path):
    options = (*CHAIN, "MODEL.LEARNER.NAME", learner)
    assert_resumes_exactly(tmp_path, "classification", IN_TRAINING, options)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["detection", "classification"])
def test_processes_and_workers(task, workers, processes, tmp_path):
    options = ("DATALOADER.NUM_WORKERS", workers)
    assert_resumes_exactly(tmp_path, task, IN_TRAINING, options, processes)


OTHERS = {
    "precise-bn": ("classification", "TEST.PRECISE_BN.ENABLED", True),
    "passes": ("detection", "SOLVER.ACCUMULATION_STEPS", 2),
    # In bfloat16, torch's gradient on a map of one pixel (p7 of small images) is not always finite.
    "amp": ("detection", "SOLVER.AMP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", "(160,)"),
    "sgd": ("classification", "SOLVER.OPTIMIZER", "SGD", "SOLVER.BATCH_MANHATTAN", True),
    "alignment": ("detection", "TEST.ALIGNMENT_PERIOD", 2),
    "repeat-factor": ("detection", "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHERS)
def test_other_ways_to_train(way, tmp_path):
    task, *options = OTHERS[way]
    assert_resumes_exactly(tmp_path, task, IN_TRAINING, options)
