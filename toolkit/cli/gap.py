"""`synthkit gap`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from synthkit.data.images import ImageSet
    from synthkit.learning.students import Student

_REGIMES = {"synthetic_only": "Synthetic images alone", "added_to_real": "Synthetic images beside the photos"}


@options.command("gap")
@click.option(
    "--synth-dir", type=click.Path(path_type=Path), help="Synthetic set  [default: WORKSPACE/synthetic]"
)
@click.option(
    "--real-dir", type=click.Path(path_type=Path), required=True, help="Real photos to compare with."
)
@options.skip_bad
@click.option(
    "--student",
    "student_dir",
    type=click.Path(path_type=Path),
    help="Student whose features to use  [default: WORKSPACE/student]",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Network of other weights instead, for example ImageNet's.",
)
@click.option("--architecture", help="timm name of the network of --weights.")
@click.option(
    "--per-class",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="Images of a class to look at.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of draws and folds.")
def command(
    workspace: Path,
    synth_dir: Path | None,
    real_dir: Path,
    skip_bad: bool,
    student_dir: Path | None,
    weights: Path | None,
    architecture: str | None,
    per_class: int,
    seed: int,
) -> options.Output:
    """Tell how a synthetic set differs from real photos, in looks and in content, and what may help.

    Measures depend on the network whose features they use, which is named; compare sets on the same one. The
    result is also kept in WORKSPACE/gap.json, for `synthkit report`.

    \b
    Example: synthkit gap --real-dir ./few_shots
    Example: synthkit gap --real-dir ./test --weights ./mobilenet --architecture mobilenetv2_100
    """
    from synthkit.artifacts import workspace_lock, write_json
    from synthkit.data.images import ImageSet
    from synthkit.recipes.diagnostics.gap import check_classes, measure_gap

    source = synth_dir or _workspace_set(workspace)
    synthetic, real = ImageSet.scan(source, skip_bad), ImageSet.scan(real_dir, skip_bad)
    check_classes(synthetic, real)
    student, name = _network(workspace, student_dir, weights, architecture, real)
    found = measure_gap(student, name, synthetic, real, per_class, seed)
    result = {"synth_dir": str(source), "real_dir": str(real_dir), **found}
    with workspace_lock(workspace):
        write_json(workspace / "gap.json", result)
    return options.Output(result, "\n".join(_text(result)))


def _workspace_set(workspace: Path) -> Path:
    folder = workspace / "synthetic"
    if not folder.is_dir():
        raise ConfigError(
            f"no synthetic set {folder}; draw one with `synthkit generate`, or give --synth-dir DIR"
        )
    return folder


def _network(
    workspace: Path,
    student_dir: Path | None,
    weights: Path | None,
    architecture: str | None,
    photos: ImageSet,
) -> tuple[Student, str]:
    """The network whose features are used, and its name."""
    if bool(weights) != bool(architecture) or (weights and student_dir):
        raise ConfigError("give either --student DIR, or --weights FILE together with --architecture NAME")
    from synthkit.learning.students import before_photos, load_student, new_student

    if weights and architecture:
        return new_student(architecture, photos.classes, weights=weights), f"{architecture} of {weights}"
    folder = student_dir or workspace / "student"
    if not folder.is_dir():
        raise ModelError(
            f"no student {folder}; train one with `synthkit train`, or give --student DIR, or other weights "
            "with --weights FILE --architecture NAME"
        )
    folder = before_photos(folder, photos)  # photos look more alike to a network that has learned them
    student = load_student(folder)
    return student, f"{student.architecture} of {folder}"


def _text(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['n_synthetic']} synthetic images against {result['n_real']} photos, on "
        f"{result['features']['dimensions']} features of {result['features']['source']}\n"
    )
    yield from _appearance(result["appearance"])
    yield from _content(result)
    for regime, title in _REGIMES.items():
        yield f"\n{title}:{'' if result['actions'][regime] else ' no limit passed'}"
        for one in result["actions"][regime]:
            yield f"- {one['gap']}: {one['action']}\n  ({one['why']})"


def _appearance(looks: Mapping[str, Any]) -> Iterator[str]:
    yield "appearance      offset  spread   (in standard deviations of the photos; as a ratio)"
    for name, offset in looks["offset"].items():
        yield f"{name:<15} {offset:+6.2f}  {looks['spread'][name]:6.2f}"
    low, high = looks["low_frequencies_db"], looks["high_frequencies_db"]
    yield f"spectrum        {low:+.1f} dB at low, {high:+.1f} dB at high frequencies\n"


def _content(result: Mapping[str, Any]) -> Iterator[str]:
    content = result["content"]
    every = {**content, "seen_right": content["head_top1_on_synthetic"], "most_seen_as": None}
    yield "content         coverage (expected)  density  diversity  seen right  most seen as"
    for name, one in [*result["per_class"].items(), ("all", every)]:
        expected = f"({_shown(one['expected_coverage'])})"
        yield (
            f"{name[:14]:<15} {_shown(one['coverage']):>8} {expected:>10}  "
            f"{_shown(one['density']):>7}  {_shown(one['diversity']):>9}  {_shown(one['seen_right']):>10}  "
            f"{one['most_seen_as'] or ''}"
        )
    right = _shown(content["head_top1_on_photos"])
    yield f"seen by a head trained on the photos; of held-out photos it gets {right} right"
    yield (
        f"Fréchet distance {content['frechet']:.2f}; of {content['frechet_count']} images "
        f"{_shown(content['frechet_equal_counts'])}, where two halves of the photos are "
        f"{_shown(content['frechet_real_halves'])} apart"
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
