"""Parity checks: engines against diffusers and transformers in fp32, on random inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthkit.engines.diffusion.denoiser import open_denoiser
from synthkit.engines.diffusion.export import component_precisions, quiet
from synthkit.engines.runtime.component_spec import EngineSpec, Geometry, component_specs, read_geometry
from synthkit.engines.runtime.session import open_session
from synthkit.errors import ParityError

TOLERANCE = {
    # Both sides sum in fp32, in another order: 1e-6 to 1e-5 of the output's scale after some hundred layers.
    # A wrong constant, a dropped bias or a dimension frozen at export shows at 1e-2 and more.
    "fp32": 1e-4,
    # fp16 keeps 11 bits, 5e-4 of a value's size per rounding; roundings of many layers add up.
    "fp16": 3e-2,
}
"""Largest error of an engine's output, as a part of the largest absolute value of the reference."""

_BATCH = 2  # another than `TRACED_BATCH`, so that a batch frozen into the graph shows


@dataclass(frozen=True)
class ComponentParity:
    """Comparison of an engine with its source.

    Attributes:
        component: the network's name.
        max_abs_error: largest absolute difference of an output.
        tolerance: largest difference allowed.
        seconds: time of the comparison.
    """

    component: str
    max_abs_error: float
    tolerance: float
    seconds: float


def component_parity(
    model_dir: Path, engines_dir: Path, precision: str = "fp32", vae_precision: str | None = None
) -> list[ComponentParity]:
    """Compare every engine in ONNX Runtime with its source in torch fp32, on random inputs.

    The UNet is compared as it is and as the sampling loop runs it.

    Args:
        model_dir: the diffusers folder.
        engines_dir: the folder that `export_pipeline` wrote.
        precision: of the engines; sets the tolerance.
        vae_precision: see `export_pipeline`.

    Raises:
        ParityError: names the component, its error and the tolerance, or the outputs that are not finite.
    """
    geometry = read_geometry(engines_dir)
    precisions = component_precisions(geometry, precision, vae_precision)
    return [
        _compare(spec, geometry, model_dir, engines_dir, precisions[spec.component])
        for spec in component_specs(geometry)
    ]


def _compare(
    spec: EngineSpec, geometry: Geometry, model_dir: Path, engines_dir: Path, precision: str
) -> ComponentParity:
    started = time.perf_counter()
    feeds = random_feeds(spec, geometry, _BATCH)
    with quiet():
        wanted = _reference(spec, model_dir, feeds)
    answers = [_engine_outputs(engines_dir / spec.path, feeds, tuple(wanted))]
    if spec.component == "unet":
        answers.append({"out_sample": _loop_output(engines_dir / spec.path, feeds)})
    error, tolerance = 0.0, 0.0
    for name, reference in wanted.items():
        allowed = TOLERANCE[precision] * float(np.abs(reference).max())
        found = max(_difference(spec.component, reference, answer[name]) for answer in answers)
        if found > allowed:
            raise ParityError(
                f"the engine {spec.component} differs from its source by {found:.3g} in {name!r}, allowed is "
                f"{allowed:.3g}; rebuild with --force, then with another --set build-engines.opset=N"
            )
        error, tolerance = max(error, found), max(tolerance, allowed)
    return ComponentParity(spec.component, error, tolerance, round(time.perf_counter() - started, 3))


def _difference(component: str, reference: np.ndarray, got: np.ndarray) -> float:
    if got.shape != reference.shape:
        raise ParityError(
            f"the engine {component} answers {list(got.shape)} where its source answers "
            f"{list(reference.shape)}; rebuild with another --set build-engines.opset=N"
        )
    if not np.isfinite(got).all():
        raise ParityError(
            f"the engine {component} answers with NaN or infinite values; rebuild it with --precision fp32"
        )
    return float(np.abs(got - reference).max())


def random_feeds(spec: EngineSpec, geometry: Geometry, batch: int) -> dict[str, np.ndarray]:
    """Random inputs of an engine.

    Args:
        spec: of the engine.
        geometry: of its pipeline.
        batch: rows of every input.
    """
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for tensor in spec.inputs:
        shape = tuple(batch if isinstance(side, str) else side for side in tensor.shape)
        if tensor.name == "input_ids":
            text = next(one for one in geometry.texts if one.component == spec.component)
            feeds[tensor.name] = random.integers(0, text.vocabulary, shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = np.asarray(random.integers(1, 1000), dtype=tensor.dtype)
        elif tensor.name == "time_ids":
            feeds[tensor.name] = random.integers(0, geometry.image + 1, shape).astype(tensor.dtype)
        else:
            feeds[tensor.name] = random.standard_normal(shape, dtype=np.float32)
    return feeds


def _engine_outputs(
    path: Path, feeds: dict[str, np.ndarray], names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    session = open_session(path)
    answers = session.run(
        {one.name: feeds[one.name].astype(one.dtype) for one in session.inputs if one.name in feeds}
    )
    session.close()
    return {name: answers[name].astype(np.float32) for name in names}


def _loop_output(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The UNet's output as the sampling loop computes it; at guidance 1 the unconditional half cancels."""
    import torch

    denoiser = open_denoiser(path, "cpu", guided=True)
    given = {name: value for name, value in feeds.items() if name not in ("sample", "timestep")}
    texts = {name: np.concatenate([value[::-1], value]) for name, value in given.items()}
    predict = denoiser.bind(texts, feeds["sample"].shape, guidance=1.0)
    output: np.ndarray = predict(torch.from_numpy(feeds["sample"]), float(feeds["timestep"])).numpy()
    denoiser.close()
    return output


def _reference(spec: EngineSpec, model_dir: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of diffusers and transformers in fp32; one network in memory at a time."""
    import torch

    inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.inference_mode():
        outputs = _COMPUTE[spec.component](model_dir, inputs)
    return {one.name: outputs[one.name].numpy() for one in spec.outputs}


def _text_encoder(model_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextModel

    encoder = _load(CLIPTextModel, model_dir, "text_encoder")
    return _hidden(encoder(**inputs, output_hidden_states=True))


def _text_encoder_2(model_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextModelWithProjection

    encoder = _load(CLIPTextModelWithProjection, model_dir, "text_encoder_2")
    answer = encoder(**inputs, output_hidden_states=True)
    return {**_hidden(answer), "text_embeds": answer.text_embeds}


def _hidden(answer: Any) -> dict[str, Any]:
    layers = {f"hidden_states.{layer}": state for layer, state in enumerate(answer.hidden_states)}
    return {"last_hidden_state": answer.last_hidden_state, **layers}


def _unet(model_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    return {"out_sample": call_unet(source_unet(model_dir), inputs)}


def source_unet(model_dir: Path) -> Any:
    """Diffusers' UNet in fp32."""
    from diffusers import UNet2DConditionModel

    return _load(UNet2DConditionModel, model_dir, "unet")


def call_unet(unet: Any, inputs: Mapping[str, Any]) -> Any:
    """Diffusers' UNet on the tensors that the engine takes."""
    further = ("text_embeds", "time_ids")  # of SDXL
    plain = {name: value for name, value in inputs.items() if name not in further}
    conditions = {name: inputs[name] for name in further if name in inputs}
    return unet(**plain, added_cond_kwargs=conditions).sample


def _vae_decoder(model_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    return {"sample": _load(AutoencoderKL, model_dir, "vae").decode(inputs["latent_sample"]).sample}


def _vae_encoder(model_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    from diffusers import AutoencoderKL

    encoded = _load(AutoencoderKL, model_dir, "vae").encode(inputs["sample"])
    return {"latent_parameters": encoded.latent_dist.parameters}


_COMPUTE: dict[str, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder_2,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
}


def _load(kind: Any, model_dir: Path, folder: str) -> Any:
    import torch

    model = kind.from_pretrained(
        str(model_dir / folder), use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
    )
    return model.eval()
