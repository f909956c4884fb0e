"""Top-1 and top-5 error of classifiers."""

import json
import logging
import os
from collections import OrderedDict
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate
from torch import Tensor

__all__ = ["ClassificationEvaluator"]

logger = logging.getLogger(__name__)


class ClassificationEvaluator(DatasetEvaluator):
    """
    Measure the share of images, in per cent, whose class is not the most probable one (top-1
    error) and, with more than five classes, not among the five most probable ones (top-5 error).

    Counts are summed over all processes, so the result is exact however the images are shared out.
    An image whose probabilities are not finite counts as an error, and they are reported.
    """

    def __init__(
        self, dataset_name: str, *, per_class: bool = False, output_dir: str | None = None
    ) -> None:
        """
        Args:
            dataset_name: a registered classification data set.
            per_class: whether each class's top-1 error is reported as well.
            output_dir: where classification_results.json is written, with the error of every
                class; None for nowhere.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._size = len(DatasetCatalog.get(dataset_name))
        self._classes = list(metadata.thing_classes)
        self._per_class = per_class
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        # Per class: images, top-1 errors, top-5 errors, images without finite probabilities.
        self._counts = torch.zeros(len(self._classes), 4, dtype=torch.int64)

    def process(
        self,
        inputs: dict[str, Any] | list[dict[str, Any]],
        outputs: dict[str, Tensor] | list[dict[str, Tensor]],
    ) -> None:
        """
        Args:
            inputs: a batch of :class:`~ss_detectron.modeling.ImageClassifier`, with labels.
            outputs: what it returned.

        Raises:
            ValueError: the number of probabilities does not fit the data set.
        """
        if isinstance(inputs, dict):
            labels, probabilities = inputs["label"].cpu(), outputs["probabilities"]
        elif inputs:
            labels = torch.tensor([int(entry["label"]) for entry in inputs])
            probabilities = torch.stack([output["probabilities"] for output in outputs])
        else:
            return
        classes = len(self._classes)
        if probabilities.shape[1] != classes:
            raise ValueError(
                f"the model gives {probabilities.shape[1]} probabilities, but "
                f"{self._dataset_name!r} has {classes} classes"
            )
        top = probabilities.topk(min(5, classes)).indices.cpu()
        broken = ~probabilities.isfinite().all(1).cpu()
        wrong = (top != labels[:, None]) | broken[:, None]
        errors = torch.stack([torch.ones_like(labels), wrong[:, 0], wrong.all(1), broken], 1)
        self._counts.index_add_(0, labels, errors.to(torch.int64))

    def evaluate(self) -> OrderedDict | None:
        """
        Returns:
            {"classification": {"top1_error": %, "top5_error": %, "top1_error-CLASS": %, ...}} in
            the main process, None in the others.
        """
        counts = torch.stack(comm.all_gather(self._counts)).sum(0)
        if not comm.is_main_process():
            return None
        seen, *wrong, broken = counts.sum(0).tolist()
        name = self._dataset_name
        if seen != self._size:
            logger.warning("%s: %d of %d images were evaluated.", name, seen, self._size)
        if broken:
            lost = "%s: no finite probabilities for %d of %d images, which count as errors."
            logger.warning(lost, name, broken, seen)
        if not seen:
            return OrderedDict(classification={})

        results = {"top1_error": 100 * wrong[0] / seen}
        if len(self._classes) > 5:
            results["top5_error"] = 100 * wrong[1] / seen
        # A class without an evaluated image has no error.
        by_class = {
            label: 100 * errors / images
            for label, (images, errors, *_) in zip(self._classes, counts.tolist(), strict=True)
            if images
        }
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            content = {"dataset": name, "images": seen, **results}
            content["top1_error_by_class"] = by_class
            path = os.path.join(self._output_dir, "classification_results.json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
        if self._per_class:
            results |= {f"top1_error-{label}": error for label, error in by_class.items()}
        table = tabulate(results.items(), ("error", "%"), floatfmt=".2f", tablefmt="pipe")
        logger.info("%s, %d images:\n%s", name, seen, table)
        return OrderedDict(classification=results)
