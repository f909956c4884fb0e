"""Whole runs of tools/train_net.py, as its users start it."""

import json
import math
import re
import runpy
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from run_utils import TOOL, end, finish, rows, start

from ss_detectron import add_ss_config
from ss_detectron.data import generate_shapes


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """KEY VALUE ... of the smallest training there is, on a data set given by config keys alone."""
    shapes = generate_shapes(tmp_path_factory.mktemp("sets"), train=8, val=3, size=64)
    sets = [
        [f"tiny_{split}", f"{shapes}/annotations/instances_{split}.json", f"{shapes}/{split}"]
        for split in ("train", "val")
    ]
    changes = {
        "DATASETS.COCO_INSTANCES": sets,
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": (),
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.001,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.STEPS": (),
        "SOLVER.CHECKPOINT_PERIOD": 1000,
    }
    return [str(word) for pair in changes.items() for word in pair]


# One run, and what it leaves ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def fa_run(tmp_path_factory, options) -> tuple[Path, str]:
    """The output folder and the output of eight iterations of feedback alignment."""
    here = tmp_path_factory.mktemp("fa")
    words = ["--config-file", "quick/shapes_retinanet_fa.yaml", *options, "OUTPUT_DIR", "out"]
    words += ["DATASETS.TEST", "('tiny_val',)", "TEST.EVAL_PERIOD", 4]
    words += ["SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 2]
    return here / "out", finish(start(*words, cwd=here))


def test_a_run_goes_to_the_cpu_by_itself_and_says_which_layer_learns_how(fa_run):
    _, output = fa_run
    assert "There is no GPU here: MODEL.DEVICE is cpu" in output
    assert re.search(r"backbone\.bottom_up\.stem\.conv1 +\| feedback_alignment +\| +\|", output)
    assert re.search(r"head\.cls_score +\| backpropagation +\| its own rule", output)


def test_a_run_logs_losses_and_ap_during_and_after_training(fa_run):
    folder, _ = fa_run
    logged = {row["iteration"]: row for row in rows(folder)}
    assert set(logged) == {3, 7, 8}  # evaluated after iterations 3 and 7, the last counts as 8
    assert all(math.isfinite(logged[7][key]) for key in ("loss_cls", "loss_box_reg", "total_loss"))
    assert all(math.isfinite(logged[i]["bbox/AP"]) for i in (3, 8))
    assert list(folder.glob("events.out.tfevents.*"))


def test_a_run_leaves_checkpoints_and_its_config(fa_run):
    folder, _ = fa_run
    assert {path.name for path in folder.glob("*.pth")} == {
        "model_0000007.pth",
        "model_best.pth",
        "model_final.pth",
    }
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert torch.load(folder / "model_final.pth")["iteration"] == 7
    aps = {row["bbox/AP"]: row["iteration"] for row in reversed(rows(folder)) if "bbox/AP" in row}
    assert torch.load(folder / "model_best.pth")["iteration"] == aps[max(aps)]
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(str(folder / "config.yaml"))
    assert cfg.MODEL.FEEDBACK.RULE == "feedback_alignment"
    assert cfg.DATASETS.COCO_INSTANCES[0][0] == "tiny_train"


def test_evaluation_alone_repeats_the_result_and_warns_of_another_rule(fa_run, options, tmp_path):
    folder, output = fa_run
    words = ["--config-file", "quick/shapes_retinanet_ss.yaml", "--eval-only", *options]
    words += ["DATASETS.TEST", "('tiny_val',)", "DATASETS.TRAIN", "('not_there',)"]
    words += ["MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", "again"]
    again = finish(start(*words, cwd=tmp_path))
    assert "trained with feedback_alignment" in again
    assert "but this model learns by sign_symmetry" in again

    def results(text):
        return re.findall(r"copypaste: (.+)", text)[-3:]

    assert len(results(again)) == 3
    assert results(again) == results(output)
    boxes = "inference/coco_instances_results.json"
    predicted = json.loads((tmp_path / "again" / boxes).read_text())
    assert predicted
    assert predicted == json.loads((folder / boxes).read_text())


# Several processes -------------------------------------------------------------------------------

COMPARE = """
import hashlib, json
from detectron2.utils import comm
from ss_detectron.engine import Trainer, main

class Compared(Trainer):
    def train(self):
        super().train()
        hashes = {
            key: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for key, value in self.model.module.state_dict().items()
            if "running_" not in key  # of batch norm: each process has its own images
        }
        with open(f"rank{comm.get_rank()}.json", "w") as file:
            json.dump(hashes, file)

main(trainer=Compared)
"""


def test_two_processes_hold_the_same_weights_and_feedback_in_two_runs_at_a_time(options, tmp_path):
    runs = {"fa": 20, "brsf": 4}  # steps
    script = tmp_path / "compare.py"
    script.write_text(COMPARE)
    words = ["--config-file", "quick/shapes_retinanet_fa.yaml", "--num-gpus", 2, *options]
    words += ["OUTPUT_DIR", "out", "SOLVER.MAX_ITER"]
    for rule in runs:
        (tmp_path / rule).mkdir()
    processes = [
        start(*words, count, "MODEL.FEEDBACK.RULE", rule, cwd=tmp_path / rule, script=script)
        for rule, count in runs.items()
    ]
    for process in processes:
        finish(process)
    for rule in runs:
        ranks = [json.loads((tmp_path / rule / f"rank{i}.json").read_text()) for i in (0, 1)]
        assert sum(".feedback_" in key for key in ranks[0]) == 30
        assert ranks[0] == ranks[1]


@pytest.mark.slow
def test_two_machines_train_together(options, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    words = ["--config-file", "quick/shapes_retinanet_ss.yaml", "--num-machines", 2]
    words += ["--dist-url", url]
    machines = []
    for rank in (0, 1):
        (tmp_path / f"machine{rank}").mkdir()
        more = ["--machine-rank", rank, *options, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", 2]
        machines.append(start(*words, *more, cwd=tmp_path / f"machine{rank}"))
    outputs = [finish(machine) for machine in machines]
    assert "World size: 2" in outputs[0]
    assert (tmp_path / "machine0" / "out" / "model_final.pth").exists()
    assert not (tmp_path / "machine1" / "out" / "model_final.pth").exists()


@pytest.mark.slow
def test_terminating_a_run_ends_its_processes_where_sigint_is_ignored(options, tmp_path):
    words = ["--config-file", "quick/shapes_retinanet_ss.yaml", "--num-gpus", 2, *options]
    words += ["OUTPUT_DIR", "out", "SOLVER.MAX_ITER", 100000]
    process = start(*words, cwd=tmp_path, interrupts=signal.SIG_IGN)  # as shell scripts do
    with process:
        try:
            assert any("Starting training" in line for line in process.stdout)
            process.terminate()
            # Returns once nobody holds the other end of the pipe.
            process.communicate(timeout=60)
        finally:
            end(process)


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-machines", "2"], "several machines need --dist-url tcp://HOST:PORT"),
        (["--num-gpus", "3"], "--num-gpus 3: there are 2 here"),
        (["SEED", "1", "--resume"], "--resume: give options before the first KEY VALUE"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *words])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
