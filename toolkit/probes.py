"""Try a heavy runtime for real. A probe is meant for a process of its own: it may crash or hang.

Every function returns JSON data and raises whatever the runtime raises.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

#: A whole ONNX graph, y = Relu(x) on float32[2] (IR 7, opset 13); making one would need the onnx package.
TINY_ONNX = (
    b'\x08\x07\x12\x00:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x02b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x02B\x04\n\x00\x10\r"
)


def answer(target: str, arguments: list[str]) -> Any:
    """Call "module:function" with the arguments.

    Args:
        target: where the function is.
        arguments: its positional arguments.
    """
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)(*arguments)


def list_providers() -> list[str]:
    """The execution providers that the installed onnxruntime lists."""
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def open_provider(provider: str) -> bool:
    """True if a session on the provider opens, keeps the provider and computes.

    Args:
        provider: name as onnxruntime lists it.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(TINY_ONNX, providers=[provider])
    (result,) = session.run(None, {"x": np.array([-1, 2], dtype=np.float32)})
    return provider in session.get_providers() and bool((result == [0, 2]).all())


def torch_and_cuda() -> dict[str, Any]:
    """torch's CUDA build and the devices that it can really use."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{index}").add_(1)
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return {"cuda_build": torch.version.cuda, "devices": devices}


def torchvision_operators() -> str:
    """The version of a torchvision whose operators load into the installed torch."""
    import torchvision
    import torchvision.ops

    return str(torchvision.__version__)


if __name__ == "__main__":
    import json

    print(json.dumps(answer(sys.argv[1], sys.argv[2:]), default=str))
