"""Errors of usage: one line, where a fault of the program has a traceback."""

import argparse
import dis
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["add_traceback_option", "is_usage_error", "one_line_errors"]

logger = logging.getLogger(__name__)

# What torch makes of an error in a worker of a loader: its traceback, and at the end what it says.
_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker .*\n[\w.]+: (.*)", re.DOTALL)
_CHECKS = (AssertionError, ImportError, KeyError, NotImplementedError, ValueError)


def is_usage_error(error: BaseException) -> bool:
    """
    Return whether an error is of what was asked for: of a file, or raised by a check, that is, by a
    statement ``raise`` or ``assert`` with a text. ``int("x")`` or a dict's missing key are faults
    of the program.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, _CHECKS) or " " not in str(error):
        return False
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return bool(trace) and dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == (
        "RAISE_VARARGS"
    )


def add_traceback_option(parser: argparse.ArgumentParser) -> None:
    """Add --traceback, for :func:`one_line_errors`."""
    text = "show where an error of usage comes from, which is one line otherwise"
    parser.add_argument("--traceback", action="store_true", help=text)


@contextmanager
def one_line_errors(traceback: bool, kind: type[Exception] = Exception) -> Iterator[None]:
    """
    End the program with one line on an error of usage. Its traceback is logged as a detail.

    Args:
        traceback: leaves all errors as they are.
        kind: what is an error of usage here, if :func:`is_usage_error` says so too.

    Raises:
        SystemExit: with that line.
    """
    try:
        yield
    except kind as error:
        if traceback or not is_usage_error(error):
            raise
        logger.debug("An error of usage", exc_info=True)
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if from_worker := _FROM_WORKER.match(text):
            text = from_worker[1]
        line = " ".join(text.split())
        raise SystemExit(f"{Path(sys.argv[0]).name}: error: {line}") from error
