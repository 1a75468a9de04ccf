"""Signed images, read by C2PA's own reader: who signed what, and a change is found. Bad files are refused."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from c2pa import C2paError, Context, Reader
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from pydantic import ValidationError

from cat_cluster.errors import MissingExtraError, ServingError, SpecError
from cat_cluster.models.base_model import BaseModel, load_base_model
from serve.calls import FileFormat, FileKind, ImageCall
from serve.denoise import signing
from serve.denoise.codec import Codec
from serve.denoise.credentials import read_credentials
from serve.denoise.image_file import image_file, image_metadata
from serve.denoise.signing import ImageSigner, open_signer
from serve.settings import ServeSettings, SigningSettings, bad_settings
from tests.support.authority import (
    PASSWORD,
    Authority,
    certificates_pem,
    key_pem,
    p256,
    signing_files,
    signing_settings,
)
from tests.support.provenance import DRAWN, TRAINED_MEDIA, said_in_xmp, xmp_of
from tests.support.services import stack
from tests.support.time_authority import time_authority

KINDS: list[FileKind] = ["png", "jpeg", "webp"]
AUTHORITY = Authority.make()
PROMPT = "a quiet sks cup"
METADATA = image_metadata(ImageCall("request-1", PROMPT, stack("cup"), seed=11), 11, ["cup@r-0123456789ab"], ["d" * 64])
MODEL = {"model": "cup@r-0123456789ab", "base": "pocket"}
SOON = 30.0


def picture(shade: float = 0.0) -> torch.Tensor:
    """Noise; shade is added to one pixel."""
    image = torch.rand((3, 32, 48), generator=torch.Generator().manual_seed(0)) / 2
    image[:, 5, 7] += shade
    return image


def open_or_fail(settings: SigningSettings) -> ImageSigner:
    signer = open_signer(settings)
    assert signer is not None
    return signer


@pytest.fixture
def signer(tmp_path: Path) -> ImageSigner:
    return open_or_fail(signing_settings(tmp_path, AUTHORITY))


def read(data: bytes, kind: FileKind) -> dict[str, Any]:
    """What C2PA's reader finds, when it trusts this authority alone."""
    trust = {"trust": {"trust_anchors": certificates_pem([AUTHORITY.root()]).decode()}}
    with Reader(f"image/{kind}", io.BytesIO(data), context=Context.from_dict(trust)) as reader:
        found: dict[str, Any] = json.loads(reader.json())
    return found


def manifest_of(data: bytes, kind: FileKind) -> dict[str, Any]:
    """The manifest of an image whose signature is valid and of whom the reader trusts."""
    found = read(data, kind)
    assert found["validation_state"] == "Trusted", found
    assert found["validation_results"]["activeManifest"]["failure"] == []
    manifest: dict[str, Any] = found["manifests"][found["active_manifest"]]
    return manifest


def payload(data: bytes, kind: FileKind) -> bytes:
    """The part of a file that holds the pixels."""
    if kind == "png":
        return data[data.index(b"IDAT") - 4 : data.index(b"IEND") - 4]
    return data[data.index({"jpeg": b"\xff\xda", "webp": b"VP8 "}[kind]) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signed_image_says_that_a_trained_model_created_it_and_which(kind: FileKind, signer: ImageSigner) -> None:
    plain = image_file(picture(), METADATA, FileFormat(kind))
    signed = signer.sign(plain, f"image/{kind}", MODEL)
    manifest = manifest_of(signed, kind)
    said = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
    (action,) = said["c2pa.actions.v2"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", TRAINED_MEDIA)
    assert action["softwareAgent"] == {"name": "cat-cluster", "version": "0.2.0"}
    assert said["cat-cluster.model"] == MODEL
    assert manifest["signature_info"]["common_name"] == "Studio"
    assert PROMPT not in json.dumps(read(signed, kind))
    # It is the same image, and what was in the file is still there.
    with Image.open(io.BytesIO(signed)) as image, Image.open(io.BytesIO(plain)) as before:
        assert np.array_equal(np.asarray(image), np.asarray(before))
        for key in ("exif", "prompt", "parameters"):
            assert image.info.get(key) == before.info.get(key)
    assert said_in_xmp(xmp_of(signed)) == DRAWN
    assert len(signed) - len(plain) < 16_000  # no thumbnail


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_pixel_is_found(kind: FileKind, signer: ImageSigner) -> None:
    plain, other = (image_file(picture(shade), METADATA, FileFormat(kind)) for shade in (0.0, 0.5))
    signed = signer.sign(plain, f"image/{kind}", MODEL)
    before, after = payload(plain, kind), payload(other, kind)
    assert signed.count(before) == 1
    changed = signed.replace(before, after)
    if kind == "webp":
        changed = changed[:4] + (len(changed) - 8).to_bytes(4, "little") + changed[8:]
    with Image.open(io.BytesIO(changed)) as image, Image.open(io.BytesIO(other)) as wanted:
        assert np.array_equal(np.asarray(image), np.asarray(wanted)), "the file shows another picture"
    found = read(changed, kind)
    assert found["validation_state"] == "Invalid"
    codes = {failure["code"] for failure in found["validation_results"]["activeManifest"]["failure"]}
    assert codes == {"assertion.dataHash.mismatch"}


def test_changed_metadata_is_found(signer: ImageSigner) -> None:
    signed = signer.sign(image_file(picture(), METADATA, FileFormat("png")), "image/png", MODEL)
    assert read(signed.replace(b"quiet", b"loud!"), "png")["validation_state"] == "Invalid"


@pytest.mark.parametrize(
    "key",
    [
        p256(),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "p521", "ed25519", "rsa"],
)
def test_every_kind_of_key_that_c2pa_has_signs(key: Any, tmp_path: Path) -> None:
    # As openssl's older commands write it, where there is such a form.
    form = PrivateFormat.PKCS8 if isinstance(key, ed25519.Ed25519PrivateKey) else PrivateFormat.TraditionalOpenSSL
    leaf_alone = certificates_pem([AUTHORITY.issue(key)])
    signer = open_or_fail(signing_files(tmp_path, leaf_alone, key_pem(key, form)))
    manifest_of(signer.sign(image_file(picture(), {}, FileFormat("png")), "image/png", {}), "png")


@pytest.mark.parametrize("usage", ["1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1", "1.3.6.1.4.1.311.76.59.1.9"])
def test_certificates_for_documents_and_for_c2pa_itself_sign_too(usage: str, tmp_path: Path) -> None:
    key = p256()
    certificate = AUTHORITY.issue(key, usage=x509.ObjectIdentifier(usage))
    signer = open_or_fail(signing_files(tmp_path, certificates_pem([certificate]), key_pem(key)))
    signed = signer.sign(image_file(picture(), {}, FileFormat("png")), "image/png", {})
    with Reader(
        "image/png", io.BytesIO(signed), context=Context.from_dict({"trust": {"trust_config": usage}})
    ) as reader:
        assert reader.get_validation_state() == "Valid"


def test_the_trial_finds_what_a_reader_would(tmp_path: Path) -> None:
    found = read_credentials(signing_settings(tmp_path, AUTHORITY))
    assert signing._tried(found, None)[1] == ""
    signer, faults = signing._tried(replace(found, key=key_pem(p256())), None)
    assert signer is None
    assert "signature" in faults


class Spoiled:
    """Files with something wrong: each is made into a folder, and what the refusal says, field first."""

    def __init__(self, folder: Path) -> None:
        self.key, self.folder = p256(), folder
        self.chain = [AUTHORITY.issue(self.key), AUTHORITY.root()]

    def files(self, *chain: x509.Certificate, key: bytes | None = None, text: bytes | None = None) -> SigningSettings:
        certificates = certificates_pem(chain or self.chain) if text is None else text
        return signing_files(self.folder, certificates, key_pem(self.key) if key is None else key)

    def issued(self, days: tuple[float, float] = (-1, 365), **options: Any) -> SigningSettings:
        return self.files(AUTHORITY.issue(self.key, days, **options), AUTHORITY.root())

    def missing(self, name: str) -> SigningSettings:
        settings = self.files()
        getattr(settings, name).unlink()
        return settings

    def of(self, key: Any) -> SigningSettings:
        return self.files(AUTHORITY.issue(key), key=key_pem(key))


CERTIFICATES, KEY = r"^signing\.certificates: \S+/chain\.pem", r"^signing\.key: \S+/signer\.key"


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda s: s.missing("certificates"), CERTIFICATES + r" cannot be read \(No such file.*name a PEM file"),
        (lambda s: s.missing("key"), KEY + r" cannot be read \(No such file.*name a PEM file"),
        (lambda s: s.files(text=b"no certificate"), CERTIFICATES + " holds no certificates in PEM: write the signer's"),
        (lambda s: s.files(text=b"\xff\x00"), CERTIFICATES + " holds no certificates in PEM"),
        (lambda s: s.files(key=b"no key"), KEY + " holds no private key in PEM: that begins with"),
        (lambda s: s.files(key=b""), KEY + " holds no private key in PEM"),
        (lambda s: s.files(key=key_pem(s.key)[:-60]), KEY + " holds no private key in PEM"),
        (lambda s: s.files(key=certificates_pem(s.chain)), KEY + " holds no private key in PEM"),
        (lambda s: s.files(key=key_pem(s.key, encryption=PASSWORD)), KEY + " is encrypted: decrypt it"),
        (lambda s: s.files(key=key_pem(p256())), KEY + " is not the key of the first certificate in .*: give the key"),
        (lambda s: s.files(*reversed(s.chain)), KEY + " is not the key of .* put the signer's own certificate first"),
        (lambda s: s.issued((-20, -1)), CERTIFICATES + r": the certificate of CN=Studio,\S+ expired on \d.*: renew it"),
        (lambda s: s.issued((1, 20)), CERTIFICATES + ": the certificate of CN=Studio.* is valid from .* on: wait, or"),
        (
            lambda s: s.files(s.chain[0], Authority.make("Another").root()),
            CERTIFICATES + ": the certificate of CN=Studio.* was not issued by the one behind it: write",
        ),
        (
            lambda s: s.files(s.chain[0], Authority.make().root()),  # of the same name, and not the same
            CERTIFICATES + ": the certificate of CN=Studio.* was not issued by the one behind it: write",
        ),
        (
            lambda s: s.files(Authority("Studio", s.key).issue(s.key)),
            CERTIFICATES + ": the first certificate signs itself, .*: have an authority issue one",
        ),
        (
            lambda s: s.issued(usage=ExtendedKeyUsageOID.SERVER_AUTH),
            CERTIFICATES + r" does not sign images as C2PA wants it \(.*\): take .* emailProtection",
        ),
        (lambda s: s.of(ec.generate_private_key(ec.SECP256K1())), KEY + " is of a kind .*: take an elliptic curve"),
        (lambda s: s.of(rsa.generate_private_key(65537, 1024)), KEY + " is of a kind .* RSA of at least 2048 bits"),
    ],
)
def test_what_cannot_sign_is_refused_at_the_start(
    spoil: Callable[[Spoiled], SigningSettings], refusal: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = spoil(Spoiled(tmp_path))
    with caplog.at_level(logging.DEBUG), pytest.raises(SpecError, match=refusal) as refused:
        open_signer(settings)
    assert "\n" not in str(refused.value)
    secret = settings.key.read_text(errors="replace").splitlines()[1:-1] if settings.key.exists() else []
    assert not [line for line in secret if line in f"{refused.value!r} {caplog.text} {settings!r}"]


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^signing\.certificates: .* cannot be read \(Is a directory\)"):
        open_signer(SigningSettings(certificates=tmp_path, key=tmp_path))


@pytest.mark.parametrize(("given", "lacking"), [("certificates", "key"), ("key", "certificates")])
def test_both_files_or_neither(given: str, lacking: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ServeSettings.model_validate({"signing": {given: "file.pem"}})
    assert bad_settings(refused.value, "settings") == [f"signing.{lacking}: Field required"]
    assert open_signer(ServeSettings().signing) is None


@pytest.mark.parametrize("package", ["c2pa", "cryptography"])
def test_without_the_extra_the_error_says_which(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = signing_settings(tmp_path, AUTHORITY)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"^signing images needs {package}.*'cat-cluster\[c2pa\]'"):
        open_signer(settings)


def test_a_certificate_that_expires_later_signs_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = p256()
    soon = certificates_pem([AUTHORITY.issue(key, (-1, 10))])
    with caplog.at_level(logging.INFO):
        signer = open_or_fail(signing_files(tmp_path, soon, key_pem(key)))
        open_or_fail(signing_settings(tmp_path, AUTHORITY))
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert f"until {signer.expires:%Y-%m-%d}" in caplog.records[0].getMessage()
    signer.check_valid()
    monkeypatch.setattr(signing, "_now", lambda: signer.expires - timedelta(seconds=1))
    signer.check_valid()
    monkeypatch.setattr(signing, "_now", lambda: signer.expires)
    with pytest.raises(ServingError, match=r"the certificate of CN=Studio.* expired on .* renew the files"):
        signer.check_valid()
    plain = image_file(picture(), METADATA, FileFormat("png"))
    with pytest.raises(ServingError, match=r"the certificate of CN=Studio.* expired on"):  # a call that had begun
        signer.sign(plain, "image/png", MODEL)


def test_a_running_service_logs_once_that_its_certificate_expires_soon_and_once_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    signer = open_or_fail(signing_settings(tmp_path, AUTHORITY, days=(-1, 100)))
    caplog.clear()  # what it logs as it opens
    with caplog.at_level(logging.INFO):
        for days in (60, 31, 30, 29, 5, 1, 0, -1, -50):
            left = timedelta(days=days)
            monkeypatch.setattr(signing, "_now", lambda left=left: signer.expires - left)
            signer.tell_expiry()
            if days == 30:
                assert not caplog.records
    day = f"{signer.expires:%Y-%m-%d}"
    soon, ended = caplog.records
    assert soon.levelname == "WARNING"
    assert f" expires on {day}: renew it" in soon.getMessage()
    assert ended.levelname == "ERROR"
    assert f"expired on {day}; the operator of this service has to renew the files" in ended.getMessage()


def test_the_root_that_ends_first_counts(tmp_path: Path) -> None:
    key, root = p256(), AUTHORITY.root()
    leaf = AUTHORITY.issue(key, (-1, 5000))
    signer = open_or_fail(signing_files(tmp_path, certificates_pem([leaf, root]), key_pem(key)))
    assert signer.expires == root.not_valid_after_utc


@pytest.mark.slow
def test_a_time_stamp_keeps_an_image_valid_when_its_certificate_has_expired(tmp_path: Path) -> None:
    key = p256()
    expires_soon = certificates_pem([AUTHORITY.issue(key, (-1, 4 / 86_400))])
    files = signing_files(tmp_path, expires_soon, key_pem(key))
    plain = image_file(picture(), METADATA, FileFormat("png"))
    unstamped = open_or_fail(files).sign(plain, "image/png", MODEL)
    with time_authority(tmp_path, AUTHORITY) as authority:
        signer = open_or_fail(files.model_copy(update={"time_stamps": authority.url}))
        stamped = signer.sign(plain, "image/png", MODEL)
        assert len(authority.asked) == 2  # the trial, and the image
    assert read(unstamped, "png")["validation_state"] == read(stamped, "png")["validation_state"] == "Trusted"
    time.sleep(5)
    assert read(unstamped, "png")["validation_state"] == "Invalid"
    assert manifest_of(stamped, "png")["signature_info"]["time"]


@pytest.mark.slow
def test_without_the_time_stamp_that_was_asked_for_nothing_is_signed(tmp_path: Path) -> None:
    files = signing_settings(tmp_path, AUTHORITY)
    with time_authority(tmp_path, AUTHORITY) as authority:
        stamping = files.model_copy(update={"time_stamps": authority.url})
        signer = open_or_fail(stamping)
        authority.away = True
        with pytest.raises(ServingError, match=r"could not be signed: .*503"):
            signer.sign(image_file(picture(), {}, FileFormat("webp")), "image/webp", MODEL)
        with pytest.raises(SpecError, match=r"^signing\.time_stamps: http://\S+ gives no time stamps .*: name an"):
            open_signer(stamping)
    with pytest.raises(SpecError, match=r"^signing\.time_stamps: http://\S+ gives no time stamps"):
        open_signer(stamping)


@pytest.mark.parametrize("address", ["", "tsa.example", "ftp://tsa.example", "http://", "https://a b"])
def test_what_is_no_address_of_a_time_authority_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="time_stamps"):
        SigningSettings(certificates="chain.pem", key="signer.key", time_stamps=address)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> BaseModel:
    return load_base_model(str(tiny_base_folder))


def test_the_codec_signs_images_side_by_side_and_no_previews(base: BaseModel, signer: ImageSigner) -> None:
    codec = Codec(base, signer=signer)
    try:
        files = [codec.file(picture(n / 100), METADATA, FileFormat(KINDS[n % 3])) for n in range(24)]
        for n, file in enumerate(files):
            manifest = manifest_of(file.result(SOON), KINDS[n % 3])
            said = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
            assert said["cat-cluster.model"] == {
                "model": "cup@r-0123456789ab",
                "adapter_sha256": "d" * 64,
                "base": base.name,
                "base_fingerprint": base.fingerprint,
            }
        for kind in KINDS:
            preview = codec.preview(torch.zeros(4, 8, 8), FileFormat(kind)).result(SOON)
            assert said_in_xmp(xmp_of(preview)) == DRAWN
            with pytest.raises(C2paError):
                read(preview, kind)
    finally:
        codec.close()
