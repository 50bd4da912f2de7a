"""`synthkit update`: refit a bundle's last layer to new photos, on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.calibration.confidence import Confidence
    from synthkit.recipes.device.update import BeforeAfter, UpdateResult


@options.command("update")
@click.argument("bundle", type=click.Path(path_type=Path))
@options.folder("--real-dir", "Class folders of the new photos.", required=True)
@click.option("--new-class", "new_classes", multiple=True, help="Learn this folder as a new class.")
@click.option("--coverage", type=float, help='Share of photos to answer; the others are "unknown".')
@click.option("--max-error", type=float, help='Share of wrong answers to allow; the others are "unknown".')
@click.option("--alpha", type=float, help="Answer with sets of labels that miss this share of photos.")
@options.folder("--test-dir", "Test images: measure the bundle before and after.")
@options.skip_bad
@click.option("--force", is_flag=True, help="Update again, and take the new head even when it is worse.")
@click.option("--dry-run", is_flag=True, help="Measure, and write nothing.")
def command(
    workspace: Path,
    bundle: Path,
    real_dir: Path,
    new_classes: tuple[str, ...],
    coverage: float | None,
    max_error: float | None,
    alpha: float | None,
    test_dir: Path | None,
    skip_bad: bool,
    force: bool,
    dry_run: bool,
) -> options.Output:
    """Refit a bundle's last layer to new photos; torch is not needed.

    The new version takes the bundle's place unless it does worse on held-out photos. The version before is
    kept, and `synthkit rollback` goes back to it.

    \b
    Example: synthkit update ./bundle --real-dir ./new_photos
    Example: synthkit update ./bundle --real-dir ./new_photos --new-class dent --max-error 0.05
    """
    from synthkit.calibration.confidence import Target
    from synthkit.data.images import ImageSet
    from synthkit.recipes.device.update import UpdateSettings, update_bundle

    target = Target(coverage, max_error, alpha)
    photos, test = ImageSet.scan(real_dir, skip_bad, fewest=1), None
    if test_dir:
        test = ImageSet.scan(test_dir, skip_bad, fewest=1)
    result = update_bundle(bundle, photos, test, UpdateSettings(new_classes, target, force, dry_run))
    return options.Output(result.to_json(), "\n".join(_lines(result)))


def _lines(result: UpdateResult) -> Iterator[str]:
    if held_out := result.held_out:
        yield _compared("held-out photos", held_out.overall)
        if result.new_classes:
            yield _compared("  of the old classes among them", held_out.old_classes)
        if held_out.replayed.photos:
            yield _compared("replayed photos of the other classes", held_out.replayed)
    if result.golden:
        yield "golden inputs: {same_answer} of {inputs} answered as before".format(**result.golden)
    if test := result.test:
        yield f"test images: {test.top1_before:.1%} -> {test.top1:.1%} of {test.n_test} right"
        if result.new_classes:
            yield _compared("  of the old classes among them", test.old_classes)
    if result.confidence:
        yield from _confidence_lines(result.confidence)
    yield _OUTCOMES[result.outcome].format(bundle=result.bundle, version=result.version)


_OUTCOMES = {
    "updated": "{bundle}: now version {version}; `synthkit rollback {bundle}` goes back",
    "kept": "{bundle}: stays at version {version}, because the new head does worse on held-out photos; "
    "--force takes it all the same",
    "unchanged": "{bundle}: nothing to do, version {version} has learnt these photos; --force updates again",
    "would update": "{bundle}: would be updated, nothing was written",
}


def _compared(what: str, shares: BeforeAfter) -> str:
    if shares.before is None or shares.after is None:
        return f"{what}: none, so nothing is verified"
    return f"{what}: {shares.before:.1%} -> {shares.after:.1%} of {shares.photos} right"


def _confidence_lines(confidence: Confidence) -> Iterator[str]:
    facts = confidence.facts
    if "calibration_error_after" in facts:
        before, after = facts["calibration_error_before"], facts["calibration_error_after"]
        yield f"calibration error: {before:.3f} -> {after:.3f} (temperature {confidence.temperature:.2f})"
    if "coverage" in facts:
        yield (
            f'below {confidence.threshold:.5f} the answer is "unknown": {facts["coverage"]:.1%} of '
            f"the held-out photos are answered, {facts['error']:.1%} of these wrongly"
        )
    if "set_size" in facts:
        size, missed = facts["set_size"], facts["set_miscoverage"]
        yield f"sets of {size:.2f} labels on average miss {missed:.1%} of the held-out photos"
