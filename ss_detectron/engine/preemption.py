"""
Preemption: SIGTERM, and SIGINT (Ctrl-C), ask a run to save and stop at the next step boundary.

A process's handler only notes the signal. The reduction that checks a step's losses also tells the
ranks whether any of them has one, and all save and exit together after that step.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from detectron2.engine import HookBase
from detectron2.utils import comm

from ss_detectron.utils.comm import any_rank

from .workers import prepare_workers

__all__ = [
    "EXIT_CODE",
    "Preempted",
    "PreemptionHook",
    "StopSignals",
    "print_safely",
    "rank_signals",
    "stop_requested",
]

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: a failure that passes, try again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """The run was asked to stop, and can go on from its last checkpoint: exit code 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignals:
    """
    Answer the first SIGTERM or SIGINT that this process gets. A second SIGINT, a second later or
    more, is a KeyboardInterrupt; others ask for the same thing again.

    Args:
        answer: called with the first signal, in its handler.

    Attributes:
        first: the first signal, or None.
    """

    def __init__(self, answer: Callable[[signal.Signals], None]) -> None:
        self.first: signal.Signals | None = None
        self._answer = answer
        self._interrupted = float("inf")

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Handle one of these signals."""
        if number == signal.SIGINT:
            now = time.monotonic()
            # A Ctrl-C can come twice: from the terminal, and from a program that passes it on.
            if now > self._interrupted + 1:
                raise KeyboardInterrupt
            self._interrupted = min(now, self._interrupted)
        if self.first is None:
            self.first = signal.Signals(number)
            self._answer(self.first)

    def install(self) -> None:
        """Make :meth:`receive` the handler. SIGINT stays ignored if it is (``&`` in a script)."""
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGTERM:
                signal.signal(number, self.receive)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """
        Install the handler, and the former ones afterwards. After an exception, SIGTERM is ignored
        instead: it would change the exit code.
        """
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        try:
            yield
        except BaseException:
            handlers[signal.SIGTERM] = signal.SIG_IGN
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def print_safely(text: str) -> None:
    """Write a line to standard error, as a signal handler may: logging must not be re-entered."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


_rank: StopSignals | None = None  # those of this process, if it trains
_training = False


@contextmanager
def rank_signals(*, spawned: bool = False) -> Iterator[None]:
    """
    Let a request end this process: at once before training has begun, when there is nothing to
    save, and later where :class:`PreemptionHook` lets it. Workers of data loaders are kept out.

    Args:
        spawned: whether a parent passes every request on as SIGTERM, and has this process ignore
            SIGINT. Before training, SIGTERM then ends the process by its default action, even while
            it waits for other machines, which no handler could.
    """

    def answer(number: signal.Signals) -> None:
        if comm.is_main_process() and not spawned:
            what = "outside training, the run stops: there is nothing to save"
            if _training:
                what = "the run stops when this step is finished and a checkpoint saved"
            print_safely(f"{number.name}: {what}.")
        if not _training:
            raise Preempted

    global _rank, _training
    prepare_workers()
    _rank, _training = StopSignals(answer), False
    try:
        with _rank.installed():
            if spawned:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            yield
    finally:
        _rank = None


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _rank is not None and _rank.first is not None


class PreemptionHook(HookBase):
    """
    Save a checkpoint and raise :class:`Preempted` on all ranks after the first step in which they
    agreed that one of them was asked to stop; not after the last step, when training is over. The
    last hook of a trainer with ``save_checkpoint()`` and ``stop_agreed``: whether
    :func:`stop_requested` was true on any rank in this step.
    """

    def before_train(self) -> None:
        # From here on, a rank that stopped by itself would leave the others waiting.
        global _training
        _training = True
        if _rank is None:
            return
        _rank.install()
        try:
            stop = any_rank(stop_requested())
        except RuntimeError:
            if not stop_requested():
                raise
            stop = True  # and others have stopped already
        if stop:
            logger.warning("Asked to stop before the first step: nothing is saved.")
            raise Preempted

    def after_step(self) -> None:
        trainer = self.trainer
        if not trainer.stop_agreed or trainer.iter + 1 >= trainer.max_iter:
            return
        logger.warning(
            "Asked to stop: iteration %d is finished, saving a checkpoint.", trainer.iter
        )
        trainer.save_checkpoint()
        # The first process that ends has its launcher end the rest: none may still be saving.
        comm.synchronize()
        logger.warning(
            "Saved %s. The run stops with exit code %d; with --resume it goes on from there.",
            trainer.checkpointer.get_checkpoint_file(),
            EXIT_CODE,
        )
        raise Preempted
