"""`synthkit serve`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from synthkit.cli import options
from synthkit.errors import ConfigError

log = logging.getLogger(__name__)


@options.command("serve")
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle  [default: WORKSPACE/bundle]")
@click.option("--precision", help="fp32, fp16 or int8  [default: the bundle's]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option(
    "--token", envvar="SYNTHKIT_TOKEN", help="Token that clients must send; SYNTHKIT_TOKEN gives it too."
)
@click.option("--no-token", is_flag=True, help="Let other machines in without a token.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, show_default=True, help="Images at a time.")
@click.option(
    "--queue", type=click.IntRange(min=1), default=32, show_default=True,
    help="Requests in work or waiting; one more gets 503.",
)  # fmt: skip
@click.option(
    "--max-bytes", type=click.IntRange(min=1), default=10 * 2**20, show_default=True,
    help="Largest request body.",
)  # fmt: skip
@click.option(
    "--max-pixels", type=click.IntRange(1, 89_000_000), default=25_000_000, show_default=True,
    help="Largest image, width times height.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=20.0, show_default=True,
    help="Seconds that a client has to send an image.",
)  # fmt: skip
def command(
    workspace: Path, bundle: Path | None, precision: str | None, host: str, port: int, token: str | None,
    no_token: bool, **given: Any,
) -> options.Output:  # fmt: skip
    """Answer HTTP requests with a bundle until Ctrl+C; torch is not needed.

    POST an image to /predict, or open / in a browser; /healthz and /metrics are for monitoring. A new version
    of the bundle in the same folder takes over by itself. Where strangers can reach the service, put a proxy
    with a deadline for request heads before it.

    \b
    Examples:
      synthkit serve --bundle ./bundle
      curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    """
    from synthkit.engines.bundle.versions import find_again
    from synthkit.recipes.serving.app import Service, listen, make_server, run
    from synthkit.recipes.serving.live_bundle import LiveBundle
    from synthkit.recipes.serving.request import Limits

    if token is not None and (no_token or not token.strip()):
        raise ConfigError("--token is empty or stands beside --no-token; give one of the two, and a word")
    limits = Limits(given["max_bytes"], given["max_pixels"], given["queue"], given["jobs"], given["timeout"])
    folder = bundle or workspace / "bundle"
    find_again(folder)
    live = LiveBundle(folder, precision)
    service = Service(live, limits, token)
    server = make_server(service)
    with listen(host, port, guarded=token is not None or no_token) as listening:
        address, port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        log.info("http://%s:%d answers with %s; Ctrl+C ends it", shown, port, folder)
        run(server, listening)
    answered = service.metrics.answered()
    said = ", ".join(f"{count} with {status}" for status, count in sorted(answered.items())) or "none"
    return options.Output({"answered": answered}, f"requests answered: {said}")
