from __future__ import annotations

import json
import sys

import pytest

from bittern.cli.output import Output, table


def test_json_alone_on_stdout_whatever_libraries_print(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(as_json=True) as out:
        print("a library's chatter")
        out.progress("drawing", 1, 2)
        out.result({"a": 1.5, "b": None}, "a line that JSON leaves out")
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"a": 1.5, "b": None}
    assert "chatter" in shown.err and "drawing: 1/2" in shown.err


def test_stdout_is_given_back_after_an_error() -> None:
    before = sys.stdout
    with pytest.raises(RuntimeError), Output():
        assert sys.stdout is not before
        raise RuntimeError
    assert sys.stdout is before


def test_not_a_number_never_reaches_json() -> None:
    with pytest.raises(ValueError, match="JSON"), Output(as_json=True) as out:
        out.result({"psnr": float("inf")})


def test_plain_progress_is_sparse_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with Output() as out:
        for done in range(1001):
            out.progress("drawing", done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "drawing: 0/1000" and lines[-1] == "drawing: 1000/1000"
    assert len(lines) < 10


def test_tables_are_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    path = "single_transformer_blocks.12.attn.to_q"
    with Output() as out:
        out.result({}, table(("target", "format", "error"), [(path, "int4 [markup]", 0.125)]), "a line [0]")
    shown = capsys.readouterr().out
    assert path in shown and "int4 [markup]" in shown and "0.125" in shown and "a line [0]" in shown
