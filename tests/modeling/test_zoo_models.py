"""Two-stage detectors of Detectron2's model zoo, converted with one call."""

import pytest
import torch
from core_utils import assert_same
from detectron2 import model_zoo
from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from modeling_utils import (
    CPU,
    SLIM,
    layers,
    losses,
    make_batch,
    operations,
    resnet,
    rules,
    stock_layers,
    weight_uses,
)

from ss_detectron import convert_feedback, feedback_report

STOCK = {"ConvolutionBackward0", "AddmmBackward0", "MmBackward0"}
FROZEN = ("backbone.bottom_up.stem.", "backbone.bottom_up.res2.")
# They stand on what is frozen.
FIRST = {
    "backbone.bottom_up.res3.0.conv1",
    "backbone.bottom_up.res3.0.shortcut",
    "backbone.fpn_lateral2",
}
PREDICTORS = ("roi_heads.box_predictor", "roi_heads.mask_head.predictor")


def box_masks(boxes, size):
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return BitMasks(masks)


CASES = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": (None, SLIM),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": (box_masks, resnet(18, 64)),
}


@pytest.fixture(scope="module", params=CASES)
def detector(request):
    """A stock detector (config, model, batch, losses), small behind the backbone's stem."""
    masks, options = CASES[request.param]
    cfg = model_zoo.get_config(request.param)
    cfg.merge_from_list([*CPU, *options])
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    torch.manual_seed(0)
    model, batch = build_model(cfg), make_batch(masks)
    return cfg, model, batch, losses(model, batch)


@pytest.mark.parametrize("rule", ["sign_symmetry", "feedback_alignment"])
def test_every_layer_of_a_two_stage_detector_is_converted_and_no_loss_changes(detector, rule):
    cfg, model, batch, before = detector
    assert operations(before) & STOCK == STOCK - {"MmBackward0"}
    assert convert_feedback(model, rule) is model
    report = {row.name: row.rule for row in feedback_report(model)}
    assert report == dict.fromkeys(layers(model), rule)
    assert {"proposal_generator.rpn_head.conv", "roi_heads.box_head.fc1"} < set(report)
    assert ("roi_heads.mask_head.deconv" in report) == cfg.MODEL.MASK_ON

    after = losses(model, batch)
    assert_same(after, before)
    uses = weight_uses(model, after)
    assert set(uses) == {n for n in report if not n.startswith(FROZEN)}
    assert stock_layers(model, uses) == FIRST


def test_excluded_predictors_are_the_only_stock_operations(detector):
    cfg, model, batch, _ = detector
    convert_feedback(model, "backpropagation")
    predictors = [name for name in PREDICTORS if cfg.MODEL.MASK_ON or "mask" not in name]
    convert_feedback(model, "ss", exclude=predictors)
    stays = {name for name, rule in rules(model).items() if rule == "backpropagation"}
    assert stays == {name for name in layers(model) if name.startswith(PREDICTORS)}
    uses = weight_uses(model, losses(model, batch))
    assert stock_layers(model, uses) - FIRST == stays
