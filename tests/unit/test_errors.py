from __future__ import annotations

import io
import sys

import pytest

from longrun.errors import (
    BadConfig,
    BadFile,
    BadModel,
    ExitCode,
    Locked,
    LongrunError,
    ModelRemoved,
    NotRunning,
    exit_code,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [(BadConfig, 78), (Locked, 75), (NotRunning, 3), (BadFile, 1), (BadModel, 1), (ModelRemoved, 1)],
)
def test_each_error_has_the_exit_code_that_is_promised(error: type[LongrunError], code: int) -> None:
    assert error("x").exit_code == code
    assert isinstance(error("x").exit_code, ExitCode)


def test_an_error_says_what_to_type_next() -> None:
    assert str(LongrunError("cannot do x", hint="try y")) == "cannot do x; try y"
    assert str(LongrunError("cannot do x")) == "cannot do x"


def test_a_bad_file_names_line_byte_and_field() -> None:
    error = BadFile("must be a string", line=3, byte=40, field="messages[1].content", hint="quote it")
    assert str(error) == "line 3, byte 40: messages[1].content: must be a string. Fix: quote it"
    assert str(BadFile("it is empty")) == "it is empty"


def test_a_reason_holds_only_what_is_known() -> None:
    assert BadFile("empty", kind="empty").reason() == {"kind": "empty", "why": "empty"}
    assert BadFile("x", line=1, byte=0, hint="fix").reason() == {
        "kind": "content",
        "why": "x",
        "line": 1,
        "byte": 0,
        "fix": "fix",
    }


def test_a_name_is_told_on_a_terminal_that_has_no_letters_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)

    def work() -> int:
        sys.stdout.write("na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve.jsonl\n")
        return 0

    assert exit_code("daemon.py", work) == 0
    assert terminal.buffer.getvalue() == b"na\\xefve.jsonl\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Locked("held by pid 7", hint="stop it"), 75, "daemon.py: held by pid 7; stop it\n"),
        (ModuleNotFoundError("No module named 'torch'"), 1, "daemon.py: No module named 'torch'; use .venv/bin/python"),
        (PermissionError(13, "Permission denied", "x"), 1, "daemon.py: [Errno 13] Permission denied: 'x'\n"),
        (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_program_ends_in_one_sentence_and_a_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def work() -> int:
        raise error

    assert exit_code("daemon.py", work) == code
    assert capsys.readouterr().err.startswith(said)
