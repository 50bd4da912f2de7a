"""`adapt --bundle`: a bundle meets new photos on the device. Its last layer is refitted, without torch.

    new photos ──bodies in ONNX Runtime──► features ─┐                    worse on held-out photos: stays
    memory of earlier photos ────────────────────────┼─ head.py, NumPy ─► else: next version, old one kept
    present head (the prior) ────────────────────────┘

Each precision gets a head for the features of its own body, so that int8 answers for its own rounding; the
strength of the prior and the verdict come from the default precision. The fitted temperature goes into the
head's numbers, so that every runtime gives the calibrated probabilities.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthkit.artifacts import MANIFEST, Manifest, digest, list_outputs, read_manifest, versions, write_json
from synthkit.calibration.confidence import Confidence, Target, fit_confidence
from synthkit.calibration.head import LinearHead, fit_head
from synthkit.data.images import ImageSet
from synthkit.engines.bundle.format import Bundle
from synthkit.engines.bundle.versions import find_again, install, next_version, work_folder
from synthkit.errors import DataError
from synthkit.recipes.device.device_site import Site, distinct, grown_labels, look_at_site, refuse_seen
from synthkit.recipes.device.device_verdict import Verdict, evidence, judge, measure_heads, same_answers
from synthkit.recipes.device.device_write import Refit, write_version

log = logging.getLogger(__name__)

STAGE = "adapt-bundle"
ADAPTED, KEPT, UNCHANGED, WOULD_ADAPT = "adapted", "kept", "unchanged", "would adapt"


@dataclass(frozen=True)
class DeviceSettings:
    """What the user asks for.

    Attributes:
        new_classes: folders of photos that the bundle does not know and shall learn.
        target: what the user asks of the answers.
        force: adapt again, and take the new head whatever the held-out photos say.
        dry_run: judge, and write nothing.
    """

    new_classes: tuple[str, ...] = ()
    target: Target = field(default_factory=Target)
    force: bool = False
    dry_run: bool = False


def adapt_bundle(
    folder: Path, photos: ImageSet, test: ImageSet | None, settings: DeviceSettings
) -> dict[str, Any]:
    """Refit a bundle's head to photos, and put the result in its place unless it is worse.

    Args:
        folder: the bundle.
        photos: class folders; a class of the bundle may be absent.
        test: measures the bundle before and after; None: only the photos themselves do.
        settings: what the user asks for.

    Returns:
        outcome (`ADAPTED`, `KEPT`, `UNCHANGED` or `WOULD_ADAPT`), version, what was measured, seconds.

    Raises:
        BundleError: the bundle is not whole, or has no head on record.
        DataError: photos, classes or test images cannot be used.
        WorkspaceError: the bundle is held by another run, or nothing can be written beside it.
    """
    started = time.perf_counter()
    find_again(folder)
    opened = Bundle.open(folder)
    labels = grown_labels(opened, photos, settings.new_classes)
    photos = distinct(photos.with_classes(labels))
    if test is not None:
        test = test.with_classes(labels)
        refuse_seen(opened, photos, test)
    request = _request(photos, settings)
    if not settings.force and _is_done(folder, request):
        return _answer(opened, UNCHANGED, {}, started)
    site = _protected(look_at_site(opened, labels, photos), settings)
    verdict = judge(site)
    found = evidence(site, verdict)
    if verdict.worse and not settings.force:
        return _answer(opened, KEPT, found, started)
    refit = _refit(site, verdict, settings.target, test)
    found |= _figures(site, refit)
    if settings.dry_run:
        return _answer(opened, WOULD_ADAPT, found, started)
    with work_folder(folder) as work:
        version = next_version(folder)
        write_version(site, refit, version, work)
        _write_manifest(work, request, found, started)
        install(folder, work)
    return {**_answer(opened, ADAPTED, found, started), "version": version}


def _request(photos: ImageSet, settings: DeviceSettings) -> dict[str, Any]:
    config = {**asdict(settings.target), "new_classes": list(settings.new_classes)}
    return {"photos": photos.digest, "config": config}


def _is_done(folder: Path, request: Mapping[str, Any]) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.stage == STAGE and manifest.key == digest(request)


def _protected(site: Site, settings: DeviceSettings) -> Site:
    """The site, where something shows the old classes to a new one, or else they would be taken for it.

    With --force the golden inputs stand in for them, labelled by the present head.
    """
    seen = {*site.photos.labels.tolist(), *site.memory.labels.tolist()}
    unseen = [name for place, name in enumerate(site.bundle.labels) if place not in seen]
    if len(site.labels) > site.known and len(unseen) == site.known:
        if not settings.force:
            raise DataError(
                f"neither {site.photos.root} nor the bundle's memory shows an old class, so that the new one "
                "would be seen everywhere; add about four photos of each old class, or take the loss with "
                "--force"
            )
        site = site.with_golden_memory()
    if unseen:
        log.warning("no photo, new or remembered, shows %s: kept as they are", ", ".join(unseen))
    return site


def _refit(site: Site, verdict: Verdict, target: Target, test: ImageSet | None) -> Refit:
    confidence = _confidence(site, verdict, target)
    heads: dict[str, LinearHead] = {}
    for name, head in site.heads.items():
        fitted = fit_head(head, *site.examples(name), len(site.labels), verdict.choice.strength)
        heads[name] = fitted.restrained(verdict.choice.restraint).divided(confidence.temperature)
    return Refit(heads, verdict, confidence, measure_heads(site, heads, test) if test else {})


def _confidence(site: Site, verdict: Verdict, asked: Target) -> Confidence:
    """As asked for; what an earlier version was asked for stays in force where nothing is asked now."""
    before = site.bundle.facts.get("confidence") or {}
    unseen = verdict.fresh | (verdict.choice.rows >= len(site.photos))
    logits, labels = verdict.choice.logits[unseen], verdict.labels[unseen]
    if asked != Target():
        return fit_confidence(logits, labels, asked)
    try:
        return fit_confidence(logits, labels, Target(**before.get("target", {})))
    except DataError as error:
        log.warning("the threshold of the version before stays: %s", error)
        return Confidence(1.0, before["threshold"], before["set_minimum"], before)


def _figures(site: Site, refit: Refit) -> dict[str, Any]:
    """What only the finished heads show; the contract's keys come from the default precision."""
    found = {
        "golden": same_answers(site, refit.heads[site.precision]),
        "confidence": refit.confidence.to_json(),
    }
    if not refit.tested:
        return found
    own = dict(refit.tested[site.precision])
    own["old_classes_tested"] = own.pop("old_classes")
    return {**found, **own, "precisions": {name: one["top1"] for name, one in refit.tested.items()}}


def _write_manifest(work: Path, request: Mapping[str, Any], found: Mapping[str, Any], started: float) -> None:
    made = Manifest(
        stage=STAGE,
        version=1,
        key=digest(request),
        inputs={"photos": str(request["photos"])},
        settings={},
        resolved=dict(request["config"]),
        versions=versions(),
        metrics=dict(found),
        outputs=list_outputs(work),
        seconds=round(time.perf_counter() - started, 3),
    )
    write_json(work / MANIFEST, asdict(made))


def _answer(bundle: Bundle, outcome: str, found: Mapping[str, Any], started: float) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "bundle": str(bundle.folder),
        "version": bundle.facts["version"],
        **found,
        "seconds": round(time.perf_counter() - started, 3),
    }
