import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from modeling_utils import load_config, rules

from ss_detectron import add_ss_config, build_learner, find_config
from ss_detectron.config import check_config, flatten_config, merge_config_file
from ss_detectron.layers import AsymmetricLayer, get_rule
from ss_detectron.learners import LEARNER_REGISTRY
from ss_detectron.solver.schedule import schedule_in_epochs

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
RULES = {"bp": "backpropagation", "ss": "sign_symmetry", "fa": "feedback_alignment"}
# The comparisons of Bartunov et al. (2018), with learners beside rules; "parallel" is a variant.
CHAINS = dict.fromkeys(
    ["mnist_fc", "mnist_lc", "cifar10_fc", "cifar10_lc"],
    ["bp", "fa", "dfa", "dtp", "dtp_parallel", "sdtp", "aosdtp"],
) | {"imagenet_lc": ["bp", "fa", "dfa", "dtp", "sdtp", "aosdtp"]}
# BioTorch's benchmarks, with the last layer on the rule.
BENCHMARKS = dict.fromkeys(
    ["mnist_lenet", "fashion_mnist_lenet", "cifar10_lenet", "cifar10_resnet20"],
    ["bp", "ss", "frsf", "brsf", "fa", "dfa", "kp"],
)
COMPARISONS = CHAINS | BENCHMARKS
EXPERIMENTS = sorted({n.removesuffix("_bp.yaml") for n in NAMES if n.endswith("_bp.yaml")})
EXPERIMENTS = [name for name in EXPERIMENTS if name not in COMPARISONS]
KINDS = dict.fromkeys(EXPERIMENTS, RULES) | {"bccd_retinanet": RULES | {"kp": "kolen_pollack"}}
LAST_LAYERS = [name for name in NAMES if name.endswith("_lastlayer.yaml")]
CLASSIFIER_OF = {"retinanet_R_18": "imagenet_resnet18", "retinanet_R_50": "imagenet_resnet50"}


def config(name: str = "") -> CfgNode:
    cfg = get_cfg()
    add_ss_config(cfg)
    if name:
        cfg.merge_from_file(find_config(name))
    return cfg


def differing(a: CfgNode, b: CfgNode) -> set[str]:
    a, b = flatten_config(a), flatten_config(b)
    absent = object()
    return {key for key in a | b if a.get(key, absent) != b.get(key, absent)}


@pytest.mark.parametrize("name", NAMES)
def test_config_is_found_from_any_folder_and_is_safe_yaml_with_known_keys(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cfg, again = config(), config()
    found = merge_config_file(cfg, name)
    assert os.path.isabs(found) and os.path.samefile(found, CONFIGS / name)
    # What a run dumps into its output folder loads again, to the same.
    cfg.merge_from_list(["DATASETS.COCO_INSTANCES", "(('a', 'b', 'c'),)"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    merge_config_file(again, "config.yaml")
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_every_config_is_a_base_a_sibling_or_a_last_layer_variant():
    siblings = {f"{name}_{kind}.yaml" for name in EXPERIMENTS for kind in KINDS[name]}
    siblings |= {f"{name}_{kind}.yaml" for name in COMPARISONS for kind in COMPARISONS[name]}
    bases = {name for name in NAMES if "Base-" in name}
    assert set(NAMES) == siblings | bases | set(LAST_LAYERS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_siblings_differ_in_the_rule_and_its_tuning_alone(experiment):
    siblings = {kind: config(f"{experiment}_{kind}.yaml") for kind in KINDS[experiment]}
    allowed = {"OUTPUT_DIR"} | ({"SOLVER.BASE_LR"} if "imagenet" in experiment else set())
    allowed |= {f"MODEL.FEEDBACK.{key}" for key in ("RULE", "SCALE", "GAIN")}
    if "_R_" in experiment:  # whose backbone was trained by the same rule
        allowed.add("MODEL.WEIGHTS")
        for kind, cfg in siblings.items():
            classifier = config(f"{CLASSIFIER_OF[experiment]}_{kind}.yaml")
            assert f"{classifier.OUTPUT_DIR}/model_final.pth" == cfg.MODEL.WEIGHTS
            # What a checkpoint does not show: the images and the strides it was trained with.
            same = {"MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.RESNETS.DEPTH"}
            if cfg.MODEL.RESNETS.DEPTH >= 50:
                same.add("MODEL.RESNETS.STRIDE_IN_1X1")
            assert not differing(cfg, classifier) & same
    for kind, cfg in siblings.items():
        assert KINDS[experiment][kind] == cfg.MODEL.FEEDBACK.RULE
        assert f"./output/{Path(experiment).name}_{kind}" == cfg.OUTPUT_DIR
        assert differing(cfg, siblings["bp"]) <= allowed


@pytest.mark.parametrize("experiment", COMPARISONS)
def test_comparisons_differ_in_rule_and_learner_alone(experiment):
    plain = config(f"{experiment}_bp.yaml")
    for kind in COMPARISONS[experiment]:
        cfg = config(f"{experiment}_{kind}.yaml")
        allowed = {key for key in flatten_config(cfg) if key.startswith("MODEL.LEARNER.")}
        allowed |= {"OUTPUT_DIR", "MODEL.FEEDBACK.RULE"}
        feedback, learner = cfg.MODEL.FEEDBACK, cfg.MODEL.LEARNER
        if experiment in BENCHMARKS:
            allowed |= {"MODEL.FEEDBACK.LAST_LAYER_RULE", "SOLVER.BASE_LR"}
            assert feedback.LAST_LAYER_RULE == feedback.RULE
        assert differing(cfg, plain) <= allowed
        assert f"./output/{experiment}_{kind}" == cfg.OUTPUT_DIR
        kind = kind.removesuffix("_parallel")
        methods = {get_rule(feedback.RULE), LEARNER_REGISTRY.get(learner.NAME)}
        assert kind in {method.short_name for method in methods}
        if kind != "bp":  # one is changed, not both
            assert "bp" in {method.short_name for method in methods}


# A step of ImageNet's locally connected network takes gigabytes; CIFAR-10's takes seconds.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"{name}_{kind}", marks=pytest.mark.slow if name == "cifar10_lc" else ())
        for name in COMPARISONS
        if name != "imagenet_lc"
        for kind in COMPARISONS[name]
    ],
)
def test_a_step_of_a_comparison_trains_every_parameter(name):
    cfg = load_config(f"{name}.yaml")
    trained = build_learner(cfg, build_model(cfg)).train()
    shape = (2, len(cfg.MODEL.PIXEL_MEAN), *[cfg.INPUT.CLASSIFICATION.SIZE] * 2)
    batch = {"image": torch.randint(0, 256, shape).byte(), "label": torch.tensor([3, 7])}
    trained.backward(trained(batch)["loss_cls"], target=batch["label"])
    alternating = cfg.MODEL.LEARNER.SCHEDULE == "alternating"  # begins with the inverses
    learning = (trained.inverses if alternating else trained).parameters()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in learning)


def test_backpropagation_is_the_model_zoos_retinanet_in_every_other_key():
    zoo = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    ours = config("retinanet_bp.yaml")
    changed = {
        "MODEL.BACKBONE.NAME",
        "MODEL.META_ARCHITECTURE",
        "MODEL.FEEDBACK.RULE",
        "OUTPUT_DIR",
        "SOLVER.REFERENCE_WORLD_SIZE",
        "MODEL.RETINANET.HEAD",
        "MODEL.TRUSTED_WEIGHTS",
    }
    # The other keys of this package have their defaults.
    defaults = config()
    added = differing(defaults, get_cfg())
    assert differing(ours, zoo) == changed | added
    assert not differing(ours, defaults) & (added - changed)
    assert ours.MODEL.TRUSTED_WEIGHTS == [zoo.MODEL.WEIGHTS]


# Siblings differ in the rule alone, so that one of them stands for all.


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_model_of_config_has_every_layer_on_its_rule(experiment):
    cfg = load_config(f"{experiment}_ss.yaml")
    model = build_model(cfg)
    retinanet = "retinanet" in experiment
    last = ("head.cls_score", "head.bbox_pred") if retinanet else ("linear",)
    expected = dict.fromkeys(rules(model), RULES["ss"]) | dict.fromkeys(last, RULES["bp"])
    assert rules(model) == expected
    if retinanet:
        depth = {18: 17 + 3, 50: 49 + 4}[cfg.MODEL.RESNETS.DEPTH]  # with the shortcuts
        pyramid, head = 2 * 3 + 2, 2 * 4 + 2
        assert len(expected) == depth + pyramid + head
    else:
        images = torch.randint(0, 256, (2, 3, *[cfg.INPUT.CLASSIFICATION.SIZE] * 2)).byte()
        model({"image": images, "label": torch.tensor([3, 7])})["loss_cls"].backward()
        for name, p in model.named_parameters():
            assert p.grad.isfinite().all() and p.grad.any(), f"{name} does not learn"
    scratch = not config(f"{experiment}_ss.yaml").MODEL.WEIGHTS
    assert scratch == (experiment != "retinanet" and "_R_" not in experiment)
    if scratch:
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
        assert cfg.MODEL.PIXEL_STD != get_cfg().MODEL.PIXEL_STD


@pytest.mark.parametrize("name", LAST_LAYERS)
def test_last_layer_variant_differs_in_the_last_layers_rule_alone(name):
    cfg, sibling = config(name), config(name.replace("_lastlayer", ""))
    assert cfg.MODEL.FEEDBACK.LAST_LAYER_RULE == sibling.MODEL.FEEDBACK.RULE
    assert differing(cfg, sibling) == {"MODEL.FEEDBACK.LAST_LAYER_RULE", "OUTPUT_DIR"}
    assert f"./output/{name.removesuffix('.yaml')}" == cfg.OUTPUT_DIR


# Of classification: learning rates, weight decay, preparation of images, and means and deviations
# of pixels from 0 to 1 in common use.
PUBLISHED = {
    "imagenet_resnet18": ({"bp": 0.1, "ss": 0.05, "fa": 0.05}, 1e-4, "resized_crop", 224),
    "imagenet_alexnet": (dict.fromkeys(RULES, 0.01), 5e-4, "resized_crop", 224),
    "cifar10_resnet18": (dict.fromkeys(RULES, 0.1), 1e-4, "pad_crop", 32),
}
PIXELS = {
    "imagenet": (1_281_167, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": (50_000, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_published_settings(experiment):
    rates, weight_decay, transform, size = PUBLISHED[experiment]
    images, mean, std = PIXELS[experiment.partition("_")[0]]
    for kind, rate in rates.items():
        cfg = config(f"{experiment}_{kind}.yaml")
        solver, options = cfg.SOLVER, cfg.INPUT.CLASSIFICATION
        assert (rate, 0.9, 0.1) == (solver.BASE_LR, solver.MOMENTUM, solver.GAMMA)
        assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == weight_decay
        assert (solver.IMS_PER_BATCH, solver.OPTIMIZER, solver.WARMUP_ITERS) == (256, "SGD", 0)
        # The magnitudes of the authors' code, and an evaluation after every epoch.
        assert (cfg.MODEL.FEEDBACK.SCALE, cfg.MODEL.FEEDBACK.GAIN) == ("kaiming", 1)
        assert pytest.approx(images / 256, abs=0.6) == cfg.TEST.EVAL_PERIOD
        epochs = [step * 256 / images for step in (*solver.STEPS, solver.MAX_ITER)]
        assert epochs == pytest.approx([10, 20, 30, 40, 50], abs=0.6 * 256 / images)
        assert (transform, size, 256, 4) == tuple(
            options[key] for key in ("TRANSFORM", "SIZE", "RESIZE", "PAD")
        )
        assert (cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP) == ("RGB", "horizontal")
        assert pytest.approx([255 * m for m in mean]) == cfg.MODEL.PIXEL_MEAN
        assert pytest.approx([255 * s for s in std]) == cfg.MODEL.PIXEL_STD


LENET_RATES = {"bp": 0.03, "ss": 0.03, "kp": 0.003, "fa": 0.003, "dfa": 0.001}


@pytest.mark.parametrize(
    "experiment, images, batch, decay, epochs, rates",
    [
        ("mnist_fc", 60_000, 128, 0, [100], {"bp": 3e-4}),
        ("mnist_lc", 60_000, 128, 0, [100], {"bp": 1e-3}),
        ("cifar10_fc", 50_000, 128, 0, [100], {"bp": 3e-4}),
        ("cifar10_lc", 50_000, 128, 0, [100], {"bp": 3e-4}),
        ("imagenet_lc", 1_281_167, 256, 0, [50], {"bp": 3e-4}),
        ("mnist_lenet", 60_000, 64, 1e-3, [50, 75, 100], LENET_RATES),
        ("fashion_mnist_lenet", 60_000, 64, 1e-3, [50, 75, 100], LENET_RATES),
        ("cifar10_lenet", 50_000, 128, 1e-4, [100, 150, 200, 250], {"fa": 1e-3, "dfa": 1e-4}),
        ("cifar10_resnet20", 50_000, 128, 1e-4, [100, 150, 200, 250], {"fa": 0.1, "dfa": 1e-3}),
    ],
)
def test_settings_of_comparisons(experiment, images, batch, decay, epochs, rates):
    cfg = config(f"{experiment}_bp.yaml")
    solver = cfg.SOLVER
    assert (batch, 0) == (solver.IMS_PER_BATCH, solver.WARMUP_ITERS)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == decay
    assert (cfg.MODEL.FEEDBACK.SCALE, cfg.MODEL.FEEDBACK.GAIN) == ("xavier", 1)
    # The iterations that the file has beside the epochs are those of the epochs.
    expected = [round(epoch * images / batch) for epoch in epochs]
    for form in (cfg, schedule_in_epochs(cfg, images)):
        steps = [*form.SOLVER.STEPS, form.SOLVER.MAX_ITER]
        assert steps == pytest.approx(expected, abs=1)
        assert round(images / batch) == form.TEST.EVAL_PERIOD
    for kind, rate in rates.items():
        assert rate == config(f"{experiment}_{kind}.yaml").SOLVER.BASE_LR
    alternating = [f"{experiment}_{kind}.yaml" for kind in COMPARISONS[experiment] if "tp" in kind]
    for learner in (config(name).MODEL.LEARNER for name in alternating):
        assert (cfg.TEST.EVAL_PERIOD if learner.SCHEDULE == "alternating" else 0) == learner.PERIOD


def test_one_key_puts_jpeg_files_in_the_place_of_cifar10():
    for kind in ("fc_dtp", "lenet_ss", "resnet20_bp", "resnet18_fa"):
        cfg = config(f"cifar10_{kind}.yaml")
        cfg.merge_from_list(["DATASETS.CIFAR10_JPEG", "True"])
        assert cfg.DATASETS.TRAIN == ("cifar10_jpeg_train",)
        assert cfg.DATASETS.TEST == ("cifar10_jpeg_test",)
        again = config()
        again.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))  # as of a run's config.yaml
        assert again.DATASETS == cfg.DATASETS


def test_shapes_are_not_flipped_as_left_and_right_are_classes():
    assert config("quick/shapes_resnet18_ss.yaml").INPUT.RANDOM_FLIP == "none"


# Keys and values


@pytest.mark.parametrize("read", [CfgNode.merge_from_file, merge_config_file])
@pytest.mark.parametrize(
    "mine, base, words",
    [
        ("SKIP_NOT_FINITE: 3", "BASE_LR: 1.0", ()),
        ("BASE_LR: 1.0", "SKIP_NOT_FINITE: 3", ()),
        # What stands nearer to the run holds, under whichever name.
        ("SKIP_NOT_FINITE: 3", "MAX_SKIPPED_STEPS: 2", ()),
        ("MAX_SKIPPED_STEPS: 3", "SKIP_NOT_FINITE: 2", ()),
        ("BASE_LR: 1.0", "MAX_SKIPPED_STEPS: 2", ("SOLVER.SKIP_NOT_FINITE", "3")),
    ],
)
def test_a_renamed_key_is_read(read, mine, base, words, tmp_path, caplog):
    (tmp_path / "my.yaml").write_text(f"_BASE_: base.yaml\nSOLVER: {{{mine}, COMPILED: True}}")
    (tmp_path / "base.yaml").write_text(f"SOLVER: {{{base}}}")
    cfg = pickle.loads(pickle.dumps(config("quick/shapes_retinanet_ss.yaml").clone()))
    read(cfg, str(tmp_path / "my.yaml"))
    cfg.merge_from_list([*words, "SOLVER.COMPILED", "True"])
    assert cfg.SOLVER.MAX_SKIPPED_STEPS == 3
    assert "SKIP_NOT_FINITE" not in cfg.dump()
    assert "SOLVER.SKIP_NOT_FINITE is now called SOLVER.MAX_SKIPPED_STEPS" in caplog.text
    # A key that was removed is named and ignored.
    assert "COMPILED" not in cfg.SOLVER and caplog.text.count("SOLVER.COMPILED") == 2


def test_keys_that_are_there_are_left_as_they_are():
    cfg = config("quick/shapes_retinanet_ss.yaml")
    before = cfg.dump()
    add_ss_config(cfg)
    assert cfg.dump() == before


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.BASE_LR", None),  # Detectron2's, which lets it pass
        ("MODEL.FEEDBACK.GAIN", None),
        ("MODEL.FEEDBACK.EXCLUDE", [3]),
        ("OUTPUT_DIR", ""),
        ("SOLVER.ACCUMULATION_STEPS", 0),
        ("MODEL.DEVICE", "gpu"),
        ("SOLVER.EPOCHS", -1),
        ("SOLVER.STEP_EPOCHS", [8, 3]),
        ("SOLVER.STEP_EPOCHS", ["8"]),
        ("SOLVER.STEPS", [2, 1]),
        ("SOLVER.STEPS", [2, 2]),
        ("SOLVER.MAX_ITER", 320),  # the config's STEPS
        ("DATALOADER.NUM_WORKERS", -1),
    ],
)
def test_a_value_that_would_fail_in_silence_or_late_is_named(key, value):
    cfg = config("quick/shapes_retinanet_ss.yaml")
    check_config(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=rf"^{key} is {re.escape(repr(value))}"):
        check_config(cfg)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            "SOLVER.MAX_ITER=4",
            "SOLVER.MAX_ITER=4: options are pairs KEY VALUE, .*: SOLVER.MAX_ITER 4",
        ),
        ("SEED 1 SOLVER.MAX_ITER", "SOLVER.MAX_ITER has no value"),
        ("solver.max_iter 4", r"no key solver.max_iter; did you mean SOLVER.MAX_ITER\?"),
        ("SOLVER.MAX_ITR 4", r"no key SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER\?"),
        ("MAX_ITER 4", r"did you mean SOLVER.MAX_ITER\?"),
        ("MODEL.NUM_CLASSES 4", "did you mean .*MODEL.RETINANET.NUM_CLASSES"),
        ("NOTHING_LIKE_IT 4", "no key NOTHING_LIKE_IT$"),
        ("DATASETS.TRAIN my_train", r"""DATASETS.TRAIN is 'my_train'; .*"\('my_train',\)"$"""),
        ("SOLVER.STEPS 5", r"""SOLVER.STEPS is '5'; .*"\(5,\)"$"""),
        ("SOLVER.BASE_LR 1", "SOLVER.BASE_LR is '1'; .* type float, such as 1.0$"),
        ("SOLVER.MAX_ITER many", "SOLVER.MAX_ITER is 'many'; .* type int, such as 40000$"),
        ("DATASETS.COCO_INSTANCES ('a','b','c'", "COCO_INSTANCES is .* look at its brackets"),
        ("SOLVER 3", "SOLVER is a group of keys, not '3'"),
    ],
)
def test_keys_and_values_that_do_not_fit_are_refused_with_the_remedy(words, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        config().merge_from_list(words.split())
    *groups, key = words.split()[0].split(".")
    if words.count(" ") == 1:  # the same in a file
        content = {key: yaml.safe_load(words.split()[1])}
        for group in reversed(groups):
            content = {group: content}
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match="does not fit: .*" if groups else "does not fit"):
            merge_config_file(config(), str(tmp_path / "my.yaml"))


def test_a_batch_that_the_reference_does_not_divide_says_how_scaling_is_switched_off():
    cfg = config("retinanet_ss.yaml")
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", "2"])
    with pytest.raises(
        ValueError, match="IMS_PER_BATCH is 2, .* Set SOLVER.REFERENCE_WORLD_SIZE 0"
    ):
        check_config(cfg)
    cfg.merge_from_list(["SOLVER.REFERENCE_WORLD_SIZE", "0"])
    check_config(cfg)


@pytest.mark.parametrize("seed, own, expected", [(-1, -1, 0), (7, -1, 7), (7, 0, 0), (-1, 3, 3)])
def test_feedback_is_drawn_by_the_runs_seed(seed, own, expected):
    words = "SEED", seed, "MODEL.FEEDBACK.SEED", own
    cfg = load_config("quick/shapes_resnet18_fa.yaml", *words)
    seeds = {m.rule.seed for m in build_model(cfg).modules() if isinstance(m, AsymmetricLayer)}
    assert seeds == {expected}


# find_config


@pytest.mark.parametrize(
    "name, near",
    [
        ("retinanet_sss.yaml", "retinanet_ss.yaml"),
        ("configs/retinanet_scratch_bp.yaml", "retinanet_scratch_bp.yaml"),
        ("quick", "quick/shapes_retinanet_bp.yaml"),  # a folder; like none, so all are named
    ],
)
def test_missing_config_names_those_that_are_like_it(name, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find_config(name)
    said = str(error.value)
    assert repr(name) in said and str(tmp_path) in said
    assert near in said.rpartition("did you mean ")[2].rstrip("?").split(", ")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("retinanet_ss.yaml").write_text("VERSION: 2")
    assert os.path.samefile(find_config("retinanet_ss.yaml"), tmp_path / "retinanet_ss.yaml")
