"""`synthkit adapt`: the main job, from a few photos to a bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError

if TYPE_CHECKING:
    from synthkit.artifacts import StageResult
    from synthkit.recipes.chain import ChainSettings, Workspace

_SECTIONS = ("adapt", "train", "generate", "filter", "learn-style", "build-engines")


_DEVICE_ONLY = ("rollback", "new_class", "coverage", "max_error", "max_miss")


def _device_options(function: Any) -> Any:
    """The options that only go with --bundle."""
    for option in (
        click.option("--max-miss", type=float, help="With --bundle: answer with sets that miss this share."),
        click.option("--max-error", type=float, help="With --bundle: share of wrong answers to allow."),
        click.option("--coverage", type=float, help="With --bundle: share of photos to answer."),
        click.option("--new-class", multiple=True, help="With --bundle: learn this folder as a new class."),
        click.option("--rollback", is_flag=True, help="With --bundle: go back to the version before."),
        click.option("--bundle", type=click.Path(path_type=Path), help="Refit this bundle without torch."),
    ):
        function = option(function)
    return function


@options.command("adapt")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Class folders of the real photos.")
@click.option(
    "--test-dir", type=click.Path(path_type=Path), help="Test images: measure the bundle at the end."
)
@click.option("--no-synth", is_flag=True, help="Adapt a pretrained student on the photos alone.")
@options.skip_bad
@_device_options
@options.stage_options
@options.settings_options(*_SECTIONS)
def command(workspace: Path, real_dir: Path | None, **values: Any) -> options.Output:
    """Turn a few photos per class into a verified bundle, running whatever earlier stage is missing.

    A stage whose inputs have not changed is skipped; --force adapts and exports again. --student takes a timm
    model name, or the folder of a student that is already trained.

    With --bundle, on the device: the bundle's last layer is refitted to the photos, without torch. The new
    version takes the bundle's place unless it does worse on held-out photos (--force takes it all the same);
    the version before is kept, and --rollback goes back to it. --coverage or --max-error set the threshold
    below which `synthkit predict` answers "unknown".

    \b
    Example: synthkit adapt --real-dir ./few_shots --test-dir ./test
    Example: synthkit adapt --bundle ./bundle --real-dir ./new_photos
    """
    _refuse_contradictions(real_dir, values)
    if values["rollback"]:
        return _roll_back(values["bundle"])
    assert real_dir is not None
    if values["bundle"]:
        return _adapt_bundle(real_dir, values)
    for name in ("bundle", *_DEVICE_ONLY):
        values.pop(name)
    return _run_chain(workspace, real_dir, **values)


def _refuse_contradictions(real_dir: Path | None, values: dict[str, Any]) -> None:
    on_device = {*_DEVICE_ONLY, "bundle", "test_dir", "skip_bad", "force", "dry_run"}
    given = [name for name, value in values.items() if value not in (None, False, ())]
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    if values["bundle"]:
        others = [name for name in given if name not in on_device]
        reason = "--bundle refits the last layer of a finished bundle, where these have no part"
    else:
        others = [name for name in given if name in _DEVICE_ONLY]
        reason = "these need --bundle DIR"
    if values["bundle"] and values["rollback"]:
        others = [name for name in given if name not in ("bundle", "rollback")]
        others += ["real_dir"] * (real_dir is not None)
        reason = "--rollback takes --bundle alone"
    if others:
        named = ", ".join(flags.get(name, "--real-dir") for name in others)
        raise ConfigError(f"{named}: {reason}; leave them out or give what they need")
    if real_dir is None and not values["rollback"]:
        raise click.UsageError("Missing option '--real-dir'.")


def _roll_back(bundle: Path) -> options.Output:
    from synthkit.engines.bundle.versions import rollback

    before, now = rollback(bundle)
    data = {"outcome": "rolled back", "bundle": str(bundle), "from_version": before, "version": now}
    return options.Output(
        data, f"{bundle}: from version {before} to {now}; the same command goes forth again"
    )


def _adapt_bundle(real_dir: Path, values: dict[str, Any]) -> options.Output:
    from synthkit.calibration.confidence import Target
    from synthkit.data.images import ImageSet
    from synthkit.recipes.device.update import DeviceSettings, adapt_bundle

    target = Target(values["coverage"], values["max_error"], values["max_miss"])
    settings = DeviceSettings(values["new_class"], target, values["force"], values["dry_run"])
    photos = ImageSet.scan(real_dir, values["skip_bad"], fewest=1)
    test = None
    if values["test_dir"]:
        test = ImageSet.scan(values["test_dir"], values["skip_bad"], fewest=1)
    found = adapt_bundle(values["bundle"], photos, test, settings)
    return options.Output(found, "\n".join(_device_lines(found)))


def _device_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What a person needs to know of an adaptation on the device."""
    if "held_out" in found:
        yield _compared("held-out photos", found["held_out"])
        if found["new_classes"]:
            yield _compared("  of the old classes among them", found["old_classes"])
        if found["remembered"]["photos"]:
            yield _compared("remembered photos of the other classes", found["remembered"])
    if "golden" in found:
        yield "golden inputs: {same_answer} of {inputs} answered as before".format(**found["golden"])
    if "top1" in found:
        yield f"test images: {found['top1_before']:.1%} -> {found['top1']:.1%} of {found['n_test']} right"
        if found["new_classes"]:
            yield _compared("  of the old classes among them", found["old_classes_tested"])
    yield from _confidence_lines(found.get("confidence", {}))
    yield _OUTCOMES[found["outcome"]].format(**found)


_OUTCOMES = {
    "adapted": "{bundle}: now version {version}; `synthkit adapt --bundle {bundle} --rollback` goes back",
    "kept": "{bundle}: stays at version {version}, because the new head does worse on held-out photos; "
    "--force takes it all the same",
    "unchanged": "{bundle}: nothing to do, version {version} has learnt these photos; --force adapts again",
    "would adapt": "{bundle}: would be adapted, nothing was written",
}


def _compared(what: str, shares: Mapping[str, Any]) -> str:
    if shares["before"] is None or shares["after"] is None:
        return f"{what}: none, so nothing is verified"
    return f"{what}: {shares['before']:.1%} -> {shares['after']:.1%} of {shares['photos']} right"


def _confidence_lines(confidence: Mapping[str, Any]) -> Iterator[str]:
    if "calibration_error_after" in confidence:
        before, after = (confidence[f"calibration_error_{when}"] for when in ("before", "after"))
        yield f"calibration error: {before:.3f} -> {after:.3f} (temperature {confidence['temperature']:.2f})"
    if "coverage" in confidence:
        yield (
            f'below {confidence["threshold"]:.5f} the answer is "unknown": {confidence["coverage"]:.1%} of '
            f"the held-out photos are answered, {confidence['error']:.1%} of these wrongly"
        )
    if "set_size" in confidence:
        size, miss = confidence["set_size"], confidence["set_miss"]
        yield f"sets of {size:.2f} labels on average miss {miss:.1%} of the held-out photos"


def _run_chain(
    workspace: Path,
    real_dir: Path,
    test_dir: Path | None,
    skip_bad: bool,
    no_synth: bool,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    from synthkit.artifacts import workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.data.splits import check_disjoint
    from synthkit.recipes.chain import Workspace, chain_stages, plan_chain

    photos, test = ImageSet.scan(real_dir, skip_bad), None
    if test_dir:
        test = ImageSet.scan(test_dir, skip_bad).with_classes(photos.classes)
        check_disjoint(photos, test, (str(real_dir), str(test_dir)))
    place = Workspace(workspace)
    settings, student_dir = _settings(place, config, values)
    how: dict[str, Any] = {"synth": not no_synth, "student_dir": student_dir, "test": test}
    if dry_run:
        plan = plan_chain(settings, place, photos, **how)
        return options.Output(
            {"plan": plan}, "\n".join(f"{name:<14} {state}" for name, state in plan.items())
        )
    with workspace_lock(workspace):
        results = list(chain_stages(settings, place, photos, **how, force=force))
    return _answer(results, place, test_dir, skip_bad)


def _settings(
    place: Workspace, config: Path | None, values: dict[str, Any]
) -> tuple[ChainSettings, Path | None]:
    """The settings of all stages, and the folder of a trained student where `--student` names one."""
    from synthkit.recipes.chain import ChainSettings, remembered_model
    from synthkit.recipes.settings import EngineSettings, ExportSettings

    student_dir = Path(values["student"]) if values["student"] and Path(values["student"]).is_dir() else None
    if student_dir:
        values = {**values, "student": None}
    settings = options.gather_settings(config, values, *_SECTIONS)
    flags = {field.name: values[field.name] for field in dataclasses.fields(EngineSettings)}
    chain = ChainSettings(
        remembered_model(settings["build-engines"], place, flags),
        settings["learn-style"],
        settings["generate"],
        settings["filter"],
        settings["train"],
        settings["adapt"],
        settings.get("export", ExportSettings()),  # from a recipe file; its options are those of `export`
    )
    return chain, student_dir


def _answer(
    results: Sequence[StageResult], place: Workspace, test_dir: Path | None, skip_bad: bool
) -> options.Output:
    """What was done, which path was taken and why, and the bundle's top-1 where there are test images."""
    from synthkit.engines.bundle.format import Bundle
    from synthkit.recipes.adaptation.adapt import describe
    from synthkit.recipes.device.evaluate import evaluate_bundle

    stages = {result.manifest.stage: "skipped" if result.skipped else "done" for result in results}
    seconds = round(sum(result.manifest.seconds for result in results if not result.skipped), 3)
    metrics = next(result.manifest.metrics for result in results if result.manifest.stage == "adapt")
    data = {"bundle": place.bundle, "stages": stages, **metrics, "seconds": seconds}
    lines = [f"{name:<14} {state}" for name, state in stages.items()]
    if all(result.skipped for result in results):
        lines.append("nothing has changed since the bundle was made")
    lines += [f"path: {metrics['path']}, {metrics['reason']}", describe(metrics["cross_validation"])]
    lines.append(f"bundle: {place.bundle}")
    if test_dir:
        measured = evaluate_bundle(Bundle.open(place.bundle), test_dir, skip_bad)
        data |= {**measured, "seconds": seconds}
        lines.append(f"top-1 on {measured['n_test']} test images: {measured['top1']:.3f}")
    return options.Output(data, "\n".join(line for line in lines if line))
