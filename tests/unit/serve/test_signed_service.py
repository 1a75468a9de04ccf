"""A service that signs: every image, in its status without the key, and none once its certificate has expired."""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from c2pa import C2paError, Reader

from cat_cluster.errors import SpecError
from serve.calls import FileFormat, Finished, Preview
from serve.denoise import signing
from tests.support.authority import Authority, signing_settings
from tests.support.provenance import DRAWN, said_in_xmp, xmp_of
from tests.support.services import CUP, Shop, events, failure_of, open_service, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]


def test_every_image_is_signed_until_the_certificate_expires(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = signing_settings(tmp_path, Authority.make(), days=(-1, 10))

    async def main() -> None:
        async with open_service(shop, signing=files) as service:
            call = replace(CUP, count=2, previews=1, file=FileFormat("jpeg"))
            found = await events(service, call)
            finished = [event for event in found if isinstance(event, Finished)]
            assert len(finished) == 2
            for event in finished:
                with Reader("image/jpeg", io.BytesIO(event.image)) as reader:
                    manifest = reader.get_active_manifest()
                    assert reader.get_validation_state() == "Valid"
                assert manifest is not None
                said = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
                assert said["cat-cluster.model"]["model"] == shop.registry.resolve("cup").name
                assert said_in_xmp(xmp_of(event.image)) == DRAWN
            previews = [event for event in found if isinstance(event, Preview)]
            assert len(previews) == 2
            for preview in previews:
                assert said_in_xmp(xmp_of(preview.image)) == DRAWN
                with pytest.raises(C2paError):
                    Reader("image/jpeg", io.BytesIO(preview.image))

            service.check_health()
            told = (await service.metrics()).decode()
            (expiry,) = re.findall(r"^cat_serve_signing_expiry_timestamp_seconds (\S+)", told, re.MULTILINE)
            assert float(expiry) == service._signer.expires.timestamp()
            status = await service.status()
            assert status["signing"]["subject"].startswith("CN=Studio")
            monkeypatch.setattr(signing, "_now", lambda: service._signer.expires + timedelta(seconds=1))
            refused = failure_of(await events(service, CUP))
            assert refused.kind == "ServingError"
            assert "expired on" in refused.message
            secret = files.key.read_text().splitlines()[1:-1]
            assert not [line for line in secret if line in f"{json.dumps(status)}{refused}{caplog.text}{vars(service)}"]

    with caplog.at_level(logging.DEBUG):
        run(main)


def test_a_service_without_signing_says_so(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            assert (await service.status())["signing"] is None

    run(main)


def test_an_engine_does_not_start_with_files_that_cannot_sign(shop: Shop, tmp_path: Path) -> None:
    files = signing_settings(tmp_path, Authority.make(), days=(-10, -1))

    async def main() -> None:
        async with open_service(shop, signing=files):
            pytest.fail("it started")

    with pytest.raises(SpecError, match=r"^signing\.certificates: .* expired on"):
        run(main)
