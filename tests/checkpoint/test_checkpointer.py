"""Weights that travel: from a classifier, torchvision, stock Detectron2 and older runs."""

import copy
import logging
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from core_utils import assert_same
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from modeling_utils import classifier, detector, layers, load_config, resnet
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

from ss_detectron import convert_feedback
from ss_detectron.checkpoint import FeedbackCheckpointer

INSIDE = "backbone.bottom_up."
R18, R50 = resnet(18, 64), resnet(50)


def with_statistics(model):
    """Norms that do something, and not the same twice, as after training."""
    for norm in (m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def save(model, folder, name="saved"):
    FeedbackCheckpointer(model, str(folder)).save(name)
    return str(folder / f"{name}.pth")


def load(model, path, **kwargs):
    FeedbackCheckpointer(model, **kwargs).resume_or_load(str(path), resume=False)
    return model


def tensors(module):
    """A copy of what a checkpoint holds of it, without the counters of batches."""
    state = copy.deepcopy(dict(module.state_dict()))
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


@pytest.fixture
def log(caplog):
    """Returns the messages of warnings; those of a run's files are elsewhere."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# From a classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ss", "frsf", "brsf", "kp"])
def test_a_classifiers_backbone_travels_bit_for_bit_with_its_feedback(rule, tmp_path, log):
    source, target = with_statistics(classifier(rule)), detector(rule)
    learned = [p for p in source.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.01)
    image = torch.randn(2, 3, 64, 64)
    source.train()({"image": image, "label": torch.tensor([1, 2])})["loss_cls"].backward()
    optimizer.step()

    bottom_up, rest = target.backbone.bottom_up, tensors(target)
    load(target, save(source, tmp_path))
    assert_same(tensors(bottom_up), tensors(source.backbone))
    kept = [name for name in rest if not name.startswith(INSIDE)]
    assert_same({n: tensors(target)[n] for n in kept}, {n: rest[n] for n in kept})
    with torch.no_grad():
        features = source.eval().backbone(image)["res5"]
        assert_same(target.eval().backbone.bottom_up(image)["res5"], features)
    missing, unexpected = log()
    assert "fpn_output3" in missing and "head.cls_score" in missing and "bottom_up" not in missing
    assert "linear" in unexpected and "backbone" not in unexpected


def test_names_that_fit_already_stay(tmp_path, log):
    source, target = detector("fa"), detector("fa")
    with torch.no_grad():
        source.backbone.fpn_output3.bias.fill_(3)
    load(target, save(source, tmp_path))
    assert_same(tensors(target), tensors(source))
    assert not log()
    # The same of a part that holds nothing of the ResNet.
    part = {n: v for n, v in source.state_dict().items() if n.startswith("backbone.fpn")}
    torch.save({"model": part}, tmp_path / "part.pth")
    with torch.no_grad():
        target.backbone.fpn_output3.bias.zero_()
    load(target, tmp_path / "part.pth")
    assert_same({name: tensors(target)[name] for name in part}, part)


@pytest.mark.parametrize("norms", [("BN", "FrozenBN"), ("FrozenBN", "BN")])
def test_statistics_travel_between_kinds_of_batch_norm_and_are_not_made_up(norms, tmp_path, log):
    source, target = (classifier("bp", "MODEL.RESNETS.NORM", norm) for norm in norms)
    path = save(with_statistics(source), tmp_path)
    load(target, path)
    assert_same(tensors(target), tensors(source))
    assert not log()
    content = torch.load(path)
    del content["model"]["backbone.res2.0.conv1.norm.running_mean"]
    torch.save(content, path)
    load(target, path)
    assert "backbone.res2.0.conv1.norm.running_mean" in log()[-1]


# From torchvision, and other trainers -------------------------------------------------------------


def save_as(content, folder):
    torch.save(content, folder / "saved.pth")
    return folder / "saved.pth"


def torchvision_resnet(depth, folder, wrap=lambda model: model):
    """A random one, and the file that holds its weights."""
    model = with_statistics(getattr(torchvision.models, f"resnet{depth}")(num_classes=10))
    torch.save(wrap(model).state_dict(), folder / "torchvision.pth")
    return model.eval(), folder / "torchvision.pth"


@pytest.mark.parametrize("depth, options", [(18, R18), (50, R50)])
def test_the_classifier_computes_torchvisions_logits(depth, options, tmp_path):
    stock, path = torchvision_resnet(depth, tmp_path)
    model = load(classifier("bp", *options), path).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96))
    with torch.no_grad():
        expected = stock((images - model.pixel_mean) / model.pixel_std)
        assert expected.std() > 0.1
        torch.testing.assert_close(model.logits(images), expected)


def test_the_detector_computes_torchvisions_features_saved_from_data_parallel(tmp_path):
    stock, path = torchvision_resnet(50, tmp_path, nn.DataParallel)
    assert "module.conv1.weight" in torch.load(path)
    model = load(detector("bp", *R50), path).eval()
    image = torch.randn(1, 3, 64, 96)
    layers_of = {f"layer{stage - 1}": f"res{stage}" for stage in (3, 4, 5)}
    with torch.no_grad():
        expected = create_feature_extractor(stock, layers_of)(image)
        torch.testing.assert_close(model.backbone.bottom_up(image), expected)


def small():
    return with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))


def within(prefix, net):
    return {prefix + name: value for name, value in net.state_dict().items()}


WAYS = {  # what a trainer saves, of a network
    "imagenet": lambda net: {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": nn.DataParallel(net).state_dict(),
        "best_acc1": torch.tensor(7.0),
        "optimizer": torch.optim.SGD(net.parameters(), 0.1).state_dict(),
    },
    "cifar": lambda net: {"net": net.state_dict(), "acc": 95.1, "epoch": 3},
    "references": lambda net: {
        "model": net.state_dict(),
        "model_ema": AveragedModel(small()).state_dict(),
        "epoch": 3,
    },
    "average": lambda net: {"model": None, "ema": AveragedModel(net).state_dict()},
    "average-within": lambda net: {"ema": {"module": net.state_dict(), "updates": 4}},
    "compiled": lambda net: {"model_state_dict": within("module._orig_mod.", net), "loss": 0.1},
    "lightning": lambda net: {"state_dict": within("model.net.", net), "callbacks": {}},
    "fsdp": lambda net: within("_fsdp_wrapped_module.", net),
    "own-word": lambda net: {"student": net.state_dict(), "epoch": 3},
    "own-prefix": lambda net: {"state_dict": within("module.resnet.", net)},
    "loss": lambda net: {"state_dict": {**within("model.", net), "criterion.weight": net[0].bias}},
    "moco": lambda net: within("encoder_q.", net) | within("encoder_k.", small()),
    "nested": lambda net: {"checkpoint": {"model": net.state_dict()}, "meta": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_other_trainers_save_is_unwrapped(way, tmp_path, log):
    net = small()
    for value in net.buffers():
        value.add_(1)
    assert_same(tensors(load(small(), save_as(WAYS[way](net), tmp_path))), tensors(net))
    # What else there is of weights is named.
    assert ["criterion" in said or "encoder_k" in said for said in log()] == (
        [True] if way in ("loss", "moco") else []
    )


def test_a_backbone_of_pytorchs_imagenet_example_finds_its_place(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    net, path = torchvision_resnet(18, tmp_path)
    save_as(WAYS["imagenet"](net), tmp_path)
    for build in (classifier, detector):
        from_alone, found = (
            load(build("bp", *R18), file).backbone for file in (path, tmp_path / "saved.pth")
        )
        resnets = (getattr(backbone, "bottom_up", backbone) for backbone in (found, from_alone))
        assert_same(*map(tensors, resnets))
    assert "the weights are its 'state_dict'; not read: epoch, arch, best_acc1, ..." in caplog.text


@pytest.mark.parametrize("prefix", ["", "backbone.", "0."])
def test_a_backbone_with_a_head_of_ones_own_finds_its_place(prefix, tmp_path, log):
    net, path = torchvision_resnet(18, tmp_path)
    expected = tensors(load(detector("bp", *R18), path).backbone.bottom_up)
    net.fc = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    for build in (detector, classifier):
        backbone = load(build("bp", *R18), save_as(within(prefix, net), tmp_path)).backbone
        assert_same(tensors(getattr(backbone, "bottom_up", backbone)), expected)
        assert "fc.{0.bias" in " ".join(log()) or "fc.0.{bias" in " ".join(log())


def test_cifars_resnet_of_other_trainers_computes_the_same_logits(tmp_path):
    stock = with_statistics(torchvision.models.resnet18(num_classes=10))
    stock.conv1, stock.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    state = {
        re.sub("^fc", "linear", name.replace("downsample", "shortcut")): value
        for name, value in stock.state_dict().items()
    }
    path = save_as({"net": state, "acc": 95.1}, tmp_path)
    keys = "MODEL.BACKBONE.NAME", "build_cifar_resnet_backbone", "MODEL.RESNETS.DEPTH", 18
    keys += "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 10
    model = load(build_model(load_config("imagenet_resnet18_ss.yaml", *keys)), path).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32))
    with torch.no_grad():
        expected = stock.eval()((images - model.pixel_mean) / model.pixel_std)
        torch.testing.assert_close(model.logits(images), expected)


@pytest.mark.parametrize(
    "content, held",
    [
        ({"netG": {"a.b": torch.ones(1)}, "netD": {"a.b": torch.ones(1)}}, r"netG \(dict\), netD"),
        ({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, r"epoch \(int\), optimizer"),
        ({"state_dict": {"a.b": "text"}, "epoch": 3}, r"state_dict \(dict\), epoch \(int\)"),
    ],
)
def test_what_cannot_be_unwrapped_is_refused_by_what_it_holds(content, held, tmp_path):
    message = rf"saved.pth has no weights of one network .* it holds {held}.*Save them alone: torch"
    with pytest.raises(ValueError, match=message):
        load(classifier(), save_as(content, tmp_path))


@pytest.mark.parametrize("blue, warned", [(103.53, False), (103.5, False), (123.675, True)])
def test_a_model_that_normalises_otherwise_than_torchvision_is_warned_of(
    blue, warned, tmp_path, log
):
    _, path = torchvision_resnet(18, tmp_path)
    load(detector("bp", *R18, "MODEL.PIXEL_MEAN", [123.675, 116.28, blue]), path)
    assert ("this model has PIXEL_MEAN [123" in "".join(log())) == warned


def test_a_model_with_its_strides_elsewhere_than_torchvision_is_refused(tmp_path):
    elsewhere = "MODEL.RESNETS.STRIDE_IN_1X1", True
    _, path = torchvision_resnet(50, tmp_path)
    model = detector("bp", *R50, *elsewhere)
    before = tensors(model)
    with pytest.raises(ValueError, match="set MODEL.RESNETS.STRIDE_IN_1X1 False"):
        load(model, path)
    assert_same(tensors(model), before)
    _, path = torchvision_resnet(18, tmp_path)  # which has no bottleneck
    load(classifier("bp", *R18, *elsewhere), path)


# What is refused ---------------------------------------------------------------------------------


def test_a_checkpoint_without_anything_of_the_model_is_refused(tmp_path):
    model = classifier()
    before = tensors(model)
    torch.save({"model": {"body.a": torch.ones(1), "body.b": torch.ones(2)}}, tmp_path / "x.pth")
    checkpointer = FeedbackCheckpointer(model)
    message = r"x.pth has nothing of this ImageClassifier \(it holds body.a, body.b; the model "
    message += r"backbone.stem.conv1.weight, .* of torchvision's$"  # whose names' ends differ, too
    for _ in range(2):  # an error leaves nothing behind
        with pytest.raises(ValueError, match=message):
            checkpointer.load(str(tmp_path / "x.pth"))
    with pytest.raises(ValueError, match="has nothing of this ImageClassifier"):
        load(model, save(detector(), tmp_path))
    assert_same(tensors(model), before)


@pytest.mark.parametrize(
    "saved, here, message",
    [
        (
            lambda: classifier(classes=10),
            lambda: classifier(classes=7),
            r"2 of its tensors .*linear.weight: \(10, 256\) in the file, \(7, 256\) here, .*"
            r"WEIGHTS_EXCEPT \"\['linear'\]\" to start anew there",
        ),
        (
            detector,
            lambda: detector("bp", "MODEL.RETINANET.NUM_CLASSES", 5),
            r"head.cls_score.weight.*EXCEPT \"\['head.cls_score'\]\"",
        ),
        (classifier, lambda: classifier("bp", *R18), "another network: change MODEL"),
    ],
    ids=["classes of a classifier", "classes of a detector", "another network"],
)
def test_shapes_that_differ_are_refused_with_the_remedy(saved, here, message, tmp_path):
    path, model = save(saved(), tmp_path), here()
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        load(model, path)
    assert_same(tensors(model), before)


# What is left out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns, left",
    [
        (["linear"], "linear."),
        ("linear.bias", "linear.bias"),
        (["backbone.res[45]", "lin*"], ("backbone.res4.", "backbone.res5.", "linear.")),
    ],
)
def test_what_matches_a_pattern_is_left_out(patterns, left, tmp_path, log):
    lastlayer = "MODEL.FEEDBACK.LAST_LAYER_RULE", "fa"
    source, target = classifier("fa", *lastlayer), classifier("fa", *lastlayer)
    for value in source.state_dict().values():
        value.add_(1)
    before, expected = tensors(target), tensors(source)
    load(target, save(source, tmp_path), weights_except=patterns)
    for name, value in tensors(target).items():
        assert_same(value, (before if name.startswith(left) else expected)[name])
    assert not log()


def test_a_pattern_that_matches_nothing_is_refused():
    message = "MODEL.WEIGHTS_EXCEPT: 'fc' matches no module .* backbone, linear"
    with pytest.raises(ValueError, match=message):
        FeedbackCheckpointer(classifier(), weights_except=["linear", "fc"])


def test_resuming_leaves_nothing_out_and_refuses_another_model(tmp_path):
    source, target = classifier(classes=5), classifier(classes=5)
    checkpointer = FeedbackCheckpointer(source, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    resumed = FeedbackCheckpointer(target, str(tmp_path), weights_except=["linear"])
    assert resumed.resume_or_load("not_there.pth", resume=True)["iteration"] == 1
    assert_same(tensors(target), tensors(source))
    # Not resuming, the same checkpointer leaves out what it is told to.
    before = tensors(target.linear)
    nn.init.zeros_(source.linear.weight)
    checkpointer.save("model_0000002")
    resumed.resume_or_load(str(tmp_path / "model_0000002.pth"), resume=False)
    assert_same(tensors(target.linear), before)
    other = FeedbackCheckpointer(classifier(classes=7), str(tmp_path))
    with pytest.raises(ValueError, match="linear.weight.*resume the run with its own config"):
        other.resume_or_load("", resume=True)


# Classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved, here, difference",
    [
        (
            ["a", "b", "c"],
            ["a", "c", "b"],
            "the same classes in another order: from class 1 on, b, c",
        ),
        (
            ["apple", "banana"],
            ["car", "person"],
            "other classes: from class 0 on, apple, banana in",
        ),
        (["a", "b"], ["a"], "other classes: from class 1 on, b in the checkpoint, no more here"),
        (np.array(["a", "b"]), ["a", "b"], None),
        ([], ["a", "b"], None),
        (["a", "b"], [], None),
    ],
)
def test_the_classes_of_a_checkpoint_are_compared(saved, here, difference, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    net, training = small(), {"trainer": SimpleNamespace(state_dict=dict, load_state_dict=len)}
    checkpointer = FeedbackCheckpointer(net, str(tmp_path), classes=saved, **training)
    checkpointer.save("model_0000001")
    path = str(tmp_path / "model_0000001.pth")
    content = torch.load(path, weights_only=True)
    assert content["classes"] == list(saved)
    assert DetectionCheckpointer(small()).load(path)["classes"] == list(saved)  # stock Detectron2's

    evaluated = FeedbackCheckpointer(net, str(tmp_path), classes=here)
    trained = FeedbackCheckpointer(net, str(tmp_path), classes=here, **training)
    for act, remedy in (
        (lambda: evaluated.load(path), "give the data set the model's classes"),
        (lambda: trained.resume_or_load("", resume=True), "resume the run with its own data"),
    ):
        if difference is None:
            act()
        else:
            with pytest.raises(ValueError, match=f"{path} was trained on {difference}.*{remedy}"):
                act()
    assert ("does not say its classes" in caplog.text) == (list(saved) == [])
    trained.resume_or_load(path, resume=False)  # a new training may start from it
    assert ("MODEL.WEIGHTS_EXCEPT leaves them out" in caplog.text) == (difference is not None)
    # A part, as a backbone, has no classes.
    del content["model"]["2.weight"]
    evaluated.load(str(save_as(content, tmp_path)))


# Rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved, here, warned",
    [
        (("ss", 1.0), ("ss", 1.0), None),
        (("bp", 1.0), ("bp", 1.0), None),
        (("bp", 1.0), ("ss", 1.0), r"2 layers .* 0 by sign_symmetry.* and not by backpropagation"),
        (("fa", 0.5), ("fa", 1.0), r"2 layers .* 0 by .*gain=1.* and not by .*gain=0.5"),
    ],
)
def test_layers_that_learn_by_another_rule_than_in_the_checkpoint_are_warned_of(
    saved, here, warned, tmp_path, log
):
    def net(rule, gain):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
        return convert_feedback(plain, rule, gain=gain)

    path = save(net(*saved), tmp_path)
    load(net(*here), path)
    assert len(log()) == (warned is not None)
    if warned:
        assert re.search(warned, log()[0])
        load(net(*here), path, weights_except=["0", "2"])
        assert len(log()) == 1


# Detectron2's own --------------------------------------------------------------------------------


def zoo_style(folder, state):
    """A file of the model zoo's kind: NumPy arrays, pickled, to be matched by their names' ends."""
    content = {
        "model": {name: value.numpy() for name, value in state.items()},
        "__author__": "MSRA",
        "matching_heuristics": True,
    }
    (folder / "zoo.pkl").write_bytes(pickle.dumps(content))
    return str(folder / "zoo.pkl")


@pytest.mark.parametrize("rule", ["ss", "fa"])
def test_weights_of_the_model_zoo_load_into_the_backbone(rule, tmp_path, log):
    source, target = with_statistics(classifier().backbone), detector(rule)
    head = tensors(target.head)
    state = tensors(source)
    state["stem.conv1.weight"] = torch.ones(64, 1, 7, 7)  # which is passed over
    before = target.backbone.bottom_up.stem.conv1.weight.clone()
    load(target, path := zoo_style(tmp_path, state), trusted_weights=[f"{tmp_path}/*.pkl"])
    state["stem.conv1.weight"] = before
    found = tensors(target.backbone.bottom_up)
    assert_same({name: found[name] for name in state}, state)
    assert_same(tensors(target.head), head)
    if rule == "fa":
        for layer in layers(target.backbone.bottom_up).values():
            fresh = layer.rule.initial_state(layer.weight.detach(), layer.fans())
            assert_same(layer.feedback_weight, fresh)
    assert any("stem.conv1.weight" in warning for warning in log())

    with pytest.raises(ValueError, match="zoo.pkl has to be unpickled"):
        load(target, path)
    zoo_style(tmp_path, {"a.b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"it holds a.b; the model .*torchvision's$"):
        load(target, path, trusted_weights=[path])


def test_a_path_that_asks_for_heuristics_matches_the_ends_of_names(tmp_path):
    source, target = classifier("fa"), detector("fa")
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="matching_heuristics"):
        load(target, tmp_path / "backbone.pth")
    load(target, f"{tmp_path}/backbone.pth?matching_heuristics=True")
    assert_same(tensors(target.backbone.bottom_up), tensors(source.backbone))
