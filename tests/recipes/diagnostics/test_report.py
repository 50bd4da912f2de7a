"""The report page: whole, self-contained, safe with any name, and complete for what a workspace holds."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2")

from synthkit.artifacts import FunctionStage, Key, run_stage, write_json
from synthkit.data.contact_sheet import contact_sheet
from synthkit.data.images import ImageSet
from synthkit.errors import WorkspaceError
from synthkit.recipes.diagnostics.report import Line, collect, line_chart, smoothed, write_report
from synthkit.recipes.settings import StyleSettings

CLASSES = ("a", "<b>&")
SVG = "{http://www.w3.org/2000/svg}"


def images(root: Path, each: int, seed: int, names: tuple[str, ...] = CLASSES) -> None:
    random = np.random.default_rng(seed)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(each):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:05d}.png")


def stage(out: Path, name: str, write: Callable[[Path], None], **metrics: Any) -> None:
    def produce(work: Path) -> dict[str, Any]:
        write(work)
        return metrics

    run_stage(FunctionStage(name, out, Key({}, resolved={"seed": 7, "note": "</pre><script>"}), produce))


def style(work: Path) -> None:
    losses = {"<s>": {"training": [0.5, 0.4, 0.3], "held_out": {"0": 0.6, "2": 0.45}}}
    write_json(work / "losses.json", losses | {"<s-2>": {"training": [0.2, 0.1, 0.15], "held_out": {}}})
    write_json(work / "clusters.json", {"<s>": ["a/0.png", "a/1.png"], "<s-2>": ["a/2.png"]})
    grey = np.full((16, 16, 3), 100, np.uint8)
    contact_sheet([("<s>", [grey]), ("<s-2>", [grey])], work / "clusters.png", 16)
    for step in (0, 2):
        (work / "previews" / "s").mkdir(parents=True, exist_ok=True)
        contact_sheet([(f"{step:05d}", [grey])], work / "previews" / "s" / f"{step:05d}.png", 16)


def synthetic(work: Path) -> None:
    images(work, 14, 1)
    images(work / ".rejected" / "blank", 0, 2, ())
    (work / ".rejected" / "blank").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(work / ".rejected" / "blank" / "a-3-0.png")


ONE = {
    "coverage": 0.5, "expected_coverage": 1.0, "density": None, "diversity": 0.9, "top1": 0.7,
    "most_confused_with": "<b>&",
}  # fmt: skip
GAP = {
    "n_synthetic": 28,
    "n_real": 6,
    "features": {"source": "resnet10t of <here>", "dimensions": 512},
    "appearance": {
        "offset": {"red mean": -0.5},
        "spread": {"red mean": 0.25},
        "low_frequencies_db": 1.0,
        "high_frequencies_db": -4.5,
    },
    "content": {
        "frechet": 3.25,
        "frechet_equal_counts": None,
        "frechet_real_halves": None,
        "frechet_count": 1,
    },
    "per_class": {"a": ONE, "<b>&": ONE},
    "actions": {
        "synthetic_only": [{"gap": "content", "action": "lower --guidance", "reason": "0.9 < 1"}],
        "added_to_real": [],
    },
}
COMPARE = {
    "n_test": 364,
    "rows": [
        {"method": "plain", "shots": 1, "top1_mean": 0.5, "top1_std": 0.02, "seeds": 3},
        {"method": "style", "shots": 1, "top1_mean": 0.75, "top1_std": 0.0, "seeds": 1},
        {"method": "style", "shots": 4, "top1_mean": 0.875, "top1_std": 0.01, "seeds": 3},
    ],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "site <7>"
    root.mkdir()
    stage(root / "style", "learn-style", style)
    filters = {
        "filters": {"thresholds": {"blank": {"contrast_below": 2.0}}},
        "dropped": 1,
        "per_class": {"a": {"kept": 14, "resampled": 1, "dropped": {"blank": 1}}},
    }
    stage(root / "synthetic", "generate", synthetic, rejected=3, **filters)

    def student(work: Path) -> None:
        write_json(work / "curves.json", {"loss": [2.0, 1.0], "lr": [], "validation": [[1, 0.5], [2, 0.9]]})

    stage(root / "student", "train", student)
    paths = [{"strategy": "last-1", "steps": 60, "top1": 0.8125, "loss": 0.5, "photos": 16}]
    stage(
        root / "adapted",
        "adapt",
        lambda work: None,
        strategy="last-1",
        reason="so it is",
        cross_validation=paths,
    )
    parity = {"max_abs_error": 1.9e-6, "top1_agreement": 1.0}
    (root / "bundle").mkdir()
    write_json(
        root / "bundle" / "bundle.json", {"precisions": {"fp32": {"parity": parity, "accuracy": None}}}
    )
    write_json(root / "gap.json", GAP)
    write_json(root / "compare.json", COMPARE)
    for name in ("volume.png", "probe.png"):
        Image.new("RGB", (60, 40), "white").save(root / name)
    images(root / "few_shots", 3, 3)
    return root


@pytest.fixture(scope="module")
def page(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    sections = write_report(workspace, ImageSet.scan(workspace / "few_shots"), out)
    assert all(sections.values()), "every section has something"
    return out.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Open tags, headings and images of a page; fails on a tag that is closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.pictures: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag == "img":
            self.pictures.append(str(dict(attributes)["src"]))
            assert dict(attributes)["alt"]
        if tag not in ("meta", "link", "img", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_whole_and_asks_nothing_of_the_network(page: str) -> None:
    tags = parsed(page)
    assert {"script", "iframe", "object"}.isdisjoint(tags.seen)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|url\((?!#)|@import", page)
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page
    for picture in tags.pictures:
        content = picture.removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as image:
            image.verify()


def test_names_of_any_kind_are_text(page: str) -> None:
    text = "".join(parsed(page).words)
    for name in ("site <7>", "<b>&", "resnet10t of <here>", "<s-2>", "</pre><script>"):
        assert name in text
    assert "<s-2>" not in page and "<b>&" not in page


def test_every_section_shows_its_figures(page: str) -> None:
    words = " ".join("".join(parsed(page).words).split())
    for shown in (
        "on 364 real test images", "0.500 ± 0.020", "0.750", "0.875 ± 0.010",
        "Adaptation: last-1 so it is", "0.812", "1.9e-06",
        "3 photos", "14 synthetic",
        "<s>, 2 photos: drawn over the steps",
        "28 synthetic images against 6 photos", "lower --guidance (0.9 < 1)", "No limit passed.",
        "-4.5 dB at high",
        "Fréchet distance 3.25; of 1 images –",
        "3 images rejected, 1 dropped.", "Rejected: blank", "1 blank", "contrast_below",
        "learn-style: ", '"seed": 7',
    ):  # fmt: skip
        assert shown in words, shown


def test_sheets_hold_the_first_images_side_by_side(workspace: Path) -> None:
    sheets = collect(workspace, ImageSet.scan(workspace / "few_shots"))["sheets"]
    assert [one["name"] for one in sheets["classes"]] == ["<b>&", "a"] and sheets["left_out"] == 0
    photos, drawn = sheets["classes"][1]["rows"]
    sizes = []
    for row in (photos, drawn):
        with Image.open(io.BytesIO(base64.b64decode(row["picture"].partition(",")[2]))) as image:
            sizes.append(image.size)
            first = np.asarray(image)[28, 28]
        folder = workspace / ("few_shots" if row is photos else "synthetic") / "a"
        known = {tuple(np.asarray(Image.open(path))[8, 8]) for path in folder.iterdir()}
        assert tuple(first) in known
    assert sizes == [(3 * 58 - 2, 56), (12 * 58 - 2, 56)]


def test_a_workspace_of_comparisons_alone_is_enough(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", COMPARE)
    sections = write_report(tmp_path, None, tmp_path / "report.html")
    assert [name for name, there in sections.items() if there] == ["compare"]
    tags = parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert tags.seen.count("section") == 1


def test_a_control_says_so(tmp_path: Path) -> None:
    def control(work: Path) -> None:
        write_json(work / "losses.json", {"<s>": {"training": [], "held_out": {}}})

    key = Key({}, {"learn-style": StyleSettings(control=True)})
    run_stage(FunctionStage("learn-style", tmp_path / "style", key, lambda work: control(work) or {}))
    write_report(tmp_path, None, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the vectors are untrained" in text and "<svg" not in text


def test_an_empty_workspace_is_refused_even_with_photos(workspace: Path, tmp_path: Path) -> None:
    for photos in (None, ImageSet.scan(workspace / "few_shots")):
        with pytest.raises(WorkspaceError, match=r"holds nothing to report; run `synthkit adapt"):
            write_report(tmp_path, photos, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_files_of_another_shape_are_named_and_broken_ones_left_out(tmp_path: Path) -> None:
    write_json(tmp_path / "compare.json", COMPARE)
    (tmp_path / "gap.json").write_text("{", encoding="utf-8")
    assert not write_report(tmp_path, None, tmp_path / "report.html")["gap"]
    write_json(tmp_path / "gap.json", {"n_real": 3})
    with pytest.raises(WorkspaceError, match="a JSON file of the workspace is not as synthkit wrote it"):
        write_report(tmp_path, None, tmp_path / "report.html")


def test_a_chart_is_drawn_in_the_page_s_colours_and_names_every_line() -> None:
    lines = [Line("<s>", [1, 2, 8], [0.5, 0.75, 0.9], [0.25, 0.0, 0.1]), Line("_b $x$", [1, 2], [1.0, 2.0])]
    text = line_chart(lines, "x & y", "loss", log_x=True)
    svg, legend = text.split("<p ")
    chart = ElementTree.fromstring(svg)
    assert chart.get("aria-label") == "loss over x & y"
    assert {"1", "2", "8", "x & y", "loss"} <= {element.text for element in chart.iter(f"{SVG}text")}
    assert "var(--c0)" in svg and "var(--c1)" in svg and "currentColor" in svg
    assert not re.search(r"#(?:000000|fedcb)|font-family|<style|metadata", svg)
    assert '<i class="c0"></i>&lt;s&gt;' in legend and '<i class="c1"></i>_b $x$' in legend
    assert line_chart(lines, "x & y", "loss", log_x=True) == text


def test_smoothing_takes_means_of_windows() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0, 10.0], 2) == ([1.5, 3.5, 5.0], [2.0, 6.0, 10.0])
    assert smoothed([4.0, 2.0], 1) == ([1.0, 2.0], [4.0, 2.0])
