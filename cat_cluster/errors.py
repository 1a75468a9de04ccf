"""Errors a user can cause or act on: one small tree, and every message says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar


class CatClusterError(Exception):
    """Root of all expected errors; the command line prints the message alone and exits with code 1.

    permanent: whether the same work would fail again until a person changes something, so that nothing tries it again.
    """

    permanent: ClassVar[bool] = False


class MissingExtraError(CatClusterError):
    """An optional part of the package is needed and not installed."""

    permanent = True


@contextmanager
def needs_extra(extra: str, purpose: str, otherwise: str = "") -> Iterator[None]:
    """Import what `pip install 'cat-cluster[extra]'` brings inside this block.

    Raises MissingExtraError, which names the extra, when a package is not there. purpose: what needs it, as the subject
    of the message; otherwise: what to do instead.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cat_cluster", "serve", "jobs"):
            raise
        raise MissingExtraError(
            f"{purpose} needs {package}, which is not installed: pip install 'cat-cluster[{extra}]'{otherwise}"
        ) from error


class SpecError(CatClusterError):
    """A job spec has an unknown key, a bad value, or names something that is not there."""

    permanent = True


class ConceptError(CatClusterError):
    """The images or captions of a concept cannot be used."""

    permanent = True


class BaseModelError(CatClusterError):
    """A base model cannot be found, is of an unsupported family, or is damaged."""

    permanent = True


class HubError(BaseModelError):
    """A base model cannot be downloaded from the hub: its name, a right, or the network."""

    permanent = False


class AdapterFormatError(CatClusterError):
    """An adapter file is damaged, not finite, or holds parts this project does not apply."""


class AdapterMismatchError(CatClusterError):
    """An adapter was trained on another base model or does not fit its layers."""


class StoreError(CatClusterError):
    """The object store refused, is unreachable, or ran out of space."""


class StoreRefusedError(StoreError):
    """The object store refuses for good: the credentials, the right to the bucket, or what the server cannot do."""

    permanent = True


class ObjectNotFoundError(StoreError):
    """No object is stored under the key."""


class ObjectUnreadableError(StoreError):
    """One object cannot be read, or is not what was stored; the store itself responds."""

    permanent = True


class ObjectExistsError(StoreError):
    """A write-once key is already taken."""


class RegistryError(CatClusterError):
    """A registry request cannot be carried out as asked."""


class AdapterNotFoundError(RegistryError):
    """No such adapter, revision or alias."""


class CheckpointError(CatClusterError):
    """A training checkpoint is missing, damaged, or belongs to another run."""

    permanent = True


class ChangedJobError(CheckpointError):
    """What a job works on has changed or gone since it was checked: from its start it finds what there is now."""

    permanent = False


class RunError(CatClusterError):
    """A run cannot be found, read, started or stopped as asked."""


class SupersededError(RunError):
    """Another driver has taken over the run: this one must not write any more."""

    permanent = True


class ClusterError(CatClusterError):
    """A Ray cluster cannot be reached, or refuses what was asked of it."""


class KubernetesError(ClusterError):
    """The API server of a Kubernetes cluster cannot be reached, or refuses what was asked of it.

    status: the HTTP status it gave; None when it gave none. reason: its own words. causes: field and message of each
    field that it refuses, where it names them.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        *,
        reason: str = "",
        causes: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.causes = tuple(causes)


class WorkerError(ClusterError):
    """What ran in a process of a Ray cluster failed there."""


class LostWorkerError(WorkerError):
    """A process or machine of a Ray cluster was lost while it worked."""


class OutOfMemoryError(CatClusterError):
    """The work needs more memory than there is."""

    permanent = True


class OutputError(CatClusterError):
    """A file the user asked for cannot be written where they asked for it."""


class EvaluationError(CatClusterError):
    """An evaluation cannot run: no judge, no prompts, or no images."""


class ServingError(CatClusterError):
    """A serving request cannot be carried out."""


class BusyError(ServingError):
    """What was asked may work later; `retry_after` says in how many seconds to ask again."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OverloadedError(BusyError):
    """The service has no room for the request now."""


class ConflictError(ServingError):
    """An adapter is pinned, in use or being loaded, and what was asked of it does not go with that."""


class DeadlineError(BusyError):
    """The request's deadline passed before its images were done."""


class CancelledRequestError(ServingError):
    """Whoever asked has gone, or asked for the work to stop."""


class QuarantinedError(ServingError):
    """The revision is quarantined: its drift alarm took it out of service."""


class FlaggedImageError(ServingError):
    """The safety checker has flagged the image, which is kept back."""


class UncheckedImageError(ServingError):
    """The safety checker failed, and an image that it has not checked is kept back."""


class NotFiniteError(CatClusterError):
    """An image is not finite: what was asked of base and adapters together is more than their numbers hold."""


class EngineStoppedError(ServingError):
    """The engine is stopping or has failed; another replica, or a restart, will answer."""
