"""What the documents show holds."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from ss_detectron import (
    FEEDBACK_REGISTRY,
    add_ss_config,
    convert_feedback,
    feedback_report,
    find_config,
)

ROOT = Path(__file__).parents[2]


def code(document: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def test_the_rule_in_contributing_can_be_added_as_it_stands():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    try:
        exec(code("CONTRIBUTING.md", "class Ternary"), {"model": model})
        assert [row.rule for row in feedback_report(model)] == ["ternary", "ternary"]
        weight = model[2].weight.detach()
        mean = weight.abs().mean()
        expected = mean * weight.sign() * (weight.abs() > mean)
        torch.testing.assert_close(model[2].current_feedback(), expected)
        image = torch.randn(1, 3, 3, 3, requires_grad=True)
        model(image).sum().backward()
        assert image.grad.abs().sum() > 0
    finally:
        FEEDBACK_REGISTRY._obj_map.pop("ternary", None)


def test_the_readme_converts_a_model_as_it_says():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Conv2d(3, 4, 3)
            self.roi_heads = nn.ModuleDict({"box_predictor": nn.Linear(4, 2)})

    model = Model()
    block = code("README.md", "feedback_report(model)")
    exec(block, {"build_model": lambda cfg: model, "cfg": None})
    rules = {row.name: row.rule for row in feedback_report(model)}
    assert rules == {
        "backbone": "sign_symmetry",
        "roi_heads.box_predictor": "backpropagation",
    }


def test_the_readme_names_builders_that_are_registered():
    block = code("README.md", "my_retinanet.yaml")
    block = block.replace('"my_retinanet.yaml"', repr(find_config("retinanet_scratch_bp.yaml")))
    names = {"get_cfg": get_cfg}
    exec(block, names)
    cfg = names["cfg"]
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.FEEDBACK.RULE", "", "MODEL.RESNETS.DEPTH", 18]
    )
    cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 64])

    rules = [row.rule for row in feedback_report(build_model(cfg))]
    assert rules.count("backpropagation") == 2  # the last layers
    assert set(rules) == {"backpropagation", "sign_symmetry"}


def test_the_readme_measures_gradients_as_it_says(capsys):
    torch.manual_seed(0)
    net = convert_feedback(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), "fa")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, batch):
            return self.net(batch).sum()

    names = {"model": Model(), "batch": torch.randn(3, 4)}
    exec(code("README.md", "backpropagation_gradients"), names)
    angle, weights = capsys.readouterr().out.split(" ", 1)
    assert 0 < float(angle) < 180 and "WeightAlignment" in weights


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_config_key_that_is_named_exists(document):
    cfg = get_cfg()
    add_ss_config(cfg)
    keys = set(
        re.findall(
            r"\b((?:MODEL|SOLVER|DATASETS|TEST)\.[A-Z_.]+[A-Z])", (ROOT / document).read_text()
        )
    )
    assert keys
    for key in keys:
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:configs|tools|docs)/[\w/.-]+\.(?:yaml|py|md|png)", text):
        assert (ROOT / path).exists(), path


def test_the_results_have_a_row_for_every_config():
    rows = set(re.findall(r"\| `(\w+\.yaml)` \|", (ROOT / "docs" / "results.md").read_text()))
    configs = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert rows == {name for name in configs if not name.startswith("Base-")}
