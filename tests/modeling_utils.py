"""What the tests of whole models share: small configs and batches, and what a loss goes through."""

import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ss_detectron import AsymmetricConv2d, add_ss_config, find_config
from ss_detectron.layers import AsymmetricLayer

CPU = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
NARROW = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NUM_CLASSES", 3]


def resnet(depth: int, res2: int = 256, stem: int = 64, width: int = 64) -> list:
    """The options of a ResNet as torchvision has it."""
    values = {"DEPTH": depth, "RES2_OUT_CHANNELS": res2, "STEM_OUT_CHANNELS": stem}
    values |= {"WIDTH_PER_GROUP": width, "STRIDE_IN_1X1": False}
    return [word for key, value in values.items() for word in (f"MODEL.RESNETS.{key}", value)]


SLIM = resnet(50, res2=32, stem=16, width=8)  # 53 layers with a norm each, built in 0.1 s


def load_config(name: str, *options) -> CfgNode:
    """A config that ships with the package, from scratch on the CPU."""
    cfg = get_cfg()
    add_ss_config(cfg)
    cfg.merge_from_file(find_config(name))
    cfg.merge_from_list([*CPU, *options])
    return cfg


def classifier(rule: str = "bp", *options, classes: int = 10) -> nn.Module:
    """An ImageClassifier on a slim ResNet."""
    keys = "MODEL.IMAGE_CLASSIFIER.NUM_CLASSES", classes, "MODEL.FEEDBACK.RULE", rule
    return build_model(load_config("imagenet_resnet18_ss.yaml", *SLIM, *keys, *options))


def detector(rule: str = "bp", *options) -> nn.Module:
    """A RetinaNet on a slim ResNet with FrozenBN, at the scale of the ImageNet configs."""
    keys = "MODEL.FEEDBACK.RULE", rule, "MODEL.FEEDBACK.SCALE", "kaiming"
    return build_model(load_config("retinanet_R_18_ss.yaml", *NARROW, *SLIM, *keys, *options))


def make_batch(masks: type | None = None) -> list[dict]:
    """Two images of different sizes, the second without any object."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for size, boxes in (((64, 96), [[4, 8, 40, 52], [20, 4, 90, 60]]), ((60, 64), [])):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        instances = Instances(size, gt_boxes=Boxes(boxes))
        instances.gt_classes = torch.arange(len(boxes)) * 2
        if masks is not None:
            instances.gt_masks = masks(boxes, size)
        image = torch.randint(0, 256, (3, *size), generator=generator).byte()
        batch.append({"image": image, "instances": instances})
    return batch


def losses(model: nn.Module, batch: list[dict] | None = None) -> dict[str, torch.Tensor]:
    """The losses in training mode, from the state that the model has at its start."""
    model.train()
    if hasattr(model, "loss_normalizer"):
        model.loss_normalizer = 100  # RetinaNet moves it in every training forward
    torch.manual_seed(0)  # two-stage detectors sample their proposals
    with EventStorage():
        return model(copy.deepcopy(batch or make_batch()))


@torch.no_grad()
def predictions(model: nn.Module) -> list[torch.Tensor]:
    """Boxes, scores and classes of every image, one after the other."""
    model.eval()
    found = [output["instances"] for output in model(make_batch())]
    return [t for i in found for t in (i.pred_boxes.tensor, i.scores, i.pred_classes)]


def gradients(model: nn.Module, batch: list[dict] | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses(model, batch).values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def rules(model: nn.Module) -> dict[str, str]:
    """Layer name -> rule, told by the layers and not by the report."""
    return {
        name: m.rule.name if isinstance(m, AsymmetricLayer) else "backpropagation"
        for name, m in layers(model).items()
    }


def _nodes(losses: dict[str, torch.Tensor]) -> Iterator:
    """Every node of the losses' autograd graph."""
    waiting, seen = [loss.grad_fn for loss in losses.values()], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def operations(losses: dict[str, torch.Tensor]) -> set[str]:
    """The names of all operations that the losses' gradients pass."""
    return {node.name() for node in _nodes(losses)}


def weight_uses(model: nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, list]:
    """Layer name -> the operations in the losses' graph that its weight enters."""
    names = {
        p: name.removesuffix(".weight")
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.dim() >= 2
    }
    uses = defaultdict(list)
    for node in _nodes(losses):
        if node.name() in BETWEEN:
            continue
        for following, _ in node.next_functions:
            while following is not None and following.name() in BETWEEN:
                following = following.next_functions[0][0]
            name = names.get(getattr(following, "variable", None))
            if name is not None:
                uses[name].append(node)
    return uses


BETWEEN = "_TieBackward", "TBackward0"
"""Between a weight and its use: a learned feedback weight receives the gradient as well, and a
linear layer takes the transpose."""


@torch.no_grad()  # a saved weight is unpacked as in a backward pass
def stock_layers(model: nn.Module, uses: dict[str, list]) -> set[str]:
    """The layers in :func:`weight_uses` that send an error through the weight itself."""

    def is_stock(node, weight):
        if node.name() == "ConvolutionBackward0":
            return torch.equal(node._saved_weight, weight)
        if node.name() in ("AddmmBackward0", "MmBackward0"):
            return torch.equal(node._saved_mat2, weight.t())
        return not node.name().startswith("_Asymmetric")

    return {
        name
        for name, nodes in uses.items()
        if any(is_stock(node, model.get_submodule(name).weight) for node in nodes)
    }


def assert_error_flows_through_feedback(model: nn.Module, first: set[str]) -> dict[str, list]:
    """
    In a training step, every convolution but those of ``first`` sends back what the transposed
    convolution of its output's gradient with B gives, B being the weight where the layer is not
    converted.

    Args:
        model: whose layers with a weight are all convolutions.
        first: the layers below which nothing learns, so that they send nothing.

    Returns:
        layer name -> the operations that its weight enters, as :func:`weight_uses`.
    """
    total = losses(model)
    uses = weight_uses(model, total)
    modules = dict(model.named_modules())
    sent = defaultdict(list)
    for name, nodes in uses.items():
        for node in nodes:
            if node.next_functions[0][0] is not None:  # else its input needs no gradient
                node.register_hook(
                    lambda inputs, outputs, name=name: sent[name].append((inputs[0], outputs[0]))
                )
    model.zero_grad()
    sum(total.values()).backward(retain_graph=True)

    assert set(uses) - set(sent) == first
    for name, pairs in sent.items():
        layer = modules[name]
        options = layer.stride, layer.padding, layer.dilation, layer.groups

        def apart(weight, pairs=pairs, options=options):
            """How far what was sent is from what this weight would have sent, relatively."""
            sends = [torch.nn.grad.conv2d_input(i.shape, weight, o, *options) for i, o in pairs]
            size = sum(s.norm() for s in sends)
            return sum((s - i).norm() for s, (i, _) in zip(sends, pairs, strict=True)) / size

        weight = layer.weight.detach()
        if isinstance(layer, AsymmetricConv2d):
            assert apart(layer.current_feedback()) < 1e-4, f"{name}: not through its feedback"
            assert apart(weight) > 0.05, f"{name}: backpropagation would have sent the same"
        else:
            assert apart(weight) < 1e-4, f"{name}: not through its weight"
    return uses
