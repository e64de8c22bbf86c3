from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import comparison

from bittern.errors import UserError
from bittern.evaluation import report, scenes
from bittern.evaluation.report import format_bytes, split_path, unique_names

URI = re.compile(r"url\(data:image/(png|webp);base64,([A-Za-z0-9+/=]+)\)")
VOID = {"meta", "input", "link", "br", "img", "path"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> tuple[str, report.Comparison]:
    found = comparison(scenes.held_out(12))
    return report.render(found, "bittern compare tiny-flux out/model-0 --limit 12"), found


def test_page_is_whole_and_refers_to_nothing(page: tuple[str, report.Comparison]) -> None:
    html, _ = page
    outline = Outline()
    outline.feed(html)
    assert outline.open == [] and outline.references == []
    without_pictures = URI.sub("", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_pictures)
    assert "default-src 'none'" in html


def test_every_picture_is_inside_once_and_exact(page: tuple[str, report.Comparison]) -> None:
    html, found = page
    embedded = URI.findall(html)
    drawn = [entry.drawing.images[i] for i in range(12) for entry in found.entries]
    assert len(embedded) == len(drawn)
    for (kind, data), image in zip(embedded, drawn, strict=True):
        assert kind == "png"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_numbers_on_the_page_are_those_that_were_measured(page: tuple[str, report.Comparison]) -> None:
    html, found = page
    outline = Outline()
    outline.feed(html)
    text = " ".join(" ".join(outline.text).split())
    for entry in found.others:
        assert f"{entry.fidelity.mean_psnr.mean:.1f} ± {entry.fidelity.mean_psnr.stderr:.1f}" in text
        assert f"{entry.score.overall.mean:.2f} ± {entry.score.overall.stderr:.2f}" in text
        assert entry.difference.claim in text
    assert "cannot be told apart" in text and "is lower than the reference's" in text
    assert "bittern compare tiny-flux out/model-0 --limit 12" in text
    embedded = re.search(r'<script type="application/json" id="result">(.*?)</script>', html, re.S)
    assert embedded and json.loads(embedded[1]) == json.loads(json.dumps(found.to_dict()))


def test_verdicts_stand_beside_their_pictures(page: tuple[str, report.Comparison]) -> None:
    html, found = page
    cards = html.split("<article")[1:]
    blank = found.others[-1]
    right = {task: iter(v) for task, v in blank.score.outcomes.items()}
    for card, prompt in zip(cards, found.world, strict=True):
        last = card.rpartition('class="verdict')[2]
        assert last.startswith('">✓' if next(right[prompt.tag]) else ' wrong">✗')
        assert prompt.prompt in card


def test_heat_map_holds_every_layer_where_it_belongs(page: tuple[str, report.Comparison]) -> None:
    html, found = page
    for row in found.others[0].drawing.inspection.rows:
        assert html.count(f'title="{row.path}: {row.error:.4f}"') == len(found.others)
    # Block 0 lacks the third kind of layer: an empty cell, for each model.
    assert html.count('<i class="none">') == len(found.others)
    assert "--h:0%" in html and "--h:100%" in html


def test_prompts_are_text_and_never_markup() -> None:
    found = comparison(scenes.held_out(6), models=1)
    evil = '"><script>alert(1)</script>{{ 7 * 7 }}'
    found.reference.drawing.prompts[0] = evil
    html = report.render(found, evil)
    assert "<script>alert" not in html and "{{ 7 * 7 }}" in html


def test_other_prompts_are_not_judged() -> None:
    judged = comparison(scenes.held_out(6), models=1)
    entries = [report.Entry(e.drawing, None, e.fidelity, None) for e in (judged.reference, judged.others[0])]
    html = report.render(report.Comparison(entries[0], entries[1:], None), "bittern compare")
    assert "Scenes score" not in html and "as asked" not in html and "PSNR" in html


def test_large_pictures_are_compressed() -> None:
    image = torch.randint(0, 256, (3, 600, 8), dtype=torch.uint8)
    assert report._data_uri(image).startswith("url(data:image/webp;")


def test_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    report.write("<p>å</p>", tmp_path / "new" / "r.html")
    assert (tmp_path / "new" / "r.html").read_text(encoding="utf-8") == "<p>å</p>"
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        report.write("x", tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "taken"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (22_156_000, "22.16 MB"), (23.8e12, "23800.00 GB")],
)
def test_bytes_for_humans(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_paths_and_names() -> None:
    assert split_path("single_transformer_blocks.12.attn.to_out.0") == (
        "single_transformer_blocks",
        12,
        "attn.to_out.0",
    )
    assert split_path("proj_out") == ("", 0, "proj_out")
    assert unique_names(["tiny-flux", "out/a", "hub/b/"]) == ["tiny-flux", "a", "b"]
    assert unique_names(["x/a", "y/a"]) == ["x/a", "y/a"]
