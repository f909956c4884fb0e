"""Export: what tools/export.py writes is a stock model that predicts the same."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from core_utils import assert_same
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import ResNet, build_model
from detectron2.modeling.backbone.resnet import BasicStem
from modeling_utils import load_config
from torch import nn

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.export import plain_config
from ss_detectron.modeling import RETINANET_HEAD_REGISTRY

TOOL = Path(__file__).parents[1] / "tools" / "export.py"


def config(*opts):
    # Untrained scores are low: all count, so that there is something to compare.
    scores = "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0
    return load_config("quick/shapes_retinanet_fa.yaml", *scores, *opts)


def export(folder, *words):
    """Runs the tool on a folder's run.yaml, into ``plain`` there."""
    argv = sys.argv
    sys.argv = [str(TOOL), "--config-file", str(folder / "run.yaml"), "--output"]
    sys.argv += [str(folder / "plain"), "--program", *words]
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A feedback-alignment detector, and the folder that the tool exports it to."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    cfg = config()
    model = build_model(cfg).eval()
    FeedbackCheckpointer(model, str(folder)).save("trained")
    (folder / "run.yaml").write_text(cfg.dump())
    export(folder, "--size", "64", "90", "MODEL.WEIGHTS", str(folder / "trained.pth"))
    return model, folder / "plain"


def test_stock_detectron2_reads_the_export_and_predicts_the_same(exported):
    model, folder = exported
    cfg = get_cfg()  # without this package's keys
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.BACKBONE.NAME == "build_retinanet_resnet_fpn_backbone"
    stock = build_model(cfg).eval()
    DetectionCheckpointer(stock).load(cfg.MODEL.WEIGHTS)
    weights = torch.load(folder / "model.pth", weights_only=True)["model"]
    assert set(weights) == set(stock.state_dict())
    images = [{"image": torch.randint(0, 256, (3, 64, 96)).float()} for _ in range(2)]
    with torch.no_grad():
        for ours, theirs in zip(model(images), stock(images), strict=True):
            assert len(ours["instances"]) > 0
            for field, value in ours["instances"].get_fields().items():
                other = theirs["instances"].get(field)
                assert torch.equal(getattr(value, "tensor", value), getattr(other, "tensor", other))


def test_the_program_gives_the_model_s_logits_and_deltas(exported):
    model, folder = exported
    program = torch.export.load(folder / "model.pt2").module()
    image = torch.randint(0, 256, (1, 3, 64, 96)).float()  # 90 is rounded up to 96
    with torch.no_grad():
        logits, deltas = program(image)
        features = model.backbone((image - model.pixel_mean) / model.pixel_std)
        expected = model.head([features[name] for name in model.head_in_features])
    for ours, theirs in zip((*logits, *deltas), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(ours, theirs)
    # Runtimes differ in these: docs/differences.md.
    operations = " ".join(str(node.target) for node in program.graph.nodes)
    assert "conv2d" in operations and not re.search("nms|topk|sort", operations)


def test_a_classifier_is_stock_detectron2s_resnet_a_backbone_and_a_program(tmp_path, capsys):
    cfg = load_config("quick/shapes_resnet18_fa.yaml", "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 4)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES = "build_fa_resnet_backbone", ["res3"]
    (tmp_path / "run.yaml").write_text(cfg.dump())
    model = build_model(cfg).eval()
    for norm in (module for module in model.modules() if hasattr(module, "running_mean")):
        norm.running_mean.normal_(0, 0.1)
    FeedbackCheckpointer(model, str(tmp_path), classes="abcd").save("model_final")
    export(tmp_path)
    side = cfg.INPUT.CLASSIFICATION.SIZE
    assert f"any number of images, (3, {side}, {side}), RGB" in capsys.readouterr().out
    assert not (tmp_path / "plain" / "config.yaml").exists()
    path = tmp_path / "plain" / "model.pth"
    content = torch.load(path, weights_only=True)
    assert content["classes"] == list("abcd")

    def stock_resnet(num_classes=None, *outputs):
        norm = cfg.MODEL.RESNETS.NORM
        stages = ResNet.make_default_stages(18, norm=norm)[:2]
        return ResNet(BasicStem(3, 64, norm), stages, num_classes, ["res3", *outputs])

    images = torch.randint(0, 256, (3, 3, side, side)).float()
    stock = stock_resnet(4, "linear").eval()
    stock.load_state_dict(content["model"])
    program = torch.export.load(path.with_name("model.pt2")).module()
    with torch.no_grad():
        expected = model.logits(images)
        normalised = (images - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(stock(normalised)["linear"], expected)
        torch.testing.assert_close(program(images), expected)
        torch.testing.assert_close(program(images[:1]), expected[:1])

    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": stock_resnet()})})
    DetectionCheckpointer(detector).load(str(path))
    found = detector["backbone"]["bottom_up"].state_dict()
    assert_same(dict(found), {name: content["model"][name] for name in found})


@pytest.mark.parametrize("backbone", ["resnet", "resnet_fpn", "retinanet_resnet_fpn"])
def test_every_builder_has_its_stock_name(backbone):
    for kind in ("ss", "fa", "feedback"):
        plain = plain_config(config("MODEL.BACKBONE.NAME", f"build_{kind}_{backbone}_backbone"))
        assert f"build_{backbone}_backbone" == plain.MODEL.BACKBONE.NAME


def test_a_head_that_stock_detectron2_has_not_is_refused(monkeypatch):
    monkeypatch.setitem(RETINANET_HEAD_REGISTRY._obj_map, "MyHead", torch.nn.Module)
    with pytest.raises(ValueError, match="no counterpart of the head 'MyHead'"):
        plain_config(config("MODEL.RETINANET.HEAD", "MyHead"))


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "plain").touch()
    with pytest.raises(SystemExit, match="export.py: error: .*File exists: .*plain"):
        export(tmp_path)
