from __future__ import annotations

import os
import signal
import socket
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from benchmarks.generation import contents
from synthkit.cli import main
from synthkit.errors import EngineError
from synthkit.recipes.generation import ray_sampler
from synthkit.recipes.settings import GenerateSettings
from tests.stages import generate

CLASSES = {"a": "a", "b": "b"}
SETTINGS = GenerateSettings(per_class=30, steps="10:11", guidance="1.5:3", batch_size=4)

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed")


def worker_processes(parent: int) -> list[int]:
    """Ray's processes of the actor `_Worker` that descend from a process."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            if b"ray::_Worker" in (folder / "cmdline").read_bytes():
                workers.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return [one for one in workers if _descends(one, parent, parents)]


def _descends(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    while process in parents and process != ancestor:
        process = parents[process]
    return process == ancestor


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_killed_worker_is_replaced_and_the_set_is_the_same(
    tiny_engines: Path, tiny_style: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        while len(list((tmp_path / ".ray.partial").glob("*/*.png"))) < 8 and not killed:
            time.sleep(0.01)
        killed.append(worker_processes(os.getpid())[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    spread = GenerateSettings(**{**vars(SETTINGS), "ray": "local", "ray_workers": 2})
    result = generate(spread, tiny_engines, CLASSES, tiny_style, tmp_path / "ray")
    thread.join(10)
    assert len(killed) == 1 and result.manifest.metrics["written"] == 60
    generate(SETTINGS, tiny_engines, CLASSES, tiny_style, tmp_path / "here")
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@needs_ray
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "is no address; give local, auto or HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers at"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(
    address: str, message: str, tiny_engines: Path, tmp_path: Path
) -> None:
    words = [
        "generate",
        "--classes",
        "a",
        "--per-class",
        "1",
        "--engines",
        str(tiny_engines),
        "--ray",
        address,
    ]
    result = CliRunner().invoke(main, ["--workspace", str(tmp_path), *words])
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@needs_ray
def test_something_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_sampler, "_CHECK_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match=r"nothing came within 0\.5 s"):
            ray_sampler._refuse_unreachable(address)


class _Call:
    """Ray's reference of a call."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


class _Calls:
    """Stands for Ray: calls end at once, in order; workers die as they are told to."""

    class exceptions:
        class RayTaskError(Exception):
            cause: Exception | None = None

        class RayActorError(Exception):
            pass

    def __init__(self, deaths: int) -> None:
        self.deaths, self.batches = deaths, list[Any]()

    def remote(self, **_: object) -> object:
        class Method:
            def remote(self, batch: object = None, *_: object) -> _Call:
                return _Call(batch)

        class Kind:
            def __call__(self, _: object) -> object:
                return self

            def remote(self, _: object) -> object:
                return type("Actor", (), {"open": Method(), "generate": Method()})()

        return lambda _: Kind()

    def wait(self, calls: list[object], **_: object) -> tuple[list[object], list[object]]:
        return calls[:1], calls[1:]

    def get(self, call: _Call) -> None:
        if call.batch is not None and self.deaths > 0:
            self.deaths -= 1
            raise self.exceptions.RayActorError("the worker died")
        if call.batch is not None:
            self.batches.append(call.batch)


def crew(calls: _Calls, folder: Path) -> ray_sampler._Crew:
    layout = ray_sampler._Layout(workers=2, cpus=1, gpus=0)
    return ray_sampler._Crew(calls, layout, None, None, folder)  # type: ignore[arg-type]


def test_every_image_is_generated_once_whoever_dies(tmp_path: Path) -> None:
    from synthkit.recipes.generation.plan import make_plan

    images = make_plan(GenerateSettings(per_class=5), {"a": "a"}, (), None).images()
    batches = [images[:2], images[2:4], images[4:]]
    calls = _Calls(deaths=4)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.png").write_bytes(b"")  # what the first to die had written
    crew(calls, tmp_path).generate(batches, 5)
    assert sorted(image.index for batch in calls.batches for image in batch) == [1, 2, 3, 4]


def test_workers_that_only_die_are_an_error(tmp_path: Path) -> None:
    from synthkit.recipes.generation.plan import make_plan

    images = make_plan(GenerateSettings(per_class=5), {"a": "a"}, (), None).images()
    with pytest.raises(
        EngineError, match=r"7 Ray workers died with nothing generated in between \(the worker died\)"
    ):
        crew(_Calls(deaths=99), tmp_path).generate([images], 5)
