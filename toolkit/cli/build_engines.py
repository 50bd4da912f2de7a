"""`synthkit build-engines`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from synthkit.artifacts import stage_state, workspace_lock
from synthkit.cli import options


@options.command("build-engines")
@options.stage_options
@options.settings_options("build-engines")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [default: WORKSPACE/engines]"
)
def command(
    workspace: Path, out: Path | None, config: Path | None, force: bool, dry_run: bool, **values: Any
) -> options.Output:
    """Turn a diffusion model into engines, once per device, and verify that they compute the same.

    \b
    Example:
      synthkit build-engines --backend tensorrt --batch 1:16:64
    """
    from synthkit.recipes.build_engines import build_engines, engine_list

    settings = options.gather_settings(config, values, "build-engines")["build-engines"]
    target = out or workspace / "engines"
    if dry_run:
        return _dry_run(settings, target)
    with workspace_lock(workspace):
        result = build_engines(settings, target, force)
    engines = engine_list(result)
    rows = [
        f"  {one['component']:<13} {one['path']:<25} max error {one['max_abs_error']:.2g}" for one in engines
    ]
    verb = "unchanged" if result.skipped else f"built in {result.manifest.seconds:.0f} s"
    return options.Output(
        {"engines": engines, "out": result.out, "skipped": result.skipped},
        "\n".join([f"{settings.model}: {len(engines)} engines {verb} in {result.out}", *rows]),
    )


def _dry_run(settings: Any, target: Path) -> options.Output:
    """What would be done; TensorRT's plans also where TensorRT itself is absent."""
    from synthkit.errors import EngineError
    from synthkit.recipes.build_engines import build_engines_request, preview_plans

    try:
        request = build_engines_request(settings, target)
        state, config = stage_state(request), dict(request.config)
    except EngineError as error:
        if settings.backend != "tensorrt":
            raise
        state, config = f"not possible here: {error}", {"backend": "tensorrt"}
    lines = [f"would build {settings.model} for {config['backend']} in {target} ({state})"]
    data = {"dry_run": True, "state": state, "config": config, "out": target}
    if config["backend"] == "tensorrt":
        plans = preview_plans(settings)
        data["plans"] = plans
        lines += [line for plan in plans for line in _plan_lines(plan)]
    return options.Output(data, "\n".join(lines))


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    commands = plan["trtexec"]
    older = "8" if int(plan["tensorrt"].partition(".")[0]) < 10 else "10"
    return [
        f"{plan['text']}  (planned for TensorRT {plan['tensorrt']})",
        f"  TensorRT <= 10: {commands[older]}",
        f"  TensorRT >= 11: {commands['11']}",
    ]
