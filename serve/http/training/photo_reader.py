"""The process that reads what strangers send: `python -m serve.http.training.photo_reader`, a line of JSON each way.

Nothing else runs in it, its memory is bounded, and whoever started it ends it when a file takes too long. It ends by
itself at the end of its input, and when nobody has asked for anything for a while.
"""

from __future__ import annotations

import json
import resource
import select
import sys
import tempfile
from pathlib import Path
from typing import Any

from cat_cluster.data.photo_upload import UploadLimits, check_upload
from cat_cluster.data.s3_photos import pack_images
from cat_cluster.errors import CatClusterError, ConceptError, StoreError
from cat_cluster.runs.entering import image_digests_of
from cat_cluster.spec.job import JobSpec

MOST_MEMORY = 8 * 2**30  # bytes of address space; numpy takes some for each thread it might use
IDLE_SECONDS = 300.0


def main() -> None:
    """Answer requests until there are no more."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    soft = MOST_MEMORY if most == resource.RLIM_INFINITY else min(MOST_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (soft, most))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a decoder that prints must not be taken for an answer
    while select.select([requests], [], [], IDLE_SECONDS)[0] and (line := requests.readline()):
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what a request asks for as `found`, or why not: `refused`, `too_large`, or `away`, of a store."""
    try:
        found = _checked(asked) if asked["do"] == "check" else _digests(asked)
    except ConceptError as error:
        cause = error.__cause__
        if isinstance(cause, StoreError) and not cause.permanent:
            return {"away": str(cause)}
        return {"refused": str(error)}
    except CatClusterError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"too_large": "needs more memory than there is for it; send fewer or smaller photos"}
    return {"found": found}


def _checked(asked: dict[str, Any]) -> dict[str, Any]:
    """Check an upload, and write the archive to store of it beside it."""
    file, limits = Path(asked["file"]), UploadLimits(**asked["limits"])
    folder = file.with_name("checked")
    folder.mkdir()
    held = check_upload(file, asked["name"], folder, limits)
    file.with_name("archive").write_bytes(pack_images(folder))
    return {
        "photos": held.photos,
        "masks": held.masks,
        "captions": held.captions,
    }


def _digests(asked: dict[str, Any]) -> list[list[str]]:
    """Read a job's photos as training will."""
    job = JobSpec.model_validate_json(asked["job"])
    with tempfile.TemporaryDirectory(prefix="cat-cluster-") as folder:
        try:
            return image_digests_of(job, Path(folder))
        except ConceptError as error:
            raise ConceptError(str(error).replace(f"{folder}/inputs/", "")) from error.__cause__


if __name__ == "__main__":
    main()
