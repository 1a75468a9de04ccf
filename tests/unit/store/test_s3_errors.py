"""Which refusals of an S3 server are for good, so that nobody asks again."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from cat_cluster.errors import StoreRefusedError
from cat_cluster.store.s3_errors import explain


def answer(code: str, status: int) -> Exception:
    meta = {"HTTPStatusCode": status, "RequestId": "", "HostId": "", "HTTPHeaders": {}, "RetryAttempts": 0}
    return ClientError({"Error": {"Code": code, "Message": "so it is"}, "ResponseMetadata": meta}, "PutObject")


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (answer("AccessDenied", 403), True),
        (answer("403", 403), True),
        (answer("InvalidAccessKeyId", 403), True),
        (answer("SignatureDoesNotMatch", 403), True),
        (answer("NoSuchBucket", 404), True),
        (answer("NotImplemented", 501), True),
        (answer("ExpiredToken", 400), False),  # a role gets another
        (answer("SlowDown", 503), False),
        (answer("InternalError", 500), False),
        (EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), False),
    ],
)
def test_rights_do_not_come_by_waiting(error: Exception, permanent: bool) -> None:
    told = explain(error, action="write", key="k", url="s3://bucket/prod", endpoint="http://s3", waited=60)
    assert told.permanent is permanent
    assert isinstance(told, StoreRefusedError) is permanent
    assert str(told).startswith("cannot write k in storage s3://bucket/prod: ")
