"""`synthkit export`: a trained student as a verified bundle, in one precision or in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from synthkit.cli import options


@options.command("export")
@options.stage_options
@options.settings_options("export")
@click.option("--student", type=click.Path(path_type=Path), help="timm folder  [default: WORKSPACE/adapted]")
@click.option("--real-dir", type=click.Path(path_type=Path), help="The photos it was trained on.")
@click.option("--synth-dir", type=click.Path(path_type=Path), help="Synthetic images, for int8's ranges too.")
@click.option("--test-dir", type=click.Path(path_type=Path), help="Test images, to measure every precision.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
def command(
    workspace: Path,
    student: Path | None,
    real_dir: Path | None,
    synth_dir: Path | None,
    test_dir: Path | None,
    out: Path | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    **values: Any,
) -> options.Output:
    """Write a trained student as a bundle whose numbers are verified to be the student's.

    fp16 and int8 are measured against fp32 and offered beside it; one that costs more than --max-drop does
    not become the default, and the command then ends with 1.

    \b
    Example: synthkit export --student ./student --real-dir ./few_shots --precision fp32,fp16,int8
    """
    from synthkit.artifacts import stage_state, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.recipes.exporting.export import Images, export_request, run_export

    settings = options.gather_settings(config, values, "export")["export"]
    photos, synthetic, test = (ImageSet.scan(one) if one else None for one in (real_dir, synth_dir, test_dir))
    others = Images(synthetic=synthetic, test=test)
    source, target = student or workspace / "adapted", out or workspace / "bundle"
    if dry_run:
        state = stage_state(export_request(source, target, photos, settings, others))
        return options.Output({"stage": "export", "state": state}, f"export: {state}")
    with workspace_lock(workspace):
        result = run_export(source, target, photos, force, settings, others)
    metrics = result.manifest.metrics
    data = {"bundle": str(target), "skipped": result.skipped, **metrics}
    return options.Output(data, _text(target, metrics, result.skipped), ok=not metrics["refused_default"])


def _text(target: Path, metrics: Mapping[str, Any], skipped: bool) -> str:
    head = f"{target}: largest difference from the torch student {metrics['parity']['max_abs_error']:.1e}"
    lines = [f"{head} (unchanged, skipped)" if skipped else head]
    if len(metrics["precisions"]) > 1:
        lines.append("precision     MB     ms   as fp32   top-1")
        lines += [
            _row(name, row, metrics["default_precision"]) for name, row in metrics["precisions"].items()
        ]
    if metrics["int8"]:
        worst = ", ".join(f"{row['layer']} {row['error']:.3f}" for row in metrics["int8"]["drift"][:3])
        kept = len(metrics["int8"]["kept_float"])
        lines.append(f"int8: {metrics['int8']['method']}, {kept} layer(s) in float; largest drift: {worst}")
    return "\n".join([*lines, *filter(None, [metrics["refused_default"]])])


def _row(name: str, row: Mapping[str, Any], default: str) -> str:
    measured = row["accuracy"] or {}
    same = measured.get("agreement_with_fp32", row["parity"]["top1_agreement"])
    top1 = f"{measured['top1']:.3f}" if "top1" in measured else "-"
    mark = "  default" if name == default else ""
    return f"{name:<9} {row['bytes'] / 1e6:6.1f} {row['latency_ms']:6.1f}   {same:7.3f}   {top1:>5}{mark}"
