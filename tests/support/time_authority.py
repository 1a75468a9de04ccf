"""A time-stamping authority (RFC 3161) on loopback: openssl behind an HTTP server."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.support.authority import Authority, certificates_pem, key_pem, p256

_CONFIG = """
[tsa]
default_tsa = here
[here]
serial = {folder}/serial
signer_cert = {folder}/tsa.pem
certs = {folder}/root.pem
signer_key = {folder}/tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
ess_cert_id_alg = sha256
"""


@dataclass
class TimeAuthority:
    """Where it is; `away` lets it answer 503."""

    url: str
    away: bool = False
    asked: list[int] = field(default_factory=list)


@contextmanager
def time_authority(folder: Path, authority: Authority) -> Iterator[TimeAuthority]:
    key = p256()
    certificate = authority.issue(key, usage=ExtendedKeyUsageOID.TIME_STAMPING, critical=True)
    (folder / "tsa.pem").write_bytes(certificates_pem([certificate]))
    (folder / "root.pem").write_bytes(certificates_pem([authority.root()]))
    (folder / "tsa.key").write_bytes(key_pem(key))
    (folder / "serial").write_text("01")
    (folder / "tsa.cnf").write_text(_CONFIG.format(folder=folder))
    lock = threading.Lock()  # openssl counts in a file

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["content-length"]))
            here.asked.append(len(query))
            if here.away:
                self.send_error(503)
                return
            with lock:
                (folder / "query.tsq").write_bytes(query)
                command = ["openssl", "ts", "-reply", "-config", str(folder / "tsa.cnf"), "-queryfile"]
                command += [str(folder / "query.tsq"), "-out", str(folder / "reply.tsr")]
                subprocess.run(command, check=True, capture_output=True)
                reply = (folder / "reply.tsr").read_bytes()
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are counted, not written."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = TimeAuthority(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
