"""How fast a bundle answers, how soon after its process starts, and how much memory and disk it takes.

Every precision and thread count is timed against the bare `InferenceSession.run` of the very same session,
call by call in turn, and against the torch student and OpenVINO where they are asked for. Images are noise
that is decoded beforehand: a network takes as long for one image as for another. Timing and cold start run
in processes of their own, because a process cannot take back its threads and its memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from synthkit.engines.bundle.format import INPUT, OUTPUT, Bundle, read_facts
from synthkit.engines.bundle.versions import find_again
from synthkit.errors import EngineError, MissingExtra
from synthkit.machine import ask

PERCENTILES = (50, 90, 99)

_BLOCK = 10  # timed calls of one model before the next has its turn
_FAST = 10  # percentile of the latency that stands for an undisturbed call
_TIMEOUT = 3600.0
_COLD_STARTS = 3
_PHOTO = (640, 480)
Contenders = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        bundle: the bundle's folder.
        student: the torch student's folder, to measure beside it; None leaves torch out.
        threads: thread counts, each measured apart.
        batch: images per call.
        runs: timed calls of each model.
        warmup: calls before those.
        percentiles: of the latency.
        openvino: measure every model file in OpenVINO as well.
    """

    bundle: str
    student: str | None = None
    threads: tuple[int, ...] = (1,)
    batch: int = 1
    runs: int = 200
    warmup: int = 20
    percentiles: tuple[float, ...] = PERCENTILES
    openvino: bool = False


def bench_bundle(plan: Plan) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        plan: what to measure.

    Returns:
        "rows": one per precision and thread count; at the top level the values of the row that runs by
        default: images_per_second, latency_ms, batch, provider, precision, threads, bare_latency_ms,
        overhead_percent, cold_start_seconds, resident_bytes, file_bytes.

    Raises:
        BundleError: the folder holds no usable bundle.
        EngineError: a measuring process failed.
        MissingExtra: OpenVINO was asked for and is not installed.
    """
    if plan.openvino and importlib.util.find_spec("openvino") is None:
        raise MissingExtra("openvino", "bench")
    folder = Path(plan.bundle)
    find_again(folder)
    default = Bundle.open(folder).precision
    facts = read_facts(folder).precisions
    rows = [row for threads in plan.threads for row in _timed(plan, threads)]
    for row in rows:
        if row["runtime"] == "onnxruntime":
            row |= _cold_start(folder, row["precision"], row["threads"])
            row["file_bytes"] = (folder / facts[row["precision"]]["file"]).stat().st_size
    ours = [row for row in rows if row["runtime"] == "onnxruntime" and row["precision"] == default]
    return {**max(ours, key=lambda row: row["threads"]), "runs": plan.runs, "rows": rows}


def _timed(plan: Plan, threads: int) -> list[dict[str, Any]]:
    return list(_answer("time_models", json.dumps(asdict(plan)), str(threads)))


def _answer(function: str, *arguments: str) -> Any:
    reply = ask(f"{__name__}:{function}", *arguments, timeout=_TIMEOUT)
    if reply.error:
        raise EngineError(f"measuring failed: {reply.error}")
    return reply.data


def time_models(plan_json: str, threads: str) -> list[dict[str, Any]]:
    """One row per model, timed in this process.

    Args:
        plan_json: a `Plan` as JSON.
        threads: how many each model may use.
    """
    os.environ["OMP_NUM_THREADS"] = threads  # before the first session and before torch
    plan = Plan(**json.loads(plan_json))
    folder = Path(plan.bundle)
    _, *size = Bundle.open(folder).preprocessing.input_size
    images = np.random.default_rng(0).integers(0, 256, (plan.batch, *size, 3), dtype=np.uint8)
    models = {
        ("onnxruntime", name): _bundle_and_bare(folder, name, images)
        for name in read_facts(folder).precisions
    }
    if plan.openvino:
        models |= {("openvino", name): _openvino(folder, name, images, int(threads)) for _, name in models}
    if plan.student:
        models["torch", "fp32"] = {"ours": _torch_student(Path(plan.student), images, int(threads))}
    seconds = time_in_turn(list(models.values()), plan.runs, plan.warmup)
    return [
        {"runtime": runtime, "precision": precision, "provider": "cpu", "threads": int(threads)}
        | _row(own, plan)
        for (runtime, precision), own in zip(models, seconds, strict=True)
    ]


def _bundle_and_bare(folder: Path, precision: str, images: np.ndarray) -> Contenders:
    """`Bundle.logits` and the `run` of the very session below it, whatever options that was opened with."""
    bundle = Bundle.open(folder, precision)
    bare: Any = bundle.session._session  # type: ignore[attr-defined]
    return {"ours": lambda: bundle.logits(images), "bare": lambda: bare.run([OUTPUT], {INPUT: images})}


def _openvino(folder: Path, precision: str, images: np.ndarray, threads: int) -> Contenders:
    """The same file in OpenVINO, told that single answers count; floats are not rounded to 16 bits."""
    import openvino

    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    path = folder / read_facts(folder).precisions[precision]["file"]
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()
    return {"ours": lambda: request.infer({INPUT: images})[OUTPUT]}


def _torch_student(folder: Path, images: np.ndarray, threads: int) -> Callable[[], Any]:
    import torch

    from synthkit.engines.student.onnx_export import Uint8Student, torch_logits
    from synthkit.learning.students import load_student

    torch.set_num_threads(threads)
    student = load_student(folder)
    module = Uint8Student(student.model, student.preprocessing)
    return lambda: torch_logits(module, images)


def time_in_turn(models: Sequence[Contenders], runs: int, warmup: int) -> list[dict[str, np.ndarray]]:
    """Seconds of every call, [runs] per contender.

    The models take turns in short blocks, so that a machine that grows slower does so for all of them; the
    contenders of one model take turns call by call. The first calls of a block are not timed: they bring the
    weights back into the caches, while the threads of the model before fall asleep.

    Args:
        models: for each, name -> what to call.
        runs: timed calls of each contender.
        warmup: calls before those.
    """
    for contenders in models:
        _call_in_turn(contenders, warmup)
    seconds: list[dict[str, list[float]]] = [{name: [] for name in contenders} for contenders in models]
    for start in range(0, runs, _BLOCK):
        for contenders, own in zip(models, seconds, strict=True):
            _call_in_turn(contenders, 2)
            for name, taken in _call_in_turn(contenders, min(_BLOCK, runs - start)):
                own[name].append(taken)
    return [{name: np.array(taken) for name, taken in own.items()} for own in seconds]


def _call_in_turn(contenders: Contenders, count: int) -> list[tuple[str, float]]:
    taken = []
    names = list(contenders)
    for turn in range(count):
        for name in names if turn % 2 else reversed(names):
            started = time.perf_counter()
            contenders[name]()
            taken.append((name, time.perf_counter() - started))
    return taken


def _row(seconds: Mapping[str, np.ndarray], plan: Plan) -> dict[str, Any]:
    ours = seconds["ours"]
    row = {
        "batch": plan.batch,
        "images_per_second": plan.batch / float(ours.mean()),
        "latency_ms": _latency(ours, plan),
    }
    if "bare" in seconds:
        bare = seconds["bare"]
        # Other programs make a call longer, never shorter: the fast calls show what our runtime adds.
        fast, fast_bare = (float(np.percentile(one, _FAST)) for one in (ours, bare))
        row["bare_latency_ms"] = _latency(bare, plan)
        row["overhead_ms"] = 1e3 * (fast - fast_bare)
        row["overhead_percent"] = 100 * (fast / fast_bare - 1)
    return row


def _latency(seconds: np.ndarray, plan: Plan) -> dict[str, float]:
    shares = sorted({*PERCENTILES, *plan.percentiles})
    values = np.percentile(1e3 * seconds, shares)
    latency = {f"p{share:g}": float(value) for share, value in zip(shares, values, strict=True)}
    return {**latency, "mean": float(1e3 * seconds.mean())}


def _cold_start(folder: Path, precision: str, threads: int) -> dict[str, Any]:
    """Median time from process start to first answer, and the memory of that process.

    The files are in the system's cache: this is the start of a process, not of a machine.
    """
    with tempfile.TemporaryDirectory() as scratch:
        photo = Path(scratch) / "photo.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (*_PHOTO[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photo)
        starts = []
        for _ in range(_COLD_STARTS):
            started = time.monotonic()  # one clock for all processes of a machine
            reply = _answer("first_answer", str(folder), precision, str(threads), str(photo))
            starts.append({**reply, "seconds": reply["answered_at"] - started})
    return {
        "cold_start_seconds": float(np.median([one["seconds"] for one in starts])),
        "resident_bytes": int(np.median([one["resident_bytes"] for one in starts])),
    }


def first_answer(folder: str, precision: str, threads: str, photo: str) -> dict[str, Any]:
    """Open a bundle, classify one image, and tell when that was done and how much memory it took.

    Args:
        folder: the bundle.
        precision: which of its models.
        threads: how many it may use.
        photo: an image file.
    """
    os.environ["OMP_NUM_THREADS"] = threads
    Bundle.open(Path(folder), precision).predict(Path(photo))
    return {"answered_at": time.monotonic(), "resident_bytes": resident_bytes("self")}


def resident_bytes(process: int | str) -> int:
    """Memory of a process that lies in RAM, as Linux tells it.

    Args:
        process: its id, or "self".
    """
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found, "Linux lists VmRSS of every living process"
    return 1024 * int(found[1])


def as_text(measured: Mapping[str, Any]) -> str:
    """The rows as a table."""
    heading = (
        f"{'precision':<16}{'threads':>8}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'images/s':>10}"
        f"{'over bare':>11}{'cold s':>8}{'RSS MiB':>9}{'file MiB':>10}"
    )
    lines = [_line(row) for row in measured["rows"]]
    calls = f"{measured['runs']} calls of {measured['batch']} image(s) each, {measured['provider']}"
    return "\n".join([heading, *lines, calls])


def _line(row: Mapping[str, Any]) -> str:
    latency = row["latency_ms"]
    name = row["precision"] if row["runtime"] == "onnxruntime" else f"{row['runtime']} {row['precision']}"
    line = f"{name:<16}{row['threads']:>8}" + "".join(
        f"{latency[key]:>9.3f}" for key in ("p50", "p90", "p99")
    )
    line += f"{row['images_per_second']:>10.1f}"
    if row["runtime"] != "onnxruntime":
        return line
    return (
        f"{line}{row['overhead_percent']:>+10.1f}%{row['cold_start_seconds']:>8.2f}"
        f"{row['resident_bytes'] / 2**20:>9.0f}{row['file_bytes'] / 2**20:>10.1f}"
    )
