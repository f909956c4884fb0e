#!/usr/bin/env python
"""
Trains one config by several feedback rules and seeds, and compares them: comparison.md,
comparison.json and figures.

    tools/compare_rules.py --config-file quick/shapes_retinanet_ss.yaml --rules bp ss fa kp
    tools/compare_rules.py --config-file quick/shapes_resnet18_ss.yaml --rules bp ss fa kp:1 \\
        --seeds 3 --output output/shapes SOLVER.MAX_ITER 600
    tools/compare_rules.py --config-file imagenet_resnet18_ss.yaml --rules bp ss fa --jobs 8

Each run has a folder of its own. What is finished is not run again, and what was interrupted goes
on, so the same command can be given as often as needed. Ctrl-C or SIGTERM lets all runs save, for
five minutes at most; the exit code is 75 then.

A rule's config is the one beside the config file that is named after it (..._ss.yaml and
..._fa.yaml). A rule that has none changes MODEL.FEEDBACK.RULE in that of its nearest relative: frsf
and brsf in that of ss, fasi and kp in that of fa; and if there is none, in the config file itself.
"""

import argparse
import logging
import shlex
import signal
import sys
from pathlib import Path

import torch

from ss_detectron.engine.preemption import Preempted, StopSignals, print_safely
from ss_detectron.experiments.compare import compare
from ss_detectron.experiments.plan import describe_plan, plan_runs
from ss_detectron.utils.usage import add_traceback_option, one_line_errors


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ``rules`` becomes name -> seeds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="CONFIG", help="path or name")
    rules = "bp, ss, frsf, brsf, fa, fasi, kp; with :SEEDS for other seeds (default: bp ss fa)"
    add("--rules", nargs="+", default=["bp", "ss", "fa"], metavar="RULE", help=rules)
    seeds = "how many: 3 is seeds 1, 2 and 3; or which: 4,5 or 7, (default: 1)"
    add("--seeds", default="1", help=seeds)
    add("--output", type=Path, metavar="DIR", help="default: output/compare_<name of the config>")
    add("--jobs", type=int, help="runs at a time (default: as the GPUs suffice; without, one)")
    add("--num-gpus-per-run", type=int, default=1, metavar="N", help="processes, without GPUs")
    period = "iterations between measurements of alignment, 0 for none (default: 10 to 20 in all)"
    add("--alignment-period", type=int, metavar="N", help=period)
    add(
        "--metric",
        metavar="KEY",
        help="such as AP50 (default: box AP or top-1 error)",
    )
    add("--dry-run", action="store_true", help="only say what would be done")
    add_traceback_option(parser)
    add("opts", nargs=argparse.REMAINDER, help="KEY VALUE ... for all runs")
    args = parser.parse_args(words)
    # The last rule can be followed by the first KEY.
    keys = next((i for i, word in enumerate(args.rules) if "." in word), len(args.rules))
    args.rules, args.opts = args.rules[:keys], args.rules[keys:] + args.opts
    if args.num_gpus_per_run < 1 or (args.jobs is not None and args.jobs < 1):
        parser.error("--jobs and --num-gpus-per-run are 1 at least")
    if 0 < torch.cuda.device_count() < args.num_gpus_per_run:
        parser.error(f"--num-gpus-per-run: there are {torch.cuda.device_count()} here")
    if args.jobs is None:
        args.jobs = max(1, torch.cuda.device_count() // args.num_gpus_per_run)
    if args.alignment_period is not None:
        args.opts += ["TEST.ALIGNMENT_PERIOD", str(args.alignment_period)]
    if args.output is None:
        args.output = Path("output", f"compare_{Path(args.config_file).stem}")
    rules: dict[str, list[int]] = {}
    try:
        for rule, _, seeds in (word.partition(":") for word in args.rules):
            rules[rule] = [*rules.get(rule, []), *parse_seeds(seeds or args.seeds)]
    except ValueError:
        parser.error("seeds are a number of seeds, such as 3, or a list, such as 4,5 or 7,")
    args.rules = rules
    return args


def parse_seeds(text: str) -> list[int]:
    """Reads "3" as 1, 2, 3; "4,5" and "7," as what they say."""
    numbers = [int(word) for word in text.split(",") if word]
    if min(numbers, default=0) < 1:
        raise ValueError(text)
    return list(dict.fromkeys(numbers)) if "," in text else list(range(1, numbers[0] + 1))


def main(args: argparse.Namespace) -> int:
    """Plans, runs, reports; the exit code."""
    with one_line_errors(args.traceback):
        runs = plan_runs(args.config_file, args.rules, args.output, args.opts)
    if args.dry_run:
        print(describe_plan(runs))
        return 0
    table, complete = compare(
        runs,
        args.output,
        Path(__file__).with_name("train_net.py"),
        jobs=args.jobs,
        gpus_per_run=args.num_gpus_per_run,
        metric=args.metric,
        command=shlex.join(sys.argv),
    )
    if table:
        print(f"\n{table}\n\nEverything lies in {args.output}: comparison.md, figures, runs.")
    return 0 if complete and table else 1


def stop(number: signal.Signals) -> None:
    """Ends this process by an exception, so that its runs end first."""
    print_safely(f"{number.name}: the same command goes on")
    raise Preempted


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("ss_detectron").setLevel(logging.INFO)
    signals = StopSignals(stop)
    signals.install()
    signal.signal(signal.SIGHUP, signals.receive)
    sys.exit(main(parse_arguments()))
