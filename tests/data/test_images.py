import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from image_utils import image_config
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from ss_detectron.data import ClassificationMapper, UnreadableImageError, images, read_image

RAMP = np.arange(256).reshape(16, 16)


def noise(height, width, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(height, width):
    """An image whose red is the column and whose green is the row of a pixel, plus 1."""
    y, x = np.mgrid[:height, :width] + 1
    return np.stack([x, y, np.full_like(x, 7)], 2).astype(np.uint8)


def read(file, image=None, **options):
    """What is read back of an image that was written, as an array."""
    if image is not None:
        image.save(file, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_image({"file_name": str(file)})
    assert found.mode == "RGB"
    return np.asarray(found)


def transform(image, *, training, flip="horizontal", form="RGB", seed=0, **options):
    """What becomes of an image."""
    cfg = image_config(**options)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = flip, form
    mapper = ClassificationMapper(cfg, training)
    torch.manual_seed(seed)
    return mapper({"file_name": "x", "image": image, "label": 1})["image"]


# Reading -----------------------------------------------------------------------------------------

COLOURS = noise(16, 16)
GREY = Image.fromarray(RAMP.astype(np.uint8))
PALETTE = GREY.convert("P")
PALETTE.putpalette(COLOURS.tobytes())
SIXTEEN = RAMP.astype(np.uint16) * 256
HOT = RAMP.astype(np.uint16) << 2
HOT[3, 5] = 65535


def with_alpha(mode):
    image = Image.fromarray(COLOURS).convert(mode[:-1])
    image.putalpha(GREY)
    return image


@pytest.mark.parametrize(
    ("names", "image", "expected", "options"),
    [
        ("a.png a.PNG a.bmp a.ppm a.tiff Käse_猫.png", Image.fromarray(COLOURS), COLOURS, {}),
        ("a.png a.pgm a.tif a.bmp", GREY, RAMP, {}),
        ("a.png", GREY, RAMP, {"transparency": 9}),
        ("a.png a.tif", Image.fromarray(RAMP % 3 == 0), 255 * (RAMP % 3 == 0), {}),
        ("a.png a.tif a.pgm", Image.fromarray(SIXTEEN), RAMP, {}),  # scaled, not clipped
        ("a.png a.tif a.pgm", Image.fromarray(RAMP.astype(np.uint16) << 4), RAMP, {}),  # 12 bits
        (
            "a.png a.tif a.pgm",
            Image.fromarray((RAMP.astype(np.uint16) << 2) + np.uint16(3)),
            RAMP,
            {},
        ),
        ("a.png a.tif a.pgm", Image.fromarray(RAMP.astype(np.uint16)), RAMP, {}),
        ("a.png a.tif a.pgm", Image.fromarray(RAMP.astype(np.uint16) << 6), RAMP, {}),  # 14 bits
        ("a.png a.tif", Image.fromarray(HOT), np.where(HOT == 65535, 255, RAMP), {}),
        ("a.png a.tif a.pgm", Image.fromarray(SIXTEEN + np.uint16(255)), RAMP, {}),
        ("a.tif", Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes()), RAMP, {}),
        ("a.png", with_alpha("RGBA"), COLOURS, {}),
        ("a.png", with_alpha("LA"), Image.fromarray(COLOURS).convert("L"), {}),
        ("a.png", PALETTE, COLOURS, {}),
        ("a.png", PALETTE, COLOURS, {"transparency": 5}),
        ("a.png", PALETTE, COLOURS, {"transparency": bytes(range(256))}),
    ],
)
def test_files_are_read_as_8_bit_rgb(tmp_path, names, image, expected, options):
    expected = np.asarray(expected)
    for name in names.split():
        found = read(tmp_path / name, image, **options)
        assert (found == expected.reshape(16, 16, -1)).all()


def test_the_bits_that_are_assumed_are_said_once_each(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # others have said them
    with caplog.at_level("INFO", "ss_detectron"):
        for bits in (10, 14, 14, 16):
            read(tmp_path / "a.png", Image.fromarray(RAMP.astype(np.uint16) << bits - 8))
    said = [re.search(r"taken as of (\d+) bits", r.getMessage()) for r in caplog.records]
    assert [found[1] for found in said] == ["10", "14", "16"]


def test_cmyk_gives_the_colours_it_stands_for(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    found = read(tmp_path / "a.tif", Image.fromarray(inks, "CMYK"))
    paper = 255.0 - inks
    assert np.abs(found - paper[..., :3] * paper[..., 3:] / 255).max() <= 1
    image = Image.new("CMYK", (16, 16), (255, 0, 51, 0))
    found = read(tmp_path / "a.jpg", image, quality=100)
    assert np.abs(found.astype(int) - (0, 255, 204)).max() <= 3


def test_arrays_are_taken_as_they_are():
    assert (np.asarray(read_image({"file_name": "x", "image": COLOURS})) == COLOURS).all()
    grey = read_image({"file_name": "x", "image": COLOURS[..., 0]})
    assert (np.asarray(grey) == COLOURS[..., :1]).all()
    for array in (np.zeros((4, 4, 7), np.uint8), np.zeros((4, 4, 3)), None):
        with pytest.raises(UnreadableImageError, match="'x' cannot be read as an image"):
            read_image({"file_name": "x", "image": array})


def test_values_without_a_white_are_refused(tmp_path):
    for values, kind in ((RAMP, "f4"), (RAMP - 1, "i4"), (RAMP + 65300, "i4")):
        with pytest.raises(UnreadableImageError, match="floats|16 bits"):
            read(tmp_path / "a.tif", Image.fromarray(values.astype(kind)))


# Transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(333, 500), (500, 333), (80, 100)])
def test_evaluation_is_that_of_torchvisions_weights(shape):
    """But for what the model does: scale and normalise."""
    reference = ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = reference(Image.fromarray(noise(*shape)))
    found = transform(noise(*shape), training=False)
    assert found.dtype == torch.uint8 and found.shape == (3, 224, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reference.mean, reference.std))
    torch.testing.assert_close((found / 255 - mean) / std, expected)


SIZE, RESIZE, PAD = 24, 30, 3
REFERENCES = {
    ("resized_crop", True): [v2.RandomResizedCrop(SIZE)],
    ("resized_crop", False): [v2.Resize(RESIZE), v2.CenterCrop(SIZE)],
    ("pad_crop", True): [v2.RandomCrop(SIZE, padding=PAD, pad_if_needed=True)],
    ("pad_crop", False): [v2.CenterCrop(SIZE)],
    ("resize", True): [v2.Resize((SIZE, SIZE))],
    ("resize", False): [v2.Resize((SIZE, SIZE))],
}
FLIPS = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip}


@pytest.mark.parametrize(("kind", "training"), REFERENCES)
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    flip=st.sampled_from(["horizontal", "vertical", "none"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_transforms_are_those_of_torchvision(kind, training, height, width, flip, seed):
    """To the bit, and so is the random state that they leave."""
    flips = [FLIPS[flip]()] if training and flip != "none" else []
    reference = v2.Compose([*REFERENCES[kind, training], *flips, v2.PILToTensor()])
    torch.manual_seed(seed)
    expected = reference(Image.fromarray(noise(height, width)))
    state = torch.get_rng_state()
    options = {"SIZE": SIZE, "RESIZE": RESIZE, "PAD": PAD, "REDUCED_DECODING": False}
    options |= {"training": training, "flip": flip, "seed": seed, "TRANSFORM": kind}
    found = transform(noise(height, width), **options)
    assert found.equal(expected) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("form", ["RGB", "BGR", "L", "YUV-BT.601"])
def test_formats_are_those_of_detectron2(tmp_path, form):
    file = tmp_path / "a.png"
    Image.fromarray(noise(20, 20)).save(file)
    expected = torch.from_numpy(detection_utils.read_image(file, form).copy()).permute(2, 0, 1)
    options = {"form": form, "flip": "none", "TRANSFORM": "resize", "SIZE": 20}
    for training in (True, False):
        found = transform(noise(20, 20), training=training, **options)
        assert found.dtype == (torch.float32 if form == "YUV-BT.601" else torch.uint8)
        torch.testing.assert_close(found, expected.to(found.dtype))


# Reduced decoding --------------------------------------------------------------------------------


def write_photo(file, mode="RGB", size=(640, 424), **options):
    """A photograph of a flower, in a width and height that an eighth leaves whole, or others."""
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize(size)
    photo.convert(mode).save(file, **options)
    return str(file)


def crops(file, times, **options):
    """Training crops of a file, the n-th after seed n, and the random states that they leave."""
    mapper = ClassificationMapper(image_config(**options), training=True)
    found, states = [], []
    for seed in range(times):
        torch.manual_seed(seed)
        found.append(mapper({"file_name": file, "label": 0})["image"].int())
        states.append(torch.get_rng_state())
    return torch.stack(found), torch.stack(states)


@pytest.fixture
def decoded(monkeypatch):
    """The sizes at which images were decoded."""
    sizes = []

    def decode(image):
        sizes.append(image.size)
        return original(image)

    original = images.decode
    monkeypatch.setattr(images, "decode", decode)
    return sizes


def test_what_needs_every_pixel_has_them(tmp_path, decoded):
    """Photographs as large as most in ImageNet, whatever is no JPEG, and evaluation."""
    small = write_photo(tmp_path / "a.jpg", size=(500, 375))
    large = write_photo(tmp_path / "a.png")
    for file, size in ((small, 224), (large, 32)):
        expected, _ = crops(file, 10, SIZE=size, REDUCED_DECODING=False)
        assert crops(file, 10, SIZE=size)[0].equal(expected)
    mapper = ClassificationMapper(image_config(SIZE=32, RESIZE=40), training=False)
    mapper({"file_name": write_photo(tmp_path / "b.jpg"), "label": 0})
    assert set(decoded) == {(500, 375), (640, 424)}


def test_reduced_decoding_leaves_just_the_pixels_of_the_result(tmp_path, decoded):
    """The largest reduction that leaves the crop at least SIZE pixels wide and high."""
    file, least = write_photo(tmp_path / "a.jpg"), 48
    _, states = crops(file, 100, SIZE=least)
    image, factors = Image.new("L", (640, 424)), []
    for seed, (width, height) in enumerate(decoded):
        torch.manual_seed(seed)
        _, _, *crop = v2.RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3))
        factors.append(max(f for f in (1, 2, 4, 8) if f == 1 or min(crop) >= f * least))
        assert (width * factors[-1], height * factors[-1]) == (640, 424)
    assert set(factors) >= {2, 4, 8}
    assert states.equal(crops(file, 100, SIZE=least, REDUCED_DECODING=False)[1])


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("L", {}), ("CMYK", {})],
)
def test_reduced_crops_are_nearly_those_of_every_pixel(tmp_path, mode, options):
    """Within 1.5 of 255 on average over a photograph's crops, at a half, a quarter or an eighth."""
    file = write_photo(tmp_path / "a.jpg", mode, (637, 421), quality=95, **options)
    found, _ = crops(file, 30, SIZE=32)
    expected, _ = crops(file, 30, SIZE=32, REDUCED_DECODING=False)
    difference = (found - expected).abs().float().mean((1, 2, 3))
    assert 0 < difference.mean() < 1.5 and difference.max() < 3


def test_reduced_crops_lie_where_those_of_every_pixel_do(tmp_path):
    """On a ramp, a shift is a difference."""
    file = str(tmp_path / "a.jpg")
    Image.fromarray(coordinates(250, 250)).save(file, quality=100, subsampling=0)
    found, _ = crops(file, 50, SIZE=16)
    expected, _ = crops(file, 50, SIZE=16, REDUCED_DECODING=False)
    difference = (found - expected).float()
    assert 0 < difference.abs().max() <= 3
    assert difference.mean((0, 2, 3)).abs().max() < 0.2


def test_reduced_decoding_notices_damage(tmp_path, decoded):
    file = write_photo(tmp_path / "a.jpg")
    content = Path(file).read_bytes()
    for part in (0.2, 0.5, 0.9):
        Path(file).write_bytes(content[: int(part * len(content))])
        with pytest.raises(UnreadableImageError, match=f"^'{file}' cannot be read .*truncated"):
            crops(file, 1, SIZE=32)
    assert max(decoded)[0] <= 320
