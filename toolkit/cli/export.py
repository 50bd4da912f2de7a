"""`synthkit export`: a trained student as a verified bundle, in one precision or in several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthkit.cli import options


@options.command("export")
@options.folder("--student", "timm folder.  [default: WORKSPACE/adapted]")
@options.folder("--real-dir", "Photos that it was trained on, for the parity check.")
@options.folder("--synth-dir", "Synthetic images, for int8's ranges too.")
@options.folder("--test-dir", "Test images, to measure every precision.")
@options.folder("--out", "Bundle to write.  [default: WORKSPACE/bundle]")
@options.setting_flags("export.precision", "export.default_precision", "export.target")
@options.stage_options
def command(
    workspace: Path,
    student: Path | None,
    real_dir: Path | None,
    synth_dir: Path | None,
    test_dir: Path | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
    **recipe: Any,
) -> options.Output:
    """Write a trained student as a bundle whose numbers are verified to be the student's.

    fp16 and int8 are measured against fp32 and offered beside it; one that costs more than export.max_drop
    points does not become the default, and the command then ends with 1.

    \b
    Example: synthkit export --real-dir ./few_shots --precision fp32,fp16,int8 --target jetpack6
    """
    from synthkit.artifacts import recorded_inputs, run_stage, workspace_lock
    from synthkit.data.images import ImageSet
    from synthkit.recipes.api import ExportResult
    from synthkit.recipes.exporting.export import Export, Images
    from synthkit.recipes.settings import ExportSettings

    settings = options.given(recipe).over("export", ExportSettings())
    known = recorded_inputs(workspace)
    sets = (ImageSet.scan(one, known=known) if one else None for one in (real_dir, synth_dir, test_dir))
    target = out or workspace / "bundle"
    stage = Export(settings, student or workspace / "adapted", target, Images(*sets))
    if dry_run:
        return options.planned(stage, force)
    with workspace_lock(workspace):
        result = ExportResult.of(run_stage(stage, force=force))
    text = _text(target, result.metrics, result.skipped)
    return options.Output(result.to_json(), text, ok=not result.refused_default)


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
