"""The one table from errors to HTTP: the status, type and code of each, in OpenAI's error shape."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cat_cluster import errors
from serve.http.answers import ErrorResponse
from serve.http.schema import EditRequest, ImageRequest

_FIELDS = {*ImageRequest.model_fields, *EditRequest.model_fields, "image", "mask", "file"}
_BRANCH = re.compile(r"constrained-|literal\[")  # of a union, which pydantic names as if it were a field
_SHOWN = 400  # characters of a message: it may quote what the client sent


@dataclass(frozen=True)
class ErrorKind:
    """How an error appears in HTTP; `message` replaces one that would reveal internals."""

    status: int
    type: str
    code: str
    message: str | None = None


_WAITING = (503, 504)  # that what was asked may work later, and when
INVALID, SERVER = "invalid_request_error", "server_error"
INTERNAL = ErrorKind(500, SERVER, "internal_error", "internal error; the log has its details under this request's id")

_INCOMPLETE = ErrorKind(
    422,
    INVALID,
    "model_damaged",
    "a stored file of this adapter is missing or cannot be read; `cat-cluster adapters verify` says which",
)

KINDS: Mapping[type[BaseException], ErrorKind] = {
    errors.SpecError: ErrorKind(400, INVALID, "invalid_value"),
    errors.ConceptError: ErrorKind(400, INVALID, "invalid_value"),
    errors.RegistryError: ErrorKind(400, INVALID, "invalid_reference"),
    errors.AdapterNotFoundError: ErrorKind(404, INVALID, "model_not_found"),
    errors.QuarantinedError: ErrorKind(409, INVALID, "model_quarantined"),
    # The request is sound and the adapter is there, but this base cannot be served with it.
    errors.AdapterMismatchError: ErrorKind(422, INVALID, "model_mismatch"),
    errors.AdapterFormatError: ErrorKind(422, INVALID, "model_damaged"),
    errors.EvaluationError: ErrorKind(422, INVALID, "model_not_measurable"),
    # The same request is as much again: no client tries a 422 again.
    errors.NotFiniteError: ErrorKind(422, INVALID, "image_not_finite"),
    # As OpenAI's own moderation does: no client tries a 400 again, and the same request draws the same image.
    errors.FlaggedImageError: ErrorKind(400, INVALID, "content_flagged"),
    errors.UncheckedImageError: ErrorKind(500, SERVER, "content_not_checked"),
    errors.ConflictError: ErrorKind(409, INVALID, "conflict"),
    errors.CancelledRequestError: ErrorKind(499, INVALID, "request_cancelled"),
    errors.OverloadedError: ErrorKind(503, SERVER, "overloaded"),
    errors.EngineStoppedError: ErrorKind(503, SERVER, "engine_stopped"),
    errors.StoreError: ErrorKind(503, SERVER, "store_unavailable", "the adapters' store does not respond; try again"),
    errors.ObjectNotFoundError: _INCOMPLETE,
    errors.ObjectUnreadableError: _INCOMPLETE,
    errors.DeadlineError: ErrorKind(504, SERVER, "deadline_exceeded"),
}

# Errors that have no class of their own, by status; and what each status means, for the API's description.
_PLAIN_CODES: Mapping[int, str] = {404: "not_found", 405: "method_not_allowed"}
_MEANINGS: Mapping[int, tuple[str, str, str, str | None]] = {
    400: ("The request is not valid.", "size: write WIDTHxHEIGHT", "invalid_value", "size"),
    401: ("No API key, or a wrong one.", "send a key in the header Authorization: Bearer KEY", "invalid_api_key", None),
    403: ("The key, or the page, may not do this.", "this needs a key of CAT_ADMIN_KEYS", "admin_only", None),
    404: ("There is no such thing.", "no adapter 'cupp': did you mean cup?", "model_not_found", "model"),
    408: ("The body did not arrive in time.", "the body did not arrive within 10 s", "body_timeout", None),
    409: (
        "The revision is quarantined; or pinned, or in use; or the run or its file is in another state.",
        "cup@r-0123456789ab is quarantined",
        "model_quarantined",
        "model",
    ),
    413: ("The body is too large.", "the body is larger than 524288 bytes", "body_too_large", None),
    415: ("The body is not of the route's content type.", "send Content-Type: application/json", "not_json", None),
    422: (
        "The adapter does not fit this base, or is damaged; or the image is not finite.",
        "cup was trained on another",
        "model_mismatch",
        "model",
    ),
    429: ("Too much at once for this key; see Retry-After.", "60 requests a minute", "rate_limit_exceeded", None),
    499: ("The client has gone, or the call was cancelled.", "the client has gone", "request_cancelled", None),
    500: ("Internal error.", str(INTERNAL.message), INTERNAL.code, None),
    503: ("No room or no store now; see Retry-After.", "the service is full", "overloaded", None),
    504: ("The deadline passed; see Retry-After.", "not done within 120 s", "deadline_exceeded", None),
}


class HttpError(HTTPException):
    """A response that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        retry = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(status, message, {**(headers or {}), **retry})
        self.type, self.code, self.param = type, code, param

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        message = self.detail if len(self.detail) <= _SHOWN else f"{self.detail[:_SHOWN]}..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the response; ASCII alone, since a message may quote text that is not valid Unicode."""
        return Response(json.dumps(self.body()), self.status_code, self.headers, "application/json")


def http_error_of(error: BaseException) -> HttpError:
    """Return an error's HTTP form; one that the table does not have is 500, without its message."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        code = _PLAIN_CODES.get(error.status_code, "http_error")
        return HttpError(error.status_code, str(error.detail), code, headers=error.headers)
    kind = next((KINDS[parent] for parent in type(error).__mro__ if parent in KINDS), INTERNAL)
    retry_after = getattr(error, "retry_after", 1.0 if kind.status in _WAITING else None)
    message = kind.message or str(error)
    param = _field_of(message) or ("model" if kind.code.startswith("model_") else None)
    return HttpError(kind.status, message, kind.code, type=kind.type, param=param, retry_after=retry_after)


def _invalid(found: Sequence[Any]) -> HttpError:
    """Return the 400 for what pydantic found: every field named, the first one as `param`."""
    names, lines = [], []
    for item in found:
        name = ".".join(str(part)[:80] for part in item["loc"][1:] if not _BRANCH.match(str(part)))
        if item["type"] == "extra_forbidden":
            line = f"{name}: no such parameter; see /docs for those there are"
        elif item["type"] in ("too_long", "string_too_long") and isinstance(item["input"], str):
            length, most = len(item["input"]), item["ctx"]["max_length"]
            line = f"{name}: has {length} characters and may have at most {most}; shorten it"
        elif name:
            line = f"{name}: {item['msg']}"
        else:
            line = "send a JSON object" if item["type"] in ("missing", "model_attributes_type") else str(item["msg"])
        names.append(name or _field_of(line))
        lines.append(line)
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_parameter"}
    code = codes.get(found[0]["type"], "invalid_value")
    return HttpError(400, "; ".join(lines), code, param=names[0] or None)


def _field_of(message: str) -> str | None:
    """Return the field of the request that a message begins with, such as `size: ...` and `adapters.0.model: ...`."""
    name, colon, _ = message.partition(":")
    return name if colon and name.partition(".")[0] in _FIELDS else None


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of these failures for a route, each with an example; 500 is always among them."""
    described: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*statuses, 500}):
        meaning, message, code, param = _MEANINGS[status]
        kind = SERVER if status >= 500 else INVALID
        example = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        described[status] = {
            "model": ErrorResponse,
            "description": meaning,
            "content": {"application/json": {"example": example}},
        }
        if status == 429 or status in _WAITING:
            described[status]["headers"] = {
                "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}
            }
    return described
