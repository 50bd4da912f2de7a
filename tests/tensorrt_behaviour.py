"""What the stand-in for TensorRT does: it reads real ONNX files, and its engines compute in ONNX Runtime.

Inputs and outputs go through the addresses that the code binds, so that a wrong shape, type, address or a
stale buffer shows in the numbers. Where TensorRT refuses, so does this: profiles, flags, alignment, device.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda_stand_ins import CAPTURING, STREAM, cuda_stand_ins
from tests.tensorrt_fakes import FLAVOURS, Fakes

MAGIC, TIMINGS = b"stand-in plan\n", b"stand-in timings\n"
_MEMBERS = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64"}
_ONNX_TYPES = {1: "float32", 10: "float16", 6: "int32", 7: "int64"}


def fake_tensorrt(flavour: str, inject: Mapping[str, Any] | None = None, *, lie: bool = False) -> Fakes:
    """A stand-in for one generation of TensorRT.

    Args:
        flavour: "10" or "11".
        inject: calls that fail.
        lie: whether engines are fp32 inside, whatever the graph says.
    """
    world = _World(flavour, lie)
    world.fakes = Fakes(flavour, world.behaviours(), inject)
    return world.fakes


class _World:
    """The functions behind the table's methods; `this` is the object that is called."""

    fakes: Fakes

    def __init__(self, flavour: str, lie: bool) -> None:
        self.flavour, self.lie = flavour, lie
        self.logger: Any = None

    def behaviours(self) -> dict[str, Callable[..., Any]]:
        names = [name for name in vars(_World) if name[0].isupper()]
        return {name.replace("__", ".", 1): getattr(self, name) for name in names} | {
            "IHostMemory.__bytes__": lambda this: this._state["content"]
        }

    def complain(self, text: str) -> None:
        self.logger.log(self.fakes.classes["ILogger"].ERROR, text)

    def ILogger__log(self, this: Any, severity: int, msg: str) -> None:
        raise AssertionError("a logger must implement log")

    def Builder____init__(self, this: Any, logger: Any) -> None:
        self.logger = logger

    def Runtime____init__(self, this: Any, logger: Any) -> None:
        self.logger = logger

    def Builder__create_network(self, this: Any, flags: int = 0) -> Any:
        kinds = self.fakes.classes["NetworkDefinitionCreationFlag"]
        assert flags in (0, *(1 << int(kind) for kind in kinds)), f"flags {flags:#b} mean something else"
        strong = self.flavour == "11" or bool(flags & 1 << int(kinds.STRONGLY_TYPED))
        return self.fakes.new("INetworkDefinition", strong=strong)

    def OnnxParser____init__(self, this: Any, network: Any, logger: Any) -> None:
        this._state = {"network": network, "errors": []}

    def OnnxParser__set_flag(self, this: Any, flag: Any) -> None:
        this._state["flag"] = flag

    def OnnxParser__parse_from_file(self, this: Any, model: str) -> bool:
        import onnx

        try:
            graph = onnx.load(model, load_external_data=False).graph
        except Exception as error:
            this._state["errors"].append(f"cannot parse {model}: {type(error).__name__}")
            return False
        this._state["network"]._state |= {"onnx": model, "inputs": _dynamic_inputs(graph)}
        return True

    def OnnxParser__num_errors(self, this: Any) -> int:
        return len(this._state["errors"])

    def OnnxParser__get_error(self, this: Any, index: int) -> Any:
        return self.fakes.new("ParserError", text=this._state["errors"][index])

    def ParserError__desc(self, this: Any) -> str:
        return str(this._state["text"])

    def Builder__create_builder_config(self, this: Any) -> Any:
        return self.fakes.new("IBuilderConfig", flags=[], profiles=[], cache=None, pools={})

    def Builder__create_optimization_profile(self, this: Any) -> Any:
        return self.fakes.new("IOptimizationProfile", shapes={})

    def IBuilderConfig__set_flag(self, this: Any, flag: Any) -> None:
        this._state["flags"].append(flag.name)

    def IBuilderConfig__set_memory_pool_limit(self, this: Any, pool: Any, pool_size: int) -> None:
        this._state["pools"][pool.name] = pool_size

    def IOptimizationProfile__set_shape(self, this: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise RuntimeError(f"shapes of {input} are not in order")
        this._state["shapes"][input] = [list(min), list(opt), list(max)]

    def IBuilderConfig__add_optimization_profile(self, this: Any, profile: Any) -> int:
        this._state["profiles"].append(profile)
        return len(this._state["profiles"]) - 1

    def IBuilderConfig__create_timing_cache(self, this: Any, serialized_timing_cache: bytes) -> Any:
        content = bytes(serialized_timing_cache)
        if content and not content.startswith(TIMINGS):
            return None
        return self.fakes.new("ITimingCache", lines=set(content.removeprefix(TIMINGS).split()))

    def IBuilderConfig__set_timing_cache(self, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if b"another-device" in cache._state["lines"]:
            return False
        this._state["cache"] = cache
        return True

    def IBuilderConfig__get_timing_cache(self, this: Any) -> Any:
        return this._state["cache"]

    def ITimingCache__combine(self, this: Any, input_cache: Any, ignore_mismatch: bool) -> bool:
        this._state["lines"] |= input_cache._state["lines"]
        return b"another-device" not in input_cache._state["lines"]

    def ITimingCache__serialize(self, this: Any) -> Any:
        lines = b" ".join(sorted(this._state["lines"]))
        return self.fakes.new("IHostMemory", content=TIMINGS + lines)

    def Builder__build_serialized_network(self, this: Any, network: Any, config: Any) -> Any:
        net, settings = network._state, config._state
        problem = _refusal(net, settings)
        if problem:
            return self.complain(problem)
        if not _phases(settings.get("progress_monitor")):
            return self.complain("the build was cancelled")
        if settings["cache"] is not None:
            settings["cache"]._state["lines"].add(net["onnx"].split("/")[-2].encode())
        plan = {
            "version": FLAVOURS[self.flavour],
            "shapes": settings["profiles"][0]._state["shapes"],
            "detailed": settings.get("profiling_verbosity", SimpleNamespace(name="")).name == "DETAILED",
            "host_code": "VERSION_COMPATIBLE" in settings["flags"],
            "options": {
                "flags": settings["flags"],
                "pools": settings["pools"],
                "level": settings.get("builder_optimization_level"),
            },
        }
        return self.fakes.new("IHostMemory", content=_plan(plan, net["onnx"]))

    def Runtime__deserialize_cuda_engine(self, this: Any, serialized_engine: bytes) -> Any:
        if not serialized_engine.startswith(MAGIC):
            return self.complain("magicTagRead == kMAGIC_TAG failed")
        header, _, content = serialized_engine.removeprefix(MAGIC).partition(b"\n")
        plan = json.loads(header)
        if plan["host_code"] and not this._state.get("engine_host_code_allowed"):
            return self.complain("host code is not allowed")
        return self.fakes.new("ICudaEngine", plan=plan, model=_Model(content))

    def ICudaEngine__num_io_tensors(self, this: Any) -> int:
        return len(this._state["model"].tensors)

    def ICudaEngine__get_tensor_name(self, this: Any, index: int) -> str:
        return list(this._state["model"].tensors)[index]

    def ICudaEngine__get_tensor_mode(self, this: Any, name: str) -> Any:
        mode = "INPUT" if name in this._state["model"].inputs else "OUTPUT"
        return self.fakes.classes["TensorIOMode"][mode]

    def ICudaEngine__get_tensor_dtype(self, this: Any, name: str) -> Any:
        return self.fakes.classes["DataType"][_MEMBERS[this._state["model"].tensors[name][0]]]

    def ICudaEngine__get_tensor_shape(self, this: Any, name: str) -> tuple[int, ...]:
        shape = this._state["model"].tensors[name][1]
        return tuple(side if isinstance(side, int) else -1 for side in shape)

    def ICudaEngine__get_tensor_profile_shape(self, this: Any, name: str, profile_index: int) -> Any:
        return [tuple(shape) for shape in this._state["plan"]["shapes"][name]]

    def ICudaEngine__create_engine_inspector(self, this: Any) -> Any:
        return self.fakes.new("EngineInspector", engine=this)

    def EngineInspector__get_engine_information(self, this: Any, format: Any) -> str:
        engine = this._state["engine"]._state
        assert format.name == "JSON"
        kind = "Format/Datatype" if self.flavour == "10" else "DataType"
        layers = [
            {
                "Name": name,
                "Inputs": [{"Name": "x", kind: "Half" if half and not self.lie else "Float"}],
                "Weights": {"Type": "Half" if half and not self.lie else "Float", "Count": count},
            }
            for name, half, count in engine["model"].weights
        ]
        return json.dumps({"Layers": layers if engine["plan"]["detailed"] else ["names only"]})

    def ICudaEngine__create_execution_context(self, this: Any, **strategy: Any) -> Any:
        return self.fakes.new("IExecutionContext", engine=this._state, shapes={}, addresses={})

    def IExecutionContext__set_input_shape(self, this: Any, name: str, shape: Any) -> bool:
        known = this._state["engine"]["plan"]["shapes"]
        if name in known:
            low, _, high = known[name]
            if not all(a <= side <= b for a, side, b in zip(low, shape, high, strict=True)):
                return self.complain(f"{name}: {shape} is outside the profile") or False
        this._state["shapes"][name] = tuple(shape)
        return True

    def IExecutionContext__infer_shapes(self, this: Any) -> list[str]:
        model = this._state["engine"]["model"]
        missing = [name for name in model.inputs if name not in this._state["shapes"]]
        if not missing:
            this._state["shapes"] |= model.output_shapes(this._state["shapes"])
        return missing

    def IExecutionContext__get_tensor_shape(self, this: Any, name: str) -> tuple[int, ...]:
        return tuple(this._state["shapes"][name])

    def IExecutionContext__set_tensor_address(self, this: Any, name: str, memory: int) -> bool:
        if memory == 0 or memory % 256:
            return self.complain(f"{name}: the address {memory:#x} is not aligned") or False
        this._state["addresses"][name] = memory
        return True

    def IExecutionContext__execute_async_v3(self, this: Any, stream_handle: int) -> bool:
        assert stream_handle == STREAM, "work on the default stream waits for all other streams"
        state = this._state
        if set(state["addresses"]) != set(state["engine"]["model"].tensors):
            return self.complain("not every tensor has an address") or False

        def work() -> None:
            state["engine"]["model"].run(state["shapes"], state["addresses"])

        CAPTURING[-1].append(work) if CAPTURING else work()
        return True


def _plan(header: Mapping[str, Any], onnx_path: str) -> bytes:
    """A plan holds its network, as TensorRT's do: the ONNX file may go."""
    return MAGIC + json.dumps(header).encode() + b"\n" + Path(onnx_path).read_bytes()


class _Model:
    """An ONNX model whose inputs and outputs are memory addresses."""

    def __init__(self, content: bytes) -> None:
        import onnx
        import onnxruntime

        graph = onnx.load_from_string(content).graph
        self.weights = [
            (one.name, one.data_type == onnx.TensorProto.FLOAT16, int(np.prod(one.dims)))
            for one in graph.initializer
            if one.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)
        ]
        self.inputs = [one.name for one in graph.input]
        self.tensors = {one.name: _tensor(one) for one in (*graph.input, *graph.output)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def compute(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [name for name in self.tensors if name not in self.inputs]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        zeros = {name: np.zeros(shapes[name], self.tensors[name][0]) for name in self.inputs}
        return {name: value.shape for name, value in self.compute(zeros).items()}

    def run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> None:
        views = {
            name: _memory(addresses[name], shapes[name], dtype) for name, (dtype, _) in self.tensors.items()
        }
        for name, value in self.compute({name: views[name].copy() for name in self.inputs}).items():
            views[name][...] = value


def _memory(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_byte * size).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)


def _tensor(value: Any) -> tuple[str, list[Any]]:
    kind = value.type.tensor_type
    return _ONNX_TYPES[kind.elem_type], [side.dim_param or side.dim_value for side in kind.shape.dim]


def _dynamic_inputs(graph: Any) -> dict[str, list[Any]]:
    shapes = {one.name: _tensor(one)[1] for one in graph.input}
    return {name: shape for name, shape in shapes.items() if any(isinstance(side, str) for side in shape)}


def _refusal(net: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if net["strong"] and {"FP16", "BF16", "INT8"} & set(settings["flags"]):
        return "precision flags are not compatible with a strongly typed network"
    given = settings["profiles"][0]._state["shapes"] if settings["profiles"] else {}
    for name, shape in net["inputs"].items():
        if name not in given:
            return f"no optimization profile has been defined for {name}"
        sides = zip(shape, *given[name], strict=True)
        if any(isinstance(want, int) and {want} != set(sizes) for want, *sizes in sides):
            return f"the profile of {name} does not match {shape}"
    return ""


def _phases(monitor: Any) -> bool:
    """A build's phases, as TensorRT reports them; whether the build may go on."""
    if monitor is None:
        return True
    monitor.phase_start("Building Engine", None, 3)
    monitor.phase_start("Timing", "Building Engine", 2)
    going = [monitor.step_complete("Timing", 0), monitor.step_complete("Building Engine", 0)]
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building Engine")
    return all(answer is True for answer in going)


def install(
    monkeypatch: Any, flavour: str, inject: Mapping[str, Any] | None = None, *, lie: bool = False
) -> Fakes:
    """Put a stand-in in TensorRT's place and one in CUDA's, for one test."""
    fakes = fake_tensorrt(flavour, inject, lie=lie)
    monkeypatch.setitem(sys.modules, "tensorrt", fakes.module)
    for name, value in cuda_stand_ins().items():
        monkeypatch.setattr(name, value)
    return fakes
