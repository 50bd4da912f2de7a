"""`synthkit update` and `rollback` as they are used: what they print, refuse and survive, without torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from synthkit.artifacts import list_outputs
from synthkit.cli import main
from synthkit.engines.bundle.format import verify
from tests.small_bundles import coloured_photos, facts_of, three_precisions
from tests.tiny_students import CLASSES
from tests.torch_free import program

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds bundle/, photos/ and test/; tests copy the bundle."""
    home = tmp_path_factory.mktemp("made")
    three_precisions(home / "bundle")
    coloured_photos(home / "photos", CLASSES, 5, noisy=110)
    coloured_photos(home / "test", CLASSES, 4, seed=1, noisy=110)
    return home


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "bundle", tmp_path / "site" / "bundle")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def answer(*arguments: str | Path) -> dict[str, object]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def refusal(*arguments: str | Path) -> str:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_update_and_roll_back(made: Path, bundle: Path) -> None:
    result = call("update", bundle, "--real-dir", made / "photos", "--test-dir", made / "test")
    assert result.exit_code == 0, result.output
    assert "held-out photos: " in result.stdout and " of 15 right" in result.stdout
    assert "test images: " in result.stdout and f"{bundle}: now version 2" in result.stdout
    assert call("verify", "--bundle", bundle).exit_code == 0
    again = answer("update", bundle, "--real-dir", made / "photos", "--test-dir", made / "test")
    assert again["outcome"] == "unchanged" and again["version"] == 2
    back = answer("rollback", bundle)
    assert (back["from_version"], back["version"]) == (2, 1)
    assert list_outputs(bundle) == list_outputs(made / "bundle")
    assert facts_of(bundle).version == 1 and "from version 1 to 2" in call("rollback", bundle).stdout


def test_the_json_has_the_keys_of_the_contract(made: Path, bundle: Path) -> None:
    found = answer("update", bundle, "--real-dir", made / "photos", "--test-dir", made / "test")
    assert {"outcome", "version", "top1", "n_test", "per_class", "seconds", "held_out"} <= set(found)
    assert found["n_test"] == 12 and 0 <= found["top1"] <= 1 and found["outcome"] == "updated"  # type: ignore[operator]


@pytest.mark.slow
def test_uncertain_answers_are_unknown_everywhere(made: Path, bundle: Path, tmp_path: Path) -> None:
    text = call("update", bundle, "--real-dir", made / "photos", "--coverage", "0.4", "--alpha", "0.2").stdout
    assert 'the answer is "unknown"' in text and "sets of " in text
    paths = sorted((made / "test").rglob("*.png"))
    found = answer("predict", "--bundle", bundle, "--top", "1", *paths)["predictions"]
    limits = json.loads((bundle / "confidence.json").read_text(encoding="utf-8"))
    labels = [one["label"] for one in found]  # type: ignore[index]
    assert "unknown" in labels and set(labels) != {"unknown"}
    for one in found:  # type: ignore[attr-defined]
        assert (one["label"] == "unknown") == (one["score"] < limits["threshold"])
        assert len(one["top"]) == 1 and set(one["set"]) <= set(CLASSES)
    alone = [sys.executable, "-I", "-X", "utf8", bundle / "predict.py", "--json", "--top", "1", *paths]
    done = subprocess.run(
        alone, capture_output=True, text=True, check=True, env=ENVIRONMENT, encoding="utf-8"
    )
    assert json.loads(done.stdout)["predictions"] == found
    assert "unknown (" in call("predict", "--bundle", bundle, *paths).stdout


def test_a_new_class_by_name(made: Path, bundle: Path, tmp_path: Path) -> None:
    shown = coloured_photos(tmp_path / "more", ["new", *CLASSES], 3, seed=4)
    line = refusal("update", bundle, "--real-dir", shown)
    assert "'new'" in line and "--new-class 'new'" in line
    text = call("update", bundle, "--real-dir", shown, "--new-class", "new").stdout
    assert "of the old classes among them: " in text and "now version 2" in text
    assert (bundle / "labels.txt").read_text(encoding="utf-8").endswith("new\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["update", "b", "--real-dir", "r", "--coverage", "0.9", "--max-error", "0.1"], "give one of them"),
        (["update", "b", "--real-dir", "r", "--alpha", "2"], "alpha 2.0 must lie between 0 and 1"),
        (["update", "b", "--real-dir", "r"], "no folder r"),
        (["rollback", "b"], "no bundle b"),
    ],
)
def test_contradictions_are_one_line(arguments: list[str], text: str) -> None:
    assert text in refusal(*arguments)


@pytest.mark.parametrize("value", ["0", "0.0", "-0", "1", "-0.1", "nan"])
@pytest.mark.parametrize(
    ("flag", "name"), [("--coverage", "coverage"), ("--max-error", "error"), ("--alpha", "alpha")]
)
def test_a_zero_is_a_value_that_was_given(made: Path, bundle: Path, flag: str, name: str, value: str) -> None:
    state = list_outputs(bundle)
    line = refusal("update", bundle, "--real-dir", made / "photos", flag, value)
    assert f"{name} {float(value)} must lie between 0 and 1" in line
    assert list_outputs(bundle) == state


@pytest.mark.parametrize(
    "arguments",
    [
        ["update"], ["update", "b"], ["update", "b", "--real-dir"], ["rollback"], ["rollback", "b", "c"],
        ["rollback", "b", "--force"], ["update", "b", "--real-dir", "r", "--epochs", "3"],
        ["adapt", "--real-dir", "r", "--coverage", "0"], ["adapt", "--bundle", "b", "--real-dir", "r"],
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_two(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_bad_input_leaves_the_bundle_alone(made: Path, bundle: Path, tmp_path: Path) -> None:
    state = list_outputs(bundle)
    bad = shutil.copytree(made / "photos", tmp_path / "bad")
    (bad / "Ω" / "text.jpg").write_text("x")
    (bad / "a dog" / "empty.png").touch()
    line = refusal("update", bundle, "--real-dir", bad)
    assert "text.jpg (not an image)" in line and "empty.png (empty file)" in line
    assert "shares 15 image(s)" in refusal(
        "update", bundle, "--real-dir", made / "photos", "--test-dir", made / "photos"
    )
    assert "no bundle" in refusal("update", made / "photos", "--real-dir", made / "photos")
    assert list_outputs(bundle) == state and not bundle.with_name("bundle.previous").exists()
    assert call("update", bundle, "--real-dir", bad, "--skip-bad").exit_code == 0
    (bundle / "model.int8.onnx").write_bytes(b"x")
    line = refusal("update", bundle, "--real-dir", made / "photos")
    assert "model.int8.onnx was altered" in line


WITHOUT_TORCH = program("torch", "timm", "sklearn", "torchvision", "transformers", "scipy")


@pytest.mark.slow
def test_torch_is_never_imported(made: Path, bundle: Path) -> None:
    arguments = ["update", bundle, "--real-dir", made / "photos", "--test-dir", made / "test"]
    for words in (arguments, ["rollback", bundle]):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, *words],
            capture_output=True, text=True, check=False, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout and "Assertion" not in done.stderr
    assert facts_of(bundle).version == 1  # there and back


@pytest.mark.slow
@pytest.mark.parametrize("wait_for", ["model.onnx", "bundle.json"])
def test_killed_in_the_middle_of_writing(made: Path, bundle: Path, wait_for: str) -> None:
    words = ["update", str(bundle), "--real-dir", str(made / "photos"), "--json"]
    run = subprocess.Popen(
        [sys.executable, "-m", "synthkit", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    sign = bundle.with_name(".bundle.next") / wait_for
    until = time.monotonic() + 120
    while not sign.exists() and run.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() in (-signal.SIGKILL, 0)
    assert verify(bundle) == []
    assert facts_of(bundle).version in (1, 2)
    assert answer(*words)["outcome"] in ("updated", "unchanged")
    assert verify(bundle) == [] and not sign.parent.exists()
