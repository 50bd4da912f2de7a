"""Generates planned images with processes of a Ray cluster, which all write into one folder.

    this process: plan, SamplerInputs ──batches──► workers: one pipeline each ──► PNG files
                  one progress bar    ◄──done──

A worker gets a batch when it is free. A worker that dies is replaced, and the rest of its batch goes to
another: an image is either written whole or not there, and has the same bytes whoever generates it. The
folder and the engines must have the same paths on every machine, as on a shared file system.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkit.engines.runtime.session import usable_threads
from synthkit.errors import EngineError, MissingExtra, first_line
from synthkit.progress import progress_bar
from synthkit.recipes.generation.plan import PlannedImage
from synthkit.recipes.generation.sampler import (
    Sampler,
    SamplerInputs,
    SamplingJob,
    batches,
    make_folders,
    write_images,
)

log = logging.getLogger(__name__)

LOCAL = "local"

_CONNECT_S = 10  # seconds for a connection
_CHECK_S = 60  # seconds for a cluster to answer, with the start of Python and Ray
_START_S = 300  # seconds for the first worker to be ready: a cold import of diffusers takes ten
_DEATHS_EACH = 3  # of a worker, with nothing generated in between


@dataclass(frozen=True)
class _Layout:
    """How many workers there are, and what each has."""

    workers: int
    cpus: int
    gpus: int


class _Worker:
    """What runs on the cluster: one pipeline."""

    def __init__(self, job: SamplingJob) -> None:
        self._job = job
        self._sampler: Sampler | None = None

    def open(self) -> None:
        """Load the engines; not in `__init__`, where Ray takes an error for a death."""
        self._sampler = Sampler(self._job)

    def generate(self, batch: Sequence[PlannedImage], inputs: SamplerInputs, folder: Path) -> None:
        """Generate and write a batch."""
        assert self._sampler is not None  # `open` was called first
        write_images(folder, batch, self._sampler.generate(batch, inputs))


def generate_with_ray(
    job: SamplingJob, images: Sequence[PlannedImage], folder: Path, address: str, workers: int | None
) -> float:
    """Generate images with workers of a Ray cluster and write them below a folder.

    Args:
        job: the settings that all images are generated with.
        images: what is missing.
        folder: where; every machine of the cluster must see it, and the engines, under the same path.
        address: "local" for a cluster of this machine alone; otherwise this machine is one of the cluster's,
            and the address is "auto" or "HOST:PORT".
        workers: how many; None: one per GPU, or one per node where there is none.

    Returns:
        Seconds that it took, without the start of the cluster and the loading of the engines.

    Raises:
        EngineError: the cluster does not answer, no worker starts, or one after another dies.
        MissingExtra: Ray is not installed.
    """
    with _cluster(address, workers) as (ray, layout):
        sampler = Sampler(job)
        inputs = sampler.gather(images)
        sampler.close()
        make_folders(images, folder)
        crew = _Crew(ray, layout, job, ray.put(inputs), folder.resolve())
        size = min(job.batch_size, -(-len(images) // layout.workers))
        return crew.generate(list(batches(images, size)), len(images))


class _Crew:
    """The workers, and the batches they are given.

    Args:
        ray: the module.
        layout: how many workers.
        job: what they are made with.
        inputs: Ray's reference of the inputs.
        folder: where they write.
    """

    def __init__(self, ray: Any, layout: _Layout, job: SamplingJob, inputs: Any, folder: Path) -> None:
        self._ray, self._layout, self._job, self._inputs, self._folder = ray, layout, job, inputs, folder
        self._kind = ray.remote(num_cpus=layout.cpus, num_gpus=layout.gpus)(_Worker)
        self._running: dict[Any, tuple[Any, Sequence[PlannedImage]]] = {}  # by Ray's reference of the call
        self._deaths = 0
        self._started = 0.0  # when the first worker was ready

    def generate(self, waiting: Sequence[Sequence[PlannedImage]], count: int) -> float:
        """Have batches generated; returns the seconds since the first worker was ready."""
        queue = deque(waiting)
        for _ in range(min(self._layout.workers, len(queue))):
            self._start_worker()
        with progress_bar(count, "generate images") as bar:
            while queue or self._busy():
                worker, batch, alive = self._next()
                if not alive:
                    left = [image for image in batch if not (self._folder / image.file_name).exists()]
                    bar.update(len(batch) - len(left))
                    queue.extendleft([left] if left else [])
                    continue
                bar.update(len(batch))
                if queue:
                    self._hand(worker, queue.popleft())
        return time.perf_counter() - self._started

    def _busy(self) -> bool:
        return any(batch for _, batch in self._running.values())

    def _start_worker(self) -> None:
        worker = self._kind.remote(self._job)
        self._running[worker.open.remote()] = worker, ()

    def _hand(self, worker: Any, batch: Sequence[PlannedImage]) -> None:
        self._running[worker.generate.remote(batch, self._inputs, self._folder)] = worker, batch

    def _next(self) -> tuple[Any, Sequence[PlannedImage], bool]:
        """The next call that ends: its worker, its batch (empty: it was starting), whether it lives."""
        patience = None if self._busy() else _START_S
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=patience)
        if not done:
            raise EngineError(
                f"no Ray worker was ready within {_START_S} s; ask for fewer generate.ray_workers, or see "
                "what `ray status` says of the cluster"
            )
        worker, batch = self._running.pop(done[0])
        try:
            self._ray.get(done[0])
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except self._ray.exceptions.RayActorError as error:
            self._replace(error)
            return worker, batch, False
        self._deaths = 0 if batch else self._deaths
        self._started = self._started or time.perf_counter()
        return worker, batch, True

    def _replace(self, error: Exception) -> None:
        self._deaths += 1
        reason = first_line(error)
        if self._deaths > _DEATHS_EACH * self._layout.workers:
            raise EngineError(
                f"{self._deaths} Ray workers died with nothing generated in between ({reason}); look into "
                "the cluster's logs and run the same command again, which goes on from there"
            )
        log.warning("generate: a Ray worker died and is replaced (%s)", reason)
        self._start_worker()


@contextlib.contextmanager
def _cluster(address: str, workers: int | None) -> Iterator[tuple[Any, _Layout]]:
    """Ray, connected to a cluster, and how the workers are to be spread over it."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray") from None
    try:
        _connect(ray, address, workers)
        yield ray, _layout(ray, workers)
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, workers: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        count = max(workers or 1, usable_threads())
        ray.init(address=LOCAL, num_cpus=count, include_dashboard=False, **quiet)
        return
    if address != "auto":
        _refuse_unreachable(address)
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError: they share no base class
        raise _no_cluster(address, first_line(error)) from None


def _refuse_unreachable(address: str) -> None:
    """Ask a process that can be stopped: in this one, Ray would wait for minutes for an answer."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise EngineError(f"--ray {address!r} is no address; give local, auto or HOST:PORT")
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        done = subprocess.run(check, timeout=_CHECK_S, capture_output=True, check=False)
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"nothing came within {_CHECK_S} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it is no Ray cluster"]
        raise _no_cluster(address, said[-1].split(". ")[0])


def _no_cluster(address: str, reason: str) -> EngineError:
    return EngineError(
        f"no Ray cluster answers at {address!r} ({reason}); start one with `ray start --head` (Ray's "
        "RAY_AUTH_MODE must be the same here and there), or generate on this machine with --ray local"
    )


def _layout(ray: Any, workers: int | None) -> _Layout:
    """A GPU for each worker where there are any; of the cores, an equal share of the smallest node's."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    count = workers or gpus or len(nodes)
    cores = min(int(node.get("CPU", 1)) for node in nodes)
    per_node = -(-count // len(nodes))
    return _Layout(count, max(1, cores // per_node), 1 if gpus else 0)
