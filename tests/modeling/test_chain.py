"""Chains of fully connected layers and convolutions."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from modeling_utils import load_config

from ss_detectron import LocallyConnected2d, build_learner
from ss_detectron.modeling import Chain
from ss_detectron.modeling.chain import same_padding


def _config(layers, backbone="conv", size=9, padding="same", **keys):
    cfg = load_config("mnist_fc_bp.yaml")
    cfg.MODEL.BACKBONE.NAME = f"build_feedback_{backbone}_backbone"
    cfg.MODEL.CHAIN.LAYERS, cfg.MODEL.CHAIN.PADDING = layers, padding
    cfg.INPUT.CLASSIFICATION.SIZE = size
    cfg.MODEL.LEARNER.merge_from_other_cfg(type(cfg)(keys))
    return cfg


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(28, 3, 2), (9, 5, 2), (7, 4, 3), (5, 1, 2)]
)
def test_same_padding_is_tensorflows(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert after - before in (0, 1)
    padded = F.pad(torch.zeros(1, 1, size, size), (before, after, before, after))
    out = F.conv2d(padded, torch.zeros(1, 1, kernel, kernel), stride=stride)
    assert out.shape[-1] == -(-size // stride)


def test_a_chain_is_its_layers_one_after_the_other():
    model = build_model(_config([(3, 4, 2), (5, 2, 1), 6]))
    first, second, third = model.backbone.children()
    images = torch.randint(0, 256, (2, 1, 9, 9)).byte()
    x = images / 255
    x = torch.tanh(F.conv2d(F.pad(x, (1, 1, 1, 1)), *first.parameters(), stride=2))
    x = torch.tanh(F.conv2d(F.pad(x, (2, 2, 2, 2)), *second.parameters()))
    x = torch.tanh(F.linear(x.flatten(1), *third.parameters()))
    torch.testing.assert_close(model.logits(images), model.linear(x))
    weights = [module for module in model.backbone.modules() if hasattr(module, "weight")]
    for layer in weights:  # Glorot's, uniform
        fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(layer.weight)
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.8 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    for cfg_activation, kind in (("relu", torch.nn.ReLU), ("tanh", torch.nn.Tanh)):
        cfg = _config([4])
        cfg.MODEL.CHAIN.ACTIVATION = cfg_activation
        assert isinstance(build_model(cfg).backbone.block1[-1], kind)


@pytest.mark.parametrize(("size", "last"), [(13, []), (12, ["average_pool"])])
def test_pooling_follows_a_layer_and_valid_padding_is_none(size, last):
    chain = [(3, 4, 1), "max_pool", (2, 6, 2), *last, 5]
    model = build_model(_config(chain, size=size, padding="valid"))
    first, second, third = model.backbone.children()
    images = torch.randint(0, 256, (2, 1, size, size)).byte()
    x = F.max_pool2d(torch.tanh(F.conv2d(images / 255, *first.parameters())), 2)
    x = torch.tanh(F.conv2d(x, *second.parameters(), stride=2))
    if last:
        x = x.mean((2, 3))
    x = torch.tanh(F.linear(x.flatten(1), *third.parameters()))
    torch.testing.assert_close(model.logits(images), model.linear(x))


@pytest.mark.parametrize(
    ("name", "parameters", "shapes"),
    [
        ("mnist_lenet", 61_706, [(6, 14, 14), (16, 5, 5), (120, 1, 1), (84,)]),
        ("cifar10_lenet", 128_842, [(32, 15, 15), (64, 6, 6), (128, 1, 1), (256,)]),
    ],
)
def test_lenets(name, parameters, shapes):
    model = build_model(load_config(f"{name}_bp.yaml"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.zeros(2, len(model.pixel_mean), 32, 32)
    for block, shape in zip(model.backbone.children(), shapes, strict=True):
        x = block(x)
        assert x.shape == (2, *shape)


@pytest.mark.parametrize(
    ("name", "own_weights", "shared_weights", "shapes"),
    [
        ("mnist_lc", 4_181_120, 3_240_224, [(32, 14, 14), (64, 7, 7), (1024,)]),
        ("cifar10_lc", 49_997_824, 17_291_968, [(64, 16, 16), (128, 8, 8), (256, 8, 8), (1024,)]),
        (
            "imagenet_lc",
            259_510_272,
            20_207_760,
            [(48, 56, 56), (48, 28, 28), (96, 28, 28), (96, 14, 14)]
            + [(192, 14, 14), (192, 7, 7), (384, 7, 7)],
        ),
    ],
)
@pytest.mark.parametrize("twin", [False, True])
def test_networks_of_bartunov_et_al(name, own_weights, shared_weights, shapes, twin):
    backbone = ["MODEL.BACKBONE.NAME", "build_feedback_conv_backbone"] if twin else []
    cfg = load_config(f"{name}_bp.yaml", *backbone, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        model = build_model(cfg)
        x = torch.empty(2, len(cfg.MODEL.PIXEL_MEAN), *[cfg.INPUT.CLASSIFICATION.SIZE] * 2)
    weights = [p.numel() for n, p in model.named_parameters() if n.endswith("weight")]
    assert sum(weights) == (shared_weights if twin else own_weights)
    for block, shape in zip(model.backbone.children(), shapes, strict=True):
        x = block(x)
        assert x.shape == (2, *shape)


def test_a_locally_connected_chain_with_equal_kernels_is_its_convolutional_twin():
    layers = [(3, 4, 2), "max_pool", (2, 5, 1), 6]
    for padding in ("same", "valid"):
        cfg = _config(layers, "lc", padding=padding)
        own, twin = build_model(cfg), build_model(_config(layers, padding=padding))
        kinds = (LocallyConnected2d, torch.nn.Conv2d, torch.nn.Linear)
        pairs = [[m for m in model.modules() if isinstance(m, kinds)] for model in (own, twin)]
        with torch.no_grad():
            for layer, other in zip(*pairs, strict=True):
                weight = other.weight
                if isinstance(layer, LocallyConnected2d):
                    weight = weight.permute(0, 2, 3, 1).flatten(1)
                layer.weight.copy_(weight.expand_as(layer.weight))
                layer.bias.copy_(other.bias.expand_as(layer.bias))
        images = torch.randint(0, 256, (2, 1, 9, 9)).byte()
        torch.testing.assert_close(own.logits(images), twin.logits(images))


@pytest.mark.parametrize(
    ("layers", "backbone", "message"),
    [
        ([], "fc", "MODEL.CHAIN.LAYERS is empty"),
        ([4, (3, 2, 1)], "conv", "after a fully connected layer"),
        ([4, "max_pool"], "conv", "max_pool after a fully connected layer"),
        (["max_pool", 4], "conv", "max_pool; after a layer, choose max_pool or average_pool"),
        ([(3, 2, 1), "maxpool"], "conv", "maxpool; after a layer, choose"),
        ([(3, 2, 1), "max_pool", (5, 2, 1)], "conv", "on a map of 3 pixels"),
        ([(3, 2, 1)], "fc", "build_fc_backbone takes numbers of units alone"),
    ],
)
def test_layers_that_do_not_fit(layers, backbone, message):
    with pytest.raises(ValueError, match=message):
        build_model(_config(layers, backbone, padding="valid"))


def test_the_classifier_tells_its_blocks():
    model = build_model(_config([5, 4], "fc"))
    assert isinstance(model.backbone, Chain)
    expected = [model.backbone.block1, model.backbone.block2, model.linear]
    assert model.learner_blocks() == expected
    learner = build_learner(_config([5, 4], "fc", NAME="dtp", ALPHA=0.5), model)
    assert learner.alpha == 0.5 and learner.blocks == tuple((b,) for b in expected)


def test_direct_feedback_takes_a_resnets_blocks_and_other_backbones_are_refused():
    cfg = load_config("quick/shapes_resnet18_bp.yaml")
    cfg.MODEL.LEARNER.NAME = "dfa"
    model = build_model(cfg)
    learner = build_learner(cfg, model).train()
    assert len(learner.blocks) == 1 + sum(map(len, model.backbone.stages)) + 1
    images = torch.randint(0, 256, (2, 3, *[cfg.INPUT.CLASSIFICATION.SIZE] * 2)).byte()
    loss = learner({"image": images, "label": torch.tensor([1, 0])})["loss_cls"]
    learner.backward(loss)
    assert all(p.grad.any() for p in model.parameters())
    cfg.MODEL.LEARNER.NAME = "dtp"
    with pytest.raises(ValueError, match="no inverse follows from the block"):
        build_learner(cfg, model)
    cfg = load_config("quick/shapes_retinanet_bp.yaml")
    cfg.MODEL.LEARNER.NAME = "dfa"
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        build_learner(cfg, build_model(cfg))


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("dfa", {"SCALE": "kaiming", "GAIN": 2.0}, {"scale": "kaiming", "gain": 2.0}),
        ("dtp", {"NOISE": 0.5, "INVERSE_LR": 0.02}, {"noise": 0.5, "inverse_lr": 0.02}),
        ("dtp", {"SCHEDULE": "alternating", "PERIOD": 7}, {"period": 7, "phase": "inverses"}),
        ("sdtp", {"TARGET_STEP": 0.1}, {"target_step": 0.1}),
        ("aosdtp", {"AUXILIARY_UNITS": 9}, {"auxiliary_units": 9}),
    ],
)
def test_every_key_of_a_learner_is_read(name, keys, expected):
    cfg = _config([5, 4], "fc", NAME=name, **keys)
    learner = build_learner(cfg, build_model(cfg))
    found = learner._rules[0] if name == "dfa" else learner
    assert {key: getattr(found, key) for key in expected} == expected
