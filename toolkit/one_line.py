"""Commands whose errors are one line: the program's own and those of the recipes that are run as modules."""

from __future__ import annotations

import errno
from typing import Any

import click

from synthkit.errors import MissingExtra, SynthkitError

#: Importable module -> the extra of synthkit that brings it.
EXTRAS = {
    "onnxruntime": "cpu",
    "tensorrt": "tensorrt",
    "ray": "ray",
    **dict.fromkeys("starlette uvicorn python_multipart prometheus_client".split(), "serve"),
    **dict.fromkeys(
        "torch torchvision timm diffusers transformers tokenizers huggingface_hub optimum onnx onnxscript "
        "safetensors accelerate sklearn scipy jinja2 matplotlib".split(),
        "train",
    ),
}


class OneLineErrors(click.Command):
    """A command that turns what a user can mend into one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SynthkitError as error:
            text = str(error)
        except ModuleNotFoundError as error:
            text = _missing_extra(error)
        except OSError as error:
            text = _disk_problem(error)
        click.echo(f"error: {one_line(text)}", err=True)
        raise SystemExit(1)


def one_line(text: str) -> str:
    """A message without line breaks; blanks in names stay, and what a console would obey is escaped."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


def _missing_extra(error: ModuleNotFoundError) -> str:
    """One line for a package that an extra brings; any other absent module is a bug."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    return str(MissingExtra(module, EXTRAS[module]))


_USER_FIXABLE = {
    errno.ENOSPC: "free some space or name another folder with --workspace",
    errno.EDQUOT: "free some space or name another folder with --workspace",
    errno.EROFS: "name a folder that can be written with --workspace",
    errno.EACCES: "change its permissions or name another folder",
    errno.EPERM: "change its permissions or name another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: name another folder",
    errno.ENAMETOOLONG: "name a folder with a shorter path",
    errno.ELOOP: "links lead in a circle: name another folder",
    errno.ESTALE: "the file system was changed meanwhile: run the command again",
    errno.EIO: "the disk or its connection has a fault: check it, or name another folder",
}


def _disk_problem(error: OSError) -> str:
    """One line for what a user can mend; any other OSError is a bug and keeps its traceback."""
    if error.errno not in _USER_FIXABLE:
        raise error
    where = f" {error.filename}" if error.filename else ""
    return (
        f"cannot write or read{where}: {error.strerror}; {_USER_FIXABLE[error.errno]}; "
        "what was already written is kept, and the same command goes on from it"
    )
