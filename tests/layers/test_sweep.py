"""A sample of the sweep over other libraries' models, and that it would find a false report."""

import pytest

pytest.importorskip("torchvision")

import sweep_models

from ss_detectron.layers import convert

CASES = {case.name: case for case in sweep_models.torchvision_cases()}


@pytest.mark.parametrize(
    ("name", "converted", "bypassed"),
    [("resnet18", 21, 0), ("swin_t", 29, 24), ("vit_b_16", 50, 0), ("r3d_18", 21, 0)],
)
def test_reports_are_true(name, converted, bypassed):
    result = sweep_models.sweep(CASES[name])
    assert not result.not_run
    assert (result.converted, len(result.bypassed), result.left_out) == (converted, bypassed, {})
    assert not result.false


def test_a_report_that_is_not_true_is_found(monkeypatch):
    monkeypatch.setattr(convert, "watch", lambda model: None)
    result = sweep_models.sweep(CASES["swin_t"])
    assert len(result.false) == 24
    assert result.false[0].startswith("features.1.0.attn.qkv (sign_symmetry: ")
