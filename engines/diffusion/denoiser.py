"""The UNet of a sampling loop: texts bound once for a batch, then one call per step.

On the CPU the graph is specialised for the loop (see `synthkit.engines.diffusion.denoising_graph`);
elsewhere it runs as it is. Tensors here are torch's, as diffusers' schedulers take and give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.runtime.session import OrtSession, Session, open_session
from synthkit.engines.tensorrt.session import TensorRtSession

Step = Callable[[Any, float], Any]
"""(float32 latents [n, channels, side, side], timestep) -> the guided output, float32 of that shape."""


class Denoiser:
    """A UNet that is ready for loops with guidance, or for loops without.

    Args:
        step: computes out_sample.
        guided: whether its loops have guidance.
        prelude: makes the step's further inputs out of the texts; the step then doubles the batch itself.
            None: the texts are these inputs.
    """

    def __init__(self, step: Session, guided: bool, prelude: Session | None = None) -> None:
        self._step, self.guided, self._prelude = step, guided, prelude

    @property
    def device(self) -> str:
        """Where latents lie best, as torch names it."""
        import torch

        on_gpu = isinstance(self._step, (OrtSession, TensorRtSession)) and self._step.device == "cuda"
        return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"

    @property
    def precision(self) -> str:
        """NumPy's name of the type that the UNet computes in."""
        return next(spec.dtype for spec in self._step.inputs if spec.name == "sample")

    def bind(self, texts: Mapping[str, np.ndarray], shape: Sequence[int], guidance: float) -> Step:
        """Fix the texts of a batch.

        Args:
            texts: the UNet's inputs beside sample and timestep: [n, ...], or [2n, ...] with the unconditional
                half first where there is guidance.
            shape: of the latents.
            guidance: the guidance scale.

        Raises:
            EngineError: something does not fit the UNet; or, in a step, the runtime fails.
        """
        import torch

        device, halves = self.device, 2 if self.guided else 1
        given = run_typed(self._prelude, texts) if self._prelude else texts
        own = shape[0] if self._prelude else shape[0] * halves
        sizes = {"sample": (own, *shape[1:]), "timestep": ()}
        inputs = {
            spec.name: torch.empty(sizes[spec.name], dtype=getattr(torch, spec.dtype), device=device)
            if spec.name in sizes
            else torch.from_numpy(given[spec.name]).to(device, getattr(torch, spec.dtype)).contiguous()
            for spec in self._step.inputs
        }
        kind = getattr(torch, self._step.outputs[0].dtype)
        output = torch.empty((shape[0] * halves, *shape[1:]), dtype=kind, device=device)
        compute = _bound(self._step, inputs, {"out_sample": output}, device)

        def step(latents: Any, time: float) -> Any:
            inputs["sample"].view(-1, *shape).copy_(latents)  # into both halves where there are two
            inputs["timestep"].fill_(time)
            compute()
            if not self.guided:
                return output.to(torch.float32, copy=True)  # schedulers keep it, the next step overwrites it
            without, within = output.float().chunk(2)
            return (within - without).mul_(guidance).add_(without)

        return step

    def close(self) -> None:
        """Give the engines' memory back."""
        self._step.close()
        if self._prelude:
            self._prelude.close()


def open_denoiser(path: Path, provider: str, guided: bool, threads: int | None = None) -> Denoiser:
    """Load a UNet in ONNX Runtime.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt".
        guided: whether its loops have guidance.
        threads: threads of one operator on the CPU; None: all.

    Raises:
        EngineError: the file or the provider cannot be used.
    """
    if provider != "cpu":
        return Denoiser(open_session(path, provider), guided)
    from synthkit.engines.diffusion.denoising_graph import loop_graphs

    graphs = loop_graphs(path, guided)
    prelude, step = (
        open_session(model.SerializeToString(), provider, path.parent, threads)
        for model in (graphs.prelude, graphs.step)
    )
    return Denoiser(step, guided, prelude)


def open_decoder(path: Path, provider: str, threads: int | None = None) -> Session:
    """Load a VAE decoder in ONNX Runtime, with its upsamplings split where that pays; see `open_denoiser`."""
    if provider != "cpu":
        return open_session(path, provider)
    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    return open_session(decoder_graph(path).SerializeToString(), provider, path.parent, threads)


def _bound(
    session: Session, inputs: Mapping[str, Any], outputs: Mapping[str, Any], device: str
) -> Callable[[], None]:
    """Running the session on tensors, without copies where it can be tied to them."""
    import torch

    if isinstance(session, (OrtSession, TensorRtSession)) and session.device == device:
        compute = session.bind(inputs, outputs)
        if device == "cpu":
            return compute

        def after_torch() -> None:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
            compute()

        return after_torch

    def with_copies() -> None:
        answers = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
        for name, tensor in outputs.items():
            tensor.copy_(torch.from_numpy(answers[name]))

    return with_copies


def run_typed(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output, with the inputs in the types that the graph takes, and without those it does not read."""
    typed = {
        spec.name: feeds[spec.name].astype(spec.dtype, copy=False)
        for spec in session.inputs
        if spec.name in feeds
    }
    return session.run(typed)
