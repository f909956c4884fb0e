"""COCO's evaluation of annotation files and images of all kinds."""

import contextlib
import io
import logging
import reprlib
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO

from ss_detectron.data.coco_file import repair

__all__ = ["DetectionEvaluator"]

logger = logging.getLogger(__name__)


class DetectionEvaluator(COCOEvaluator):
    """
    Evaluate as Detectron2 does, annotation files that leave out what COCO's do not as well, and say
    how many images are missing, whose objects count as missed, and why nothing is found at all.
    """

    def __init__(self, dataset_name: str, *args: Any, **kwargs: Any) -> None:
        """See Detectron2's.

        Raises:
            ValueError: an annotation has no box; names it.
        """
        super().__init__(dataset_name, *args, **kwargs)
        self._name = dataset_name
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


def _check_boxes(api: COCO, name: str) -> None:
    for annotation in api.dataset.get("annotations", []):
        box = annotation.get("bbox")
        if not isinstance(box, list) or [type(n) in (int, float) for n in box] != [True] * 4:
            found = f"has the bbox {reprlib.repr(box)}" if "bbox" in annotation else "has no bbox"
            raise ValueError(
                f"Data set '{name}': annotation {annotation['id']!r} {found}, not [x, y, width, "
                "height] in pixels."
            )
