"""`synthkit bench`: speed and memory of a bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


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
@click.option("--runs", type=click.IntRange(min=1), help="Timed calls  [default: 200]")
@click.option("--batch", type=click.IntRange(min=1), help="Images per call  [default: 1]")
@click.option("--warmup", type=click.IntRange(min=0), help="Calls before those  [default: 20]")
@click.option("--threads", type=Numbers(int, 1024), help="Thread counts  [default: 1 and all]")
@click.option("--percentiles", type=Numbers(float, 100), help="Beside 50, 90 and 99.")
@click.option("--student", type=click.Path(path_type=Path), help="Torch student to time beside its bundle.")
@click.option("--openvino", is_flag=True, default=None, help="Time the models in OpenVINO too.")
def command(workspace: Path, bundle: Path | None, **given: Any) -> options.Output:
    """Measure a bundle's speed, memory and size.

    Every precision that the bundle holds is timed, against bare ONNX Runtime on the same array; --student
    needs torch.

    \b
    Example: synthkit bench --bundle ./bundle --threads 1,4
    """
    from synthkit.recipes.device.bench import Plan, as_text, bench_bundle

    chosen = {name: value for name, value in given.items() if value is not None}
    student = {"student": str(chosen.pop("student"))} if "student" in chosen else {}
    threads = {"threads": tuple(sorted({1, len(os.sched_getaffinity(0))}))}
    measured = bench_bundle(Plan(str(bundle or workspace / "bundle"), **{**threads, **chosen, **student}))
    return options.Output(measured, as_text(measured))
