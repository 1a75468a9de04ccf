"""Job specs that are too large for an object of Kubernetes: kept in the storage, named by their digest."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, SpecError
from cat_cluster.spec.job import JobSpec, load_spec, parse_spec
from cat_cluster.store import ObjectStore, open_store

_ADDRESS = re.compile(r"(?P<storage>\w+://.+)/(?P<key>specs/(?P<digest>[0-9a-f]{64})\.yaml)")


def spec_address(text: str, storage: str) -> str:
    """Return the address that a spec's text has in a storage: `<storage>/specs/<sha256>.yaml`."""
    return f"{storage}/specs/{hashlib.sha256(text.encode()).hexdigest()}.yaml"


def store_spec(text: str, store: ObjectStore) -> str:
    """Store the text of a spec and return its address; raises StoreError. Equal specs are stored once."""
    address = spec_address(text, store.url)
    with suppress(ObjectExistsError):
        store.put(address.removeprefix(f"{store.url}/"), text.encode(), if_absent=True)
    return address


def load_job(place: str) -> JobSpec:
    """Return the job spec of a file or of an address that `spec_address` gave.

    Raises SpecError for a spec that is not there, is not what the address says, or has bad fields; StoreError.
    """
    found = _ADDRESS.fullmatch(place)
    if found is None and "://" in place:
        raise SpecError(f"{place}: is not the address of a stored spec, which ends with /specs/<sha256>.yaml")
    if found is None:
        return load_spec(Path(place))
    try:
        data = open_store(found["storage"]).get(found["key"])
    except ObjectNotFoundError as error:
        raise SpecError(
            f"{place}: the storage has no such spec; store it again with `cat-cluster k8s render SPEC --upload`"
        ) from error
    if hashlib.sha256(data).hexdigest() != found["digest"]:
        raise SpecError(
            f"{place}: is damaged, its content has another digest; remove it, and store it again with "
            "`cat-cluster k8s render SPEC --upload`"
        )
    return parse_spec(data, place)
