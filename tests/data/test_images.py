import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from image_utils import image_config
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.datasets.folder import pil_loader
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


def transforms(image, times, *, training, flip="horizontal", format="RGB", **options):
    """What becomes of an image, each time anew, from the same seed."""
    cfg = image_config(**options)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = flip, format
    mapper = ClassificationMapper(cfg, training)
    torch.manual_seed(0)
    return [mapper({"file_name": "x", "image": image, "label": 1})["image"] for _ in range(times)]


def transform(image, **options):
    return transforms(image, 1, **options)[0]


# Reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.ppm", "a.tiff", "Käse 猫.png"])
def test_colours_are_read_as_they_are(tmp_path, name):
    image = noise(5, 7)
    assert (read(tmp_path / name, Image.fromarray(image)) == image).all()


@pytest.mark.parametrize("name", ["a.png", "a.pgm", "a.tif", "a.bmp"])
def test_grey_becomes_three_equal_channels(tmp_path, name):
    found = read(tmp_path / name, Image.fromarray(RAMP.astype(np.uint8)))
    assert (found == RAMP[..., None]).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_black_and_white_become_0_and_255(tmp_path, name):
    bits = RAMP % 3 == 0
    assert (read(tmp_path / name, Image.fromarray(bits)) == 255 * bits[..., None]).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    for low in (0, 255):  # the lower 8 bits make no difference
        found = read(tmp_path / name, Image.fromarray(values + np.uint16(low)))
        assert (found == RAMP[..., None]).all()


def test_16_bit_big_endian_grey(tmp_path):
    image = Image.frombytes("I;16B", (16, 16), (RAMP * 257).astype(">u2").tobytes())
    assert (read(tmp_path / "a.tif", image) == RAMP[..., None]).all()


def test_alpha_is_dropped(tmp_path):
    image = noise(16, 16)
    alpha = Image.fromarray(RAMP.astype(np.uint8))
    for mode in ("RGBA", "LA"):
        opaque = Image.fromarray(image).convert(mode[:-1])
        transparent = opaque.copy()
        transparent.putalpha(alpha)
        assert transparent.mode == mode
        found = read(tmp_path / f"{mode}.png", transparent)
        assert (found == np.asarray(opaque.convert("RGB"))).all()


@pytest.mark.parametrize("options", [{}, {"transparency": 5}, {"transparency": bytes(range(256))}])
def test_palette_gives_its_colours(tmp_path, options):
    palette = noise(16, 16)
    image = Image.fromarray(RAMP.astype(np.uint8), "L").convert("P")
    image.putpalette(palette.tobytes())
    assert (read(tmp_path / "a.png", image, **options) == palette).all()


def test_transparent_colour_of_grey_is_dropped(tmp_path):
    image = Image.fromarray(RAMP.astype(np.uint8))
    assert (read(tmp_path / "a.png", image, transparency=9) == RAMP[..., None]).all()


def test_cmyk_gives_the_colours_it_stands_for(tmp_path):
    inks = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    found = read(tmp_path / "a.tif", Image.fromarray(inks, "CMYK"))
    paper = 255.0 - inks
    assert np.abs(found - paper[..., :3] * paper[..., 3:] / 255).max() <= 1


def test_cmyk_jpeg_gives_the_colours_it_stands_for(tmp_path):
    image = Image.new("CMYK", (16, 16), (255, 0, 51, 0))
    found = read(tmp_path / "a.jpg", image, quality=100)
    assert np.abs(found.astype(int) - (0, 255, 204)).max() <= 3


def test_arrays_are_taken_as_they_are():
    image = noise(5, 7)
    assert (np.asarray(read_image({"file_name": "x", "image": image})) == image).all()
    grey = read_image({"file_name": "x", "image": image[..., 0]})
    assert (np.asarray(grey) == image[..., :1]).all()


def spoiled(kind: str) -> bytes:
    buffer = io.BytesIO()
    form, _, kind = kind.partition(" ")
    Image.fromarray(noise(64, 64)).save(buffer, form)
    content = buffer.getvalue()
    if kind == "header":
        return content[:20]
    if kind == "truncated":
        return content[: len(content) // 2]
    return {"empty": b"", "text": b"no image", "zeros": bytes(1000)}[kind]


@pytest.mark.parametrize(
    "kind",
    ["jpeg header", "jpeg truncated", "png header", "png truncated", "bmp truncated"]
    + ["png empty", "png text", "png zeros"],
)
def test_damaged_files_are_named(tmp_path, kind):
    file = tmp_path / "spoiled.png"
    file.write_bytes(spoiled(kind))
    with pytest.raises(UnreadableImageError, match=f"^'{file}' cannot be read as an image: .+"):
        read(file)


def test_missing_files_and_folders_are_named(tmp_path):
    for file in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(UnreadableImageError, match=f"'{file}' cannot be read"):
            read(file)


@pytest.mark.parametrize("error", [TypeError, MemoryError])
def test_only_errors_of_the_file_make_it_unreadable(tmp_path, monkeypatch, error):
    """A mapper's mistake and a lack of memory do not."""

    def fail(*args):
        raise error

    file = tmp_path / "a.png"
    Image.fromarray(noise(9, 9)).save(file)
    mapper = ClassificationMapper(image_config(), training=True)
    owner, name = {TypeError: (v2.RandomResizedCrop, "get_params"), MemoryError: (Image, "open")}[
        error
    ]
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(error):
        mapper({"file_name": str(file), "label": 0})


def test_values_without_a_white_are_refused(tmp_path):
    for values, kind in ((RAMP, "f4"), (RAMP - 1, "i4"), (RAMP + 65300, "i4")):
        with pytest.raises(UnreadableImageError, match="floats|16 bits"):
            read(tmp_path / "a.tif", Image.fromarray(values.astype(kind)))


def test_arrays_that_are_no_images_are_named():
    for array in (np.zeros((4, 4, 7), np.uint8), np.zeros((4, 4, 3)), None):
        with pytest.raises(UnreadableImageError, match="'x' cannot be read as an image"):
            read_image({"file_name": "x", "image": array})


# Transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(333, 500), (500, 333), (80, 100), (256, 256), (400, 301)])
def test_evaluation_is_that_of_torchvision(shape):
    """Its transforms for ImageNet weights, but for what the model does: scale and normalise."""
    image = noise(*shape)
    reference = ResNet18_Weights.IMAGENET1K_V1.transforms()
    expected = reference(Image.fromarray(image))
    found = transform(image, training=False)
    assert found.dtype == torch.uint8 and found.shape == (3, 224, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reference.mean, reference.std))
    torch.testing.assert_close((found / 255 - mean) / std, expected)


def test_random_resized_crops():
    """8 to 100 % of the area, of an aspect from 3/4 to 4/3, flipped half of the time."""
    image = coordinates(240, 240)
    areas, aspects, flipped = [], [], 0
    for found in transforms(image, 200, training=True, SIZE=32):
        assert found.shape == (3, 32, 32) and (found[2] == 7).all()
        x, y = found[0].float().mean(0), found[1].float().mean(1)
        assert (y.diff() > -1).all()
        # 31 steps between the centres of 32 pixels
        width, height = (abs(v[-1] - v[0]) * 32 / 31 for v in (x, y))
        areas.append(float(width * height) / 240**2)
        aspects.append(float(width / height))
        flipped += bool(x[0] > x[-1])
    assert 0.06 < min(areas) < 0.13 and 0.9 < max(areas) < 1.04
    assert 0.6 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.6
    assert 70 < flipped < 130


def test_pad_and_crop_shifts_the_image_over_black():
    image = coordinates(32, 32)
    padded = torch.from_numpy(np.pad(image, [(4, 4), (4, 4), (0, 0)])).permute(2, 0, 1)
    seen = set()
    options = {"flip": "none", "TRANSFORM": "pad_crop", "SIZE": 32, "PAD": 4}
    for found in transforms(image, 1500, training=True, **options):
        y, x = (int(v) for v in (found[1, 16, 16] - 17 + 4, found[0, 16, 16] - 17 + 4))
        assert (found == padded[:, y : y + 32, x : x + 32]).all()
        seen.add((y, x))
    assert len(seen) == 81


def test_pad_and_crop_leaves_an_image_for_evaluation_as_it_is():
    image = noise(32, 32)
    found = transform(image, training=False, TRANSFORM="pad_crop", SIZE=32)
    assert (found.permute(1, 2, 0).numpy() == image).all()
    found = transform(noise(36, 40), training=False, TRANSFORM="pad_crop", SIZE=32)
    assert (found.permute(1, 2, 0).numpy() == noise(36, 40)[2:34, 4:36]).all()


@pytest.mark.parametrize("training", [True, False])
def test_pad_and_crop_pads_images_that_are_too_small(training):
    image = 1 + noise(8, 8) // 2
    found = transform(image, training=training, TRANSFORM="pad_crop", SIZE=32, PAD=1)
    assert found.shape == (3, 32, 32)
    assert (found == 0).sum() >= 3 * (32 * 32 - 8 * 8)
    if not training:
        assert (found[:, 12:20, 12:20].permute(1, 2, 0).numpy() == image).all()


@pytest.mark.parametrize("training", [True, False])
def test_resize_takes_the_whole_image(training):
    image = noise(30, 50)
    found = transform(image, training=training, flip="none", TRANSFORM="resize", SIZE=20)
    expected = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR)
    assert (found.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["resize", "pad_crop"])
@pytest.mark.parametrize(("flip", "axis"), [("horizontal", 2), ("vertical", 1), ("none", None)])
def test_flips(kind, flip, axis):
    image = noise(8, 8)
    plain = torch.from_numpy(image).permute(2, 0, 1)
    other = plain if axis is None else plain.flip(axis)
    options = {"flip": flip, "TRANSFORM": kind, "SIZE": 8, "PAD": 0}
    found = transforms(image, 40, training=True, **options)
    flipped = sum(bool((f == other).all()) for f in found)
    assert all((f == plain).all() or (f == other).all() for f in found)
    assert 8 < flipped < 32 if axis else flipped == 40
    assert all((f == plain).all() for f in transforms(image, 10, training=False, **options))


@pytest.mark.parametrize("form", ["RGB", "BGR", "L", "YUV-BT.601"])
def test_formats_are_those_of_detectron2(tmp_path, form):
    file = tmp_path / "a.png"
    Image.fromarray(noise(20, 20)).save(file)
    expected = torch.from_numpy(detection_utils.read_image(file, form).copy()).permute(2, 0, 1)
    options = {"format": form, "flip": "none", "TRANSFORM": "resize", "SIZE": 20}
    for training in (True, False):
        found = transform(noise(20, 20), training=training, **options)
        assert found.dtype == (torch.float32 if form == "YUV-BT.601" else torch.uint8)
        torch.testing.assert_close(found, expected.to(found.dtype))


def test_what_a_batch_is_made_of(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(noise(9, 9)).save(file)
    mapper = ClassificationMapper(image_config(TRANSFORM="resize", SIZE=4), training=True)
    found = mapper({"file_name": str(file), "image_id": 3, "label": np.int64(1)})
    assert set(found) == {"image", "label", "file_name"}
    assert found["label"] == 1 and type(found["label"]) is int
    assert Path(found["file_name"]) == file


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


def torchvision_crops(image, times, size):
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    transform, found = v2.Compose(steps), []
    for seed in range(times):
        torch.manual_seed(seed)
        found.append(transform(image).int())
    return torch.stack(found), torch.get_rng_state()


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


@pytest.mark.parametrize("size", [(640, 424), (333, 500), (60, 50), (400, 30), (1, 1)])
def test_crops_of_every_pixel_are_those_of_torchvision(tmp_path, size):
    file = write_photo(tmp_path / "a.jpg", size=size)
    found, states = crops(file, 20, SIZE=48, REDUCED_DECODING=False)
    expected, state = torchvision_crops(pil_loader(file), 20, 48)
    assert found.equal(expected) and states[-1].equal(state)


def test_crops_that_need_every_pixel_are_those_of_torchvision(tmp_path, decoded):
    """Of photographs as large as most in ImageNet, and of whatever is no JPEG."""
    small = write_photo(tmp_path / "a.jpg", size=(500, 375))
    large = write_photo(tmp_path / "a.png")
    for file, size in ((small, 224), (large, 32)):
        expected, _ = torchvision_crops(pil_loader(file), 10, size)
        assert crops(file, 10, SIZE=size)[0].equal(expected)
    assert set(decoded) == {(500, 375), (640, 424)}
    array = load_sample_image("china.jpg")
    expected, _ = torchvision_crops(Image.fromarray(array), 1, 32)
    assert transform(array, training=True, SIZE=32).equal(expected[0].byte())


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
    [("RGB", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0})]
    + [("L", {}), ("CMYK", {})],
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


@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_decoding_notices_damage(tmp_path, progressive, decoded):
    file = write_photo(tmp_path / "a.jpg", progressive=progressive)
    content = Path(file).read_bytes()
    for part in (0.2, 0.5, 0.9):
        Path(file).write_bytes(content[: int(part * len(content))])
        with pytest.raises(UnreadableImageError, match=f"^'{file}' cannot be read .*truncated"):
            crops(file, 1, SIZE=32)
    assert max(decoded)[0] <= 320


def test_evaluation_decodes_every_pixel(tmp_path):
    file = write_photo(tmp_path / "a.jpg")
    options = {"SIZE": 32, "RESIZE": 40, "REDUCED_DECODING": True}
    mapper = ClassificationMapper(image_config(**options), training=False)
    steps = v2.Compose([v2.Resize(40), v2.CenterCrop(32), v2.PILToTensor()])
    found = mapper({"file_name": file, "label": 0})["image"]
    assert found.equal(steps(pil_loader(file)))


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "INPUT.CLASSIFICATION.TRANSFORM",
            "crop",
            "'crop'; choose 'resized_crop' or 'pad_crop' or",
        ),
        ("INPUT.CLASSIFICATION.SIZE", 0, "SIZE is 0; choose at least 1"),
        ("INPUT.CLASSIFICATION.SIZE", 300, "RESIZE is 256; choose at least SIZE, 300"),
        ("INPUT.CLASSIFICATION.RESIZE", 200, "RESIZE is 200; choose at least SIZE, 224"),
        ("INPUT.RANDOM_FLIP", "diagonal", "INPUT.RANDOM_FLIP is 'diagonal'; choose 'horizontal'"),
        ("INPUT.FORMAT", "HSV", "INPUT.FORMAT is 'HSV'; choose 'RGB' or 'BGR' or"),
    ],
)
def test_options_out_of_range_are_refused(key, value, message):
    cfg = image_config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        for training in (True, False):
            ClassificationMapper(cfg, training)


def test_pad_is_not_negative():
    with pytest.raises(ValueError, match="PAD is -1; choose at least 0"):
        ClassificationMapper(image_config(TRANSFORM="pad_crop", PAD=-1), True)


def test_size_is_not_bound_by_a_key_that_is_not_read():
    ClassificationMapper(image_config(TRANSFORM="pad_crop", SIZE=300, RESIZE=1), False)
    ClassificationMapper(image_config(TRANSFORM="resize", SIZE=300, RESIZE=1, PAD=-1), False)
