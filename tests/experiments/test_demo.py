"""tools/demo.py: what is drawn is what the models see, in the order of the checkpoints."""

import logging
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from core_utils import assert_same
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import logger as detectron2_logger
from image_utils import datasets_folder, write_images
from matplotlib.colors import to_rgb
from modeling_utils import load_config
from PIL import Image

from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.data import SHAPES_CLS_CLASSES, draw_shapes, generate_shapes
from ss_detectron.experiments import demo
from ss_detectron.experiments.demo import (
    Detector,
    build_predictor,
    draw_video,
    find_files,
    output_paths,
    read_picture,
    side_by_side,
    titles,
)
from ss_detectron.experiments.styles import COLOURS

TOOL = Path(__file__).parents[2] / "tools" / "demo.py"


def picture(seed: int = 0, size: int = 96) -> np.ndarray:
    return draw_shapes(np.random.default_rng(seed), size)[0]


def write_video(path: Path, *frames: np.ndarray) -> None:
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 5, size)
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Output folders of three detectors (bp, ss, fa) and a classifier (cls): config, weights."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("bp", "ss", "fa", "cls")):
        (folder / name).mkdir()
        if name == "cls":
            cfg = load_config("quick/shapes_resnet18_ss.yaml")
        else:
            few = ["MODEL.RETINANET.NUM_CONVS", 1, "TEST.DETECTIONS_PER_IMAGE", 6]
            cfg = load_config(f"quick/shapes_retinanet_{name}.yaml", *few)
        torch.manual_seed(seed)
        model = build_model(cfg)
        if name != "cls":  # scores of all sizes, where an untrained detector's are near 0
            torch.nn.init.normal_(model.head.cls_score.weight, std=0.1)
            torch.nn.init.constant_(model.head.cls_score.bias, -2.0)
        FeedbackCheckpointer(model, str(folder / name)).save("model_final")
        (folder / name / "config.yaml").write_text(cfg.dump())
    return folder


def config(runs: Path, name: str, *options):
    return demo.load_config(str(runs / name / "config.yaml"), options)


# What models see ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "configured"), [("RGB", 0.999), ("BGR", 0.0)])
def test_detections_are_those_of_the_model_above_the_threshold(runs, form, configured):
    cfg = config(runs, "ss", "INPUT.FORMAT", form, "INPUT.MIN_SIZE_TEST", 128)
    stock = cfg.clone()
    stock.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    everything = DefaultPredictor(stock)(picture()[:, :, ::-1])["instances"]
    assert len(everything) == 6
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = configured  # more or less than is asked for
    detector = Detector(cfg, everything.scores[3:5].mean().item())
    found = detector(picture())
    assert len(found) == 4 and found.image_size == (96, 96)
    for field in ("pred_boxes", "scores", "pred_classes"):
        ours, theirs = found.get(field), everything[:4].get(field)
        assert_same(getattr(ours, "tensor", ours), getattr(theirs, "tensor", theirs))
    enlarged = detector(picture(), (192, 96)).pred_boxes.tensor
    torch.testing.assert_close(enlarged, found.pred_boxes.tensor * torch.tensor([1, 2, 1, 2]))


@pytest.mark.parametrize(
    ("size", "factor"), [((100, 50), 4), ((800, 600), 1), ((500, 2000), 0.5)], ids=str
)
def test_a_box_is_drawn_where_it_is_in_its_class_s_colour(size, factor):
    class Sees(Detector):
        """One object, always."""

        classes = ("circle", "square", "triangle")
        __init__ = object.__init__

        def __call__(self, image, size):
            box = Boxes(torch.tensor([[0.2, 0.1, 0.9, 0.8]]) * torch.tensor([*size[::-1]] * 2))
            found = Instances(size, pred_boxes=box, scores=torch.tensor([0.876]))
            found.pred_classes = torch.tensor([2])
            return found

    height, width = (round(side * factor) for side in size)
    drawn, _ = Sees().draw(np.full((*size, 3), 128, np.uint8))
    assert drawn.shape == (height, width, 3)
    colour = [round(255 * part) for part in to_rgb(COLOURS[2])]
    y, x = round(0.45 * height), round(0.55 * width)
    for edge in ((y, round(0.2 * width)), (y, round(0.9 * width)), (round(0.8 * height), x)):
        np.testing.assert_allclose(drawn[edge], colour, atol=1)
    assert (drawn[y, x] == 128).all() and (drawn[y, round(0.2 * width) - 10] == 128).all()


def test_a_classifier_s_panel_names_its_most_probable_classes(runs, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "shape.png")
    predictor = build_predictor(config(runs, "cls"))
    seen = predictor(picture())
    record = predictor.mapper({"file_name": str(tmp_path / "shape.png"), "label": 0})
    with torch.no_grad():
        expected = predictor.model({"image": record["image"][None]})["probabilities"][0]
    assert_same(seen, expected)
    drawn, caption = predictor.draw(picture())
    assert drawn.shape == (400, 400, 3)
    order = seen.argsort(descending=True)[:5].tolist()
    assert caption.split() == [
        word for i in order for word in (f"{seen[i]:.1%}", SHAPES_CLS_CLASSES[i])
    ]


def test_a_title_is_the_checkpoint_s_rule_or_else_the_config_s(runs, tmp_path):
    weights = [str(runs / "bp" / "model_final.pth"), *(str(tmp_path / f"{i}.pth") for i in "12")]
    stock = {"model": torch.load(weights[0])["model"]}
    rules = {"head.cls_score": "backpropagation", "head.bbox_pred": "backpropagation"}
    rules["backbone.fpn_output3"] = "sign_symmetry(scale=rms, gain=0.5)"
    torch.save({**stock, "feedback": rules}, weights[1])
    torch.save(stock, weights[2])
    config_file = str(runs / "fa" / "config.yaml")
    predictors = [build_predictor(demo.load_config(config_file, [], path)) for path in weights]
    kp = demo.load_config(config_file, ["MODEL.FEEDBACK.RULE", "kp"], weights[2])
    assert Detector(kp, 0.01).rule == "kolen_pollack"  # whose feedback the weights lack
    _, ss, fa = predictors
    assert titles(predictors, weights) == ["backpropagation", "sign symmetry", "feedback alignment"]
    assert titles([fa, ss, fa], ["out/a/last.pth", "out/a/best.pth", "best.pth"]) == [
        "feedback alignment (a/last)",
        "sign symmetry",
        "feedback alignment (best)",
    ]


@pytest.mark.parametrize(
    ("run", "lacks", "named"),
    [
        ("ss", "backbone.fpn_", r"backbone\.fpn_lateral3"),
        ("cls", "running_mean", r"backbone\.stem\.conv1\.norm\.running_mean"),
    ],
)
def test_weights_that_lack_a_part_of_the_model_are_refused(runs, tmp_path, run, lacks, named):
    model = torch.load(runs / run / "model_final.pth")["model"]
    part = {name: value for name, value in model.items() if lacks not in name}
    torch.save({"model": part}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=rf"part\.pth lacks .*{named}"):
        build_predictor(config(runs, run, "MODEL.WEIGHTS", str(tmp_path / "part.pth")))


def test_which_weights_are_taken(runs, tmp_path):
    other, given = tmp_path / "other.pth", tmp_path / "given.pth"
    for path in (other, given):
        path.touch()
    file, option = str(runs / "ss" / "config.yaml"), ["MODEL.WEIGHTS", str(other)]
    taken = [demo.load_config(file, *w) for w in ((), (option,), (option, str(given)))]
    final = runs / "ss" / "model_final.pth"
    assert [cfg.MODEL.WEIGHTS for cfg in taken] == [str(path) for path in (final, other, given)]


def test_the_classes_names_come_from_one_s_own_data_set(runs, tmp_path, monkeypatch, caplog):
    shapes = generate_shapes(tmp_path, train=1, val=1, size=64)
    annotations = shapes / "annotations" / "instances_val.json"
    text = annotations.read_text()
    for name, renamed in (("circle", "ring"), ("square", "box"), ("triangle", "wedge")):
        text = text.replace(f'"{name}"', f'"{renamed}"')
    annotations.write_text(text)

    def classes(key, name, *paths, weights=runs / "ss" / "model_final.pth"):
        keys = [f"DATASETS.{key}", [[name, *map(str, paths)]], "DATASETS.TEST", (name,)]
        return Detector(config(runs, "ss", *keys, "MODEL.WEIGHTS", str(weights))).classes

    with datasets_folder(tmp_path, monkeypatch):
        own = classes("COCO_INSTANCES", "own", annotations, shapes / "val")
        assert own == ["ring", "box", "wedge"]
        gone = classes("COCO_INSTANCES", "gone", tmp_path / "gone.json", tmp_path)
        assert gone == ["class 0", "class 1", "class 2"]
        assert "The classes have no names here" in caplog.text
        write_images(tmp_path / "two", a=1, b=1)
        with pytest.raises(ValueError, match="'two' has 2 classes, the model 3"):
            classes("IMAGE_FOLDERS", "two", tmp_path / "two")
        with pytest.raises(ValueError, match="No data set named 'none'"):
            Detector(config(runs, "ss", "DATASETS.TEST", ("none",)))

        # Of a checkpoint that says them, they are drawn whatever the data set says.
        saved = torch.load(runs / "ss" / "model_final.pth")
        saved["classes"] = ["circle", "square", "triangle"]
        torch.save(saved, says := tmp_path / "says.pth")
        for name, *paths in (
            ("gone", tmp_path / "gone.json", tmp_path),
            ("own", annotations, shapes / "val"),
        ):
            caplog.clear()
            assert classes("COCO_INSTANCES", name, *paths, weights=says) == saved["classes"]
            said = "classes drawn are the checkpoint's: it was trained on other classes: from class"
            assert (said in caplog.text) == (name == "own")


# Pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 403])
def test_panels_stand_side_by_side_pixel_by_pixel_with_text_within_them(width):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (301, width, 3), np.uint8) for _ in range(3)]
    titles = ["SS", "sign symmetry (folder/model_0000199)", "FA"]
    drawn = side_by_side(titles, pictures, ["a\nb", " 99.9%  Größe $x$ " * 9, ""])
    wide = max(width, 160)
    above = drawn.shape[0] - 301 - 8 - 2 * 18
    assert drawn.shape[1] == 8 + 3 * (wide + 8)
    assert above == 16 + 18 * (3 if width == 30 else 1)  # the title's lines
    dark = (drawn < 128).any(2)
    for i, expected in enumerate(pictures):
        left = 8 + i * (wide + 8)
        inner = left + (wide - width) // 2
        np.testing.assert_array_equal(drawn[above : above + 301, inner : inner + width], expected)
        assert dark[:above, left : left + wide].any()
        assert dark[above + 301 :, left : left + wide].any() == (i < 2)
        assert not dark[:, left - 8 : left].any()


def test_a_picture_is_turned_and_converted_to_rgb(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    transparent = Image.fromarray(picture()[:60]).convert("RGBA")
    transparent.save(tmp_path / "Größe.png", exif=turned)
    np.testing.assert_array_equal(
        read_picture(tmp_path / "Größe.png"), np.rot90(picture()[:60], -1)
    )
    grey = picture()[..., 0]
    Image.fromarray(grey.astype(np.uint16) << 4).save(tmp_path / "12 bits.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "12 bits.png")[..., 2], grey)


# Files -------------------------------------------------------------------------------------------


def test_files_folders_and_patterns_are_found_once(tmp_path, monkeypatch):
    for name in ("b/2.png", "b/1.JPG", "b/notes.txt", "a[1].png", "c/d/3.png", "c/.d/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*words, **options):
        return [str(path) for path in find_files(words, **options)]

    assert found("a[1].png", "b") == ["a[1].png", "b/1.JPG", "b/2.png"]
    assert found("b/*.png", "b", f"{tmp_path}/b/2.png") == ["b/2.png", "b/1.JPG"]
    assert found("**/3.*") == found("c", recursive=True) == ["c/d/3.png"]
    assert found(".", recursive=True) == ["a[1].png", "b/1.JPG", "b/2.png", "c/d/3.png"]
    with pytest.raises(FileNotFoundError, match="--recursive looks into its folders"):
        found("c")
    for word in ("b/3.png", "*.jpg", "c"):
        with pytest.raises(FileNotFoundError, match="there is no file '"):
            found(word)


def test_no_drawing_overwrites_another_or_its_own_picture(tmp_path):
    files = [Path(name) for name in ("a/x.png", "a/x_2.png", "b/x.png", "b/X.jpg", "c/y.z.png")]
    names = ["x.png", "x_2.png", "x_3.png", "X.png", "y.z.png"]
    assert output_paths(files, tmp_path) == [tmp_path / name for name in names]
    with pytest.raises(ValueError, match=r"'a/x\.png' would overwrite"):
        output_paths(files, Path("a"))
    assert output_paths(files[3:4], Path("b")) == [Path("b/X.png")]


def test_every_frame_of_a_video_is_drawn(tmp_path):
    source, target = tmp_path / "quelle-ü.mp4", tmp_path / "drawn.mp4"
    levels = [20, 120, 220, 60]
    write_video(source, *(np.full((48, 64, 3), (level, 0, 0), np.uint8) for level in levels))
    frames = []

    def draw(frame):
        frames.append(frame)
        return np.pad(frame, ((0, 3), (0, 65), (0, 0)))

    draw_video(source, target, draw)
    assert len(frames) == 4
    drawn = cv2.VideoCapture(str(target))
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    for level, seen in zip(levels, frames, strict=True):
        read, frame = drawn.read()
        assert read and frame.shape == (50, 128, 3)
        np.testing.assert_allclose(seen.mean((0, 1)), [level, 0, 0], atol=6)
        np.testing.assert_allclose(frame[:40, :56].mean((0, 1)), [0, 0, level], atol=8)
    assert not drawn.read()[0]
    source.write_bytes(b"no video")
    with pytest.raises(demo.UnreadableImageError, match="quelle-ü.mp4' cannot be read as a video"):
        draw_video(source, target, draw)


# The tool ----------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool here; returns what it printed. It leaves the tests' logging as it is."""
    made = logging.Logger("the tool's", logging.DEBUG)
    monkeypatch.setattr(detectron2_logger, "setup_logger", lambda *args, **kwargs: made)

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        runpy.run_path(str(TOOL), run_name="__main__")
        assert made.level == logging.INFO  # else one-line errors come with their tracebacks
        return capsys.readouterr().out

    return run


def test_the_tool_draws_one_panel_per_checkpoint(runs, tmp_path, run):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.fromarray(picture(1)).save(tmp_path / "a" / "ähnlich.png")
    Image.fromarray(picture(2, 128)[:80]).convert("L").save(tmp_path / "b" / "ähnlich.jpg")
    configs = [runs / name / "config.yaml" for name in ("fa", "bp")]
    words = ["--config-file", *configs, "--input", tmp_path / "a", tmp_path / "b"]
    out, options = tmp_path / "new" / "out", ["INPUT.MIN_SIZE_TEST", 128]
    detectors = [Detector(demo.load_config(str(file), options), 0.1) for file in configs]
    printed = run(*words, "--score", 0.1, "--output", out, *options)
    assert printed.count(" -> ") == 2
    drawn = [read_image(str(out / name), "RGB") for name in ("ähnlich.png", "ähnlich_2.png")]
    assert [d.shape for d in drawn] == [(42 + height, 8 + 2 * 408, 3) for height in (400, 250)]
    labels = ["feedback alignment", "backpropagation"]
    pictures = [detector.draw(picture(1))[0] for detector in detectors]
    np.testing.assert_array_equal(drawn[0], side_by_side(labels, pictures, ["", ""]))
    assert (pictures[0] != pictures[1]).any()


def test_one_config_does_for_several_weights_and_a_video(runs, tmp_path, run):
    write_video(tmp_path / "v.mp4", picture())
    weights = [runs / name / "model_final.pth" for name in ("ss", "bp")]
    words = ["--config-file", runs / "bp" / "config.yaml", "--weights", *weights]
    words += ["--video", tmp_path / "v.mp4", "--labels", "SS", "BP", "--output", tmp_path / "out"]
    run(*words)
    read, frame = cv2.VideoCapture(str(tmp_path / "out" / "v.mp4")).read()
    assert read and frame.shape == (34 + 400 + 8, 8 + 2 * 408, 3)


def test_unreadable_images_are_named_skipped_and_counted(runs, tmp_path, caplog, run):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(b"no image")
    Image.fromarray(picture()).save(tmp_path / "in" / "2.png")
    words = ["--config-file", runs / "cls" / "config.yaml", "--input", tmp_path / "in"]
    with pytest.raises(SystemExit, match="1 of 2 files could not be read"):
        run(*words, "--output", tmp_path / "out")
    assert "1.png' cannot be read as an image" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RUNS/ss/config.yaml --input no.png", "there is no file 'no.png'"),
        ("no.yaml --input x.png", "there is no config file 'no.yaml'"),
        ("quick/shapes_retinanet_fa.yaml --input x.png", "no weights '' for quick/shapes_ret"),
        ("RUNS/ss/config.yaml --weights no.pth --input x.png", "there are no weights 'no.pth'"),
        ("RUNS/ss/config.yaml --input x.png --output .", "'x.png' would overwrite"),
        ("RUNS/ss/config.yaml --input x.png --output out MODEL.NONE 1", "MODEL.NONE"),
        ("RUNS/ss/config.yaml --input x.png --output out MODEL.DEVICE cpu --score 1", "--score"),
        ("RUNS/ss/config.yaml --input x.png --output out MODEL.DEVICE", "pairs"),
        ("a b --weights c --input d", "2 configs, but 1 weights"),
        ("a --labels b c --input d", "2 labels, but 1 checkpoints"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, tmp_path, monkeypatch, run, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("x.png")
    words = ["--config-file", *words.replace("RUNS", str(runs)).split()]
    with pytest.raises(SystemExit) as exit_:
        run(*words, *([] if "--output" in words else ["--output", "out"]))
    assert message in str(exit_.value.code) + capsys.readouterr().err
    np.testing.assert_array_equal(read_picture("x.png"), picture())
