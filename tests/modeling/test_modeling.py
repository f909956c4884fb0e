import copy
import os
import subprocess
import sys

import pytest
import torch
from core_utils import assert_same
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.solver import build_optimizer
from modeling_utils import (
    CPU,
    NARROW,
    SLIM,
    assert_error_flows_through_feedback,
    gradients,
    layers,
    load_config,
    losses,
    make_batch,
    predictions,
    rules,
    stock_layers,
)
from torch import nn

from ss_detectron import advance_feedback, backpropagation
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.export import plain_config
from ss_detectron.modeling import RETINANET_HEAD_REGISTRY

SS, FA, BP = "sign_symmetry", "feedback_alignment", "backpropagation"
LAST = {"head.cls_score", "head.bbox_pred"}
FROZEN = ("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")
FIRST = {"backbone.bottom_up.res3.0.conv1", "backbone.bottom_up.res3.0.shortcut"}
CONFIG = "retinanet_R_18_ss.yaml"
STOCK = [
    "MODEL.META_ARCHITECTURE",
    "RetinaNet",
    "MODEL.BACKBONE.NAME",
    "build_retinanet_resnet_fpn_backbone",
]


def small(rule, *options):
    """RetinaNet on a slim ResNet-50, stem and res2 frozen, narrow behind the backbone."""
    boxes = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 50]
    return load_config(CONFIG, *NARROW, *SLIM, *boxes, "MODEL.FEEDBACK.RULE", rule, *options)


def build(rule, *options):
    return build_model(small(rule, *options))


def with_norms_that_act(model):
    """A fresh FrozenBatchNorm2d does nothing at all; makes each do something."""
    for norm in (m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def stock():
    """Detectron2's own RetinaNet; read only."""
    torch.manual_seed(1)
    return with_norms_that_act(build_model(small("", *STOCK)))


def with_weights_of(model, stock):
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(key.rpartition(".")[2].startswith("feedback") for key in missing)
    return model


# Builders


@pytest.mark.parametrize(
    "kind, rule, expected",
    [("ss", "", SS), ("fa", "fa", FA), ("feedback", "kp", "kolen_pollack")],
)
@pytest.mark.parametrize("net", ["resnet", "resnet_fpn", "retinanet_resnet_fpn", "cifar_resnet"])
def test_builder_gives_the_stock_backbone_on_its_rule(net, kind, rule, expected):
    cfg = small(rule, "MODEL.BACKBONE.NAME", f"build_{net}_backbone")
    if net == "cifar_resnet":
        cfg.MODEL.RESNETS.DEPTH = 18
    stock = with_norms_that_act(build_backbone(cfg))
    cfg.MODEL.BACKBONE.NAME = f"build_{kind}_{net}_backbone"
    converted = build_backbone(cfg)

    assert type(converted) is type(stock)
    assert set(rules(converted).values()) == {expected}
    assert list(rules(converted)) == list(layers(stock))
    with_weights_of(converted, stock)
    image = torch.randn(1, 3, 64, 64)
    assert_same(converted(image), stock(image))


def test_scale_gain_and_seed_reach_every_layer():
    model = build(FA, "MODEL.FEEDBACK.SCALE", "rms", "MODEL.FEEDBACK.GAIN", 0.5)
    other = build(FA, "MODEL.FEEDBACK.SEED", 1)
    for name, layer in layers(model).items():
        if name in LAST:
            continue
        size = layer.weight.square().mean().sqrt().item()
        assert layer.feedback_weight.std().item() == pytest.approx(0.5 * size, rel=0.1)
        b, c = layer.feedback_weight.flatten(), layers(other)[name].feedback_weight.flatten()
        assert abs(torch.corrcoef(torch.stack([b, c]))[0, 1]) < 6 / len(b) ** 0.5


@pytest.mark.parametrize(
    "name, rule, message",
    [
        ("build_ss_resnet_fpn_backbone", "fa", "build_ss_resnet_fpn_backbone.*sign_symm.*'fa'"),
        ("build_fa_resnet_backbone", SS, "build_fa_resnet_backbone.*feedback_align.*sign_symm"),
        ("build_ss_resnet_backbone", "bp", "build_ss_resnet_backbone.*sign_symmetry.*'bp'"),
        ("build_feedback_resnet_backbone", "", "build_feedback_resnet_backbone needs.*RULE"),
        ("build_feedback_resnet_backbone", "sgn", "'sgn'.*sign_symmetry"),
        ("FARetinaNetHead", "ss", "FARetinaNetHead.*feedback_alignment.*'ss'"),
        ("FeedbackRetinaNetHead", "", "FeedbackRetinaNetHead needs .*FEEDBACK.RULE"),
    ],
)
def test_a_rule_that_is_missing_unknown_or_not_its_own_is_refused(name, rule, message):
    key = "MODEL.RETINANET.HEAD" if name.endswith("Head") else "MODEL.BACKBONE.NAME"
    with pytest.raises(ValueError, match=message):
        build(rule, *STOCK[2:], key, name)


@pytest.mark.parametrize(
    "options",
    [
        ["MODEL.BACKBONE.NAME", "build_ss_resnet_backbone"],
        [*STOCK[2:], "MODEL.META_ARCHITECTURE", "FeedbackRetinaNet"],
    ],
)
def test_config_without_our_keys_is_refused_by_name(options):
    cfg, features = get_cfg(), ["res3", "res4", "res5"]
    cfg.merge_from_list([*CPU, "MODEL.RESNETS.OUT_FEATURES", features, *options])
    cfg.MODEL.FPN.IN_FEATURES = features
    with pytest.raises(ValueError, match="add_ss_config"):
        build_model(cfg)


# The whole of RetinaNet


@pytest.mark.parametrize("rule, last", [("ss", "bp"), ("fa", "ss"), ("brsf", "ss"), ("kp", "fa")])
def test_every_convolution_sends_its_error_through_its_feedback(rule, last):
    model = build(rule, "MODEL.FEEDBACK.LAST_LAYER_RULE", last)
    uses = assert_error_flows_through_feedback(model, FIRST)
    assert set(uses) == {name for name in layers(model) if not name.startswith(FROZEN)}
    assert {"backbone.fpn_lateral3", "backbone.fpn_output5", "backbone.top_block.p7"} < set(uses)
    levels = 5
    for name, nodes in uses.items():
        assert len(nodes) == (levels if name.startswith("head.") else 1)
    assert stock_layers(model, uses) == FIRST | (LAST if last == "bp" else set())


@pytest.mark.parametrize("rule", [SS, FA])
def test_losses_and_predictions_are_the_stock_models_bit_for_bit(stock, rule):
    model = with_weights_of(build(rule), stock)
    assert_same(losses(model), losses(stock))
    found = predictions(model)
    assert len(found[0]) > 0
    assert_same(found, predictions(stock))


@pytest.mark.parametrize("rule, suspended", [("bp", False), ("ss", True), ("brsf", True)])
def test_backpropagation_gives_the_stock_models_gradients_bit_for_bit(stock, rule, suspended):
    model = with_weights_of(build(rule), stock)
    expected = gradients(stock)
    if suspended:
        with backpropagation(model):
            assert_same(gradients(model), expected)
    else:
        assert_same(gradients(model), expected)
    if rule != "bp":
        lateral = "backbone.fpn_lateral3.weight"
        assert not torch.equal(gradients(model)[lateral], expected[lateral])


# Heads


@pytest.mark.parametrize(
    "head, rule, last, expected",
    [
        ("RetinaNetHead", "ss", "ss", (BP, BP)),
        ("SSRetinaNetHead", "", "bp", (SS, BP)),
        ("SSRetinaNetHead", "ss", "ss", (SS, SS)),
        ("FARetinaNetHead", "", "ss", (FA, SS)),
        ("FeedbackRetinaNetHead", "frsf", "fa", ("sign_symmetry_fixed_magnitude", FA)),
    ],
)
def test_head_has_its_rule_and_its_last_layers_theirs(head, rule, last, expected):
    cfg = small(rule, "MODEL.RETINANET.HEAD", head, "MODEL.FEEDBACK.LAST_LAYER_RULE", last)
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    head = build_model(cfg).head
    learns = rules(head)
    assert (learns["cls_score"], learns["bbox_pred"]) == (expected[1], expected[1])
    towers = [rule for name, rule in learns.items() if "subnet" in name]
    assert towers == [expected[0]] * 8


def test_ones_own_head_by_its_registered_name(monkeypatch):
    class OneTowerHead(RetinaNetHead):
        pass

    monkeypatch.setitem(RETINANET_HEAD_REGISTRY._obj_map, "OneTowerHead", OneTowerHead)
    assert type(build(SS, "MODEL.RETINANET.HEAD", "OneTowerHead").head) is OneTowerHead
    with pytest.raises(KeyError, match="NoSuchHead"):
        build(SS, "MODEL.RETINANET.HEAD", "NoSuchHead")


def test_exclude_speaks_of_names_in_the_whole_model():
    exclude = ["backbone.fpn_*", "head.cls_subnet", "*.res5.*"]
    model = build(SS, "MODEL.FEEDBACK.EXCLUDE", exclude)
    stays = {n for n in layers(model) if n.startswith(("backbone.fpn_", "head.cls_subnet."))}
    stays |= LAST | {n for n in layers(model) if ".res5." in n}
    assert {name for name, rule in rules(model).items() if rule == BP} == stays
    assert {type(layers(model)[name]) for name in stays} == {Conv2d, nn.Conv2d}
    uses = assert_error_flows_through_feedback(model, FIRST)
    assert stock_layers(model, uses) - FIRST == stays
    with pytest.raises(ValueError, match="'fpn_.*' of .* matches no layer of Feedback"):
        build(SS, "MODEL.FEEDBACK.EXCLUDE", ["backbone.fpn_*", "fpn_*"])


# A training step


@pytest.mark.parametrize("rule", ["fa", "brsf", "kp"])
def test_a_step_changes_what_learns_and_nothing_else(rule):
    cfg = small(rule)
    cfg.SOLVER.WEIGHT_DECAY = 0.1
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(FROZEN), name
    norms = [m for m in model.backbone.bottom_up.modules() if "Norm" in type(m).__name__]
    assert norms and all(type(m) is FrozenBatchNorm2d for m in norms)

    optimizer = build_optimizer(cfg, model)
    before = copy.deepcopy(model.state_dict())
    sum(losses(model).values()).backward()
    optimizer.step()
    advance_feedback(model)
    after = model.state_dict()
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # What learns, or counts, by an update of its own.
    counting = {key for key in before if key.endswith("feedback_updates")}
    learns |= counting | {key.replace("_updates", "_weight") for key in counting} & before.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == learns


# Checkpoints


STOCK_PREDICTION = """
import sys
sys.modules["ss_detectron"] = None  # any import of it fails
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
torch.set_num_threads(int(sys.argv[1]))
cfg = get_cfg()
cfg.merge_from_file("stock.yaml")
batch = torch.load("batch.pt")
for name in sys.argv[2:]:
    model = build_model(cfg)
    DetectionCheckpointer(model).load(name + ".pth")
    model.eval()
    with torch.no_grad():
        found = [output["instances"] for output in model(batch)]
    torch.save(
        [t for i in found for t in (i.pred_boxes.tensor, i.scores, i.pred_classes)], name + ".pt"
    )
"""


def test_checkpoint_of_any_rule_predicts_the_same_in_plain_detectron2(tmp_path):
    (tmp_path / "stock.yaml").write_text(plain_config(small("ss", *STOCK)).dump())
    torch.save([{"image": item["image"]} for item in make_batch()], tmp_path / "batch.pt")

    expected = {}
    for rule in ("ss", "fa", "kp", "brsf"):
        cfg = small(rule)
        model = build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        sum(losses(model).values()).backward()
        optimizer.step()
        expected[rule] = predictions(model)
        assert len(expected[rule][0]) > 0
        FeedbackCheckpointer(model, str(tmp_path)).save(rule)
        content = torch.load(tmp_path / f"{rule}.pth", weights_only=True)
        saved = {name: saved.partition("(")[0] for name, saved in content["feedback"].items()}
        assert saved == rules(model)

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK_PREDICTION, str(torch.get_num_threads()), *expected]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    for rule, boxes in expected.items():
        assert_same(torch.load(tmp_path / f"{rule}.pt"), boxes)
