"""The doctor's checks, with the heavy runtimes' answers put in their place, and once for real."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from synthkit import machine, probes
from synthkit.cli import doctor
from synthkit.machine import Check, Reply

Replies = dict[str, Reply]
HEALTHY: Replies = {
    "list_providers": Reply(["CPUExecutionProvider"]),
    "open_provider": Reply(True),
    "torchvision_operators": Reply("0.29.1"),
    "torch_and_cuda": Reply({"cuda_build": None, "devices": []}),
    "probe_tensorrt": Reply(None),
}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Replies], None]:
    def put(changes: Replies) -> None:
        replies = {**HEALTHY, **changes}
        monkeypatch.setattr(doctor, "ask", lambda target, *rest: replies[target.split(":")[1]])

    put({})
    return put


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    known: dict[str, str] = {}
    monkeypatch.setattr(doctor, "installed", known.get)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name if name in known else None)
    return known


def run(*arguments: str) -> Any:
    return CliRunner().invoke(doctor.command, list(arguments), obj=Path("work"))


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name.strip() == name)


def test_json_holds_every_check(answers: Callable[[Replies], None]) -> None:
    result = run("--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["ok"] is True
    names = [check["name"].strip() for check in data["checks"]]
    assert len(names) == len(set(names))
    wanted = "python system memory disk gpu base onnxruntime train tensorrt"
    assert set(wanted.split()) <= set(names)
    for check in data["checks"]:
        assert set(check) == {"name", "status", "value", "advice"}
        assert check["status"] in {"ok", "warn", "missing"}
        assert check["value"]


def test_the_text_is_an_aligned_table(answers: Callable[[Replies], None]) -> None:
    lines = run().stdout.splitlines()
    starts = [line.index(status) for line in lines for status in (" ok ", " missing ") if status in line[:24]]
    assert len(set(starts)) == 1
    assert max(map(len, lines)) <= 110


def test_table_puts_the_advice_below() -> None:
    text = doctor.table([Check("a", "ok", "fine"), Check("long", "warn", "bad", "mend it")])
    assert text == "a     ok       fine\nlong  warn     bad\n               -> mend it"


def test_a_broken_base_is_exit_code_1(
    answers: Callable[[Replies], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "base_check", lambda: machine.base_check(["click", "no_such_module"]))
    result = run("--json")
    assert result.exit_code == 1
    check = next(one for one in json.loads(result.stdout)["checks"] if one["name"] == "base")
    assert check["status"] == "missing"
    assert "no_such_module" in check["value"]


def test_without_onnxruntime(answers: Callable[[Replies], None], versions: dict[str, str]) -> None:
    (check,) = doctor.runtime_checks()
    assert check.status == "missing"
    assert "synthkit-edge[cpu]" in check.advice


def test_both_onnxruntime_packages_at_once(
    answers: Callable[[Replies], None], versions: dict[str, str]
) -> None:
    versions.update({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.0"})
    check = named(doctor.runtime_checks(), "onnxruntime")
    assert check.status == "warn"
    assert "onnxruntime 1.31.1, onnxruntime-gpu 1.31.0: they overwrite each other" in check.value


@pytest.mark.parametrize("reply", [Reply(error="libcublas.so not found"), Reply(False)])
def test_a_provider_that_is_listed_but_does_not_load(
    answers: Callable[[Replies], None], reply: Reply
) -> None:
    answers({"open_provider": reply})
    check = doctor.provider_check("CUDAExecutionProvider")
    assert (check.name.strip(), check.status) == ("CUDA", "warn")
    assert check.value.startswith("listed but does not load")
    assert (reply.error or "fell back") in check.value


def test_a_torchvision_of_another_build_is_named(answers: Callable[[Replies], None]) -> None:
    answers({"torchvision_operators": Reply(error="RuntimeError: operator torchvision::nms does not exist")})
    check = doctor.torchvision_check("2.14.1+cpu")
    assert check.status == "warn"
    assert "torchvision::nms" in check.value
    assert "2.14.1+cpu" in check.value


@pytest.mark.parametrize(
    ("reply", "status", "value"),
    [
        (Reply({"cuda_build": None, "devices": []}), "missing", "CPU-only torch, no GPU visible"),
        (
            Reply({"cuda_build": "13.0", "devices": ["X (sm_90)"]}),
            "ok",
            "torch built for CUDA 13.0: X (sm_90)",
        ),
        (Reply(error="no answer within 120 s"), "warn", "no answer within 120 s"),
    ],
)
def test_cuda(answers: Callable[[Replies], None], reply: Reply, status: str, value: str) -> None:
    answers({"torch_and_cuda": reply})
    check = doctor.cuda_check()
    assert (check.status, check.value) == (status, value)


def test_training_packages_that_are_absent_are_named(
    answers: Callable[[Replies], None], versions: dict[str, str]
) -> None:
    versions.update({"onnx": "1.23"})
    (check,) = doctor.train_checks()
    assert check.status == "missing"
    assert check.value.startswith("onnx 1.23; not installed: torch, torchvision")


def test_tensorrt(answers: Callable[[Replies], None], versions: dict[str, str]) -> None:
    assert doctor.tensorrt_check().status == "missing"
    versions["tensorrt"] = "11.0"
    assert doctor.tensorrt_check().status == "ok"
    versions["tensorrt"] = ""  # there, but not from pip, as on a Jetson
    answers({"tensorrt_version": Reply("10.3.0")})
    assert doctor.tensorrt_check().value == "10.3.0: a runtime starts"
    for reply in (Reply("no driver"), Reply(error="no driver")):
        answers({"probe_tensorrt": reply})
        assert doctor.tensorrt_check().value == "installed but does not work: no driver"


def test_a_jetson_says_its_release(tmp_path: Path) -> None:
    release = tmp_path / "nv_tegra_release"
    release.write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
    assert machine.system_check(release).value.endswith(", Jetson (L4T 36.4.3)")
    release.write_text("gibberish")
    assert machine.system_check(release).value.endswith(", Jetson")
    assert "Jetson" not in machine.system_check(tmp_path / "absent").value


def test_memory(tmp_path: Path) -> None:
    table = tmp_path / "meminfo"
    table.write_text("MemTotal: 8000000 kB\nMemAvailable:  524288 kB\n")
    assert machine.memory_check(table).status == "warn"
    assert machine.memory_check(table).value == "0.5 GiB available"
    assert machine.memory_check(tmp_path / "absent").value == "not known"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "free for" in machine.disk_check(tmp_path / "not" / "there").value
    (tmp_path / "file").write_text("")
    assert "cannot be written" in machine.disk_check(tmp_path / "file" / "w").value
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda path: machine.shutil._ntuple_diskusage(9, 9, 1024)
    )
    assert "free some space" in machine.disk_check(tmp_path).advice


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (subprocess.CompletedProcess([], 0, "H100, 580.1, 81559 MiB\n", ""), "ok"),
        (subprocess.CompletedProcess([], 9, "", "driver mismatch"), "warn"),
        (FileNotFoundError(), "missing"),
        (subprocess.TimeoutExpired("nvidia-smi", 30), "warn"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, result: Any, status: str) -> None:
    def fake(*args: Any, **options: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(machine.subprocess, "run", fake)
    assert machine.gpu_check().status == status


def test_ask_answers_fails_and_gives_up() -> None:
    assert machine.ask("operator:concat", "a", "b").data == "ab"
    assert "ModuleNotFoundError" in machine.ask("no_such_module:f").error
    assert machine.ask("os:abort").error == "crashed with signal 6"
    assert machine.ask("synthkit.probes:list_providers", timeout=0.01).error.startswith("no answer within")


def test_the_processor_runs_the_tiny_model() -> None:
    pytest.importorskip("onnxruntime")
    assert "CPUExecutionProvider" in probes.list_providers()
    assert probes.open_provider("CPUExecutionProvider")


def test_the_tiny_model_is_a_valid_graph() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(probes.TINY_ONNX)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu"]
