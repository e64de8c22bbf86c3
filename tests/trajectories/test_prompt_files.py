from __future__ import annotations

import json
from pathlib import Path

import pytest

from bittern.errors import UserError
from bittern.trajectories import read_prompts


def test_text_and_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a red star\n\n  zwei grüne Dreiecke \r\n# not a comment\n", encoding="utf-8")
    assert read_prompts(text) == ["a red star", "zwei grüne Dreiecke", "# not a comment"]
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(json.dumps({"tag": "colors", "prompt": p}) for p in ("one", "two")) + "\n\n")
    assert read_prompts(str(lines)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b" \n\n", "is empty"),
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
        ("p.jsonl", b"a red star", "p.jsonl:1 is not JSON"),
        ("p.jsonl", b'{"prompt": "x"}\n{"text": "y"}', "p.jsonl:2 has no prompt"),
        ("p.jsonl", b'["a red star"]', "has no prompt"),
        ("p.jsonl", b'{"prompt": "  "}', "has no prompt"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_prompts(tmp_path)
