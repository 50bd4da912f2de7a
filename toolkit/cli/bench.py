"""`synthkit bench`: speed and memory of a bundle or of a diffusion model's engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError


class Numbers(click.ParamType):
    """Positive numbers with commas between them.

    Args:
        kind: int or float.
        most: the largest number that is taken.
    """

    name = "N,N,..."

    def __init__(self, kind: type, most: int) -> None:
        self.kind, self.most = kind, most

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """The numbers; click has parsed a value that is no text."""
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(self.kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number <= self.most for number in numbers):
            self.fail(
                f"{value!r} is no list such as 1,2 of numbers above 0 and up to {self.most}", param, ctx
            )
        return numbers


@options.command("bench")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
@click.option("--engines", type=click.Path(path_type=Path), help="Engines, instead of a bundle.")
@click.option("--runs", type=click.IntRange(min=1), help="Timed calls  [default: 200; of engines 3]")
@click.option("--batch", type=click.IntRange(min=1), help="Images per call  [default: 1; of engines 64]")
@click.option("--warmup", type=click.IntRange(min=0), help="Calls before those, of a bundle  [default: 20]")
@click.option("--threads", type=Numbers(int, 1024), help="Thread counts, of a bundle  [default: 1 and all]")
@click.option("--percentiles", type=Numbers(float, 100), help="Beside 50, 90 and 99, of a bundle.")
@click.option("--student", type=click.Path(path_type=Path), help="Torch student to time beside its bundle.")
@click.option("--openvino", is_flag=True, default=None, help="Time a bundle's models in OpenVINO too.")
@click.option("--steps", type=click.IntRange(min=1), help="Denoising steps, of engines  [default: 20]")
@click.option("--guidance", type=float, help="Guidance scale, of engines  [default: 2.0]")
@click.option("--unet-step", is_flag=True, default=None, help="One UNet step alone, of large engines.")
@click.option("--profile", is_flag=True, default=None, help="Time by operator too, of engines on the CPU.")
def command(workspace: Path, bundle: Path | None, engines: Path | None, **given: Any) -> options.Output:
    """Measure a bundle's or engines' speed, memory and size.

    A bundle is timed in every precision it holds, against bare ONNX Runtime on the same array; torch is
    needed for --student and --engines only. Engines are timed beside diffusers and Optimum, drawing whole
    batches; with --unet-step, one step of one image (or of --batch) beside diffusers and ONNX Runtime.

    \b
    Example: synthkit bench --bundle ./bundle --threads 1,4
    Example: synthkit bench --engines ./engines --batch 16
    """
    if bundle and engines:
        raise ConfigError("--bundle and --engines exclude each other; give one of them")
    chosen = {name: value for name, value in given.items() if value is not None}
    foreign = _FOR_BUNDLES if engines else _FOR_ENGINES
    if wrong := [f"--{name.replace('_', '-')}" for name in chosen if name in foreign]:
        what = "a bundle" if engines else "engines"
        raise ConfigError(f"{', '.join(wrong)} is for {what} only; leave it out")
    return (
        _bench_engines(engines, chosen) if engines else _bench_bundle(bundle or workspace / "bundle", chosen)
    )


_FOR_BUNDLES = ("warmup", "threads", "percentiles", "student", "openvino")
_FOR_ENGINES = ("steps", "guidance", "unet_step", "profile")


def _bench_bundle(bundle: Path, chosen: dict[str, Any]) -> options.Output:
    from synthkit.recipes.device.bench import Plan, as_text, bench_bundle

    student = {"student": str(chosen.pop("student"))} if "student" in chosen else {}
    threads = {"threads": tuple(sorted({1, len(os.sched_getaffinity(0))}))}
    measured = bench_bundle(Plan(str(bundle), **{**threads, **chosen, **student}))
    return options.Output(measured, as_text(measured))


def _bench_engines(engines: Path, chosen: dict[str, Any]) -> options.Output:
    from benchmarks import profile_unet, sampling_speed, unet_step

    alone, profile = chosen.pop("unet_step", False), chosen.pop("profile", False)
    if alone and "steps" in chosen:
        raise ConfigError("--steps and --unet-step exclude each other; give one of them")
    measured = (unet_step.bench_unet_step if alone else sampling_speed.bench_engines)(engines, **chosen)
    text = (unet_step if alone else sampling_speed).as_text(measured)
    if profile:
        task = {name: measured[name] for name in ("batch", "guidance", "runs")}
        measured["profile"] = profile_unet.profile_unet(engines, **task)
        text += "\n\n" + profile_unet.as_text(measured["profile"])
    return options.Output(measured, text)
