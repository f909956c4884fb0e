"""Comparisons: which runs they take, running them, the table, and one whole comparison."""

import itertools
import json
import os
import runpy
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
import torch
from image_utils import write_images
from output_folders import CLASSIFICATION, DETECTION, write_rows, write_run
from run_utils import ROOT, end, start

from ss_detectron import FEEDBACK_REGISTRY
from ss_detectron.experiments import launch
from ss_detectron.experiments.compare import compare, summarise, table, write_report
from ss_detectron.experiments.launch import environments, hardware, run_all
from ss_detectron.experiments.plan import describe_plan, plan_runs, starting_config
from ss_detectron.experiments.runs import merged_config, read_runs

TOOL = ROOT / "tools" / "compare_rules.py"
BP, SS, FA, KP = "backpropagation", "sign_symmetry", "feedback_alignment", "kolen_pollack"
RULE, LAST = "MODEL.FEEDBACK.RULE", "MODEL.FEEDBACK.LAST_LAYER_RULE"


# Which config a rule starts from -----------------------------------------------------------------


def test_a_rule_starts_from_its_own_config_or_its_nearest_relatives():
    starts = {rule: starting_config(DETECTION, rule) for rule, _ in FEEDBACK_REGISTRY}
    bp, ss, fa = (f"quick/shapes_retinanet_{short}.yaml" for short in ("bp", "ss", "fa"))
    relatives = {
        "sign_symmetry_fixed_magnitude": ss,
        "sign_symmetry_batchwise_magnitude": ss,
        "feedback_alignment_signed_init": fa,
        KP: fa,
        "weight_mirror": fa,
        "information_alignment": fa,
    }
    changed = {name: (file, [RULE, name]) for name, file in relatives.items()}
    assert starts == {BP: (bp, []), SS: (ss, []), FA: (fa, []), **changed}


@pytest.mark.parametrize(
    ("config", "rule", "expected"),
    [
        ("mine.yaml", "kp", ("mine.yaml", [])),
        ("mine.yaml", SS, ("mine.yaml", [RULE, SS])),
        ("fa_study_ss_kp.yaml", FA, ("fa_study_ss_kp.yaml", [RULE, FA])),
        ("mine_kp.yaml", FA, ("mine_fa.yaml", [RULE, FA])),  # it learns by another than its name's
        ("last_ss.yaml", FA, ("last_ss.yaml", [RULE, FA, LAST, FA])),
        ("bp.yaml", SS, ("bp.yaml", [RULE, SS])),  # the last layer stays on backpropagation
    ],
)
def test_a_rule_without_a_config_of_its_own_changes_the_rule(config, rule, expected, tmp_path):
    for name in ("mine.yaml", "mine_kp.yaml", "mine_fa.yaml", "fa_study_ss_kp.yaml"):
        (tmp_path / name).write_text("MODEL: {FEEDBACK: {RULE: kp}}\n")
    (tmp_path / "last_ss.yaml").write_text("MODEL: {FEEDBACK: {RULE: ss, LAST_LAYER_RULE: ss}}\n")
    (tmp_path / "bp.yaml").write_text("MODEL: {FEEDBACK: {RULE: bp, LAST_LAYER_RULE: bp}}\n")
    start, overrides = expected
    rule = KP if rule == "kp" else rule
    assert starting_config(str(tmp_path / config), rule) == (str(tmp_path / start), overrides)


def test_a_learner_starts_from_its_own_config_or_backpropagations():
    name = "direct_feedback"
    assert starting_config("mnist_fc_bp.yaml", name) == ("mnist_fc_dfa.yaml", [])
    changed = ("quick/shapes_resnet18_bp.yaml", ["MODEL.LEARNER.NAME", name])
    assert starting_config(CLASSIFICATION, name) == changed
    assert starting_config("mnist_fc_dtp.yaml", FA) == ("mnist_fc_fa.yaml", [])
    overrides = [RULE, SS, "MODEL.LEARNER.NAME", BP]
    assert starting_config("mnist_fc_dtp_parallel.yaml", SS) == (
        "mnist_fc_dtp_parallel.yaml",
        overrides,
    )
    with pytest.raises(ValueError, match="unknown feedback rule 'x'.*or a learner: direct_feed"):
        plan_runs("mnist_fc_bp.yaml", {"x": [1]}, Path("."))


# The plan ----------------------------------------------------------------------------------------


def test_the_plan_has_a_run_for_each_rule_and_seed(tmp_path):
    options = ["SOLVER.MAX_ITER", "1000"]
    runs = plan_runs(DETECTION, {"bp": [1, 2], "kp": [7], BP: [2, 3]}, tmp_path, options)
    options += ["TEST.ALIGNMENT_PERIOD", "5"]
    (other,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path, options)
    assert other.config["TEST.ALIGNMENT_PERIOD"] == 5
    assert [run.name for run in runs] == ["bp_seed1", "bp_seed2", "kp_seed7", "bp_seed3"]
    kp = runs[2]
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
    ("rule", "options", "message"),
    [
        ("xy", [], "unknown feedback rule 'xy'"),
        ("bp", ["SEED", "3"], "SEED: the comparison sets this itself"),
        ("bp", ["SOLVER.MAX_ITR", "3"], "SOLVER.MAX_ITR"),
        ("bp", ["SOLVER.MAX_ITER"], "pairs"),
        ("bp", ["DATASETS.TEST", "()"], "DATASETS.TEST is empty"),
    ],
)
def test_what_does_not_fit_is_refused(rule, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_runs(DETECTION, {rule: [1]}, tmp_path, options)


# What is done already ----------------------------------------------------------------------------


def leave(run, rows=(), checkpoint="", final=False, **changes) -> None:
    """What the run leaves in its folder."""
    write_rows(run.folder, rows)
    cfg = merged_config(run.config_file, [*run.options, *itertools.chain(*changes.items())])
    (run.folder / "config.yaml").write_text(cfg.dump())
    if checkpoint:
        (run.folder / "last_checkpoint").write_text(checkpoint)
    if final:
        (run.folder / "model_final.pth").touch()


def test_the_plan_is_described_and_a_run_is_finished_with_its_weights_and_evaluation(tmp_path):
    runs = plan_runs(DETECTION, {"bp": [1, 2, 3, 4], "ss": [1], "kp": [1]}, tmp_path)
    last = runs[0].config["SOLVER.MAX_ITER"]
    early, resumed = {"iteration": 1, "bbox/AP": 1.0}, {"iteration": last + 1, "one/bbox/AP": 1.0}
    moved = {"OUTPUT_DIR": "/elsewhere", "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 9}
    leave(runs[0], [{"iteration": last, "bbox/AP": 1.0}], final=True, **moved)
    leave(runs[1], [early, {"iteration": last, "total_loss": 1.0}], "model_final.pth", final=True)
    leave(runs[2], [resumed], "model_0000199.pth")  # the weights are not there
    leave(runs[3], [resumed], final=True)
    leave(runs[4], **{"SOLVER.BASE_LR": 1.0})
    states = [line.split("|")[-2].strip() for line in describe_plan(runs).splitlines()[2:]]
    other = "has another config: SOLVER.BASE_LR"
    assert states == ["finished", "goes on", "goes on", "finished", other, "new"]
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
if behaviour == "save":  # when asked to stop, which takes a second
    def save(*_):
        asked = time.time()
        time.sleep(1)
        (folder / "saved").write_text(json.dumps([asked, time.time()]))
        (folder / "last_checkpoint").write_text("model_0000001.pth")
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
    rule, seed = folder.name.split("_seed")
    rule = {"bp": "backpropagation", "ss": "sign_symmetry", "fa": "feedback_alignment"}[rule]
    (folder / "config.yaml").write_text(f"{{MODEL: {{FEEDBACK: {{RULE: {rule}}}}}, SEED: {seed}}}")
    (folder / "model_final.pth").touch()
    row = {"iteration": int(options["SOLVER.MAX_ITER"]), "bbox/AP": 10.0 * int(seed)}
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


def calls(tmp_path, key: str) -> list:
    path = tmp_path / "out" / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)[key] for line in lines]


def behave(fake, **behaviours) -> None:
    fake.with_suffix(".json").write_text(json.dumps(behaviours))


def wait_for(runs, file: str) -> None:
    until = time.monotonic() + 60
    while not all((run.folder / file).exists() for run in runs):
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: str) -> bool:
    try:
        return " Z " not in Path("/proc", pid, "stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(("grace", "interrupts"), [(0.2, 1), (60.0, 2)])
def test_runs_that_do_not_stop_are_killed_at_the_deadline_or_on_another_interrupt(
    grace, interrupts, tmp_path, fake, no_gpu, monkeypatch
):
    monkeypatch.setattr(launch, "GRACE", grace)
    behave(fake, bp_seed1="deaf", ss_seed1="deaf")
    runs = plan(tmp_path)

    def interrupt():
        wait_for(runs, "ready")
        for _ in range(interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    # Started in the background by a script, the tests have SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(runs, fake, jobs=2)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    for run in runs:
        while alive((run.folder / "child").read_text()):  # killed, but not yet gone
            assert time.monotonic() - started < 30
            time.sleep(0.01)


def test_gpus_are_dealt_out_in_turns_and_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    key = "CUDA_VISIBLE_DEVICES"
    assert environments(3, 2) == [{key: "0,1"}, {key: "2,3"}, {key: "0,1"}]
    monkeypatch.setenv(key, "7,5,3,1")
    assert environments(4, 1) == [{key: "7"}, {key: "5"}, {key: "3"}, {key: "1"}]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "ABAA"[i])
    assert "3 x A, 1 x B" in hardware() and f"torch {torch.__version__}" in hardware()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's number
    assert environments(2, 1) == [{"OMP_NUM_THREADS": "3"}] * 2


# The table ---------------------------------------------------------------------------------------


def result(folder, rule, seed, value, time, metric="bbox/AP", **options) -> Path:
    logged = [
        {"iteration": 19, "time": 9 * time, metric: 1.0, "alignment/gradient_angle": 80.0},
        {"iteration": 39, "time": time},
        {"iteration": 59, "time": 2 * time, metric: value, "alignment/gradient_angle": 10.0 * seed},
    ]
    return write_run(folder / f"{rule}{seed}", logged, rule, SEED=seed, **options)


def test_the_table_has_means_deviations_and_ratios_and_says_what_it_lacks(tmp_path, caplog):
    values = {"bp": [60.0, 64.0, 71.0], "ss": [50.0, 53.0], "kp": [13.0]}
    for rule, results in values.items():
        for seed, value in enumerate(results, 1):
            result(tmp_path, rule, seed, value, 0.5 if rule == "bp" else 0.6)
    write_run(tmp_path / "fa", [{"iteration": 3, "total_loss": 1.0}], "fa")
    summary = summarise(read_runs(sorted(tmp_path.iterdir())), "bbox/AP")
    assert [row.label for row in summary] == [BP, SS, KP]
    assert "fa has no bbox/AP" in caplog.text
    bp, ss, kp = summary
    assert (bp.values, bp.seeds) == (values["bp"], [1, 2, 3])
    assert bp.standard_deviation == pytest.approx(statistics.stdev(values["bp"]))
    assert (ss.ratio_to_bp, ss.difference_to_bp) == pytest.approx((51.5 / 65, 51.5 - 65))
    assert kp.standard_deviation is None
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in table(summary, "bbox/AP").splitlines()]
    assert rows[0][:4] == ["rule", "seeds", "box AP, %", "ratio to BP"]
    assert rows[0][4:] == ["time per step, s", "time ratio to BP", "gradient angle at the end, °"]
    assert rows[2:] == [
        ["BP", "3", "65.0 ± 5.6", "1.00", "1", "1.00", "20.0"],
        ["SS", "2", "51.5 ± 2.1", "0.79", "1.2", "1.20", "15.0"],
        ["KP", "1", "13.0", "0.20", "1.2", "1.20", "10.0"],
    ]


def test_errors_are_compared_in_points_too_and_nothing_without_backpropagation(tmp_path):
    metric = "classification/top1_error"
    for rule, value in (("bp", 10.0), ("fa", 25.5)):
        result(tmp_path, rule, 1, value, 1.0, metric, config_file=CLASSIFICATION)
    text = table(summarise(read_runs(sorted(tmp_path.iterdir())), metric), metric)
    assert "difference to BP, points" in text and "+15.5" in text and "2.55" in text
    assert "to BP" not in table(summarise(read_runs([tmp_path / "fa1"]), metric), metric)


# The whole comparison, with the fake -------------------------------------------------------------


def test_a_comparison_runs_what_is_missing_and_reports(tmp_path, fake, no_gpu, caplog):
    runs = plan(tmp_path, {"bp": [1, 3], "ss": [1], "fa": [1]})
    behave(fake, ss_seed1="nothing", fa_seed1="fail")
    text, complete = compare(runs, tmp_path / "out", fake, command="the command")
    assert not complete
    assert calls(tmp_path, "name") == ["bp_seed1", "bp_seed3", "ss_seed1", "fa_seed1"]
    assert {*calls(tmp_path, "threads"), *calls(tmp_path, "gpus")} == {"5", "1"}
    assert "| BP" in text and "20.0 ± 14.1" in text and "FA" not in text
    assert "ss_seed1 has no last evaluation" in caplog.text
    assert "fa_seed1 failed with exit code 3" in caplog.text and "no memory left" in caplog.text
    assert (runs[3].folder / "train.log").read_text() == "no memory left\n"

    behave(fake)
    text, complete = compare(runs, tmp_path / "out", fake, command="the command")
    assert complete and "FA" in text
    assert calls(tmp_path, "name")[4:] == ["ss_seed1", "fa_seed1"]

    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (content["metric"], content["command"]) == ("bbox/AP", "the command")
    assert (content["hardware"], content["not finished"]) == ([hardware()], [])
    assert content["test sets"] == ["shapes_val"]
    bp = content["rules"][0]
    assert (bp["label"], bp["seeds"], bp["values"]) == (BP, [1, 3], [10.0, 30.0])
    assert bp["config"] == "quick/shapes_retinanet_bp.yaml"
    _, launched = content["runs"][3]["launches"]  # after the failing one
    assert launched["command"].startswith(f"{fake} --config-file quick/shapes_retinanet_fa.yaml")
    assert launched["command"].endswith(f"OUTPUT_DIR {runs[3].folder}")
    page = (tmp_path / "out" / "comparison.md").read_text()
    for part in (text, hardware(), "the command", "Threads per run: 5", "![detection](detection"):
        assert part in page
    assert (tmp_path / "out" / "detection.png").is_file()


@pytest.mark.parametrize(
    ("metric", "known"),
    [
        *[(m, True) for m in ("AP", "bbox/AP75", "set/bbox/APs", "AP-a/b", "total_loss")],
        *[(m, True) for m in ("top5_error", "classification/top1_error-cat", "loss_cls", None)],
        *[(m, False) for m in ("AP51", "bbox/ap", "top1", "bbox/AP50s")],
    ],
)
def test_a_metric_that_no_evaluation_gives_is_told_before_a_run_starts(
    metric, known, tmp_path, fake, monkeypatch, caplog
):
    said = []

    def run_all(runs, *args, **kwargs):
        said.append(caplog.text)
        return runs

    monkeypatch.setitem(compare.__globals__, "run_all", run_all)
    compare(plan(tmp_path, {"bp": [1]}), tmp_path / "out", fake, metric=metric)
    assert (f"No evaluation gives {metric}" not in said[0]) == known


def test_a_folder_of_another_config_stops_the_comparison_but_not_the_report(tmp_path, fake, caplog):
    runs = plan(tmp_path, {"bp": [1], "ss": [1], "fa": [1]})
    leave(runs[0], [{"iteration": 4, "bbox/AP": float("nan")}], final=True)
    (runs[0].folder / "config.yaml").write_text("")  # of a run that was killed
    leave(runs[1], [{"iteration": 4, "bbox/AP": 1.0}], final=True, **{"SOLVER.BASE_LR": 1.0})
    text, complete = compare(runs, tmp_path / "out", fake)
    assert not complete and calls(tmp_path, "name") == []
    assert f"{runs[1].folder} was started with another config: SOLVER.BASE_LR 1.0" in caplog.text
    assert "BP" in text and "SS" not in text
    assert "Not finished: fa_seed1" in (tmp_path / "out" / "comparison.md").read_text()
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=exit)
    assert content["rules"][0]["mean"] is None and "ended with bbox/AP nan" in caplog.text
    # By the metric of the first test set.
    options = ["DATASETS.TEST", "('b', 'a')", "SOLVER.MAX_ITER", "4"]
    (run,) = plan_runs(DETECTION, {"bp": [1]}, tmp_path, options)
    leave(run, [{"iteration": 4, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0}], final=True)
    assert "box AP, % (b)" in write_report([run], tmp_path)
    # Nor is it complete with all the others finished, and nothing finished gives no table.
    assert compare(runs[:2], tmp_path / "out", fake) == (text, False)
    assert write_report(runs, tmp_path / "out", metric="bbox/AP50") == ""
    assert "No run is finished with bbox/AP50; they have bbox/AP: there is no table" in caplog.text
    assert write_report(runs[:1], tmp_path / "out", metric="AP") == text
    assert compare(runs[1:], tmp_path / "out", fake) == ("", False)


# The tool ----------------------------------------------------------------------------------------


def run_tool(*words, tool: Path = TOOL) -> int:
    functions = runpy.run_path(str(tool))
    return functions["main"](functions["parse_arguments"]([*map(str, words)]))


def test_the_tools_words(tmp_path, capsys):
    words = ["--config-file", DETECTION, "--output", tmp_path, "--seeds", 2, "--dry-run"]
    words += ["--rules", "bp", "kp:1", "ss:7,", "fa:4,5", "SOLVER.MAX_ITER", 4]
    assert run_tool(*words) == 0
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    seeds = ("bp_seed1", "bp_seed2", "kp_seed1", "ss_seed7", "fa_seed4", "fa_seed5")
    assert names == [f"{tmp_path}/{name}" for name in seeds]
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="error: .*SOLVER.MAX_ITR; did you mean SOLVER.MAX_ITER"):
        run_tool(*words, "SOLVER.MAX_ITR", 4)
    for wrong in (["--seeds", "none"], ["--seeds", "0,1"], ["--seeds", ","], ["--jobs", 0]):
        with pytest.raises(SystemExit, match="2"):
            run_tool(*words[:4], *wrong)


def test_an_interrupted_comparison_lets_its_runs_save_at_once_and_goes_on(tmp_path, fake, capsys):
    tool = shutil.copy(TOOL, tmp_path)  # beside it, it finds what it runs
    behave(fake, bp_seed1="save", ss_seed1="save")
    words = ["--config-file", DETECTION, "--rules", "bp", "ss", "--jobs", 2]
    words += ["--output", tmp_path / "out", "SOLVER.MAX_ITER", 4]
    runs = plan(tmp_path)
    process = start(*words, cwd=tmp_path, script=tool)
    try:
        wait_for(runs, "ready")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate()
    finally:
        end(process)
    assert process.returncode == 75 and "the same command goes on" in said
    times = [json.loads((run.folder / "saved").read_text()) for run in runs]
    assert max(asked for asked, _ in times) < min(saved for _, saved in times)

    behave(fake)
    assert run_tool(*words, tool=tool) == 0
    assert calls(tmp_path, "resume") == [False, False, True, True]
    assert "| SS" in capsys.readouterr().out


def test_a_real_comparison_is_known_to_be_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
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
        "SOLVER.MAX_ITER": 3,
        "DATALOADER.NUM_WORKERS": 0,
    }.items():
        words += [key, str(value)]
    assert run_tool(*words) == 0
    (run,) = read_runs([output / "fa_seed1"])
    assert (run.label, run.config["SEED"], run.epochs_per_iteration) == (FA, 1, 2 / 4)
    assert run.last("alignment/gradient_angle") > 10
    assert "classification/top1_error" in run.metrics
    assert (output / "weight_angle.pdf").is_file()
    assert "| FA" in capsys.readouterr().out
    assert run_tool("--dry-run", *words) == 0
    assert "finished" in capsys.readouterr().out
