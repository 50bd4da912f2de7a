"""`generate` at volume: killed again and again, timed inside and outside its networks, its memory watched.

    python -m benchmarks.generation ENGINES WORK [--style FILE] [--kills 20] [--memory PER_CLASS]

An uninterrupted set tells how much of the sampling loop is spent in UNet and VAE. The same set, made with
another batch size by runs that are killed at random moments, must have the same bytes. A larger set shows the
memory in use as images add up.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from synthkit.artifacts import MANIFEST, file_sha256, run_stage, write_json
from synthkit.engines.diffusion.pipeline import EnginePipeline
from synthkit.engines.runtime.session import OrtSession, usable_threads
from synthkit.errors import EngineError
from synthkit.one_line import OneLineErrors
from synthkit.recipes.device.bench import resident_bytes
from synthkit.recipes.generation.generate import Generate
from synthkit.recipes.settings import GenerateSettings

_POLL_S = 0.05
#: A kill comes up to this many seconds after its number of images has been written.
_AFTER_S = 1.0
#: Numbers of images at which the memory is read.
MARKS = (100, 1000, 2000, 5000, 10_000, 20_000, 50_000)


@dataclass(frozen=True)
class Trial:
    """A set to generate.

    Attributes:
        engines_dir: folder from `build-engines`.
        style: file of style tokens, or None.
        classes: class names.
        per_class: images of each.
        steps: denoising steps.
        batch_size: images per batch.
    """

    engines_dir: Path
    style: Path | None
    classes: tuple[str, ...]
    per_class: int
    steps: int
    batch_size: int

    @property
    def images(self) -> int:
        """Images of the whole set."""
        return self.per_class * len(self.classes)

    def start(self, out: Path) -> subprocess.Popen[str]:
        """Generate the set, or its missing images, in a process of its own."""
        task = [str(self.engines_dir), str(out), "--per-class", str(self.per_class), "--here"]
        task += ["--classes", ",".join(self.classes), "--steps", str(self.steps)]
        task += ["--batch-size", str(self.batch_size), *(["--style", str(self.style)] if self.style else [])]
        command = [sys.executable, "-m", "benchmarks.generation", *task]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def finish(self, out: Path) -> dict[str, Any]:
        """Generate the set in a process of its own and wait for its figures.

        Raises:
            EngineError: the run failed.
        """
        return _figures(self.start(out))

    def here(self, out: Path) -> dict[str, Any]:
        """Generate the set in this process and time its sessions."""
        settings = GenerateSettings(self.per_class, self.steps, batch_size=self.batch_size)
        stage = Generate(settings, self.engines_dir, tuple(self.classes), out, style=self.style)
        with session_clock() as clock:
            metrics = run_stage(stage).manifest.metrics
        loop = metrics["written"] / metrics["images_per_second"] if metrics["written"] else 0.0
        inside = clock() / EnginePipeline(self.engines_dir).workers / loop if loop else None
        return {
            **metrics,
            "loop_seconds": round(loop, 3),
            "share_inside_sessions": inside and round(inside, 4),
        }


@contextlib.contextmanager
def session_clock() -> Iterator[Callable[[], float]]:
    """Seconds in UNet and VAE sessions since entry, added up over threads that run at the same time."""
    total, lock = [0.0], threading.Lock()
    run, bind = OrtSession.run, OrtSession.bind

    def timed(session: OrtSession, compute: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = compute()
        # The text encoder is the session with token ids as its input.
        if "input_ids" not in [spec.name for spec in session.inputs]:
            with lock:
                total[0] += time.perf_counter() - started
        return result

    def timed_run(self: OrtSession, feeds: Mapping[str, Any]) -> Any:
        return timed(self, lambda: run(self, feeds))

    def timed_bind(self: OrtSession, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        compute = bind(self, inputs, outputs)
        return lambda: timed(self, compute)

    OrtSession.run, OrtSession.bind = timed_run, timed_bind  # type: ignore[method-assign]
    try:
        yield lambda: total[0]
    finally:
        OrtSession.run, OrtSession.bind = run, bind  # type: ignore[method-assign]


def kills(trial: Trial, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Generate a set once whole, and once by runs that are killed at random moments; compare the two.

    Args:
        trial: the set.
        folder: where; the sets of an earlier trial there are removed.
        count: number of kills.
        seed: of the moments.

    Returns:
        JSON data: `kills` that met a run at work, `identical`, `different` files, figures of the `whole` run.
    """
    whole, killed = folder / "whole", folder / "killed"
    for old in (whole, killed, folder / ".killed.partial", folder / ".whole.partial"):
        shutil.rmtree(old, ignore_errors=True)
    figures = trial.finish(whole)
    other, rng = replace(trial, batch_size=max(1, trial.batch_size * 2 // 3)), random.Random(seed)
    moments = sorted(rng.randrange(trial.images) for _ in range(count))
    met = sum(_kill(other, killed, moment, rng.uniform(0, _AFTER_S)) for moment in moments)
    other.finish(killed)
    actual, wanted = contents(killed), contents(whole)
    different = sorted(name for name in actual.keys() | wanted.keys() if actual.get(name) != wanted.get(name))
    return {
        "images": trial.images,
        "kills": met,
        "batch_sizes": [trial.batch_size, other.batch_size],
        "identical": not different and bool(wanted),
        "different": different[:10],
        "whole": figures,
    }


def contents(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of a set, without its manifest, which holds times."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def memory(trial: Trial, out: Path, marks: Sequence[int] = MARKS) -> dict[str, Any]:
    """Generate a set and read the process's resident memory as images add up.

    Returns:
        JSON data: the run's figures, and `rss_mib` {number of images: MiB}.
    """
    shutil.rmtree(out, ignore_errors=True)
    child, resident = trial.start(out), {}
    for mark in marks:
        while child.poll() is None and written(out) < mark:
            time.sleep(_POLL_S)
        if child.poll() is None:
            resident[mark] = round(resident_bytes(child.pid) / 2**20, 1)
    return {**_figures(child), "rss_mib": resident}


def written(out: Path) -> int:
    """Number of images so far of a set that is being generated."""
    return sum(1 for _ in out.with_name(f".{out.name}.partial").glob("*/[0-9]*.png"))


def _kill(trial: Trial, out: Path, moment: int, after: float) -> bool:
    """Start a run and kill it `after` seconds after `moment` images; True if it was still at work."""
    child = trial.start(out)
    while child.poll() is None and written(out) < moment:
        time.sleep(_POLL_S)
    time.sleep(after)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def _figures(child: subprocess.Popen[str]) -> dict[str, Any]:
    text, _ = child.communicate()
    if child.returncode:
        raise EngineError(f"the generating process ended with {child.returncode}; run it alone with --here")
    figures: dict[str, Any] = json.loads(text)
    return figures


@click.command(cls=OneLineErrors)
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--style", type=click.Path(path_type=Path), help="Style tokens.")
@click.option("--classes", default="0,1,2,3,4,5,6,7,8,9", show_default=True)
@click.option("--per-class", default=200, show_default=True, help="Images per class.")
@click.option("--steps", default=15, show_default=True, help="Denoising steps.")
@click.option("--batch-size", default=100, show_default=True)
@click.option("--kills", "count", default=20, show_default=True, help="0 leaves this trial out.")
@click.option("--seed", default=0, show_default=True, help="Of the moments of the kills.")
@click.option("--memory", "per_class_memory", default=0, help="Images per class of the memory trial.")
@click.option("--here", is_flag=True, help="Only generate the set, into WORK, in this process.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    engines: Path,
    work: Path,
    style: Path | None,
    classes: str,
    per_class: int,
    steps: int,
    batch_size: int,
    count: int,
    seed: int,
    per_class_memory: int,
    here: bool,
    out: Path | None,
) -> None:
    """Try `generate` at volume and print JSON; exits with 1 where killed runs made another set."""
    trial = Trial(engines, style, tuple(classes.split(",")), per_class, steps, batch_size)
    if here:
        click.echo(json.dumps(trial.here(work)))
        return
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"threads": usable_threads(), "steps": steps}
    if count:
        result["killed"] = kills(trial, work, count, seed)
    if per_class_memory:
        result["memory"] = memory(replace(trial, per_class=per_class_memory), work / "memory")
    click.echo(json.dumps(result, indent=1))
    if out:
        write_json(out, result)
    raise SystemExit(0 if result.get("killed", {"identical": True})["identical"] else 1)


if __name__ == "__main__":
    main()
