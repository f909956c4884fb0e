"""What ends a program by one line, and what by a traceback."""

from pathlib import Path

import pytest

from ss_detectron.utils.usage import one_line_errors

IN_A_WORKER = """Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "a.py", line 3, in read
OSError: a.png is gone
"""


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("fails", "line"),
    [
        (lambda: _raise(ValueError("SEED is\n  x")), "tool.py: error: SEED is x"),
        (lambda: _raise(KeyError("no 'x' here")), "tool.py: error: no 'x' here"),
        (
            lambda: _raise(AssertionError("steps must be positive")),
            "tool.py: error: steps must be positive",
        ),
        (
            lambda: Path("no.txt").read_text(),
            "tool.py: error: [Errno 2] No such file or directory: 'no.txt'",
        ),
        (lambda: _raise(OSError(IN_A_WORKER)), "tool.py: error: a.png is gone"),
        # Faults of a program.
        (lambda: int("a b"), None),
        (lambda: {}["a b"], None),
        (lambda: _raise(KeyError("x")), None),
        (lambda: _raise(RuntimeError("a b")), None),
        (lambda: [].index(3), None),
    ],
)
def test_checks_and_files_are_one_line_and_faults_have_a_traceback(fails, line, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tools/tool.py"])
    with pytest.raises(SystemExit if line else Exception) as error, one_line_errors(False):
        fails()
    assert not line or error.value.code == line
    with pytest.raises(Exception) as error, one_line_errors(True):
        fails()
    assert not isinstance(error.value, SystemExit)
