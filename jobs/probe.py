"""Entry point of a nightly check: `python -m jobs.probe URL` asks a service for a canonical probe of all it serves.

It writes a line for each revision that an alias names, and a summary; the exit code is 0 only if none is in alarm and
each was probed, but for those that cannot be measured. The service itself probes what is in its slots; an adapter that
nobody asked for is loaded for its probe.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from cat_cluster.errors import CatClusterError, SpecError

ADMIN_KEYS = "CAT_ADMIN_KEYS"  # as the service reads it: the first of them is used
LIMIT_S = 300.0  # for one adapter, waiting for its turn included
PAGE = 100
MAX_BYTES = 32 << 20  # of an answer; a page of adapters has far less
LATEST = "latest"
_LONGEST_S = 86400.0
FIRST_S = 30.0  # for a first answer: the network policies of a pod that has just come may shut it in for some seconds
_WAIT_S = 1.0  # between two tries where the service does not say how long
_BUSY = (429, 503)
_FINE = ("ok", "warning", "not measurable", "gone")
_REFUSED = (400, 401, 403)  # for one adapter, and so for all
_NOT_MEASURABLE = "model_not_measurable"
_GONE = "model_not_found"


class ProbeError(CatClusterError):
    """The service cannot be asked any further."""


class RefusedError(CatClusterError):
    """The service has refused a request, or not answered it in time. status, code: HTTP's and the service's own."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Service:
    """A service at an address, asked politely: where it is busy the request is sent again when it says."""

    def __init__(self, url: str, key: str | None, *, limit_s: float = LIMIT_S) -> None:
        """key: an admin key, None for a service without keys; limit_s: seconds that one request may take in all.

        Raises SpecError for what is no address.
        """
        if not _is_address(url):
            shown = url.rpartition("@")[2]  # what is before may be a password
            raise SpecError(f"{shown}: is no address of a service, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._limit_s = limit_s
        self._first_until: float | None = time.monotonic() + min(FIRST_S, limit_s)  # None: it has answered
        self._opener = urllib.request.build_opener(_NoRedirects())

    def adapters(self) -> Iterator[Mapping[str, Any]]:
        """Yield every adapter of the service, as GET /v1/adapters has them; raises RefusedError, ProbeError."""
        after = ""
        while True:
            query = urllib.parse.urlencode({"limit": PAGE, **({"after": after} if after else {})})
            page = self._ask("GET", f"/v1/adapters?{query}")
            match page:
                case {"data": list(entries), "has_more": False} if all(map(_is_entry, entries)):
                    yield from entries
                    return
                case {"data": list(entries), "has_more": True, "last_id": str(last)} if (
                    all(map(_is_entry, entries)) and last > after  # else the pages would never end
                ):
                    yield from entries
                    after = last
                case _:
                    raise self._foreign(json.dumps(page).encode())

    def probe(self, reference: str) -> Mapping[str, Any]:
        """Return the record of a canonical probe; raises RefusedError when there is none, ProbeError."""
        answer = self._ask("POST", f"/v1/adapters/{urllib.parse.quote(reference, safe='@')}/probe")
        match answer:
            case {"result": {"verdict": str()} as result}:
                return dict(result)
        raise self._foreign(json.dumps(answer).encode())

    def _ask(self, method: str, path: str) -> Mapping[str, Any]:
        """Return the answer to a request; a service that does not answer may be away for a while."""
        until = time.monotonic() + self._limit_s
        while True:
            request = urllib.request.Request(self.url + path, method=method, headers=self._headers)
            try:
                with self._opener.open(request, timeout=max(_WAIT_S, until - time.monotonic())) as response:
                    self._first_until = None
                    return self._content(_read(response, until))
            except urllib.error.HTTPError as error:
                self._first_until = None
                refused = _refusal(error)
                if error.code not in _BUSY or not _wait(error.headers.get("Retry-After"), until):
                    raise refused from None
            except TimeoutError:  # of a connection that was made: others may be answered
                words = f"the service did not answer within {self._limit_s:g} s (--limit)"
                raise RefusedError(words, HTTPStatus.GATEWAY_TIMEOUT, "") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                is_no_name = isinstance(error, UnicodeError)  # of a host
                if is_no_name or not _wait(None, until if self._first_until is None else self._first_until):
                    cause = error.reason if isinstance(error, urllib.error.URLError) else error
                    raise ProbeError(f"no service answers at {self.url}: {cause}") from None

    def _content(self, data: bytes) -> Mapping[str, Any]:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self._foreign(data)
        return content

    def _foreign(self, data: bytes) -> ProbeError:
        return ProbeError(f"what answers at {self.url} is no service of cat-cluster: {data[:100]!r}")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer as any other: the key is for this address alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe what a service serves and return the exit code."""
    options = _options(arguments)
    counts: dict[str, int] = {}
    failed = False
    try:
        service = Service(options.url, _key(os.environ.get(ADMIN_KEYS, "")), limit_s=options.limit)
        for adapter in service.adapters():
            for reference in references(adapter):
                word, reason = outcome(service, reference)
                counts[word] = counts.get(word, 0) + 1
                failed = failed or word not in _FINE
                say(f"{word}: {reference}" + (f": {reason}" if reason else ""))
    except CatClusterError as error:
        say(f"error: {error}")
        failed = True
    except KeyboardInterrupt:
        say("interrupted")
        failed = True
    say(", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "nothing was probed")
    return 1 if failed else 0


def references(adapter: Mapping[str, Any]) -> list[str]:
    """Return a name for each revision that users get by an alias, the adapter's own for `latest`.

    adapter: an entry of GET /v1/adapters. An alias whose record cannot be read is named too: the service says why.
    """
    named: dict[str, str] = {}
    for alias, revision in sorted(adapter["aliases"].items(), key=lambda pair: (pair[0] != LATEST, pair[0])):
        named.setdefault(revision, alias)
    aliases = [*named.values(), *adapter["damaged_aliases"]]
    return [adapter["id"] if alias == LATEST else f"{adapter['id']}@{alias}" for alias in aliases]


def outcome(service: Service, reference: str) -> tuple[str, str | None]:
    """Return how the probe of an adapter went, in a word or two, and why unless it is ok.

    Raises RefusedError for what the service would refuse for every adapter, ProbeError.
    """
    try:
        record = service.probe(reference)
    except RefusedError as error:
        if error.status in _REFUSED:
            raise
        words = {_NOT_MEASURABLE: "not measurable", _GONE: "gone"}  # deleted since it was listed
        return words.get(error.code, "not probed"), str(error)
    return str(record["verdict"]), record.get("reason")


def say(text: str) -> None:
    """Write one line at once: the log is read while it grows. What a service sends is no line of its own."""
    sys.stdout.write("".join(one if one.isprintable() else " " for one in text) + "\n")
    sys.stdout.flush()


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        has_place = bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError:
        return False
    is_plain = url.isascii() and url.isprintable() and " " not in url
    return is_plain and has_place and parts.scheme in ("http", "https") and not parts.query and not parts.fragment


def _key(text: str) -> str | None:
    """Return the first of the keys in a text, None for none; SpecError for one that no header can hold."""
    key = next(filter(None, map(str.strip, text.split(","))), None)
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise SpecError(f"{ADMIN_KEYS}: a key is printable ASCII without spaces, for it travels in a header")
    return key


def _is_entry(found: Any) -> bool:
    match found:
        case {"id": name, "aliases": dict(aliases), "damaged_aliases": list(damaged)}:
            names = (name, *aliases, *aliases.values(), *damaged)
            return all(isinstance(name, str) and name.isprintable() for name in names)
    return False


def _read(response: http.client.HTTPResponse, until: float) -> bytes:
    """Return the body of an answer; TimeoutError for one that drips in for longer, HTTPException for half of one."""
    data = bytearray()
    while piece := response.read1(1 << 16):
        data += piece
        if time.monotonic() > until:
            raise TimeoutError
        if len(data) > MAX_BYTES:
            break  # it is no JSON then
    if response.length:
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _refusal(error: urllib.error.HTTPError) -> RefusedError:
    """Return the error of an answer that is none of success: the service's own words where they are."""
    message, code = f"{error.url} answers with HTTP status {error.code}", ""
    try:
        found = json.loads(error.read(MAX_BYTES))["error"]
        message, code = " ".join(str(found["message"]).split()), str(found["code"])
    except (ValueError, RecursionError, KeyError, TypeError, OSError, http.client.HTTPException):  # of a proxy
        if location := error.headers.get("Location"):
            message += f", which leads to {location}: give that address"
    if error.code in (401, 403):
        message += f" ({ADMIN_KEYS} of this environment {'is used' if os.environ.get(ADMIN_KEYS) else 'is not set'})"
    return RefusedError(message, error.code, code)


def _wait(retry_after: str | None, until: float) -> bool:
    """Wait as long as the service asks for; say whether that was within the time."""
    wait_s = max(_WAIT_S, float(retry_after)) if retry_after is not None and retry_after.isdecimal() else _WAIT_S
    if time.monotonic() + wait_s > until:
        return False
    time.sleep(wait_s)
    return True


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError
    return seconds


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.probe",
        description=f"Probe every adapter that a service serves. {ADMIN_KEYS} in the environment holds its admin key.",
    )
    parser.add_argument("url", metavar="URL", help="address of the service, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--limit",
        type=_seconds,
        default=LIMIT_S,
        metavar="SECONDS",
        help=f"that one adapter may take, its wait for a busy service included (default {LIMIT_S:.0f})",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as PID 1 of a pod it would be ignored
    sys.exit(main())
