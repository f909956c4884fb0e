"""Forks of a process that has threads."""

import hashlib
import threading
import time

import pytest

from ss_detectron.engine import workers


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 60)


def test_a_fork_waits_for_a_thread_that_runs(patience):
    done = []

    def compute() -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)  # without Python's lock
        done.append(True)

    thread = threading.Thread(target=compute)
    thread.start()
    workers._await_threads()
    assert done
    thread.join()


def test_a_fork_does_not_wait_for_a_thread_that_sleeps(patience):
    end, start = threading.Event(), time.monotonic()
    thread = threading.Thread(target=end.wait)
    thread.start()
    workers._await_threads()
    end.set()
    thread.join()
    assert time.monotonic() - start < 30


def test_a_fork_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    monkeypatch.setattr(workers, "_runs", lambda thread: True)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    workers._await_threads()
    end.set()
    thread.join()
