"""The installed TensorRT, with errors in place of None and False, and with the lines that it logs.

The bindings are used as they are, without Polygraphy: it would spare the sixty lines that walk a `BuildPlan`,
but not the logger, the progress bar, the reading of None and False, nor the session (its runner knows neither
torch's buffers nor CUDA graphs), and a Jetson would need one more package. Only `_import` imports TensorRT.

This code has not run on a GPU. It is tested against stand-ins made from TensorRT's own API tables, and
over the real bindings with compiled libraries that compute nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from synthkit.errors import EngineError, MissingExtra

log = logging.getLogger(__name__)
Value = TypeVar("Value")

NO_DEVICE = "it finds no GPU and driver that it can use"
"""What a constructor that answers with nothing means; the CUDA error itself, if any, is in TensorRT's log."""

_ADVICE = {
    NO_DEVICE: "check the NVIDIA driver with `synthkit doctor`",
    "kMAGIC_TAG": "the file is no TensorRT plan; rebuild it with --force",
    "Version tag does not match": "the plan is of another TensorRT version; rebuild it with --force",
    "expecting library version": "the plan is of another TensorRT version; rebuild it with --force",
    "incompatible device": "the plan is of another GPU; rebuild it with --force",
    "ut of memory": "lower --batch, --trt-workspace or the size, or build with --low-memory",
    "OutOfMemory": "lower --batch, --trt-workspace or the size, or build with --low-memory",
    "insufficient memory": "lower --batch or raise --trt-workspace",
    "CUDA initialization failure": "check the NVIDIA driver with `synthkit doctor`",
}
"""What TensorRT logs -> what to do about it."""


class TensorRt:
    """TensorRT as this process has it.

    Attributes:
        module: the `tensorrt` package.
        version: its version with the build number.
        logger: what every TensorRT object is given.
        errors: the errors that it has logged; its calls themselves give no reason.

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
        """The value of a call, which TensorRT answers with None, False or a negative number when it fails.

        Args:
            action: completes "TensorRT could not …".
            value: what the call returned.

        Raises:
            EngineError: the call failed.
        """
        if value is None or value is False or (isinstance(value, int) and value < 0):
            raise self.failure(action)
        return value

    @contextlib.contextmanager
    def guard(self, action: str) -> Iterator[None]:
        """Turn what the bindings raise into one line.

        Constructors raise "factory function returned nullptr" as a TypeError; any other TypeError is a wrong
        call, which is a bug of ours and keeps its traceback.
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
        """An error that names the action, what TensorRT logged since the last failure, and the way out."""
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
    """Why TensorRT does not work on this machine; None where it does.

    That the package imports says little: a Runtime needs the driver and the device.
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
    """The version of the installed TensorRT, also where no GPU lets it start; None where it does not import.

    Jetsons have it as a system package, of which pip knows nothing.
    """
    try:
        return str(_import().__version__)
    except (EngineError, MissingExtra):
        return None


def _logger(trt: Any, errors: list[str]) -> Any:
    """A logger that keeps errors and passes everything on to Python's logging."""
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
    """The builder's phases as one bar: each top phase in turn.

    TensorRT calls from several threads, takes a missing answer for "stop", and swallows what is raised.

    Args:
        label: what is built.
    """

    def __init__(self, label: str) -> None:
        self.error: BaseException | None = None
        self._label = label
        self._bars: dict[str, tqdm] = {}
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Show a bar for a phase that no other holds."""
        if parent is None:
            with self._lock:
                bar = tqdm(total=steps, desc=f"{self._label}: {phase}", leave=False, disable=None)
                self._bars[phase] = bar

    def step(self, phase: str) -> bool:
        """Move the bar; whether the build goes on."""
        with self._lock:
            if phase in self._bars:
                self._bars[phase].update()
        return self.error is None

    def finish(self, phase: str) -> None:
        """Take the bar away; a phase may end before all its steps."""
        with self._lock:
            if phase in self._bars:
                self._bars.pop(phase).close()


def progress_monitor(trt: Any, progress: Progress) -> Any:
    """The bindings' view of a `Progress`; None where TensorRT has no progress monitor (8.x)."""
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
    """What the call returns; an exception is kept for after the build, and stops it."""
    try:
        return call()
    except BaseException as error:  # KeyboardInterrupt arrives here too, in whichever thread is Python's main
        progress.error = error
        return False
