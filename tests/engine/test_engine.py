import json
import logging
import math
import re
from ast import literal_eval
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import _cached_log_stream, setup_logger
from run_utils import assert_equal, model_of, rows, tiny_detection
from torch import nn

from ss_detectron import weight_alignment
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.engine import (
    BestCheckpointer,
    PeriodicCheckpointer,
    Trainer,
    argument_parser,
    command_line,
    setup,
)
from ss_detectron.engine.hooks import EpochLogger
from ss_detectron.engine.not_finite import not_finite
from ss_detectron.experiments.runs import read_config, read_metrics
from ss_detectron.learners import LEARNER_REGISTRY, Learner

LOGGERS = ("detectron2", "fvcore", "ss_detectron")


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return tiny_detection(tmp_path_factory.mktemp("sets"))


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """In an empty folder; afterwards loggers and catalogs are as they were."""
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(log.level, log.propagate, log.handlers[:]) for log in loggers]
    catalog = set(DatasetCatalog.list())
    yield
    for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in log.handlers:
            if handler not in handlers:
                handler.close()
        log.setLevel(level)
        log.propagate, log.handlers[:] = propagate, handlers
    # Both remember that they were called: the next test's log file is another one.
    setup_logger.cache_clear()
    _cached_log_stream.cache_clear()
    for name in set(DatasetCatalog.list()) - catalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def prepare(options):
    """(KEY VALUE ..., config, flags) -> the config as the tool would have it."""

    def call(*opts, config="quick/shapes_retinanet_ss.yaml", flags=()) -> CfgNode:
        words = ["--config-file", config, *flags, *options, *map(str, opts)]
        return setup(argument_parser().parse_args(words))

    return call


# Before a run begins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["MODEL.WEIGHTS", "no.pth"], "MODEL.WEIGHTS is 'no.pth'"),
        (["MODEL.WEIGHTS", "a.pkl"], "a.pkl.*MODEL.TRUSTED_WEIGHTS"),
        (["DATASETS.TRAIN", ("tiny_trane",)], "'tiny_trane'.*tiny_train"),
        (["MODEL.LEARNER.NAME", "hebb"], "unknown learner 'hebb'"),
        (["MODEL.FEEDBACK.RULE", "hebb"], "unknown feedback rule 'hebb'"),
        (["MODEL.FEEDBACK.RULE", "dfa"], "'dfa' is no feedback .*: set MODEL.LEARNER.NAME dfa"),
        (["MODEL.LEARNER.NAME", "ss"], "NAME is 'ss', a feedback rule: set MODEL.FEEDBACK.RULE ss"),
        (["INPUT.RANDOM_FLIP", "both"], "INPUT.RANDOM_FLIP is 'both'; choose 'horizontal' or"),
        (["MODEL.FEEDBACK.SCALE", "large"], "unknown feedback scale 'large'"),
        (["SOLVER.OPTIMIZER", "Lion"], "SOLVER.OPTIMIZER is 'Lion'; choose 'SGD' or 'AdamW'"),
        (["MODEL.RETINANET.HEAD", "MyHead"], "MODEL.RETINANET.HEAD is 'MyHead'; choose"),
        (
            ["DATALOADER.SAMPLER_TRAIN", "Foo"],
            "DATALOADER.SAMPLER_TRAIN is 'Foo'; choose 'Training",
        ),
        (["MODEL.RESNETS.DEPTH", 20], "MODEL.RESNETS.DEPTH is 20; choose 18 or"),
        (["MODEL.RESNETS.NORM", "Group"], "MODEL.RESNETS.NORM is 'Group'; choose"),
        (["INPUT.FORMAT", "BRG"], "INPUT.FORMAT is 'BRG'; choose 'RGB' or 'BGR'"),
        (["SEED", -2], "SEED is -2; choose at least -1"),
        (["MODEL.FEEDBACK.MIRROR_SAMPLES", -1], "MIRROR_SAMPLES is -1; choose at least 0"),
        (["OUTPUT_DIR", f"{__file__}/out"], "test_engine.py/out', which cannot be a folder"),
        (["SOLVER.CHECKPOINT_MAX_TO_KEEP", -1], "MAX_TO_KEEP is -1; choose at least 0"),
    ],
)
def test_what_cannot_work_is_refused(changed, message, prepare):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(*changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "LR_SCHEDULER_NAME is 'Cosine'; choose 'Warmup"),
        (["MODEL.LEARNER.NAME", "dfa"], "MODEL.LEARNER.NAME needs .* ImageClassifier"),
    ],
)
def test_what_does_not_fit_the_model_or_the_trainer_is_refused_by_its_key(
    changed, message, prepare
):
    with pytest.raises(ValueError, match=message):
        Trainer(prepare(*changed))


def test_a_run_that_starts_anew_beside_a_checkpoint_says_so(prepare):
    prepare("OUTPUT_DIR", "out")
    prepare("OUTPUT_DIR", "out", flags=["--resume"])
    FeedbackCheckpointer(nn.Linear(1, 1), "out").save("model_0000001")
    prepare("OUTPUT_DIR", "out", flags=["--resume"])
    prepare("OUTPUT_DIR", "out", "DATASETS.TEST", ("tiny_val",), flags=["--eval-only"])
    log, warning = Path("out/log.txt"), "out has a checkpoint of an earlier run, but this one"
    assert warning not in log.read_text()
    assert log.read_text().count("OUTPUT_DIR out has no checkpoint to go on from") == 1
    prepare("OUTPUT_DIR", "out")
    assert f"OUTPUT_DIR {warning} starts anew; --resume would" in log.read_text()


def test_only_a_training_that_starts_writes_the_config_that_its_folder_is_known_by(prepare):
    def config(name="config.yaml"):
        return read_config(Path("out", name))

    prepare = partial(prepare, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", 1)
    fa = "MODEL.FEEDBACK.RULE", "fa"
    with pytest.raises(ValueError, match="another number of classes"):
        train(prepare("MODEL.WEIGHTS", torch_file({"head.cls_score.bias": torch.ones(1)})))
    assert not Path("out/config.yaml").exists()
    train(prepare(*fa))
    written = config()
    assert written["MODEL.FEEDBACK.RULE"] == "fa"

    prepare("DATASETS.TEST", ("tiny_val",), flags=["--eval-only"])  # without the overrides
    for changed, message in (
        (("MODEL.FPN.OUT_CHANNELS", 32), "resume the run with its own config"),
        ((), "by feedback_align.* and not by sign_symm.*: resume the run with its own MODEL.FEEDB"),
    ):
        refused = Trainer(prepare(*changed, flags=["--resume"]))
        with pytest.raises(ValueError, match=message):
            refused.resume_or_load(resume=True)
    with pytest.raises(ValueError, match="unknown feedback rule"):
        prepare("MODEL.FEEDBACK.RULE", "hebb")
    finished = Trainer(prepare(*fa, flags=["--resume"]))
    finished.resume_or_load(resume=True)
    finished.train()
    assert "The run in out is finished, after 1 of SOLVER" in Path("out/log.txt").read_text()
    assert config() == written

    longer = Trainer(prepare(*fa, "SOLVER.MAX_ITER", 2, flags=["--resume"]))
    longer.resume_or_load(resume=True)
    longer.train()
    assert config() == written | {"SOLVER.MAX_ITER": 2}
    train(prepare())
    assert config()["MODEL.FEEDBACK.RULE"] == "sign_symmetry"
    assert config("earlier_run_1/config.yaml") == written | {"SOLVER.MAX_ITER": 2}


def test_a_rule_that_no_layer_follows_is_refused(prepare):
    cfg = prepare(
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    )
    with pytest.raises(ValueError, match="'sign_symmetry', but no layer.*build_feedback_"):
        Trainer.build_model(cfg)


@pytest.mark.parametrize(
    ("opts", "warning"),
    [
        (("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"), "28 layers that no"),
        (("MODEL.RETINANET.HEAD", "RetinaNetHead"), "4 layers that no builder converted"),
        (("MODEL.RESNETS.NORM", "FrozenBN"), "FrozenBN, which does not learn"),
        ((), None),
    ],
)
def test_a_model_of_which_a_part_ignores_the_rule_or_never_learns_is_warned_of(
    prepare, opts, warning
):
    cfg = prepare(*opts)
    Trainer.build_model(cfg)
    log = Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    assert warning in log if warning else "WARNING" not in log


def test_the_last_layers_learning_rate_scales_with_the_others(prepare):
    rates = ("SOLVER.BASE_LR", 0.01, "SOLVER.LAST_LAYER.BASE_LR", 0.02)
    cfg = prepare("SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 16, *rates)
    scaled = Trainer.auto_scale_workers(cfg, 1).SOLVER
    assert (scaled.IMS_PER_BATCH, scaled.MAX_ITER) == (2, 8 * cfg.SOLVER.MAX_ITER)
    assert pytest.approx([0.00125, 0.0025]) == [scaled.BASE_LR, scaled.LAST_LAYER.BASE_LR]


# Training ----------------------------------------------------------------------------------------


def torch_file(content: dict) -> str:
    torch.save(content, "content.pth")
    return "content.pth"


def train(cfg: CfgNode) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_a_pass_takes_its_part_of_the_images(prepare):
    passes = {"SOLVER.IMS_PER_BATCH": 6, "SOLVER.ACCUMULATION_STEPS": 3}
    options = [word for pair in passes.items() for word in pair]
    for sampler in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        cfg = prepare(*options, "DATALOADER.SAMPLER_TRAIN", sampler)
        loader = Trainer.build_train_loader(cfg)
        assert len(next(iter(loader))) == 2
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 6, .* 4 equal passes"):
        Trainer.build_train_loader(prepare(*options[:-1], 4))


def test_epochs_set_the_trainers_schedule(prepare):
    cfg = prepare("SOLVER.EPOCHS", 3, "SOLVER.STEP_EPOCHS", (2,), "OUTPUT_DIR", "out")
    trainer = Trainer(cfg)
    images = len(trainer.data_loader.dataset)
    steps = round(3 * images / 2)
    assert trainer.max_iter == trainer.scheduler._max_iter == trainer.cfg.SOLVER.MAX_ITER == steps
    assert (images,) == trainer.cfg.SOLVER.STEPS
    assert f"In epochs of {images} images: MAX_ITER {steps}, " in Path("out/log.txt").read_text()


@pytest.mark.parametrize("chosen, level", [(False, "WARNING"), (True, "INFO")])
def test_many_epochs_that_nobody_chose_are_warned_of(caplog, chosen, level):
    for steps in (50, 51):
        with caplog.at_level("INFO"):
            hook = EpochLogger(16, 8, chosen=chosen)
            hook.trainer = SimpleNamespace(max_iter=steps)
            hook.before_train()
    assert "51 steps of 16 images are 102 epochs of 8 images." in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO", level]
    assert ("SOLVER.EPOCHS sets" in caplog.text) is not chosen


def test_the_alignment_is_measured_before_gradients_are_clipped(prepare):
    options = ["MODEL.FEEDBACK.RULE", "kp", "SOLVER.MAX_ITER", 2, "TEST.ALIGNMENT_PERIOD", 2]
    options += ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3]
    train(prepare("OUTPUT_DIR", "out", *options))
    last = next(row for row in rows(Path("out")) if row["iteration"] == 1)
    # Clipping turns a gradient; and nothing but a rule would, before the last layer.
    assert last["alignment/gradient_angle/head.cls_score"] < 0.1
    assert 5 < last["alignment/gradient_angle"] < 120


def test_a_run_that_diverges_ends_with_a_report_and_good_checkpoints(prepare):
    # A first step with a tiny learning rate, then absurd ones.
    rates = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e20, "SOLVER.WARMUP_FACTOR", 1e-23]
    rates += ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", 2]
    more = ["SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", ("tiny_val",), "OUTPUT_DIR", "out"]
    with pytest.raises(FloatingPointError, match="iteration 2, whose step is not taken") as error:
        train(prepare(*rates, *more))  # in the last step, after which a run is evaluated
    for said in (r"rank 0: loss_cls .*images: \S+\.\w+, ", "learning rate: 1e\\+20", "backbone"):
        assert re.search(said, str(error.value))
    folder = Path("out")
    assert not (folder / "inference").exists()
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    for path in folder.glob("*.pth"):
        assert not not_finite(model_of(folder, path.name).items())
    assert all(math.isfinite(v) for row in rows(folder) for v in row.values())


def test_a_resumed_run_follows_its_config(prepare):
    """A run that has diverged is told to go on with a lower learning rate."""
    schedule = {
        "OUTPUT_DIR": "out",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR",
        "SOLVER.STEPS": "(1, 2, 3, 4)",
        "SOLVER.NUM_DECAYS": 4,
        "SOLVER.GAMMA": 0.5,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.BASE_LR": 1.0,
        "SOLVER.WEIGHT_DECAY": 0.0,
        "SOLVER.MAX_ITER": 5,
    }
    prepare = partial(prepare, *(word for pair in schedule.items() for word in pair))
    first = Trainer(prepare())
    first.scheduler.step()
    first.scheduler.step()
    first.iter = 1
    first.checkpointer.save("model_0000001", iteration=1, ranks=[])
    for changed, rates, said in (
        ([], [0.25, 0.125], ""),
        (["SOLVER.BASE_LR", 0.04], [0.01, 0.005], "initial_lr 1.0 -> 0.04"),
        (["SOLVER.GAMMA", 1.0], [1.0, 1.0], ""),
        (["SOLVER.WEIGHT_DECAY", 0.5], [0.25, 0.125], "weight_decay 0.0 -> 0.5"),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", True], [0.25, 0.125], ""),
    ):
        before = Path("out/log.txt").read_text()
        resumed = Trainer(prepare(*changed, flags=["--resume"]))
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 2
        assert {group["lr"] for group in resumed.optimizer.param_groups} == {rates[0]}
        resumed.scheduler.step()
        assert {group["lr"] for group in resumed.optimizer.param_groups} == {rates[1]}
        log = Path("out/log.txt").read_text().removeprefix(before)
        assert said in log and ("new settings of the optimiser" in log) == bool(said)
    for changed in (["SOLVER.OPTIMIZER", "SGD"], ["SOLVER.BIAS_LR_FACTOR", 2.0]):
        resumed = Trainer(prepare(*changed, flags=["--resume"]))
        with pytest.raises(ValueError, match="another kind .SOLVER.OPTIMIZER. or .* other groups"):
            resumed.resume_or_load(resume=True)


def test_feedback_that_has_learned_from_noise_stands_before_the_first_step_and_is_kept(
    prepare, monkeypatch
):
    rule = ("MODEL.FEEDBACK.RULE", "kp", "MODEL.FEEDBACK.MIRROR_SAMPLES", 30)
    rule += ("MODEL.FEEDBACK.EXCLUDE", ("backbone.bottom_up.res*",))  # in less time
    trainer = Trainer(prepare(*rule, "SOLVER.MAX_ITER", 1, "TEST.EVAL_PERIOD", 0))
    random = {name: row.angle for name, row in weight_alignment(trainer.model).items()}
    trainer.resume_or_load(resume=False)
    learned = weight_alignment(trainer.model)
    layers = [name for name in learned if learned[name].norm_ratio != 1]
    assert len(layers) == 11
    assert all(random[name] > 60 and learned[name].angle < 12 for name in layers)
    trainer.train()
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    resumed = Trainer(prepare(*rule, "SOLVER.MAX_ITER", 2, flags=["--resume"]))
    resumed.resume_or_load(resume=True)
    assert_equal(dict(resumed.model.state_dict()), kept)


class Scaled(Learner):
    """With a parameter of its own."""

    name = "scaled"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(()))

    def backward(self, loss, target=None):
        (loss * self.scale).backward()


def test_a_run_is_resumed_bit_for_bit_by_its_own_learner_and_by_no_other(prepare, monkeypatch):
    monkeypatch.setattr(LEARNER_REGISTRY, "_classes", {**LEARNER_REGISTRY._classes})
    LEARNER_REGISTRY.register(Scaled)
    saves = "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 0
    prepare = partial(prepare, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", 4, *saves)
    own = "MODEL.LEARNER.NAME", "scaled"
    train(prepare(*own))
    final = torch.load("out/model_final.pth")
    assert final["learner"]["scale"] != 1
    Path("out/last_checkpoint").write_text("model_0000001.pth")
    other = Trainer(prepare(flags=["--resume"]))
    with pytest.raises(ValueError, match="of the learner 'scaled', .* is 'backpropagation'"):
        other.resume_or_load(resume=True)
    resumed = Trainer(prepare(*own, flags=["--resume"]))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert_equal(torch.load("out/model_final.pth"), final)


def test_an_evaluation_on_the_same_names_in_another_order_of_ids_is_refused(prepare, options):
    train(prepare("SOLVER.MAX_ITER", 1, "OUTPUT_DIR", "out", "MODEL.WEIGHTS_EXCEPT", ["head"]))
    assert torch.load("out/model_final.pth")["classes"] == ["circle", "square", "triangle"]
    (name, file, images), *_ = literal_eval(options[options.index("DATASETS.COCO_INSTANCES") + 1])
    content = json.loads(Path(file).read_text())
    categories = content["categories"]
    for category, name in zip(categories, ("triangle", "circle", "square"), strict=True):
        category["name"] = name
    Path("turned.json").write_text(json.dumps(content))

    def evaluate(*opts):
        words = ["--eval-only", "--config-file", "quick/shapes_retinanet_ss.yaml", *options]
        words += ["MODEL.WEIGHTS", "out/model_final.pth", "MODEL.WEIGHTS_EXCEPT", "['head']"]
        words += ["DATASETS.TEST", "('tiny_val',)", "OUTPUT_DIR", "evaluated", *map(str, opts)]
        command_line._train_or_evaluate(Trainer, argument_parser().parse_args(words))

    turned = [["turned", "turned.json", images]]
    with pytest.raises(SystemExit, match="another order: from class 0 on, circle, square, tri"):
        evaluate("DATASETS.COCO_INSTANCES", turned, "DATASETS.TEST", ("turned",))
    torch.save({"model": {"head.cls_score.bias": torch.ones(27)}}, "part.pth")
    with pytest.raises(SystemExit, match="part.pth lacks .* tensors .backbone.*it is of another"):
        evaluate("MODEL.WEIGHTS", "part.pth")
    assert not Path("evaluated/eval_config.yaml").exists()
    evaluate()
    assert "tensors loaded, 0 excepted" in Path("evaluated/log.txt").read_text()
    assert read_config(Path("evaluated/eval_config.yaml"))["OUTPUT_DIR"] == "evaluated"


def test_a_run_is_not_resumed_from_weights_alone(prepare):
    trainer = Trainer(prepare("OUTPUT_DIR", "out"))
    FeedbackCheckpointer(trainer.model, "out").save("model_0000001", iteration=1)
    with pytest.raises(ValueError, match="holds weights, but no state of a training"):
        trainer.resume_or_load(resume=True)


def test_a_run_that_starts_anew_cannot_be_taken_for_the_one_before_it(prepare):
    prepare = partial(prepare, "OUTPUT_DIR", "out")
    evaluated = "DATASETS.TEST", ("tiny_val",), "TEST.EVAL_PERIOD", 2
    train(prepare("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, *evaluated))
    metrics = Path("out/metrics.json").read_text()
    assert "bbox/AP" in metrics
    left = {"config.yaml", "last_checkpoint", "inference", "metrics.json"}
    left |= {f"model_{name}.pth" for name in ("0000003", "best", "final")}

    weights = ["MODEL.WEIGHTS", "out/model_final.pth"]
    with pytest.raises(ValueError, match="give this run another OUTPUT_DIR, or go on .*--resume"):
        prepare(*weights)
    prepare(*weights, flags=["--resume"])
    prepare(*weights, "OUTPUT_DIR", "other")
    Path("out/eval_config.yaml").touch()

    trainer = Trainer(prepare("SOLVER.MAX_ITER", 2))
    trainer.resume_or_load(resume=False)
    assert left <= {path.name for path in Path("out").iterdir()}  # to look at weights moves none
    trainer.before_train = lambda: 1 / 0  # as if the run were killed there
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    archive = Path("out/earlier_run_1")
    assert {path.name for path in archive.iterdir()} == left | {"eval_config.yaml"}
    assert (archive / "metrics.json").read_text() == metrics
    again = Trainer(prepare("SOLVER.MAX_ITER", 2, flags=["--resume"]))
    again.resume_or_load(resume=True)
    assert again.start_iter == 0
    # What is reported of a shorter run without an evaluation has nothing of the longer one's.
    again.train()
    (row,) = read_metrics(Path("out/metrics.json"))
    assert row["iteration"] < 2 and "bbox/AP" not in row
    assert not Path("out/inference").exists()


# Checkpoints -------------------------------------------------------------------------------------


def checkpointer(folder: Path) -> FeedbackCheckpointer:
    return FeedbackCheckpointer(nn.Linear(1, 1), str(folder))


def test_only_a_better_model_replaces_the_best_one_after_a_resumption_too(tmp_path):
    state = {}
    for i, (value, best) in enumerate([(3.0, 0), (2.0, 0), (4.0, 2)]):  # each in another life
        hook = BestCheckpointer(1, checkpointer(tmp_path), "bbox/AP")
        hook.load_state_dict(state)
        hook.trainer = SimpleNamespace(max_iter=9, iter=i)
        with EventStorage(i) as hook.trainer.storage:
            hook.trainer.storage.put_scalar("bbox/AP", value)
            hook.after_step()
        state = hook.state_dict()
        assert torch.load(tmp_path / "model_best.pth")["iteration"] == best
        assert not hook._checkpointer.has_checkpoint()  # to resume from
    other = BestCheckpointer(1, hook._checkpointer, "classification/top1_error", "min")
    other.load_state_dict(state)  # of a run that was evaluated otherwise
    assert other.best_metric is None


@pytest.mark.parametrize(("keep", "left"), [(2, [59, "final"]), (3, [49, 59, "final"]), (0, None)])
def test_the_latest_checkpoints_are_kept_those_before_a_resumption_included(keep, left, tmp_path):
    def run(start: int, end: int) -> None:
        hook = PeriodicCheckpointer(checkpointer(tmp_path), 10, keep=keep)
        hook.trainer = SimpleNamespace(max_iter=60, gather_rank_states=list)
        hook.before_train()
        for hook.trainer.iter in range(start, end):
            hook.after_step()

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("model_*.pth"))

    checkpointer(tmp_path).save("model_best")
    run(0, 40)
    assert keep != 2 or names() == ["model_0000029.pth", "model_0000039.pth", "model_best.pth"]
    (tmp_path / "model_0000039.pth").write_bytes(b"")  # the run goes on from the one before
    assert checkpointer(tmp_path).resume_or_load("")["iteration"] == 29
    run(30, 50)
    assert checkpointer(tmp_path).resume_or_load("")["iteration"] == 49
    run(50, 60)
    left = left or [*range(9, 60, 10), "final"]
    assert names() == sorted(
        ["model_best.pth", *(f"model_{f'{i:07d}' if i != 'final' else i}.pth" for i in left)]
    )
