"""docs/differences.md: where libraries differ, this package keeps to the right side."""

import pytest
import torch
from coco_utils import BOXES, HEIGHT, WIDTH, coco_config, detections, write_coco
from core_utils import assert_same, each_rule
from detectron2.data import DatasetCatalog
from image_utils import datasets_folder
from step_utils import Model, train

from ss_detectron import advance_feedback, convert_feedback
from ss_detectron.data import register_coco_from_config
from ss_detectron.engine import Trainer
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation


@each_rule
def test_each_step_of_mixed_precision_casts_the_weights_as_they_are(rule):
    """Within one autocast block, all steps would compute with the casts of the first."""
    batches = torch.randn(4, 6, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    model = Model(rule)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(batch)
        sgd.zero_grad()
        sum(losses.values()).backward()
        sgd.step()
        advance_feedback(model)
    learner = Backpropagation(Model(rule))
    sgd = torch.optim.SGD(learner.parameters(), lr=0.05)
    train(StepTrainer(learner, list(batches), sgd, mixed_precision=True), len(batches))
    assert_same(learner.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_magnitudes_are_new_after_a_step_whether_or_not_the_optimiser_counts_it(fused):
    """Fused ones leave a tensor's version as it was."""
    model = convert_feedback(torch.nn.Sequential(torch.nn.Linear(3, 2)), "brsf")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    learner = Backpropagation(model)
    drawn = []
    for _ in range(3):
        drawn.append(model[0].current_feedback().abs())
        learner.backward(learner(torch.ones(1, 3)).sum())
        sgd.step()
        learner.step()
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:], strict=False))


def test_ap_does_not_depend_on_the_order_of_images_where_scores_are_equal(tmp_path, monkeypatch):
    """As in COCO's own evaluation: torchmetrics and supervision go by the order of feeding."""

    def average_precision(order: list[int], wrong: int) -> float:
        evaluator = Trainer.build_evaluator(cfg, "own_sky")
        evaluator.reset()
        for number in order:
            image = {"image_id": number, "height": HEIGHT, "width": WIDTH}
            boxes = [(40.0, 1.0, 60.0, 7.0)] if number == wrong else BOXES[number]
            evaluator.process([image], [detections(image, boxes, [number % 2])])
        return evaluator.evaluate()["bbox"]["AP"]

    with datasets_folder(tmp_path, monkeypatch):
        write_coco()
        register_coco_from_config(cfg := coco_config())
        DatasetCatalog.get("own_sky")  # which tells Detectron2 the classes' ids
        first, last = (
            {average_precision(order, wrong) for order in ([0, 1, 2, 3], [3, 1, 2, 0])}
            for wrong in (0, 2)
        )
    assert len(first) == len(last) == 1
    assert first != last  # by the images' ids
