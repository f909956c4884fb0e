"""Detectron2's convolution: fused norm and activation, FPN's lists, whichever came first."""

import subprocess
import sys

import pytest
import torch
from torch import nn

detectron2_layers = pytest.importorskip("detectron2.layers")

from detectron2.config import LazyCall as L  # noqa: E402
from detectron2.config import instantiate  # noqa: E402
from detectron2.modeling.backbone import FPN  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet  # noqa: E402

from ss_detectron.layers import convert_feedback, feedback_report  # noqa: E402
from ss_detectron.layers.detectron2 import AsymmetricDetectron2Conv2d  # noqa: E402


def test_detectron2_fpn_is_converted_where_it_looks_for_its_layers():
    torch.manual_seed(0)
    bottom_up = ResNet(
        BasicStem(3, 4, norm="BN"),
        [ResNet.make_stage(BasicBlock, 1, in_channels=4, out_channels=8)],
        out_features=["res2"],
    )
    fpn = FPN(bottom_up, ["res2"], 8, norm="BN")
    x = torch.randn(1, 3, 16, 16)
    expected = fpn.eval()(x)
    convert_feedback(fpn)
    assert {row.rule for row in feedback_report(fpn)} == {"sign_symmetry"}
    for listed in (fpn.lateral_convs, fpn.output_convs):
        assert all(type(layer) is AsymmetricDetectron2Conv2d for layer in listed)
    actual = fpn(x)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[k], expected[k]) for k in actual)


def test_a_padding_mode_that_it_ignores_is_reported():
    layer = detectron2_layers.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    (row,) = feedback_report(convert_feedback(layer))
    assert row.rule == "backpropagation" and "pads with zeros" in row.reason


@pytest.mark.parametrize("name", ["DeformConv", "ModulatedDeformConv"])
def test_deformable_convolutions_stay_and_are_reported(name):
    try:
        layer = getattr(detectron2_layers, name)(2, 2, 1)
    except ImportError:
        pytest.skip("needs Detectron2's compiled operations")
    (row,) = feedback_report(convert_feedback(layer))
    assert row.rule == "backpropagation" and name in row.reason


def test_lazy_configuration():
    lazy = L(convert_feedback)(model=L(nn.Linear)(in_features=2, out_features=2), rule="fa")
    assert [row.rule for row in feedback_report(instantiate(lazy))] == ["feedback_alignment"]


@pytest.mark.parametrize("first", ["detectron2.layers", "ss_detectron"])
def test_it_is_converted_whichever_was_imported_first(first):
    second = {"ss_detectron": "detectron2.layers", "detectron2.layers": "ss_detectron"}[first]
    script = f"""
import {first}, {second}
layer = detectron2.layers.Conv2d(2, 2, 1)
print([row.rule for row in ss_detectron.feedback_report(ss_detectron.convert_feedback(layer))])
from detectron2.modeling import BACKBONE_REGISTRY
print("build_ss_resnet_backbone" in BACKBONE_REGISTRY)
ss_detectron.add_ss_config
print("build_ss_resnet_backbone" in BACKBONE_REGISTRY)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    at_once = first == "detectron2.layers"
    assert done.stdout.split("\n")[:3] == ["['sign_symmetry']", str(at_once), "True"]
