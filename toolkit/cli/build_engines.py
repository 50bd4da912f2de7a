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
    """Turn a diffusion model into engines, once per device, and prove that they compute the same."""
    from synthkit.recipes.build_engines import build_engines, build_engines_request, engine_list

    settings = options.gather_settings(config, values, "build-engines")["build-engines"]
    target = out or workspace / "engines"
    if dry_run:
        request = build_engines_request(settings, target)
        state = stage_state(request)
        return options.Output(
            {"dry_run": True, "state": state, "config": dict(request.config), "out": target},
            f"would build {request.config} in {target} ({state})",
        )
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
