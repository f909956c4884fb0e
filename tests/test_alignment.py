"""The instruments against known vectors and against a stock model."""

import copy
import math

import pytest
import torch
from core_utils import assert_same, each_rule, images, loss_of, net
from torch import nn

from ss_detectron import backpropagation, convert_feedback
from ss_detectron.alignment import backpropagation_gradients, gradient_angles, weight_alignment

# Weights


def test_weight_alignment_of_known_vectors():
    model = convert_feedback(nn.Sequential(nn.Linear(2, 2, bias=False)), "fa")
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        model[0].feedback_weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    found = weight_alignment(model)["0"]
    assert found.angle == pytest.approx(math.degrees(math.acos(3 / (5 * math.sqrt(2)))))
    assert found.norm_ratio == pytest.approx(math.sqrt(2) / 5)
    assert found.sign_agreement == 0.5  # the 3, and the 0 in the place of a 0


def test_backpropagation_is_aligned_with_itself():
    model = net("bp")
    assert list(weight_alignment(model)) == ["0", "3", "7"]
    for found in weight_alignment(model).values():
        assert found.angle == pytest.approx(0, abs=1e-5)
        assert (found.norm_ratio, found.sign_agreement) == (1, 1)
    with backpropagation(convert_feedback(model, "fa")):
        assert weight_alignment(model)["3"].angle == pytest.approx(0, abs=1e-5)
    convert_feedback(model, "bp")
    loss = loss_of(model, images())
    reference = backpropagation_gradients(model, loss)
    loss.backward()
    angles = gradient_angles(model, reference)
    assert list(angles.per_layer) == ["0", "3", "7"]
    assert [angles.total, *angles.per_layer.values()] == pytest.approx([0] * 4, abs=1e-5)


def test_random_feedback_starts_at_a_right_angle():
    found = weight_alignment(net("fa"))["3"]  # 18,432 weights
    assert 87 < found.angle < 93
    assert 0.47 < found.sign_agreement < 0.53
    signs = weight_alignment(net("ss", scale="rms"))["3"]
    assert signs.sign_agreement == 1 and signs.norm_ratio == pytest.approx(1, rel=1e-3)
    assert 0 < signs.angle < 60
    # The angle between a uniform W and its sign: cos = mean(abs(W)) / rms(W) = sqrt(3) / 2.
    assert signs.angle == pytest.approx(30, abs=1)


def test_weight_that_is_zero_has_no_angle():
    model = convert_feedback(nn.Sequential(nn.Linear(2, 2)), "fa")
    nn.init.zeros_(model[0].weight)
    assert math.isnan(weight_alignment(model)["0"].angle)


# Gradients


@each_rule
def test_reference_is_what_a_stock_model_would_get(rule):
    model = net(rule)
    stock = copy.deepcopy(model)
    convert_feedback(stock, "bp")
    torch.manual_seed(3)
    loss = loss_of(model, images())
    reference = backpropagation_gradients(model, loss)
    torch.manual_seed(3)  # of the dropout
    loss_of(stock, images()).backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    assert set(reference) == set(expected)
    for name, gradient in reference.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    loss.backward()
    angles = gradient_angles(model, reference)
    assert angles.per_layer["7"] == pytest.approx(0, abs=1e-2)  # no layer above feeds back
    assert (angles.per_layer["0"] > 5) == (rule != "bp")
    flat = [
        torch.cat([g[name].flatten() for name in expected])
        for g in ({n: p.grad for n, p in model.named_parameters() if n in expected}, expected)
    ]
    cosine = torch.cosine_similarity(*flat, dim=0).clamp(max=1)
    assert angles.total == pytest.approx(torch.rad2deg(cosine.acos()).item(), abs=0.05)


def test_measuring_leaves_gradients_statistics_and_random_state_alone():
    plain, measured = net("ss"), net("ss")
    torch.manual_seed(5)
    loss_of(plain, images()).backward()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    loss = loss_of(measured, images())
    backpropagation_gradients(measured, loss)
    assert all(p.grad is None for p in measured.parameters())
    loss.backward()
    assert_same(torch.rand(1), drawn)
    assert_same(measured.state_dict(), plain.state_dict())
    for p, q in zip(measured.parameters(), plain.parameters(), strict=True):
        assert_same(p.grad, q.grad)


def test_parameters_that_do_not_learn_or_are_not_used_are_left_out():
    model = net("kp")
    model[0].weight.requires_grad_(False)
    model.add_module("unused", nn.Linear(2, 2))
    loss = model[7](model[:7](images())).sum()
    reference = backpropagation_gradients(model, loss)
    assert "0.weight" not in reference and not any("feedback" in name for name in reference)
    assert not reference["unused.weight"].any()
    loss.backward()
    assert "unused" not in gradient_angles(model, reference).per_layer


def test_gradient_that_overflowed_has_no_angle():
    model = net("ss")
    loss = loss_of(model, images())
    reference = backpropagation_gradients(model, loss)
    loss.backward()
    model[3].weight.grad[0, 0, 0, 0] = math.inf
    assert set(gradient_angles(model, reference).per_layer) == {"0", "7"}
