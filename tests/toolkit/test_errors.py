"""The error tree: what is raised, what the docstring draws, what a message says."""

import copy
import inspect
import re
from pathlib import Path

import pytest

from synthkit import errors
from synthkit.errors import BadImages, DataError, MissingExtra, SynthkitError, first_line, nearest


def classes() -> dict[str, type]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, Exception)
    }


@pytest.mark.parametrize(
    "error", [BadImages([(Path("a.jpg"), "empty")]), MissingExtra("timm", "train"), DataError("what to do")]
)
def test_a_child_process_can_hand_an_error_to_its_parent(error: SynthkitError) -> None:
    handed = copy.copy(error)  # made anew from the same parts as in another process
    assert (type(handed), str(handed)) == (type(error), str(error))


def test_the_docstring_draws_every_error() -> None:
    drawn = set(
        re.findall(r"\b[A-Z]\w*(?:Error|Images|Extra)\b", (errors.__doc__ or "").split("SynthkitError\n")[1])
    )
    assert drawn | {"SynthkitError"} == set(classes())


@pytest.mark.parametrize("kind", [kind for kind in classes().values() if kind is not SynthkitError])
def test_every_error_is_in_the_tree(kind: type) -> None:
    assert issubclass(kind, SynthkitError)


def test_bad_images_lists_every_file_and_the_way_out() -> None:
    error = BadImages([(Path("a/1.jpg"), "truncated"), (Path("b/2.jpg"), "empty")])
    assert isinstance(error, DataError)
    assert error.failures == ((Path("a/1.jpg"), "truncated"), (Path("b/2.jpg"), "empty"))
    assert str(error) == (
        "2 file(s) cannot be used as images: a/1.jpg (truncated); b/2.jpg (empty); "
        "repair or remove them, or leave them out with --skip-bad"
    )


def test_missing_extra_names_the_line_to_type() -> None:
    assert "pip install 'synthkit-edge[train]'" in str(MissingExtra("torch", "train"))


@pytest.mark.parametrize(
    ("word", "expected"),
    [("trian", "; did you mean train?"), ("zzz", ""), ("", "")],
)
def test_nearest(word: str, expected: str) -> None:
    assert nearest(word, ["train", "generate", "verify"]) == expected


def test_nearest_offers_no_more_than_asked() -> None:
    assert nearest("layer", ["layer1", "layer2", "layer3"], count=2).count(" or ") == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("\n no kernel \nstack", "no kernel"), ("", ""), ("x" * 400, "x" * 300)]
)
def test_the_first_line_of_an_error_that_says_much_or_nothing(text: str, expected: str) -> None:
    assert first_line(RuntimeError(text)).strip() == expected
