#!/usr/bin/env bash
# Non-maximum suppression of two boxes whose IoU is the threshold in real numbers, (0, 0, 20, 1) and (0, 0, k, 1) at k / 20 for
# k = 1 ... 19, on an x86-64 CPU: torchvision 0.29.1 drops the second box at 10 of the 19 thresholds and keeps it at 9, by
# whether the float32 quotient is above the threshold's double; ONNX Runtime 1.32.0 keeps it at all 19. Both say that boxes
# with an IoU above the threshold are dropped. One would have guessed that they agree with each other, or each with itself.
#
# Output seen:
#   torchvision 0.29.1+cu130 onnxruntime 1.32.0
#   torchvision drops the second at [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.6, 0.8, 0.85]
#   ONNX Runtime drops the second at []
#
# Needs Python 3.11 to 3.14 and some GB of space. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 onnxruntime==1.32.0 onnx==1.23.2
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy as np
import onnxruntime
import torch
import torchvision
from onnx import TensorProto, helper

print("torchvision", torchvision.__version__, "onnxruntime", onnxruntime.__version__)
value = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "threshold"], ["kept"])],
    "nms",
    [
        value("boxes", TensorProto.FLOAT, [1, 2, 4]),
        value("scores", TensorProto.FLOAT, [1, 1, 2]),
        value("most", TensorProto.INT64, [1]),
        value("threshold", TensorProto.FLOAT, [1]),
    ],
    [value("kept", TensorProto.INT64, [None, 3])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
)
scores = np.array([0.9, 0.8], np.float32)
dropped = {"torchvision": [], "ONNX Runtime": []}
for k in range(1, 20):
    boxes, threshold = np.array([[0, 0, 20, 1], [0, 0, k, 1]], np.float32), k / 20
    kept = torchvision.ops.nms(torch.tensor(boxes), torch.tensor(scores), threshold)
    feed = {"boxes": boxes[None], "scores": scores[None, None], "most": np.array([9])}
    (other,) = session.run(None, {**feed, "threshold": np.array([threshold], np.float32)})
    for name, count in (("torchvision", len(kept)), ("ONNX Runtime", len(other))):
        dropped[name] += [threshold] * (count == 1)
for name, thresholds in dropped.items():
    print(name, "drops the second at", thresholds)
sys.exit([len(thresholds) for thresholds in dropped.values()] != [10, 0])
PY
echo "as described"
