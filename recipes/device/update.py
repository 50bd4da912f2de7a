"""A bundle meets new photos on the device: its last layer is refitted, without torch.

    new photos ──bodies in ONNX Runtime──► features ─┐                    worse on held-out photos: stays
    replay buffer: features of earlier photos ───────┼─ head.py, NumPy ─► else: next version, old one kept
    present head (the prior) ────────────────────────┘

Each precision gets a head for the features of its own body, so that int8 answers for its own rounding; the
weight of the prior and the comparison come from the default precision. The fitted temperature goes into the
head's numbers, so that every runtime gives the calibrated probabilities.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from synthkit import standalone
from synthkit.artifacts import (
    MANIFEST,
    Manifest,
    digest,
    list_outputs,
    read_manifest,
    versions,
    write_bytes,
    write_json,
)
from synthkit.calibration.confidence import Confidence, Target, fit_confidence
from synthkit.calibration.head import Examples, LinearHead, PriorChoice, choose_prior_weight, fit_head
from synthkit.data.images import ImageSet
from synthkit.data.splits import refuse_shared
from synthkit.engines.bundle import format as bundles
from synthkit.engines.bundle.format import FP32, INPUT, OUTPUT, Bundle, Golden
from synthkit.engines.bundle.head import HeadFile
from synthkit.engines.bundle.replay_buffer import (
    REPLAY_BUFFER,
    ReplayBuffer,
    read_replay_buffer,
    write_replay_buffer,
)
from synthkit.engines.bundle.versions import find_again, install, next_version, work_folder
from synthkit.engines.runtime.session import open_session
from synthkit.errors import BundleError, DataError, abridged, nearest
from synthkit.metrics import classification as metrics

log = logging.getLogger(__name__)

STAGE = "update"
UPDATED, KEPT, UNCHANGED, WOULD_UPDATE = "updated", "kept", "unchanged", "would update"

_CHUNK = 256  # images decoded at once

#: Largest difference between a file's logits and its head in NumPy on the same features, as a part of the
#: largest logit: the order of the sums in fp32 and int8 (whose head is float), 11 bits in fp16.
_PARITY = {"fp32": 1e-4, "fp16": 1e-2, "int8": 1e-4}


@dataclass(frozen=True)
class UpdateSettings:
    """What the user asks for.

    Attributes:
        new_classes: folders of photos that the bundle does not know and shall learn.
        target: what the user asks of the answers.
        force: update again, and take the new head whatever the held-out photos say.
        dry_run: compare, and write nothing.
    """

    new_classes: tuple[str, ...] = ()
    target: Target = field(default_factory=Target)
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class BeforeAfter:
    """Both heads on the same photos.

    Attributes:
        photos: their number.
        before: share that the present head gets right; None where there are none.
        after: the same of the new head.
    """

    photos: int
    before: float | None
    after: float | None

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> BeforeAfter:
        """From which photos are right, bool [N]."""
        return cls(len(before), *(float(right.mean()) if len(right) else None for right in (before, after)))


@dataclass(frozen=True)
class HeldOut:
    """What cross-validation measured.

    Attributes:
        overall: both heads on photos that neither has been fitted to.
        old_classes: both on those of them whose class the bundle knows already.
        replayed: both on photos of the replay buffer whose class the new photos lack; the present head was
            trained on these.
        folds: number of heads that were fitted; 0: no photo could be held out.
        prior_weight: how firmly the present head is held.
    """

    overall: BeforeAfter
    old_classes: BeforeAfter
    replayed: BeforeAfter
    folds: int
    prior_weight: float

    @property
    def is_worse(self) -> bool:
        """True if the new head gets fewer of the held-out photos right."""
        before, after = self.overall.before, self.overall.after
        return before is not None and after is not None and after < before


@dataclass(frozen=True)
class TestFigures:
    """The refitted head of one precision on test images.

    Attributes:
        top1: share that it gets right.
        n_test: number of test images.
        interval: 95 % interval of top1 (Wilson).
        per_class: class name -> top1.
        top1_before: share that the present head gets right.
        old_classes: both heads on the images of the classes that the bundle knows already.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    top1: float
    n_test: int
    interval: tuple[float, float]
    per_class: Mapping[str, float]
    top1_before: float
    old_classes: BeforeAfter


@dataclass(frozen=True)
class UpdateResult:
    """The answer of an update.

    Attributes:
        outcome: `UPDATED`, `KEPT`, `UNCHANGED` or `WOULD_UPDATE`.
        bundle: the bundle's folder.
        version: the version that lies there now.
        seconds: how long it took.
        photos: class name -> number of photos; empty where nothing had to be done, as all that follows.
        new_classes: the classes that were added.
        held_out: both heads on held-out photos.
        golden: number of golden "inputs", and on how many of them both heads give the "same_answer".
        confidence: what was fitted; None where the bundle was kept.
        tested: precision -> figures on test images; empty without them.
        precision: the bundle's default, whose figures stand for the bundle.
    """

    outcome: str
    bundle: str
    version: int
    seconds: float
    photos: Mapping[str, int] = field(default_factory=dict)
    new_classes: tuple[str, ...] = ()
    held_out: HeldOut | None = None
    golden: Mapping[str, int] = field(default_factory=dict)
    confidence: Confidence | None = None
    tested: Mapping[str, TestFigures] = field(default_factory=dict)
    precision: str = FP32

    @property
    def test(self) -> TestFigures | None:
        """Figures of the default precision on the test images; None without them."""
        return self.tested.get(self.precision)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `synthkit update --json`; what was not measured is absent."""
        data: dict[str, Any] = {
            "outcome": self.outcome,
            "bundle": self.bundle,
            "version": self.version,
            "seconds": self.seconds,
        }
        if self.held_out is not None:
            held_out = asdict(self.held_out)
            data |= {"photos": dict(self.photos), "new_classes": list(self.new_classes)}
            data["held_out"] = {**held_out.pop("overall"), "folds": held_out.pop("folds")}
            data |= held_out
        if self.confidence is not None:
            data |= {"golden": dict(self.golden), "confidence": self.confidence.to_json()}
        if self.test is not None:
            own = asdict(self.test)
            own["old_classes_tested"] = own.pop("old_classes")
            data |= own | {"precisions": {name: figures.top1 for name, figures in self.tested.items()}}
        return data


def update_bundle(
    folder: Path,
    photos: ImageSet,
    test: ImageSet | None = None,
    settings: UpdateSettings = UpdateSettings(),
) -> UpdateResult:
    """Refit a bundle's head to photos, and put the result in its place unless it is worse.

    Args:
        folder: the bundle.
        photos: class folders; a class of the bundle may be absent.
        test: measures the bundle before and after; None: only the photos themselves do.
        settings: what the user asks for.

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
        refuse_trained_on(opened, photos, test)
    request = _request(photos, settings)
    if not settings.force and _is_done(folder, request):
        return _result(opened, UNCHANGED, started)
    data = _protected(prepare(opened, labels, photos), settings)
    validation = cross_validate(data)
    measured: dict[str, Any] = {
        "photos": photos.counts(),
        "new_classes": labels[data.known :],
        "held_out": validation.held_out,
        "precision": data.precision,
    }
    if validation.held_out.is_worse and not settings.force:
        return _result(opened, KEPT, started, **measured)
    refitted = _refit(data, validation, settings.target, test)
    measured |= {
        "golden": same_answers(data, refitted.heads[data.precision]),
        "confidence": refitted.confidence,
        "tested": refitted.tested,
    }
    if settings.dry_run:
        return _result(opened, WOULD_UPDATE, started, **measured)
    with work_folder(folder) as work:
        measured["version"] = next_version(folder)
        write_version(data, refitted, measured["version"], work)
        _write_manifest(work, request, _result(opened, UPDATED, started, **measured))
        install(folder, work)
    return _result(opened, UPDATED, started, **measured)


def _request(photos: ImageSet, settings: UpdateSettings) -> dict[str, Any]:
    config = {**asdict(settings.target), "new_classes": list(settings.new_classes)}
    return {"photos": photos.digest, "config": config}


def _is_done(folder: Path, request: Mapping[str, Any]) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and manifest.stage == STAGE and manifest.key == digest(request)


def _protected(data: UpdateData, settings: UpdateSettings) -> UpdateData:
    """The data, where something shows the old classes to a new one, or else they would be taken for it.

    With --force the golden inputs stand in for them, labelled by the present head.
    """
    seen = {*data.photos.labels.tolist(), *data.replay_buffer.labels.tolist()}
    unseen = [name for place, name in enumerate(data.bundle.labels) if place not in seen]
    if len(data.labels) > data.known and len(unseen) == data.known:
        if not settings.force:
            raise DataError(
                f"neither {data.photos.root} nor the bundle's replay buffer shows an old class, so that the "
                "new one would be seen everywhere; add about four photos of each old class, or take the loss "
                "with --force"
            )
        data = data.with_golden_replay()
    if unseen:
        log.warning("no photo, new or in the replay buffer, shows %s: kept as they are", ", ".join(unseen))
    return data


def _refit(
    data: UpdateData, validation: CrossValidation, target: Target, test: ImageSet | None
) -> RefittedHeads:
    choice, confidence = validation.choice, _confidence(data, validation, target)
    heads: dict[str, LinearHead] = {}
    for name, head in data.heads.items():
        fitted = fit_head(head, *data.examples(name), len(data.labels), choice.prior_weight)
        heads[name] = fitted.with_logit_offset(validation.choice.logit_offset).with_temperature(
            confidence.temperature
        )
    return RefittedHeads(heads, validation, confidence, measure_heads(data, heads, test) if test else {})


def _confidence(data: UpdateData, validation: CrossValidation, asked: Target) -> Confidence:
    """As asked for; what an earlier version was asked for stays in force where nothing is asked now.

    Only photos that no head has learned count. Replayed photos are held out of the new head, but its prior
    was trained on these very photos: with them a claimed error of 4 % was one of 23 % on further photos.
    """
    before = data.bundle.facts.confidence or {}
    logits, labels = validation.choice.logits[validation.fresh], validation.labels[validation.fresh]
    lacking = [name for place, name in enumerate(data.labels) if place not in set(labels.tolist())]
    target = asked if asked != Target() else Target(**before.get("target", {}))
    try:
        if lacking and target != Target():
            raise DataError(
                "a threshold needs two new photos or more of every class, for a few do not speak for all; "
                f"there are none of {abridged(lacking, 6, ', ')}; add photos, or leave the target out"
            )
        if lacking:
            return Confidence(1.0, None, None, {"photos": len(labels)})
        return fit_confidence(logits, labels, target)
    except DataError as error:
        if asked != Target():
            raise
        log.warning("the threshold of the version before stays: %s", error)
        return Confidence(1.0, before["threshold"], before["conformal_threshold"], before)


def _write_manifest(work: Path, request: Mapping[str, Any], result: UpdateResult) -> None:
    made = Manifest(
        stage=STAGE,
        version=1,
        key=digest(request),
        inputs={"photos": str(request["photos"])},
        settings={},
        resolved=dict(request["config"]),
        versions=versions(),
        metrics=result.to_json(),
        outputs=list_outputs(work),
        seconds=result.seconds,
    )
    write_json(work / MANIFEST, asdict(made))


def _result(bundle: Bundle, outcome: str, started: float, **measured: Any) -> UpdateResult:
    measured = {"version": bundle.facts.version, **measured}
    return UpdateResult(
        outcome, str(bundle.folder), seconds=round(time.perf_counter() - started, 3), **measured
    )


@dataclass(frozen=True)
class UpdateData:
    """Everything that is known before a head is fitted.

    Attributes:
        bundle: the opened bundle.
        labels: its class names, then the new ones.
        photos: grouped by class and ordered by content, labelled by position in `labels`.
        models: precision -> the model file.
        heads: precision -> its present head.
        features: precision -> features of the photos [N, width].
        golden: precision -> features of the golden inputs.
        golden_inputs: uint8 [N, height, width, 3].
        replay_buffer: earlier photos, none of which are among these.
        bodies: precision -> images to features.
    """

    bundle: Bundle
    labels: tuple[str, ...]
    photos: ImageSet
    models: Mapping[str, HeadFile]
    heads: Mapping[str, LinearHead]
    features: Mapping[str, np.ndarray]
    golden: Mapping[str, np.ndarray]
    golden_inputs: np.ndarray
    replay_buffer: ReplayBuffer
    bodies: Mapping[str, Callable[[np.ndarray], np.ndarray]]

    @property
    def precision(self) -> str:
        """The bundle's default."""
        return str(self.bundle.facts.default_precision)

    @property
    def known(self) -> int:
        """Number of classes of the bundle as it is."""
        return len(self.bundle.labels)

    @property
    def sha256(self) -> np.ndarray:
        """Of the photos' files [N]."""
        return np.array([item.sha256 for item in self.photos.items])

    def examples(self, precision: str) -> tuple[Examples, Examples]:
        """The photos and the replay buffer, as the head of a precision sees them."""
        replayed = Examples(self.replay_buffer.features[precision], self.replay_buffer.labels)
        return Examples(self.features[precision], self.photos.labels), replayed

    def with_golden_replay(self) -> UpdateData:
        """The data with the golden inputs as replay buffer, labelled as the present head sees them."""
        labels = self.heads[self.precision].logits(self.golden[self.precision]).argmax(axis=1)
        sha256 = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in self.golden_inputs])
        return replace(self, replay_buffer=ReplayBuffer(labels, sha256, self.golden))


def prepare(bundle: Bundle, labels: tuple[str, ...], photos: ImageSet) -> UpdateData:
    """Run every body over the photos and the golden inputs."""
    precisions = bundle.facts.precisions
    models = {name: HeadFile.open(bundle.folder, stated) for name, stated in precisions.items()}
    heads = {name: LinearHead(*model.weight_and_bias()) for name, model in models.items()}
    bodies = {name: model.body() for name, model in models.items()}
    with np.load(bundle.folder / "golden.npz") as golden:
        golden_inputs = golden["inputs"]
    inputs = photos.load(bundle.preprocessing)
    widths = {name: head.weight.shape[1] for name, head in heads.items()}
    sha256 = np.array([item.sha256 for item in photos.items])
    return UpdateData(
        bundle,
        labels,
        photos,
        models,
        heads,
        {name: body(inputs) for name, body in bodies.items()},
        {name: body(golden_inputs) for name, body in bodies.items()},
        golden_inputs,
        read_replay_buffer(bundle.folder, widths).without(sha256),
        bodies,
    )


def grown_labels(bundle: Bundle, photos: ImageSet, new: tuple[str, ...]) -> tuple[str, ...]:
    """The bundle's classes, then the new ones, so that no old class changes its place.

    Raises:
        DataError: a folder names no class of either, a new class has no folder, or nothing can be told apart.
    """
    unknown = [name for name in photos.classes if name not in (*bundle.labels, *new)]
    if unknown:
        raise DataError(
            f"{photos.root} shows classes that the bundle does not know: {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], bundle.labels)}; known are {', '.join(bundle.labels)}; rename the "
            f"folder, or add the class with --new-class {unknown[0]!r}"
        )
    absent = [name for name in new if name not in photos.classes]
    if absent:
        raise DataError(f"--new-class {absent[0]!r}: {photos.root} has no folder of that name")
    added = tuple(name for name in photos.classes if name not in bundle.labels)
    if not added and len(photos.classes) == 1:
        raise DataError(
            f"{photos.root} shows one class only, {photos.classes[0]!r}, which the bundle knows; add photos "
            "of the classes that it is taken for, or every answer would become that one"
        )
    return (*bundle.labels, *added)


def distinct(photos: ImageSet) -> ImageSet:
    """The photos without copies.

    Raises:
        DataError: one photo lies in two classes.
    """
    first: dict[str, int] = {}
    kept = []
    for place, item in enumerate(photos.items):
        if first.setdefault(item.sha256, item.label) != item.label:
            raise DataError(
                f"{item.path} lies in the class {photos.classes[item.label]!r} and, with the same content, "
                f"in {photos.classes[first[item.sha256]]!r}; remove it from one of them"
            )
        if place == 0 or photos.items[place - 1].sha256 != item.sha256:
            kept.append(place)
    return photos.subset(kept)


def refuse_trained_on(bundle: Bundle, photos: ImageSet, test: ImageSet) -> None:
    """Refuse test images that the bundle was trained on or is about to be.

    Raises:
        DataError: names some of them.
    """
    known = dict.fromkeys(bundle.facts.provenance.get("trained_on", []), "trained on")
    refuse_shared(test, known, ("the photos that the bundle was trained on", str(test.root)))
    known = {item.sha256: str(item.path) for item in photos.items}
    refuse_shared(test, known, (str(photos.root), str(test.root)))


@dataclass(frozen=True)
class CrossValidation:
    """The weight of the prior that held-out photos choose, and both heads on them.

    Attributes:
        choice: weight of the prior, and the new head's logits of held-out examples.
        labels: of these examples [N].
        fresh: which of them are photos that the present head was not trained on either, bool [N].
        held_out: both heads on them.
    """

    choice: PriorChoice
    labels: np.ndarray
    fresh: np.ndarray
    held_out: HeldOut


def cross_validate(data: UpdateData) -> CrossValidation:
    """Choose the weight of the prior, and compare both heads on photos that neither has been fitted to."""
    photos, replayed = data.examples(data.precision)
    head = data.heads[data.precision]
    choice = choose_prior_weight(head, photos, replayed, len(data.labels))
    held_out = photos.concat(replayed).select(choice.rows)
    trained_on = data.bundle.facts.provenance.get("trained_on", [])
    known = np.concatenate([np.isin(data.sha256, trained_on), np.ones(len(replayed), bool)])
    fresh = ~known[choice.rows]
    before = head.logits(held_out.features).argmax(axis=1) == held_out.labels
    after = choice.logits.argmax(axis=1) == held_out.labels
    groups = fresh, fresh & (held_out.labels < data.known), choice.rows >= len(photos)
    overall, old, replay = (BeforeAfter.of(before[group], after[group]) for group in groups)
    figures = HeldOut(overall, old, replay, choice.folds, choice.prior_weight)
    return CrossValidation(choice, held_out.labels, fresh, figures)


def same_answers(data: UpdateData, head: LinearHead) -> dict[str, int]:
    """Number of golden inputs, photos of the old classes, and of those that both heads answer alike."""
    features = data.golden[data.precision]
    before, after = (one.logits(features).argmax(axis=1) for one in (data.heads[data.precision], head))
    return {"inputs": len(features), "same_answer": int(np.sum(before == after))}


def measure_heads(
    data: UpdateData, heads: Mapping[str, LinearHead], test: ImageSet
) -> dict[str, TestFigures]:
    """Both heads of every precision on the test images."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in heads}
    for start in range(0, len(test), _CHUNK):
        inputs = test.subset(range(start, min(start + _CHUNK, len(test)))).load(data.bundle.preprocessing)
        for name, body in data.bodies.items():
            features = body(inputs)
            both = (head.logits(features).argmax(axis=1) for head in (data.heads[name], heads[name]))
            found[name].append(np.stack(list(both)))
    return {name: _measured(test, np.concatenate(parts, axis=1), data.known) for name, parts in found.items()}


def _measured(test: ImageSet, predicted: np.ndarray, known: int) -> TestFigures:
    """Figures from the class indices that the present and the new head give [2, N]."""
    labels = test.labels
    before, after = predicted == labels
    old = labels < known
    return TestFigures(
        top1=float(after.mean()),
        n_test=len(labels),
        interval=metrics.wilson_interval(int(after.sum()), len(labels)),
        per_class=metrics.per_class(predicted[1], labels, test.classes),
        top1_before=float(before.mean()),
        old_classes=BeforeAfter.of(before[old], after[old]),
    )


@dataclass(frozen=True)
class RefittedHeads:
    """What goes into the next version.

    Attributes:
        heads: precision -> its new head.
        validation: what cross-validation chose and measured.
        confidence: temperature (already in the heads), threshold and conformal threshold.
        tested: precision -> figures on test images; empty without them.
    """

    heads: Mapping[str, LinearHead]
    validation: CrossValidation
    confidence: Confidence
    tested: Mapping[str, TestFigures]


def write_version(data: UpdateData, refitted: RefittedHeads, version: int, work: Path) -> None:
    """Write the whole next version into an empty folder; bundle.json comes last, then the parity check.

    Raises:
        BundleError: the new version fails a check.
    """
    facts = data.bundle.facts
    provenance = _provenance(data, refitted, version)
    _copy_unchanged(data.bundle.folder, facts.files, work)
    for name, head in refitted.heads.items():
        content = data.models[name].with_head(head.weight, head.bias, data.labels, provenance)
        write_bytes(work / facts.precisions[name]["file"], content)
    write_bytes(work / "labels.txt", "".join(f"{label}\n" for label in data.labels).encode())
    write_bytes(work / "predict.py", Path(standalone.__file__).read_bytes())
    _write_golden(data, refitted.heads, work)
    write_replay_buffer(
        work, data.replay_buffer.updated_with(ReplayBuffer(data.photos.labels, data.sha256, data.features))
    )
    _write_confidence(refitted.confidence, work)
    _write_target(data, work)
    changed = replace(
        facts,
        version=version,
        output={**facts.output, "shape": ["batch", len(data.labels)]},
        precisions=_precisions(data, refitted, work),
        provenance=provenance,
        confidence=refitted.confidence.to_json(),
    )
    bundles.seal(work, changed)
    if failures := bundles.verify(work):
        raise BundleError(
            f"the next version fails its own check: {'; '.join(failures)}; the present one stays"
        )


def _write_confidence(confidence: Confidence, work: Path) -> None:
    limits = {"threshold": confidence.threshold, "conformal_threshold": confidence.conformal_threshold}
    if any(value is not None for value in limits.values()):
        write_json(work / standalone.CONFIDENCE, limits)


def _copy_unchanged(folder: Path, files: Mapping[str, Any], work: Path) -> None:
    made_anew = {REPLAY_BUFFER, standalone.CONFIDENCE, MANIFEST, "golden.npz", "labels.txt", "predict.py"}
    for name in files:
        if name not in made_anew and not name.endswith(".onnx") and not name.startswith("target/"):
            shutil.copy2(folder / name, work / name)


def _write_target(data: UpdateData, work: Path) -> None:
    """The files of another system hold the head and the labels as well."""
    from synthkit.engines.bundle.targets import BundleContents, write_target

    facts = data.bundle.facts
    held, default = list(facts.precisions), str(facts.default_precision)
    images = data.golden_inputs[:4]
    contents = BundleContents(work, held, default, data.labels, data.bundle.preprocessing, images)
    write_target(facts.target or "generic", contents)


def _provenance(data: UpdateData, refitted: RefittedHeads, version: int) -> dict[str, Any]:
    before = data.bundle.facts.provenance
    step = {
        "version": version,
        "from_version": data.bundle.facts.version,
        "photos": data.photos.digest,
        "prior_weight": refitted.validation.choice.prior_weight,
        "new_classes": list(data.labels[data.known :]),
    }
    trained_on = sorted({*before.get("trained_on", []), *data.sha256.tolist()})
    return {**before, "trained_on": trained_on, "updates": [*before.get("updates", []), step]}


def _write_golden(data: UpdateData, heads: Mapping[str, LinearHead], work: Path) -> None:
    """What the heads give in NumPy on the golden features, which the edited files must then give as well."""
    logits = {name: head.logits(data.golden[name]) for name, head in heads.items()}
    own = {name: values for name, values in logits.items() if name != FP32}
    bundles.write_golden(work, Golden(data.golden_inputs, logits[FP32], own))


def _precisions(data: UpdateData, refitted: RefittedHeads, work: Path) -> dict[str, Any]:
    """The facts of each precision with the figures that a new head changes."""
    answers = {name: head.logits(data.features[name]).argmax(axis=1) for name, head in refitted.heads.items()}
    found = {}
    for name, entry in data.bundle.facts.precisions.items():
        parity = _check_parity(data, name, refitted.heads[name], work / entry["file"])
        parity["top1_agreement_with_fp32"] = float(np.mean(answers[name] == answers[FP32]))
        tested = refitted.tested.get(name)
        accuracy = None if tested is None else asdict(tested)
        if accuracy is None and name == data.precision:
            accuracy = _cross_validated(refitted.validation)
        found[name] = {**entry, "parity": parity, "accuracy": accuracy}
    return found


def _check_parity(data: UpdateData, precision: str, head: LinearHead, path: Path) -> dict[str, Any]:
    """Compare an edited file with its head in NumPy on the features of the golden inputs.

    Raises:
        BundleError: they differ.
    """
    expected = head.logits(data.golden[precision])
    session = open_session(path, exact_int8=data.models[precision].exact_int8)
    found = session.run({INPUT: data.golden_inputs})[OUTPUT]
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


def _cross_validated(validation: CrossValidation) -> dict[str, Any] | None:
    overall = validation.held_out.overall
    if overall.after is None:
        return None
    how = f"{validation.choice.folds}-fold cross-validation on the photos of the device"
    return {"top1": overall.after, "n_test": overall.photos, "how": how}
