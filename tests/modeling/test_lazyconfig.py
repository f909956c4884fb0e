import os
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import detectron2
import pytest
import torch
from core_utils import assert_same
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer
from modeling_utils import assert_error_flows_through_feedback, layers, losses, make_batch, rules

from ss_detectron import convert_feedback
from ss_detectron.data import generate_shapes

REPOSITORY = Path(__file__).resolve().parents[2]
LAST = {"head.cls_score", "head.bbox_pred"}

MODEL = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from ss_detectron import convert_feedback

retinanet = get_config("common/models/retinanet.py").model
# ResNet-18 and a narrow rest, for a CPU.
stages = retinanet.backbone.bottom_up.stages
stages.depth = 18
del stages["stride_in_1x1"]  # which only ResNet-50 and deeper have
retinanet.backbone.top_block.in_channels = 512
retinanet.backbone.out_channels = 32
retinanet.backbone.norm = "GN"
retinanet.head.input_shape = [ShapeSpec(channels=32)] * 5
retinanet.head.conv_dims = [32, 32]
retinanet.num_classes = 3

model = L(convert_feedback)(
    model=retinanet, rule="sign_symmetry", exclude=["head.cls_score", "head.bbox_pred"]
)
"""

RUN = """
from detectron2.model_zoo import get_config

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.dataset.names = "shapes_train"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].update(short_edge_length=(96,))
dataloader.train.total_batch_size = 2
dataloader.train.num_workers = 0
dataloader.test.dataset.names = "shapes_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=96)
dataloader.test.num_workers = 0

lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = get_config("common/optim.py").AdamW
train = get_config("common/train.py").train
train.update(device="cpu", log_period=1)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "retinanet_ss.py"
    path.write_text(MODEL + RUN)
    return str(path)


@pytest.mark.parametrize(
    "overrides, rule, gain",
    [
        ([], "sign_symmetry", 1),
        (["model.rule=fa", "model.gain=0.5", "model.scale=rms"], "feedback_alignment", 0.5),
    ],
)
def test_lazy_model_is_converted_and_trains(config_file, overrides, rule, gain):
    cfg = LazyConfig.apply_overrides(LazyConfig.load(config_file), overrides)
    model = instantiate(cfg.model)
    assert set(layers(model)) >= LAST
    expected = {n: "backpropagation" if n in LAST else rule for n in layers(model)}
    assert rules(model) == expected
    stock = instantiate(cfg.model.model)
    for layer in (layer for name, layer in layers(model).items() if name not in LAST):
        assert layer.rule.gain == gain
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    assert_same(losses(model), losses(stock))
    assert_error_flows_through_feedback(model, {"backbone.bottom_up.stem.conv1"})

    cfg.optimizer = LazyConfig.load(config_file).optimizer
    cfg.optimizer.params.model = model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.train()
    SimpleTrainer(model, repeat(make_batch()), instantiate(cfg.optimizer)).train(0, 2)
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all() and not torch.equal(weight, before[name]), name


def test_lazy_parts_of_this_package(tmp_path):
    path = tmp_path / "parts.py"
    path.write_text(
        MODEL
        + """
from ss_detectron.modeling import FeedbackRetinaNetHead
retinanet.head._target_ = FeedbackRetinaNetHead
retinanet.head.update(rule="fa", last_layer_rule="ss", exclude=["head.bbox_subnet"])
model = retinanet
"""
    )
    model = instantiate(LazyConfig.load(str(path)).model)
    learns = rules(model)
    assert {learns[name] for name in LAST} == {"sign_symmetry"}
    assert learns["head.cls_subnet.0"] == "feedback_alignment"
    assert learns["head.bbox_subnet.0"] == learns["backbone.fpn_output3"] == "backpropagation"


@pytest.mark.slow
def test_detectron2s_own_lazyconfig_script_trains_it(config_file, tmp_path):
    # The official build installs its tools beside the package; else a source may be named.
    beside = Path(detectron2.__file__).parents[1]
    source = os.environ.get("DETECTRON2_SOURCE_DIR", beside)
    script = Path(source, "tools", "lazyconfig_train_net.py")
    if not script.is_file():
        pytest.skip(f"this Detectron2 comes without its tools: there is no {script}")
    generate_shapes(tmp_path, train=4, val=2)
    done = subprocess.run(
        [
            *(sys.executable, str(script), "--config-file", config_file),
            *("train.max_iter=2", f"train.output_dir={tmp_path / 'output'}", "model.rule=fa"),
        ],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "DETECTRON2_DATASETS": str(tmp_path)}
        | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 1
    model = instantiate(LazyConfig.load(config_file).model)
    convert_feedback(model, "fa", exclude=LAST)
    model.load_state_dict(saved["model"])
