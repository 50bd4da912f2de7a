"""Running a model file: one small protocol, implemented by ONNX Runtime here.

A provider that was asked for and did not load is an error, never a silent fall-back to the CPU.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthkit.artifacts import file_sha256
from synthkit.engines.runtime.tensor_spec import TensorSpec
from synthkit.errors import EngineError, MissingExtra, first_line, nearest

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DEVICES = {"cpu": "cpu", "cuda": "cuda", "tensorrt": "cuda"}
_CACHE = Path("~/.cache/synthkit/onnxruntime-tensorrt")
_ELEMENTS = {"float": "float32", "double": "float64"}  # ONNX Runtime's names that differ from NumPy's


class Session(Protocol):
    """A model that is loaded and can run.

    Attributes:
        inputs: specs of `run`'s inputs.
        outputs: specs of `run`'s outputs.
        provider: "cpu", "cuda" or "tensorrt".
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provider: str

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output.

        Args:
            feeds: input name -> array of the type and shape of its spec.

        Raises:
            EngineError: an input is missing or does not fit, or the runtime fails.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the session cannot run after that."""
        ...


class OrtSession:
    """An ONNX file in ONNX Runtime.

    Args:
        session: the loaded `onnxruntime.InferenceSession`.
        provider: that it runs on.
        label: name of the model in error messages.

    Attributes:
        device: of the tensors that `bind` takes, as torch names it: "cpu" or "cuda".
        metadata: key -> text of the file's own metadata.
    """

    def __init__(self, session: Any, provider: str, label: str) -> None:
        self._session = session
        self._label = label
        self.provider = provider
        self.device = _DEVICES[provider]
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self.metadata: Mapping[str, str] = dict(session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; see `Session.run`."""
        session = self._opened()
        self._check(feeds)
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self._label} failed while running: {first_line(error)}") from None

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """Tie torch tensors to the model, so that running it copies nothing.

        Args:
            inputs: input name -> contiguous tensor on `device`, of the type and shape of its spec.
            outputs: output name -> tensor that receives it.

        Returns:
            A function that reads the inputs as they are then and fills the outputs. Several of one session
            may run at the same time.

        Raises:
            EngineError: an input is missing or a tensor does not fit; the function, where the runtime fails.
        """
        session = self._opened()
        self._check({name: _Described.of(tensor) for name, tensor in inputs.items()})
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, tensor in tensors.items():
                bind(name, **_placed(name, tensor, self.device))

        def compute() -> None:
            held = (inputs, outputs)  # the binding knows addresses alone: the tensors must live as long as it
            try:
                self._opened().run_with_iobinding(binding)
            except Exception as error:  # ONNX Runtime's errors share no base class
                raise EngineError(f"{self._label} failed while running: {first_line(error)}") from None
            del held

        return compute

    def placement(self) -> dict[str, int]:
        """Provider -> number of nodes that it got; empty where ONNX Runtime is too old to tell."""
        counts: Counter[str] = Counter()
        told = getattr(self._opened(), "get_provider_graph_assignment_info", list)
        for part in told():
            counts[part.ep_name] += len(part.get_nodes())
        return dict(counts)

    def close(self) -> None:
        """Free the model's memory."""
        self._session = None

    def _opened(self) -> Any:
        if self._session is None:
            raise EngineError(f"{self._label} was closed; open it again")
        return self._session

    def _check(self, feeds: Mapping[str, Any]) -> None:
        wanted = [spec.name for spec in self.inputs]
        if set(wanted) != set(feeds):
            raise EngineError(f"{self._label} takes the inputs {wanted}, got {list(feeds)}")
        for spec in self.inputs:
            spec.check(feeds[spec.name])


@dataclass(frozen=True)
class _Described:
    """Shape and dtype of a torch tensor, as `TensorSpec.check` reads them from an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, tensor: Any) -> Any:
        return cls(tuple(tensor.shape), np.dtype(_dtype_name(tensor)))


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _placed(name: str, tensor: Any, device: str) -> dict[str, Any]:
    """Arguments of ONNX Runtime's I/O binding for a tensor."""
    if tensor.device.type != device or not tensor.is_contiguous():
        raise EngineError(f"{name!r} must be a contiguous tensor on {device}, got one on {tensor.device}")
    return {
        "device_type": device,
        "device_id": tensor.device.index or 0,
        "element_type": np.dtype(_dtype_name(tensor)),
        "shape": tuple(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }


def open_session(
    model: Path | bytes,
    provider: str = "cpu",
    data_folder: Path | None = None,
    threads: int | None = None,
    exact_int8: bool = False,
) -> OrtSession:
    """Load an ONNX model.

    Args:
        model: the file, or its content.
        provider: "cpu", "cuda", "tensorrt", or "auto": CUDA where it truly loads, otherwise the CPU.
        data_folder: folder of the external weights that the content names.
        threads: threads of one operator on the CPU; None: `OMP_NUM_THREADS`, or what ONNX Runtime chooses.
        exact_int8: compute a Q/DQ graph step by step, as it is written. The integer kernels that take its
            place otherwise overflow on processors without VNNI when they meet weights of 8 bits.

    Raises:
        EngineError: the file is absent or broken, or the provider did not load.
        MissingExtra: ONNX Runtime is not installed.
    """
    if provider != "auto":
        return _open(model, provider, data_folder, threads, exact_int8)
    try:
        return _open(model, "cuda", data_folder, threads, exact_int8)
    except _ProviderAbsent:
        return _open(model, "cpu", data_folder, threads, exact_int8)


def settled_provider(model: Path, provider: str) -> str:
    """Resolve the provider "auto" on this machine; any other is returned as it is.

    Args:
        model: a file to try it with.
        provider: see `open_session`.
    """
    if provider != "auto":
        return provider
    if PROVIDERS["cuda"] not in _onnxruntime().get_available_providers():
        return "cpu"
    session = open_session(model, "auto")
    session.close()
    return session.provider


class _ProviderAbsent(EngineError):
    """The provider that was asked for cannot be had on this machine."""


def _open(
    model: Path | bytes, provider: str, data_folder: Path | None, threads: int | None, exact_int8: bool
) -> OrtSession:
    runtime = _onnxruntime()
    source = str(model) if isinstance(model, Path) else model
    label = source if isinstance(source, str) else "the model"
    wanted = _checked_provider(runtime, provider)
    if isinstance(model, Path):
        existing_engine(model)
    try:
        session = runtime.InferenceSession(
            source,
            session_options(data_folder, threads, exact_int8),
            providers=_wished(provider, model),
            enable_fallback=0,  # otherwise Python opens the model again with other providers
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise _refusal(provider, label, error) from None
    if wanted not in session.get_providers():
        raise _ProviderAbsent(
            f"the provider {provider!r} did not load (ONNX Runtime fell back to {session.get_providers()}); "
            f"install {_NEEDS.get(provider, 'what it needs')}, or use the CPU"
        )
    session.disable_fallback()  # nor may a failing run open the model on the CPU
    return OrtSession(session, provider, label)


def existing_engine(path: Path) -> Path:
    """Return the file if it exists.

    Raises:
        EngineError: it does not.
    """
    if not path.is_file():
        raise EngineError(f"no engine {path}; make it with `synthkit build-engines`")
    return path


_NEEDS = {
    "cuda": "the CUDA and cuDNN libraries it needs",
    "tensorrt": "TensorRT 10 with the CUDA and cuDNN libraries that onnxruntime-gpu was built for",
}


def _refusal(provider: str, label: str, error: Exception) -> EngineError:
    """The error of a model that did not open: the provider's fault, or the file's."""
    text = first_line(error)
    if provider != "cpu" and ("ExecutionProvider" in text or "EP Error" in text or "EPFail" in text):
        return _ProviderAbsent(
            f"the provider {provider!r} did not load ({text}); install {_NEEDS[provider]}, or use the CPU"
        )
    return EngineError(f"ONNX Runtime cannot load {label}: {text}; rebuild it with --force")


def _wished(provider: str, model: Path | bytes) -> list[Any]:
    """Providers in order of preference: what TensorRT cannot compute goes to CUDA, then to the CPU."""
    if provider != "tensorrt":
        return [PROVIDERS[provider]]
    folder = _CACHE.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": content_prefix(model),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(folder),
    }
    return [(PROVIDERS["tensorrt"], options), PROVIDERS["cuda"]]


def content_prefix(model: Path | bytes) -> str:
    """Name of a model's cached engines, from its content and that of its external weights.

    The provider's own key covers file name, tensor names and versions, but no weight: a changed network under
    the same name would run as the old one.
    """
    if isinstance(model, bytes):
        return f"synthkit_{hashlib.sha256(model).hexdigest()[:16]}"
    files = [model, *sorted(path for path in model.parent.glob(f"{model.name}[._]*") if path.is_file())]
    digests = "".join(file_sha256(path) for path in files)
    return f"synthkit_{hashlib.sha256(digests.encode()).hexdigest()[:16]}"


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtra("onnxruntime", "cpu") from None
    return onnxruntime


def _checked_provider(runtime: Any, provider: str) -> str:
    if provider not in PROVIDERS:
        raise EngineError(
            f"no provider {provider!r}{nearest(provider, PROVIDERS)}; one of auto, {', '.join(PROVIDERS)}"
        )
    if PROVIDERS[provider] not in runtime.get_available_providers():
        raise _ProviderAbsent(
            f"this onnxruntime package has no {PROVIDERS[provider]}; "
            "replace it: pip uninstall onnxruntime && pip install 'synthkit-edge[gpu]'"
        )
    if provider != "cpu" and hasattr(runtime, "preload_dlls"):
        runtime.preload_dlls()  # finds the CUDA libraries that pip installed; prints where it does not
    return PROVIDERS[provider]


def usable_threads() -> int:
    """Threads that may compute: `OMP_NUM_THREADS`, which scripts for shared machines set, or the cores."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdecimal() and int(wish) else len(os.sched_getaffinity(0))


def session_options(
    data_folder: Path | None = None, threads: int | None = None, exact_int8: bool = False
) -> Any:
    """ONNX Runtime's options for a session; the arguments are those of `open_session`."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3  # what matters comes back as an exception or in get_providers
    wish = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = threads or (int(wish) if wish.isdecimal() else 0)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `placement`
    if exact_int8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder.resolve())
        )
    return options


def _spec(node: Any) -> TensorSpec:
    element = node.type.removeprefix("tensor(").removesuffix(")")
    shape = [side if isinstance(side, (int, str)) else f"axis{axis}" for axis, side in enumerate(node.shape)]
    return TensorSpec(node.name, _ELEMENTS.get(element, element), tuple(shape))
