"""SOLVER.AMP, MODEL.CHANNELS_LAST and MODEL.COMPILED: by every rule, float32's gradients."""

import copy
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from core_utils import each_rule
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.utils.events import EventStorage
from image_utils import write_images
from modeling_utils import load_config, make_batch
from run_utils import finish, rows, start
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from ss_detectron.alignment import backpropagation_gradients, compiled_parts
from ss_detectron.data import generate_shapes
from ss_detectron.engine import defaults as engine
from ss_detectron.engine.checks import check_options
from ss_detectron.layers import AsymmetricLayer, convert_part, reset_feedback
from ss_detectron.modeling.compilation import compile_parts
from ss_detectron.modeling.feedback import feedback_options

NETWORKS = ["classifier", "detector"]
AMP, CHANNELS_LAST, COMPILED = (
    (key, True) for key in ("SOLVER.AMP.ENABLED", "MODEL.CHANNELS_LAST", "MODEL.COMPILED")
)


def _feedback(backbone: nn.Module, cfg: CfgNode) -> nn.Module:
    return convert_part(backbone, prefix="backbone", **feedback_options(cfg, "this test", None))


@BACKBONE_REGISTRY.register()
def build_block(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """As little of a ResNet as there can be to compile."""
    norm = cfg.MODEL.RESNETS.NORM
    stem, block = BasicStem(3, 16, norm=norm), BasicBlock(16, 32, stride=1, norm=norm)
    return _feedback(ResNet(stem, [[block]], out_features=["res2"]), cfg)


@BACKBONE_REGISTRY.register()
def build_blocks_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """The same of an FPN."""
    blocks = [BasicBlock(16, 32, stride=1), BasicBlock(32, 64, stride=2)]
    bottom_up = ResNet(BasicStem(3, 16), [[b] for b in blocks], out_features=["res2", "res3"])
    return _feedback(FPN(bottom_up, ["res2", "res3"], out_channels=32), cfg)


def config(network: str, *options) -> CfgNode:
    """Of a small network, to be trained by SGD."""
    options = ["SOLVER.BASE_LR", 1e-3, "SOLVER.REFERENCE_WORLD_SIZE", 0, *options]
    if network == "classifier":
        keys = ["MODEL.BACKBONE.NAME", "build_block", "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 3]
        return load_config("imagenet_resnet18_ss.yaml", *keys, *options)
    keys = ["MODEL.BACKBONE.NAME", "build_blocks_fpn", "MODEL.RETINANET.NUM_CLASSES", 3]
    keys += ["MODEL.RETINANET.IN_FEATURES", ["p2", "p3"], "MODEL.RETINANET.NUM_CONVS", 1]
    keys += ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32]]]
    return load_config("retinanet_R_18_ss.yaml", *keys, *options)


def batch_for(cfg: CfgNode) -> dict | list[dict]:
    if cfg.MODEL.META_ARCHITECTURE == "FeedbackRetinaNet":
        return make_batch()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator).byte()
    return {"image": images, "label": torch.tensor([0, 1, 2, 1])}


class Trainer(engine.Trainer):
    """Of seed 0, on one batch again and again, without hooks."""

    def __init__(self, cfg: CfgNode) -> None:
        torch.manual_seed(0)
        super().__init__(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterator:
        while True:
            yield batch_for(cfg)

    def build_hooks(self) -> list:
        return []


Gradients = dict[str, Tensor]


def train(trainer: Trainer, steps: int = 2) -> list[Gradients]:
    """The gradients of each step."""
    found = []
    with EventStorage() as trainer.storage:
        for trainer.iter in range(steps):
            trainer.run_step()
            parameters = trainer.model.named_parameters()
            found.append({n: p.grad.clone() for n, p in parameters if p.grad is not None})
    return found


@functools.cache
def plain(network: str, rule: str) -> tuple[list[Gradients], dict[str, Tensor]]:
    """The gradients of two plain float32 steps, and what they leave."""
    trainer = Trainer(config(network, "MODEL.FEEDBACK.RULE", rule))
    return train(trainer), trainer.model.state_dict()


def error(actual: Tensor, expected: Tensor) -> float:
    """The distance, relative to what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def angle(actual: Gradients, expected: Gradients) -> float:
    """In radians, over all parameters."""
    a, b = (torch.cat([g[n].double().flatten() for n in expected]) for g in (actual, expected))
    return math.acos(min(1.0, (a @ b / a.norm() / b.norm()).item()))


def assert_float32(actual: list[Gradients], expected: list[Gradients]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            # Where a norm follows a norm, a bias's gradient is a sum that nearly cancels.
            assert error(one[name], other[name]) < 5e-4, name


def assert_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The state-dict's keys in their order, and its values but for roundings."""
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, value in expected.items():
        if value.dtype.is_floating_point and value.any():
            assert error(state[name], value) < 1e-4, name
        else:
            assert torch.equal(state[name], value), name


def assert_learned_feedback_learns(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, AsymmetricLayer) and layer.rule.learned:
            assert torch.equal(layer.feedback_weight.grad, layer.weight.grad)


class Compiler:
    """A backend that keeps what is compiled as it is, and counts graphs and their calls."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        run = aot_eager(graph, inputs)

        def counted(*args):
            self.calls += 1
            return run(*args)

        return counted


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    torch._dynamo.reset()
    backend = Compiler()
    monkeypatch.setattr(engine, "compile_parts", functools.partial(compile_parts, backend=backend))
    return backend


@pytest.fixture(autouse=True)
def quiet(caplog, monkeypatch, tmp_path):
    """In an empty folder, with loggers that a trainer leaves as they are."""
    monkeypatch.chdir(tmp_path)
    for name in ("detectron2", "ss_detectron"):
        caplog.set_level(logging.INFO, name)


# Each key by itself --------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@each_rule
def test_bfloat16_gives_float32s_gradients_but_for_its_roundings(network, rule):
    expected, state = plain(network, rule)
    trainer = Trainer(config(network, "MODEL.FEEDBACK.RULE", rule, *AMP))
    types = set()
    for module in trainer.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, out: types.add(out.dtype))
    actual = train(trainer)
    assert types == {torch.bfloat16}
    assert {g.dtype for step in actual for g in step.values()} == {torch.float32}
    # A unit whose input has the relative error eps passes zero with a probability near eps, and
    # then sends back all of the error or nothing: L layers make that an error of sqrt(L eps).
    layers = sum(isinstance(m, nn.Conv2d) for m in trainer.model.modules())
    bound = math.sqrt(layers * 2**-8)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        assert angle(one, other) < bound
        for name in other:
            assert error(one[name], other[name]) < 2 * bound, name
    if rule != "bp":  # which does not pass for the rule
        (stock, _), _ = plain(network, "bp")
        assert max(error(stock[name], expected[0][name]) for name in stock) > 3 * bound
    assert list(trainer.model.state_dict()) == list(state)
    assert_learned_feedback_learns(trainer.model)


@pytest.mark.parametrize("network", NETWORKS)
@each_rule
def test_channels_last_gives_float32s_gradients(network, rule):
    expected, state = plain(network, rule)
    trainer = Trainer(config(network, "MODEL.FEEDBACK.RULE", rule, *CHANNELS_LAST))
    assert_float32(train(trainer), expected)
    assert_state(trainer.model, state)
    assert_learned_feedback_learns(trainer.model)


@pytest.mark.parametrize("network", NETWORKS)
@each_rule
def test_compilation_gives_float32s_gradients(network, rule, compiler):
    expected, state = plain(network, rule)
    trainer = Trainer(config(network, "MODEL.FEEDBACK.RULE", rule, *COMPILED))
    assert_float32(train(trainer), expected)
    parts = {"classifier": 1, "detector": 2}[network]  # each one graph
    assert (compiler.graphs, compiler.calls) == (parts, 2 * parts)
    assert_state(trainer.model, state)
    assert_learned_feedback_learns(trainer.model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_real_compiler_gives_float32s_gradients():
    torch._dynamo.reset()
    options = ("MODEL.RESNETS.NORM", "", "MODEL.FEEDBACK.RULE", "ss")
    expected = train(Trainer(config("classifier", *options)))
    assert_float32(train(Trainer(config("classifier", *options, *COMPILED))), expected)


# What a key does -------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """Also of a part of a larger tensor, and where the format has no say (one channel)."""
    return tensor.dim() != 4 or tensor.shape[1] == 1 or tensor.stride(1) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("imagenet_resnet18_ss.yaml", ()),
        ("imagenet_alexnet_ss.yaml", ("MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 3)),
        ("cifar10_resnet18_fa.yaml", ()),
        ("retinanet_R_18_ss.yaml", ("MODEL.BACKBONE.FREEZE_AT", 0)),
        ("quick/shapes_retinanet_ss.yaml", ("MODEL.FEEDBACK.RULE", "kp")),
    ],
)
def test_every_feature_map_and_its_gradient_is_channels_last(name, options):
    cfg = load_config(name, *options, *CHANNELS_LAST)
    model = Trainer.build_model(cfg)
    seen, astray = [], []

    def look(where: str, tensor: Tensor) -> None:
        seen.append(where)
        if not is_channels_last(tensor):
            astray.append((where, tuple(tensor.shape), tensor.stride()))

    def look_around(layer: nn.Module, inputs: tuple[Tensor], output: Tensor, name: str) -> None:
        look(f"{name} out", output)
        output.register_hook(lambda gradient: look(f"{name} back", gradient))

    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(functools.partial(look_around, name=layer_name))
    with EventStorage():
        sum(model(batch_for(cfg)).values()).backward()
    assert len(seen) >= 2 * 5
    assert {where.split()[1] for where in seen} == {"out", "back"}
    assert astray == []
    for kind in (model.named_parameters(), model.named_buffers()):
        for tensor_name, tensor in kind:
            assert is_channels_last(tensor), tensor_name
            assert tensor.grad is None or is_channels_last(tensor.grad), tensor_name


@pytest.mark.parametrize(("rule", "compiled"), [("brsf", COMPILED), ("fa", ()), ("kp", ())])
def test_a_plain_run_goes_on_in_channels_last_and_so_does_its_feedback(
    rule, compiled, tmp_path, compiler
):
    options = ("MODEL.FEEDBACK.RULE", rule, "OUTPUT_DIR", str(tmp_path))
    plain = Trainer(config("detector", *options))
    train(plain)
    plain.checkpointer.save("model_0000001", iteration=1)

    def assert_formats(model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, AsymmetricLayer)]
        assert len(layers) > 5
        for layer in layers:
            for tensor in (layer.weight, layer.feedback_state, layer.current_feedback()):
                assert tensor is None or is_channels_last(tensor)

    trainer = Trainer(config("detector", *options, *CHANNELS_LAST, *compiled))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert_state(trainer.model, plain.model.state_dict())
    assert_formats(trainer.model)
    assert_formats(copy.deepcopy(trainer.model))
    trainer.model.loss_normalizer = plain.model.loss_normalizer  # Detectron2 does not keep it
    assert_float32(train(trainer), train(plain))
    reset_feedback(trainer.model)
    assert_formats(trainer.model)


@pytest.mark.parametrize("network", NETWORKS)
def test_evaluation_has_the_keys_as_well(network, compiler):
    models = []
    for keys in ((), (*CHANNELS_LAST, *COMPILED)):
        cfg = config(network, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.01, *keys)
        models.append(Trainer.build_model(cfg).eval())
    plain, model = models
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected, actual = plain(batch_for(cfg)), model(batch_for(cfg))
    assert compiler.calls == compiler.graphs == {"classifier": 1, "detector": 2}[network]
    if network == "classifier":
        torch.testing.assert_close(actual, expected)
        return
    for one, other in zip(actual, expected, strict=True):
        assert len(other["instances"]) > 0
        torch.testing.assert_close(one["instances"].scores, other["instances"].scores)


def test_images_of_many_sizes_compile_a_part_twice(compiler):
    model = Trainer.build_model(config("detector", *COMPILED))
    graphs = []
    for size in ((64, 64), (96, 128), (96, 64), (96, 96), (128, 160), (160, 96)):
        batch = make_batch()
        for entry in batch:
            entry["image"] = torch.zeros(3, *size, dtype=torch.uint8)
        with EventStorage():
            sum(model(batch).values()).backward()
        graphs.append(compiler.graphs)
    assert graphs == [2, 4, 4, 4, 4, 4]  # of the two parts: for this size, then for any


def test_what_is_compiled_is_in_the_log_and_a_model_without_parts_is_refused(caplog):
    model = Trainer.build_model(config("detector"))
    assert compiled_parts(model) == []
    assert compile_parts(model) == compiled_parts(model) == ["backbone", "head"]
    assert "the model's backbone and head will be compiled" in caplog.text
    assert compiled_parts(copy.deepcopy(model)) == []
    with pytest.raises(ValueError, match="Sequential has no backbone and no head"):
        compile_parts(nn.Sequential(nn.Linear(1, 1)))


def test_the_alignment_of_a_compiled_model_is_refused(compiler):
    cfg = config("classifier", *COMPILED)
    model = Trainer.build_model(cfg)
    with EventStorage():
        (loss,) = model(batch_for(cfg)).values()
    with pytest.raises(ValueError, match="of a compiled model: backbone is compiled"):
        backpropagation_gradients(model, loss)
    cfg = config("classifier", *COMPILED, "TEST.ALIGNMENT_PERIOD", 2)
    with pytest.raises(ValueError, match="ALIGNMENT_PERIOD is 2 and MODEL.COMPILED is True"):
        check_options(cfg)


def test_without_a_compiler_on_the_cpu_compilation_is_refused(monkeypatch):
    cfg = config("classifier", *COMPILED)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C.. compiler.*'no-such-compiler'.*CXX"):
        check_options(cfg)
    check_options(config("classifier"))


# All keys together ---------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_all_keys_over_two_passes_are_mixed_precision_over_two_passes(network, compiler):
    options = ("MODEL.FEEDBACK.RULE", "kp", *AMP, "SOLVER.ACCUMULATION_STEPS", 2)
    expected = train(Trainer(config(network, *options)))
    trainer = Trainer(config(network, *options, *CHANNELS_LAST, *COMPILED))
    actual = train(trainer)
    assert compiler.calls == 4 * compiler.graphs
    bound = math.sqrt(sum(isinstance(m, nn.Conv2d) for m in trainer.model.modules()) * 2**-8)
    for one, other in zip(actual, expected, strict=True):
        assert angle(one, other) < bound
        for name in other:
            assert error(one[name], other[name]) < 2 * bound, name
    assert_learned_feedback_learns(trainer.model)


# Whole runs ----------------------------------------------------------------------------------

SCRIPT = '''
"""tools/train_net.py with a compiler that takes no minutes."""
import functools
from ss_detectron.engine import defaults, main
from ss_detectron.modeling.compilation import compile_parts

defaults.compile_parts = functools.partial(compile_parts, backend="aot_eager")

main()
'''


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., str]:
    """(flags ..., KEY=value ...) -> what a run with all keys prints; it leaves tmp_path / "out"."""
    script = tmp_path / "compiled.py"
    script.write_text(SCRIPT)

    def call(*flags, **keys) -> str:
        keys |= {"OUTPUT_DIR": "out", "DATALOADER.NUM_WORKERS": 0, "SOLVER.STEPS": ()}
        keys |= {key: True for key, _ in (AMP, CHANNELS_LAST, COMPILED)}
        words = [str(word) for pair in keys.items() for word in pair]
        return finish(start(*flags, *words, cwd=tmp_path, script=script))

    return call


def test_a_detector_trains_and_is_evaluated_with_all_keys(run, tmp_path):
    shapes = generate_shapes(tmp_path / "sets", train=4, val=2, size=64)
    keys = {
        "DATASETS.COCO_INSTANCES": [
            [f"tiny_{s}", f"{shapes}/annotations/instances_{s}.json", f"{shapes}/{s}"]
            for s in ("train", "val")
        ],
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": ("tiny_val",),
        "INPUT.MIN_SIZE_TRAIN": (192,),
        "INPUT.MIN_SIZE_TEST": 192,
        "MODEL.RESNETS.OUT_FEATURES": ["res5"],
        "MODEL.FPN.IN_FEATURES": ["res5"],
        # Of 64 pixels, p7 would be a single one: in a graph compiled for bfloat16, torch leaves
        # the gradient of its convolution uninitialised now and then, a stock one's too.
        "MODEL.RETINANET.IN_FEATURES": ["p5", "p6", "p7"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64]],
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,  # without a detection there is no AP
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
    }
    output = run("--config-file", "quick/shapes_retinanet_ss.yaml", **keys)
    assert "MODEL.COMPILED: the model's backbone and head will be compiled" in output
    assert "SOLVER.AMP.ENABLED on the CPU" in output
    found = {key: value for row in rows(tmp_path / "out") for key, value in row.items()}
    assert math.isfinite(found["total_loss"]) and math.isfinite(found["bbox/AP"])


@pytest.mark.slow
def test_a_classifier_trains_and_is_evaluated_with_all_keys(run, tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, size=(32, 32), dark=3, light=3)
    keys = {
        "DATASETS.IMAGE_FOLDERS": [[s, str(tmp_path / s)] for s in ("train", "test")],
        "DATASETS.TRAIN": ("train",),
        "DATASETS.TEST": ("test",),
        "INPUT.CLASSIFICATION.TRANSFORM": "resize",
        "INPUT.CLASSIFICATION.SIZE": 32,
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 2,
        "MODEL.RESNETS.OUT_FEATURES": ["res2"],
        "SOLVER.ACCUMULATION_STEPS": 2,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 2,
        "TEST.EVAL_PERIOD": 0,
    }
    flags = ["--config-file", "imagenet_resnet18_ss.yaml"]
    output = run(*flags, **keys)
    assert "MODEL.COMPILED: the model's backbone will be compiled" in output
    results = tmp_path / "out" / "inference" / "classification_results.json"
    expected = json.loads(results.read_text())
    assert expected["images"] == 6
    results.unlink()
    # The last batch is smaller than the others.
    output = run(
        *flags, "--resume", "--eval-only", **keys, **{"TEST.CLASSIFICATION.IMS_PER_BATCH": 4}
    )
    assert "Loading from out/model_final.pth" in output
    assert json.loads(results.read_text()) == expected
