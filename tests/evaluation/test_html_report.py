from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic import comparison, with_runs

from bittern.cli import main
from bittern.errors import UserError
from bittern.evaluation import report, scenes
from bittern.evaluation.report import format_bytes, markdown, pictures, plot, split_path, unique_names

URI = re.compile(r"url\(data:image/(png|webp);base64,([A-Za-z0-9+/=]+)\)")
VOID = {"meta", "input", "link", "br", "img", "path", "line", "circle"}


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
    found = with_runs(comparison(scenes.held_out(12)))
    return report.render(found, "bittern compare tiny-flux out/model-0 --limit 12"), found


def test_page_is_whole_and_refers_to_nothing(page: tuple[str, report.Comparison]) -> None:
    html, _ = page
    outline = Outline()
    outline.feed(html)
    assert outline.open == [] and len(set(outline.references)) > 4
    assert all(re.search(f'<section id="{reference[1:]}"', html) for reference in outline.references)
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
            assert picture.text["seed"] and picture.text["model"]
            assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0).numpy())


def test_numbers_on_the_page_are_those_that_were_measured(page: tuple[str, report.Comparison]) -> None:
    html, found = page
    outline = Outline()
    outline.feed(html)
    text = " ".join(" ".join(outline.text).split())
    for entry in found.others:
        assert f"{entry.fidelity.mean_psnr.mean:.1f} ± {entry.fidelity.mean_psnr.stderr:.1f}" in text
        assert f"{entry.score.overall.mean:.2f} ± {entry.score.overall.stderr:.2f}" in text
        assert entry.geneval is not None and str(entry.geneval.judged.score.overall)[:3] in text
        for gap in (entry.difference, entry.geneval_difference):
            told = f"{gap.mean:+.3f} {gap.low:+.3f} to {gap.high:+.3f} p ".replace("-", "\N{MINUS SIGN}")
            assert told + ("< 0.001" if gap.p_value < 0.001 else f"= {gap.p_value:.2g}") in text
    assert "model-0 cannot be told apart" in text and "model-1 is lower" in text
    assert "GenEval score by task" in text
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


def test_one_picture_claims_no_certainty() -> None:
    judged = comparison(scenes.held_out(6)[:1], models=2)
    entries = [report.Entry(e.drawing, None, e.fidelity, None) for e in judged.entries]
    found = report.Comparison(entries[0], entries[1:], None)
    html, card = report.render(found, "bittern compare"), markdown.render(found, "bittern compare")
    mean = found.others[0].fidelity.mean_psnr.mean
    assert f"<b>{mean:.1f}</b> <small>error not known</small>" in html and "± 0.0<" not in html
    assert f"| {mean:.2f} (error not known) |" in card and "± 0.00 |" not in card
    assert all(each["fidelity"]["psnr_stderr"] is None for each in found.to_dict()["models"][1:])


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


def test_pictures_are_stored_as_well_as_the_page_may_weigh(page: tuple[str, report.Comparison]) -> None:
    _, found = page
    drawings = [entry.drawing for entry in found.entries]
    whole = pictures.show(drawings, 12)
    assert whole.level == pictures.LEVELS[0] and "to the bit" in whole.note
    decoded = [len(base64.b64decode(URI.fullmatch(uri)[2])) for row in whole.uris for uri in row]
    for budget in (sum(decoded), sum(decoded) - 1, sum(decoded) // 4, sum(decoded) // 12):
        shown = pictures.show(drawings, 12, budget=budget)
        sizes = [len(base64.b64decode(URI.fullmatch(uri)[2])) for row in shown.uris for uri in row]
        assert len(sizes) == 36 and sum(sizes) <= budget
        assert (shown.level == pictures.LEVELS[0]) == (budget == sum(decoded))
        better = pictures.LEVELS[: pictures.LEVELS.index(shown.level)]
        # The level before it would not have fitted.
        assert not better or sum(len(pictures._encode(d, i, better[-1])) for i in range(12) for d in drawings) > budget
    assert "WebP of quality" in shown.note and "numbers were measured on the pictures" in shown.note
    large = drawings[0].images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    small = pictures._encode(replace(drawings[0], images=large), 0, pictures.Level(80, 256))
    with Image.open(io.BytesIO(small)) as picture:
        assert picture.size == (256, 256) and picture.format == "WEBP"


def test_many_prompts_are_shown_in_part_and_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_CARDS", 4)
    html = report.render(comparison(scenes.held_out(6), models=1), "bittern compare")
    assert html.count("<article") == 4 and "The first 4 of 6 prompts are shown" in html


def test_points_lie_where_their_numbers_say() -> None:
    values = [plot.Value("a", 0, 20e6, 40.0, 1.0), plot.Value("b", 1, 5e6, 10.0, 0.0), plot.Value("c", 2, 5e6, 10.1, 0)]
    chart = plot.chart("PSNR", values)
    assert chart.unit == "MB" and chart.x_ticks[0] == (plot.LEFT, "0") and float(chart.x_ticks[-1][1]) >= 20
    points = {point.value.name: point for point in chart.points}
    for name, value in zip("abc", values, strict=True):
        (x0, _), (x1, text) = chart.x_ticks[0], chart.x_ticks[-1]
        assert points[name].x == pytest.approx(x0 + (x1 - x0) * value.size / (float(text) * 1e6))
        (y0, low), (y1, high) = chart.y_ticks[0], chart.y_ticks[-1]
        share = (value.quality - float(low)) / (float(high) - float(low))
        assert points[name].y == pytest.approx(y0 + (y1 - y0) * share)
        assert plot.TOP <= points[name].y <= plot.HEIGHT - plot.BOTTOM
        assert points[name].low >= points[name].y >= points[name].high
    # Labels of points on one another do not lie on one another.
    assert abs(points["b"].label_y - points["c"].label_y) >= 15
    assert points["a"].left and not points["b"].left


def test_axes_end_where_quality_ends() -> None:
    chart = plot.chart(
        "score", [plot.Value("a", 0, 9e9, 1.0, 0.1), plot.Value("b", 1, 1e9, 0.0, 0.1)], floor=0, ceiling=1
    )
    assert [text for _, text in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"] and chart.unit == "GB"
    alone = plot.chart("score", [plot.Value("a", 0, 500, 3.0, 0.0)])
    assert alone.unit == "B" and alone.y_ticks[0][0] > alone.points[0].y > alone.y_ticks[-1][0]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_reach_around(low: float, length: float) -> None:
    found = plot.ticks(low, low + length)
    steps = [b - a for a, b in pairwise(found)]
    assert 2 <= len(found) <= 9 and max(steps) - min(steps) <= 1e-6 * max(1, abs(low), max(steps))
    assert found[0] <= low + 1e-6 * steps[0] + 1e-9 and found[-1] >= low + length - 1e-6 * steps[0] - 1e-9


def test_markdown_has_the_numbers_and_the_command(page: tuple[str, report.Comparison]) -> None:
    _, found = page
    text = markdown.render(found, "bittern compare tiny-flux out/model-0 --limit 12")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert text.startswith(markdown.MARK) and len(rows) == (2 + 3) + 2 * (2 + 6)
    assert {len(row) for row in rows[:5]} == {8} and {len(row) for row in rows[5:]} == {4}
    for row, entry in zip(rows[2:5], found.entries, strict=True):
        assert row[0].removeprefix("| ") == report.short_name(entry.drawing.model)
        assert (row[5], row[6]) == (str(entry.score.overall), str(entry.geneval.judged.score.overall))
        assert not entry.fidelity or row[3].startswith(f"{entry.fidelity.mean_psnr.mean:.2f} ± ")
    assert all(f"scenes score {entry.difference.claim}." in text for entry in found.others)
    assert all(f"GenEval score {entry.geneval_difference.claim}." in text for entry in found.others)
    assert "```bash\nbittern compare tiny-flux out/model-0 --limit 12\n```" in text and "seeds 7 to 18" in text
    assert markdown._escape("a|b") == "a\\|b"


def test_only_reports_are_replaced_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bittern.evaluation.compare.compare", lambda *_, **__: comparison(scenes.held_out(6), models=1))
    page, card = tmp_path / "r.html", tmp_path / "README.md"
    words = ["compare", "a", "b", "--report", str(page), "--markdown", str(card)]
    assert main.run([*words[:-1], str(page)]) == 2
    assert f"--markdown {page} is the report's own file" in capsys.readouterr().err
    for _ in range(2):
        assert main.run(words) == 0
        assert f"report: {page}" in capsys.readouterr().out
    card.write_text("# My model")
    assert main.run(words) == 2
    assert f"--markdown {card} is another file" in capsys.readouterr().err and card.read_text() == "# My model"
    page.write_text("<p>mine")
    assert main.run(words) == 2
    assert f"--report {page} is another file" in capsys.readouterr().err
    assert main.run([*words, "--force"]) == 0
    assert card.read_text().startswith(markdown.MARK) and report.MARK in page.read_text()


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
    assert unique_names(["tiny-flux", "tiny-flux"]) == ["tiny-flux", "tiny-flux (2)"]
    assert unique_names(["x/a", "x/a", "b", "x/a"]) == ["a", "a (2)", "b", "a (3)"]
    assert unique_names(["x/a", "y/a", "y/a"]) == ["x/a", "y/a", "y/a (2)"]
    assert unique_names(["a", "a", "a (2)"]) == ["a", "a (2)", "a (2) (2)"]


def test_the_heading_says_what_is_compared() -> None:
    found = comparison(scenes.held_out(6), models=2)
    assert "<h1>tiny-flux, in fewer bits</h1>" in report.render(found, "bittern compare")
    same = replace(found.others[0], drawing=found.reference.drawing)
    html = report.render(replace(found, others=[same]), "bittern compare")
    assert "<h1>tiny-flux beside tiny-flux (2)</h1>" in html and "fewer bits" not in html
    assert "<b>tiny-flux</b>" in html and "<b>tiny-flux (2)</b>" in html
    assert "| tiny-flux (2) |" in markdown.render(replace(found, others=[same]), "bittern compare")
    assert "<h1>tiny-flux beside 2 others</h1>" in report.render(replace(found, others=[same] * 2), "bittern compare")
