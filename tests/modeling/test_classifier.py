import pytest
import torch
import torch.nn.functional as F
import torchvision
from core_utils import assert_same
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from modeling_utils import layers, load_config, rules
from torch import nn

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.engine.train_loop import StepTrainer
from ss_detectron.learners import Backpropagation
from ss_detectron.modeling import AlexNet, ImageClassifier


def build(name: str = "cifar10_resnet18_ss.yaml", *options) -> ImageClassifier:
    torch.manual_seed(0)
    return build_model(load_config(name, *options))


def make_batch(count: int = 2, size: int = 32, classes: int = 10) -> dict:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator).byte()
    labels = torch.randint(0, classes, (count,), generator=generator)
    return {"image": images, "label": labels}


def as_list(batch: dict) -> list[dict]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The networks


@torch.no_grad()
def test_alexnet_is_torchvisions_where_the_norms_do_nothing(monkeypatch):
    model = build("imagenet_alexnet_ss.yaml").eval()
    reference = torchvision.models.alexnet().eval()
    layers = [model.backbone.get_submodule(f"conv{i}") for i in range(1, 6)]
    norms = [layer.norm for layer in layers]
    layers += [model.backbone.fc6, model.backbone.fc7]
    norms += [model.backbone.fc6_norm, model.backbone.fc7_norm]
    others = [reference.features[i] for i in (0, 3, 6, 8, 10)]
    others += [reference.classifier[i] for i in (1, 4)]
    # Each unit loses its bias and gains its norm's scale and shift.
    units = sum(other.bias.numel() for other in others)
    assert count(model) == count(reference) - units + 2 * units == 61_110_184
    for layer, norm, other in zip(layers, norms, others, strict=True):
        layer.weight.copy_(other.weight)
        norm.bias.copy_(other.bias)
        monkeypatch.setattr(norm, "eps", 0.0)
    model.linear.load_state_dict(reference.classifier[6].state_dict())
    images = torch.rand(2, 3, 224, 224) * 255
    normalised = (images - model.pixel_mean) / model.pixel_std
    torch.testing.assert_close(model.logits(images), reference(normalised), rtol=1e-4, atol=1e-5)


def test_alexnet_takes_images_of_other_sizes_and_is_frozen_from_below():
    with torch.device("meta"):
        model, free = AlexNet(freeze_at=2), AlexNet(freeze_at=-1)  # as in Detectron2's ResNet
        for size in (63, 100, 256):
            assert model(torch.rand(2, 3, size, size))["fc7"].shape == (2, 4096)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "conv2.weight"}
    assert isinstance(model.conv2.norm, FrozenBatchNorm2d)
    assert isinstance(model.conv3.norm, nn.BatchNorm2d)
    assert all(p.requires_grad for p in free.parameters())


@torch.no_grad()
def test_cifar_resnet_is_torchvisions_with_another_stem(tmp_path):
    reference = torchvision.models.resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    for norm in (m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(1, 2)
    torch.save(reference.state_dict(), tmp_path / "reference.pth")
    model = build()
    FeedbackCheckpointer(model).load(str(tmp_path / "reference.pth"))
    assert count(model) == count(reference)
    images = torch.rand(2, 3, 32, 32) * 255
    expected = reference.eval()((images - model.pixel_mean) / model.pixel_std)
    torch.testing.assert_close(model.eval().logits(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [18, 50])
def test_strides_of_the_cifar_resnet(depth):
    names = ["stem", "res2", "res3", "res4", "res5"]
    options = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUT_FEATURES", names]
    backbone = build("cifar10_resnet18_bp.yaml", *options).backbone
    features = backbone(torch.rand(1, 3, 32, 32))
    for (name, shape), stride in zip(backbone.output_shape().items(), [1, 1, 2, 4, 8], strict=True):
        assert shape.stride == stride
        assert features[name].shape == (1, shape.channels, 32 // stride, 32 // stride)


@pytest.mark.parametrize("depth, parameters", [(20, 269_722), (56, 853_018)])
def test_narrow_resnets_have_he_et_als_size_and_shortcuts_that_learn_nothing(depth, parameters):
    model = build("cifar10_resnet20_bp.yaml", "MODEL.RESNETS.DEPTH", depth)
    assert count(model) == parameters
    assert len(layers(model)) == depth
    shape = model.backbone.output_shape()["res4"]
    assert (shape.channels, shape.stride) == (64, 4)
    block = model.backbone.res3[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


# The rules


def test_the_last_layer_is_on_its_rule_unless_excluded():
    name = "cifar10_resnet18_fa_lastlayer.yaml"
    assert set(rules(build(name)).values()) == {"feedback_alignment"}
    excluded = rules(build(name, "MODEL.FEEDBACK.EXCLUDE", ["linear"]))
    assert excluded["linear"] == "backpropagation"
    with pytest.raises(ValueError, match="'liner'.* matches no layer"):
        build(name, "MODEL.FEEDBACK.EXCLUDE", ["liner"])


# What comes out


def test_loss_is_the_mean_cross_entropy_of_normalised_images():
    model = build("cifar10_resnet18_bp.yaml").eval()
    batch = make_batch(3)
    normalised = (batch["image"].float() - model.pixel_mean) / model.pixel_std
    logits = model.linear(model.backbone(normalised)["res5"].mean((2, 3)))
    expected = -F.log_softmax(logits, 1)[range(3), batch["label"]].mean()
    torch.testing.assert_close(
        model.losses(model.logits(batch["image"]), batch["label"]), {"loss_cls": expected}
    )
    probabilities = model(batch)["probabilities"]
    torch.testing.assert_close(probabilities, logits.exp() / logits.exp().sum(1, keepdim=True))


def test_a_list_gives_what_a_batch_gives():
    model, batch = build(), make_batch(3)
    as_batch = model(batch)["loss_cls"]
    assert_same(model(as_list(batch))["loss_cls"], as_batch)
    model.eval()
    probabilities = model(batch)["probabilities"]
    listed = model([{"image": image} for image in batch["image"]])
    assert_same(torch.stack([entry["probabilities"] for entry in listed]), probabilities)


def test_a_trainer_logs_the_error_of_a_batch_which_the_model_itself_does_not_look_at():
    model, batch = build(), make_batch(4)
    with torch.no_grad():
        labels = model.logits(batch["image"]).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    trainer = StepTrainer(Backpropagation(model), [{**batch, "label": labels}], optimizer)
    with EventStorage() as trainer.storage:
        trainer.run_step()
        assert trainer.storage.latest()["train_top1_error"][0] == 25
    # On the meta device, whoever looks at a value fails.
    meta = build().to("meta")
    losses = meta.losses(torch.zeros(4, 10, device="meta"), torch.zeros(4, device="meta").long())
    assert losses["loss_cls"].is_meta and meta.train_metrics["train_top1_error"].is_meta


def test_empty_batch_has_no_probabilities():
    model = build().eval()
    assert model([]) == []
    assert model({"image": torch.empty(0, 3, 32, 32)})["probabilities"].shape == (0, 10)


def test_feature_can_be_chosen():
    options = ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"]]
    assert build("cifar10_resnet18_bp.yaml", *options).in_feature == "res5"
    options += ["MODEL.IMAGE_CLASSIFIER.IN_FEATURE", "res3"]
    model = build("cifar10_resnet18_bp.yaml", *options)
    assert model.linear.in_features == 128
    assert model(make_batch())["loss_cls"].isfinite()
    with pytest.raises(ValueError, match="IN_FEATURE is 'res4'.*outputs are res3, res5"):
        build("cifar10_resnet18_bp.yaml", *options[:-1], "res4")


def test_initial_values_of_every_layer_of_lenet_are_glorots():
    """As BioTorch's, whose benchmarks the configs repeat; the feedback is another draw of it."""
    model = build("fashion_mnist_lenet_fa.yaml")
    for layer in layers(model).values():
        bound = 6**0.5 / sum(nn.init._calculate_fan_in_and_fan_out(layer.weight)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() < bound
        assert 0.9 * bound < layer.feedback_weight.abs().max() < bound
        assert not layer.bias.any()
    with pytest.raises(ValueError, match="INIT is 'zeros'; choose 'torch' or 'xavier'"):
        build("fashion_mnist_lenet_fa.yaml", "MODEL.IMAGE_CLASSIFIER.INIT", "zeros")


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_is_named(label):
    model, batch = build(), make_batch(3)
    batch["label"][1] = label
    with pytest.raises(ValueError, match=rf"image 1 has the label {label}, but .* 10 classes"):
        model(batch)
    batch["file_name"] = ["a.png", "b.png", "c.png"]
    with pytest.raises(ValueError, match=f"b.png has the label {label}"):
        model(batch)
    with pytest.raises(ValueError, match=f"b.png has the label {label}"):
        model(as_list(batch))


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one shape.*\(3, 32, 32\), \(3, 40, 32\)"):
        build()([{"image": torch.zeros(3, 32, 32)}, {"image": torch.zeros(3, 40, 32)}])
