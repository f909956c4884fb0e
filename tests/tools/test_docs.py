"""What the documents show holds."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from ss_detectron import (
    FEEDBACK_REGISTRY,
    LEARNER_REGISTRY,
    add_ss_config,
    convert_feedback,
    feedback_report,
    find_config,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def code(document: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


@pytest.fixture
def registries(monkeypatch):
    for registry in (FEEDBACK_REGISTRY, LEARNER_REGISTRY):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


def rules(model: nn.Module) -> dict[str, str]:
    return {row.name: row.rule for row in feedback_report(model)}


def test_the_readme_converts_a_model_as_it_says():
    names = {}
    exec(code("README.md", "torchvision"), names)
    found = rules(names["model"])
    assert found.pop("fc") == "backpropagation"
    assert set(found.values()) == {"sign_symmetry"}


def test_the_readme_names_builders_that_are_registered():
    names = {}
    shipped = repr(find_config("retinanet_scratch_bp.yaml"))
    exec(code("README.md", "my_retinanet").replace('"my_retinanet.yaml"', shipped), names)
    options = ["MODEL.DEVICE", "cpu", "MODEL.FEEDBACK.RULE", "", "MODEL.RESNETS.DEPTH", 18]
    names["cfg"].merge_from_list([*options, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    found = list(rules(build_model(names["cfg"])).values())
    assert found.count("backpropagation") == 2  # the last layers
    assert set(found) == {"backpropagation", "sign_symmetry"}


def test_a_loop_of_ones_own_goes_as_it_says(capsys):
    document = "docs/any_model.md"
    names = {"batches": [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))]}
    exec(code(document, 'exclude=["0"]'), names)
    assert rules(names["model"]) == {"0": "backpropagation", "3": "kolen_pollack"}
    before = names["model"][3].weight.detach().clone()
    exec(code(document, "learner.backward"), names)
    assert not torch.equal(names["model"][3].weight, before)

    net = convert_feedback(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), "fa")
    net.register_forward_hook(lambda module, args, output: output.sum())
    capsys.readouterr()
    exec(code(document, "backpropagation_gradients"), {"model": net, "batch": torch.randn(3, 4)})
    angle, weights = capsys.readouterr().out.split(" ", 1)
    assert 0 < float(angle) < 180 and "WeightAlignment" in weights


def test_the_rule_and_the_learner_of_contributing_can_be_added_as_they_stand(registries):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    exec(code("CONTRIBUTING.md", "class Ternary"), {"model": model})
    weight = model[2].weight.detach()
    mean = weight.abs().mean()
    expected = mean * weight.sign() * (weight.abs() > mean)
    torch.testing.assert_close(model[2].current_feedback(), expected)

    exec(code("CONTRIBUTING.md", "class FixedBiases"), {})
    learner = LEARNER_REGISTRY.get("fixed_biases")(model)
    learner.backward(learner(torch.randn(1, 3, 3, 3)).square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad.any() == (not name.endswith("bias"))


@each_document
def test_every_config_key_that_is_named_exists(document):
    cfg = get_cfg()
    add_ss_config(cfg)
    groups = "MODEL|SOLVER|DATASETS|DATALOADER|INPUT|TEST"
    for key in re.findall(rf"\b((?:{groups})\.[A-Z_.]*[A-Z])\b", document.read_text()):
        node = cfg
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@each_document
def test_every_file_and_heading_that_is_linked_is_there(document):
    text = document.read_text()
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = document.parent / path if path else document
        assert target.exists(), path
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {h.lower().replace(" ", "-") for h in headings}, heading
    for path in re.findall(
        r"\b(?:configs|tools|docs|benchmarks)/[\w/.-]+\.(?:yaml|py|md|png)", text
    ):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"--config-file ((?!output/|my_)[\w/]+\.yaml)", text):
        find_config(name)


def test_every_document_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for document in (ROOT / "docs").glob("*.md"):
        assert document.name == "README.md" or f"({document.name})" in index


def test_every_option_of_the_tools_that_is_named_exists(monkeypatch, capsys):
    text = "\n".join(document.read_text() for document in DOCUMENTS).replace("\\\n", " ")
    used = {}
    pattern = r"^(?:python )?((?:tools|benchmarks)/\w+\.py)(.*)$"
    for tool, options in re.findall(pattern, text, re.MULTILINE):
        used.setdefault(ROOT / tool, set()).update(re.findall(r"\s(--[a-z][a-z-]*)", options))
    assert ROOT / "tools" / "train_net.py" in used
    for tool, options in used.items():
        monkeypatch.syspath_prepend(tool.parent)  # as Python does for a script
        monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(tool), run_name="__main__")
        assert options <= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)), tool
