"""SOLVER.AMP, MODEL.CHANNELS_LAST and MODEL.COMPILED: by every rule, float32's gradients."""

import copy
import functools
import itertools
import logging
import math
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from core_utils import RULES, each_rule
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
from detectron2.utils.events import EventStorage
from modeling_utils import load_config, make_batch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from ss_detectron.alignment import backpropagation_gradients, compiled_parts
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


def assert_close(actual: list[Gradients], expected: list[Gradients], bound: float = 5e-4) -> None:
    """Of each step and parameter."""
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in other:
            # Where a norm follows a norm, a bias's gradient is a sum that nearly cancels.
            assert error(one[name], other[name]) < bound, name


def assert_bfloat16(actual: list[Gradients], expected: list[Gradients], model: nn.Module) -> float:
    """Equal but for roundings; returns the bound of the angle between them."""
    # A unit whose input has the relative error eps passes zero with a probability near eps, and
    # then sends back all of the error or nothing: L layers make that an error of sqrt(L eps).
    bound = math.sqrt(sum(isinstance(m, nn.Conv2d) for m in model.modules()) * 2**-8)
    assert_close(actual, expected, 2 * bound)
    assert max(angle(one, other) for one, other in zip(actual, expected, strict=True)) < bound
    return bound


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
    bound = assert_bfloat16(actual, expected, trainer.model)
    if rule != "bp":  # which does not pass for the rule
        (stock, _), _ = plain(network, "bp")
        assert max(error(stock[name], expected[0][name]) for name in stock) > 3 * bound
    assert list(trainer.model.state_dict()) == list(state)
    assert_learned_feedback_learns(trainer.model)


# A detector takes long to compile: here by one rule, in the tests below by those with a state.
@pytest.mark.parametrize(
    ("network", "rule", "key"),
    [
        (network, rule, key)
        for network, rule, key in itertools.product(NETWORKS, RULES, [CHANNELS_LAST, COMPILED])
        if (network, key) != ("detector", COMPILED) or rule == "ss"
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_the_format_and_the_compiler_give_float32s_gradients(network, rule, key, compiler):
    expected, state = plain(network, rule)
    trainer = Trainer(config(network, "MODEL.FEEDBACK.RULE", rule, *key))
    assert_close(train(trainer), expected)
    parts = {"classifier": 1, "detector": 2}[network] * (key == COMPILED)  # each one graph
    assert (compiler.graphs, compiler.calls) == (parts, 2 * parts)
    assert_state(trainer.model, state)
    assert_learned_feedback_learns(trainer.model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_real_compiler_gives_float32s_gradients():
    torch._dynamo.reset()
    options = ("MODEL.RESNETS.NORM", "", "MODEL.FEEDBACK.RULE", "ss")
    expected = train(Trainer(config("classifier", *options)))
    assert_close(train(Trainer(config("classifier", *options, *COMPILED))), expected)


# What a key does -------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """Also of a part of a larger tensor, and where the format has no say (one channel)."""
    return tensor.dim() != 4 or tensor.shape[1] == 1 or tensor.stride(1) == 1


@pytest.mark.parametrize("name", ["imagenet_alexnet_ss.yaml", "quick/shapes_retinanet_ss.yaml"])
def test_every_feature_map_and_its_gradient_is_channels_last(name):
    classes = ("MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 3)
    cfg = load_config(name, *classes, "MODEL.FEEDBACK.RULE", "kp", *CHANNELS_LAST)
    model = Trainer.build_model(cfg)
    found = []

    def look(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(output)
        output.register_hook(found.append)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(look)
    with EventStorage():
        sum(model(batch_for(cfg)).values()).backward()
    assert len(found) >= 2 * 5
    found += [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(is_channels_last, [*found, *model.parameters(), *model.buffers()]))


@pytest.mark.parametrize(("rule", "compiled"), [("brsf", COMPILED), ("kp", ())])
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
    assert_close(train(trainer), train(plain))
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


@pytest.mark.slow
def test_images_of_many_sizes_compile_a_part_twice(compiler):
    model = Trainer.build_model(config("detector", *COMPILED))
    graphs = []
    for size in ((64, 64), (96, 128), (96, 64), (128, 96)):
        batch = make_batch()
        for entry in batch:
            entry["image"] = torch.zeros(3, *size, dtype=torch.uint8)
        with EventStorage():
            sum(model(batch).values()).backward()
        graphs.append(compiler.graphs)
    assert graphs == [2, 4, 4, 4]  # of the two parts: for this size, then for any


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
    assert_bfloat16(actual, expected, trainer.model)
    assert_learned_feedback_learns(trainer.model)
