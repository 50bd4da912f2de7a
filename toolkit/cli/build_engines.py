"""`synthkit build-engines`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthkit.artifacts import plan_stages, run_stage, workspace_lock
from synthkit.cli import options

if TYPE_CHECKING:
    from synthkit.recipes.build_engines import BuildEngines


@options.command("build-engines")
@options.folder("--out", "Folder to write.  [default: WORKSPACE/engines]")
@options.setting_flags(
    "build-engines.model",
    "build-engines.backend",
    "build-engines.precision",
    "build-engines.batch",
    "build-engines.size",
)
@options.stage_options
def command(workspace: Path, out: Path | None, force: bool, dry_run: bool, **recipe: Any) -> options.Output:
    """Turn a diffusion model into engines, once per device, and verify that they compute the same.

    \b
    Example: synthkit build-engines
    Example: synthkit build-engines --model ./stable-diffusion-v1-5 --backend tensorrt --batch 1:16:64
    """
    from synthkit.recipes.api import EnginesResult
    from synthkit.recipes.build_engines import BuildEngines
    from synthkit.recipes.settings import EngineSettings

    settings = options.given(recipe).over("build-engines", EngineSettings())
    stage = BuildEngines(settings, out or workspace / "engines")
    if dry_run:
        return _dry_run(stage, force)
    with workspace_lock(workspace):
        done = run_stage(stage, force=force)
    result = EnginesResult.of(done)
    rows = [
        f"  {one['component']:<13} {one['path']:<25} max error {one['max_abs_error']:.2g}"
        for one in result.engines
    ]
    verb = "unchanged" if result.skipped else f"built in {done.manifest.seconds:.0f} s"
    text = f"{settings.model}: {len(result.engines)} engines {verb} in {result.out}"
    return options.Output(result.to_json(), "\n".join([text, *rows]))


def _dry_run(stage: BuildEngines, force: bool) -> options.Output:
    """What would be done; TensorRT's plans also where TensorRT itself is absent."""
    from synthkit.errors import EngineError
    from synthkit.recipes.build_engines import preview_plans

    try:
        state = plan_stages([stage], force=[stage.name] if force else [])[stage.name]
        backend, resolved = stage.backend, dict(stage.key().resolved)
    except EngineError as error:
        if stage.settings.backend != "tensorrt":
            raise
        state, backend, resolved = f"not possible here: {error}", "tensorrt", {"backend": "tensorrt"}
    lines = [f"would build {stage.settings.model} for {backend} in {stage.out} ({state})"]
    data = {"dry_run": True, "state": state, "resolved": resolved, "out": stage.out}
    if backend == "tensorrt":
        plans = preview_plans(stage.settings)
        data["plans"] = plans
        lines += [line for plan in plans for line in _plan_lines(plan)]
    return options.Output(data, "\n".join(lines))


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    commands = plan["trtexec"]
    older = "8" if int(plan["tensorrt"].partition(".")[0]) < 10 else "10"
    return [
        f"{plan['text']}  (planned for TensorRT {plan['tensorrt']})",
        f"  TensorRT <= 10: {commands[older]}",
        f"  TensorRT >= 11: {commands['11']}",
    ]
