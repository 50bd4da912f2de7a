"""Stand-ins for what the TensorRT sessions use of torch.cuda, for machines without a GPU."""

from __future__ import annotations

import contextlib
import pkgutil
import platform
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from synthkit.engines.tensorrt.plan_cache import Machine

STREAM = 7
"""The handle of the stand-in's CUDA stream; 0 would be the default stream."""

CAPTURING: list[list[Callable[[], None]]] = []
"""The graphs that are being captured: work goes there and is done at replay."""


class FakeGraph:
    """`torch.cuda.CUDAGraph`: work that was captured, done again at replay."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        assert self.work, "nothing was captured"
        self.replays += 1
        for one in self.work:
            one()


@contextlib.contextmanager
def _capture(graph: FakeGraph, stream: Any = None) -> Iterator[None]:
    assert stream is not None and stream.cuda_stream == STREAM
    CAPTURING.append(graph.work)
    try:
        yield
    finally:
        CAPTURING.pop()


def stand_in_machine(version: str) -> Machine:
    return Machine("Stand-in GPU", "8.7", version, platform.system(), platform.machine())


def cuda_stand_ins() -> dict[str, Any]:
    """ "torch.…" -> what stands for it where there is no GPU; memory is the CPU's, aligned as CUDA's is."""
    import torch

    real = torch.empty

    def empty(*shape: Any, device: Any = None, **options: Any) -> Any:
        if getattr(device, "type", "cpu") != "cuda":
            return real(*shape, device=device, **options)
        (shape,), dtype = shape, options["dtype"]
        count = int(np.prod(shape))
        itemsize = real(0, dtype=dtype).element_size()
        room = real(count + 512 // itemsize, dtype=dtype).fill_(77)
        start = -room.data_ptr() % 512 // itemsize
        return room[start : start + count].view(tuple(shape))

    stream = SimpleNamespace(cuda_stream=STREAM, synchronize=lambda: None, wait_stream=lambda other: None)
    return {
        "torch.empty": empty,  # libraries that ask for CUDA's presence must not find it: exports run as ever
        "synthkit.engines.diffusion.build.this_machine": stand_in_machine,
        "synthkit.engines.tensorrt.session.this_machine": stand_in_machine,
        "torch.cuda.Stream": lambda: stream,
        "torch.cuda.current_stream": lambda: SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None),
        "torch.cuda.stream": lambda stream: contextlib.nullcontext(),
        "torch.cuda.CUDAGraph": FakeGraph,
        "torch.cuda.graph": _capture,
    }


def apply(stand_ins: Mapping[str, Any]) -> None:
    """Put stand-ins in place for good, in a process of a test's own."""
    for name, value in stand_ins.items():
        owner, _, attribute = name.rpartition(".")
        setattr(pkgutil.resolve_name(owner), attribute, value)
