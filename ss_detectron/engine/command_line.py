"""The command line of a training or an evaluation, and the config that follows from it."""

import argparse
import functools
import logging
import multiprocessing
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from ss_detectron.checkpoint.files import (
    atomic_write,
    find_checkpoints,
    has_checkpoint,
    read_checkpoint,
)
from ss_detectron.config import add_ss_config, check_config, merge_config_file, runs_on_cpu
from ss_detectron.data import (
    check_datasets,
    register_coco_from_config,
    register_image_folders_from_config,
)
from ss_detectron.data.catalog import class_names
from ss_detectron.utils.usage import add_traceback_option, one_line_errors

from .checks import check_options, check_proposals, check_weights
from .defaults import Trainer
from .launch import add_launch_options, complete_launch_options, launch
from .logs import set_up_logging

__all__ = ["argument_parser", "main", "setup"]

logger = logging.getLogger(__name__)


def main(args: Sequence[str] | None = None, *, trainer: type[Trainer] = Trainer) -> None:
    """
    Train or evaluate as a command line says, in as many processes as it says.

    A script that adds rules, learners or networks of its own is::

        import my_rules_and_learners
        from ss_detectron.engine import main

        main()

    Each further process imports the script again, and what it registers is there too; this
    function returns at once then.

    Args:
        args: the words of the command line, by default this program's.
        trainer: the class that trains.

    Raises:
        SystemExit: the command line cannot work, or a process failed or was asked to stop.
    """
    process = multiprocessing.current_process()
    if process.name != "MainProcess" and multiprocessing.parent_process() is None:
        return  # a process that is about to be one of the run's, and imports the script first
    parser = argument_parser()
    add_launch_options(parser)
    options = parser.parse_args(args)
    complete_launch_options(parser, options)
    if late := [word for word in options.opts if word.startswith("--")]:
        parser.error(f"{' '.join(late)}: give options before the first KEY VALUE")
    launch(functools.partial(_train_or_evaluate, trainer), options)


def _train_or_evaluate(kind: type[Trainer], args: argparse.Namespace) -> Any:
    """What one process of a run does."""
    with one_line_errors(args.traceback):
        cfg = setup(args)
        if args.eval_only:
            model = kind.build_model(cfg)
            classes = class_names(cfg.DATASETS.TEST)
            checkpointer = kind.build_checkpointer(cfg, model, classes=classes, whole=True)
            checkpointer.weights_except = ()  # what a training was not to start from, it learned
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
            if comm.is_main_process():
                with atomic_write(os.path.join(cfg.OUTPUT_DIR, "eval_config.yaml")) as file:
                    file.write(cfg.dump().encode())
        else:
            trainer = kind(cfg)
            trainer.resume_or_load(resume=args.resume)
    with one_line_errors(args.traceback, OSError):  # of files; other errors are no longer of usage
        if not args.eval_only:
            return trainer.train()
        results = kind.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def argument_parser() -> argparse.ArgumentParser:
    """Return Detectron2's, for which no code in a config file runs unless that is asked for."""
    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # a free port
    add_traceback_option(parser)
    parser.add_argument(
        "--allow-unsafe-config",
        action="store_true",
        help="run the Python code in the config file's YAML tags, and download a config "
        "that is a URL",
    )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """
    Make and check the config of a run, and do what Detectron2's ``default_setup`` does (logging,
    seeds, output folder), but for OUTPUT_DIR's config.yaml, which tells what the weights there were
    trained with: a training writes it when it starts, and an evaluation eval_config.yaml.

    Args:
        args: of :func:`argument_parser`. ``config_file`` may be the name of a config that ships
            with this package; it is replaced by the path.

    Raises:
        FileNotFoundError: no such config, annotation file or image folder.
        ValueError: an unknown key, a value that does not fit, an unknown data set.
    """
    cfg = get_cfg()
    add_ss_config(cfg)
    if not (args.config_file or args.opts):
        raise ValueError("give --config-file: a path, or the name of one such as retinanet_ss.yaml")
    if args.config_file:
        args.config_file = merge_config_file(
            cfg, args.config_file, allow_unsafe=args.allow_unsafe_config
        )
    cfg.merge_from_list(args.opts)
    check_config(cfg)
    starts_anew = not (args.resume or args.eval_only)
    on_cpu = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if on_cpu:
        cfg.MODEL.DEVICE = "cpu"
    register_coco_from_config(cfg)
    register_image_folders_from_config(cfg)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, which cannot be a folder ({error.strerror}): "
            "choose another"
        ) from error
    found = has_checkpoint(cfg.OUTPUT_DIR)
    settle_feedback_seed(cfg, goes_on=found and not starts_anew)
    cfg.freeze()
    set_up_logging(cfg)
    check_options(cfg, training=not args.eval_only)
    check_datasets(cfg, training=not args.eval_only)
    check_proposals(cfg)
    if not (args.resume and found):
        check_weights(cfg, training=not args.eval_only)
    if found and starts_anew:
        logger.warning(
            "OUTPUT_DIR %s has a checkpoint of an earlier run, but this one starts anew; --resume "
            "would go on from it.",
            cfg.OUTPUT_DIR,
        )
    elif args.resume and not found:
        logger.warning(
            "--resume: OUTPUT_DIR %s has no checkpoint to go on from; this run %s.",
            cfg.OUTPUT_DIR,
            "is of MODEL.WEIGHTS" if args.eval_only else "starts anew",
        )
    log = os.path.join(cfg.OUTPUT_DIR, "log.txt")
    logger.info("Command line, environment, config and model are in %s.", log)
    logger.debug("Environment:\n%s", collect_env_info())
    logger.debug("Command line: %s", args)
    logger.debug("Config:\n%s", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only
    if on_cpu:
        logger.info("There is no GPU here: MODEL.DEVICE is cpu.")
    if runs_on_cpu(cfg) and comm.get_world_size() > 1:
        # The processes of one machine share its cores.
        torch.set_num_threads(max(1, torch.get_num_threads() // comm.get_local_size()))
    return cfg


def settle_feedback_seed(cfg: CfgNode, *, goes_on: bool) -> None:
    """
    Replace a MODEL.FEEDBACK.SEED of -1 for a run: by that of the last checkpoint in OUTPUT_DIR, if
    its run goes on; else by SEED; else by a number that is drawn. All ranks have to call it.
    """
    seed = cfg.MODEL.FEEDBACK.SEED
    if seed >= 0:
        return
    for path in find_checkpoints(cfg.OUTPUT_DIR) if goes_on and comm.is_main_process() else ():
        with suppress(OSError, ValueError):  # the checkpointer tells of those
            # Before it was saved, it was 0 unless the config said otherwise, as it does again then.
            seed = read_checkpoint(path).get("trainer", {}).get("feedback_seed", 0)
            break
    if seed < 0:
        seed = cfg.SEED if cfg.SEED >= 0 else secrets.randbelow(1 << 31)
    cfg.MODEL.FEEDBACK.SEED = comm.all_gather(seed)[0]  # the main rank's
