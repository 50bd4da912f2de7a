"""Running a TensorRT plan: torch's buffers, a stream of its own, and one CUDA graph per shape.

The plan is compared with this machine and read to the last byte before TensorRT sees it. Every call that may
answer None or False is checked. Not yet run on a GPU, see `api`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.engines.tensorrt.api import TensorRt
from synthkit.engines.tensorrt.plan_cache import (
    find_plans,
    fitting_plan,
    read_plan,
    read_sidecar,
    this_machine,
)
from synthkit.errors import EngineError

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes; TensorRT reads and writes only at multiples of it. torch's own allocations are, slices are not."""

HOST_CODE = "SYNTHKIT_ENGINE_HOST_CODE"
"""Set to 1, it allows plans that hold host code, which version compatible ones do."""

_KEPT_SHAPES = 2  # the whole batch and the last, smaller one; each holds the network's activations
_DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32"},
    **{"INT64": "int64", "BOOL": "bool", "UINT8": "uint8"},
}
"""Member of TensorRT's DataType -> NumPy's and torch's name."""


@dataclass
class _Lane:
    """One shape of the inputs: a context that is set to it, its buffers, and the graph once captured.

    A captured graph is bound to its context's shapes and memory, so every shape has a context of its own.
    """

    context: Any
    buffers: dict[str, Any]
    graph: Any = None
    runs: int = 0


class TensorRtSession:
    """A deserialised engine; see `synthkit.engines.runtime.session.Session`.

    Args:
        rt: the TensorRT that made the engine.
        engine: the ICudaEngine.
        label: its name in error messages.
        rows_per_image: rows of the batch that one image takes: 2 in a UNet, with guidance; for error texts.

    Attributes:
        inputs: specs of `run`'s inputs.
        outputs: specs of `run`'s outputs.
        provider: "tensorrt".
        device: "cuda".

    Raises:
        EngineError: the engine has an input or output that this project cannot feed.
    """

    provider = "tensorrt"
    device = "cuda"

    def __init__(self, rt: TensorRt, engine: Any, label: str, rows_per_image: int = 1) -> None:
        import torch

        self._rt, self._engine, self._label, self._rows = rt, engine, label, rows_per_image
        self._torch = torch
        self._device = torch.device("cuda")
        self._stream = torch.cuda.Stream()  # on the default stream TensorRT waits for all others
        self._lanes: dict[tuple[tuple[int, ...], ...], _Lane] = {}
        self._capture = True
        names = [self._asked("get_tensor_name", index) for index in range(engine.num_io_tensors)]
        entering = rt.module.TensorIOMode.INPUT
        entries = [name for name in names if self._asked("get_tensor_mode", name) == entering]
        self.inputs = tuple(self._input(name) for name in entries)
        self.outputs = tuple(self._output(name) for name in names if name not in entries)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; see `Session.run`.

        Raises:
            EngineError: an input is missing or does not fit, the batch lies outside the plan's range, or
                TensorRT fails.
        """
        self._check({name: TensorSpec(name, one.dtype.name, one.shape) for name, one in feeds.items()})
        torch = self._torch
        with self._rt.guard(f"run {self._label}"), torch.cuda.stream(self._stream):
            lane = self._lane({name: one.shape for name, one in feeds.items()})
            for name, array in feeds.items():
                writable = np.require(array, requirements=["C", "W"])  # from_numpy takes no other
                lane.buffers[name].copy_(torch.from_numpy(writable))
            self._compute(lane)
            answers = {spec.name: lane.buffers[spec.name].to("cpu", copy=True) for spec in self.outputs}
            self._stream.synchronize()
        return {name: answer.numpy() for name, answer in answers.items()}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """Tie the session to torch tensors on the GPU, so that a sampling loop never leaves it.

        Args:
            inputs: input name -> CUDA tensor, read anew by every call.
            outputs: output name -> CUDA tensor, written by every call.

        Returns:
            Computes once. It waits for what torch's current stream was given before, and lets that stream
            wait for the outputs; the CPU waits for nothing.

        Raises:
            EngineError: as `run`.
        """
        kinds = {name: str(one.dtype).removeprefix("torch.") for name, one in inputs.items()}
        self._check({name: TensorSpec(name, kinds[name], tuple(one.shape)) for name, one in inputs.items()})
        torch, stream = self._torch, self._stream

        def compute() -> None:
            stream.wait_stream(torch.cuda.current_stream())
            with self._rt.guard(f"run {self._label}"), torch.cuda.stream(stream):
                lane = self._lane({name: tuple(one.shape) for name, one in inputs.items()})
                for name, tensor in inputs.items():
                    lane.buffers[name].copy_(tensor)
                self._compute(lane)
                for name, tensor in outputs.items():
                    tensor.copy_(lane.buffers[name])
            torch.cuda.current_stream().wait_stream(stream)

        return compute

    def close(self) -> None:
        """Free the engine's memory."""
        self._lanes.clear()
        self._engine = None

    def layers(self) -> str:
        """JSON of the engine inspector on every layer."""
        inspector = self._rt.check(f"inspect {self._label}", self._engine.create_engine_inspector())
        information = inspector.get_engine_information(self._rt.module.LayerInformationFormat.JSON)
        return str(self._rt.check(f"inspect {self._label}", information))

    def _check(self, given: Mapping[str, TensorSpec]) -> None:
        if self._engine is None:
            raise EngineError(f"{self._label} was closed; open it again")
        wanted = [spec.name for spec in self.inputs]
        if set(wanted) != set(given):
            raise EngineError(f"{self._label} takes the inputs {wanted}, got {list(given)}")
        for spec in self.inputs:
            self._check_input(spec, given[spec.name])
        batches = {given[spec.name].shape[0] for spec in self.inputs if "batch" in spec.shape}
        if len(batches) > 1:
            raise EngineError(f"{self._label} got inputs of different batches: {sorted(batches, key=str)}")

    def _check_input(self, spec: TensorSpec, given: TensorSpec) -> None:
        fixed = slice(1 if "batch" in spec.shape else 0, None)
        fits = len(given.shape) == len(spec.shape) and given.shape[fixed] == spec.shape[fixed]
        if not fits or given.dtype != spec.dtype:
            raise EngineError(
                f"input {spec.name!r} must be {spec.dtype} {list(spec.shape)}, "
                f"got {given.dtype} {list(given.shape)}"
            )
        if "batch" in spec.shape:
            self._check_batch(spec.name, int(given.shape[0]))

    def _check_batch(self, name: str, rows: int) -> None:
        low, high = self._range(name)
        if not low <= rows <= high:
            images = f" ({high // self._rows} images with guidance)" if self._rows > 1 else " images"
            raise EngineError(
                f"{self._label} was built for batches of {low} to {high}{images}, got {rows}; "
                "give another --batch-size, or rebuild it with another --batch MIN:OPT:MAX"
            )

    def _lane(self, shapes: Mapping[str, tuple[int, ...]]) -> _Lane:
        key = tuple(shapes[spec.name] for spec in self.inputs)
        if key not in self._lanes:
            while len(self._lanes) >= _KEPT_SHAPES:
                self._lanes.pop(next(iter(self._lanes)))  # the oldest; its memory is needed for the new one
            self._lanes[key] = self._new_lane(key)
        return self._lanes[key]

    def _new_lane(self, shapes: tuple[tuple[int, ...], ...]) -> _Lane:
        rt, label = self._rt, self._label
        context = rt.check(f"make a context for {label}", self._engine.create_execution_context())
        for spec, shape in zip(self.inputs, shapes, strict=True):
            rt.check(f"set {spec.name} of {label} to {shape}", context.set_input_shape(spec.name, shape))
        missing = rt.check(f"infer the shapes of {label}", context.infer_shapes())
        if missing:
            raise rt.failure(f"infer the shapes of {label}", f"not enough is known of {missing}")
        buffers = {}
        for spec in (*self.inputs, *self.outputs):
            shape = rt.check(f"tell the shape of {spec.name}", context.get_tensor_shape(spec.name))
            buffers[spec.name] = self._buffer(spec, tuple(shape))
            address = buffers[spec.name].data_ptr()
            rt.check(f"bind {spec.name} of {label}", context.set_tensor_address(spec.name, address))
        return _Lane(context, buffers)

    def _buffer(self, spec: TensorSpec, shape: tuple[int, ...]) -> Any:
        if any(side < 1 for side in shape):
            raise EngineError(
                f"{self._label} does not say the shape of {spec.name!r} before it runs, got {list(shape)}; "
                "use --backend onnxruntime"
            )
        buffer = self._torch.empty(shape, dtype=getattr(self._torch, spec.dtype), device=self._device)
        if buffer.data_ptr() % ALIGNMENT:
            raise EngineError(
                f"the buffer of {spec.name!r} lies at {buffer.data_ptr():#x}, not at a multiple of "
                f"{ALIGNMENT} bytes; use torch's own CUDA allocator (unset PYTORCH_CUDA_ALLOC_CONF)"
            )
        return buffer

    def _compute(self, lane: _Lane) -> None:
        """The first run of a shape is plain, since TensorRT sets itself up in it; the second is captured."""
        if lane.graph is None and lane.runs and self._capture:
            lane.graph = self._captured(lane)
        if lane.graph is not None:
            lane.graph.replay()
        else:
            self._execute(lane)
        lane.runs += 1

    def _captured(self, lane: _Lane) -> Any:
        """The lane's work as a CUDA graph; None where the engine cannot be captured."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._execute(lane)
        except (RuntimeError, EngineError) as error:
            log.warning("%s: running without a CUDA graph (%s)", self._label, " ".join(str(error).split()))
            self._capture = False
            return None
        return graph

    def _execute(self, lane: _Lane) -> None:
        self._rt.check(f"run {self._label}", lane.context.execute_async_v3(self._stream.cuda_stream))

    def _asked(self, method: str, *arguments: Any) -> Any:
        action = f"answer {method} for {self._label}"
        with self._rt.guard(action):
            return self._rt.check(action, getattr(self._engine, method)(*arguments))

    def _range(self, name: str) -> tuple[int, int]:
        low, _, high = self._asked("get_tensor_profile_shape", name, 0)
        return int(low[0]), int(high[0])

    def _input(self, name: str) -> TensorSpec:
        """Shape from the profile: where the network is dynamic but the profile is not, the size is fixed."""
        shape: tuple[int | str, ...] = tuple(self._asked("get_tensor_shape", name))
        if -1 in shape:
            low, _, _ = self._asked("get_tensor_profile_shape", name, 0)
            shape = ("batch" if shape[0] == -1 else low[0], *tuple(low)[1:])  # only the batch has a range
        return TensorSpec(name, self._dtype(name), shape)

    def _output(self, name: str) -> TensorSpec:
        shape = self._asked("get_tensor_shape", name)
        named = ["batch" if not axis else f"axis{axis}" for axis in range(len(shape))]
        return TensorSpec(
            name,
            self._dtype(name),
            tuple(label if side < 0 else int(side) for side, label in zip(shape, named, strict=True)),
        )

    def _dtype(self, name: str) -> str:
        kind = self._asked("get_tensor_dtype", name)
        for member, dtype in _DTYPES.items():
            if kind == getattr(self._rt.module.DataType, member, None):
                return dtype
        raise EngineError(f"{self._label}: {name!r} is of the type {kind}, which cannot be fed; rebuild it")


def deserialize(
    rt: TensorRt, content: bytes, label: str, rows_per_image: int = 1, allow_host_code: bool = False
) -> TensorRtSession:
    """Load a serialised engine.

    Args:
        rt: the installed TensorRT.
        content: the serialised engine.
        label: its name in error messages.
        rows_per_image: see `TensorRtSession`.
        allow_host_code: let code in the plan run; version compatible plans hold some.

    Raises:
        EngineError: TensorRT does not start or does not take the engine.
    """
    with rt.guard("start"):
        runtime = rt.check("start", rt.module.Runtime(rt.logger))
    if allow_host_code:
        runtime.engine_host_code_allowed = True
    with rt.guard(f"load {label}"):
        engine = rt.check(f"load {label}", runtime.deserialize_cuda_engine(content))
        return TensorRtSession(rt, engine, label, rows_per_image)


def has_plans(engines_dir: Path) -> bool:
    """True if an engines folder holds a TensorRT plan of its UNet, for this machine or another."""
    return bool(find_plans(engines_dir / "unet"))


def open_plan(engines_dir: Path, component: str) -> TensorRtSession:
    """Open the plan of a network.

    Args:
        engines_dir: the engines folder.
        component: "unet", "vae_decoder" or "vae_encoder".

    Raises:
        EngineError: no plan fits this machine, the plan's file is damaged, or TensorRT does not take it.
        MissingExtra: TensorRT is not installed.
    """
    rt = TensorRt()
    path = fitting_plan(engines_dir / component, this_machine(rt.version))
    host_code = "VERSION_COMPATIBLE" in read_sidecar(path)["key"]["plan"]["flags"]
    if host_code and os.environ.get(HOST_CODE) != "1":
        raise EngineError(
            f"the plan {path} is version compatible: it holds code that runs on loading; if it is your own, "
            f"set {HOST_CODE}=1, otherwise rebuild it without build-engines.trt_version_compatible"
        )
    return deserialize(rt, read_plan(path), str(path), 2 if component == "unet" else 1, host_code)
