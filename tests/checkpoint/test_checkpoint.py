"""Weights that travel: from a classifier and from torchvision into a detector."""

import copy
import logging
import pickle

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from modeling_utils import NARROW, assert_same, layers, load_config, losses
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.feature_extraction import create_feature_extractor

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.checkpoint.weights import largest_modules, summarise
from ss_detectron.layers import AsymmetricLayer
from ss_detectron.modeling import AlexNet, ImageClassifier

INSIDE = "backbone.bottom_up."
FPN = "backbone (16: fpn_lateral3, fpn_output3, fpn_lateral4, ...)"
HEAD = "head (20)"


def resnet(depth, res2=256, stem=64, width=64):
    values = {"DEPTH": depth, "RES2_OUT_CHANNELS": res2, "STEM_OUT_CHANNELS": stem}
    values |= {"WIDTH_PER_GROUP": width, "STRIDE_IN_1X1": False}
    return [word for key, value in values.items() for word in (f"MODEL.RESNETS.{key}", value)]


SLIM = resnet(50, res2=32, stem=16, width=8)  # 53 layers with a norm each
R18, R34, R50 = resnet(18, 64), resnet(34, 64), resnet(50)


def classifier(rule="bp", *options, classes=10):
    """ImageClassifier on a slim ResNet, with batch statistics as after training."""
    keys = "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", classes, "MODEL.FEEDBACK.RULE", rule
    cfg = load_config("imagenet_resnet18_ss.yaml", *SLIM, *keys, *options)
    return with_statistics(build_model(cfg))


def detector(rule="bp", *options):
    """RetinaNet on a slim ResNet with FrozenBN."""
    # The scale is that of the ImageNet configs.
    keys = "MODEL.FEEDBACK.RULE", rule, "MODEL.FEEDBACK.SCALE", "kaiming"
    cfg = load_config("retinanet_R_18_ss.yaml", *NARROW, *SLIM, *keys, *options)
    return build_model(cfg)


def with_statistics(model):
    """Norms that do something, and not the same twice."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    return model


def train_a_step(model, batch=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01)
    sum((losses(model, batch) if batch is None else model.train()(batch)).values()).backward()
    optimizer.step()


def save(model, folder, name="saved"):
    FeedbackCheckpointer(model, str(folder)).save(name, tag=False)
    return str(folder / f"{name}.pth")


def load(model, path, **kwargs):
    FeedbackCheckpointer(model, **kwargs).resume_or_load(str(path), resume=False)
    return model


def tensors(module):
    """A copy of what a checkpoint holds of it, without the counters of batches."""
    state = copy.deepcopy(dict(module.state_dict()))
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


@pytest.fixture
def said(caplog):
    """What the checkpointer has said, (level, message) after one another; not the layers."""
    caplog.set_level(logging.INFO)

    def messages(name="ss_detectron.checkpoint.checkpointer"):
        return [(r.levelno, r.getMessage()) for r in caplog.records if r.name == name]

    return messages


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# From a classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["ss", "fa", "frsf", "brsf", "kp"])
def test_a_classifiers_backbone_travels_bit_for_bit_with_its_feedback(rule, tmp_path, said):
    source, target = classifier(rule), detector(rule)
    image = torch.randn(2, 3, 64, 64)
    train_a_step(source, {"image": image, "label": torch.tensor([1, 2])})
    path = save(source, tmp_path)
    bottom_up, rest = target.backbone.bottom_up, tensors(target)
    kept = [name for name in rest if not name.startswith(INSIDE)]

    load(target, path)
    expected = tensors(source.backbone)
    assert_same(tensors(bottom_up), expected)
    assert_same({n: tensors(target)[n] for n in kept}, {n: rest[n] for n in kept})
    with torch.no_grad():
        features = source.eval().backbone(image)["res5"]
        assert_same(target.eval().backbone.bottom_up(image)["res5"], features)
    # What a backward pass uses; brSF draws by the layer's name, and anew in every step anyway.
    learns = {n: m for n, m in layers(source.backbone).items() if isinstance(m, AsymmetricLayer)}
    assert len(learns) == 53
    for name, layer in learns.items() if rule != "brsf" else ():
        assert_same(bottom_up.get_submodule(name).current_feedback(), layer.current_feedback())
    if rule == "brsf":
        updates = [v for n, v in expected.items() if n.endswith("feedback_updates")]
        assert [int(n) for n in updates] == [1] * 53

    assert "trained with" not in said()[0][1]
    fpn, head = (16, 20) if rule in ("ss", "brsf") else (24, 28)
    assert said() == [
        (
            logging.WARNING,
            f"{path}: loaded {len(expected)} tensors: backbone.bottom_up ({len(expected)}); not in "
            f"the checkpoint, left as initialised: {FPN.replace('16', str(fpn))}, head ({head}); "
            "in the checkpoint, not in the model: linear (2)",
        )
    ]


def test_feedback_of_its_own_gives_way_to_the_loaded_one(tmp_path):
    source, target = classifier("fa"), detector("fa")
    name = "stem.conv1.feedback_weight"
    mine = source.backbone.get_buffer(name).clone()
    other = target.backbone.bottom_up.get_buffer(name).clone()
    assert not torch.allclose(mine, other)  # drawn by the layers' names
    source.backbone.get_buffer(name).mul_(2)
    load(target, save(source, tmp_path))
    assert_same(target.backbone.bottom_up.get_buffer(name), 2 * mine)


@pytest.mark.parametrize("rule", ["fa", "frsf", "fasi"])
def test_feedback_is_derived_from_the_weights_where_the_checkpoint_brings_none(rule, tmp_path):
    source, target = classifier("bp"), detector(rule)
    before = target.backbone.bottom_up.res3[0].conv1.feedback_state.clone()
    load(target, save(source, tmp_path))
    for name, layer in layers(target.backbone.bottom_up).items():
        weight = source.backbone.get_submodule(name).weight.detach()
        assert_same(layer.weight.detach(), weight)
        assert_same(layer.feedback_state, layer.rule.initial_state(weight, layer.fans()))
    if rule == "fasi":
        after = target.backbone.bottom_up.res3[0].conv1.feedback_state
        assert not torch.equal(before.sign(), after.sign())


def test_a_classifier_trained_by_another_rule_is_told_by_the_detectors_layers(tmp_path, said):
    path = save(classifier("fa"), tmp_path)
    load(detector("ss"), path)
    (level, warning), (_, loaded) = said()
    assert level == logging.WARNING
    assert "53 layers differ, such as backbone.bottom_up.stem.conv1 (feedback_alignment" in warning
    assert "the checkpoint's feedback of 53 layers is not used" in loaded
    assert "feedback_weight" not in loaded


def test_names_that_fit_already_stay(tmp_path, said):
    source, target = detector("fa"), detector("fa")
    with torch.no_grad():
        source.backbone.fpn_output3.bias.fill_(3)
    load(target, save(source, tmp_path))
    assert_same(tensors(target), tensors(source))
    assert [level for level, _ in said()] == [logging.INFO]
    # The same of a part that holds nothing of the ResNet.
    part = {n: v for n, v in source.state_dict().items() if n.startswith("backbone.fpn")}
    torch.save({"model": part}, tmp_path / "part.pth")
    load(target, tmp_path / "part.pth")
    assert "loaded 18 tensors: backbone (18: fpn_lateral3, fpn_output3, fpn_" in said()[-1][1]


def test_frozen_stages_stay_as_loaded_and_the_others_learn(tmp_path):
    source, target = classifier("ss"), detector("ss", "MODEL.BACKBONE.FREEZE_AT", 2)
    load(target, save(source, tmp_path))
    train_a_step(target)
    expected, frozen = tensors(source.backbone), ("stem.", "res2.")
    for name, value in tensors(target.backbone.bottom_up).items():
        # FrozenBN learns nothing in any stage.
        stays = name.startswith(frozen) or ".norm." in name
        assert torch.equal(value, expected[name]) == stays, name


@pytest.mark.parametrize("norms", [("BN", "FrozenBN"), ("FrozenBN", "BN")])
def test_statistics_travel_between_kinds_of_batch_norm_without_noise(norms, tmp_path, said):
    source, target = (classifier("bp", "MODEL.RESNETS.NORM", norm) for norm in norms)
    for norm in (m for m in source.modules() if isinstance(m, FrozenBatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 1.5)
    load(target, path := save(source, tmp_path))
    assert_same(tensors(target), tensors(source))
    text = f"{path}: loaded 267 tensors: backbone (265), linear (2)"
    assert said() == [(logging.INFO, text)]


def test_statistics_that_the_checkpoint_lacks_are_not_made_up_in_silence(tmp_path, said):
    content = torch.load(save(classifier(), tmp_path))
    del content["model"]["backbone.res2.0.conv1.norm.running_mean"]
    torch.save(content, tmp_path / "saved.pth")
    load(detector(), tmp_path / "saved.pth")
    level, message = said()[-1]
    assert level == logging.WARNING
    assert "backbone.bottom_up.res2.0.conv1.norm.running_mean (1)" in message


def test_a_wrapped_model_saves_and_loads_like_the_model_itself(tmp_path, said):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        source, target = classifier("fa"), detector("fa")
        path = save(DistributedDataParallel(source), tmp_path)
        load(DistributedDataParallel(target), path, weights_except=["backbone.bottom_up.res5"])
    finally:
        torch.distributed.destroy_process_group()
    expected = tensors(source.backbone)
    for name, value in tensors(target.backbone.bottom_up).items():
        assert torch.equal(value, expected[name]) != name.startswith("res5."), name
    assert "left out by MODEL.WEIGHTS_EXCEPT: backbone.bottom_up.res5 (60)" in said()[-1][1]


# From torchvision --------------------------------------------------------------------------------


def torchvision_resnet(depth, folder, wrap=lambda model: model):
    """A random one, and the file that holds its weights."""
    model = with_statistics(getattr(torchvision.models, f"resnet{depth}")(num_classes=10))
    torch.save(wrap(model).state_dict(), folder / "torchvision.pth")
    return model.eval(), folder / "torchvision.pth"


@pytest.mark.parametrize("depth, options", [(18, R18), (34, R34), (50, R50)])
def test_the_classifier_computes_torchvisions_logits(depth, options, tmp_path):
    stock, path = torchvision_resnet(depth, tmp_path)
    model = load(classifier("bp", *options), path).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96))
    with torch.no_grad():
        expected = stock((images - model.pixel_mean) / model.pixel_std)
        assert expected.std() > 0.1
        torch.testing.assert_close(model.logits(images), expected)


@pytest.mark.parametrize("depth, options", [(18, R18), (50, R50)])
def test_the_detector_computes_torchvisions_features(depth, options, tmp_path, said):
    stock, path = torchvision_resnet(depth, tmp_path)
    model = load(detector("bp", *options), path).eval()
    image = torch.randn(1, 3, 64, 96)
    layers_of = {f"layer{stage - 1}": f"res{stage}" for stage in (3, 4, 5)}
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone.bottom_up(image), create_feature_extractor(stock, layers_of)(image)
        )
    count = {18: 100, 50: 265}[depth]
    assert said()[-1] == (
        logging.WARNING,
        f"{path}: loaded {count} tensors: backbone.bottom_up ({count}); not in the checkpoint, "
        f"left as initialised: {FPN}, {HEAD}; in the checkpoint, not in the model: linear (2)",
    )


def test_torchvisions_weights_saved_from_data_parallel_load(tmp_path):
    stock, path = torchvision_resnet(18, tmp_path, nn.DataParallel)
    assert "module.conv1.weight" in torch.load(path)
    model = load(classifier("bp", *R18), path)
    assert_same(model.linear.weight, stock.fc.weight)
    assert_same(model.backbone.stem.conv1.norm.running_mean, stock.bn1.running_mean)


@pytest.mark.parametrize(
    "mean, level, ending",
    [
        ([123.675, 116.28, 103.53], logging.INFO, "STRIDE_IN_1X1 False."),
        ([123.68, 116.28, 103.53], logging.INFO, "STRIDE_IN_1X1 False."),
        (
            [103.53, 116.28, 123.675],
            logging.WARNING,
            "STRIDE_IN_1X1 False; this model has PIXEL_MEAN [103.5, 116.3, 123.7].",
        ),
    ],
)
def test_the_log_says_what_torchvisions_weights_expect(mean, level, ending, tmp_path, said):
    _, path = torchvision_resnet(18, tmp_path)
    load(detector("bp", *R18, "MODEL.PIXEL_MEAN", mean), path)
    assert said("ss_detectron.checkpoint.weights") == [
        (
            level,
            f"{path} holds a ResNet of torchvision's, which expects INPUT.FORMAT RGB, PIXEL_MEAN "
            "[123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375] and RESNETS." + ending,
        )
    ]


def test_a_model_with_its_strides_elsewhere_than_torchvision_is_refused(tmp_path):
    _, path = torchvision_resnet(50, tmp_path)
    model = detector("bp", *R50, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    before = tensors(model)
    with pytest.raises(ValueError, match="set MODEL.RESNETS.STRIDE_IN_1X1 False"):
        load(model, path)
    assert_same(tensors(model), before)


def test_strides_are_no_matter_where_torchvision_has_no_bottleneck(tmp_path):
    _, path = torchvision_resnet(18, tmp_path)
    load(classifier("bp", *R18, "MODEL.RESNETS.STRIDE_IN_1X1", True), path)


@pytest.mark.parametrize(
    "saved, here, what",
    [
        (18, R34, "not in the checkpoint, left as initialised"),
        (34, R18, "in the checkpoint, not in the model"),
    ],
)
def test_a_network_of_another_depth_is_warned_of(saved, here, what, tmp_path, said):
    _, path = torchvision_resnet(saved, tmp_path)
    load(classifier("bp", *here), path)
    level, message = said()[-1]
    assert level == logging.WARNING
    assert message.startswith(f"{path}: loaded 102 tensors: backbone")
    assert message.endswith(
        f", linear (2); {what}: backbone.res2.2 (10), backbone.res3 (20: 2, 3), "
        "backbone.res4 (40: 2, 3, 4, ...), backbone.res5.2 (10)"
    )


# What is refused ---------------------------------------------------------------------------------


def test_a_checkpoint_without_anything_of_the_model_is_refused(tmp_path):
    model = classifier()
    before = tensors(model)
    torch.save({"model": {"body.a": torch.ones(1), "body.b": torch.ones(2)}}, tmp_path / "x.pth")
    checkpointer = FeedbackCheckpointer(model)
    message = r"x.pth has nothing of this ImageClassifier \(it holds body.a, body.b; the model "
    message += r"backbone.stem.conv1.weight, .*\?matching_heuristics=True"
    for _ in range(2):  # an error leaves nothing behind
        with pytest.raises(ValueError, match=message):
            checkpointer.load(str(tmp_path / "x.pth"))
    assert_same(tensors(model), before)


def test_alexnet_of_torchvision_does_not_fit_ours():
    # Their names alone decide; the two have 122 million parameters.
    with torch.device("meta"):
        stock = torchvision.models.alexnet()
        model = ImageClassifier(backbone=AlexNet(), num_classes=1000, pixel_mean=[], pixel_std=[])
    state = {name: torch.zeros(()) for name in stock.state_dict()}
    with pytest.raises(ValueError, match="it holds features.0.weight, .*the model backbone.conv1"):
        FeedbackCheckpointer(model)._load_model({"model": state})


def test_a_detectors_checkpoint_has_nothing_of_a_classifier(tmp_path):
    with pytest.raises(ValueError, match="has nothing of this ImageClassifier"):
        load(classifier(), save(detector(), tmp_path))


def test_another_number_of_classes_is_refused_with_the_remedy(tmp_path):
    path = save(classifier(classes=10), tmp_path)
    model = classifier(classes=7)
    before = tensors(model)
    with pytest.raises(ValueError) as refusal:
        load(model, path)
    assert str(refusal.value) == (
        f"{path} does not fit this model, in which 2 of its tensors have another shape "
        "(linear.weight: (10, 256) in the file, (7, 256) here, linear.bias: (10,) in the file, "
        "(7,) here): set MODEL to what the checkpoint was made with (for another number of "
        "classes, its NUM_CLASSES), or MODEL.WEIGHTS_EXCEPT \"['linear']\" to start anew there"
    )
    assert_same(tensors(model), before)
    load(model, path, weights_except=["linear"])
    assert not torch.equal(model.backbone.stem.conv1.weight, before["backbone.stem.conv1.weight"])


def test_a_detectors_other_number_of_classes_is_refused_as_well(tmp_path):
    path = save(detector(), tmp_path)
    with pytest.raises(ValueError, match=r"head.cls_score.weight.*EXCEPT \"\['head.cls_score'\]\""):
        load(detector("bp", "MODEL.RETINANET.NUM_CLASSES", 5), path)


def test_another_network_is_refused(tmp_path):
    _, path = torchvision_resnet(50, tmp_path)
    with pytest.raises(ValueError, match=r"23 of its tensors.*\(64, 64, 1, 1\).*another network"):
        load(detector("bp", *R18), path)


# What is left out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patterns, left, text",
    [
        (["linear"], "linear.", "linear (3)"),
        ("linear", "linear.", "linear (3)"),
        (["linear.bias"], "linear.bias", "linear.bias (1)"),
        (["backbone.res[45]", "lin*"], ("backbone.res4.", "backbone.res5.", "linear."), None),
    ],
)
def test_what_matches_a_pattern_is_left_out(patterns, left, text, tmp_path, said):
    lastlayer = "MODEL.FEEDBACK.LAST_LAYER_RULE", "fa"
    source, target = classifier("fa", *lastlayer), classifier("fa", *lastlayer)
    for value in source.state_dict().values():
        value.add_(1)
    before, expected = tensors(target), tensors(source)
    load(target, path := save(source, tmp_path), weights_except=patterns)
    after = tensors(target)
    for name, value in after.items():
        assert_same(value, (before if name.startswith(left) else expected)[name])
    left_out = sum(name.startswith(left) for name in after)
    level, message = said()[-1]
    assert level == logging.INFO
    assert message.startswith(f"{path}: loaded {len(after) - left_out} tensors: backbone")
    assert "not in the checkpoint" not in message
    if text is not None:
        assert message.endswith(f"; left out by MODEL.WEIGHTS_EXCEPT: {text}")


def test_feedback_that_is_left_out_is_derived_from_the_loaded_weights(tmp_path):
    source, target = classifier("fa"), classifier("fa")
    source.backbone.stem.conv1.feedback_weight.zero_()
    load(target, save(source, tmp_path), weights_except=["*.feedback_weight"])
    for layer in layers(target.backbone).values():
        fresh = layer.rule.initial_state(layer.weight.detach(), layer.fans())
        assert_same(layer.feedback_weight, fresh)
    assert_same(target.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)


def test_a_layer_that_is_left_out_is_not_warned_of(tmp_path, said):
    path = save(classifier("ss", "MODEL.FEEDBACK.LAST_LAYER_RULE", "fa"), tmp_path)
    load(classifier("ss"), path, weights_except=["linear"])
    assert len(said()) == 1
    load(classifier("ss"), path)
    assert "1 layers differ, such as linear" in said()[1][1]


def test_a_pattern_that_matches_nothing_is_refused():
    message = "MODEL.WEIGHTS_EXCEPT: 'fc' matches no module .* backbone .*, linear"
    with pytest.raises(ValueError, match=message):
        FeedbackCheckpointer(classifier(), weights_except=["linear", "fc"])


def test_resuming_leaves_nothing_out(tmp_path, said):
    source, target = classifier(classes=5), classifier(classes=5)
    checkpointer = FeedbackCheckpointer(source, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    resumed = FeedbackCheckpointer(target, str(tmp_path), weights_except=["linear"])
    rest = resumed.resume_or_load("not_there.pth", resume=True)
    assert rest["iteration"] == 1
    assert_same(tensors(target), tensors(source))
    # Not resuming, the same checkpointer leaves out what it is told to.
    before = tensors(target.linear)
    nn.init.zeros_(source.linear.weight)
    checkpointer.save("model_0000002")
    resumed.resume_or_load(str(tmp_path / "model_0000002.pth"), resume=False)
    assert_same(tensors(target.linear), before)


def test_resuming_another_model_is_refused(tmp_path):
    FeedbackCheckpointer(classifier(classes=5), str(tmp_path)).save("model_0000001")
    checkpointer = FeedbackCheckpointer(classifier(classes=7), str(tmp_path))
    with pytest.raises(ValueError, match="linear.weight.*resume the run with its own config"):
        checkpointer.resume_or_load("", resume=True)


# Detectron2's name-matching heuristics, and what it says itself ----------------------------------


def zoo_style(folder, state, author="MSRA"):
    content = {
        "model": {name: value.numpy() for name, value in state.items()},
        "__author__": author,
        "matching_heuristics": True,
    }
    (folder / "zoo.pkl").write_bytes(pickle.dumps(content))
    return folder / "zoo.pkl"


def test_heuristics_drop_what_has_another_shape_and_the_log_says_so(tmp_path, said, caplog):
    source, target = classifier(), detector()
    state = tensors(source.backbone)
    state["stem.conv1.weight"] = torch.ones(64, 1, 7, 7)
    # As in Detectron2's older models, whose statistics are in weight and bias.
    state = {name: value for name, value in state.items() if "running" not in name}
    before = target.backbone.bottom_up.stem.conv1.weight.clone()
    load(target, path := zoo_style(tmp_path, state), trusted_weights=[f"{tmp_path}/*.pkl"])
    assert_same(target.backbone.bottom_up.stem.conv1.weight, before)
    assert_same(
        target.backbone.bottom_up.res3[0].conv1.weight, source.backbone.res3[0].conv1.weight
    )
    assert "Shape of stem.conv1.weight in checkpoint is" in caplog.text
    (level, message) = said()[-1]
    assert level == logging.WARNING
    assert message.startswith(f"{path}: loaded 158 tensors: backbone.bottom_up.stem.conv1.norm (2)")
    assert ", backbone.bottom_up.stem.conv1.weight (1)" in message


def test_heuristics_that_match_nothing_are_refused(tmp_path):
    path = zoo_style(tmp_path, {"a.b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"it holds a.b; the model .*torchvision's$"):
        load(detector(), path, trusted_weights=[str(path)])


def test_a_path_that_asks_for_heuristics_matches_the_ends_of_names(tmp_path):
    source, target = classifier("fa"), detector("fa")
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="matching_heuristics"):
        load(target, tmp_path / "backbone.pth")
    load(target, f"{tmp_path}/backbone.pth?matching_heuristics=True")
    assert_same(tensors(target.backbone.bottom_up), tensors(source.backbone))


def test_nothing_is_said_twice(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    load(detector("fa"), save(classifier("fa"), tmp_path))
    assert [record.name for record in caplog.records] == ["ss_detectron.checkpoint.checkpointer"]


def test_the_second_name_of_a_loaded_tensor_is_not_missing(tmp_path, said):
    model = nn.Module()
    model.first = model.second = nn.Linear(2, 2)
    torch.save({"first.weight": torch.ones(2, 2), "first.bias": torch.ones(2)}, tmp_path / "x.pth")
    load(model, tmp_path / "x.pth")
    assert said() == [(logging.INFO, f"{tmp_path}/x.pth: loaded 2 tensors: first (2)")]


def test_stock_checkpoints_of_plain_models_load_as_ever(tmp_path, said):
    source, target = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    DetectionCheckpointer(source, str(tmp_path)).save("stock")
    load(target, tmp_path / "stock.pth")
    assert_same(dict(target.state_dict()), dict(source.state_dict()))
    assert [level for level, _ in said()] == [logging.INFO]


# In a few words ----------------------------------------------------------------------------------


def test_names_are_told_by_the_largest_modules_that_hold_no_others():
    names = ["a.x.w", "a.x.b", "a.y.w", "c.w", "d.x.w", "e"]
    assert largest_modules(names, ["a.z.w", "d.x.b"]) == {
        "a.x": 2,
        "a.y": 1,
        "c": 1,
        "d.x.w": 1,
        "e": 1,
    }
    assert summarise(names, ["a.z.w", "d.x.b"]) == "a (3: x, y), c (1), e (1), d.x.w (1)"
    assert summarise(names) == "a (3), c (1), d (1), e (1)"
    numbered = summarise(f"{i}.w" for i in range(9))
    assert numbered == "0 (1), 1 (1), 2 (1), 3 (1), 4 (1), 5 (1), ..."
