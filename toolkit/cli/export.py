"""`synthkit export`: a trained student as a verified bundle."""

from __future__ import annotations

from pathlib import Path

import click

from synthkit.cli import options


@options.command("export")
@click.option("--student", type=click.Path(path_type=Path), help="timm folder  [default: WORKSPACE/adapted]")
@click.option("--real-dir", type=click.Path(path_type=Path), help="Photos it was trained on, for the proof.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
@click.option("--force", is_flag=True, help="Redo the stage even when nothing changed.")
@click.option("--dry-run", is_flag=True, help="Tell what would be done, and do nothing.")
def command(
    workspace: Path,
    student: Path | None,
    real_dir: Path | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
) -> options.Output:
    """Write a trained student as a bundle whose numbers are proven to be the student's.

    \b
    Example: synthkit export --student ./student --real-dir ./few_shots --out ./bundle
    """
    from synthkit.artifacts import stage_state, workspace_lock
    from synthkit.images import ImageSet
    from synthkit.recipes.export import export_request, run_export

    photos = ImageSet.scan(real_dir) if real_dir else None
    source, target = student or workspace / "adapted", out or workspace / "bundle"
    if dry_run:
        state = stage_state(export_request(source, target, photos))
        return options.Output({"stage": "export", "state": state}, f"export: {state}")
    with workspace_lock(workspace):
        result = run_export(source, target, photos, force)
    parity = result.manifest.metrics["parity"]
    text = f"{target}: largest difference from the torch student {parity['max_abs_error']:.1e}"
    data = {"bundle": str(target), "skipped": result.skipped, **result.manifest.metrics}
    return options.Output(data, f"{text} (unchanged, skipped)" if result.skipped else text)
