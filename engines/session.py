"""Running a model file: one small protocol, and ONNX Runtime behind it.

A provider that was asked for and did not load is an error, never a silent fall-back to the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from synthkit.errors import EngineError, MissingExtra, nearest
from synthkit.tensors import TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ELEMENTS = {"float": "float32", "double": "float64"}  # ONNX Runtime's names that differ from NumPy's


class Session(Protocol):
    """A model that is loaded and can run.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` returns.
        provider: what computes: "cpu" or "cuda".
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
        """Give the model's memory back; the session cannot run after that."""
        ...


class OrtSession:
    """An ONNX file in ONNX Runtime.

    Args:
        session: the loaded `onnxruntime.InferenceSession`.
        provider: what computes.
        label: what errors call the model.
    """

    def __init__(self, session: Any, provider: str, label: str) -> None:
        self._session = session
        self._label = label
        self.provider = provider
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute every output; see `Session.run`."""
        if self._session is None:
            raise EngineError(f"{self._label} was closed; open it again")
        wanted = [spec.name for spec in self.inputs]
        if set(wanted) != set(feeds):
            raise EngineError(f"{self._label} takes the inputs {wanted}, got {list(feeds)}")
        for spec in self.inputs:
            spec.check(feeds[spec.name])
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self._label} failed while running: {_first_line(error)}") from None

    def close(self) -> None:
        """Give the model's memory back."""
        self._session = None


def open_session(model: Path | bytes, provider: str = "cpu", data_folder: Path | None = None) -> OrtSession:
    """Load an ONNX model.

    Args:
        model: the file, or its content.
        provider: "cpu", "cuda", or "auto": CUDA where it truly loads, otherwise the CPU.
        data_folder: where the weights lie that the content names as external data.

    Raises:
        EngineError: the file is absent or broken, or the provider did not load.
        MissingExtra: ONNX Runtime is not installed.
    """
    if provider != "auto":
        return _open(model, provider, data_folder)
    try:
        return _open(model, "cuda", data_folder)
    except _ProviderAbsent:
        return _open(model, "cpu", data_folder)


class _ProviderAbsent(EngineError):
    """The provider that was asked for cannot be had on this machine."""


def _open(model: Path | bytes, provider: str, data_folder: Path | None) -> OrtSession:
    runtime = _onnxruntime()
    source = str(model) if isinstance(model, Path) else model
    label = source if isinstance(source, str) else "the model"
    wanted = _checked_provider(runtime, provider)
    if isinstance(model, Path) and not model.is_file():
        raise EngineError(f"no engine {model}; make it with `synthkit build-engines`")
    try:
        session = runtime.InferenceSession(source, _options(runtime, data_folder), providers=[wanted])
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise EngineError(
            f"ONNX Runtime cannot load {label}: {_first_line(error)}; rebuild it with --force"
        ) from None
    if wanted not in session.get_providers():
        raise _ProviderAbsent(
            f"the provider {provider!r} did not load (ONNX Runtime fell back to {session.get_providers()}); "
            "install the CUDA and cuDNN libraries it needs, or use the CPU"
        )
    return OrtSession(session, provider, label)


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
            "replace it: pip uninstall onnxruntime && pip install 'synthkit[gpu]'"
        )
    return PROVIDERS[provider]


def _options(runtime: Any, data_folder: Path | None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # what matters comes back as an exception or in get_providers
    # The one knob that torch, NumPy and scripts for shared machines already set; 0 lets ONNX Runtime choose.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder.resolve())
        )
    return options


def _spec(node: Any) -> TensorSpec:
    element = node.type.removeprefix("tensor(").removesuffix(")")
    shape = [side if isinstance(side, (int, str)) else f"axis{axis}" for axis, side in enumerate(node.shape)]
    return TensorSpec(node.name, _ELEMENTS.get(element, element), tuple(shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
