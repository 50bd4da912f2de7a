"""The next version of a bundle: the present one with other heads, and every figure that they change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import standalone
from synthkit.artifacts import MANIFEST, write_bytes, write_json
from synthkit.calibration.confidence import Confidence
from synthkit.calibration.head import LinearHead
from synthkit.data.images import ImageSet, Preprocessing
from synthkit.engines.bundle import format as bundles
from synthkit.engines.bundle.format import FP32, INPUT, OUTPUT, Golden
from synthkit.engines.bundle.head import HeadFile
from synthkit.engines.bundle.replay_buffer import MEMORY, PER_CLASS, Memory, write_memory
from synthkit.engines.runtime.session import open_session
from synthkit.errors import BundleError
from synthkit.recipes.device.device_site import Site
from synthkit.recipes.device.device_verdict import Verdict

#: Largest difference between a file's logits and its head in NumPy on the same features, as a part of the
#: largest logit: the order of the sums in fp32 and int8 (whose head is float), 11 bits in fp16.
_PARITY = {"fp32": 1e-4, "fp16": 1e-2, "int8": 1e-4}


@dataclass(frozen=True)
class Refit:
    """What goes into the next version.

    Attributes:
        heads: precision -> its new head.
        verdict: how it came about.
        confidence: temperature (already in the heads), threshold and set minimum.
        tested: precision -> figures on test images; empty without them.
    """

    heads: Mapping[str, LinearHead]
    verdict: Verdict
    confidence: Confidence
    tested: Mapping[str, Mapping[str, Any]]


def write_version(site: Site, refit: Refit, version: int, work: Path) -> None:
    """Write the whole next version into an empty folder; bundle.json comes last, then the parity check.

    Raises:
        BundleError: the new version fails a check.
    """
    facts = dict(site.bundle.facts)
    lineage = _lineage(site, refit, version)
    _copy_unchanged(site.bundle.folder, facts["files"], work)
    for name, head in refit.heads.items():
        content = site.models[name].with_head(head.weight, head.bias, site.labels, lineage)
        write_bytes(work / facts["precisions"][name]["file"], content)
    write_bytes(work / "labels.txt", "".join(f"{label}\n" for label in site.labels).encode())
    write_bytes(work / "predict.py", Path(standalone.__file__).read_bytes())
    _write_golden(site, refit.heads, work)
    write_memory(work, site.memory.after(Memory(site.photos.labels, site.sha256, site.features)))
    _write_confidence(refit.confidence, work)
    _write_target(site, work)
    facts |= {
        "version": version,
        "output": {**facts["output"], "shape": ["batch", len(site.labels)]},
        "precisions": _precisions(site, refit, work),
        "lineage": lineage,
        "confidence": refit.confidence.to_json(),
    }
    bundles.seal(work, facts)
    if failures := bundles.verify(work):
        raise BundleError(
            f"the next version fails its own check: {'; '.join(failures)}; the present one stays"
        )


def _write_confidence(confidence: Confidence, work: Path) -> None:
    limits = {"threshold": confidence.threshold, "set_minimum": confidence.set_minimum}
    if any(value is not None for value in limits.values()):
        write_json(work / standalone.CONFIDENCE, limits)


def _copy_unchanged(folder: Path, files: Mapping[str, Any], work: Path) -> None:
    made_anew = {MEMORY, standalone.CONFIDENCE, MANIFEST, "golden.npz", "labels.txt", "predict.py"}
    for name in files:
        if name not in made_anew and not name.endswith(".onnx") and not name.startswith("target/"):
            shutil.copy2(folder / name, work / name)


def _write_target(site: Site, work: Path) -> None:
    """The files of another system hold the head and the labels as well."""
    from synthkit.engines.bundle.targets import Material, write_target

    facts = site.bundle.facts
    held, default = list(facts["precisions"]), str(facts["default_precision"])
    images = site.golden_inputs[:4]
    material = Material(work, held, default, site.labels, site.bundle.preprocessing, images)
    write_target(facts.get("target", "generic"), material)


def remember(folder: Path, photos: ImageSet) -> None:
    """Give a bundle the memory of the photos that it was trained on, and seal it again.

    A bundle whose last layer is not on record is left as it is: a device cannot refit it.

    Args:
        folder: a bundle that was just exported.
        photos: labelled in the order of its logits.
    """
    facts = bundles.read_facts(folder)
    kept = [np.flatnonzero(photos.labels == label)[:PER_CLASS] for label in range(len(photos.classes))]
    photos = photos.subset(np.concatenate(kept))
    inputs = photos.load(Preprocessing.from_timm(json.loads((folder / "preprocess.json").read_text())))
    features = {
        name: HeadFile.open(folder, stated).body()(inputs)
        for name, stated in facts["precisions"].items()
        if stated["head"]
    }
    if features:
        sha256 = np.array([item.sha256 for item in photos.items])
        write_memory(folder, Memory(photos.labels, sha256, features))
        bundles.seal(folder, facts)


def _lineage(site: Site, refit: Refit, version: int) -> dict[str, Any]:
    before = site.bundle.facts["lineage"]
    step = {
        "version": version,
        "from_version": site.bundle.facts["version"],
        "photos": site.photos.digest,
        "strength": refit.verdict.choice.strength,
        "new_classes": list(site.labels[site.known :]),
    }
    trained_on = sorted({*before.get("trained_on", []), *site.sha256.tolist()})
    return {**before, "trained_on": trained_on, "adapted": [*before.get("adapted", []), step]}


def _write_golden(site: Site, heads: Mapping[str, LinearHead], work: Path) -> None:
    """What the heads give in NumPy on the golden features, which the edited files must then give as well."""
    logits = {name: head.logits(site.golden[name]) for name, head in heads.items()}
    own = {name: values for name, values in logits.items() if name != FP32}
    bundles.write_golden(work, Golden(site.golden_inputs, logits[FP32], own))


def _precisions(site: Site, refit: Refit, work: Path) -> dict[str, Any]:
    """The facts of each precision with the figures that a new head changes."""
    answers = {name: head.logits(site.features[name]).argmax(axis=1) for name, head in refit.heads.items()}
    found = {}
    for name, entry in site.bundle.facts["precisions"].items():
        parity = _check_parity(site, name, refit.heads[name], work / entry["file"])
        parity["top1_agreement_with_fp32"] = float(np.mean(answers[name] == answers[FP32]))
        accuracy = refit.tested.get(name)
        if accuracy is None and name == site.precision:
            accuracy = _cross_validated(refit.verdict)
        found[name] = {**entry, "parity": parity, "accuracy": accuracy}
    return found


def _check_parity(site: Site, precision: str, head: LinearHead, path: Path) -> dict[str, Any]:
    """Compare an edited file with its head in NumPy on the features of the golden inputs.

    Raises:
        BundleError: they differ.
    """
    expected = head.logits(site.golden[precision])
    session = open_session(path, exact_int8=site.models[precision].exact_int8)
    found = session.run({INPUT: site.golden_inputs})[OUTPUT]
    error, allowed = float(np.abs(found - expected).max()), _PARITY[precision] * float(np.abs(expected).max())
    if not error <= allowed:  # NaN too
        raise BundleError(
            f"{path.name} with its new head differs from the fit by {error:.2g}, allowed are {allowed:.2g}; "
            "the present version stays"
        )
    return {
        "reference": "the refitted head in NumPy on the features of this file's body",
        "max_abs_error": error,
        "tolerance": allowed,
        "top1_agreement": float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1))),
        "images": len(found),
        "finite": bool(np.isfinite(found).all()),
    }


def _cross_validated(verdict: Verdict) -> dict[str, Any] | None:
    if verdict.overall.after is None:
        return None
    how = f"{verdict.choice.folds}-fold cross-validation on the photos of the device"
    return {"top1": verdict.overall.after, "n_test": verdict.overall.photos, "how": how}
