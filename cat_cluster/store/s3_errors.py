"""What an S3 client's errors mean: which may pass, and what a person has to do about the others."""

from __future__ import annotations

import re

from botocore import exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)

from cat_cluster.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    ObjectUnreadableError,
    StoreError,
    StoreRefusedError,
)

S3_ERRORS = (ClientError, BotoCoreError, OSError)  # all that a request may raise

_TRANSPORT = (exceptions.ConnectionError, HTTPClientError, IncompleteReadError, ConnectionError, TimeoutError)
_PASSING_CODES = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "RequestTimeoutException",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "TooManyRequestsException",
}
_NO_OBJECT = {"NoSuchKey", "404", "NotFound"}
_WRONG_SECRET = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken", "AuthFailure"}
_REFUSED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role gives credentials"


class UploadGoneError(StoreError):
    """An upload in parts is not there any more: it was completed by a request whose response was lost, or removed."""


def error_code(error: Exception) -> str:
    """Return the S3 error code, as NoSuchKey, or the HTTP status where there is no body; "" for other errors."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def http_status(error: Exception) -> int:
    """Return the HTTP status of a response; 0 when there was none."""
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def may_pass(error: Exception) -> bool:
    """Say whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        status = http_status(error)
        return status == 429 or (status >= 500 and status != 501) or error_code(error) in _PASSING_CODES
    if isinstance(error, SSLError):
        return "certificate" not in str(error).lower()  # a cut connection passes, a certificate does not
    return isinstance(error, _TRANSPORT)


def is_missing(error: Exception) -> bool:
    """Say whether there is no object under the key; without a body it may also be the bucket that is missing."""
    return error_code(error) in _NO_OBJECT


def says_no_key(error: BaseException | None) -> bool:
    """Say whether the service itself says that there is no such key, not a server that knows no S3."""
    return isinstance(error, ClientError) and error_code(error) == "NoSuchKey"


def explain(error: Exception, *, action: str, key: str, url: str, endpoint: str, waited: float) -> StoreError:
    """Return the StoreError that names the storage, the key and the remedy for an error of the S3 client.

    action: "read", "write", "delete" or "list"; waited: seconds for which the request was tried again.
    """
    start = f"cannot {action} {key or 'keys'} in storage {url}"
    code, message = error_code(error), _message(error)
    bucket = url.split("/")[2]
    if http_status(error) == 412:
        return ObjectExistsError(f"{key} is already in storage {url}, and it is write-once")
    if code == "NoSuchUpload":
        return UploadGoneError(f"{start}: its upload in parts was removed by somebody else; try again")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreError(f"{start}: no AWS credentials were found; {_CREDENTIALS}")
    if code in _WRONG_SECRET:
        refused = StoreError if code == "ExpiredToken" else StoreRefusedError  # a role has a new token soon
        return refused(f"{start}: {endpoint} refused the credentials ({code}: {message}); {_CREDENTIALS}")
    if code in _REFUSED:
        return StoreRefusedError(
            f"{start}: access was denied ({message}); check the credentials, and that they may list the bucket "
            f"{bucket} and get, put and delete its objects"
        )
    if code == "NoSuchBucket":
        return StoreRefusedError(f"{start}: there is no bucket {bucket} at {endpoint}; make it, or correct the name")
    if is_missing(error):
        return _not_there(action, start, key, url, endpoint)
    if isinstance(error, FlexibleChecksumError) or code == "BrokenMPU":
        return damaged(key, url, message)
    if code == "NotImplemented" or http_status(error) == 501:
        return StoreRefusedError(
            f"{start}: the server at {endpoint} lacks what is asked of it ({message}); conditional writes "
            "(If-None-Match) are needed; with an old server try AWS_REQUEST_CHECKSUM_CALCULATION=when_required"
        )
    if may_pass(error):
        return _gave_up(error, start, endpoint, waited)
    if not isinstance(error, ClientError):
        return StoreError(f"{start}: {message}; check the AWS_* variables and the AWS configuration file")
    return StoreError(f"{start}: {endpoint} answered {code or type(error).__name__} ({message})")


def damaged(key: str, url: str, what: str) -> ObjectUnreadableError:
    """Return the error for an object whose bytes are not those that were stored."""
    return ObjectUnreadableError(
        f"{key} in storage {url} is damaged ({what}); restore it from a backup, or delete it and store again"
    )


def _not_there(action: str, start: str, key: str, url: str, endpoint: str) -> StoreError:
    """Return the error for 404: of an object or, to a listing, of a server that knows nothing of the bucket."""
    if action != "list":
        return ObjectNotFoundError(f"no object {key} in storage {url}")
    return StoreError(f"{start}: {endpoint} answered 404 to a listing; check AWS_ENDPOINT_URL and the bucket's name")


def _gave_up(error: Exception, start: str, endpoint: str, waited: float) -> StoreError:
    tried = f"tried again for {waited:g} s"
    if http_status(error):
        return StoreError(
            f"{start}: {endpoint} answered {http_status(error)} {error_code(error)} ({tried}); try again when the "
            "service has recovered"
        )
    late = "timed out" in str(error).lower() or "timeout" in type(error).__name__.lower()
    kind = "did not answer in time" if late else "cannot be reached"
    return StoreError(
        f"{start}: {endpoint} {kind} ({_message(error)}; {tried}); check AWS_ENDPOINT_URL, AWS_REGION and the network"
    )


def _message(error: Exception) -> str:
    text = str(error.response.get("Error", {}).get("Message", "")) if isinstance(error, ClientError) else str(error)
    return re.sub(r"\s+", " ", text).strip().rstrip(".") or type(error).__name__
