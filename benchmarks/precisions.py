"""Top-1, agreement, latency and size of a student in every precision.

    python -m benchmarks.precisions --data DIR --weights DIR --work DIR --out FILE

    a few photos per class -> pretrained student with a logistic regression as its head
    student -> `synthkit export`, int8 for the CPU and for TensorRT -> top-1 of torch and of each file

The photos come from DATA/train. The images of DATA/test measure and choose nothing: the default precision
int8 only makes `export` tell if it would refuse int8 for its loss of top-1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from benchmarks.device_head import regress
from synthkit.artifacts import StageResult, run_stage, versions, write_json
from synthkit.data.images import ImageSet
from synthkit.data.splits import k_shot
from synthkit.one_line import OneLineErrors
from synthkit.recipes.exporting.export import Export, Images
from synthkit.recipes.settings import ExportSettings

Int8Target = Literal["cpu", "tensorrt"]
_TARGETS: tuple[Int8Target, ...] = ("cpu", "tensorrt")
#: Rows of the drift table that are kept.
_WORST = 5


def make_student(weights: Path, photos: ImageSet, image_size: int, folder: Path) -> None:
    """Save a pretrained student with a logistic regression as its head, as a timm folder."""
    from synthkit.learning.students import new_student

    name = json.loads((weights / "config.json").read_text(encoding="utf-8"))["architecture"]
    student = new_student(name, photos.classes, weights=weights, image_size=image_size)
    student.model.eval()
    regress(student, photos)
    student.save(folder)


def measure(
    student: Path, photos: ImageSet, test: ImageSet, targets: Sequence[Int8Target], work: Path
) -> list[dict[str, Any]]:
    """The measurements of `synthkit export`, one row per int8 target."""
    rows = []
    for target in targets:
        settings = ExportSettings(precision="fp32,fp16,int8", default_precision="int8", int8_target=target)
        images = Images(photos=photos, test=test)
        result = run_stage(Export(settings, student, work / f"bundle-{target}", images))
        rows.append({"int8_target": target, **row_of(result)})
    return rows


def row_of(export: StageResult) -> dict[str, Any]:
    """The figures of an export that measured its precisions on test images."""
    metrics, rows = export.manifest.metrics, export.manifest.metrics["precisions"]
    accuracy = {name: row["accuracy"] for name, row in rows.items()}
    int8 = {**metrics["int8"], "drift": metrics["int8"]["drift"][:_WORST]}
    return {
        "n_test": accuracy["fp32"]["n_test"],
        "top1": {"torch": accuracy["fp32"]["torch_top1"]}
        | {name: row["top1"] for name, row in accuracy.items()},
        "agreement_with_torch": {name: row["agreement_with_torch"] for name, row in accuracy.items()},
        "latency_ms": {name: row["latency_ms"] for name, row in rows.items()},
        "bytes": {name: row["bytes"] for name, row in rows.items()},
        "int8": int8,
        "refused": metrics["refused_default"],
        "seconds": export.manifest.seconds,
    }


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; agreement is with torch, per 100 test images."""
    lines = [
        "| set | student | test images | torch | fp32 | fp16 | int8 for | int8 | agree: fp32, fp16, int8 "
        "| layers in float | int8 |",
        "|---|---|---:|---:|---:|---:|---|---:|---|---:|---|",
    ]
    return "\n".join([*lines, *(_line(row) for row in rows)])


def _line(row: Mapping[str, Any]) -> str:
    agree = ", ".join(f"{100 * share:.1f}" for share in row["agreement_with_torch"].values())
    torch, fp32, fp16, int8 = (f"{share:.3f}" for share in row["top1"].values())
    cells = [row["set"], row["student"], row["n_test"], torch, fp32, fp16, row["int8_target"], int8, agree]
    cells += [len(row["int8"]["kept_float"]), "refused" if row["refused"] else "offered"]
    return f"| {' | '.join(map(str, cells))} |"


@click.command(cls=OneLineErrors)
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, multiple=True, help="Holds train/ and test/."
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="A student's timm folder.",
)
@click.option("--shots", default=16, show_default=True, help="Photos per class.")
@click.option("--image-size", default=160, show_default=True, help="Side of the student's input, pixels.")
@click.option("--seed", default=0, show_default=True, help="Of the split of the photos.")
@click.option(
    "--int8-target",
    "targets",
    type=click.Choice(_TARGETS),
    multiple=True,
    default=_TARGETS,
    show_default=True,
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for bundles.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
def main(
    data: Sequence[Path],
    weights: Sequence[Path],
    shots: int,
    image_size: int,
    seed: int,
    targets: Sequence[Int8Target],
    work: Path,
    out: Path,
) -> None:
    """Compare torch, fp32, fp16 and int8 on test images; writes OUT and prints a table."""
    rows: list[dict[str, Any]] = []
    settings = {"shots": shots, "image_size": image_size, "seed": seed}
    for folder in data:
        train, test = ImageSet.scan(folder / "train"), ImageSet.scan(folder / "test")
        photos = train.subset(k_shot(train, shots, seed))
        for pretrained in weights:
            place = work / f"{folder.name}-{pretrained.name}"
            make_student(pretrained, photos, image_size, place / "student")
            names = {"set": folder.name, "student": pretrained.name, "photos": len(photos)}
            rows += [names | row for row in measure(place / "student", photos, test, targets, place)]
            write_json(out, {"settings": settings, "versions": versions(), "rows": rows})
    click.echo(as_text(rows))


if __name__ == "__main__":
    main()
