"""synthkit: a handful of photos becomes an image classifier that runs on an edge device.

    import synthkit

    result = synthkit.adapt("few_shots", test_dir="test")
    bundle = synthkit.Bundle.open(result.bundle)

Every name is imported when it is first used, so that `import synthkit` costs nothing and a device needs only
what it uses. Errors that a user can mend are `synthkit.errors.SynthkitError`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synthkit.data.images import ImageSet as ImageSet
    from synthkit.recipes.api import adapt as adapt
    from synthkit.recipes.api import build_engines as build_engines
    from synthkit.recipes.api import compare as compare
    from synthkit.recipes.api import evaluate as evaluate
    from synthkit.recipes.api import export as export
    from synthkit.recipes.api import generate as generate
    from synthkit.recipes.chain import ChainSettings as ChainSettings
    from synthkit.recipes.device.bundle import Bundle as Bundle
    from synthkit.recipes.settings import AdaptSettings as AdaptSettings
    from synthkit.recipes.settings import EngineSettings as EngineSettings
    from synthkit.recipes.settings import ExportSettings as ExportSettings
    from synthkit.recipes.settings import FilterSettings as FilterSettings
    from synthkit.recipes.settings import GenerateSettings as GenerateSettings
    from synthkit.recipes.settings import StyleSettings as StyleSettings
    from synthkit.recipes.settings import TrainSettings as TrainSettings

__version__ = "0.1.0"

# Nothing phones home. These libraries look when they are first imported, child processes inherit it, and
# whoever wants their telemetry can set it otherwise.
for _name, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)

_WHERE = {
    **dict.fromkeys(
        ("adapt", "build_engines", "compare", "evaluate", "export", "generate"), "synthkit.recipes.api"
    ),
    "Bundle": "synthkit.recipes.device.bundle",
    "ImageSet": "synthkit.data.images",
    "ChainSettings": "synthkit.recipes.chain",
    **dict.fromkeys(
        (
            "AdaptSettings",
            "EngineSettings",
            "ExportSettings",
            "FilterSettings",
            "GenerateSettings",
            "StyleSettings",
            "TrainSettings",
        ),
        "synthkit.recipes.settings",
    ),
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'synthkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
