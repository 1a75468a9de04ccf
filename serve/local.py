"""Serving on this machine: Ray and the application started, watched and stopped by one command."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ray
import torch
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from cat_cluster.cluster.failures import failure_in
from cat_cluster.cluster.local_ray import check_ray_folder, start_ray
from cat_cluster.errors import ClusterError
from cat_cluster.models.base_files import check_family
from cat_cluster.models.base_names import EMBEDDED, base_folder
from cat_cluster.models.device import choose_device
from cat_cluster.store import open_store
from serve.app import build
from serve.denoise.signing import open_signer
from serve.http.access import Access, check_bind
from serve.http.sites import is_loopback
from serve.proxy import CALLBACK, CALLBACK_VARIABLE
from serve.settings import Deployment, ServeSettings
from serve.tracing import open_tracer

APPLICATION = "cat-cluster"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ANSWER_S = 10.0  # from a deadline to the last byte of its response
_WATCH_S = 5.0  # between two looks at whether Ray lives
_OBJECTS = 256 * 2**20  # bytes of Ray's shared memory between processes: some images


def serve_here(
    settings: ServeSettings,
    host: str,
    port: int,
    *,
    on_ready: Callable[[str], None],
    on_stop: Callable[[], None] = lambda: None,
    engines: int = 1,
) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP; on_ready receives the address once the service is ready.

    At the first signal new requests are refused with 503 and those in flight are answered, each within its deadline;
    at a second one no more. No process is left.
    Raises SpecError when it would listen beyond this machine without API keys, ClusterError when the port is taken or
    Ray or the engine does not start or Ray dies, StoreError and BaseModelError for what cannot be read,
    KeyboardInterrupt for a signal before it is ready.
    """
    check_bind(host, Access.from_environment(settings))
    _check_port(host, port)
    check_ray_folder()
    open_store(settings.storage).list("no-such-prefix/")  # raises where there is no such bucket, or no right to read
    check_family(base_folder(settings.base))
    choose_device(settings.device)
    open_signer(settings.signing)
    _check_safety(settings)
    open_tracer("command").close()  # which raises where spans cannot be sent
    deployment = local_deployment(settings, engines)
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    signals = _Signals()
    signals.listen()
    try:
        start_ray(
            loopback=is_loopback(host),
            object_store_memory=_OBJECTS,
            log_to_driver=True,  # the lines of requests
        )
        signals.listen()  # Ray has taken SIGTERM for itself
        start(deployment, host, port)
        on_ready(f"http://{_reached_at(host)}:{port}")
        signals.await_one()
        on_stop()
    finally:
        signals.end_ray(settings.deadline_s + _ANSWER_S)


def start(deployment: Deployment, host: str, port: int) -> None:
    """Run the application on the Ray of this process, or bring one that runs to this deployment; ClusterError."""
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray_serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=quiet)
    try:
        ray_serve.run(build(deployment.model_dump(mode="json")), name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:
        raise ClusterError(f"the service did not start: {_reason() or error}") from error


def _reason() -> str:
    """Return why replicas did not start, of the messages that Ray Serve has of them."""
    application = ray_serve.status().applications.get(APPLICATION)
    deployments = {} if application is None else application.deployments
    messages = [found.message.strip() for found in deployments.values() if found.status != "HEALTHY"]
    errors = [message.partition(" Error:\n")[2] or message for message in messages if message]
    return "; ".join(str(failure_in(error, "the engine")) for error in errors)


def local_deployment(settings: ServeSettings, engines: int) -> Deployment:
    """Return a deployment for this machine, whose cores and GPUs the engines share."""
    # Ray's processes may run in another folder.
    whole: dict[str, object] = {}
    if "://" not in settings.storage:
        whole["storage"] = str(Path(settings.storage).resolve())
    if settings.base not in EMBEDDED and Path(settings.base).exists():
        whole["base"] = str(Path(settings.base).resolve())
    if settings.disk_cache is not None:
        whole["disk_cache"] = settings.disk_cache.resolve()
    if settings.signing is not None:
        signing = settings.signing
        files = {"certificates": signing.certificates.resolve(), "key": signing.key.resolve()}
        whole["signing"] = signing.model_copy(update=files).model_dump()
    if settings.safety is not None:
        whole["safety"] = settings.safety.model_copy(update={"model": settings.safety.model.resolve()}).model_dump()
    threads, gpus = settings.threads, 0.0
    if engines > 1 and settings.device in ("auto", "cuda") and (devices := torch.cuda.device_count()):
        # Ray counts in ten-thousandths of a GPU, and an engine's share must lie on one of them.
        gpus = math.floor(10_000 / math.ceil(engines / devices)) / 10_000
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        # Ray would give an engine that reserves no CPU a single thread.
        threads = max(1, len(os.sched_getaffinity(0)) // engines)
    return Deployment(
        settings=ServeSettings.model_validate({**settings.model_dump(), **whole, "threads": threads}),
        min_engines=engines,
        engine_cpus=0.0,
        engine_gpus=gpus,
    )


def _check_safety(settings: ServeSettings) -> None:
    """Load the safety checker, if there is one; what it takes is imported here, for it takes seconds."""
    if settings.safety is not None:
        from serve.denoise.safety import open_checker

        open_checker(settings.safety, "cpu")


def _reached_at(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


class _Signals:
    """Each of the first two signals is an interrupt; later ones, and those while Ray ends, are ignored."""

    def __init__(self) -> None:
        self._left = 2
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def listen(self) -> None:
        """Take the signals over."""
        for number in _SIGNALS:
            signal.signal(number, self._interrupt)

    def await_one(self) -> None:
        """Return at a signal; raises ClusterError once Ray is gone, which nothing brings back."""
        with suppress(KeyboardInterrupt):
            while _ray_lives():
                time.sleep(_WATCH_S)
            raise ClusterError(
                "Ray has died on this machine, and the service with it: start the command again; where memory was "
                "short, give fewer --engines or --slots. Its logs are below ray/session_latest/logs in RAY_TMPDIR, "
                "TMPDIR or /tmp"
            )

    def end_ray(self, limit_s: float) -> None:
        """Let requests in flight end within `limit_s`, unless there is a second signal; then end Ray's processes."""
        until = time.monotonic() + limit_s
        try:
            if _ray_lives():
                while time.monotonic() < until:
                    # Ray Serve's shutdown cuts connections; this lets what has begun end, and waits a minute for it.
                    with suppress(TimeoutError):
                        ray_serve.delete(APPLICATION)
                        break
        except (KeyboardInterrupt, RayServeException, RayError):
            pass  # a second signal, or there is nothing to wait for
        finally:
            self._left = 0
            ray.shutdown()
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        if self._left:
            self._left -= 1
            raise KeyboardInterrupt


def _ray_lives() -> bool:
    """Whether Ray runs and this machine is a node of it: one that Ray has called dead does not come back."""
    try:
        return ray.is_initialized() and any(node["Alive"] for node in ray.nodes())
    except RayError:
        return True  # it did not answer, as on a busy machine


def _check_port(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ClusterError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another --port or --host"
        ) from error
    except UnicodeError as error:  # from the codec of host names
        raise ClusterError(f"--host {host}: cannot be the name of a host; give an address, such as 0.0.0.0") from error
