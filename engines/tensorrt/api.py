"""The installed TensorRT: failed calls become errors with the lines that it logged.

The bindings are used directly. Polygraphy has a logger, a builder configuration with progress monitor and
timing cache, and a runner that takes torch's tensors. It would replace the walk through a `BuildPlan` and
part of the session, but not its CUDA graphs, and a Jetson would need one more package. Only `_import` imports
TensorRT.

This code has not run on a GPU. It is tested against stand-ins made from TensorRT's own API tables, and
over the real bindings with compiled libraries that compute nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from synthkit.errors import EngineError, MissingExtra
from synthkit.progress import progress_bar

log = logging.getLogger(__name__)
Value = TypeVar("Value")

NO_DEVICE = "it finds no GPU and driver that it can use"
"""Meaning of a constructor that returns nothing; the CUDA error itself, if any, is in TensorRT's log."""

_MORE_MEMORY = "lower --batch, build-engines.trt_workspace or the size, or set build-engines.low_memory=true"
_ADVICE = {
    NO_DEVICE: "check the NVIDIA driver with `synthkit doctor`",
    "kMAGIC_TAG": "the file is no TensorRT plan; rebuild it with --force",
    "Version tag does not match": "the plan is of another TensorRT version; rebuild it with --force",
    "expecting library version": "the plan is of another TensorRT version; rebuild it with --force",
    "incompatible device": "the plan is of another GPU; rebuild it with --force",
    "ut of memory": _MORE_MEMORY,
    "OutOfMemory": _MORE_MEMORY,
    "insufficient memory": "lower --batch or raise build-engines.trt_workspace",
    "CUDA initialization failure": "check the NVIDIA driver with `synthkit doctor`",
}
"""Part of a line in TensorRT's log -> advice."""


class TensorRt:
    """The `tensorrt` package with a logger that keeps its errors.

    Attributes:
        module: the package.
        version: its version with the build number.
        logger: argument of every TensorRT object.
        errors: errors logged since the last failure; the calls themselves give no reason.

    Raises:
        EngineError: the package does not import.
        MissingExtra: it is not installed.
    """

    def __init__(self) -> None:
        self.module = _import()
        self.version = str(self.module.__version__)
        self.errors: list[str] = []
        self.logger = _logger(self.module, self.errors)

    def check(self, action: str, value: Value | None) -> Value:
        """Return the value of a call, unless it is None, False or negative, as after a failure.

        Args:
            action: completes "TensorRT could not …".
            value: returned by the call.

        Raises:
            EngineError: the call failed.
        """
        if value is None or value is False or (isinstance(value, int) and value < 0):
            raise self.failure(action)
        return value

    @contextlib.contextmanager
    def guard(self, action: str) -> Iterator[None]:
        """Turn exceptions of the bindings into an EngineError of one line.

        Constructors raise "factory function returned nullptr" as a TypeError; any other TypeError is a wrong
        call, which is a bug here and keeps its traceback.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise self.failure(action, str(error)) from None
        except TypeError as error:
            if "nullptr" not in str(error):
                raise
            raise self.failure(action, NO_DEVICE) from None

    def failure(self, action: str, detail: str = "") -> EngineError:
        """Make an error of the action, the lines that TensorRT logged since the last failure, and advice."""
        reasons = [*self.errors, detail] if self.errors or detail else ["it gives no reason"]
        self.errors.clear()
        text = " ".join(" ".join(reasons).split())
        advice = next((advice for needle, advice in _ADVICE.items() if needle in text), "")
        advice = advice or "see --verbose, or use --backend onnxruntime"
        return EngineError(f"TensorRT {self.version} could not {action}: {text[:400]}; {advice}")


def _import() -> Any:
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        if error.name != "tensorrt":
            raise EngineError(f"the tensorrt package does not import: {error}; reinstall it") from None
        raise MissingExtra("tensorrt", "tensorrt") from None
    except Exception as error:  # bindings without their libraries raise ImportError or OSError
        raise EngineError(f"the tensorrt package does not import: {error}; reinstall it") from None
    return tensorrt


def probe_tensorrt() -> str | None:
    """Start TensorRT; return the reason where it does not work on this machine, None where it does.

    The import alone says little: a Runtime needs the driver and the device.
    """
    try:
        rt = TensorRt()
    except MissingExtra:
        return "the tensorrt package is not installed"
    except EngineError as error:
        return str(error).removesuffix("; reinstall it")
    try:
        runtime = rt.module.Runtime(rt.logger)
    except Exception as error:  # the bindings raise TypeError and RuntimeError where there is no device
        reason = "; ".join(rt.errors) or (NO_DEVICE if "nullptr" in str(error) else str(error))
        return f"TensorRT {rt.version} cannot start: {' '.join(reason.split())}"
    return None if runtime else f"TensorRT {rt.version} finds no usable GPU"


def tensorrt_version() -> str | None:
    """Version of the installed TensorRT, also without a usable GPU; None where it does not import.

    Jetsons have it as a system package that pip does not know.
    """
    try:
        return str(_import().__version__)
    except (EngineError, MissingExtra):
        return None


def _logger(trt: Any, errors: list[str]) -> Any:
    """Make a logger that keeps errors and passes everything on to Python's logging."""
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.DEBUG,  # errors are raised with their text; here they are for -v
        trt.ILogger.ERROR: logging.DEBUG,
        trt.ILogger.WARNING: logging.DEBUG,
        trt.ILogger.INFO: logging.DEBUG - 1,
        trt.ILogger.VERBOSE: logging.DEBUG - 2,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # without it the bindings crash

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                errors.append(msg.strip())
            log.log(levels.get(severity, logging.DEBUG), "TensorRT: %s", msg.strip())

    return Logger()


class Progress:
    """Progress bar of a build, one top phase after another.

    TensorRT calls from several threads, takes a missing answer for "stop", and swallows exceptions.

    Args:
        label: name of the network.

    Attributes:
        error: exception of a call, to raise after the build.
    """

    def __init__(self, label: str) -> None:
        self.error: BaseException | None = None
        self._label = label
        self._bars: dict[str, Any] = {}
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Show a bar for a phase without parent."""
        if parent is None:
            with self._lock:
                bar = progress_bar(steps, f"{self._label}: {phase}")
                self._bars[phase] = bar

    def step(self, phase: str) -> bool:
        """Move the bar; return False to stop the build."""
        with self._lock:
            if phase in self._bars:
                self._bars[phase].update()
        return self.error is None

    def finish(self, phase: str) -> None:
        """Remove the bar; a phase may end before its last step."""
        with self._lock:
            if phase in self._bars:
                self._bars.pop(phase).close()


def progress_monitor(trt: Any, progress: Progress) -> Any:
    """Make TensorRT's progress monitor of a `Progress`; None where TensorRT has none (8.x)."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _recorded(progress, lambda: progress.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return bool(_recorded(progress, lambda: progress.step(phase_name)))

        def phase_finish(self, phase_name: str) -> None:
            _recorded(progress, lambda: progress.finish(phase_name))

    return Monitor()


def _recorded(progress: Progress, call: Any) -> Any:
    """Return the call's value; an exception is kept for after the build, and stops it."""
    try:
        return call()
    except BaseException as error:  # KeyboardInterrupt arrives here too, in whichever thread is Python's main
        progress.error = error
        return False
