"""
Preemption: SIGTERM, and SIGINT (Ctrl-C), ask a run to save and stop at the next step boundary.

A process's handler only notes the signal. In each step, the reduction that checks the losses also
tells the ranks whether any of them has one, and all save and exit together after that step. A rank
that is missing fails the reduction, so nothing is saved by what a dead rank leaves behind.
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

from .workers import prepare_workers

__all__ = [
    "EXIT_CODE",
    "Preempted",
    "PreemptionHook",
    "StopSignals",
    "listen",
    "say",
    "stop_requested",
    "without_interrupts",
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
    The SIGTERM and SIGINT that this process gets. They ask for one and the same thing, and only the
    first is answered; but a second SIGINT, a second later or more, is a KeyboardInterrupt.

    Attributes:
        first: the first of them, or None.
    """

    def __init__(self, answer: Callable[[signal.Signals], None]) -> None:
        """
        Args:
            answer: called with the first signal, in its handler.
        """
        self.first: signal.Signals | None = None
        self._answer = answer
        self._interrupted = float("inf")

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of these signals."""
        now = time.monotonic()
        # A Ctrl-C can come twice: from the terminal, and from a program that passes it on.
        if number == signal.SIGINT and now > self._interrupted + 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            self._interrupted = min(now, self._interrupted)
        if self.first is None:
            self.first = signal.Signals(number)
            self._answer(self.first)

    def install(self) -> None:
        """Makes :meth:`receive` the handler. SIGINT stays ignored if it is (``&`` in a script)."""
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGTERM:
                signal.signal(number, self.receive)


class _Rank:
    """What SIGTERM and SIGINT do to a process that trains, see :func:`listen`."""

    def __init__(self, parent: int | None, spokesman: bool) -> None:
        self.stop = StopSignals(self._answer)
        self.training = False
        self._parent = parent
        self._spokesman = spokesman

    def listen(self) -> None:
        if self._parent is None:
            self.stop.install()
            return
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if os.getppid() != self._parent:
            os._exit(1)

    def begin_training(self) -> None:
        """From here on, a rank that stopped by itself would leave the others waiting."""
        self.training = True
        if self._parent is not None:
            signal.signal(signal.SIGTERM, self.stop.receive)
            signal.signal(signal.SIGINT, self._ignore_unless_orphaned)

    def _answer(self, number: signal.Signals) -> None:
        if not self.training:
            if self._spokesman:
                say(f"{number.name} outside training: there is nothing to save, the run stops.")
            raise Preempted
        if self._spokesman and self._parent is None:
            say(
                f"{number.name}: the run stops when this step is finished and a checkpoint saved; "
                "after the last step, it finishes."
            )

    def _ignore_unless_orphaned(self, number: int, frame: FrameType | None) -> None:
        if os.getppid() != self._parent:
            # Not an exception: what it would run on its way out may wait for other ranks.
            os._exit(1)


_rank: _Rank | None = None  # there is one at most in a process, with the handlers


def listen(*, parent: int | None = None, spokesman: bool = True) -> None:
    """
    From now on, a request ends this process: at once before training has begun, when there is
    nothing to save, and later where :class:`PreemptionHook` lets it. Worker processes of data
    loaders are kept out of it.

    Args:
        parent: the process id of the launcher that has started this process, if it passes on every
            request as SIGTERM. Before training, any of these signals then ends the process even
            while it waits for other machines. In training, SIGINT only means that the launcher is
            dead, or that a terminal's Ctrl-C went to all processes.
        spokesman: whether this process tells the user, on standard error.
    """
    global _rank
    if _rank is not None:
        raise RuntimeError("listen() was called twice in one process")
    _rank = _Rank(parent, spokesman)
    _rank.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    prepare_workers()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """
    Processes started here are deaf to SIGINT until they :func:`listen`: one that still imports what
    it needs would answer a terminal's Ctrl-C with a traceback. SIGTERM ends it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def say(text: str) -> None:
    """Writes a line to standard error as a signal handler may: logging is not re-entrant."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _rank is not None and _rank.stop.first is not None


class PreemptionHook(HookBase):
    """
    Saves a checkpoint and raises :class:`Preempted` on all ranks after the first step in which they
    agreed that one of them was asked to stop; not after the last step, when training is over. It is
    the last hook, on every rank, of a trainer with ``save_checkpoint()`` and ``stop_agreed``, which
    every step sets to whether :func:`stop_requested` is true on any rank.
    """

    def before_train(self) -> None:
        if _rank is not None:
            _rank.begin_training()

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
