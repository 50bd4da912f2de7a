"""`bench` and `serve` on the command line: answers, refusals, the end by a signal; torch stays out."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from synthkit.cli import main
from synthkit.recipes.device import bench as bench_bundle
from tests.tiny_students import tiny_bundle
from tests.torch_free import WITHOUT_TORCH


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("workspace")
    tiny_bundle(home / "bundle")
    return home


def call(workspace: Path, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--workspace", str(workspace), *map(str, arguments)])


def refusal(workspace: Path, *arguments: str | Path) -> str:
    result = call(workspace, *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.slow
def test_bench_answers_as_the_contract_says(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bundle, "_COLD_STARTS", 1)
    result = call(workspace, "bench", "--runs", "3", "--warmup", "1", "--threads", "2,1", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert {"p50", "p90", "p99", "mean"} == set(answer["latency_ms"]) and answer["images_per_second"] > 0
    assert (answer["batch"], answer["provider"], answer["precision"]) == (1, "cpu", "fp32")
    assert [row["threads"] for row in answer["rows"]] == [2, 1] and answer["threads"] == 2


def test_bench_hands_its_options_over(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bench_bundle.Plan] = []

    def noted(plan: bench_bundle.Plan) -> dict[str, Any]:
        seen.append(plan)
        return {}

    monkeypatch.setattr(bench_bundle, "bench_bundle", noted)
    monkeypatch.setattr(bench_bundle, "as_text", lambda measured: "")
    every = "--runs 5 --warmup 0 --batch 4 --threads 2,1 --percentiles 95,99.9 --student s".split()
    assert call(workspace, "bench", "--bundle", "b", *every).exit_code == 0
    assert call(workspace, "bench").exit_code == 0
    assert seen[0] == bench_bundle.Plan("b", "s", (2, 1), 4, 5, 0, (95.0, 99.9))
    all_of_them = tuple(sorted({1, len(os.sched_getaffinity(0))}))
    assert seen[1] == bench_bundle.Plan(str(workspace / "bundle"), threads=all_of_them)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["bench", "--bundle", "absent"], "no bundle"),
        (["serve", "--bundle", "absent"], "no bundle"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], "give --token, or --no-token"),
        (["serve", "--token", "a", "--no-token"], "stands beside --no-token"),
        (["serve", "--token", " "], "--token is empty"),
        (["serve", "--precision", "fp61"], "holds no fp61 model"),
    ],
)
def test_refusals_are_one_line(workspace: Path, arguments: list[str], reason: str) -> None:
    assert reason in refusal(workspace, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--threads", "0"], ["bench", "--threads", "1,x"], ["bench", "--runs", "0"],
     ["bench", "--percentiles", "101"], ["serve", "--port", "70000"], ["serve", "--jobs", "0"]],
)  # fmt: skip
def test_wrong_usage_exits_with_2(workspace: Path, arguments: list[str]) -> None:
    assert call(workspace, *arguments).exit_code == 2


@pytest.mark.parametrize("module", ["starlette", "uvicorn", "prometheus_client", "python_multipart"])
def test_an_absent_package_is_named_with_its_extra(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    line = refusal(workspace, "serve", "--port", "0")
    assert f"'{module}' is not installed" in line and "synthkit-edge[serve]" in line


@contextlib.contextmanager
def serving(workspace: Path, *arguments: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    line = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, "--workspace", str(workspace), "serve"]
    with subprocess.Popen(
        [*line, "--port", "0", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stderr
        said = process.stderr.readline()
        found = re.match(r"(http://\S+) answers with ", said)
        assert found, said + process.stderr.read()
        try:
            yield found[1], process
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_until_it_is_told_to_end(workspace: Path, ending: signal.Signals) -> None:
    with serving(workspace, "--json") as (address, process):
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/healthz", timeout=30) as reply:
            assert json.load(reply)["ok"] is True
        process.send_signal(ending)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, json.loads(printed)) == (0, {"answered": {"200": 1}}), said
    assert "Traceback" not in said
