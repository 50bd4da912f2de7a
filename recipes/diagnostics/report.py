"""`report`: one self-contained HTML page of what a workspace holds. It reads, and computes nothing anew.

manifests, style/, synthetic/, gap.json, curves.json, bundle.json, compare.json, plots ──► report.html
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from synthkit.artifacts import Manifest, read_manifest, write_bytes
from synthkit.data.images import ImageSet
from synthkit.errors import MissingExtra, WorkspaceError
from synthkit.recipes.generation.rejections import rejected_images
from synthkit.recipes.learn_style import CLUSTERS, LOSSES, PREVIEWS
from synthkit.standalone import UnusableImage, open_image

STAGES = ("engines", "style", "synthetic", "student", "adapted", "bundle")
_PLOTS = {"volume.png": "More synthetic images", "probe.png": "Where the gap sits"}
_PAGE = Path(__file__).with_name("report.html")
_CELL, _PER_ROW, _MOST_CLASSES = 56, 12, 60
_WINDOWS = 60  # points of a loss curve
_COLOURS = 6  # of lines, defined in the page's style sheet as --c0 to --c5
_SVG = {"svg.fonttype": "none", "svg.hashsalt": "synthkit"}  # text as text, ids that do not change
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def write_report(workspace: Path, photos: ImageSet | None, out: Path) -> dict[str, Any]:
    """Write the page.

    Args:
        workspace: what the stages wrote.
        photos: real photos to show beside the synthetic images, or None.
        out: the HTML file.

    Returns:
        Section -> whether the workspace has something for it.

    Raises:
        WorkspaceError: the workspace holds nothing to report.
        MissingExtra: jinja2 is not installed.
    """
    content = collect(workspace, photos)
    if not any(content.values()):
        raise WorkspaceError(
            f"the workspace {workspace} holds nothing to report; run `synthkit adapt --real-dir DIR` first, "
            "or name another with --workspace"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, _render({"workspace": workspace.resolve().name, **content}).encode())
    return {name: bool(value) for name, value in content.items()}


def collect(workspace: Path, photos: ImageSet | None) -> dict[str, Any]:
    """What the page shows, section by section; empty where the workspace has nothing."""
    manifests = {name: read_manifest(workspace / name) for name in STAGES}
    made = {name: manifest for name, manifest in manifests.items() if manifest}
    return {
        "stages": [_stage(one) for one in made.values()],
        "style": _style(workspace / "style", made.get("style")),
        "sheets": _sheets(workspace / "synthetic", photos if made else None),
        "filters": _filters(workspace / "synthetic", made.get("synthetic")),
        "gap": _read(workspace / "gap.json"),
        "training": _training(workspace),
        "adapted": made["adapted"].metrics if "adapted" in made else None,
        "bundle": _read(workspace / "bundle" / "bundle.json"),
        "compare": _compare(_read(workspace / "compare.json")),
        "plots": [
            (title, _embedded(workspace / name))
            for name, title in _PLOTS.items()
            if (workspace / name).is_file()
        ],
    }


def _render(content: Mapping[str, Any]) -> str:
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("jinja2", "train") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = _number
    page = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    try:
        return page.render(content)
    except (jinja2.UndefinedError, TypeError, AttributeError, KeyError) as error:
        raise WorkspaceError(
            f"a JSON file of the workspace is not as synthkit wrote it ({error}); make its stage again "
            "with --force"
        ) from None


def _number(value: Any, digits: int = 2) -> str:
    """A measure as text; a dash where it could not be taken."""
    return "–" if value is None else f"{value:.{digits}f}"


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _stage(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.stage,
        "seconds": manifest.seconds,
        "synthkit": manifest.versions.get("synthkit", ""),
        "config": json.dumps({**manifest.settings, **manifest.resolved}, indent=1, ensure_ascii=False),
        "metrics": json.dumps(manifest.metrics, indent=1, ensure_ascii=False),
    }


def _style(folder: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    losses = _read(folder / LOSSES) or {}
    return {
        "tokens": [
            {
                "name": name,
                "photos": len((_read(folder / CLUSTERS) or {}).get(name, ())) or None,
                "previews": [
                    _embedded(path) for path in sorted((folder / PREVIEWS / name.strip("<>")).glob("*.png"))
                ],
            }
            for name in losses
        ],
        "control": bool(manifest.settings.get("learn-style", {}).get("control")),
        "chart": _loss_chart(losses),
        "clusters": _embedded(folder / "clusters.png") if (folder / "clusters.png").is_file() else None,
    }


def _loss_chart(losses: Mapping[str, Mapping[str, Any]]) -> str | None:
    lines = []
    for name, one in losses.items():
        if one["training"]:
            lines.append(Line(name, *smoothed(one["training"], max(1, len(one["training"]) // _WINDOWS))))
        if one["held_out"]:
            steps = [float(step) for step in one["held_out"]]
            lines.append(Line(f"{name}, held out", steps, list(one["held_out"].values())))
    return line_chart(lines, "step", "denoising loss") if lines else None


def _sheets(synthetic: Path, photos: ImageSet | None) -> dict[str, Any] | None:
    """A row of photos over a row of synthetic images for each class."""
    made = _by_class(synthetic)
    real: dict[str, list[Path]] = {}
    for item in photos.items if photos else ():
        real.setdefault(photos.classes[item.label] if photos else "", []).append(item.path)
    names = sorted({*made, *real})
    if not names:
        return None
    rows = [
        {
            "name": name,
            "rows": [
                {"title": title, "count": len(paths), "picture": _strip(paths[:_PER_ROW])}
                for title, paths in (("photos", real.get(name, [])), ("synthetic", made.get(name, [])))
                if paths
            ],
        }
        for name in names[:_MOST_CLASSES]
    ]
    return {"classes": rows, "left_out": max(0, len(names) - _MOST_CLASSES)}


def _by_class(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        return {}
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    found = {one.name: sorted(one.glob("[!.]*.png")) for one in classes}
    return {name: paths for name, paths in found.items() if paths}


def _filters(folder: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None or "filters" not in manifest.metrics:
        return None
    return {
        "rejected": manifest.metrics["rejected"],
        "dropped": manifest.metrics.get("dropped", 0),
        "thresholds": manifest.metrics["filters"].get("thresholds", {}),
        "per_class": manifest.metrics.get("per_class", {}),
        "grids": [
            {
                "reason": reason,
                "rows": [(name, len(paths), _strip(paths[:_PER_ROW])) for name, paths in of.items()],
            }
            for reason, of in rejected_images(folder).items()
        ],
    }


def _training(workspace: Path) -> list[dict[str, Any]]:
    """Loss and held-out top-1 of every student that kept its curves."""
    found = []
    for stage in ("student", "adapted"):
        for path in sorted((workspace / stage).rglob("curves.json")):
            curves = _read(path) or {}
            charts = [
                line_chart(
                    [Line("training", *smoothed(curves["loss"], max(1, len(curves["loss"]) // _WINDOWS)))],
                    "step",
                    "loss",
                )
                if curves.get("loss")
                else "",
                line_chart(
                    [Line("held-out photos", *map(list, zip(*curves["validation"], strict=True)))],
                    "step",
                    "top-1",
                )
                if curves.get("validation")
                else "",
            ]
            if any(charts):
                found.append({"name": path.parent.relative_to(workspace).as_posix(), "charts": charts})
    return found


def _compare(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not result or not result.get("rows"):
        return None
    rows = result["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shots = sorted({row["shots"] for row in rows})
    table = {(row["shots"], row["method"]): row for row in rows}
    lines = [
        Line(method, *(list(one) for one in zip(*_points(rows, method), strict=True))) for method in methods
    ]
    return {
        "methods": methods,
        "rows": [(count, [table.get((count, method)) for method in methods]) for count in shots],
        "n_test": result.get("n_test"),
        "chart": line_chart(lines, "photos per class", "top-1 on real test images", log_x=True),
    }


def _points(rows: Iterable[Mapping[str, Any]], method: str) -> list[tuple[float, float, float]]:
    return sorted(
        (row["shots"], row["top1_mean"], row["top1_std"]) for row in rows if row["method"] == method
    )


def _strip(paths: Sequence[Path]) -> str:
    """Images side by side as a data URI."""
    strip = Image.new("RGB", (len(paths) * (_CELL + 2) - 2, _CELL), "grey")
    for index, path in enumerate(paths):
        try:
            image = open_image(path)
        except UnusableImage:
            continue  # its place stays grey
        kind = Image.Resampling.NEAREST if max(image.size) <= _CELL else Image.Resampling.BOX
        strip.paste(image.resize((_CELL, _CELL), kind), (index * (_CELL + 2), 0))
    stream = io.BytesIO()
    strip.save(stream, format="PNG")
    return _data_uri(stream.getvalue())


def _embedded(path: Path) -> str:
    return _data_uri(path.read_bytes())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        x: positions.
        y: values.
        error: half the length of each error bar; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = field(default=())


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, log_x: bool = False) -> str:
    """HTML of a chart: an SVG element in the page's own colours, light and dark, and a legend.

    Args:
        lines: with at least one point in all.
        x_label: name and unit of the positions.
        y_label: name and unit of the values.
        log_x: whether positions are spaced by their logarithm; they must then be positive.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_SVG):
        figure = Figure(figsize=(8, 3.25), layout="constrained")
        axes = figure.subplots()
        for number, line in enumerate(lines):
            marker = "o" if len(line.x) < 40 else ""
            errors = line.error or None
            axes.errorbar(line.x, line.y, errors, color=_placeholder(number), marker=marker, markersize=4)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({x for line in lines for x in line.x}))
            axes.xaxis.set_major_formatter("{x:g}")
        elif all(float(x).is_integer() for line in lines for x in line.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 1.25
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    title = f"{escape(y_label)} over {escape(x_label)}"
    return _in_page_colours(stream.getvalue(), title) + _legend(lines)


def _in_page_colours(document: str, title: str) -> str:
    """The SVG element of matplotlib's document, with the page's font and colours."""
    svg = document[document.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    svg = re.sub(r"<style.*?</style>|font-family: [^;]*; ", "", svg).replace("#000000", "currentColor")
    for number in range(_COLOURS):
        svg = svg.replace(_placeholder(number), f"var(--c{number})")
    return svg


def _placeholder(number: int) -> str:
    """A colour that nothing else in the chart has, in whose place the page's own is put."""
    return f"#fedcb{number % _COLOURS}"


def _legend(lines: Sequence[Line]) -> str:
    names = [
        f'<span><i class="c{number % _COLOURS}"></i>{escape(line.name)}</span>'
        for number, line in enumerate(lines)
    ]
    return f'<p class="legend">{"".join(names)}</p>'


def smoothed(values: Sequence[float], window: int) -> tuple[list[float], list[float]]:
    """Positions and means of consecutive windows, for a curve that is noisy from step to step.

    Args:
        values: one per step, from step 1.
        window: steps of a mean.
    """
    chunks = [(start, values[start : start + window]) for start in range(0, len(values), window)]
    return (
        [start + (len(chunk) + 1) / 2 for start, chunk in chunks],
        [sum(chunk) / len(chunk) for _, chunk in chunks],
    )
