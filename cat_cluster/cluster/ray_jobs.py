"""The Jobs API of a Ray cluster: access, the jobs that drive a run, and errors with their remedies."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cat_cluster.errors import ClusterError, needs_extra

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Ray is imported inside functions: reading runs in a store does not need it.

CONNECT_SECONDS = 15
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
TOKEN_PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
LIVE = ("PENDING", "RUNNING")
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster by the address of its dashboard, http(s)://host:port.

    token: what the cluster asks for, if anything; ca: a file of certificates to trust instead of the system's.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether the address is of this machine; a forwarded port of another cluster looks the same."""
        host = urlsplit(self.address).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")


def open_cluster(address: str, token: str | None = None, ca: Path | None = None) -> RayCluster:
    """Return the cluster at `host:port` or http(s)://host:port; it is not contacted yet.

    Without a token, $RAY_AUTH_TOKEN counts, then the file $RAY_AUTH_TOKEN_PATH and, for a cluster of this machine,
    ~/.ray/auth_token: the places where Ray itself looks. Raises ClusterError.
    """
    text = address.strip() if "://" in address else f"http://{address.strip()}"
    remedy = "give the address of its dashboard, for example http://127.0.0.1:8265"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ClusterError(f"--address {address}: is not the address of a Ray cluster's Jobs API; {remedy}")
    cluster = RayCluster(text.rstrip("/"), token, ca)
    return cluster if token else replace(cluster, token=_token_of_environment(cluster))


def _token_of_environment(cluster: RayCluster) -> str | None:
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    default = Path.home() / ".ray" / "auth_token"
    named = os.environ.get(TOKEN_PATH_VARIABLE, "")
    if not named and not (cluster.is_loopback and default.is_file()):
        return None
    path = Path(named).expanduser() if named else default
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(
            f"the token file {path} cannot be read ({error}): correct ${TOKEN_PATH_VARIABLE}, set ${TOKEN_VARIABLE}, "
            "or give --token"
        ) from error


def connect(cluster: RayCluster) -> JobSubmissionClient:
    """Return a client of the cluster's Jobs API after a check that it answers; raises ClusterError."""
    with needs_extra("cluster", "a Ray cluster"):
        from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else {}
    with explained(cluster), _address_as_given():
        _probe(cluster, headers)
        return JobSubmissionClient(cluster.address, headers=headers, verify=str(cluster.ca) if cluster.ca else True)


def _probe(cluster: RayCluster, headers: Mapping[str, str]) -> None:
    """Request the version with a timeout: Ray's own client has none, and would hang at a dead address."""
    import requests

    response = requests.get(
        f"{cluster.address}/api/version",
        headers=dict(headers),
        timeout=CONNECT_SECONDS,
        verify=str(cluster.ca) if cluster.ca else True,
    )
    if response.status_code in (401, 403):
        raise _refused_token(cluster, response.status_code)
    try:
        known = response.ok and "ray_version" in response.json()
    except ValueError:
        known = False
    if not known:
        raise ClusterError(
            f"{cluster.address} answers, but not as a Ray dashboard (status {response.status_code}): give the address "
            "of the cluster's dashboard, port 8265 unless it was changed"
        )


@contextmanager
def explained(cluster: RayCluster) -> Iterator[None]:
    """Turn an error of Ray's client into a ClusterError that names the cluster and the remedy."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise _refused_token(cluster, 401 if "Authentication required" in str(error) else 403) from error
    except requests.exceptions.SSLError as error:
        raise ClusterError(
            f"the certificate of {cluster.address} is not trusted ({_last_line(error)}): give the file of its "
            "authority with --ca"
        ) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ClusterError(
            f"no Ray cluster answers at {cluster.address} ({_last_line(error)}): check the address and that the "
            "cluster runs; in Kubernetes forward the port of the head's service, kubectl port-forward svc/NAME 8265"
        ) from error
    except RuntimeError as error:
        raise ClusterError(f"the Ray cluster at {cluster.address} refused: {_last_line(error)}") from error


def _refused_token(cluster: RayCluster, status: int) -> ClusterError:
    if status == 401:
        what = "asks for a token, and none was given"
    else:
        what = "refuses the token" if cluster.token else "refuses access"
    return ClusterError(
        f"the Ray cluster at {cluster.address} {what} (status {status}): give the one it was started with by --token, "
        f"${TOKEN_VARIABLE} or a file named by ${TOKEN_PATH_VARIABLE}"
    )


@contextmanager
def _address_as_given() -> Iterator[None]:
    """Unset the variables by which Ray's client would use another cluster than the given one."""
    kept = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def jobs_of_run(client: JobSubmissionClient, cluster: RayCluster, run_id: str) -> list[JobDetails]:
    """Return the run's jobs on the cluster, newest first; their ids are `<run id>-<n>`."""
    with explained(cluster):
        found = client.list_jobs()
    numbered = {}
    for job in found:
        start, _, number = (job.submission_id or "").rpartition("-")
        if start == run_id and number.isdecimal():
            numbered[int(number)] = job
    return [numbered[number] for number in sorted(numbered, reverse=True)]


def last_job_status(cluster: RayCluster, run_id: str) -> str | None:
    """Return the status of the run's newest job on the cluster, None if it has none; raises ClusterError."""
    jobs = jobs_of_run(connect(cluster), cluster, run_id)
    return jobs[0].status.value if jobs else None


def job_logs(cluster: RayCluster, run_id: str) -> str:
    """Return the log of the run's newest job on the cluster; raises ClusterError."""
    client = connect(cluster)
    jobs = jobs_of_run(client, cluster, run_id)
    if not jobs or jobs[0].submission_id is None:
        raise ClusterError(
            f"the Ray cluster at {cluster.address} has no job of {run_id}: it ran on another cluster, or this one was "
            "started anew since; `cat-cluster jobs status` shows what the storage knows"
        )
    with explained(cluster):
        return str(client.get_job_logs(jobs[0].submission_id))


def stop_jobs(cluster: RayCluster, run_id: str) -> list[str]:
    """Ask Ray to stop every job of the run that has not ended; return their ids. Raises ClusterError."""
    client = connect(cluster)
    stopped = []
    for job in jobs_of_run(client, cluster, run_id):
        if job.status.value in LIVE and job.submission_id is not None:
            with explained(cluster):
                client.stop_job(job.submission_id)
            stopped.append(job.submission_id)
    return stopped


def current_job() -> str | None:
    """Return the submission id of the Ray job whose entry point this process is, None outside of one."""
    try:
        metadata: Any = json.loads(os.environ[_JOB_CONFIG_VARIABLE])["metadata"]
        return str(metadata["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return None


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:400] if lines else type(error).__name__
