"""COCO's evaluation of annotation files and images of all kinds."""

import contextlib
import io
import logging
import reprlib
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO

from ss_detectron.data.coco_file import repair

__all__ = ["DetectionEvaluator"]

logger = logging.getLogger(__name__)

_evaluate_by_pycocotools = coco_evaluation._evaluate_predictions_on_coco


class DetectionEvaluator(COCOEvaluator):
    """
    Evaluate as Detectron2 does, annotation files that leave out what COCO's do not as well, and say
    how many images are missing, whose objects count as missed, and why nothing is found at all.
    """

    def __init__(
        self, dataset_name: str, *args: Any, coco_api: str = "fastest", **kwargs: Any
    ) -> None:
        """See Detectron2's.

        Args:
            dataset_name: of a registered data set.
            *args: Detectron2's.
            coco_api: which package computes the figures, the same ones: "pycocotools" or, many
                times as fast, "hotcoco"; "fastest" for that where it is installed. What hotcoco
                does not take, or would take otherwise, is left to pycocotools, which is logged.
            **kwargs: Detectron2's.

        Raises:
            ImportError: hotcoco is asked for and not installed.
            ValueError: an annotation has no box; names it.
        """
        super().__init__(dataset_name, *args, **kwargs)
        self._name = dataset_name
        installed = find_spec("hotcoco") is not None
        if coco_api == "hotcoco" and not installed:
            raise ImportError(
                "TEST.COCO_API is 'hotcoco', which is not installed: `pip install hotcoco`, or set "
                "it to 'pycocotools'"
            )
        self._by_hotcoco = coco_api != "pycocotools" and installed
        _check_boxes(self._coco_api, dataset_name)
        repair(self._coco_api.dataset)
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()
        annotations = self._coco_api.dataset.get("annotations", [])
        flat = [a["id"] for a in annotations if min(a["bbox"][2:]) <= 0]
        if flat and comm.is_main_process():
            message = (
                f"Data set '{dataset_name}': {len(flat)} objects have a box without area (such as "
                f"annotation {flat[0]}): COCO's evaluation counts them as missed."
            )
            log_first_n(logging.WARNING, message, key="message", name=__name__)

    def evaluate(self, img_ids: Any = None) -> dict[str, Any]:
        """Evaluate as Detectron2 does, and say what is missing."""
        # Proposals are no instances, and never none.
        found = sum(len(prediction.get("instances", [0])) for prediction in self._predictions)
        counts = (len(self._predictions), found)
        counts = comm.gather(counts) if self._distributed else [counts]
        if comm.is_main_process():
            evaluated, found = map(sum, zip(*counts, strict=True))
            images = len(self._coco_api.imgs if img_ids is None else img_ids)
            if evaluated < images:
                lost = (
                    "'%s': %d of %d images could not be evaluated: their objects count as missed."
                )
                logger.warning(lost, self._name, images - evaluated, images)
            annotations = self._coco_api.dataset.get("annotations")
            if annotations is not None and all(a["iscrowd"] for a in annotations):
                logger.warning(
                    "'%s': AP is nan: of its %d annotations, none is of a single object (iscrowd "
                    "0), which alone count.",
                    self._name,
                    len(annotations),
                )
            elif evaluated and not found:
                logger.warning(
                    "'%s': the model finds nothing in %d images, and AP is nan: no score is above "
                    "SCORE_THRESH_TEST of MODEL.RETINANET or MODEL.ROI_HEADS. Scores begin near 0, "
                    "so that this is to be expected after few steps.",
                    self._name,
                    evaluated,
                )
        return super().evaluate(img_ids)

    def _eval_predictions(self, *args: Any, **kwargs: Any) -> None:
        if not self._by_hotcoco:
            return super()._eval_predictions(*args, **kwargs)
        try:  # Detectron2 calls it by this name
            coco_evaluation._evaluate_predictions_on_coco = _evaluate_by_hotcoco
            return super()._eval_predictions(*args, **kwargs)
        finally:
            coco_evaluation._evaluate_predictions_on_coco = _evaluate_by_pycocotools


class _HotCoco:
    """What Detectron2 asks of pycocotools' COCO."""

    def __init__(self, api: COCO) -> None:
        keys = {
            "images": ("id", "width", "height", "file_name"),
            "categories": ("id", "name"),
            "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")
            + ("segmentation", "keypoints", "num_keypoints"),
        }
        # Of other keys it would refuse what is not as in COCO's files.
        content = {
            part: [{key: entry[key] for key in of if key in entry} for entry in api.dataset[part]]
            for part, of in keys.items()
        }
        import hotcoco

        self.anns = api.anns
        self.api = hotcoco.COCO(content)

    def loadRes(self, results: list[dict]) -> Any:
        return self.api.load_res(results)


def _evaluate_by_hotcoco(
    coco_gt: COCO, coco_results: list[dict], iou_type: str, **options: Any
) -> Any:
    try:
        import hotcoco

        if (most := options["max_dets_per_image"][2]) != 100:
            raise ValueError(f"there are {most} detections per image, not 100")
        keys = ("bbox", "keypoints")
        numbers = chain.from_iterable(r[key] for r in coco_results for key in keys if key in r)
        if not np.isfinite(np.fromiter(numbers, float)).all():
            raise ValueError("a detection is not finite")
        changed = {
            **options,
            "cocoeval_fn": lambda of, results, kind: hotcoco.COCOeval(of.api, results, kind),
        }
        found = _evaluate_by_pycocotools(_HotCoco(coco_gt), coco_results, iou_type, **changed)
        logger.info("The figures are those of hotcoco %s.", hotcoco.__version__)
        return found
    except Exception as error:  # ids that are strings or negative, another version of it, or others
        logger.warning("pycocotools evaluates in place of hotcoco: %s.", error)
        return _evaluate_by_pycocotools(coco_gt, coco_results, iou_type, **options)


def _check_boxes(api: COCO, name: str) -> None:
    for annotation in api.dataset.get("annotations", []):
        box = annotation.get("bbox")
        if not isinstance(box, list) or [type(n) in (int, float) for n in box] != [True] * 4:
            found = f"has the bbox {reprlib.repr(box)}" if "bbox" in annotation else "has no bbox"
            raise ValueError(
                f"Data set '{name}': annotation {annotation['id']!r} {found}, not [x, y, width, "
                "height] in pixels."
            )
