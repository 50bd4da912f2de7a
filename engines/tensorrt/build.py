"""Building an engine from a `BuildPlan` and an ONNX file with TensorRT's builder.

All that can be decided without TensorRT is decided in `build_plan`. Names and order of the calls follow
TensorRT's Python API from 8.5 to 11.4. Not yet run on a GPU, see `api`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from synthkit.engines.tensorrt.api import Progress, TensorRt, progress_monitor
from synthkit.engines.tensorrt.build_plan import BuildPlan
from synthkit.engines.tensorrt.timing_cache import load_timings, save_timings
from synthkit.errors import EngineError


def build_engine(rt: TensorRt, plan: BuildPlan, onnx: Path, timings: Path) -> bytes:
    """Build one network.

    Args:
        rt: the installed TensorRT.
        plan: flags, profiles and limits.
        onnx: the network's file; its external weights lie beside it.
        timings: the timing cache to read and extend.

    Returns:
        The engine as TensorRT serialises it.

    Raises:
        EngineError: a call failed; names it with TensorRT's log.
    """
    with rt.guard(f"start the builder for {plan.component}"):
        builder = rt.module.Builder(rt.logger)
        network = rt.check("make a network", builder.create_network(_network_flags(rt, plan)))
        parser = rt.module.OnnxParser(network, rt.logger)
        if plan.portable:  # on 8.6 the default is a plugin, which such plans must not hold
            parser.set_flag(rt.module.OnnxParserFlag.NATIVE_INSTANCENORM)
    if not parser.parse_from_file(str(onnx)):
        raise rt.failure(f"read {onnx}", _parser_errors(parser))
    config = rt.check("make a builder configuration", builder.create_builder_config())
    with rt.guard(f"set up the builder for {plan.component}"):
        _configure(rt, config, plan)
        _add_profile(rt, builder, config, plan)
        load_timings(config, timings)
    progress = Progress(plan.component)
    monitor = progress_monitor(rt.module, progress)
    if monitor is not None:
        config.progress_monitor = monitor
    with rt.guard(f"build {plan.component}"):
        content = builder.build_serialized_network(network, config)
    if progress.error:
        raise progress.error
    engine = bytes(rt.check(f"build {plan.component}", content))
    save_timings(config, timings)
    return engine


def _network_flags(rt: TensorRt, plan: BuildPlan) -> int:
    """Flags of the network. Strong typing has a flag on 10 and needs none on 11, which may drop the name."""
    kinds = rt.module.NetworkDefinitionCreationFlag
    if not hasattr(kinds, plan.network_flag):
        if int(rt.version.partition(".")[0]) < 11:
            raise EngineError(f"TensorRT {rt.version} has no network flag {plan.network_flag}; update it")
        return 0
    return 1 << int(getattr(kinds, plan.network_flag))  # `1 << member` itself is a TypeError


def _configure(rt: TensorRt, config: Any, plan: BuildPlan) -> None:
    trt = rt.module
    for name in plan.flags:
        config.set_flag(_member(rt, trt.BuilderFlag, name))
    if plan.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace)
    if plan.level is not None:
        config.builder_optimization_level = plan.level
    if plan.hardware is not None:
        level = _member(rt, trt.HardwareCompatibilityLevel, plan.hardware)
        config.hardware_compatibility_level = level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # which the precision check reads


def _member(rt: TensorRt, kind: Any, name: str) -> Any:
    if not hasattr(kind, name):
        raise EngineError(
            f"TensorRT {rt.version} has no {kind.__name__}.{name}; leave the option out, or update it"
        )
    return getattr(kind, name)


def _add_profile(rt: TensorRt, builder: Any, config: Any, plan: BuildPlan) -> None:
    profile = rt.check("make an optimisation profile", builder.create_optimization_profile())
    for one in plan.profiles:
        profile.set_shape(one.name, one.minimum, one.usual, one.maximum)
    rt.check(f"take the batch range of {plan.component}", config.add_optimization_profile(profile))


def _parser_errors(parser: Any) -> str:
    return "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
