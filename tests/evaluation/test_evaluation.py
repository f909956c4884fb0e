import json
import logging

import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from group_utils import run_ranks

from ss_detectron.evaluation import ClassificationEvaluator

NAME = "evaluated_set"


def register(labels: list[int], classes: int, name: str = NAME) -> None:
    DatasetCatalog.register(
        name, lambda: [{"image_id": i, "label": n} for i, n in enumerate(labels)]
    )
    MetadataCatalog.get(name).set(
        evaluator_type="classification", thing_classes=[f"class{i}" for i in range(classes)]
    )


@pytest.fixture(autouse=True)
def clean():
    yield
    if NAME in DatasetCatalog.list():
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def ranking(classes: int, *order: int) -> torch.Tensor:
    """Probabilities of one image, the most probable classes in this order."""
    scores = torch.zeros(classes)
    scores[list(order)] = torch.arange(len(order), 0, -1).float()
    return scores / scores.sum()


def evaluate(labels, probabilities, batch_size=2, **options):
    evaluator = ClassificationEvaluator(NAME, **options)
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        evaluator.process(
            {"label": torch.tensor(labels[part])},
            {"probabilities": torch.stack(probabilities[part])},
        )
    return evaluator.evaluate()


CASES = [  # label, most probable classes: right at once; fifth; sixth; never named
    (3, [3, 1, 2, 4, 5, 6]),
    (3, [1, 2, 4, 5, 3, 6]),
    (3, [1, 2, 4, 5, 6, 3]),
    (0, [1, 2, 4, 5, 6, 3]),
]


def test_top1_and_top5_error_of_known_rankings():
    labels = [label for label, _ in CASES]
    register(labels, 8)
    results = evaluate(labels, [ranking(8, *order) for _, order in CASES])
    assert results == {"classification": {"top1_error": 75.0, "top5_error": 50.0}}


def test_error_of_each_class_on_request(tmp_path):
    labels = [label for label, _ in CASES]
    register(labels, 8)
    probabilities = [ranking(8, *order) for _, order in CASES]
    found = evaluate(labels, probabilities, per_class=True, output_dir=tmp_path)["classification"]
    assert found["top1_error-class0"] == 100
    assert found["top1_error-class3"] == pytest.approx(200 / 3)
    assert "top1_error-class1" not in found  # it has no image
    written = json.loads((tmp_path / "classification_results.json").read_text())
    assert written == {
        "dataset": NAME,
        "images": 4,
        "top1_error": 75.0,
        "top5_error": 50.0,
        "top1_error_by_class": {"class0": 100.0, "class3": pytest.approx(200 / 3)},
    }


def test_with_five_classes_there_is_no_top5_error():
    register([0, 1], 5)
    probabilities = [ranking(5, 0), ranking(5, 0)]
    assert evaluate([0, 1], probabilities) == {"classification": {"top1_error": 50.0}}


def test_random_scores_give_what_a_sort_gives():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(101, 20, generator=generator)
    labels = torch.randint(0, 20, (101,), generator=generator)
    register(labels.tolist(), 20)
    rank = (scores > scores.gather(1, labels[:, None])).sum(1)
    found = evaluate(labels.tolist(), list(scores), batch_size=7)["classification"]
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
    with caplog.at_level(logging.WARNING):
        found = evaluate([0, 1], [ranking(3, 0), ranking(3, 1)])
    assert found["classification"]["top1_error"] == 0
    assert f"{NAME}: 2 of 3 images were evaluated" in caplog.text
    caplog.clear()
    assert ClassificationEvaluator(NAME).evaluate() == {"classification": {}}
    assert "no image was evaluated" in caplog.text


def test_a_model_that_gives_no_numbers_is_wrong_and_said_to_be(caplog):
    register([0, 0, 1], 8)
    lost = torch.full((8,), float("nan"))  # by its rank, class 0 would be the most probable
    partly = ranking(8, 0)
    partly[3] = float("inf")
    found = evaluate([0, 0, 1], [lost, partly, ranking(8, 1)])["classification"]
    assert found == {"top1_error": pytest.approx(200 / 3), "top5_error": pytest.approx(200 / 3)}
    assert f"{NAME}: the model gave no finite probabilities for 2 of 3 images" in caplog.text
    caplog.clear()
    evaluate([0, 0, 1], [ranking(8, 0)] * 3)
    assert not caplog.text


def test_what_does_not_fit_the_data_set_is_refused():
    register([0, 1], 3)
    evaluator = ClassificationEvaluator(NAME)
    with pytest.raises(ValueError, match=f"4 probabilities, but '{NAME}' has 3 classes"):
        evaluator.process({"label": torch.tensor([0])}, {"probabilities": torch.ones(1, 4)})
    with pytest.raises(ValueError, match=r"not among 0 to 2: \[3\]"):
        evaluator.process({"label": torch.tensor([3])}, {"probabilities": torch.ones(1, 3)})


# Two processes


def _scores(size: int) -> tuple[list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 9, (size,), generator=generator).tolist()
    return labels, torch.rand(size, 9, generator=generator)


def _worker(rank: int, folder: str, size: int) -> None:
    labels, scores = _scores(size)
    register(labels, 9)
    evaluator = ClassificationEvaluator(NAME, per_class=True)
    mine = list(InferenceSampler(size))
    for i in mine:
        evaluator.process(
            {"label": torch.tensor([labels[i]])}, {"probabilities": scores[i : i + 1]}
        )
    found = evaluator.evaluate()
    assert (found is None) == (rank > 0)
    if found is not None:
        with open(f"{folder}/found.json", "w") as file:
            json.dump(found, file)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("size, world", [(23, 2), (1, 2)])
def test_processes_together_give_what_one_gives(tmp_path, size, world):
    labels, scores = _scores(size)
    register(labels, 9)
    alone = evaluate(labels, list(scores), per_class=True)
    run_ranks(_worker, tmp_path, size, world=world)
    assert json.loads((tmp_path / "found.json").read_text()) == alone
