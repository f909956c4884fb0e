"""No code in a file runs, and nothing is downloaded, unless a key or a flag says so."""

import ast
import functools
import http.server
import logging
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from run_utils import ROOT
from torch import nn

from ss_detectron import add_ss_config
from ss_detectron.checkpoint import FeedbackCheckpointer
from ss_detectron.config import merge_config_file
from ss_detectron.data import check_datasets, register_coco_from_config
from ss_detectron.engine import argument_parser, setup
from ss_detectron.experiments import demo
from ss_detectron.experiments.plan import plan_runs
from ss_detectron.utils.trust import is_trusted

ZOO = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
# What a file does whose code is run.
TAG = "!!python/object/apply:os.mkdir [harmed]"


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.fixture(autouse=True)
def harmed(tmp_path, monkeypatch):
    """Whether the code in a file has run; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return (tmp_path / "harmed").is_dir


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder that is on the web, its address, and the requests it got."""
    folder, requests = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            requests.append(form % args)

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def empty_config():
    cfg = get_cfg()
    add_ss_config(cfg)
    return cfg


# Configs -----------------------------------------------------------------------------------------

READERS = {
    "merge_config_file": lambda name: merge_config_file(empty_config(), name),
    "train_net.py": lambda name: setup(argument_parser().parse_args(["--config-file", name])),
    "demo.py": lambda name: demo.load_config(name),
    "compare_rules.py": lambda name: plan_runs(name, {"bp": [1]}, Path("out")),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_code_in_a_config_does_not_run_nor_is_one_downloaded(reader, harmed, web, tmp_path):
    folder, address, requests = web
    (folder / "base.yaml").write_text("SEED: 12")
    Path("sub").mkdir()
    Path("plain.yaml").write_text("SEED: 1")
    Path("sub/base.yaml").write_text("_BASE_: ../sub/deep.yaml")
    Path("sub/deep.yaml").write_text(f"MODEL:\n  WEIGHTS: {TAG}")
    Path("tagged.yaml").write_text(f"_BASE_: [plain.yaml, {tmp_path}/sub/base.yaml]")
    with pytest.raises(ValueError, match="the config tagged.yaml does not fit") as error:
        reader("tagged.yaml")
    for part in ("python/object/apply:os.mkdir", 'sub/deep.yaml", line 2', "--allow-unsafe-config"):
        assert part in str(error.value)

    Path("web.yaml").write_text(f"_BASE_: [{address}/base.yaml]")
    Path("upon.yaml").write_text("_BASE_: web.yaml")
    for name in (f"{address}/base.yaml", "upon.yaml"):
        with pytest.raises(ValueError, match=f"{address}/base.yaml would be downloaded: .*--allow"):
            reader(name)
    assert not harmed() and not requests


def test_it_runs_and_is_downloaded_where_the_flag_allows_it(harmed, web, caplog):
    folder, address, _ = web
    (folder / "base.yaml").write_text("SEED: !!python/object/apply:eval ['3 * 4']")
    Path("my.yaml").write_text(f"_BASE_: {address}/base.yaml\nMODEL: {{WEIGHTS: {TAG}}}")
    cfg = empty_config()
    assert merge_config_file(cfg, "my.yaml", allow_unsafe=True) == "my.yaml"
    assert cfg.SEED == 12 and harmed()
    assert any(r.name == "ss_detectron.config" and "my.yaml" in r.message for r in caplog.records)
    cfg = empty_config()
    merge_config_file(cfg, f"{address}/base.yaml", allow_unsafe=True)
    assert cfg.SEED == 12


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "does not fit: it does not consist of keys and values"),
        ("- SEED", "does not fit: it does not consist of keys and values"),
        ("_BASE_: 3", "does not fit: it does not consist of keys and values"),
        ("A: [1,", 'does not fit: .*my.yaml", line 1'),
        (f"NO_KEY: [1, {{a: {TAG}}}]", "does not fit: .*Tags of Python would run code"),
        ("SOLVER: 3", "does not fit: .*SOLVER"),
        ("SEED: 2020-01-01", "does not fit: .*SEED"),
        ("VERSION: 7", "does not fit: .*v7"),
        ("_BASE_: my.yaml", "builds on itself"),
        ("_BASE_: s3://b/a.yaml", "does not fit: .*s3://b/a.yaml would be downloaded"),
    ],
)
def test_a_file_that_is_no_config_is_named(content, message, harmed):
    Path("my.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"the config my.yaml {message}"):
        merge_config_file(empty_config(), "my.yaml")
    assert not harmed()


# Weights -----------------------------------------------------------------------------------------


def checkpointer(trusted=(), folder=""):
    return FeedbackCheckpointer(nn.Linear(2, 2), str(folder), trusted_weights=trusted)


def content(**rest):
    return {"model": {"weight": torch.full((2, 2), 3.0), "bias": torch.ones(2)}, **rest}


def pickled(path, **rest):
    """As in the model zoo, with numpy arrays."""
    arrays = {name: value.numpy() for name, value in content()["model"].items()}
    made_by = {"__author__": "zoo", "matching_heuristics": True}
    path.write_bytes(pickle.dumps({"model": arrays, **made_by, **rest}))


WRITERS = {
    "a.pkl": pickled,
    "a.pyth": lambda path, **rest: torch.save({"model_state": content()["model"], **rest}, path),
    "a.pth": lambda path, **rest: torch.save(content(**rest), path),
    "old.pth": lambda path, **rest: torch.save(
        content(**rest), path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_code_in_weights_does_not_run_unless_they_are_trusted(name, harmed, caplog):
    WRITERS[name](Path(name), extra=Harm())
    untouched = checkpointer(trusted=["b.pkl", f"{name}.other", "other/*"])
    before = untouched.model.weight.clone()
    with pytest.raises(ValueError) as error:
        untouched.resume_or_load(name, resume=False)
    assert f"{name} has to be unpickled" in str(error.value)
    assert f"set MODEL.TRUSTED_WEIGHTS \"['{name}']\"" in str(error.value)
    assert name.endswith(".pth") <= ("(it holds posix.mkdir)" in str(error.value))
    assert not harmed()
    assert torch.equal(untouched.model.weight, before)

    caplog.clear()
    trusting = checkpointer(trusted=[name])
    if name == "a.pyth":  # read by Detectron2, which trusts it less than we do
        with pytest.raises(pickle.UnpicklingError):
            trusting.load(name)
    else:
        trusting.load(name)
        assert harmed() and trusting.model.weight[0, 0] == 3
    (warning,) = [r for r in caplog.records if "is unpickled, which runs" in r.getMessage()]
    assert warning.levelno == logging.WARNING and name in warning.getMessage()

    caplog.clear()
    WRITERS[name](Path(name))
    (untouched if (plain := name.endswith(".pth")) else trusting).load(name)
    assert plain != ("unpickled" in caplog.text)


def test_what_torch_refuses_is_named_and_can_be_trusted():
    torch.save(content(metric=np.float64(0.5), when=Path("x")), "a.pth")
    with pytest.raises(ValueError, match=r"a.pth has to be unpickled \(it holds [\w.]*numpy"):
        checkpointer().load("a.pth")
    assert checkpointer(trusted=["*.pth"]).load("a.pth")["metric"] == 0.5


def test_a_resumed_run_does_not_run_code_either(tmp_path, harmed, caplog):
    run = checkpointer(folder=tmp_path)
    run.save("model_0000009", iteration=9)
    run.save("model_0000019", iteration=Harm())
    assert checkpointer(folder=tmp_path).resume_or_load("", resume=True)["iteration"] == 9
    assert "model_0000019.pth has to be unpickled (it holds posix.mkdir)" in caplog.text
    assert not harmed()
    run.save("model_0000009", iteration=Harm())
    with pytest.raises(OSError, match="nothing to resume from .*TRUSTED_WEIGHTS"):
        checkpointer(folder=tmp_path).resume_or_load("", resume=True)
    assert not harmed()
    checkpointer([f"{tmp_path}/model_*.pth"], tmp_path).resume_or_load("", resume=True)
    assert harmed()


@pytest.mark.parametrize("name", ["../evil.pkl", "evil.pkl", "ABSOLUTE"])
def test_a_resumed_run_stays_in_its_folder(name, tmp_path, harmed):
    run = tmp_path / "run"
    run.mkdir()
    for place in (tmp_path, run):
        pickled(place / "evil.pkl", extra=Harm())
        torch.save(content(extra=Harm()), place / "evil.pth")
    (run / "last_checkpoint").write_text(name.replace("ABSOLUTE", f"{tmp_path}/evil.pth"))
    with pytest.raises(OSError, match="last_checkpoint names no checkpoint"):
        checkpointer(["*"], run).resume_or_load("", resume=True)
    assert not harmed()


def test_weights_are_downloaded_where_they_are_trusted_and_announced_before(web, caplog):
    caplog.set_level(logging.INFO)
    folder, address, requests = web
    WRITERS["a.pth"](folder / "a.pth")
    pickled(folder / "a.pkl")
    for name in ("a.pth", "a.pkl"):
        with pytest.raises(ValueError, match=f"{address}/{name}, which would be downloaded"):
            checkpointer(trusted=["a.*", f"{address}/b.pth"]).load(f"{address}/{name}")
    assert not requests and not Path("cache").exists()

    loaded = checkpointer(trusted=[f"{address}/*.p*"])
    for name in ("a.pth", "a.pkl"):
        caplog.clear()
        nn.init.zeros_(loaded.model.weight)
        loaded.load(f"{address}/{name}")
        assert (loaded.model.weight == 3).all()
        said = [record.getMessage() for record in caplog.records]
        ours, iopaths = (i for i, text in enumerate(said) if f"Downloading {address}" in text)
        assert ours < iopaths == said.index(f"Downloading {address}/{name} ...")
        assert ("is unpickled" in caplog.text) == (name == "a.pkl")
    assert len(requests) == 2
    with pytest.raises(OSError, match=f"WEIGHTS is {address}/no.pth, which could not be down.*404"):
        loaded.load(f"{address}/no.pth")


def test_the_demo_trusts_what_the_config_names(harmed):
    pickled(Path("a.pkl"), extra=Harm())
    load = functools.partial(demo.load_config, "quick/shapes_resnet18_ss.yaml", weights="a.pkl")
    with pytest.raises(ValueError, match=r"MODEL.TRUSTED_WEIGHTS \"\['a.pkl'\]\""):
        demo.Predictor(load())
    assert not harmed()
    with pytest.raises(ValueError, match="has nothing of this"):
        demo.Predictor(load(["MODEL.TRUSTED_WEIGHTS", "['a.pkl']"]))
    assert harmed()


@pytest.mark.parametrize(
    "path, pattern, trusted",
    [
        (ZOO, ZOO, True),
        (ZOO, "detectron2://ImageNetPretrained/*/R-??.pkl", True),
        (ZOO, "detectron2://*", False),
        (ZOO, "*", False),
        (ZOO, ZOO[:-4], False),
        (f"{ZOO}?matching_heuristics=True", ZOO, True),
        ("https://evil.org/good.org/a.pth", "https://*good.org/a.pth", False),
        ("https://good.org/a.pth", "https://*good.org/a.pth", True),
        ("sub/a.pkl", "./sub/../sub/*", True),
        ("sub/a.pkl", "HERE/sub/a.pkl", True),
        ("HERE/sub/a.pkl", "sub/[a-c].pkl", True),
        ("sub/a.pkl", "a.pkl", False),
        ("sub/../a.pkl", "sub/*", False),
        ("sub/deep/a.pkl", "sub/*", False),
        ("sub/A.pkl", "sub/a.pkl", False),
        ("run[1]/a.pkl", "run[1]/a.pkl", True),
    ],
)
def test_what_a_pattern_names(path, pattern, trusted, tmp_path):
    path, pattern = (text.replace("HERE", str(tmp_path)) for text in (path, pattern))
    assert is_trusted(path, [pattern]) == is_trusted(path, pattern) == trusted
    assert not is_trusted(path, [])


@pytest.mark.parametrize("paths", [("https://x.org/a.json", "images"), ("a.json", "s3://images")])
def test_data_sets_are_not_downloaded_unless_the_config_says_so(paths, caplog, request):
    caplog.set_level(logging.INFO)
    cfg = empty_config()
    name = request.node.name
    merge_config_file(cfg, "quick/shapes_retinanet_ss.yaml")
    cfg.DATASETS.COCO_INSTANCES = [[name, *paths]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    register_coco_from_config(cfg)
    with pytest.raises(ValueError, match="would be downloaded from .*DATASETS.DOWNLOAD True"):
        check_datasets(cfg)
    cfg.DATASETS.DOWNLOAD = True
    Path("a.json").write_text("{")
    with pytest.raises((FileNotFoundError, ValueError), match="no image folder|not valid JSON"):
        check_datasets(cfg)
    assert f"Data set '{name}' is downloaded from" in caplog.text


# The package -------------------------------------------------------------------------------------


def test_nothing_in_the_package_reads_files_in_another_way():
    files = [*(ROOT / "ss_detectron").rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    assert len(files) > 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load")
            assert name != "torch.load" or "weights_only" in {k.arg for k in node.keywords}, file
            assert not name.endswith(".merge_from_file") or file.name == "config.py", file
