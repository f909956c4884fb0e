"""Comparisons: which runs they take, running them, the table, and one whole comparison."""

import json
import os
import runpy
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from image_utils import write_images
from output_folders import CLASSIFICATION, DETECTION, write_run
from run_utils import ROOT, end, start

from ss_detectron import FEEDBACK_REGISTRY
from ss_detectron.experiments import launch
from ss_detectron.experiments.compare import compare, summarise, table, write_report
from ss_detectron.experiments.launch import environments, hardware, read_launches, run_all
from ss_detectron.experiments.plan import describe_plan, plan_runs, starting_config
from ss_detectron.experiments.runs import read_runs

TOOL = ROOT / "tools" / "compare_rules.py"
BP, SS, FA, KP = "backpropagation", "sign_symmetry", "feedback_alignment", "kolen_pollack"


# Which config a rule starts from -----------------------------------------------------------------


def test_a_rule_starts_from_its_own_config_or_its_nearest_relatives():
    starts = {rule: starting_config(DETECTION, rule) for rule, _ in FEEDBACK_REGISTRY}
    bp, ss, fa = (f"quick/shapes_retinanet_{short}.yaml" for short in ("bp", "ss", "fa"))
    assert starts == {
        BP: (bp, []),
        SS: (ss, []),
        FA: (fa, []),
        **{
            name: (file, ["MODEL.FEEDBACK.RULE", name])
            for name, file in {
                "sign_symmetry_fixed_magnitude": ss,
                "sign_symmetry_batchwise_magnitude": ss,
                "feedback_alignment_signed_init": fa,
                KP: fa,
            }.items()
        },
    }


@pytest.mark.parametrize("name", ["mine_kp.yaml", "mine.yaml", "fa_study_ss_kp.yaml"])
def test_a_rule_without_a_config_of_its_own_changes_the_rule(name, tmp_path):
    file = tmp_path / name
    file.write_text("MODEL: {FEEDBACK: {RULE: kp, GAIN: 2.0}}\n")
    assert starting_config(str(file), KP) == (str(file), [])
    for rule in (BP, SS, "sign_symmetry_fixed_magnitude"):
        assert starting_config(str(file), rule) == (str(file), ["MODEL.FEEDBACK.RULE", rule])


def test_a_config_named_after_another_rule_than_it_learns_by_is_made_the_rules_own(tmp_path):
    for name in ("x_ss.yaml", "x_fa.yaml"):
        (tmp_path / name).write_text("MODEL: {FEEDBACK: {RULE: ss}}\n")
    expected = str(tmp_path / "x_fa.yaml"), ["MODEL.FEEDBACK.RULE", FA]
    assert starting_config(str(tmp_path / "x_ss.yaml"), FA) == expected


def test_a_last_layer_on_the_configs_rule_changes_with_it(tmp_path):
    name = "cifar10_resnet18_ss_lastlayer.yaml"
    assert starting_config(name, FA) == ("cifar10_resnet18_fa_lastlayer.yaml", [])
    both = ["MODEL.FEEDBACK.RULE", BP, "MODEL.FEEDBACK.LAST_LAYER_RULE", BP]
    assert starting_config(name, BP) == (name, both)
    # But from backpropagation, the last layer stays on it.
    (tmp_path / "mine.yaml").write_text("MODEL: {FEEDBACK: {RULE: bp}}\n")
    _, overrides = starting_config(str(tmp_path / "mine.yaml"), SS)
    assert overrides == ["MODEL.FEEDBACK.RULE", SS]


# The plan ----------------------------------------------------------------------------------------


def test_the_plan_has_a_run_for_each_rule_and_seed(tmp_path):
    options = ["SOLVER.MAX_ITER", "1000"]
    runs = plan_runs(DETECTION, {"bp": [1, 2], "kp": [7]}, tmp_path, options)
    assert [run.name for run in runs] == ["bp_seed1", "bp_seed2", "kp_seed7"]
    *_, kp = runs
    assert (kp.label, kp.seed, kp.folder) == (KP, 7, tmp_path / "kp_seed7")
    assert kp.config["MODEL.FEEDBACK.GAIN"] == 1.0  # of the config of feedback alignment
    # The options say it all: the config file with them is the config.
    expected = {
        "MODEL.FEEDBACK.RULE": KP,
        "SOLVER.MAX_ITER": 1000,
        "TEST.ALIGNMENT_PERIOD": 40,
        "SEED": 7,
        "MODEL.FEEDBACK.SEED": 7,
        "OUTPUT_DIR": str(tmp_path / "kp_seed7"),
    }
    options = dict(zip(kp.options[::2], kp.options[1::2], strict=True))
    assert options == {key: str(value) for key, value in expected.items()}
    assert {key: kp.config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "period"),
    [
        (["SOLVER.MAX_ITER", "4"], 40),
        (["SOLVER.MAX_ITER", "90000"], 4500),
        (["TEST.ALIGNMENT_PERIOD", "5"], 5),
    ],
)
def test_alignment_is_measured_some_ten_to_twenty_times(options, period, tmp_path):
    (run,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path, options)
    assert run.config["TEST.ALIGNMENT_PERIOD"] == period


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ({"xy": [1]}, [], "unknown feedback rule 'xy'"),
        ({"bp": [1], BP: [2]}, [], "backpropagation is named twice"),
        ({"bp": [1]}, ["SOLVER.MAX_ITER"], "in pairs"),
        ({"bp": [1]}, ["SEED", "3"], "SEED: the comparison sets this itself"),
        ({"bp": [1]}, ["SOLVER.MAX_ITR", "3"], "SOLVER.MAX_ITR"),
        ({"bp": [1]}, ["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    ],
)
def test_what_does_not_fit_is_refused(rules, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_runs(DETECTION, rules, tmp_path, options)
    with pytest.raises(FileNotFoundError, match="no_such"):
        plan_runs("no_such.yaml", {"fa": [1]}, tmp_path)


# What is done already ----------------------------------------------------------------------------


def leave(run, rows=(), checkpoint="", final=False, **changes) -> None:
    """What the run leaves in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    nested: dict = {}
    for key, value in {**run.config, **changes}.items():
        node = nested
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    (run.folder / "config.yaml").write_text(yaml.safe_dump(nested))
    (run.folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint:
        (run.folder / "last_checkpoint").write_text(checkpoint)
    if final:
        (run.folder / "model_final.pth").touch()


def test_a_run_is_finished_with_its_weights_and_their_evaluation(tmp_path):
    (run,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path, ["SOLVER.MAX_ITER", "4"])
    assert not run.is_finished()
    loss, early = {"iteration": 3, "total_loss": 1.0}, {"iteration": 1, "bbox/AP": 1.0}
    leave(run, [loss, early], final=True)
    assert not run.is_finished()
    leave(run, [loss, {"iteration": 4, "bbox/AP": 1.0}])
    assert run.is_finished()
    (run.folder / "model_final.pth").unlink()
    assert not run.is_finished()
    leave(run, [loss, {"iteration": 5, "one/bbox/AP": 1.0}], final=True)  # resumed, two test sets
    assert run.is_finished()
    (run.folder / "metrics.json").unlink()
    assert not run.is_finished()


def test_a_folder_of_another_config_is_told_by_its_keys(tmp_path):
    (run,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path)
    assert run.conflicts() == {}
    moved = {"OUTPUT_DIR": "/elsewhere", "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 9}
    leave(run, **moved)
    assert run.conflicts() == {}
    leave(run, **{"SOLVER.MAX_ITER": 800, "DATASETS.TRAIN": ["other"]})
    assert run.conflicts() == {
        "DATASETS.TRAIN": (["other"], ["shapes_train"]),
        "SOLVER.MAX_ITER": (800, 400),
    }


def test_the_plan_is_described(tmp_path):
    runs = plan_runs(DETECTION, {"bp": [1, 2], "ss": [1], "kp": [1]}, tmp_path)
    end = runs[0].config["SOLVER.MAX_ITER"]
    leave(runs[0], [{"iteration": end, "bbox/AP": 1.0}], final=True)
    leave(runs[1], checkpoint="model_0000199.pth")
    leave(runs[2], **{"SOLVER.BASE_LR": 1.0})
    states = [line.split("|")[-2].strip() for line in describe_plan(runs).splitlines()[2:]]
    assert states == ["finished", "goes on", "has another config: SOLVER.BASE_LR", "new"]
    assert f"MODEL.FEEDBACK.RULE {KP}" in describe_plan(runs)


# Running, with a tool that trains nothing --------------------------------------------------------

FAKE = """
import json, os, pathlib, signal, subprocess, sys, time

words = sys.argv[1:]
options = words[words.index("--num-gpus") + 2 :]
resume = "--resume" in options
options = dict(zip(options[resume::2], options[resume + 1 :: 2]))
folder = pathlib.Path(options["OUTPUT_DIR"])
record = {"name": folder.name, "resume": resume, "threads": os.environ.get("OMP_NUM_THREADS")}
with open(folder.parent / "calls", "a") as file:
    file.write(json.dumps(record | {"gpus": words[words.index("--num-gpus") + 1]}) + "\\n")

behaviours = pathlib.Path(__file__).with_suffix(".json")
behaviour = json.loads(behaviours.read_text()).get(folder.name) if behaviours.exists() else None
if behaviour == "fail":
    print("no memory left")
    sys.exit(3)
signal.alarm(60)  # what follows may wait, but not for ever
if behaviour in ("r", "w"):  # two runs wait for each other
    open(folder.parent / "meeting", behaviour).close()
if behaviour == "save":  # when asked to stop, which takes a second
    def save(*_):
        asked = time.time()
        time.sleep(1)
        (folder / "saved").write_text(json.dumps([asked, time.time()]))
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
if behaviour == "deaf":  # and so is its child
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
if behaviour in ("save", "deaf"):
    (folder / "ready").touch()
    while True:
        signal.pause()
if behaviour != "nothing":
    (folder / "model_final.pth").touch()
    row = {"iteration": int(options["SOLVER.MAX_ITER"]), "bbox/AP": 10.0 * int(options["SEED"])}
    (folder / "metrics.json").write_text(json.dumps(row) + "\\n")
"""


@pytest.fixture
def fake(tmp_path) -> Path:
    tool = tmp_path / "train_net.py"
    tool.write_text(FAKE)
    return tool


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "_cores", lambda: 5)


def plan(tmp_path, rules=None):
    return plan_runs(
        DETECTION, rules or {"bp": [1], "ss": [1]}, tmp_path / "out", ["SOLVER.MAX_ITER", "4"]
    )


def calls(tmp_path) -> list[dict]:
    path = tmp_path / "out" / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def behave(fake, **behaviours) -> None:
    fake.with_suffix(".json").write_text(json.dumps(behaviours))


def test_runs_start_or_go_on_in_their_order(tmp_path, fake, no_gpu):
    runs = plan(tmp_path, {"bp": [2, 1], "ss": [1]})
    leave(runs[1], checkpoint="model_0000001.pth")
    assert run_all(runs, fake) == []
    assert [(call["name"], call["resume"]) for call in calls(tmp_path)] == [
        ("bp_seed2", False),
        ("bp_seed1", True),
        ("ss_seed1", False),
    ]
    assert {(call["threads"], call["gpus"]) for call in calls(tmp_path)} == {("5", "1")}
    assert all(run.is_finished() for run in runs)
    (launched,) = read_launches(runs[1].folder)
    assert launched["hardware"] == hardware()
    assert launched["command"].startswith(f"{fake} --config-file quick/shapes_retinanet_bp.yaml")
    assert launched["command"].endswith(f"OUTPUT_DIR {runs[1].folder}")
    assert "--resume" in launched["command"]


def test_runs_at_a_time_share_the_cores(tmp_path, fake, no_gpu):
    os.makedirs(tmp_path / "out")
    os.mkfifo(tmp_path / "out" / "meeting")
    behave(fake, bp_seed1="r", ss_seed1="w")
    assert run_all(plan(tmp_path), fake, jobs=2) == []
    assert [call["threads"] for call in calls(tmp_path)] == ["2", "2"]


def interrupt(runs, fake, seconds: float = 0.0, number=signal.SIGINT) -> None:
    """Runs all at a time until they are ready, then sends this process signals."""

    def send():
        while not all((run.folder / "ready").exists() for run in runs):
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        if seconds:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

    # As the tool has them; a test run in the background of a script has SIGINT ignored.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    before_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            run_all(runs, fake, jobs=2)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_int)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whatever_ends_the_comparison_lets_its_runs_save_at_the_same_time(
    number, tmp_path, fake, no_gpu
):
    behave(fake, bp_seed1="save", ss_seed1="save")
    runs = plan(tmp_path)
    interrupt(runs, fake, number=number)
    times = [json.loads((run.folder / "saved").read_text()) for run in runs]
    assert max(asked for asked, _ in times) < min(saved for _, saved in times)


def alive(pid: str) -> bool:
    try:
        return " Z " not in Path("/proc", pid, "stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(("grace", "seconds"), [(0.2, 0.0), (60.0, 0.2)])
def test_runs_that_do_not_stop_are_killed_at_the_deadline_or_on_another_interrupt(
    grace, seconds, tmp_path, fake, no_gpu, monkeypatch
):
    monkeypatch.setattr(launch, "GRACE", grace)
    behave(fake, bp_seed1="deaf", ss_seed1="deaf")
    runs = plan(tmp_path)
    start = time.monotonic()
    interrupt(runs, fake, seconds)
    assert time.monotonic() - start < 30
    for run in runs:
        while alive((run.folder / "child").read_text()):  # killed, but not yet gone
            assert time.monotonic() - start < 30
            time.sleep(0.01)


def test_gpus_are_dealt_out_in_turns(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    key = "CUDA_VISIBLE_DEVICES"
    assert environments(2, 2) == [{key: "0,1"}, {key: "2,3"}]
    assert environments(3, 2) == [{key: "0,1"}, {key: "2,3"}, {key: "0,1"}]
    monkeypatch.setenv(key, "7,5,3,1")
    assert environments(4, 1) == [{key: "7"}, {key: "5"}, {key: "3"}, {key: "1"}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's number
    assert environments(2, 1) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_hardware_names_the_machine_and_its_software(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: ["A", "B", "A"][i])
    for part in ("2 x A, 1 x B", f"torch {torch.__version__}", " cores, "):
        assert part in hardware()


# The table ---------------------------------------------------------------------------------------


def result(folder, rule, seed, value, time, metric="bbox/AP", **options) -> Path:
    logged = [
        {"iteration": 19, "time": 9 * time, metric: 1.0, "alignment/gradient_angle": 80.0},
        {"iteration": 39, "time": time},
        {"iteration": 59, "time": 2 * time, metric: value, "alignment/gradient_angle": 10.0 * seed},
    ]
    return write_run(folder / f"{rule}{seed}", logged, rule, SEED=seed, **options)


def test_the_table_has_means_deviations_and_ratios(tmp_path):
    values = {"bp": [60.0, 64.0, 71.0], "ss": [50.0, 53.0], "kp": [13.0]}
    for rule, results in values.items():
        for seed, value in enumerate(results, 1):
            result(tmp_path, rule, seed, value, 0.5 if rule == "bp" else 0.6)
    summary = summarise(read_runs(sorted(tmp_path.iterdir())), "bbox/AP")
    assert [row.label for row in summary] == [BP, SS, KP]
    bp, ss, kp = summary
    assert (bp.values, bp.seeds) == (values["bp"], [1, 2, 3])
    assert bp.mean == pytest.approx(65)
    assert bp.standard_deviation == pytest.approx(statistics.stdev(values["bp"]))
    assert (bp.ratio_to_bp, bp.difference_to_bp, bp.time_ratio_to_bp) == (1, 0, 1)
    assert ss.ratio_to_bp == pytest.approx(51.5 / 65)
    assert ss.difference_to_bp == pytest.approx(51.5 - 65)
    assert (bp.seconds_per_step, ss.seconds_per_step) == pytest.approx((1.0, 1.2))
    assert ss.time_ratio_to_bp == pytest.approx(1.2)
    assert (bp.gradient_angle, ss.gradient_angle) == (20, 15)
    assert (kp.mean, kp.standard_deviation) == (13, None)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table(summary, "bbox/AP").splitlines()
    ]
    assert cells[0] == [
        "rule",
        "seeds",
        "box AP, %",
        "ratio to BP",
        "time per step, s",
        "time ratio to BP",
        "gradient angle at the end, °",
    ]
    assert cells[2:] == [
        ["BP", "3", "65.0 ± 5.6", "1.00", "1", "1.00", "20.0"],
        ["SS", "2", "51.5 ± 2.1", "0.79", "1.2", "1.20", "15.0"],
        ["KP", "1", "13.0", "0.20", "1.2", "1.20", "10.0"],
    ]


def test_errors_are_compared_in_points_too_and_nothing_without_backpropagation(tmp_path):
    metric = "classification/top1_error"
    for rule, value in (("bp", 10.0), ("fa", 25.5)):
        result(tmp_path, rule, 1, value, 1.0, metric, config_file=CLASSIFICATION)
    summary = summarise(read_runs(sorted(tmp_path.iterdir())), metric)
    text = table(summary, metric)
    assert "difference to BP, points" in text
    assert "+15.5" in text and "2.55" in text
    (row,) = summary = summarise(read_runs([tmp_path / "fa1"]), metric)
    assert (row.ratio_to_bp, row.difference_to_bp, row.time_ratio_to_bp) == (None, None, None)
    assert "to BP" not in table(summary, metric)


def test_what_is_not_known_is_said(tmp_path, caplog):
    result(tmp_path, "bp", 1, float("nan"), 1.0)
    result(tmp_path, "ss", 1, 10.0, 1.0)
    write_run(tmp_path / "fa", [{"iteration": 3, "total_loss": 1.0}], "fa")
    bp, ss = summarise(read_runs(sorted(tmp_path.iterdir())), "bbox/AP")
    assert bp.mean != bp.mean and ss.mean == 10
    assert ss.seconds_per_step == 2
    assert "bp1 ended with bbox/AP nan" in caplog.text
    assert "fa has no bbox/AP and is not in the table" in caplog.text


# The whole comparison, with the fake -------------------------------------------------------------


def test_a_comparison_runs_what_is_missing_and_reports(tmp_path, fake, no_gpu, caplog):
    runs = plan(tmp_path, {"bp": [1, 3], "ss": [1], "fa": [1]})
    behave(fake, ss_seed1="nothing", fa_seed1="fail")
    text, complete = compare(runs, tmp_path / "out", fake, command="the command")
    assert not complete
    assert "| BP" in text and "20.0 ± 14.1" in text and "FA" not in text
    assert len(calls(tmp_path)) == 4
    assert "ss_seed1 ended without a last evaluation" in caplog.text
    assert "fa_seed1 failed with exit code 3" in caplog.text and "no memory left" in caplog.text
    assert (runs[3].folder / "train.log").read_text() == "no memory left\n"

    behave(fake)
    text, complete = compare(runs, tmp_path / "out", fake, command="the command")
    assert complete and "FA" in text
    assert [call["name"] for call in calls(tmp_path)[4:]] == ["ss_seed1", "fa_seed1"]
    assert compare(runs, tmp_path / "out", fake, command="the command") == (text, True)
    assert len(calls(tmp_path)) == 6

    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (content["metric"], content["command"]) == ("bbox/AP", "the command")
    assert content["hardware"] == [hardware()]
    assert content["not finished"] == []
    bp = content["rules"][0]
    assert (bp["label"], bp["seeds"], bp["values"]) == (BP, [1, 3], [10.0, 30.0])
    assert bp["config"] == "quick/shapes_retinanet_bp.yaml"
    assert len(content["runs"][3]["launches"]) == 2  # the failing one, too
    page = (tmp_path / "out" / "comparison.md").read_text()
    for part in (text, hardware(), "the command", "Threads per run: 5", "![detection](detection"):
        assert part in page
    assert (tmp_path / "out" / "detection.png").is_file()


def test_a_folder_of_another_config_stops_the_comparison_but_not_the_report(tmp_path, fake, caplog):
    runs = plan(tmp_path, {"bp": [1], "ss": [1], "fa": [1]})
    leave(runs[0], [{"iteration": 4, "bbox/AP": float("nan")}], final=True)
    leave(runs[1], [{"iteration": 4, "bbox/AP": 1.0}], final=True, **{"SOLVER.BASE_LR": 1.0})
    text, complete = compare(runs, tmp_path / "out", fake)
    assert not complete
    assert calls(tmp_path) == []
    assert f"{runs[1].folder} was started with another config: SOLVER.BASE_LR 1.0" in caplog.text
    assert "BP" in text and "SS" not in text
    assert "Not finished: fa_seed1" in (tmp_path / "out" / "comparison.md").read_text()
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=exit)
    assert content["rules"][0]["mean"] is None
    # Nor is it complete with all the others finished.
    assert compare(runs[:2], tmp_path / "out", fake) == (text, False)
    # Nothing finished gives no table.
    assert write_report(runs, tmp_path / "out", metric="bbox/AP50") == ""
    assert compare(runs[1:], tmp_path / "out", fake) == ("", False)


def test_a_comparison_goes_by_the_first_test_sets_metric(tmp_path):
    options = ["DATASETS.TEST", "('b', 'a')", "SOLVER.MAX_ITER", "4"]
    (run,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path, options)
    leave(run, [{"iteration": 4, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0}], final=True)
    assert "box AP, % (b)" in write_report([run], tmp_path)


# The tool ----------------------------------------------------------------------------------------


@pytest.fixture
def tool():
    return runpy.run_path(str(TOOL))


def run_tool(tool, *words) -> int:
    return tool["main"](tool["parse_arguments"]([*map(str, words)]))


def test_seeds_are_a_number_or_a_list(tool):
    parse = tool["parse_seeds"]
    assert [parse(text) for text in ("3", "1", "4,5", "7,", "2,2")] == [
        [1, 2, 3],
        [1],
        [4, 5],
        [7],
        [2],
    ]
    for text in ("0", "", "x", "-1", "0,1", ","):
        with pytest.raises(ValueError):
            parse(text)


def test_the_tools_words(tool, tmp_path, capsys):
    words = ["--config-file", DETECTION, "--output", tmp_path, "--seeds", 2, "--dry-run"]
    words += ["--rules", "bp", "kp:1", "ss:7,", "SOLVER.MAX_ITER", 4]
    assert run_tool(tool, *words) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == [f"{tmp_path}/{n}" for n in ("bp_seed1", "bp_seed2", "kp_seed1", "ss_seed7")]
    assert not any(tmp_path.iterdir())
    words = ["--config-file", "c", "--alignment-period", "0", "--rules", "bp", "K.L", "1"]
    assert tool["parse_arguments"](words).opts == ["K.L", "1", "TEST.ALIGNMENT_PERIOD", "0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "bp", "bp:2"], "names a rule twice"),
        (["--seeds", "none"], "a number of seeds"),
        (["--jobs", "0"], "1 at least"),
        (["--seeds", "1", "SOLVER.MAX_ITER", "4", "--jobs", "2"], "before the first KEY VALUE"),
    ],
)
def test_words_that_the_tool_does_not_understand(words, message, tool, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool(tool, "--config-file", DETECTION, *words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_that_does_not_fit_ends_the_tool(tool, tmp_path, capsys):
    words = ["--output", tmp_path, "--rules", "bp", "SOLVER.MAX_ITR", 4]
    assert run_tool(tool, "--config-file", DETECTION, *words) == 2
    assert "SOLVER.MAX_ITR" in capsys.readouterr().err


# A real comparison -------------------------------------------------------------------------------


def test_a_comparison_that_is_interrupted_saves_and_goes_on(tmp_path, tool, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("tiny_train", "tiny_val"):
        write_images(tmp_path / split, (32, 32), a=2, b=2)
    output = tmp_path / "out"
    words = ["--config-file", CLASSIFICATION, "--rules", "fa", "--output", output]
    for key, value in {
        "DATASETS.IMAGE_FOLDERS": [[name, name] for name in ("tiny_train", "tiny_val")],
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": ("tiny_val",),
        "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES": 2,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.STEPS": (),
        "SOLVER.MAX_ITER": 12,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.EVAL_PERIOD": 0,
    }.items():
        words += [key, str(value)]
    folder = output / "fa_seed1"
    process = start(*words, cwd=tmp_path, script=TOOL)
    try:
        while not (folder / "last_checkpoint").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    finally:
        end(process)
    assert process.returncode == 75 and "the same command goes on" in said
    log = (folder / "train.log").read_text()
    checkpoint = (folder / "last_checkpoint").read_text()
    assert not (folder / "model_final.pth").exists()

    assert run_tool(tool, *words) == 0
    new = (folder / "train.log").read_text().removeprefix(log)
    iteration = int(checkpoint.removeprefix("model_").removesuffix(".pth"))
    assert f"Starting training from iteration {iteration + 1}" in new
    (run,) = read_runs([folder])
    assert (run.label, run.config["SEED"], run.epochs_per_iteration) == (FA, 1, 2 / 4)
    assert run.last("alignment/gradient_angle") > 10
    assert "classification/top1_error" in run.metrics
    assert (output / "weight_angle.pdf").is_file()
    assert "| FA" in capsys.readouterr().out
