"""An authority of the tests' own that issues certificates for signing images, and their files."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from serve.settings import SigningSettings

NOTHING = NoEncryption()
PASSWORD = BestAvailableEncryption(b"password")
_DAY = datetime.timedelta(days=1)


def p256() -> Any:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass(frozen=True)
class Authority:
    """A root that issues the certificates of signers; days are counted from now."""

    name: str = "Authority"
    key: Any = None

    @classmethod
    def make(cls, name: str = "Authority") -> Authority:
        return cls(name, p256())

    def root(self) -> x509.Certificate:
        uses = {"key_cert_sign": True, "crl_sign": True}
        return self._sign(self._draft(self.name, self.key, (-1, 1000), authority=True, uses=uses))

    def issue(
        self,
        key: Any,
        days: tuple[float, float] = (-1, 365),
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
        *,
        critical: bool = False,
    ) -> x509.Certificate:
        """A certificate as C2PA wants a signer's; critical: whether its extended usage is."""
        draft = self._draft("Studio", key, days, authority=False, uses={"digital_signature": True})
        return self._sign(draft.add_extension(x509.ExtendedKeyUsage([usage]), critical=critical))

    def _draft(
        self, subject: str, key: Any, days: tuple[float, float], *, authority: bool, uses: dict[str, bool]
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        every = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        every += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
        usage = x509.KeyUsage(**{**dict.fromkeys(every, False), **uses})
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(_name(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * _DAY)
            .not_valid_after(now + days[1] * _DAY)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(issuer_key, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    def _sign(self, draft: x509.CertificateBuilder) -> x509.Certificate:
        return draft.sign(self.key, None if isinstance(self.key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


def _name(common: str) -> x509.Name:
    parts = ((NameOID.COUNTRY_NAME, "DE"), (NameOID.ORGANIZATION_NAME, "Tests"), (NameOID.COMMON_NAME, common))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


def certificates_pem(chain: Sequence[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)


def key_pem(
    key: Any, form: PrivateFormat = PrivateFormat.PKCS8, encryption: KeySerializationEncryption = NOTHING
) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, form, encryption)
    return pem


def signing_files(folder: Path, certificates: bytes, key: bytes) -> SigningSettings:
    """The settings that name these files."""
    settings = SigningSettings(certificates=folder / "chain.pem", key=folder / "signer.key")
    settings.certificates.write_bytes(certificates)
    settings.key.write_bytes(key)
    return settings


def signing_settings(folder: Path, authority: Authority, days: tuple[float, float] = (-1, 365)) -> SigningSettings:
    """A certificate of the authority, the authority's own, and the key, in files."""
    key = p256()
    return signing_files(folder, certificates_pem([authority.issue(key, days), authority.root()]), key_pem(key))
