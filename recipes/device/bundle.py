"""The bundle of the public Python API: it predicts, verifies, learns new photos and goes back.

bundle = synthkit.Bundle.open("bundle")
bundle.predict(["photo.jpg"])
result = bundle.update("new_photos", new_classes=["dent"])
bundle = synthkit.Bundle.open("bundle")     # an opened bundle stays the version that it is
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from synthkit.calibration.confidence import Target
from synthkit.data.images import ImageSet
from synthkit.engines.bundle import versions
from synthkit.engines.bundle.format import AnyBundle
from synthkit.engines.bundle.format import Bundle as OpenedBundle
from synthkit.recipes.device.evaluate import Evaluation, evaluate_bundle
from synthkit.recipes.device.update import UpdateResult, UpdateSettings, update_bundle


class Bundle(OpenedBundle):
    """An opened bundle; its folder may move on to another version, the opened one stays what it is."""

    @classmethod
    def open(cls: type[AnyBundle], folder: str | Path, precision: str | None = None) -> AnyBundle:
        """Check a bundle and load one of its models.

        Args:
            folder: the bundle. Where a killed update has left it under another name, it is put back.
            precision: "fp32", "fp16" or "int8"; None takes the bundle's default.

        Raises:
            BundleError: names what is missing, altered or wrong, or the bundle holds no such precision.
            MissingExtra: onnxruntime is not installed.
        """
        versions.find_again(Path(folder))
        return super().open(folder, precision)  # type: ignore[misc]

    def evaluate(self, test_dir: str | Path, skip_bad: bool = False) -> Evaluation:
        """Measure the bundle on class folders; see `evaluate_bundle`."""
        return evaluate_bundle(self, Path(test_dir), skip_bad)

    def update(
        self,
        real_dir: str | Path,
        *,
        new_classes: Sequence[str] = (),
        coverage: float | None = None,
        max_error: float | None = None,
        alpha: float | None = None,
        test_dir: str | Path | None = None,
        skip_bad: bool = False,
        force: bool = False,
        dry_run: bool = False,
    ) -> UpdateResult:
        """Refit the last layer to new photos, and write the next version of the folder unless it is worse.

        Args:
            real_dir: class folders of the photos.
            new_classes: folders that the bundle does not know and shall learn.
            coverage: share of photos to answer; the others are "unknown".
            max_error: share of wrong answers to allow; the others are "unknown". Excludes `coverage`.
            alpha: answer with sets of labels that miss this share of photos.
            test_dir: class folders to measure both versions on.
            skip_bad: leave unreadable files out instead of refusing the folder.
            force: update again, and take the new head even when it is worse.
            dry_run: measure, and write nothing.

        Raises:
            BundleError: the bundle is not whole, or has no head on record.
            ConfigError: a share does not lie between 0 and 1.
            DataError: photos, classes or test images cannot be used.
            WorkspaceError: the bundle is held by another run, or nothing can be written beside it.
        """
        photos = ImageSet.scan(Path(real_dir), skip_bad, fewest=1)
        test = None if test_dir is None else ImageSet.scan(Path(test_dir), skip_bad, fewest=1)
        settings = UpdateSettings(tuple(new_classes), Target(coverage, max_error, alpha), force, dry_run)
        return update_bundle(self.folder, photos, test, settings)

    def rollback(self) -> RollbackResult:
        """Exchange the folder and the version before its last update; a second time goes forward again.

        Raises:
            BundleError: there is no version before it.
            WorkspaceError: the bundle is held by another run.
        """
        return rollback_bundle(self.folder)


@dataclass(frozen=True)
class RollbackResult:
    """The answer of a rollback.

    Attributes:
        bundle: the bundle's folder.
        from_version: the version that lay there.
        version: the version that lies there now.
    """

    bundle: str
    from_version: int
    version: int

    def to_json(self) -> dict[str, str | int]:
        """The JSON object of `synthkit rollback --json`."""
        numbers = {"from_version": self.from_version, "version": self.version}
        return {"outcome": "rolled back", "bundle": self.bundle, **numbers}


def rollback_bundle(folder: Path) -> RollbackResult:
    """Exchange a bundle and the version before it; see `Bundle.rollback`."""
    return RollbackResult(str(folder), *versions.rollback(folder))
