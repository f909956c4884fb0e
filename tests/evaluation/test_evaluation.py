import json
import logging
import math

import pytest
import torch
from coco_utils import coco_config, detections, write_coco
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from group_utils import run_ranks
from image_utils import datasets_folder

from ss_detectron.data import register_coco_from_config
from ss_detectron.evaluation import ClassificationEvaluator
from ss_detectron.evaluation.coco import DetectionEvaluator

NAME = "evaluated_set"


@pytest.fixture(autouse=True)
def clean():
    yield
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def register(labels: list[int], classes: int) -> None:
    DatasetCatalog.register(NAME, lambda: [{"label": label} for label in labels])
    MetadataCatalog.get(NAME).set(thing_classes=[f"class{i}" for i in range(classes)])


def ranking(classes: int, *order: int) -> torch.Tensor:
    """Probabilities of one image, the most probable classes in this order."""
    scores = torch.zeros(classes)
    scores[list(order)] = torch.arange(len(order), 0, -1).float()
    return scores / scores.sum()


def evaluate(labels, probabilities, batch_size=2, **options):
    evaluator = ClassificationEvaluator(NAME, **options)
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        inputs = {"label": torch.tensor(labels[part])}
        evaluator.process(inputs, {"probabilities": torch.stack(list(probabilities[part]))})
    return evaluator.evaluate()["classification"]


def test_errors_of_known_rankings(tmp_path):
    # Right at once; fifth; sixth; never named.
    labels = [3, 3, 3, 0]
    orders = [3, 1, 2, 4, 5, 6], [1, 2, 4, 5, 3, 6], [1, 2, 4, 5, 6, 3], [1, 2, 4, 5, 6, 3]
    probabilities = [ranking(8, *order) for order in orders]
    register(labels, 8)
    expected = {"top1_error": 75.0, "top5_error": 50.0}
    assert evaluate(labels, probabilities) == expected
    found = evaluate(labels, probabilities, per_class=True, output_dir=tmp_path)
    # The other classes have no image.
    by_class = {"class0": 100.0, "class3": pytest.approx(200 / 3)}
    assert found == expected | {f"top1_error-{name}": value for name, value in by_class.items()}
    written = json.loads((tmp_path / "classification_results.json").read_text())
    assert written == expected | {"dataset": NAME, "images": 4, "top1_error_by_class": by_class}


def test_with_five_classes_there_is_no_top5_error():
    register([0, 1], 5)
    assert evaluate([0, 1], [ranking(5, 0), ranking(5, 0)]) == {"top1_error": 50.0}


def random_scores(size: int, classes: int = 9) -> tuple[list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (size,), generator=generator).tolist()
    return labels, torch.rand(size, classes, generator=generator)


def test_random_scores_give_what_a_sort_gives():
    labels, scores = random_scores(101, 20)
    register(labels, 20)
    rank = (scores > scores.gather(1, torch.tensor(labels)[:, None])).sum(1)
    found = evaluate(labels, scores, batch_size=7)
    assert found["top1_error"] == pytest.approx(100 * (rank > 0).float().mean().item())
    assert found["top5_error"] == pytest.approx(100 * (rank > 4).float().mean().item())


def test_a_list_counts_as_a_batch_does_and_reset_forgets():
    register([0, 1, 1], 3)
    evaluator = ClassificationEvaluator(NAME)
    evaluator.process([{"label": 2}], [{"probabilities": ranking(3, 0)}])
    evaluator.reset()
    evaluator.process([], [])
    inputs = [{"label": 0}, {"label": 1}, {"label": 1}]
    evaluator.process(inputs, [{"probabilities": ranking(3, c)} for c in (0, 1, 2)])
    assert evaluator.evaluate()["classification"]["top1_error"] == pytest.approx(100 / 3)


def test_images_that_were_not_evaluated_are_reported(caplog):
    register([0, 1, 1], 3)
    assert evaluate([0, 1], [ranking(3, 0), ranking(3, 1)]) == {"top1_error": 0}
    assert "2 of 3 images" in caplog.text
    assert evaluate([], []) == {}
    assert "0 of 3 images" in caplog.text


def test_a_model_that_gives_no_numbers_is_wrong_and_said_to_be(caplog):
    register([0, 0, 1], 8)
    lost = torch.full((8,), float("nan"))  # by its rank, class 0 would be the most probable
    partly = ranking(8, 0)
    partly[3] = float("inf")
    found = evaluate([0, 0, 1], [lost, partly, ranking(8, 1)])
    assert found == {"top1_error": pytest.approx(200 / 3), "top5_error": pytest.approx(200 / 3)}
    assert "2 of 3 images" in caplog.text
    caplog.clear()
    evaluate([0, 0, 1], [ranking(8, 0)] * 3)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_does_not_fit_the_data_set_is_refused():
    register([0, 1], 3)
    with pytest.raises(ValueError, match=f"4 probabilities, but '{NAME}' has 3 classes"):
        evaluate([0], torch.ones(1, 4))


@pytest.mark.parametrize(
    ("boxes", "spoil", "message"),
    [
        ([[4.0, 8.0, 24.0, 18.0]], lambda c: None, ""),
        ([], lambda c: None, "the model finds nothing in 4 images"),
        (
            [[4.0, 8.0, 24.0, 18.0]],
            lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
            "AP is nan: of its 4 annotations, none is of a single object",
        ),
        ([[4.0, 8.0, 24.0, 18.0]], lambda c: c["annotations"].clear(), "of its 0 annotations"),
    ],
)
def test_why_ap_is_nan_is_said(boxes, spoil, message, tmp_path, monkeypatch, caplog):
    with datasets_folder(tmp_path, monkeypatch):
        write_coco(spoil)
        register_coco_from_config(coco_config())
        evaluator = DetectionEvaluator("own_sky", ("bbox",), False, output_dir=str(tmp_path))
        evaluator.reset()
        for record in DatasetCatalog.get("own_sky"):
            evaluator.process([record], [detections(record, boxes, [0] * len(boxes))])
        nothing = math.isnan(evaluator.evaluate()["bbox"]["AP"])
    assert nothing == bool(message)
    told = [r for r in caplog.records if r.name == "ss_detectron.evaluation.coco"]
    said = [r.getMessage() for r in told if r.levelno >= logging.WARNING]
    assert [message in text for text in said] == [True] * nothing


def evaluate_share(rank: int, folder: str, size: int) -> None:
    labels, scores = random_scores(size)
    evaluator = ClassificationEvaluator(NAME, per_class=True)
    for i in InferenceSampler(size):
        evaluator.process([{"label": labels[i]}], [{"probabilities": scores[i]}])
    found = evaluator.evaluate()
    assert (found is None) == (rank > 0)
    if found is not None:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found["classification"], file)


@pytest.mark.parametrize("size", [23, 1])
def test_processes_together_give_what_one_gives(tmp_path, size):
    labels, scores = random_scores(size)
    register(labels, 9)
    alone = evaluate(labels, scores, per_class=True)
    run_ranks(evaluate_share, tmp_path, size, start_method="fork")
    assert json.loads((tmp_path / "found.json").read_text()) == alone
