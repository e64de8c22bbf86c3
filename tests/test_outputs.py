"""Files that are written as a whole, and what killed processes leave of them."""

from __future__ import annotations

import fcntl
from pathlib import Path

from bittern.outputs import write_text


def test_what_killed_processes_left_of_a_file_is_swept(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    (tmp_path / ".report.html.12345.tmp").write_text("half a rep")
    others = [".report.html.tmp", ".other.html.12345.tmp", ".report.html.12345.tmp.bak", "xreport.html.1.tmp"]
    for name in others:
        (tmp_path / name).write_text("another's")
    with (tmp_path / ".report.html.777.tmp").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        write_text("whole", file, "report")
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"report.html", ".report.html.777.tmp", *others} and file.read_text() == "whole"
    write_text("again", file, "report")
    assert {entry.name for entry in tmp_path.iterdir()} == {"report.html", *others} and file.read_text() == "again"
