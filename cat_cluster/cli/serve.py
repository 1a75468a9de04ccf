"""The command `serve`: the service on this machine, with Ray, until it is interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml
from pydantic import ValidationError
from rich.markup import escape

from cat_cluster.cli.options import people
from cat_cluster.errors import SpecError, needs_extra
from cat_cluster.settings import load_settings
from cat_cluster.spec.choices import DriftPolicy
from cat_cluster.spec.yaml_bounds import load_yaml, read_text

if TYPE_CHECKING:
    from serve.settings import ServeSettings


def serve(
    storage: Annotated[
        str | None,
        typer.Option(help="Registry to serve from. Default: that of --config, else $CAT_STORAGE, else ./cat-storage."),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need $CAT_API_KEYS.")
    ] = "127.0.0.1",
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: pocket, a diffusers folder or .safetensors checkpoint, here or under s3://, or a hub id."
        ),
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=10_000, help="Adapters held on the device at once.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=2, max=10_000, help="Most U-Net rows in one call.")] = None,
    policy: Annotated[DriftPolicy | None, typer.Option(help="What a drift alarm does.")] = None,
    engines: Annotated[int, typer.Option(min=1, max=1000, help="Engines, which share the GPUs and cores.")] = 1,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="YAML with any setting of the service.")
    ] = None,
) -> None:
    """Serve adapters over HTTP on this machine: OpenAI's images API, the page, metrics. Stops with Ctrl+C.

    Every request may name another adapter; one batch holds them all. docs/serving.md has the settings and the API.

    Example: cat-cluster serve --storage out/demo/registry --port 8000
    """
    with needs_extra("serve", "serving"):
        from serve.local import serve_here

    options = {"storage": storage, "base": base, "slots": slots, "max_rows": max_rows}
    settings = _settings(config, {name: value for name, value in options.items() if value is not None}, policy)

    def ready(address: str) -> None:
        storage = f"[bold]Serving {escape(settings.storage)}[/bold]"
        people.print(f"{storage} at {address}   (page, and API at {address}/docs)", soft_wrap=True)
        people.print(
            _example_request(address, keyed=bool(os.environ.get("CAT_API_KEYS"))), soft_wrap=True, markup=False
        )

    def stopping() -> None:
        people.print(
            "Stopping: images in flight are finished first; press Ctrl+C again to stop at once", soft_wrap=True
        )

    people.print("Starting Ray and the engine (about 15 seconds)")
    serve_here(settings, host, port, on_ready=ready, on_stop=stopping, engines=engines)


def _settings(config: Path | None, given: Mapping[str, object], policy: str | None) -> ServeSettings:
    """The environment's settings, over them the file's, over them the options'."""
    from serve.settings import ProbeSettings, ServeSettings, bad_settings

    environment = load_settings()
    defaults = {"storage": environment.storage, "device": environment.device}
    try:
        settings = ServeSettings.model_validate({**defaults, **({} if config is None else _read(config)), **given})
    except ValidationError as error:
        raise SpecError(f"{config or 'the service'}: " + "; ".join(bad_settings(error, "settings"))) from None
    if policy is None:
        return settings
    probes = ProbeSettings.model_validate({**settings.probes.model_dump(), "policy": policy})
    return settings.model_copy(update={"probes": probes})


def _example_request(address: str, *, keyed: bool) -> str:
    """Return a command that draws a picture into image.png, or says why not. keyed: it takes a key from $KEY."""
    body = json.dumps({"model": None, "prompt": "a photo of a red cup in snow", "seed": 7})
    key = '-H "Authorization: Bearer $KEY" ' if keyed else ""
    decode = (
        "r=json.load(sys.stdin);'error' in r and sys.exit(r['error']['message']);"
        "open('image.png','wb').write(base64.b64decode(r['data'][0]['b64_json']))"
    )
    return (
        f"curl -s {address}/v1/images/generations {key}-H 'content-type: application/json' -d '{body}' "
        f'| python3 -c "import sys,json,base64;{decode}"'
    )


def _read(path: Path) -> dict[str, object]:
    try:
        found = load_yaml(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML ({error}); write settings as `name: value` lines") from error
    if not isinstance(found, dict):
        raise SpecError(f"{path}: must be a mapping of settings, as `slots: 16` on lines of their own")
    return found
