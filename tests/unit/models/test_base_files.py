"""Fetching a base from a hub: the real client against a small server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load_file

from cat_cluster.errors import BaseModelError, HubError
from cat_cluster.models.base_files import parameter_count
from cat_cluster.models.base_names import base_folder, check_base, local_base
from cat_cluster.models.fingerprint import fingerprints
from cat_cluster.models.text_limit import local_text_limit
from tests.support.ldm_files import write_checkpoint

COMMIT = "b" * 40
NAME = "someone/tiny"
EXTRAS = (
    "README.md",
    "tiny.ckpt",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "safety_checker/model.safetensors",
)


@dataclass
class Hub:
    """A repository served on a loopback port, and the paths whose bytes were sent."""

    folder: Path
    sent: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/{NAME}/resolve/"):
                name = path.split("/", 5)[5]
                data = (hub.folder / name).read_bytes()
                if body:
                    hub.sent.append(name)
                return self.send(data, body, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
            if path.startswith(f"/api/models/{NAME}/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": (hub.folder / name).stat().st_size, "oid": "c" * 40}
                    for name in hub.files()
                ]
                return self.send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
            if path.startswith(f"/api/models/{NAME}"):
                info = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files()]}
                return self.send(json.dumps(info).encode(), body, {"Content-Type": "application/json"})
            return self.send(b"{}", body, {"X-Error-Code": "RepoNotFound"}, status=404)

        def send(self, data: bytes, body: bool, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Handler


@pytest.fixture
def hub(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "served"))
    for extra in EXTRAS:
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not wanted")
    served = Hub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    server.shutdown()
    server.server_close()


def test_only_the_needed_files_are_fetched_and_only_once(hub: Hub, tiny_base_folder: Path) -> None:
    folder = base_folder(NAME)
    assert fingerprints(folder).content == fingerprints(tiny_base_folder).content
    assert "unet/diffusion_pytorch_model.safetensors" in hub.sent
    assert not set(hub.sent) & set(EXTRAS)
    hub.sent.clear()
    assert base_folder(NAME) == folder
    assert hub.sent == []


def test_a_repository_with_the_fp16_variant_only(
    hub: Hub, tiny_base_factory: Callable[..., Path], tmp_path: Path
) -> None:
    half = tiny_base_factory(dtype=torch.float16, variant="fp16")
    hub.folder = Path(shutil.copytree(half, tmp_path / "half"))
    assert fingerprints(base_folder(NAME)).content == fingerprints(half).content


def test_another_family_is_refused_before_its_weights_are_fetched(hub: Hub) -> None:
    path = hub.folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    for ask in (check_base, base_folder):
        with pytest.raises(BaseModelError, match="an inpainting base"):
            ask(NAME)
    assert not [name for name in hub.sent if name.endswith(".safetensors")]


def test_a_check_fetches_configs_alone(hub: Hub) -> None:
    assert check_base(NAME) is None
    assert not [name for name in hub.sent if name.endswith(".safetensors")]
    with pytest.raises(BaseModelError, match=r"'someone/else'.*Check the name"):
        check_base("someone/else")


def test_a_check_without_the_hub_says_that_it_could_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert check_base(NAME) == f"base {NAME!r} is not in the local hub cache, and the hub cannot be reached"


def test_a_repository_that_does_not_exist_names_the_remedy(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"'someone/else'.*Check the name and the network"):
        base_folder("someone/else")


def test_a_base_that_was_fetched_is_found_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_base(NAME) is None
    assert hub.sent == []
    folder = base_folder(NAME)
    assert local_text_limit(NAME) is not None
    monkeypatch.setattr("cat_cluster.models.base_names._download", lambda *_: pytest.fail("the hub is asked"))
    assert local_base(NAME) == base_folder(NAME) == folder


def test_the_numbers_of_a_base_are_counted_from_the_heads_of_its_files(tiny_base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    files = [next((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")]
    assert parameter_count(folder) == sum(tensor.numel() for file in files for tensor in load_file(file).values())
    files[0].write_bytes(b"cut short")
    with pytest.raises(BaseModelError, match=r"unet/.* cannot be read .*download the base again"):
        parameter_count(folder)


def test_a_file_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that has only a checkpoint in one file, or several, as fine-tuned bases are often published."""
    asked: list[Path] = []
    monkeypatch.setattr("cat_cluster.models.base_names.unpacked", lambda path: asked.append(path) or path.parent)
    (hub.folder / "v2").mkdir()
    (hub.folder / "v2" / "model.safetensors").write_bytes(b"weights")
    name = f"{NAME}/v2/model.safetensors"
    assert check_base(name) == f"base {name!r} is not in the local hub cache, and a file is checked once it is fetched"
    assert local_base(name) is None
    assert hub.sent == []
    base_folder(name)
    assert hub.sent == ["v2/model.safetensors"]
    base_folder(name)
    assert local_base(name) is not None
    assert hub.sent == ["v2/model.safetensors"], "fetched again"
    assert {path.read_bytes() for path in asked} == {b"weights"}
    with pytest.raises(BaseModelError, match="damaged"):
        check_base(name)
    with pytest.raises(HubError, match=r"has no file v3/model\.safetensors"):
        base_folder(f"{NAME}/v3/model.safetensors")


def test_captions_are_held_to_the_limit_of_a_file_of_the_hub_that_was_fetched(
    hub: Hub, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cat_cluster.models.base_names.unpacked", lambda path: path.parent)
    write_checkpoint(tiny_base_folder, hub.folder / "model.safetensors")
    name = f"{NAME}/model.safetensors"
    assert local_text_limit(name) is None
    assert hub.sent == []
    base_folder(name)
    limit = local_text_limit(name)
    assert limit is not None
    assert limit.tokens == 77
