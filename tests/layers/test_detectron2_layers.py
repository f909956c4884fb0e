"""Detectron2's convolutions: what is not converted, and whichever was imported first."""

import subprocess
import sys

import pytest

detectron2_layers = pytest.importorskip("detectron2.layers")

from ss_detectron.layers import (  # noqa: E402
    asymmetric,
    convert_feedback,
    feedback_report,
    register_layer,
)
from ss_detectron.layers.detectron2 import AsymmetricDetectron2Conv2d  # noqa: E402


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


def test_a_form_that_the_user_registered_stays(monkeypatch):
    class Mine(AsymmetricDetectron2Conv2d):
        pass

    monkeypatch.setattr(asymmetric, "_FORMS", dict(asymmetric._FORMS))
    register_layer(detectron2_layers.Conv2d, Mine)
    monkeypatch.delitem(sys.modules, "ss_detectron.layers.detectron2")
    assert type(convert_feedback(detectron2_layers.Conv2d(2, 2, 1))) is Mine
