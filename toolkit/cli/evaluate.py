"""`synthkit evaluate`: a bundle's top-1 on a test folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.recipes.device.evaluate import Evaluation


@options.command("evaluate")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
@click.option("--test-dir", type=click.Path(path_type=Path), required=True, help="Test images.")
@options.skip_bad
def command(workspace: Path, bundle: Path | None, test_dir: Path, skip_bad: bool) -> options.Output:
    """Measure a bundle's top-1 on a test folder; torch is not needed.

    A bundle that answers "unknown" or gives sets of labels is measured in these as well.

    A folder that shares an image with the photos trained on is refused.

    \b
    Example: synthkit evaluate --bundle ./bundle --test-dir ./test
    """
    from synthkit.engines.bundle.format import Bundle
    from synthkit.engines.bundle.versions import find_again
    from synthkit.recipes.device.evaluate import evaluate_bundle

    folder = bundle or workspace / "bundle"
    find_again(folder)
    measured = evaluate_bundle(Bundle.open(folder), test_dir, skip_bad)
    return options.Output(measured.to_json(), _table(measured))


def _table(measured: Evaluation) -> str:
    low, high = measured.interval
    width = max(5, *(len(name) for name in measured.per_class))
    lines = [f"{'class':<{width}}  top-1"]
    lines += [f"{name:<{width}}  {share:5.3f}" for name, share in measured.per_class.items()]
    lines.append(f"{'all':<{width}}  {measured.top1:5.3f}  (95 %: {low:.3f} to {high:.3f})")
    lines += _limits(measured)
    lines.append(f"{measured.n_test} images in {measured.seconds:.1f} s")
    return "\n".join(lines)


def _limits(measured: Evaluation) -> list[str]:
    """What the bundle's threshold and label sets make of the test images."""
    lines = [f"calibration error {measured.calibration_error:.3f}"]
    if answers := measured.answers:
        right = "" if answers.accuracy is None else f", {answers.accuracy:.3f} of these right"
        lines.append(f'answered {answers.coverage:.3f} ({answers.unknown} "unknown"){right}')
    if sets := measured.sets:
        lines.append(f"sets of {sets.mean_size:.2f} labels hold the right one in {sets.coverage:.3f}")
    return lines
