"""Access control: API keys, and the limits of each key in this process."""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cat_cluster.errors import OverloadedError, SpecError
from serve.http.http_errors import HttpError, http_error_of
from serve.http.sites import is_loopback
from serve.settings import ServeSettings

API_KEYS, ADMIN_KEYS = "CAT_API_KEYS", "CAT_ADMIN_KEYS"
_RETRY_S = 1.0  # an image in flight may end any moment


@dataclass
class _Use:
    """What one caller has in flight, and what is left of its requests.

    bodies: those that have not arrived whole; uploads: those of them, and those being read, that have files.
    streams: of events.
    """

    images: int = 0
    bodies: int = 0
    uploads: int = 0
    streams: int = 0
    tokens: float = 0.0
    at: float = field(default=float("-inf"))


@dataclass(frozen=True)
class Caller:
    """The sender of a request. name: the first 8 hex of the key's sha256, which may be logged, or "anonymous"."""

    name: str
    is_admin: bool


class Access:
    """The keys that are accepted, as digests alone, and the use of each.

    Without API keys everybody is one anonymous caller, and may act on adapters unless there are admin keys.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images = settings.images_per_key
        # At most half of the requests that Ray Serve passes to an ingress at once (see app.py): those that read no
        # body, such as health, and those whose images are drawn always have room.
        self._all_bodies = 2 * (settings.max_waiting + settings.max_rows // 2)
        self._open_bodies = 0
        self._most_uploads, self._uploads = settings.max_uploads, 0
        self._most_streams, self._streams = settings.max_event_streams, 0
        self._uploads_per_key = max(1, settings.max_uploads // 2)  # so that no key keeps all others from editing
        self._per_minute = settings.requests_per_minute
        self._api = [_digest(key) for key in api_keys]
        self._admin = [_digest(key) for key in admin_keys]
        self._clock = clock
        self._use: dict[str, _Use] = {}

    @classmethod
    def from_environment(cls, settings: ServeSettings, environment: Mapping[str, str] = os.environ) -> Access:
        """Read CAT_API_KEYS and CAT_ADMIN_KEYS, each separated by commas; SpecError for one that cannot be sent."""
        return cls(settings, api_keys=_keys(environment, API_KEYS), admin_keys=_keys(environment, ADMIN_KEYS))

    @property
    def is_open(self) -> bool:
        """True when any key, or none, is accepted."""
        return not self._api

    def authenticate(self, authorization: str | None) -> Caller:
        """Return who sent this Authorization header; 401 when its key is none of ours and keys are needed."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        is_admin = _among(digest, self._admin)
        is_known = _among(digest, self._api) or is_admin
        if is_known:
            return Caller(digest.hex()[:8], is_admin or (self.is_open and not self._admin))
        if not self.is_open:
            raise HttpError(
                401,
                "send one of this service's API keys in the header Authorization: Bearer KEY",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return Caller("anonymous", not self._admin)

    def check_admin(self, caller: Caller) -> None:
        """Refuse a caller who may not act on adapters with 403."""
        if not caller.is_admin:
            remedy = "use one of them" if self._admin else "set it where the service runs"
            raise HttpError(403, f"acting on adapters needs a key of {ADMIN_KEYS}: {remedy}", "admin_only")

    def admit(self, caller: Caller) -> None:
        """Count a request; 429 when the caller's requests of this minute are used up."""
        if self._per_minute is None:
            return
        use, now, rate = self._used_by(caller), self._clock(), self._per_minute / 60.0
        use.tokens = min(float(self._per_minute), use.tokens + (now - use.at) * rate)
        use.at = now
        if use.tokens < 1.0:
            raise _too_much(f"this key has {self._per_minute} requests a minute", (1.0 - use.tokens) / rate)
        use.tokens -= 1.0

    @contextmanager
    def images(self, caller: Caller, count: int) -> Iterator[None]:
        """Hold `count` images in flight; 429 when the caller has too many, 400 when it could never have as many."""
        if count > self._images:
            raise SpecError(f"n: one key may have {self._images} images in flight; ask for fewer")
        use = self._used_by(caller)
        if use.images + count > self._images:
            raise _too_much(f"this key has {use.images} of at most {self._images} images in flight", _RETRY_S)
        use.images += count
        try:
            yield
        finally:
            use.images -= count

    @contextmanager
    def body(self, caller: Caller) -> Iterator[None]:
        """Hold a request whose body is being read; 429 when the caller has too many of them, 503 when all have.

        A caller never needs more than the images it may have in flight.
        """
        use = self._used_by(caller)
        if use.bodies >= self._images:
            raise _too_much(f"this key has {use.bodies} requests whose body has not arrived", _RETRY_S)
        if self._open_bodies >= self._all_bodies:
            raise http_error_of(OverloadedError("the service reads too many requests now; try again later", _RETRY_S))
        use.bodies += 1
        self._open_bodies += 1
        try:
            yield
        finally:
            use.bodies -= 1
            self._open_bodies -= 1

    @contextmanager
    def upload(self, caller: Caller) -> Iterator[None]:
        """Hold a request whose files are being sent and read, which take memory; 429 and 503 as for other bodies."""
        use = self._used_by(caller)
        if not self.is_open and use.uploads >= self._uploads_per_key:
            raise _too_much(
                f"this key has {use.uploads} of at most {self._uploads_per_key} uploads being read", _RETRY_S
            )
        if self._uploads >= self._most_uploads:
            raise http_error_of(OverloadedError("the service reads too many images now; try again later", _RETRY_S))
        with self.body(caller):
            use.uploads += 1
            self._uploads += 1
            try:
                yield
            finally:
                use.uploads -= 1
                self._uploads -= 1

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """Hold a stream of events, which may last for long; 429 and 503 as for uploads, of which one key has half."""
        use = self._used_by(caller)
        if not self.is_open and use.streams >= max(1, self._most_streams // 2):
            raise _too_much(f"this key has {use.streams} streams of events", _RETRY_S)
        if self._streams >= self._most_streams:
            raise http_error_of(OverloadedError("the service sends too many streams of events; poll them", _RETRY_S))
        use.streams += 1
        self._streams += 1
        try:
            yield
        finally:
            use.streams -= 1
            self._streams -= 1

    def _used_by(self, caller: Caller) -> _Use:
        return self._use.setdefault(caller.name, _Use())


def check_bind(host: str, access: Access) -> None:
    """Refuse with SpecError to listen beyond this machine while any key is accepted."""
    if access.is_open and not is_loopback(host):
        raise SpecError(
            f"without API keys the service listens on this machine alone, not on {host or 'every address'}: set "
            f"{API_KEYS} to one or more keys separated by commas, or bind 127.0.0.1"
        )


def _too_much(message: str, retry_after: float) -> HttpError:
    return HttpError(
        429, f"{message}; try again later", "rate_limit_exceeded", type="rate_limit_error", retry_after=retry_after
    )


def _keys(environment: Mapping[str, str], name: str) -> list[str]:
    keys = [key.strip() for key in environment.get(name, "").split(",")]
    keys = [key for key in keys if key]
    if environment.get(name) and not keys:
        raise SpecError(f"{name} is set and holds no key: name one or more, separated by commas, or unset it")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise SpecError(f"{name}: a key is printable ASCII without spaces, for it travels in a header")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compare with every digest, in a time that does not depend on which of them matches."""
    return sum(hmac.compare_digest(digest, other) for other in known) > 0
