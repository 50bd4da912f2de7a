"""The walk through TensorRT's builder, over a stand-in that is as strict as the bindings.

None of this has run on a GPU: what a real TensorRT times, fuses and computes is not tested here.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkit.engines.runtime.component_spec import BatchRange, read_geometry
from synthkit.engines.tensorrt import api as tensorrt_api
from synthkit.engines.tensorrt.api import TensorRt
from synthkit.engines.tensorrt.build import build_engine
from synthkit.engines.tensorrt.build_plan import PLANNED, BuildOptions, BuildPlan, decide_plan, planned_specs
from synthkit.engines.tensorrt.plan_cache import read_plan, read_sidecar
from synthkit.engines.tensorrt.plan_worker import PlanJob, make_plan, make_plan_in_child
from synthkit.engines.tensorrt.precision_check import check_precision, graph_weights, main_precision
from synthkit.errors import EngineError, ParityError
from tests.cuda_stand_ins import stand_in_machine
from tests.tensorrt_behaviour import MAGIC, TIMINGS, install
from tests.tensorrt_fakes import EACH_FLAVOUR, FLAVOURS, NULLPTR, Fakes, failing

SPEED_ONLY = {  # trouble with the timing cache costs time and nothing else
    "IBuilderConfig.create_timing_cache",
    "IBuilderConfig.set_timing_cache",
    "IBuilderConfig.get_timing_cache",
    "ITimingCache.combine",
    "ITimingCache.serialize",
}
HARMLESS = {"IExecutionContext.infer_shapes"}  # answers a list, of which an empty one is the good answer


def plan_for(engines: Path, component: str, flavour: str, **options: Any) -> BuildPlan:
    spec = next(one for one in planned_specs(read_geometry(engines)) if one.component == component)
    return decide_plan(spec, BatchRange(1, 2, 4), "fp16", BuildOptions(**options), FLAVOURS[flavour])


def job_for(
    engines: Path, tmp_path: Path, flavour: str = "10", component: str = "vae_decoder", **options: Any
) -> PlanJob:
    folder = tmp_path / component
    if not folder.exists():
        shutil.copytree(engines / component, folder)
    plan = plan_for(engines, component, flavour, **options)
    return PlanJob(plan, folder, tmp_path / "cache" / "t", stand_in_machine(FLAVOURS[flavour]))


def header(plan: Path) -> dict[str, Any]:
    """What the stand-in wrote into a plan."""
    content: dict[str, Any] = json.loads(read_plan(plan).removeprefix(MAGIC).partition(b"\n")[0])
    return content


@pytest.mark.slow
@pytest.mark.parametrize("flavour", EACH_FLAVOUR)
@pytest.mark.parametrize("component", PLANNED)
def test_a_plan_is_built_verified_and_written(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, component: str
) -> None:
    install(monkeypatch, flavour)
    path = make_plan(job_for(half_engines, tmp_path, flavour, component))
    assert path.parent == tmp_path / component
    facts = read_sidecar(path)
    assert facts["precision_check"].startswith("inspector: 100% of")
    assert facts["max_abs_error"] == 0 < facts["tolerance"], "the stand-in computes in ONNX Runtime too"
    rows = {tuple(side[0] for side in shapes) for shapes in header(path)["shapes"].values()}
    assert rows == {(1, 4, 8) if component == "unet" else (1, 2, 4)}


@pytest.mark.parametrize("flavour", EACH_FLAVOUR)
def test_every_option_reaches_the_builder(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    install(monkeypatch, flavour)
    options = {"workspace": 64, "level": 1, "hardware": "ampere+", "version_compatible": True, "refit": True}
    made = header(make_plan(job_for(half_engines, tmp_path, flavour, **options)))
    assert made["options"] == {
        "flags": ["VERSION_COMPATIBLE", "REFIT"],
        "pools": {"WORKSPACE": 64 * 2**20},
        "level": 1,
    }
    assert made["shapes"] == {"latent_sample": [[1, 4, 4, 4], [2, 4, 4, 4], [4, 4, 4, 4]]}


def test_a_flag_that_a_version_lacks_is_one_line(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")  # 10.3 has no SAME_COMPUTE_CAPABILITY
    job = job_for(half_engines, tmp_path, hardware="same-capability")
    with pytest.raises(
        EngineError, match="HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY; leave".replace(".", r"\.")
    ):
        make_plan(job)
    job = replace(job, plan=replace(job.plan, hardware=None, network_flag="NONE_SUCH"))
    with pytest.raises(EngineError, match="no network flag NONE_SUCH"):
        make_plan(job)


def test_weak_typing_on_a_strong_network_is_refused_with_the_reason(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    job = job_for(half_engines, tmp_path)
    with pytest.raises(EngineError, match="could not build vae_decoder: precision flags are not compatible"):
        make_plan(replace(job, plan=replace(job.plan, flags=("FP16",))))


def calls_of_a_run(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> Fakes:
    with monkeypatch.context() as patch:
        fakes = install(patch, flavour)
        make_plan(job_for(half_engines, tmp_path / "clean", flavour))
        make_plan(job_for(half_engines, tmp_path / "clean", flavour))  # now there is a timing cache
    return fakes


@pytest.mark.slow
@pytest.mark.parametrize("flavour", EACH_FLAVOUR)
def test_a_failure_of_every_call_is_one_line(
    half_engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flavour: str,
) -> None:
    """Each call that a whole build and run makes is made to fail as TensorRT's fail, one after the other."""
    clean = calls_of_a_run(half_engines, tmp_path, monkeypatch, flavour)
    wrong, tried = [], 0
    for call in sorted(set(clean.calls) - HARMLESS):
        returns = clean.returns[call]
        constructor = call.endswith(".__init__")
        if (returns == "None" and not constructor) or call.startswith(("ILogger", "IProgressMonitor")):
            continue
        tried += 1
        answer = TypeError(NULLPTR) if constructor else failing(returns)
        with monkeypatch.context() as patch:
            install(patch, flavour, {call: answer})
            job = job_for(half_engines, tmp_path / call, flavour)
            job.timings.parent.mkdir()
            job.timings.write_bytes(TIMINGS + b"unet")
            wrong += _problems(call, job)
    assert not wrong, "\n".join(wrong)
    assert tried > 25


def _problems(call: str, job: PlanJob) -> list[str]:
    try:
        make_plan(job)
    except EngineError as error:
        text = str(error)
        if call in SPEED_ONLY or "\n" in text or "TensorRT" not in text or "; " not in text:
            return [f"{call}: {text}"]
        return [f"{call} left a plan behind"] if list(job.folder.glob("*.plan*")) else []
    except Exception as error:
        return [f"{call}: {type(error).__name__}: {error}"]
    return [] if call in SPEED_ONLY else [f"{call} failed and nobody noticed"]


@pytest.mark.parametrize("flavour", EACH_FLAVOUR)
@pytest.mark.parametrize("call", ["IOptimizationProfile.set_shape", "Builder.build_serialized_network"])
def test_what_the_bindings_raise_is_one_line(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, call: str
) -> None:
    install(monkeypatch, flavour, {call: RuntimeError("Out of memory\nin tactic 3")})
    with pytest.raises(
        EngineError, match=r"Out of memory in tactic 3; lower --batch, build-engines.trt_workspace"
    ) as caught:
        make_plan(job_for(half_engines, tmp_path, flavour))
    assert "\n" not in str(caught.value)


def test_a_wrong_call_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = install(monkeypatch, "10")
    rt = TensorRt()
    config = fakes.new("IBuilderConfig", flags=[])
    for wrong in (
        lambda: config.set_memory_pool_limit(rt.module.MemoryPoolType.WORKSPACE, 1.5),
        lambda: config.set_timing_cache(None),
        lambda: rt.module.Builder(object()),
        lambda: rt.module.Builder(logger=rt.logger, more=1),
    ):
        with pytest.raises(TypeError), rt.guard("build"):
            wrong()
    with pytest.raises(AttributeError):
        config.builder_optimisation_level = 3
    with pytest.raises(AttributeError):
        _ = rt.module.BuilderFlag.NO_SUCH_FLAG


def test_an_onnx_file_that_does_not_parse(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    job = job_for(half_engines, tmp_path)
    (job.folder / "model.onnx").write_bytes(b"\x00broken")
    with pytest.raises(EngineError, match=r"could not read .*model\.onnx: cannot parse .*DecodeError"):
        make_plan(job)


def test_an_engine_that_is_fp32_inside_is_not_kept(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "11", lie=True)
    job = job_for(half_engines, tmp_path, "11")
    with pytest.raises(EngineError, match=r"was to be fp16, but 0% of \d+ weights .* it was not kept"):
        make_plan(job)
    assert not list(job.folder.glob("*.plan*"))


def test_an_engine_that_computes_something_else_is_not_kept(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkit.engines.tensorrt.session import TensorRtSession

    install(monkeypatch, "10")
    job, run = job_for(half_engines, tmp_path), TensorRtSession.run
    for factor in (1.1, float("nan")):
        monkeypatch.setattr(
            TensorRtSession,
            "run",
            lambda self, feeds, factor=factor: {k: v * factor for k, v in run(self, feeds).items()},
        )
        with pytest.raises(ParityError, match="plan of vae_decoder differs from its ONNX file by"):
            make_plan(job)
    assert not list(job.folder.glob("*.plan*"))


PLAN = BuildPlan("unet", "fp16", "STRONGLY_TYPED", (), (), None, 3, None)
BIG = 2**24


def layers(*kinds: str, count: int = 0) -> str:
    tensors = [{"Name": "t", "Format/Datatype": kind} for kind in kinds]
    return json.dumps({"Layers": [{"Inputs": tensors, "Weights": {"Type": kinds[0], "Count": count}}]})


@pytest.mark.parametrize(
    ("precision", "information", "size", "weights", "answer"),
    [
        ("fp16", layers("Half", "Half", "Float"), 100, 50, "67% of 3 tensors"),
        ("fp16", layers("Float", "Float", "Half"), 100, 50, None),
        ("fp32", layers("Float", "Float", "Half"), 100, 50, "33% of 3 tensors"),
        ("fp32", layers("Half"), 100, 50, None),
        ("fp16", layers("Row major linear FP16 format", count=50), 100, 50, "100% of 50 weights"),
        ("fp16", layers("Row major linear FP32", count=50), 100, 50, None),
        ("fp16", layers("Int32", "Int64"), 100, 50, None),
        ("fp16", "", 100, 50, None),
        ("fp16", '{"Layers": ["name of a layer"]}', 100, 50, None),
        ("fp16", "", 2 * BIG + 2**22, BIG, "2.2 bytes per weight"),
        ("fp16", "", 4 * BIG, BIG, None),
        ("fp32", "", 4 * BIG, BIG, "4.0 bytes per weight"),
        ("fp32", "", 2 * BIG, BIG, None),
    ],
)
def test_check_of_precision(
    precision: str, information: str, size: int, weights: int, answer: str | None
) -> None:
    plan = replace(PLAN, precision=precision)
    if answer is None:
        with pytest.raises(EngineError, match="it was not kept"):
            check_precision(plan, information, size, weights)
    else:
        assert answer in check_precision(plan, information, size, weights)


def test_the_size_of_a_version_compatible_plan_shows_nothing() -> None:
    with pytest.raises(EngineError, match="does not tell its precision"):
        check_precision(replace(PLAN, flags=("VERSION_COMPATIBLE",)), "", 2 * BIG, BIG)


def test_the_precision_of_a_graph_is_counted(half_engines: Path, tiny_engines: Path) -> None:
    assert main_precision(graph_weights(half_engines / "unet" / "model.onnx")) == "fp16"
    assert main_precision(graph_weights(tiny_engines / "unet" / "model.onnx")) == "fp32"
    assert main_precision(Counter()) == "fp32"


def test_timings_are_kept_and_merged(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")
    job = job_for(half_engines, tmp_path)
    job.timings.parent.mkdir()
    job.timings.write_bytes(TIMINGS + b"from-before")
    make_plan(job)
    assert job.timings.read_bytes() == TIMINGS + b"from-before vae_decoder"
    save = tensorrt_save_with(job.timings, TIMINGS + b"from-another-run")
    monkeypatch.setattr("synthkit.engines.tensorrt.build.save_timings", save)
    make_plan(job_for(half_engines, tmp_path, component="vae_encoder"))
    assert set(job.timings.read_bytes().removeprefix(TIMINGS).split()) == {
        b"from-before",
        b"vae_decoder",
        b"vae_encoder",
        b"from-another-run",
    }
    assert sorted(path.name for path in job.timings.parent.iterdir()) == [".t.lock", "t"]


def tensorrt_save_with(path: Path, meanwhile: bytes) -> Any:
    """`save_timings` after another build has written the file."""
    from synthkit.engines.tensorrt.timing_cache import save_timings

    def save(config: Any, where: Path) -> None:
        path.write_bytes(meanwhile)
        save_timings(config, where)

    return save


@pytest.mark.parametrize("content", [b"garbage", TIMINGS + b"another-device"])
def test_timings_that_cannot_be_used_are_replaced(
    half_engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    install(monkeypatch, "10")
    job = job_for(half_engines, tmp_path)
    job.timings.parent.mkdir()
    job.timings.write_bytes(content)
    with caplog.at_level(logging.WARNING, "synthkit"):
        make_plan(job)
    assert "timing cache" in caplog.text and "cannot be used" in caplog.text
    assert b"vae_decoder" in job.timings.read_bytes() and b"garbage" not in job.timings.read_bytes()


def test_an_interrupt_during_a_build_is_raised_after_it(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "10")

    def interrupted(self: Any, phase: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_api.Progress, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_plan(job_for(half_engines, tmp_path))


CHILD = """
import sys
from tests.cuda_stand_ins import apply, cuda_stand_ins
from tests.tensorrt_behaviour import fake_tensorrt
sys.modules["tensorrt"] = fake_tensorrt({flavour!r}, {inject!r}).module
apply(cuda_stand_ins())
{more}
"""


def child_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inject: dict[str, Any] | None = None, more: str = ""
) -> None:
    """Child processes find the stand-in as `tensorrt`, and synthkit where this process found it."""
    root, inherited = Path(__file__).parents[3], os.environ.get("PYTHONPATH", "")
    (tmp_path / "tensorrt.py").write_text(CHILD.format(flavour="11", inject=inject or {}, more=more))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}:{inherited}")


@pytest.mark.slow
def test_a_child_process_builds_the_same(
    half_engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_with(tmp_path, monkeypatch)
    job = job_for(half_engines, tmp_path, "11")
    path = make_plan_in_child(job)
    assert read_sidecar(path)["precision_check"].startswith("inspector: 100%")
    install(monkeypatch, "11")
    assert build_engine(TensorRt(), job.plan, job.folder / "model.onnx", job.timings) == read_plan(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "more", "problem"),
    [
        ({"Builder.create_network": None}, "", "could not make a network: it gives no reason"),
        ({}, "import os; os.kill(os.getpid(), 9)", "was ended by signal 9, mostly for want of memory"),
        ({}, "import os; os._exit(3)", "ended with 3 and no answer"),
    ],
)
def test_a_child_that_fails_is_one_line(
    half_engines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inject: dict[str, Any],
    more: str,
    problem: str,
) -> None:
    child_with(tmp_path, monkeypatch, inject, more)
    with pytest.raises(EngineError, match=problem) as caught:
        make_plan_in_child(job_for(half_engines, tmp_path, "11"))
    assert "\n" not in str(caught.value)
