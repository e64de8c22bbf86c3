from __future__ import annotations

import json
from pathlib import Path

import pytest

from bittern import tiny_flux
from bittern.errors import UserError
from bittern.evaluation import scenes
from bittern.trajectories import check_prompts, default_prompts, read_prompts


def test_text_and_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a red star\n\n  zwei grüne Dreiecke \r\n# not a comment\n", encoding="utf-8")
    assert read_prompts(text) == ["a red star", "zwei grüne Dreiecke", "# not a comment"]
    lines = tmp_path / "p.jsonl"
    lines.write_text("\n".join(json.dumps({"tag": "colors", "prompt": p}) for p in ("one", "two")) + "\n\n")
    assert read_prompts(str(lines)) == ["one", "two"]


def test_marks_and_separators_of_other_systems(tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffa red star\r\na blue ring\r\n".encode())
    assert read_prompts(text) == ["a red star", "a blue ring"]
    lines = tmp_path / "p.jsonl"
    lines.write_bytes('\ufeff{"prompt": "one\u2028line"}\n'.encode())
    assert read_prompts(lines) == ["one\u2028line"]


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
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": "caf\\ud83d"}', r"p.jsonl:2: prompt 'caf\\ud83d' holds half of a"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_whole_surrogate_pairs_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "caf\\ud83d\\ude00"}')
    assert check_prompts(read_prompts(tmp_path / "p.jsonl")) == ["caf\U0001f600"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is a directory"):
        read_prompts(tmp_path)


def test_bundled_prompts_are_many_and_different() -> None:
    prompts = default_prompts()
    assert len(prompts) == len({prompt.lower() for prompt in prompts}) == 256
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in prompts)
    assert sum(len(prompt.split()) >= 15 for prompt in prompts) > 100
    assert sum(len(prompt.split()) <= 12 for prompt in prompts) > 100


def test_tiny_flux_is_calibrated_with_training_prompts_alone() -> None:
    prompts = default_prompts(tiny_flux.path())
    scenes.refuse_held_out(prompts)
    assert set(prompts) <= {prompt.prompt for prompt in scenes.training_prompts()}
    assert len(set(prompts)) == 256


def test_a_folder_without_prompts_gets_ours(tmp_path: Path) -> None:
    assert default_prompts(tmp_path) == default_prompts("nowhere/at-all") == default_prompts()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ("a star", "one text"),
        (["a", " "], "prompt 2"),
        (["a", 3], "prompt 2 is 3"),
        (["\ud83d"], "prompt 1 .* half of a"),
    ],
)
def test_unusable_prompts_are_refused(prompts: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_prompts(prompts)  # type: ignore[arg-type]
