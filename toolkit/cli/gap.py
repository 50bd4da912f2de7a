"""`synthkit gap`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from synthkit.cli import options
from synthkit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from synthkit.data.images import ImageSet
    from synthkit.learning.students import Student
    from synthkit.recipes.diagnostics.gap import Appearance, GapResult


@options.command("gap")
@click.option("--real-dir", type=click.Path(path_type=Path), required=True, help="Real photos.")
@click.option(
    "--synth-dir", type=click.Path(path_type=Path), help="Synthetic set  [default: WORKSPACE/synthetic]"
)
@click.option(
    "--student",
    "student_dir",
    type=click.Path(path_type=Path),
    help="Student whose features are compared  [default: WORKSPACE/student]",
)
@click.option(
    "--weights", type=click.Path(path_type=Path), help="Compare the features of this network instead."
)
@click.option("--architecture", help="timm name of the network of --weights.")
@click.option(
    "--per-class", type=click.IntRange(2), default=200, show_default=True, help="Most images of a class."
)
@options.skip_bad
def command(
    workspace: Path,
    real_dir: Path,
    synth_dir: Path | None,
    student_dir: Path | None,
    weights: Path | None,
    architecture: str | None,
    per_class: int,
    skip_bad: bool,
) -> options.Output:
    """Compare a synthetic set with real photos, in appearance and content, and say what may help.

    Content is measured on the features of a network, so compare two sets on the same network. The result is
    also written to WORKSPACE/gap.json, where `synthkit report` finds it.

    \b
    Examples:
      synthkit gap --real-dir ./few_shots
      synthkit gap --real-dir ./test --weights ./mobilenet --architecture mobilenetv2_100
    """
    from synthkit.artifacts import workspace_lock, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.diagnostics.gap import check_classes, measure_gap

    folder = synth_dir or _workspace_set(workspace)
    synthetic, real = ImageSet.scan(folder, skip_bad), ImageSet.scan(real_dir, skip_bad)
    check_classes(synthetic, real)
    student, name = _network(workspace, student_dir, weights, architecture, real)
    result = measure_gap(student, name, synthetic, real, per_class)
    data = {"synth_dir": str(folder), "real_dir": str(real_dir), **result.to_json()}
    with workspace_lock(workspace):
        write_json(workspace / "gap.json", data)
    return options.Output(data, "\n".join(_text(result)))


def _workspace_set(workspace: Path) -> Path:
    folder = workspace / "synthetic"
    if not folder.is_dir():
        raise ConfigError(
            f"no synthetic set {folder}; make one with `synthkit generate`, or give --synth-dir DIR"
        )
    return folder


def _network(
    workspace: Path,
    student_dir: Path | None,
    weights: Path | None,
    architecture: str | None,
    photos: ImageSet,
) -> tuple[Student, str]:
    """The network whose features are compared, and its name."""
    if bool(weights) != bool(architecture) or (weights and student_dir):
        raise ConfigError("give either --student DIR, or --weights FILE together with --architecture NAME")
    from synthkit.learning.students import load_student, new_student, untrained_on

    if weights and architecture:
        return new_student(architecture, photos.classes, weights=weights), f"{architecture} of {weights}"
    folder = student_dir or workspace / "student"
    if not folder.is_dir():
        raise ModelError(
            f"no student {folder}; train one with `synthkit train`, or give --student DIR, or other weights "
            "with --weights FILE --architecture NAME"
        )
    # Photos look more alike to a network that has been trained on them.
    folder = untrained_on(folder, photos)
    student = load_student(folder)
    return student, f"{student.architecture} of {folder}"


def _text(result: GapResult) -> Iterator[str]:
    yield (
        f"{result.n_synthetic} synthetic images against {result.n_real} photos, on "
        f"{result.features.dimensions} features of {result.features.source}\n"
    )
    yield from _appearance(result.appearance)
    yield from _content(result)
    uses = (
        ("Synthetic images alone", result.actions.synthetic_only),
        ("Synthetic images added to the photos", result.actions.added_to_real),
    )
    for title, actions in uses:
        yield f"\n{title}:{'' if actions else ' no limit passed'}"
        for action in actions:
            yield f"- {action.gap}: {action.action}\n  ({action.reason})"


def _appearance(appearance: Appearance) -> Iterator[str]:
    yield "appearance      offset  spread   (in standard deviations of the photos; as a ratio)"
    for name, offset in appearance.offset.items():
        yield f"{name:<15} {offset:+6.2f}  {appearance.spread[name]:6.2f}"
    low, high = appearance.low_frequencies_db, appearance.high_frequencies_db
    yield f"spectrum        {low:+.1f} dB at low, {high:+.1f} dB at high frequencies\n"


def _content(result: GapResult) -> Iterator[str]:
    content = result.content
    rows = [(name, row, row.top1, row.most_confused_with) for name, row in result.per_class.items()]
    every = ("all", content, content.linear_probe_top1_synthetic, None)
    yield "content         coverage (expected)  density  diversity   top-1  most confused with"
    for name, row, top1, confused_with in [*rows, every]:
        expected = f"({_number(row.expected_coverage)})"
        line = (
            f"{name[:14]:<15} {_number(row.coverage):>8} {expected:>10}  {_number(row.density):>7}  "
            f"{_number(row.diversity):>9}  {_number(top1):>6}  {confused_with or ''}"
        )
        yield line.rstrip()
    real = _number(content.linear_probe_top1_real)
    yield f"top-1 of a linear probe that was trained on the photos; on held-out photos it has {real}"
    yield (
        f"Fréchet distance {content.frechet:.2f}; of {content.frechet_count} images "
        f"{_number(content.frechet_equal_counts)}, where two halves of the photos are "
        f"{_number(content.frechet_real_halves)} apart"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
