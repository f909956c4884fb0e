"""docs/results.md: tables that committed summaries of runs give, and how a run gets there."""

import json
import re
import runpy

import pytest
from output_folders import write_run
from run_utils import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "publish_results.py"))
PAGES, render, read_summaries, read_tables = (
    TOOL[name] for name in ("PAGES", "render", "read_summaries", "read_tables")
)
MARKED = r"<!-- results: (\w+) -->.*?<!-- end -->"


@pytest.fixture(scope="module")
def tables():
    return read_tables(read_summaries())


def test_the_tables_hold_what_the_summaries_say_and_nothing_else(tables):
    for page in PAGES:
        assert render(page.read_text(), tables) == page.read_text(), (
            "tools/publish_results.py writes it anew"
        )


def test_measured_figures_stand_in_written_tables_alone(tables):
    page = PAGES[0].read_text()
    marked = set(re.findall(MARKED, page, re.DOTALL))
    assert marked >= {
        name for name, table in tables.items() if any(r.groups for r in table["rows"])
    }
    rest = re.sub(MARKED, "", page, flags=re.DOTALL)
    earlier = rest[rest.index("## Quick comparison") : rest.index("## ImageNet")]
    assert "|\n" not in rest.replace(earlier, "")


def test_the_tables_have_a_row_for_every_config(tables):
    rows = {row.config for table in tables.values() for row in table["rows"]}
    folder = ROOT / "configs"
    configs = {str(path.relative_to(folder)) for path in folder.rglob("*.yaml")}
    assert rows == {name for name in configs if "Base-" not in name}


def test_summaries_name_no_place_of_a_machine():
    for run in read_summaries():
        assert not re.search(r'["\'[(]/', json.dumps(run)), run


# From folders to a page ------------------------------------------------------------------------


def write_launched(
    folder, values, seed=1, config="mnist_fc_bp.yaml", rule="backpropagation", **changes
):
    """A run of 100 epochs of 469 steps, evaluated after each that a value is given for."""
    rows = []
    for epoch, value in enumerate(values, 1):
        at = 469 * epoch
        rows += [{"iteration": at - 1, "epoch": at * 128 / 60000, "time": 0.01}]
        rows[-1]["classification/top1_error"] = value
    write_run(folder, rows, rule, config, SEED=seed, MODEL__FEEDBACK__SEED=seed, **changes)
    launch = {"command": f"train_net.py --config-file {config}", "hardware": "a CPU", "jobs": 1}
    (folder / "launches.json").write_text(json.dumps(launch) + "\n")
    return folder


def test_multiply_adds_are_counted_once_for_each_setting_of_a_file(tmp_path, monkeypatch):
    few = {"SOLVER__EPOCHS": 2, "TEST__EVAL_PERIOD": 469}
    kp = {"rule": "kolen_pollack", "config": "mnist_fc_fa.yaml"}
    file = tmp_path / "mine.json"
    bp = [write_launched(tmp_path / f"bp{seed}", [4.0], seed=seed, **few) for seed in (1, 2)]
    TOOL["write_summaries"]([*bp, write_launched(tmp_path / "kp", [3.0], **kp, **few)], file)
    asked = []

    def count(cfg):
        asked.append((cfg.MODEL.FEEDBACK.RULE, cfg.SOLVER.EPOCHS))
        return len(asked)

    monkeypatch.setitem(TOOL["write_summaries"].__globals__, "multiply_adds", count)
    TOOL["write_summaries"]([], file, count=True)
    assert asked == [("backpropagation", 2), ("kolen_pollack", 2)]
    assert [run["multiply_adds"] for run in read_summaries(tmp_path)] == [1, 1, 2]
    with pytest.raises(ValueError, match="nothing for .*empty.json"):
        TOOL["write_summaries"]([], tmp_path / "empty.json", count=True)


def test_runs_become_rows(tmp_path, caplog):
    few = {"SOLVER__EPOCHS": 2, "TEST__EVAL_PERIOD": 469}
    kp = {"rule": "kolen_pollack", "config": "mnist_fc_fa.yaml"}
    runs = [
        write_launched(tmp_path / "bp1", [4.0, 2.0], **few),
        write_launched(tmp_path / "bp2", [1.5, 2.5], seed=2, **few),
        write_launched(tmp_path / "bp3", [9.0], seed=3, **few),
        write_launched(tmp_path / "kp1", [3.0, 4.5], **kp, **few),
        write_launched(
            tmp_path / "fa1", [7.0] * 50, rule="feedback_alignment", config="mnist_fc_fa.yaml"
        ),
        write_run(tmp_path / "other", [{"iteration": 0}]),
        write_launched(tmp_path / "none", [float("nan")], **few),
    ]
    file = tmp_path / "mine.json"
    TOOL["write_summaries"](runs, file)
    assert "other is no run of tools/compare_rules.py" in caplog.text
    assert "none has classification/top1_error nan alone" in caplog.text
    assert str(tmp_path) not in file.read_text()
    # The others stay, and so does what was counted.
    counted = [run | {"multiply_adds": 7.0} for run in read_summaries(tmp_path)]
    file.write_text(json.dumps(counted))
    TOOL["write_summaries"](runs[1:2], file)
    assert read_summaries(tmp_path) == counted
    file.unlink()
    TOOL["write_summaries"](runs, file)
    found = read_summaries(tmp_path)
    assert [(run["last"], run["best"], run["best_at"]) for run in found[:2]] == [
        (2, 2, 2),
        (2.5, 1.5, 1),
    ]
    assert found[3]["overrides"] == {"MODEL.FEEDBACK.RULE": "kolen_pollack", "SOLVER.EPOCHS": 2}
    assert len(found[4]["curve"]) == 20 and found[4]["curve"][-1] == [50, 7]

    tables = read_tables(found)
    page = render("<!-- results: mnist_fc -->old<!-- end --> and\n", tables)
    assert render(page, tables) == page and page.endswith("<!-- end --> and\n")
    cells = [
        tuple(cell.strip() for cell in line.split("|")[1:-1])
        for line in page.splitlines()
        if line.startswith("| ") and "not run" not in line
    ]
    header = "rule config last best to BP seeds trained published difference"
    assert " ".join(cells[0]) == header
    behind = "2, another 1 epochs far"
    kp = "`mnist_fc_fa.yaml MODEL.FEEDBACK.RULE kolen_pollack SOLVER.EPOCHS 2`"
    assert cells[1:] == [
        ("BP", "`mnist_fc_bp.yaml SOLVER.EPOCHS 2`", "2.25 ± 0.35", "1.75 ± 0.35", "+0.00", behind)
        + ("2 epochs", "1.48", "+0.27"),
        (
            "FA",
            "`mnist_fc_fa.yaml`",
            "7.00",
            "7.00",
            "",
            "1",
            "at 50 of 100 epochs",
            "1.85",
            "+5.15",
        ),
        ("KP", kp, "4.50", "3.00", "+2.25", "1", "2 epochs", "", ""),
    ]
    assert "--config-file mnist_fc_bp.yaml --rules bp:1,2,3, kp SOLVER.EPOCHS 2\n" in page
    assert "--config-file mnist_fc_fa.yaml --rules fa\n" in page
    overview = render("<!-- results: overview --><!-- end -->", tables)
    name = "MNIST, 5 x 256 fully connected: top-1 error, %, 2 epochs, `SOLVER.EPOCHS 2`"
    assert f"| {name} | 2.25 ± 0.35 |      |      | 4.50 |" in overview  # FA is not finished

    with pytest.raises(ValueError, match="no multiply-adds of finished"):
        TOOL["costs"](tables["mnist_fc"]["rows"])
    for run, adds, angles in zip(
        found, (4, 4, 4, 6, 4), ([0], [0], [0], [0, 20, 40], [80]), strict=True
    ):
        run |= {"multiply_adds": adds, "weight_angles": angles}
    bp, kp = TOOL["costs"](read_tables(found)["mnist_fc"]["rows"])
    assert (bp.value, round(bp.deviation, 2), bp.weight_angle) == (2.25, 0.35, 0)
    assert (kp.value, kp.multiply_adds, kp.weight_angle) == (4.5, 1.5, 30)

    with pytest.raises(ValueError, match="seeds .1, 1. of mnist_fc_fa.yaml"):
        read_tables([*found, found[3]])
    with pytest.raises(ValueError, match=r"no row for sign_symmetry by mnist_fc_bp.yaml"):
        read_tables([found[0] | {"rule": "sign_symmetry"}])
