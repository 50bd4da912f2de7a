from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from synthkit.diffusion.style_token import StyleToken, load, load_all, save_all, shares
from synthkit.errors import MissingExtra, ModelError

pytest.importorskip("safetensors")
VECTORS = np.arange(8, dtype=np.float32).reshape(2, 4)


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    from safetensors.numpy import save_file

    save_file(tensors, str(path))
    return path


def test_a_saved_token_is_read_back_and_is_a_diffusers_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "style" / "learned_embeds.safetensors"
    StyleToken("<site>", VECTORS).save(path, "glyphs-32")
    token = load(path)
    assert token.token == "<site>" and token.words == ("<site>", "<site>_1")
    assert token.vectors.dtype == np.float32 and np.array_equal(token.vectors, VECTORS)
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["<site>"]
        assert file.metadata() == {"format": "pt", "base_model": "glyphs-32"}


def test_the_same_tokens_make_the_same_bytes(tmp_path: Path) -> None:
    tokens = [StyleToken("<ä>", VECTORS), StyleToken("<b>", VECTORS)]
    for index in range(8):  # the library's own order of metadata is a random one
        save_all(tokens, tmp_path / f"{index}.safetensors", "glyphs-32", (0.25, 0.75))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert [one.token for one in load_all(tmp_path / "0.safetensors")] == ["<ä>", "<b>"]


def test_files_of_a1111_and_kohya_are_named_by_their_file(tmp_path: Path) -> None:
    token = load(save(tmp_path / "mystyle.safetensors", {"emb_params": VECTORS.astype(np.float16)}))
    assert token.token == "<mystyle>" and token.vectors.dtype == np.float32


def test_one_vector_without_a_first_axis(tmp_path: Path) -> None:
    assert load(save(tmp_path / "a.safetensors", {"<a>": VECTORS[0]})).vectors.shape == (1, 4)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"clip_l": VECTORS, "clip_g": VECTORS}, "belongs to SDXL"),
        ({"a": VECTORS, "b": VECTORS}, "must hold one token here, found 2: a, b"),
        (
            {"a": VECTORS, "b": VECTORS[:, :3]},
            r"is not a file of style tokens: their widths differ \(a 4, b 3\)",
        ),
        ({"emb_params": VECTORS, "<UNNAMED>": VECTORS}, "several tokens without names"),
        ({"a": VECTORS.astype(np.int32)}, "'a' holds int32"),
        ({}, "holds no token"),
        ({"a": VECTORS[None]}, r"has shape \[1, 2, 4\]"),
        ({"a": VECTORS * np.float32("nan")}, "NaN or infinite"),
    ],
)
def test_what_is_not_one_token_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], problem: str
) -> None:
    with pytest.raises(ModelError, match=problem):
        load(save(tmp_path / "a.safetensors", tensors))


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match=r"is a pickle.*convert it to .safetensors"):
        load(tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is not a safetensors file"):
        load(tmp_path / "a.safetensors")
    header = json.dumps({"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(ModelError, match="bfloat16"):
        load(tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match=r"no style token .*learn-style"):
        load(tmp_path / "absent.safetensors")


def test_several_tokens_keep_their_order_and_shares(tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    tokens = [StyleToken(name, VECTORS + index) for index, name in enumerate(("<z>", "<a>", "<m>"))]
    save_all(tokens, path, "glyphs-32", (0.5, 0.3, 0.2))
    found = load_all(path)
    assert [one.token for one in found] == ["<z>", "<a>", "<m>"], "not safetensors' own order, by name"
    assert all(np.array_equal(one.vectors, two.vectors) for one, two in zip(found, tokens, strict=True))
    assert shares(path) == pytest.approx((0.5, 0.3, 0.2))
    with pytest.raises(ModelError, match="must hold one token here, found 3: <z>, <a>, <m>"):
        load(path)


def test_shares_are_equal_where_none_are_recorded(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"<b>": VECTORS, "<a>": VECTORS})
    assert shares(path) == (0.5, 0.5) and [one.token for one in load_all(path)] == ["<a>", "<b>"]
    assert shares(save(tmp_path / "c.safetensors", {"<a>": VECTORS})) == (1.0,)


@pytest.mark.parametrize(
    "recorded",
    [
        "no JSON",
        "[1]",
        '{"<a>": 1}',
        '{"<a>": -1, "<b>": 2}',
        '{"<a>": 0, "<b>": 0}',
        '{"<a>": NaN, "<b>": 1}',
    ],
)
def test_shares_that_do_not_fit_are_refused(tmp_path: Path, recorded: str) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "a.safetensors"
    save_file({"<a>": VECTORS, "<b>": VECTORS}, str(path), {"shares": recorded})
    with pytest.raises(ModelError, match="recorded shares do not fit"):
        shares(path)


def test_the_form_of_a1111_and_kohya_is_read_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = StyleToken("<site-style>", VECTORS).save_unnamed(tmp_path / "a1111")
    assert path.name == "site-style.safetensors" and list(load_file(path)) == ["emb_params"]
    assert load(path).token == "<site-style>" and np.array_equal(load(path).vectors, VECTORS)


@pytest.mark.parametrize(
    ("width", "family"),
    [
        (768, "Stable Diffusion 1.x"),
        (1024, "Stable Diffusion 2.x"),
        (1280, "SDXL"),
        (4, "a model of text width 4"),
    ],
)
def test_the_family_of_a_wrong_width_is_named(width: int, family: str) -> None:
    token = StyleToken("<a>", np.zeros((1, width), np.float32))
    token.check_width(width)
    with pytest.raises(ModelError, match=f"belongs to {family}.*is a model of text width 320"):
        token.check_width(320)


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.safetensors", {"<a>": VECTORS})
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingExtra, match=r"synthkit-edge\[train\]"):
        load(path)
