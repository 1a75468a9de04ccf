"""Want of memory, where torch or Python meet it, is one sentence with this process's numbers."""

from __future__ import annotations

import pytest
import torch

from cat_cluster.errors import OutOfMemoryError, StoreError
from cat_cluster.models.out_of_memory import memory_explained


def test_what_torch_cannot_have_is_said_with_what_there_is() -> None:
    with pytest.raises(OutOfMemoryError) as told, memory_explained(1):
        torch.empty(2**52, dtype=torch.uint8)
    begin, _, remedy = str(told.value).partition("; ")
    assert begin.startswith("out of memory: 4194304.00 GiB more were asked for, where the process held ")
    assert begin.endswith(" GiB")
    assert " and its machine or pod has " in begin
    assert remedy.startswith("lower training.rows_per_concept, set training.gradient_checkpointing, or give it more")
    assert isinstance(told.value.__cause__, RuntimeError)


def test_the_remedy_knows_of_the_pack() -> None:
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
    for adapters, error, words in (
        (6, gpu, "2.00 GiB more were asked for on a GPU of 8 GiB; lower cluster.max_pack (here 6 trained together) or"),
        (None, MemoryError(), "Python could get no more, where the process held "),
    ):
        with pytest.raises(OutOfMemoryError) as told, memory_explained(adapters):
            raise error
        assert words in str(told.value)
        assert ("cluster.max_pack" in str(told.value)) == (adapters is not None)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), StoreError("away"), OutOfMemoryError("ours")])
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as told, memory_explained(2):
        raise error
    assert told.value is error
