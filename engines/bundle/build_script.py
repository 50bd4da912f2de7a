"""build_engine.sh: the trtexec line of each TensorRT generation, for a bundle's models."""

from __future__ import annotations

from pathlib import Path

from synthkit.artifacts import write_bytes

#: TensorRT generation -> how its trtexec is told the types. Until 9, flags allow the smaller types; 10 can be
#: told to compute in the types of the graph; 11 always does, and has no such flags any more.
TYPING = {"8": "$weak", "10": "--stronglyTyped", "11": ""}

_DETECT = """help=$("$trtexec" --help 2>&1 || true)
case "$help" in
  *--fp16*--stronglyTyped* | *--stronglyTyped*--fp16*) typing="--stronglyTyped" ;;  # TensorRT 10
  *--fp16*) typing="$weak" ;;  # TensorRT 8.5, 8.6: flags allow the smaller types
  *) typing="" ;;  # TensorRT 11 always computes in the types of the graph
esac
"""


def write_build_script(
    path: Path, size: tuple[int, int], generation: str | None = None, bundle: str = "."
) -> None:
    """Write the script.

    Args:
        path: the file.
        size: (height, width) of the model's input.
        generation: of TensorRT, a key of `TYPING`; None asks trtexec.
        bundle: the bundle's folder, seen from the script's.
    """
    typing = _DETECT if generation is None else f'typing="{TYPING[generation]}"  # TensorRT {generation}\n'
    text = _SCRIPT.format(height=size[0], width=size[1], typing=typing, bundle=bundle)
    write_bytes(path, text.encode())
    path.chmod(0o755)


_SCRIPT = """#!/bin/sh
# Builds model.PRECISION.plan with TensorRT, on the very device that will run it.
# These lines were written from NVIDIA's documentation and were NOT RUN ON HARDWARE.
# The input is uint8. TensorRT 8.5 and newer accept that because a Cast to float is its only consumer;
# older ones (JetPack 5.0 and before) do not parse the model.
#   ./build_engine.sh [fp32 | fp16 | int8] [MAX_BATCH]
set -eu
cd "$(dirname "$0")/{bundle}"
precision="${{1:-fp32}}"
max="${{2:-8}}"
case "$precision" in
  fp32) model=model.onnx weak="" ;;
  fp16) model=model.fp16.onnx weak="--fp16" ;;
  int8) model=model.int8.onnx weak="--int8 --fp16" ;;
  *) echo "error: no precision '$precision'; one of fp32, fp16, int8" >&2; exit 1 ;;
esac
if [ ! -f "$model" ]; then
  echo "error: this bundle holds no $model; make it with: synthkit export --precision $precision" >&2
  exit 1
fi
opt=$(( max < 4 ? max : 4 ))
min="image:1x{height}x{width}x3"
opt="image:${{opt}}x{height}x{width}x3"
max="image:${{max}}x{height}x{width}x3"
trtexec="${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}"
{typing}"$trtexec" --onnx="$model" --saveEngine="model.$precision.plan" $typing \\
  --minShapes="$min" --optShapes="$opt" --maxShapes="$max"
"""
