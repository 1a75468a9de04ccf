"""The nightly check of all that a service serves: what it asks, what it says of each adapter, and how it ends."""

from __future__ import annotations

import http.client
import http.server
import json
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_cluster.errors import (
    AdapterNotFoundError,
    EvaluationError,
    OverloadedError,
    QuarantinedError,
    SpecError,
)
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from jobs import probe
from serve.calls import AdminAction
from serve.http.access import ADMIN_KEYS, Access
from serve.settings import ServeSettings
from tests.support.ingress_server import Live, ScriptedEngine, listening, only, publish

ROOT = Path(__file__).resolve().parents[3]
ALARM = {"verdict": "alarm", "reason": "canonical pair 3 of 'sks': kps is 0.1"}


@dataclass
class ProbedEngine(ScriptedEngine):
    """An engine whose probes are ok, unless something else is to be said of a reference; an error once, then ok."""

    found: dict[str, Any] = field(default_factory=dict)

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        self.actions.append((action, reference))
        found = self.found.get(reference, {"verdict": "ok", "reason": None})
        if isinstance(found, list):
            found = found.pop(0) if found else {"verdict": "ok", "reason": None}
        if isinstance(found, Exception):
            raise found
        return dict(found)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two revisions of `cup`, both by an alias, and one each of `mug` and `pot`."""
    registry = Registry(LocalStore(tmp_path_factory.mktemp("storage")))
    unet = torch.nn.ModuleDict({"mid": torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})})
    names = [("cup", 1), ("cup", 2), ("mug", 1), ("pot", 1)]
    first, *_ = [publish(registry, unet, "f" * 64, "base", adapter_id=name, seed=seed) for name, seed in names]
    registry.set_alias("cup", "stable", first.revision)
    registry.set_alias("cup", "old", first.revision)
    return registry


@contextmanager
def serving(registry: Registry, engine: ProbedEngine, **keys: Any) -> Iterator[Live]:
    settings = ServeSettings(base="base")
    with listening(only(engine), registry, settings, Access(settings, **keys)) as live:
        yield live


@pytest.fixture
def engine() -> ProbedEngine:
    return ProbedEngine()


@pytest.fixture
def live(registry: Registry, engine: ProbedEngine) -> Iterator[Live]:
    with serving(registry, engine) as live:
        yield live


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for, of which none pass."""
    found: list[float] = []
    monkeypatch.setattr(probe.time, "sleep", found.append)
    monkeypatch.delenv(ADMIN_KEYS, raising=False)
    return found


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code and the lines of the log."""
    code = probe.main(arguments)
    return code, capsys.readouterr().out.splitlines()


def test_every_revision_that_an_alias_names_is_probed_page_by_page(
    live: Live, engine: ProbedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PAGE", 1)
    assert ended(capsys, live.url + "/") == (
        0,
        ["ok: cup", "ok: cup@old", "ok: mug", "ok: pot", "4 ok"],
    )
    assert engine.actions == [("probe", name) for name in ("cup", "cup@old", "mug", "pot")]


@pytest.mark.parametrize(
    ("found", "code", "line"),
    [
        (ALARM, 1, "alarm: mug: canonical pair 3 of 'sks': kps is 0.1"),
        ({"verdict": "warning", "reason": "generated again"}, 0, "warning: mug: generated again"),
        (EvaluationError("mug was published unmeasured"), 0, "not measurable: mug: mug was published unmeasured"),
        (AdapterNotFoundError("no adapter 'mug'"), 0, "gone: mug: no adapter 'mug'"),
        (QuarantinedError("mug is quarantined"), 1, "not probed: mug: mug is quarantined"),
        (RuntimeError("a secret"), 1, "not probed: mug: internal error; the log has its details under"),
    ],
)
def test_how_a_probe_went_is_said_and_decides(
    found: Any, code: int, line: str, live: Live, engine: ProbedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.found["mug"] = found
    exit_code, lines = ended(capsys, live.url)
    assert exit_code == code
    assert lines[2].startswith(line)
    word = line.partition(":")[0]
    assert lines[3:] == ["ok: pot", ", ".join(sorted([f"1 {word}", "3 ok"], key=lambda part: part[2:]))]


def test_a_busy_service_is_asked_again_when_it_says(
    live: Live, engine: ProbedEngine, capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    engine.found["mug"] = [OverloadedError("the service is full", 7.0), OverloadedError("the service is full", 0.2)]
    code, lines = ended(capsys, live.url)
    assert (code, waits) == (0, [7.0, 1.0])
    assert lines[-1] == "4 ok"
    engine.found["mug"] = OverloadedError("the service is full", 7.0)
    code, lines = ended(capsys, live.url, "--limit", "5")
    assert (code, len(waits)) == (1, 2)  # not within its time
    assert lines[2:] == ["not probed: mug: the service is full", "ok: pot", "1 not probed, 3 ok"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e10", "soon"])
def test_a_limit_is_a_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        probe.main(["http://127.0.0.1:1", "--limit", text])
    assert "--limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (None, "send one of this service's API keys .* (CAT_ADMIN_KEYS of this environment is not set)"),
        ("wrong", "send one of this service's API keys .* (CAT_ADMIN_KEYS of this environment is used)"),
        ("user", "acting on adapters needs a key of CAT_ADMIN_KEYS"),
        (" admin , other", None),
        (" ,admin", None),  # as the service reads them
        ("ad\nmin", "CAT_ADMIN_KEYS: a key is printable ASCII without spaces .* header"),
        ("adm\u20acn", "CAT_ADMIN_KEYS: a key is printable ASCII without spaces .* header"),
    ],
)
def test_the_key_is_an_admins_and_a_wrong_one_ends_it_at_once(
    keys: str | None,
    said: str | None,
    registry: Registry,
    engine: ProbedEngine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if keys is not None:
        monkeypatch.setenv(ADMIN_KEYS, keys)
    with serving(registry, engine, api_keys=["user"], admin_keys=["admin"]) as live:
        code, lines = ended(capsys, live.url)
    if said is None:
        assert (code, lines[-1]) == (0, "4 ok")
        return
    error, end = lines
    assert (code, end, engine.actions) == (1, "nothing was probed", [])
    assert error.startswith(f"error: {said.partition(' .* ')[0]}")
    assert said.partition(" .* ")[2] in error
    assert "wrong" not in error


def test_probes_that_are_off_end_it_at_once(
    live: Live, engine: ProbedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.found["cup"] = SpecError("probes are disabled: start the service with probes.enabled true")
    code, lines = ended(capsys, live.url)
    assert (code, len(lines)) == (1, 2)
    assert lines[0] == "error: probes are disabled: start the service with probes.enabled true"


class Answers(http.server.BaseHTTPRequestHandler):
    """Something else that listens; `asked`: path and key of each request."""

    asked: list[tuple[str, str | None]]
    page: bytes = b"<html>"  # the answer to a GET
    probed: bytes = b""  # and to a POST

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        is_moved = self.path.startswith("/moved/")
        self.send_response(302 if is_moved else 200)
        self.send_header("Location", "/other")
        self.end_headers()
        self.wfile.write(self.page if self.command == "GET" else self.probed)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def elsewhere() -> Iterator[str]:
    Answers.asked, Answers.page, Answers.probed = [], b"<html>", b""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_no_other_address_gets_the_key(
    elsewhere: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_KEYS, "admin")
    code, lines = ended(capsys, f"{elsewhere}/moved")
    assert (code, Answers.asked) == (1, [("/moved/v1/adapters?limit=100", "Bearer admin")])
    assert "answers with HTTP status 302, which leads to /other: give that address" in lines[0]


def test_what_is_no_service_is_told(elsewhere: str, capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    code, lines = ended(capsys, elsewhere)
    assert (code, lines[-1]) == (1, "nothing was probed")
    assert lines[0].startswith(f"error: what answers at {elsewhere} is no service of cat-cluster: ")
    assert ended(capsys, "127.0.0.1:8000")[1][0].startswith("error: 127.0.0.1:8000: is no address of a service")
    code, lines = ended(capsys, "http://127.0.0.1:1", "--limit", "0.5")
    assert (code, waits) == (1, [])
    assert lines[0].startswith("error: no service answers at http://127.0.0.1:1: ")


@pytest.mark.parametrize(
    "url",
    [
        "",
        " http://127.0.0.1:1",
        "http://[::1",
        "http://127.0.0.1:x",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:1/\u00fc",
        "http://127.0.0.1:1\n",
        "http://ada:secret@127.0.0.1:1",
        "ftp://127.0.0.1",
        "http://127.0.0.1/?x",
    ],
)
def test_what_is_no_address_is_refused_in_a_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = ended(capsys, url)
    assert (code, lines[1:]) == (1, ["nothing was probed"])
    assert "is no address of a service" in lines[0]
    assert "secret" not in lines[0]


@pytest.mark.parametrize("host", ["..", "a" * 70])
def test_a_host_whose_name_cannot_be_is_told(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, f"http://{host}", "--limit", "0.5")[1][0].startswith(
        f"error: no service answers at http://{host}: "
    )


ENTRY = {"id": "cup", "aliases": {"latest": "r-1"}, "damaged_aliases": []}


@pytest.mark.parametrize(
    "page",
    [
        {"result": 1},
        {"data": 3, "has_more": False},
        {"data": [ENTRY]},
        {"data": [ENTRY], "has_more": True, "last_id": None},
        {"data": ["cup"], "has_more": False},
        {"data": [{"id": "cup"}], "has_more": False},
        {"data": [{**ENTRY, "id": 3}], "has_more": False},
        {"data": [{**ENTRY, "id": "\ud800"}], "has_more": False},
        {"data": [{**ENTRY, "aliases": ["latest"]}], "has_more": False},
        {"data": [{**ENTRY, "aliases": {"latest": []}}], "has_more": False},
    ],
)
def test_a_list_of_another_shape_is_told(page: Any, elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.page = json.dumps(page).encode()
    code, lines = ended(capsys, elsewhere)
    assert (code, lines[-1]) == (1, "nothing was probed")
    assert "is no service of cat-cluster" in lines[0]


def test_nested_beyond_all_reason_is_no_json(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.page = b'{"data":' + b"[" * 100_000
    assert "is no service of cat-cluster" in ended(capsys, elsewhere)[1][0]


def test_pages_that_never_end_are_ended(elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.page = json.dumps({"data": [], "has_more": True, "last_id": "cup"}).encode()
    code, lines = ended(capsys, elsewhere)
    assert (code, len(Answers.asked)) == (1, 2)
    assert "is no service of cat-cluster" in lines[0]


@pytest.mark.parametrize("answer", [{"data": 1}, {"result": "x"}, {"result": {}}, {"result": {"verdict": []}}])
def test_a_record_of_another_shape_is_told(answer: Any, elsewhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.page = json.dumps({"data": [ENTRY], "has_more": False}).encode()
    Answers.probed = json.dumps(answer).encode()
    assert "is no service of cat-cluster" in ended(capsys, elsewhere)[1][0]


def test_a_reason_stays_in_its_line(live: Live, engine: ProbedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.found["mug"] = {"verdict": "alarm", "reason": "a\nok: pot\x1b[0m"}
    assert ended(capsys, live.url)[1][2] == "alarm: mug: a ok: pot [0m"


def test_one_that_gives_no_answer_in_time_does_not_end_the_others(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_ = probe.urllib.request.OpenerDirector.open

    def opened(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        if "/mug/" in request.full_url:
            raise TimeoutError("timed out")
        return open_(self, request, *args, **options)

    monkeypatch.setattr(probe.urllib.request.OpenerDirector, "open", opened)
    code, lines = ended(capsys, live.url)
    assert (code, lines[3:]) == (1, ["ok: pot", "1 not probed, 3 ok"])
    assert lines[2] == "not probed: mug: the service did not answer within 300 s (--limit)"


class Body:
    """The body of an answer that comes in pieces."""

    def __init__(self, *pieces: bytes, length: int | None = None) -> None:
        self._pieces, self.length = [*pieces], length

    def read1(self, _: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def test_an_answer_is_bounded_in_time_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    read: Any = probe._read
    later = probe.time.monotonic() + 60
    assert read(Body(b"{", b"}"), later) == b"{}"
    with pytest.raises(TimeoutError):
        read(Body(b"{", b"}"), 0.0)
    with pytest.raises(http.client.IncompleteRead):
        read(Body(b"{", length=1), later)
    monkeypatch.setattr(probe, "MAX_BYTES", 2)
    assert read(Body(b"{{{", b"}}}"), later) == b"{{{"


def test_sigterm_ends_it_as_ctrl_c_does() -> None:
    """As PID 1 of a pod Python would not hear of it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [sys.executable, "-m", "jobs.probe", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as probing:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                probing.terminate()
                assert probing.communicate(timeout=60)[0].splitlines() == ["interrupted", "nothing was probed"]
    assert probing.returncode == 1


def test_a_service_may_be_away_for_a_while(
    live: Live, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, waits: list[float]
) -> None:
    away = [1, 0, 1, 1, 0, 0, 0]  # requests: the list, which a new pod may not be let through to yet, then the probes
    open_ = probe.urllib.request.OpenerDirector.open

    def opened(self: Any, *args: Any, **options: Any) -> Any:
        if away and away.pop(0):
            raise urllib.error.URLError(ConnectionRefusedError("refused"))
        return open_(self, *args, **options)

    monkeypatch.setattr(probe.urllib.request.OpenerDirector, "open", opened)
    code, lines = ended(capsys, live.url)
    assert (code, lines[-1], waits) == (0, "4 ok", [1.0, 1.0, 1.0])
    away += [0, 0, *[1] * 9]
    code, lines = ended(capsys, live.url, "--limit", "0.5")
    assert (code, lines) == (1, ["ok: cup", f"error: no service answers at {live.url}: refused", "1 ok"])


def test_it_loads_no_library_of_models() -> None:
    """Its pod has little memory."""
    code = (
        "import sys, jobs.probe; print([name for name in ('torch', 'ray', 'fastapi', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
    assert probe.ADMIN_KEYS == ADMIN_KEYS
