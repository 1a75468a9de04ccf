"""Signing images: a C2PA manifest, signed with the operator's key, that says which model drew an image.

https://spec.c2pa.org has the format. Certificates and key are read and tried once, at the start.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image

from cat_cluster.errors import ServingError, SpecError, needs_extra
from cat_cluster.models.provenance import SOFTWARE, digital_source_type
from cat_cluster.registry.manifest import package_version
from serve.denoise.credentials import CERTIFICATES, KEY, Credentials, read_credentials
from serve.settings import SigningSettings

logger = logging.getLogger("cat_cluster.serve")

MODEL = "cat-cluster.model"  # the label of our own assertion
_SOON = datetime.timedelta(days=30)
# What a signer's certificate may be for: e-mail, documents, C2PA itself, and C2PA by Microsoft's name. The library's
# reader takes the first for granted; whether others count is for each reader to say.
_USAGES = ("1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1", "1.3.6.1.4.1.311.76.59.1.9")
# A thumbnail would cost a hundred times the signature, and hundreds of kilobytes. That signatures can be verified is
# tried at the start, not with each image.
_LIBRARY = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"verify_after_sign": False}}


class ImageSigner:
    """Signs image files; open one with `open_signer`. Any number of threads may sign at once.

    subject: whom the certificate names. expires: when the first certificate of the chain does. The library alone holds
    the key.
    """

    def __init__(self, context: Any, subject: str, expires: datetime.datetime) -> None:
        self._context, self.subject, self.expires = context, subject, expires
        self._told = self._stage  # which the start tells

    @property
    def _stage(self) -> int:
        """0; within the last days 1, and from the day of expiry on 2."""
        left = self.expires - _now()
        return (left < _SOON) + (left <= datetime.timedelta())

    def tell_expiry(self) -> None:
        """Log once that the certificate expires soon, and once that it has."""
        if self._stage <= self._told:
            return
        self._told = self._stage
        try:
            self.check_valid()
        except ServingError as error:
            logger.error("%s", error)
        else:
            logger.warning("the certificate of %s expires on %s: renew it", self.subject, f"{self.expires:%Y-%m-%d}")

    def check_valid(self) -> None:
        """Raise ServingError when the certificate has expired since the start: what it signs now, readers refuse."""
        if _now() >= self.expires:
            raise ServingError(
                f"images cannot be signed: the certificate of {self.subject} expired on {self.expires:%Y-%m-%d}; the "
                f"operator of this service has to renew the files of {CERTIFICATES} and {KEY} and start it again"
            )

    def sign(self, file: bytes, media_type: str, model: Mapping[str, str], *, edited: bool = False) -> bytes:
        """Return an image file with a signed manifest: created by a trained model, of which `model` tells.

        edited: the model edited another image, of which the manifest says no more than that.
        Raises ServingError when it cannot be signed, as with a certificate that has expired, or without the time stamp
        that is asked for: nothing unsigned is served in silence. The library waits at most 30 s for one.
        """
        from c2pa import Builder, C2paError

        self.check_valid()
        software = {"name": SOFTWARE, "version": package_version()}
        source_type = digital_source_type(edited=edited)
        created = {"action": "c2pa.created", "digitalSourceType": source_type, "softwareAgent": software}
        manifest = {
            "claim_generator_info": [software],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [created]}},
                {"label": MODEL, "data": dict(model)},
            ],
        }
        signed = io.BytesIO()
        try:
            with Builder(manifest, context=self._context) as builder:
                builder.sign(media_type, io.BytesIO(file), signed)
        except C2paError as error:
            raise ServingError(f"the image could not be signed: {error}") from error
        return signed.getvalue()


def open_signer(settings: SigningSettings | None) -> ImageSigner | None:
    """Read the certificates and the key, and try them; None without settings.

    Raises SpecError, which names the field, the file and the remedy, for what cannot be read or does not fit, and
    MissingExtraError without the extra `c2pa`.
    """
    if settings is None:
        return None
    with needs_extra("c2pa", "signing images"):
        found = read_credentials(settings)
        signer, faults = _tried(found, None)
    if signer is None:
        raise SpecError(
            f"{CERTIFICATES}: {settings.certificates} does not sign images as C2PA wants it ({faults}): take an X.509 "
            "certificate of version 3 with key usage digitalSignature, extended key usage emailProtection (or "
            "documentSigning, or C2PA's own), authority key identifier and basic constraints CA:FALSE; docs/serving.md "
            "has an example"
        )
    if settings.time_stamps is not None:
        signer, faults = _tried(found, settings.time_stamps)
        if signer is None:
            raise SpecError(
                f"signing.time_stamps: {settings.time_stamps} gives no time stamps ({faults}): name an authority of "
                "RFC 3161 that this machine reaches, or none"
            )
    level = logging.WARNING if found.expires - _now() < _SOON else logging.INFO
    until = f"{found.expires:%Y-%m-%d}"
    logger.log(level, "images are signed as %s until %s, when its certificate expires", found.subject, until)
    return signer


def _tried(found: Credentials, time_stamps: str | None) -> tuple[ImageSigner | None, str]:
    """Sign a picture, read it as anyone would, and return the signer, or None and what is wrong.

    Whom to trust is the reader's own list: that this signer is not on the library's is no fault.
    """
    from c2pa import C2paError, C2paSignerInfo, Context, Reader, Signer

    usages = Context.from_dict({"trust": {"trust_config": "\n".join(_USAGES)}})
    blank = io.BytesIO()
    Image.new("RGB", (8, 8)).save(blank, "PNG")
    try:
        native = Signer.from_info(C2paSignerInfo(found.algorithm, found.certificates, found.key, time_stamps))
        signer = ImageSigner(Context.from_dict(_LIBRARY, signer=native), found.subject, found.expires)
        signed = io.BytesIO(signer.sign(blank.getvalue(), "image/png", {}))
        with Reader("image/png", signed, context=usages) as reader:
            said = json.loads(reader.json())
    except (C2paError, ServingError) as error:
        return None, str(error)
    failures = said["validation_results"]["activeManifest"]["failure"]
    faults = [fault["explanation"] for fault in failures if fault["code"] != "signingCredential.untrusted"]
    return None if faults else signer, "; ".join(faults)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
