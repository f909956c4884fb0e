"""Dataset dicts of COCO's annotation files, which stay in these files until they are asked for."""

import json
import operator
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

IMAGE = np.dtype(
    [("file", "i4"), ("start", "i8"), ("end", "i8"), ("size", "f8", 2), ("objects", "i8", 2)]
)
"""Where an image's entry is, its width and height, and which rows of OBJECT are of it."""

OBJECT = np.dtype(
    [("start", "i8"), ("end", "i8"), ("box", "f8", 4), ("category", "i4"), ("visible", "i4")]
    + [("crowd", "?"), ("used", "?")]
)
"""Where an annotation is, its [x, y, width, height], class and visible keypoints."""


@dataclass
class AnnotationFile:
    """A file in COCO's form that is read in places.

    Attributes:
        path: absolute, of a file in UTF-8.
        version: its size and time, see :meth:`status`.
        folder: of its images.
        classes: contiguous numbers by the ids of categories.
    """

    path: str
    version: tuple[int, int]
    folder: str
    classes: dict[Any, int]

    @cached_property
    def _stream(self) -> BinaryIO:
        stream = open(self.path, "rb", buffering=0)  # noqa: SIM115
        if hasattr(os, "posix_fadvise"):  # all of it will be wanted, in any order
            with suppress(OSError):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return stream

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_stream"}

    @staticmethod
    def status(file: str | int) -> tuple[int, int]:
        """Return what tells a version of a file from others: its size and when it was written."""
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns

    def record(self, places: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the dataset dict of an image, as Detectron2's load_coco_json does.

        Args:
            places: of its entry, and those of its annotations.

        Raises:
            OSError: the file is not what it was.
        """
        descriptor = self._stream.fileno()
        # In any order and by any process: neither a shared position nor a mapping, which a file
        # that is cut short would turn into the end of the process.
        parts = [os.pread(descriptor, end - start, start) for start, end in places]
        if self.status(descriptor) != self.version:
            raise OSError(f"'{self.path}' was changed while it is in use: start again.")
        image, *annotations = json.loads(b"[" + b",".join(parts) + b"]")
        return {
            "file_name": os.path.join(self.folder, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [self._object(annotation) for annotation in annotations],
        }

    def _object(self, annotation: dict[str, Any]) -> dict[str, Any]:
        keys = ("iscrowd", "bbox", "keypoints")
        found = {key: annotation[key] for key in keys if key in annotation}
        if mask := annotation.get("segmentation"):
            if isinstance(mask, list):
                mask = [polygon for polygon in mask if is_polygon(polygon)]
            elif isinstance(mask["counts"], list):
                mask = mask_util.frPyObjects(mask, *mask["size"])
            found["segmentation"] = mask
        if points := annotation.get("keypoints"):  # from indices of pixels to their centers
            found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
        label = self.classes[annotation["category_id"]]
        return {**found, "category_id": label, "bbox_mode": BoxMode.XYWH_ABS}


def is_polygon(points: list) -> bool:
    """Whether a list of coordinates has the length of a polygon's; Detectron2 drops others."""
    return len(points) >= 6 and len(points) % 2 == 0


@dataclass(frozen=True, eq=False)
class CocoRecords(Sequence):
    """The dataset dicts of COCO's annotation files, equal to those of Detectron2's load_coco_json.

    A dict is made when it is asked for. What is held is where its parts are in the file, and of
    its objects what samplers and checks need, 100 bytes each: every process and its workers read
    one file, by the memory in which the system keeps it.

    Attributes:
        files: in which the entries are.
        images: of dtype :data:`IMAGE`, in the order of the dicts.
        objects: of dtype :data:`OBJECT`, those that are not ``used`` left out of the dicts.
    """

    files: list[AnnotationFile]
    images: np.ndarray
    objects: np.ndarray

    @classmethod
    def joined(cls, several: Sequence["CocoRecords"]) -> "CocoRecords":
        """Those of one after those of the other."""
        if len(several) == 1:
            return several[0]
        files: list[AnnotationFile] = []
        parts, rows = [], 0
        for records in several:
            images = records.images.copy()
            images["file"] += len(files)
            images["objects"] += rows
            parts.append(images)
            files += records.files
            rows += len(records.objects)
        objects = np.concatenate([records.objects for records in several])
        return cls(files, np.concatenate(parts), objects)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        image = self.images[operator.index(index)]
        objects = self.objects[slice(*image["objects"])]
        objects = objects[objects["used"]]
        places = zip(objects["start"].tolist(), objects["end"].tolist(), strict=True)
        own = int(image["start"]), int(image["end"])
        return self.files[image["file"]].record([own, *places])

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all objects in the dicts: their rows, the image of each, and which of its it is."""
        first, last = self.images["objects"].T
        owners = np.repeat(np.arange(len(self)), last - first)
        rows = np.arange(len(owners)) + (first - np.cumsum(last - first) + last - first)[owners]
        used = self.objects["used"][rows]
        rows, owners = rows[used], owners[used]
        return rows, owners, np.arange(len(owners)) - np.searchsorted(owners, owners)

    def boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        Return of all objects but crowds (n, 2) image and number of the annotation in its dict,
        (n, 4) left, top, right, bottom, and (n, 2) width and height of the image.
        """
        rows, owners, numbers = self._rows()
        single = ~self.objects["crowd"][rows]
        boxes = self.objects["box"][rows[single]]
        boxes[:, 2:] += boxes[:, :2]
        places = np.stack([owners, numbers], 1)[single]
        return places, boxes, self.images["size"][owners[single]]

    def without(self, places: np.ndarray) -> "CocoRecords":
        """Those without the annotations at ``places``, as of :meth:`boxes`."""
        rows, owners, numbers = self._rows()
        objects = self.objects.copy()
        for image, number in places:
            objects["used"][rows[np.searchsorted(owners, image) + number]] = False
        return replace(self, objects=objects)

    def with_objects(self) -> "CocoRecords":
        """Those of images with an object that is no crowd."""
        rows, owners, _ = self._rows()
        single = ~self.objects["crowd"][rows]
        return self._chosen(np.bincount(owners[single], minlength=len(self)) > 0)

    def with_keypoints(self, least: int) -> "CocoRecords":
        """Those of images with so many visible keypoints."""
        rows, owners, _ = self._rows()
        visible = np.bincount(owners, self.objects["visible"][rows], minlength=len(self))
        return self._chosen(visible >= least)

    def _chosen(self, which: np.ndarray) -> "CocoRecords":
        return replace(self, images=self.images[which])

    def classes(self) -> list[int]:
        """The classes of all objects that are no crowds."""
        rows, _, _ = self._rows()
        return self.objects["category"][rows[~self.objects["crowd"][rows]]].tolist()
