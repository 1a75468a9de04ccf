"""The operator's certificates and key for signing images: read from their files, and held against each other."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_cluster.errors import SpecError
from serve.settings import SigningSettings

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CERTIFICATES, KEY = "signing.certificates", "signing.key"
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_LEAST_RSA = 2048  # bits (C2PA specification, X.509 certificates)


@dataclass(frozen=True)
class Credentials:
    """What signing takes: C2PA's name of the algorithm, certificates and key in PEM, whom the certificate names.

    expires: when the first certificate of the chain does.
    """

    algorithm: str
    certificates: bytes
    key: bytes = field(repr=False)
    subject: str
    expires: datetime.datetime


def read_credentials(settings: SigningSettings) -> Credentials:
    """Read both files; raises SpecError, which names field, file and remedy and holds nothing of the key."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    chain, key = _read_chain(settings.certificates), _read_key(settings.key)
    algorithm = _algorithm(key, settings.key)
    if chain[0].public_key() != key.public_key():
        raise SpecError(
            f"{KEY}: {settings.key} is not the key of the first certificate in {settings.certificates}: give the key "
            "with which that was requested, and put the signer's own certificate first"
        )
    try:
        _check_chain(chain)
    except SpecError as error:
        raise SpecError(f"{CERTIFICATES}: {settings.certificates}: {error}") from error
    return Credentials(
        algorithm=algorithm,
        certificates=b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        subject=_name(chain[0]),
        expires=min(certificate.not_valid_after_utc for certificate in chain),
    )


def _read(field_name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"{field_name}: {path} cannot be read ({error.strerror}): name a PEM file that this process may read"
        ) from error


def _read_chain(path: Path) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(_read(CERTIFICATES, path))
    except ValueError as error:
        raise SpecError(
            f"{CERTIFICATES}: {path} holds no certificates in PEM: write the signer's own first, then those of the "
            "authorities above it, each from -----BEGIN CERTIFICATE----- on"
        ) from error


def _read_key(path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(_read(KEY, path), None)
    except TypeError:
        reason = "is encrypted: decrypt it (openssl pkey -in FILE -out PLAIN) into a file for the service alone"
    except (ValueError, UnsupportedAlgorithm):
        reason = "holds no private key in PEM: that begins with -----BEGIN PRIVATE KEY-----"
    raise SpecError(f"{KEY}: {path} {reason}")


def _algorithm(key: Any, path: Path) -> str:
    """Return C2PA's name of the signature algorithm that goes with a key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= _LEAST_RSA:
        return "ps256"
    raise SpecError(
        f"{KEY}: {path} is of a kind that C2PA does not sign with: take an elliptic curve (P-256, P-384 or P-521), "
        f"Ed25519, or RSA of at least {_LEAST_RSA} bits"
    )


def _check_chain(chain: Sequence[Certificate]) -> None:
    from cryptography.exceptions import InvalidSignature

    now = datetime.datetime.now(datetime.UTC)
    for certificate in chain:
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now >= last:
            raise SpecError(f"the certificate of {_name(certificate)} expired on {last:%Y-%m-%d}: renew it")
        if now < first:
            raise SpecError(f"the certificate of {_name(certificate)} is valid from {first} on: wait, or set the clock")
    if chain[0].issuer == chain[0].subject:
        raise SpecError("the first certificate signs itself, which C2PA does not accept: have an authority issue one")
    for issued, issuer in pairwise(chain):
        try:
            issued.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise SpecError(
                f"the certificate of {_name(issued)} was not issued by the one behind it: write the signer's own "
                "first, and behind each the one that issued it"
            ) from error


def _name(certificate: Certificate) -> str:
    return certificate.subject.rfc4514_string()
