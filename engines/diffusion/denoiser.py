"""The UNet of a sampling loop: texts are bound once per batch, then every step is one call.

On the CPU the UNet runs as a conditioning graph and a denoising graph (see
`synthkit.engines.diffusion.denoising_graph`), elsewhere as it is. Tensors are torch's, as diffusers'
schedulers take and return them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.runtime.session import OrtSession, Session, open_session
from synthkit.engines.tensorrt.session import TensorRtSession

Predict = Callable[[Any, float], Any]
"""(float32 latents [n, channels, side, side], timestep) -> the UNet's guided output, float32, same shape."""


class Denoiser:
    """A UNet for sampling loops, either with guidance or without.

    Args:
        unet: the session that computes out_sample, of a denoising graph or of a whole UNet.
        guided: the loops have classifier-free guidance.
        conditioning: the session that precomputes the denoising graph's further inputs from the texts; the
            denoising graph then doubles the batch itself. None: `unet` is a whole UNet and takes the texts.

    Attributes:
        guided: as above.
    """

    def __init__(self, unet: Session, guided: bool, conditioning: Session | None = None) -> None:
        self._unet, self.guided, self._conditioning = unet, guided, conditioning

    @property
    def device(self) -> str:
        """The device that latents should lie on, as torch names it."""
        import torch

        on_gpu = isinstance(self._unet, (OrtSession, TensorRtSession)) and self._unet.device == "cuda"
        return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"

    @property
    def precision(self) -> str:
        """Element type of the UNet's input, by NumPy's name."""
        return next(spec.dtype for spec in self._unet.inputs if spec.name == "sample")

    def bind(self, texts: Mapping[str, np.ndarray], shape: Sequence[int], guidance: float) -> Predict:
        """Fix the texts of a batch and return the function that each step calls.

        Args:
            texts: the UNet's inputs beside sample and timestep: [n, ...], or [2n, ...] with the unconditional
                half first where there is guidance.
            shape: of the latents.
            guidance: the guidance scale.

        Raises:
            EngineError: something does not fit the UNet; or, in a call, the runtime fails.
        """
        import torch

        device, halves = self.device, 2 if self.guided else 1
        given = run_typed(self._conditioning, texts) if self._conditioning else texts
        own = shape[0] if self._conditioning else shape[0] * halves
        sizes = {"sample": (own, *shape[1:]), "timestep": ()}
        inputs = {
            spec.name: torch.empty(sizes[spec.name], dtype=getattr(torch, spec.dtype), device=device)
            if spec.name in sizes
            else torch.from_numpy(given[spec.name]).to(device, getattr(torch, spec.dtype)).contiguous()
            for spec in self._unet.inputs
        }
        kind = getattr(torch, self._unet.outputs[0].dtype)
        output = torch.empty((shape[0] * halves, *shape[1:]), dtype=kind, device=device)
        compute = _bound(self._unet, inputs, {"out_sample": output}, device)

        def predict(latents: Any, time: float) -> Any:
            inputs["sample"].view(-1, *shape).copy_(latents)  # into both halves where there are two
            inputs["timestep"].fill_(time)
            compute()
            if not self.guided:
                # Schedulers keep it, and the next call overwrites the buffer.
                return output.to(torch.float32, copy=True)
            without, within = output.float().chunk(2)
            return (within - without).mul_(guidance).add_(without)

        return predict

    def close(self) -> None:
        """Free the engines' memory."""
        self._unet.close()
        if self._conditioning:
            self._conditioning.close()


def open_denoiser(path: Path, provider: str, guided: bool, threads: int | None = None) -> Denoiser:
    """Load a UNet in ONNX Runtime.

    Args:
        path: the ONNX file.
        provider: "cpu", "cuda" or "tensorrt".
        guided: the loops have guidance.
        threads: threads of one operator on the CPU; None: all.

    Raises:
        EngineError: the file or the provider cannot be used.
    """
    if provider != "cpu":
        return Denoiser(open_session(path, provider), guided)
    from synthkit.engines.diffusion.denoising_graph import split_unet

    graphs = split_unet(path, guided)
    conditioning, denoising = (
        open_session(model.SerializeToString(), provider, path.parent, threads)
        for model in (graphs.conditioning, graphs.denoising)
    )
    return Denoiser(denoising, guided, conditioning)


def open_decoder(path: Path, provider: str, threads: int | None = None) -> Session:
    """Load a VAE decoder in ONNX Runtime; on the CPU with its upsamplings rewritten. See `open_denoiser`."""
    if provider != "cpu":
        return open_session(path, provider)
    from synthkit.engines.diffusion.denoising_graph import decoder_graph

    return open_session(decoder_graph(path).SerializeToString(), provider, path.parent, threads)


def _bound(
    session: Session, inputs: Mapping[str, Any], outputs: Mapping[str, Any], device: str
) -> Callable[[], None]:
    """Function that runs the session on tensors, without copies where the session can bind them."""
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
    """Run a session on inputs cast to the graph's types; inputs that the graph does not have are left out."""
    typed = {
        spec.name: feeds[spec.name].astype(spec.dtype, copy=False)
        for spec in session.inputs
        if spec.name in feeds
    }
    return session.run(typed)
