"""The benchmark: its statistics, its account of memory, and that it compares equals."""

import itertools
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from ss_detectron import FEEDBACK_REGISTRY, benchmark, convert_feedback
from ss_detectron.benchmark import Case, Contestant, measure, peak_bytes, ratio, state_bytes, timing
from ss_detectron.benchmark.measure import first_steps, operation_times
from ss_detectron.layers import AsymmetricLayer

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
RULES = [rule.short_name for _, rule in FEEDBACK_REGISTRY]


# Times -------------------------------------------------------------------------------------------


def test_a_ratio_is_that_of_the_same_turn():
    # 1 to 5 in some order; the times themselves are all over the place.
    reference = [1.0, 10.0, 0.5, 2.0, 4.0]
    found = ratio([3 * 1.0, 1 * 10.0, 5 * 0.5, 2 * 2.0, 4 * 4.0], reference)
    assert found == (3, 2, 4, 1, 5)
    assert (found.median, found.low, found.high) == (3, 2, 4)


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (5, 1), (8, 1), (9, 2), (20, 6), (30, 10)])
def test_the_interval_of_the_median_is_that_of_the_sign_test(count, rank):
    """Ranks of the tables (Conover, Practical Nonparametric Statistics)."""
    found = ratio(range(1, count + 1), [1] * count)
    assert (found.least, found.most) == (rank, count + 1 - rank)


def test_a_ratio_needs_pairs():
    with pytest.raises(ValueError, match="2 turns at least, got 1"):
        ratio([1.0], [1.0])
    with pytest.raises(ValueError):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("median", "noisy"), [(1.0, False), (1.02, False), (1.021, True), (0.981, False), (0.98, True)]
)
def test_a_control_beyond_two_per_cent_is_noisy(median, noisy):
    assert benchmark.is_noisy(benchmark.Ratio(median, 0, 9, 0, 9)) is noisy


def test_steps_take_turns(monkeypatch):
    clock = itertools.count()  # one second between any two looks at it
    ran = []
    waits = {"a": 3, "b": 7, "c": 0}

    def step_of(name):
        def step():
            ran.append(name)
            for _ in range(waits[name]):
                next(clock)

        return step

    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    steps = {name: step_of(name) for name in waits}
    seconds = benchmark.alternate(steps, 20, warm_up=2, repeats=2)

    assert {name: set(values) for name, values in seconds.items()} == {
        name: {(2 * wait + 1) / 2} for name, wait in waits.items()
    }
    assert all(len(values) == 20 for values in seconds.values())
    turns = [tuple(ran[i : i + 6 : 2]) for i in range(0, len(ran), 6)]
    assert len(turns) == 22 and ran[::2] == ran[1::2]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(Counter(turns)) == 6  # all orders there are
    again, ran[:] = list(ran), []
    benchmark.alternate(steps, 20, warm_up=2, repeats=2)
    assert ran == again


# Memory ------------------------------------------------------------------------------------------


def test_the_peak_is_beyond_what_stays():
    kept = []

    def step():
        first = torch.empty(1000)
        second = torch.empty(250)  # 5000 bytes: the peak
        del first
        kept.append(torch.empty(500))  # 3000
        del second

    assert peak_bytes(step) == 3000
    assert peak_bytes(lambda: None) == 0


class Trained(SimpleNamespace):
    """A small net, converted, after a first step with SGD."""

    def __init__(self, rule, momentum=0.9):
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
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=momentum)
        super().__init__(model=model, optimizer=optimizer, image=torch.randn(8, 3, 16, 16))
        self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.model(self.image).square().mean().backward()
        self.optimizer.step()

    def memory(self):
        peak = peak_bytes(self.step)
        state = state_bytes(self.model, self.optimizer)
        return state, state + peak


LARGEST = 4 * 32 * 16 * 9
CONVERTED = LARGEST + 4 * 8 * 32 * 9
STOCK = CONVERTED + 4 * (16 * 3 * 9 + 16 + 8)


def test_state_is_what_a_rule_must_keep():
    """Parameter, gradient and momentum, and beyond them the rule's."""
    beyond = {rule: Trained(rule).memory()[0] - 3 * STOCK for rule in RULES}
    assert beyond == {
        "bp": 0,
        "ss": 0,
        "frsf": CONVERTED,
        "brsf": 0,
        "fa": CONVERTED,
        "fasi": CONVERTED,
        "kp": 3 * CONVERTED,
    }


def test_the_peak_of_sign_symmetry_is_one_weight_more_than_stocks():
    peaks = {rule: Trained(rule).memory()[1] for rule in RULES}
    activations = 4 * 8 * (3 + 2 * 16 + 2 * 32 + 8) * 16 * 16  # what the forward pass keeps
    assert peaks["bp"] - 3 * STOCK > 0.5 * activations
    assert 0 < peaks["ss"] - peaks["bp"] <= LARGEST
    assert CONVERTED <= peaks["frsf"] - peaks["bp"] <= CONVERTED + LARGEST
    # What a layer saves for its backward pass besides may be a few numbers.
    assert peaks["fa"] - peaks["bp"] == pytest.approx(CONVERTED, abs=1000)
    assert 2 * CONVERTED <= peaks["kp"] - peaks["bp"] <= 3 * CONVERTED + 1000
    assert peaks["kp"] > peaks["frsf"]


# Contestants -------------------------------------------------------------------------------------

SMALL = [("resnet18", 2, 32), ("retinanet_r18", 1, 64), ("torchvision_resnet18", 2, 32)]


@pytest.mark.parametrize(("network", "batch", "size"), SMALL)
def test_all_contestants_compute_the_same(network, batch, size):
    losses = {}
    for rule in ("bp", "ss", "fa", "kp"):
        contestant = Contestant(Case(network, batch, size), rule)
        losses[rule] = [contestant.step().item() for _ in range(3)]
        converted = {m: m.rule.short_name for m in contestant.converted}
        assert set(converted.values()) == ({rule} - {"bp"})
        for name in getattr(contestant.model, "last_layers", ()):
            assert contestant.model.get_submodule(name) not in converted
        if rule == "bp":
            kinds = {type(m) for m in contestant.model.modules()}
            assert kinds & {nn.Conv2d, Conv2d}
            assert not any(issubclass(kind, AsymmetricLayer) for kind in kinds)
    assert all(torch.tensor(values).isfinite().all() for values in losses.values())
    for values in losses.values():
        assert values == pytest.approx(losses["bp"], rel=1e-6)


def test_modes_are_what_they_say():
    types = {}
    for mode in ("float32", "bf16", "bf16+channels_last"):
        contestant = Contestant(Case("resnet18", 2, 32, mode), "ss")
        layer = contestant.converted[3]
        layer.register_forward_hook(lambda m, i, o, mode=mode: types.update({mode: o.dtype}))
        contestant.step()
        in_order = layer.weight.is_contiguous()
        assert in_order is ("channels_last" not in mode)
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) is not in_order
    assert types["float32"] == torch.float32
    assert types["bf16"] == types["bf16+channels_last"] == torch.bfloat16


@pytest.mark.parametrize(("network", "parts"), [("resnet18", 1), ("retinanet_r18", 2)])
def test_compilation_is_asked_for(network, parts, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **kwargs: compiled.append(module))
    model = Contestant(Case(network, 2, 32, "compile")).model
    assert set(compiled) == {getattr(model, name) for name in ("backbone", "head")[:parts]}


def test_unknown_cases_are_refused():
    with pytest.raises(ValueError, match="unknown network 'vgg'; choose of resnet18"):
        Contestant(Case("vgg", 1, 32))
    with pytest.raises(ValueError, match="unknown mode 'fp8'"):
        Contestant(Case("resnet18", 1, 32, "bf16+fp8"))
    with pytest.raises(ValueError, match="take torchvision_resnet18"):
        Contestant(Case("resnet18", 1, 32), "biotorch usf")


@pytest.mark.parametrize("loss", [1.5, float("nan"), float("inf")])
def test_another_loss_than_stocks_is_refused(loss):
    def computing(value):
        return SimpleNamespace(step=lambda: torch.tensor(value))

    first_steps({"stock": computing(1.0), "ss": computing(1.001)})
    with pytest.raises(RuntimeError, match="ss computes the loss"):
        first_steps({"stock": computing(1.0), "ss": computing(loss)})
    with pytest.raises(RuntimeError, match="stock computes the loss"):
        first_steps({"stock": computing(float("nan")), "ss": computing(1.0)})


# Whole measurements ------------------------------------------------------------------------------


def test_a_measurement_is_what_json_can_write():
    found = measure(Case("resnet18", 2, 32), ["ss", "kolen_pollack"], pairs=2, warm_up=0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    control = ratio(found["seconds"]["control"], found["seconds"]["stock"])
    assert found["noisy"] is benchmark.is_noisy(control)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["stock", "control", "ss", "kp"]
    converted = rows["kp"]["converted"]
    assert converted == rows["ss"]["converted"] == 4 * (11_689_512 - 1000 * 513 - 9600)
    assert rows["ss"]["largest_converted"] == 4 * 512 * 512 * 9
    assert rows["control"]["state_beyond_stock"] == rows["control"]["peak_beyond_stock"] == 0
    assert rows["ss"]["state_beyond_stock"] == 0
    assert rows["kp"]["state_beyond_stock"] == 3 * converted
    assert rows["stock"]["ratio"] == dict.fromkeys(benchmark.Ratio._fields, 1)
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert row["ratio"] == ratio(found["seconds"][name], found["seconds"]["stock"])._asdict()


def test_operation_times_tell_what_a_step_spends():
    a = torch.randn(200, 200)
    times = operation_times({"product": lambda: a @ a, "sum": lambda: a.sum()}, 2)
    assert times["product"]["aten::mm"] > 0 and "aten::mm" not in times["sum"]
    assert times["sum"]["aten::sum"] > 0


# The tool ----------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool with some words; what it has printed."""
    namespace = runpy.run_path(str(TOOL))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, words)])
        namespace["main"]()
        return capsys.readouterr().out

    run.namespace = namespace
    return run


TINY = ("--batch", 2, "--size", 32, "--pairs", 2, "--warm-up", 0, "--device", "cpu")


def test_the_tool_prints_a_table_and_writes_json(tool, tmp_path):
    file = tmp_path / "times.json"
    networks = ("--networks", "resnet18", "retinanet_r18", "--rules", "ss", "fa")
    printed = tool(*TINY, *networks, "--json", file)
    found = json.loads(file.read_text())
    assert found["threads"] == torch.get_num_threads()
    assert [m["case"]["network"] for m in found["measurements"]] == ["resnet18", "retinanet_r18"]
    for measured in found["measurements"]:
        assert [row["name"] for row in measured["rows"]] == ["stock", "control", "ss", "fa"]
        for row in measured["rows"]:
            assert f"| {row['ratio']['median']:.3f} " in printed
    assert printed.count("| rule ") == 2
    assert printed.count("NOISY") == sum(m["noisy"] for m in found["measurements"])


def test_the_tool_profiles(tool):
    printed = tool(*TINY, "--profile", "ss")
    assert "aten::sign" in printed and "| all " in printed


def test_the_tool_repeats_what_is_noisy(tool, monkeypatch, capsys):
    noisy = [True, True, False, True]
    calls = []

    def fake(case, rules, **options):
        calls.append(rules)
        return {"noisy": noisy[len(calls) - 1]}

    monkeypatch.setitem(tool.namespace["retried"].__globals__, "measure", fake)
    args = SimpleNamespace(retry=3, pairs=2, warm_up=0, steps=1)
    assert tool.namespace["retried"](Case("resnet18", 2, 32), ["ss"], False, args) == {
        "noisy": False
    }
    assert len(calls) == 3
    args.retry = 0
    assert tool.namespace["retried"](Case("resnet18", 2, 32), ["ss"], False, args)["noisy"]
    assert "repeat it (--retry N)" in capsys.readouterr().err


def test_a_promise_is_kept_or_not(tool):
    verdict = tool.namespace["verdict"]
    measured = {"limits": {"ss": 1.02, "fa": 1.02, "biotorch usf": 1.04}, "noisy": False}

    def row(name, median, peak=0, state=0, **more):
        sizes = {"largest_converted": 2**20, "converted": 4 * 2**20}
        beyond = {"peak_beyond_stock": peak, "state_beyond_stock": state}
        return {"name": name, "ratio": {"median": median}, **sizes, **beyond, **more}

    assert verdict(row("ss", 1.02, 2**20), measured) == "<= 1.02 holds; <= 1.0 MiB holds"
    assert verdict(row("ss", 1.021), measured).startswith("<= 1.02 DOES NOT HOLD; ")
    assert verdict(row("ss", 1.0, 1.1 * 2**20), measured).endswith("1.0 MiB DOES NOT HOLD")
    assert verdict(row("fa", 1.0, 4 * 2**20), measured).endswith("4.0 MiB holds")
    assert verdict(row("fa", 1.0, 0, 4.1 * 2**20), measured).endswith("DOES NOT HOLD")
    assert verdict(row("control", 2.0), measured) == ""
    for ours, said in ((1.04, "holds"), (1.03, "DOES NOT HOLD")):
        biotorch = row("biotorch usf", 0.5, ratio_to_ours={"median": ours})
        assert verdict(biotorch, measured) == f"/ ours >= 1.04 {said}"
    assert "(noisy)" in verdict(row("ss", 1.0), {**measured, "noisy": True})


def test_the_promised_cases(tool):
    args = SimpleNamespace(device="cpu", scale="mean_abs", biotorch=True)
    plan = tool.namespace["promised"](args)
    assert [(str(case).split(", cpu")[0], with_biotorch) for case, _, with_biotorch, _ in plan] == [
        ("resnet18, batch 16 at 224, float32", False),
        ("retinanet_r18, batch 2 at 320, float32", False),
        ("resnet18, batch 8 at 128, float32", False),
        ("resnet18, batch 16 at 224, compile", False),
        ("torchvision_resnet18, batch 16 at 224, float32", True),
        ("torchvision_resnet18, batch 8 at 128, float32", True),
    ]
    for case, rules, with_biotorch, limits in plan:
        case.check()
        assert set(rules) <= set(RULES)
        # A limit that no contestant's name fits would promise nothing.
        biotorch = {f"biotorch {benchmark.BIOTORCH_MODES[r]}" for r in rules if with_biotorch}
        assert limits.keys() == (biotorch or set(rules))
    limits = [limits for *_, limits in plan]
    assert (
        limits[0] == limits[1] == {"ss": 1.02, "fa": 1.02, "frsf": 1.05, "brsf": 1.05, "kp": 1.05}
    )
    assert limits[2] == {rule: pytest.approx(limit + 0.02) for rule, limit in limits[0].items()}
    args.biotorch = False
    assert tool.namespace["promised"](args) == plan[:4]


def test_what_the_tool_refuses(tool, capsys):
    for words, message in (
        (["--networks", "vgg"], "invalid choice: 'vgg'"),
        (["--modes", "fp8"], "unknown mode 'fp8'"),
        (["--rules", "xy"], "unknown feedback rule 'xy'"),
        (["--pairs", "1"], "2 at least"),
    ):
        with pytest.raises(SystemExit):
            tool(*words)
        assert message in capsys.readouterr().err


def test_without_biotorch_the_tool_says_how_to_get_it(tool, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        tool("--biotorch")
    assert "pip install ss-detectron[bench]" in capsys.readouterr().err


def test_biotorch_takes_part(tool, tmp_path, monkeypatch):
    """Here something in its place, that leaves the network on backpropagation."""
    package = tmp_path / "biotorch" / "module"
    package.mkdir(parents=True)
    (tmp_path / "biotorch" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "biomodule.py").write_text(
        "def BioModule(net, mode):\n    print('loud')\n    net.mode = mode\n    return net\n"
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "biotorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "times.json"
    try:
        printed = tool(*TINY, "--biotorch", "--rules", "ss", "kp", "--json", file)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "biotorch"]:
            del sys.modules[name]
    assert "loud" not in printed
    assert "| biotorch usf " in printed and "biotorch kp" not in printed
    (measured,) = json.loads(file.read_text())["measurements"]
    seconds, row = measured["seconds"], measured["rows"][-1]
    assert row["ratio_to_ours"] == ratio(seconds["biotorch usf"], seconds["ss"])._asdict()
    assert f"| {row['ratio_to_ours']['median']:.3f} " in printed
