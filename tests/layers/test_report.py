"""The report: a row per layer with a weight, grouped as text; warnings of what is left out."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ss_detectron import gradient_angles, weight_alignment
from ss_detectron.layers import backpropagation, convert_feedback, feedback_report


class Block(nn.Module):
    """A layer, and the parameters that a vision transformer has besides."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 2)
        self.fc2 = nn.Linear(2, 2)
        self.norm = nn.LayerNorm((2, 2))
        self.gamma = nn.Parameter(torch.ones(2, 2))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 2))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 2))
        self.words = nn.Embedding(3, 2)
        self.relative_position_bias_table = nn.Parameter(torch.ones(4, 2))
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.rnn = nn.LSTM(2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.rnn(self.blocks(x))[0])


FULL = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
FULL += ["blocks.2.fc1", "blocks.2.fc2", "rnn", "head"]


def test_layers_of_names_alike_share_a_row_and_the_last_line_counts():
    model = convert_feedback(Net(), "fa", exclude=["head", "blocks.2.fc2"])
    report = feedback_report(model)
    assert [row.name for row in report] == FULL
    assert report[0] == ("blocks.0.fc1", "feedback_alignment", "")
    assert report[-1] == ("head", "backpropagation", "excluded by 'head'")
    *table, last = str(report).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]] == [
        ["blocks.*.fc* (5)", "feedback_alignment", ""],
        ["blocks.2.fc2", "backpropagation", "excluded by 'blocks.2.fc2'"],
        ["rnn", "backpropagation", "no asymmetric form of LSTM"],
        ["head", "backpropagation", "excluded by 'head'"],
    ]
    assert len({len(line) for line in table}) == 1
    assert last == (
        "converted: 5 (5 feedback_alignment); on backpropagation by choice: 2 (1 excluded by "
        "'blocks.2.fc2', 1 excluded by 'head'); left out: 1 (1 no asymmetric form of LSTM)"
    )
    # A row's pattern serves as one to exclude by.
    convert_feedback(model, "bp")
    convert_feedback(model, "fa", exclude="blocks.*.fc*")
    assert [row.rule for row in feedback_report(model)].count("feedback_alignment") == 1


def test_choices_are_counted_as_choices():
    model = Net()
    report = feedback_report(model)
    assert {row.reason for row in report if row.by_choice} == {"not converted"}
    assert [row.name for row in report if row.left_out] == ["rnn"]
    convert_feedback(model, "ss", overrides={"rnn": "bp", "head": "bp"})
    assert feedback_report(model).summary() == (
        "converted: 6 (6 sign_symmetry); on backpropagation by choice: 2 (2 its own rule is "
        "backpropagation); left out: 0"
    )
    with backpropagation(model):
        assert feedback_report(model).summary().startswith("converted: 0; on backpropagation by")
    assert str(feedback_report(nn.ReLU())).splitlines()[2:] == [
        "converted: 0; on backpropagation by choice: 0; left out: 0"
    ]


def test_reasons_are_those_of_the_last_conversion():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    convert_feedback(model, exclude=["0", "1"])
    convert_feedback(model)
    assert [row.reason for row in feedback_report(model)] == ["", "no asymmetric form of LSTM"]


class Matrix(nn.Module):
    def __init__(self, name, *shape):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize(
    ("module", "is_layer"),
    [
        (Matrix("matrix", 2, 2), True),
        (Matrix("w", 4, 1), True),
        (Matrix("experts", 2, 3, 3), True),
        (nn.GRUCell(2, 2), True),
        (nn.Bilinear(1, 1, 1), True),
        (Matrix("mask_token", 1, 4), False),
        (Matrix("rel_pos_h", 5, 2), False),
        (Matrix("layer_scale", 1, 4, 4), False),
        (Matrix("g", 4, 1, 1), False),
        (nn.Embedding(3, 3), False),
        (nn.LayerNorm((3, 3)), False),
        (nn.PReLU(3), False),
    ],
)
def test_only_weight_matrices_have_rows(module, is_layer):
    assert len(feedback_report(module)) == is_layer


# Wrappers.


class _FabricModule(nn.Module):
    """As Lightning Fabric's wrapper names its children."""

    def __init__(self, module):
        super().__init__()
        self._forward_module = self._original_module = module

    def forward(self, *args):
        return self._forward_module(*args)


class Averager(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.net = AveragedModel(module)


@pytest.mark.parametrize("wrap", [_FabricModule, AveragedModel])
def test_wrappers_change_no_name_no_draw_and_no_pattern(wrap):
    torch.manual_seed(0)
    plain, wrapped = Net(), wrap(Net())
    convert_feedback(plain, "fa", exclude=["head", "blocks.0"])
    convert_feedback(wrapped, "fa", exclude=["head", "blocks.0"])
    assert feedback_report(wrapped) == feedback_report(plain)
    draws = [
        [layer.rule.layer_name for layer in model.modules() if hasattr(layer, "rule")]
        for model in (plain, wrapped)
    ]
    assert draws[0] == draws[1] == FULL[2:-2]
    assert list(weight_alignment(wrapped)) == list(weight_alignment(plain))
    wrapped(torch.ones(1, 1, 2)).sum().backward()
    reference = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert set(gradient_angles(wrapped, reference).per_layer) <= set(FULL)
    assert "blocks.0.fc1" in gradient_angles(wrapped, reference).per_layer


def test_wrappers_within_a_model_change_no_name():
    model = Averager(nn.Sequential(nn.Linear(2, 2)))
    model.net.module[0] = torch.compile(model.net.module[0])
    assert [row.name for row in feedback_report(model)] == ["net.0"]
    # A module of one's own may call a child "module".
    assert [row.name for row in feedback_report(nn.ModuleDict({"module": nn.Linear(2, 2)}))] == [
        "module"
    ]


# What nobody excluded.


def test_layers_that_are_left_out_are_warned_of_in_one_line(caplog):
    model = nn.Sequential(nn.LSTM(2, 2), nn.LSTM(2, 2), nn.Bilinear(2, 2, 2), Block())
    convert_feedback(model)
    assert caplog.messages == [
        "3 layers stay on backpropagation that nobody excluded: * (2): no asymmetric form of LSTM; "
        "2: no asymmetric form of Bilinear"
    ]
    caplog.clear()
    convert_feedback(model, exclude=["0", "1"], overrides={"2": "bp"})
    convert_feedback(model, "bp")
    convert_feedback(Net(), exclude="rnn")
    assert not caplog.messages
