"""Whole runs of tools/train_net.py, as its users start it."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from group_utils import run_ranks
from modeling_utils import load_config
from run_utils import finish, output_after, rows, start, tiny_detection

from ss_detectron import add_ss_config
from ss_detectron.data import generate_shapes_cls
from ss_detectron.engine import main
from ss_detectron.engine.command_line import settle_feedback_seed


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    return tiny_detection(tmp_path_factory.mktemp("sets"))


# One run, and what it leaves ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def fa_run(tmp_path_factory, options) -> tuple[Path, str]:
    """The output folder and the output of eight iterations of feedback alignment."""
    here = tmp_path_factory.mktemp("fa")
    words = ["--config-file", "quick/shapes_retinanet_fa.yaml", *options, "OUTPUT_DIR", "out"]
    words += ["DATASETS.TEST", "('tiny_val',)", "TEST.EVAL_PERIOD", 4]
    words += ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2]
    return here / "out", finish(start(*words, cwd=here))


def test_a_run_says_which_layer_learns_how_and_leaves_its_config(fa_run):
    folder, output = fa_run
    assert "There is no GPU here: MODEL.DEVICE is cpu" in output
    assert re.search(r"backbone\.bottom_up\.stem\.conv1 +\| feedback_alignment +\| +\|", output)
    assert re.search(r"head\.cls_score +\| backpropagation +\| its own rule", output)
    assert re.search(r"first step took .* the other 7 would end at about ", output)
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"))
    assert cfg.MODEL.FEEDBACK.RULE == "feedback_alignment"
    assert cfg.DATASETS.COCO_INSTANCES[0][0] == "tiny_train"


def test_a_run_shows_what_a_person_reads_and_logs_the_rest(fa_run):
    folder, output = fa_run
    before = output.partition("Starting training")[0]
    layers = [line for line in before.splitlines() if line.startswith("| ")]
    assert len(before.splitlines()) - len(layers) < 15
    assert "Warning" not in output and "(backbone)" not in output
    log = (folder / "log.txt").read_text()
    assert log.count("Model:\n") == 1 and log.count("(backbone)") == 1
    assert "META_ARCHITECTURE: FeedbackRetinaNet" in log and "PyTorch built with" in log
    assert "\x1b" not in log


def test_a_run_logs_losses_and_ap_and_keeps_the_last_checkpoints_and_the_best(fa_run):
    folder, _ = fa_run
    logged = {row["iteration"]: row for row in rows(folder)}
    assert set(logged) == {3, 7, 8}  # evaluated after iterations 3 and 7, the last counts as 8
    assert all(math.isfinite(logged[7][key]) for key in ("loss_cls", "loss_box_reg", "total_loss"))
    assert list(folder.glob("events.out.tfevents.*"))
    names = ["model_0000007.pth", "model_best.pth", "model_final.pth"]
    assert sorted(path.name for path in folder.glob("*.pth")) == names
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(folder / "model_final.pth")["iteration"] == 7
    aps = {iteration: logged[iteration]["bbox/AP"] for iteration in (3, 8)}
    assert torch.load(folder / "model_best.pth")["iteration"] == max(aps, key=aps.get)


def test_evaluation_alone_repeats_the_result_and_warns_of_another_rule(fa_run, options, tmp_path):
    folder, output = fa_run
    words = ["--config-file", "quick/shapes_retinanet_ss.yaml", "--eval-only", *options]
    words += ["DATASETS.TEST", "('tiny_val',)", "DATASETS.TRAIN", "('not_there',)"]
    words += ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", "again"]
    again = finish(start(*words, cwd=tmp_path))
    assert "feedback_alignment" in again  # the checkpoint's

    def results(text):
        return re.findall(r"copypaste: (.+)", text)[-3:]

    assert len(results(again)) == 3
    assert results(again) == results(output)
    boxes = "inference/tiny_val/coco_instances_results.json"
    predicted = json.loads((tmp_path / "again" / boxes).read_text())
    assert predicted
    assert predicted == json.loads((folder / boxes).read_text())


# A learner of a user's own, and several processes ------------------------------------------------

MODULE = """
import torch
from detectron2.utils import comm
from ss_detectron.learners import LEARNER_REGISTRY, Learner

@LEARNER_REGISTRY.register
class Weighted(Learner):
    name = "weighted"

    def __init__(self, model):
        super().__init__(model)
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.tensor(0))

    def backward(self, loss, target=None):
        assert target.shape == (2,)
        (loss * self.weight).backward()

    def step(self):
        super().step()
        self.steps += 1
        torch.save(self.state_dict(), f"rank{comm.get_rank()}.pth")
"""
SCRIPT = """
import my_learner
from ss_detectron.engine import main
main()
"""


def test_a_learner_of_ones_own_trains_by_a_script_of_three_lines(tmp_path):
    """By two processes, with all that a training step has."""
    generate_shapes_cls(tmp_path / "sets", train=20, val=10)
    (tmp_path / "my_learner.py").write_text(MODULE)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    keys = {
        "MODEL.LEARNER.NAME": "weighted",
        "MODEL.FEEDBACK.RULE": "fa",
        "MODEL.RESNETS.OUT_FEATURES": "['res2']",
        "SOLVER.MAX_ITER": 2,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.ACCUMULATION_STEPS": 2,
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "TEST.ALIGNMENT_PERIOD": 2,
        "DATASETS.TEST": "()",
        "OUTPUT_DIR": "out",
    }
    words = ["--config-file", "quick/shapes_resnet18_ss.yaml", "--num-gpus", 2]
    words += [word for pair in keys.items() for word in pair]
    sets = str(tmp_path / "sets")
    finish(start(*words, cwd=tmp_path, script=script, DETECTRON2_DATASETS=sets))

    final = torch.load(tmp_path / "out" / "model_final.pth")
    assert final["learner"].keys() == {"name", "weight", "steps"}
    assert final["learner"]["steps"] == 2 and final["learner"]["weight"] != 1
    assert not any(name.startswith("model.") for name in final["model"])
    assert any("alignment/gradient_angle" in row for row in rows(tmp_path / "out"))
    ranks = [torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1)]
    assert sum(".feedback_weight" in name for name in ranks[0]) == 5
    for name, value in ranks[0].items():
        if "running_" not in name:  # of batch norm: each process has its own images
            assert torch.equal(value, ranks[1][name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", "3"], "--num-gpus 3: there are 2 here"),
        (["SEED", "1", "--resume"], "--resume: give options before the first KEY VALUE"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "give --config-file: "),
        ("--config-file no.yaml", "there is no config file 'no.yaml'"),
        ("--config-file retinanet_ss.yaml SEED", "SEED has no value"),
        (
            "--config-file quick/shapes_resnet18_ss.yaml MODEL.FEEDBACK.RULE hebb",
            "unknown feedback",
        ),
        (
            "--config-file quick/shapes_resnet18_ss.yaml DATASETS.TRAIN ('no',)",
            "No data set named 'no",
        ),
        (
            "--config-file quick/shapes_resnet18_ss.yaml MODEL.WEIGHTS no.pth",
            "MODEL.WEIGHTS is 'no.pth'",
        ),
    ],
)
def test_an_error_of_usage_is_one_line(monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train_net.py"])
    with pytest.raises(SystemExit) as exit_:
        main(words.split())
    assert exit_.value.code.startswith(f"train_net.py: error: {line}")
    assert "\n" not in exit_.value.code
    with pytest.raises((OSError, ValueError)):
        main(["--traceback", *words.split()])


@pytest.mark.slow
def test_an_error_of_usage_on_all_ranks_is_one_line(tmp_path):
    words = "--config-file", "quick/shapes_resnet18_ss.yaml", "--num-gpus", 2
    process = start(*words, "MODEL.FEEDBACK.RULE", "hebb", cwd=tmp_path)
    said = output_after(process, "", lambda: None)
    assert process.returncode == 1
    assert said.startswith("train_net.py: error: unknown feedback rule") and said.count("\n") == 1


def settled(folder: Path, seed: int, goes_on: bool, own: int = -1) -> int:
    """The seed of feedback of a run in ``folder``, which saves a checkpoint."""
    words = "SEED", seed, "MODEL.FEEDBACK.SEED", own, "OUTPUT_DIR", str(folder)
    cfg = load_config("quick/shapes_resnet18_fa.yaml", *words)
    settle_feedback_seed(cfg, goes_on=goes_on)
    saved = {"feedback_seed": cfg.MODEL.FEEDBACK.SEED}
    torch.save({"trainer": saved}, folder / "model_0000001.pth")
    return cfg.MODEL.FEEDBACK.SEED


def test_a_run_draws_a_seed_of_feedback_and_keeps_it(tmp_path):
    drawn = settled(tmp_path, seed=-1, goes_on=False)
    assert drawn >= 0
    assert settled(tmp_path, seed=-1, goes_on=True) == drawn
    assert settled(tmp_path, seed=5, goes_on=True) == drawn
    assert settled(tmp_path, seed=-1, goes_on=True, own=3) == 3
    assert settled(tmp_path, seed=-1, goes_on=False) not in (drawn, 3)
    assert settled(tmp_path, seed=5, goes_on=False) == 5
    torch.save({"trainer": {}}, tmp_path / "model_0000001.pth")  # as before it was saved
    assert settled(tmp_path, seed=6, goes_on=True) == 0
    (tmp_path / "model_0000001.pth").write_text("damaged")
    assert settled(tmp_path, seed=6, goes_on=True) == 6


def _settle_on(rank: int, folder: str) -> None:
    own = Path(folder, str(rank))
    own.mkdir()
    Path(folder, f"{rank}.txt").write_text(str(settled(own, seed=-1, goes_on=False)))


def test_the_ranks_draw_one_seed_of_feedback(tmp_path):
    run_ranks(_settle_on, tmp_path, start_method="fork")
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
