"""The benchmarks: their statistics, their account of memory, and that they compare equals."""

import importlib.util
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ss_detectron import convert_feedback
from ss_detectron.data import generate_shapes
from ss_detectron.layers import AsymmetricLayer

FOLDER = Path(__file__).parents[2] / "benchmarks"
RULES = ["bp", "ss", "frsf", "brsf", "fa", "fasi", "kp"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


names = (
    "rules",
    "loader",
    "optimizer",
    "local",
    "learners",
    "reading",
    "evaluation",
    "trainer",
    "timing",
)
rules, loader, optimizer, local, learners, reading, evaluation, trainer, timing = map(load, names)


def run(module: ModuleType, monkeypatch, *words: object) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, words)])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


# Times -------------------------------------------------------------------------------------------


def test_a_ratio_is_that_of_the_same_turn():
    # 1 to 5 in some order; the times themselves are all over the place.
    reference = [1.0, 10.0, 0.5, 2.0, 4.0]
    found = timing.ratio([3 * 1.0, 1 * 10.0, 5 * 0.5, 2 * 2.0, 4 * 4.0], reference)
    assert found == timing.Ratio(median=3, low=2, high=4)
    assert found.is_noise and not timing.Ratio(1.02, 0, 9).is_noise


def test_the_interval_of_a_median_narrows_with_the_number_of_turns():
    few, many = ([1 + i / n for i in range(n + 1)] for n in (2, 400))
    assert timing.median_interval(few, [1.0] * 3) == (1, 2)
    low, high = timing.median_interval(many, [1.0] * 401)
    # Of 401, sqrt(401) times 1.96 / 2 ranks to either side: 19 or 20.
    assert 1.45 <= low <= 1.4525 and 1.5475 <= high <= 1.55


def test_steps_take_turns():
    ticks = itertools.count()  # one second between any two looks at the clock
    ran = []
    waits = {"a": 3, "b": 7, "c": 0}

    def step_of(name):
        def step():
            ran.append(name)
            for _ in range(waits[name]):
                next(ticks)

        return step

    steps = {name: step_of(name) for name in waits}
    clock = ticks.__next__
    seconds = timing.interleave(steps, 20, warm_up=2, repeats=2, clock=clock)
    for name, wait in waits.items():
        assert seconds[name] == [(2 * wait + 1) / 2] * 20
    turns = [tuple(ran[i : i + 6 : 2]) for i in range(0, len(ran), 6)]
    assert len(turns) == 22 and ran[::2] == ran[1::2]
    assert set(Counter(turns)) == set(itertools.permutations(waits))


# Memory ------------------------------------------------------------------------------------------


def test_the_peak_is_beyond_what_stays():
    kept = []

    def step():
        first = torch.empty(1000)
        second = torch.empty(250)  # 5000 bytes: the peak
        del first
        kept.append(torch.empty(500))  # 3000
        del second

    assert rules.peak_bytes(step) == 3000
    assert rules.peak_bytes(lambda: None) == 0


LARGEST = 4 * 32 * 16 * 9
CONVERTED = LARGEST + 4 * 8 * 32 * 9
STOCK = CONVERTED + 4 * (16 * 3 * 9 + 16 + 8)


def memory_of(rule: str) -> tuple[int, int]:
    """State and peak of a small net's training by SGD with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 8, 3, padding=1),
    )
    convert_feedback(model, rule, exclude="0")
    # Without weight decay, torch's optimiser needs no memory for a moment.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    image = torch.randn(8, 3, 16, 16)

    def step():
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()

    step()
    peak = rules.peak_bytes(step)
    state = rules.state_bytes(model, optimizer)
    return state, state + peak


def test_memory_is_what_a_rule_must_keep():
    """Parameter, gradient and momentum, and beyond them the rule's; at the peak one weight more."""
    found = {rule: memory_of(rule) for rule in RULES}
    assert {rule: state - 3 * STOCK for rule, (state, _) in found.items()} == {
        "bp": 0,
        "ss": 0,
        "frsf": CONVERTED,
        "brsf": 0,
        "fa": CONVERTED,
        "fasi": CONVERTED,
        "kp": 3 * CONVERTED,
    }
    peaks = {rule: peak for rule, (_, peak) in found.items()}
    activations = 4 * 8 * (3 + 2 * 16 + 2 * 32 + 8) * 16 * 16  # what the forward pass keeps
    assert peaks["bp"] - 3 * STOCK > 0.5 * activations
    assert 0 < peaks["ss"] - peaks["bp"] <= LARGEST
    assert CONVERTED <= peaks["frsf"] - peaks["bp"] <= CONVERTED + LARGEST
    # What a layer saves for its backward pass besides may be a few numbers.
    assert peaks["fa"] - peaks["bp"] == pytest.approx(CONVERTED, abs=1000)
    assert 2 * CONVERTED <= peaks["kp"] - peaks["bp"] <= 3 * CONVERTED + 1000


# Rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "batch", "size"),
    [("retinanet_r18", 1, 64), ("torchvision_resnet18", 2, 32), ("mlp", 2, 6)],
)
def test_all_contestants_compute_the_same(network, batch, size):
    losses = {}
    for rule in ("bp", "ss", "kp"):
        contestant = rules.Contestant(rules.Case(network, batch, size), rule)
        losses[rule] = [contestant.step().item() for _ in range(2)]
        layers = [m for m in contestant.model.modules() if isinstance(m, AsymmetricLayer)]
        assert {layer.rule.short_name for layer in layers} == {rule} - {"bp"}
    rules.check_losses({"stock": losses["bp"][0], "ss": losses["ss"][0]})
    for values in losses.values():
        assert values == pytest.approx(losses["bp"], rel=1e-6)


@pytest.mark.parametrize("loss", [1.5, float("nan"), float("inf")])
def test_another_loss_than_stocks_is_refused(loss):
    with pytest.raises(RuntimeError, match="ss computes the loss"):
        rules.check_losses({"stock": 1.0, "ss": loss})


def test_modes_are_what_they_say():
    contestant = rules.Contestant(rules.Case("resnet18", 2, 32, "bf16+channels_last"), "ss")
    layer = next(m for m in contestant.model.modules() if isinstance(m, AsymmetricLayer))
    types = []
    layer.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    contestant.step()
    assert types == [torch.bfloat16]
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


TINY = ("--batch", 2, "--size", 32, "--pairs", 2, "--warm-up", 0, "--device", "cpu")


def test_rules_are_measured(monkeypatch, capsys, tmp_path):
    """Promises too, and BioTorch: something in its place, that leaves backpropagation."""
    biotorch = ModuleType("biotorch.module.biomodule")
    biotorch.BioModule = lambda net, mode: print("loud") or net
    for name in ("biotorch", "biotorch.module"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, biotorch.__name__, biotorch)
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: biotorch)
    never = [(rules.Case("resnet18", 2, 32), {"ss": 0.0, "fa": 99.0})]
    monkeypatch.setattr(rules, "promises", lambda device: list(never))

    file = tmp_path / "times.json"
    run(rules, monkeypatch, *TINY, "--rules", "ss", "fa", "--promise", "--biotorch", "--json", file)
    printed = capsys.readouterr().out
    assert "<= 0.00 DOES NOT HOLD" in printed and "<= 99.00 holds" in printed
    assert "loud" not in printed
    promised, against = json.loads(file.read_text())["measurements"]
    assert [row["name"] for row in promised["rows"]] == ["stock", "control", "ss", "fa"]
    assert promised["rows"][0]["ratio"] == [1, 1, 1]
    assert against["case"]["network"] == "torchvision_resnet18"
    assert f"| {against['rows'][-1]['ratio_to_ours'][0]:.3f} " in printed


def test_what_is_promised():
    for case, limits in rules.promises("cpu"):
        assert limits.keys() == rules.LIMITS.keys()
        assert case.network in rules.NETWORKS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--networks", "vgg"], "invalid choice: 'vgg'"),
        (["--modes", "float32+fp8"], "unknown fp8"),
        (["--rules", "xy"], "unknown feedback rule 'xy'"),
        (["--pairs", "1"], "2 at least"),
        (["--biotorch"], "pip install --no-deps biotorch"),
    ],
)
def test_what_the_rules_benchmark_refuses(monkeypatch, capsys, words, message):
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(rules, monkeypatch, *words)
    assert message in capsys.readouterr().err


# Loader and optimiser ----------------------------------------------------------------------------


def test_the_loader_is_measured(monkeypatch, tmp_path, capsys):
    file = tmp_path / "figures.json"
    run(loader, monkeypatch, "--count", 1, "--repeats", 2, "--json", file)
    found = json.loads(file.read_text())["sets"]
    assert found["usual in ImageNet"]["share_reduced"] == 0
    assert found["large"]["share_reduced"] == 1
    assert 0 < found["large"]["difference_where_reduced"] < 3
    assert capsys.readouterr().out.count("| torchvision, control ") == 2


def test_own_images(monkeypatch, tmp_path):
    (tmp_path / "class").mkdir()
    for index in range(4):
        name = f"{index}.{['JPEG', 'png'][index % 2]}"
        Image.new("RGB", (30 + index, 20)).save(tmp_path / "class" / name)
    file = tmp_path / "figures.json"
    run(loader, monkeypatch, "--images", tmp_path, "--repeats", 2, "--json", file)
    (found,) = json.loads(file.read_text())["sets"].values()
    assert found["images"] == 2
    with pytest.raises(SystemExit):
        run(loader, monkeypatch, "--images", "nowhere")


def test_a_mapper_that_is_not_torchvisions_is_refused(tmp_path):
    file = tmp_path / "a.jpg"
    Image.new("RGB", (30, 20), (9, 9, 9)).save(file)
    pipelines = loader.build_pipelines()
    records = [{"file_name": str(file), "image_id": 0, "label": 0}]
    assert loader.compare(pipelines, records).shape == (1,)
    pipelines[loader.FULL] = lambda record: torch.zeros(3, 224, 224, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a.jpg, ours is not torchvision's tensor"):
        loader.compare(pipelines, records)


def test_locally_connected_layers_are_compared_with_what_computes_the_same(monkeypatch, capsys):
    x = torch.randn(2, 1, 28, 28)
    ours = local.network("mnist", local.LocallyConnected2d, padding="same")
    unfolded = local.network("mnist", local.Unfolded, padding="same")
    state = ours.state_dict()
    for name, weight in state.items():
        if weight.dim() == 3:
            state[name] = weight.unflatten(2, (9, -1)).transpose(2, 3).flatten(2)
    unfolded.load_state_dict(state)
    torch.testing.assert_close(unfolded(x), ours(x))
    assert local.network("mnist", local.tied)(x).shape == (2, 10)
    run(local, monkeypatch, "--networks", "mnist", "--batch", 2, "--turns", 2)
    assert "| mnist     | unfold, einsum     |" in capsys.readouterr().out


def test_the_optimizer_is_measured():
    row = optimizer.measure({"no_sign_change": True}, "cpu", repeats=2)
    assert float(row["ours / stock"]) > 0


@pytest.mark.parametrize("options", [(), ("--fused",)])
def test_learners_are_compared_with_backpropagation(monkeypatch, capsys, options):
    run(learners, monkeypatch, "--networks", "fc", "--batch", 2, "--turns", 2, *options)
    table = capsys.readouterr().out
    assert all(f"| fc        | {name}" in table for name in ("bp", "dfa", "dtp, alternating"))


def test_annotation_files_like_cocos_are_read(tmp_path, monkeypatch):
    """By both; in this process, as a new one takes seconds to import."""

    def in_this_process(words, env, **_):
        *_, stage, name, folder = words
        monkeypatch.setenv("FVCORE_CACHE", env["FVCORE_CACHE"])
        return CompletedProcess(words, 0, json.dumps(reading.measure(stage, name, folder)))

    monkeypatch.setattr(reading.subprocess, "run", in_this_process)
    try:
        found = reading.compare(40, 1, tmp_path)
        file, images = tmp_path / "annotations.json", tmp_path / "images"
        assert reading.read(str(file), str(images), True)[0] == str(images / reading.name_of(0))
    finally:
        DatasetCatalog.pop("coco")
        MetadataCatalog.pop("coco")
    content = json.loads(file.read_text())
    assert found["images"] == len(content["images"]) == 40
    assert found["objects"] == len(content["annotations"]) > 200
    assert [row["ratio"] > 0 for row in found["rows"]] == [True] * 4
    assert found["rows"][0]["ratio"] == 1


def test_evaluations_are_compared(monkeypatch, tmp_path, capsys):
    pytest.importorskip("hotcoco")
    file = tmp_path / "figures.json"
    run(evaluation, monkeypatch, "--images", 3, "--rounds", 1, "--json", file)
    (found,) = json.loads(file.read_text())["sets"]
    assert found["detections"] == 300
    assert [row["difference"] <= 1e-9 for row in found["rows"]] == [True] * 3
    assert "| hotcoco, and files |" in capsys.readouterr().out


SMALL_SHAPES = ["--keys", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", 2]
SMALL_SHAPES += ["MODEL.RETINANET.NUM_CONVS", 1]


@pytest.fixture
def few_shapes(tmp_path, monkeypatch):
    generate_shapes(tmp_path, train=8, val=3, size=64)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_steps_of_trainers_are_compared(few_shapes, monkeypatch, tmp_path):
    file = tmp_path / "times.json"
    run(trainer, monkeypatch, "step", "--turns", 2, "--json", file, *SMALL_SHAPES)
    seconds = json.loads(file.read_text())
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(seconds, 2)
    assert set(seconds) == {timing.STOCK, timing.CONTROL, trainer.OURS}
    assert min(map(min, seconds.values())) > 0


def test_trainers_are_compared_on_the_same_model(few_shapes, tmp_path):
    def weights(cfg):
        return {name: weight.shape for name, weight in build_model(cfg).state_dict().items()}

    ours, stock = trainer.configs(str(tmp_path), list(map(str, SMALL_SHAPES[1:])))
    assert weights(ours) == weights(stock)
    assert ours.SOLVER.BASE_LR == stock.SOLVER.BASE_LR and "FEEDBACK" not in stock.MODEL


@pytest.mark.slow
@pytest.mark.parametrize("what", ["start", "processes"])
def test_starts_and_processes_are_timed(few_shapes, monkeypatch, tmp_path, what):
    file = tmp_path / "times.json"
    run(trainer, monkeypatch, what, "--turns", 2, "--json", file, *SMALL_SHAPES)
    found = json.loads(file.read_text())
    if what == "start":
        assert {len(times) for parts in found.values() for times in parts.values()} == {2}
        assert all("first step" in parts for parts in found.values())
    else:
        assert [len(steps) for steps in found.values()] == [2, 2]
        assert set(found["2"][0]) == {"step", *trainer.EXCHANGES}
