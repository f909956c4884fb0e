"""Checkpoints of the first version, made by a recipe: their keys are those that it wrote."""

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from core_utils import assert_same
from modeling_utils import SLIM, classifier
from torch import Tensor, nn

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.data import generate_shapes_cls
from ss_detectron.engine import Trainer, argument_parser, setup

RULES = {  # short name -> what the checkpoint says, and the state of each layer
    "bp": ("backpropagation", None),
    "ss": ("sign_symmetry(scale=mean_abs, gain=1)", None),
    "fa": ("feedback_alignment(scale=mean_abs, gain=1, seed=0)", "feedback_weight"),
    "frsf": (
        "sign_symmetry_fixed_magnitude(scale=mean_abs, gain=1, seed=0)",
        "feedback_magnitude",
    ),
    "brsf": (
        "sign_symmetry_batchwise_magnitude(scale=mean_abs, gain=1, seed=0)",
        "feedback_updates",
    ),
    "kp": ("kolen_pollack(scale=mean_abs, gain=1, seed=0)", "feedback_weight"),
}


def old_checkpoint(plain: nn.Module, rule: str) -> dict:
    """
    What the first version saved after two steps of AdamW of an ImageClassifier whose backbone
    learned by the rule.

    Args:
        plain: the classifier on backpropagation, for the names and shapes of its tensors.
    """
    generator = torch.Generator().manual_seed(1)
    text, state_name = RULES[rule]
    model, rules = OrderedDict(), {}
    for name, value in plain.state_dict().items():
        model[name] = torch.rand(value.shape, generator=generator).to(value.dtype)
        if name.endswith(".weight") and value.dim() in (2, 4):
            layer = name.removesuffix(".weight")
            rules[layer] = text if layer != "linear" else "backpropagation"
            if state_name is not None and layer != "linear":
                drawn = torch.rand(value.shape, generator=generator)
                counted = state_name == "feedback_updates"
                model[f"{layer}.{state_name}"] = torch.tensor(2) if counted else drawn

    learned = {name for name, _ in plain.named_parameters()}
    learned |= {name for name in model if rule == "kp" and name.endswith("feedback_weight")}
    norms = [name for name in model if name in learned and ".norm." in name]
    weights = [name for name in model if name in learned and ".norm." not in name]
    moments, groups = {}, []
    for names, decay in ((weights, 1e-4), (norms, 0.0)):
        numbers = list(range(len(moments), len(moments) + len(names)))
        for number, name in zip(numbers, names, strict=True):
            noise = torch.rand(2, *model[name].shape, generator=generator)
            moments[number] = {"step": torch.tensor(2.0)}
            moments[number] |= {"exp_avg": noise[0], "exp_avg_sq": noise[1]}
        groups.append(
            {"lr": 5e-07, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": decay}
            | {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False}
            | {"differentiable": False, "fused": None, "initial_lr": 0.001, "params": numbers}
        )
    version, numbers, gauss = random.Random(1).getstate()
    kind, keys, *rest = np.random.RandomState(1).get_state()
    return {
        "model": model,
        "trainer": {
            "iteration": 1,
            "hooks": {"LRScheduler": {"base_lrs": [0.001, 0.001], "last_epoch": 2}},
            "_trainer": {
                "iteration": 1,
                "optimizer": {"state": moments, "param_groups": groups},
                "skipped_steps": 0,
            },
            "data": {
                **{"batches": 2, "seed": 1, "images": 20},
                **{"images_per_batch": 4, "grouped": False},
            },
        },
        "feedback": rules,
        "iteration": 1,
        "ranks": [
            {
                "random": {
                    "torch": torch.Generator().manual_seed(1).get_state(),
                    "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
                    "python": [version, torch.tensor(numbers), gauss],
                },
                "loss_normalizer": {},
            }
        ],
    }


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    assert_same(dict(model.state_dict()), dict(expected))
    for layer in model.modules():
        if hasattr(layer, "feedback_updates"):
            drawn = layer.rule.feedback(layer.weight, 2, layer.fans())
            assert_same(layer.current_feedback(), drawn)


@pytest.mark.parametrize("rule", RULES)
def test_its_weights_and_feedback_load_without_a_warning(rule, tmp_path, caplog):
    seed = "MODEL.FEEDBACK.SEED", 0
    saved = old_checkpoint(classifier("bp"), rule)
    torch.save(saved, tmp_path / "old.pth")
    model = classifier(rule, *seed, "MODEL.FEEDBACK.SCALE", "mean_abs")
    FeedbackCheckpointer(model).load(str(tmp_path / "old.pth"))
    assert_loaded(model, saved["model"])
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("rule", ["brsf", "kp"])
def test_a_run_of_it_is_resumed(rule, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    generate_shapes_cls(tmp_path, train=20, val=10)
    name = "quick/shapes_resnet18_ss.yaml"
    words = [*SLIM, "MODEL.FEEDBACK.RULE", rule, "MODEL.FEEDBACK.SEED", 0, "MODEL.DEVICE", "cpu"]
    words += ["SOLVER.IMS_PER_BATCH", 4, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0]
    words += ["DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(tmp_path / "out"), "SEED", 1]
    plain = classifier("bp", "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", 10)
    saved = old_checkpoint(plain, rule)
    (tmp_path / "out").mkdir()
    torch.save(saved, tmp_path / "out" / "model_0000001.pth")
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000001.pth")

    args = argument_parser().parse_args(["--resume", "--config-file", name, *map(str, words)])
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=True)
    assert (trainer.start_iter, trainer.scheduler.last_epoch) == (2, 2)
    optimizer = saved["trainer"]["_trainer"]["optimizer"]
    for group, old in zip(trainer.optimizer.param_groups, optimizer["param_groups"], strict=True):
        for parameter, number in zip(group["params"], old["params"], strict=True):
            moments = dict(trainer.optimizer.state.get(parameter, {}))
            is_factor = parameter.shape == (1,) and not parameter.requires_grad
            assert_same(moments, {} if is_factor else optimizer["state"][number])
    assert_same(torch.get_rng_state(), saved["ranks"][0]["random"]["torch"])

    model = trainer.model
    if rule == "kp":  # folded in a run
        model = classifier("kp", "MODEL.FEEDBACK.SEED", 0)
        model.load_state_dict(trainer.model.state_dict())
        for name, feedback in saved["model"].items():
            if name.endswith("feedback_weight"):
                found = model.state_dict()[name]
                torch.testing.assert_close(found, feedback)
                found.copy_(feedback)
    assert_loaded(model, saved["model"])
