"""The shape and type of a model's inputs and outputs, as plain data that no runtime is needed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from synthkit.errors import EngineError


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor.

    Attributes:
        name: the tensor's name in the graph.
        dtype: NumPy's name of the element type, for example "float32".
        shape: sizes; a string names a dynamic axis, for example ("batch", 4, 8, 8).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def check(self, array: np.ndarray) -> None:
        """Refuse an array that this tensor cannot hold.

        Raises:
            EngineError: the element type, the rank or a fixed size differs.
        """
        fits = len(array.shape) == len(self.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(self.shape, array.shape, strict=True)
        )
        if not fits or array.dtype != self.dtype:
            raise EngineError(
                f"input {self.name!r} must be {self.dtype} {list(self.shape)}, "
                f"got {array.dtype.name} {list(array.shape)}"
            )

    def to_json(self) -> dict[str, object]:
        """The spec as JSON data."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def spec_from_json(data: Mapping[str, Any]) -> TensorSpec:
    """The inverse of `TensorSpec.to_json`."""
    shape = data["shape"]
    assert isinstance(shape, Sequence)
    return TensorSpec(str(data["name"]), str(data["dtype"]), tuple(shape))
