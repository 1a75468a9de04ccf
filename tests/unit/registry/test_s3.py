"""The registry in an S3 bucket behaves as in a folder: published, found, verified, raced for, damaged, deleted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.errors import AdapterFormatError, AdapterNotFoundError
from cat_cluster.registry import AdapterDraft, Registry
from cat_cluster.store import open_store
from cat_cluster.store.s3 import S3Store
from tests.support.counted_stores import count_requests, records_like

MakeDraft = Callable[..., AdapterDraft]


@pytest.fixture
def url(s3_bucket: str) -> str:
    return f"{s3_bucket}/prod"


def test_what_is_published_comes_back_to_another_reader(
    url: str, make_draft: MakeDraft, unet: UNet2DConditionModel
) -> None:
    draft = make_draft()
    published = Registry(open_store(url)).publish(draft)
    registry = Registry(open_store(url))
    manifest = registry.resolve("cup")
    assert manifest == published == registry.resolve(published.name)
    weights = registry.load_weights(manifest, base_fingerprints=[draft.base_fingerprint], unet=unet)
    assert all(torch.equal(layer.up, draft.weights.layers[name].up) for name, layer in weights.layers.items())
    assert registry.verify("cup", base_fingerprints=[draft.base_fingerprint], unet=unet).ok
    with pytest.raises(AdapterNotFoundError, match=url):
        registry.resolve("mug")


def test_of_two_that_publish_one_revision_both_see_the_same_and_no_move_is_lost(
    url: str, make_draft: MakeDraft
) -> None:
    drafts = [make_draft(), make_draft(weights=make_draft(seed=9).weights)]

    def work(draft: AdapterDraft) -> tuple[str, list[int]]:
        registry = Registry(open_store(url))
        manifest = registry.publish(draft)
        moves = [registry.set_alias("cup", "prod", manifest.revision).number for _ in range(6)]
        return manifest.model_dump_json(), moves

    with ThreadPoolExecutor(2) as pool:
        (one, one_moves), (other, other_moves) = pool.map(work, drafts)
    assert one == other
    assert sorted([*one_moves, *other_moves]) == list(range(1, 13))


def test_damaged_weights_are_refused_and_a_revision_can_be_deleted(url: str, make_draft: MakeDraft) -> None:
    registry = Registry(open_store(url))
    manifest = registry.publish(make_draft())
    key = manifest.objects["weights"].key
    registry.store.put(key, registry.store.get(key)[:-1] + b"\0")
    with pytest.raises(AdapterFormatError, match=key):
        registry.read_object(manifest, "weights")
    registry.set_alias("cup", "latest", registry.publish(make_draft(seed=1)).revision)
    registry.delete("cup", manifest.revision)
    assert key not in registry.store.list("")


def test_listing_and_naming_take_requests_for_what_they_show(url: str, make_draft: MakeDraft) -> None:
    store = open_store(url)
    assert isinstance(store, S3Store)
    template = Registry(store).publish(make_draft())
    for number in range(12):
        for key, data in records_like(template, f"mug-{number:02d}").items():
            store.put(key, data)
    registry, requests = Registry(store), count_requests(store)
    page = registry.page(3, after="mug-04")
    assert [one.adapter_id for one in page.adapters] == ["mug-05", "mug-06", "mug-07"]
    assert all(one.latest is not None and not one.damaged for one in page.adapters)
    assert sorted(requests) == ["GetObject"] * 6 + ["ListObjectsV2"] * 2
    requests.clear()
    assert registry.page(3, after="mug-04") == page
    assert requests == ["ListObjectsV2"] * 2
    assert [one.adapter_id for page in registry.pages(5) for one in page.adapters][-1] == "mug-03"
    requests.clear()
    assert registry.look_up("nobody") is None
    assert requests[:1] == ["HeadObject"]
    assert len(requests) <= 2  # the second one sees that the bucket is there
    requests.clear()
    with pytest.raises(AdapterNotFoundError, match=r"did you mean mug-\d\d"):
        registry.resolve("mug-0")
    assert len(requests) <= 5
    requests.clear()
    other = registry.publish(make_draft(seed=1))
    assert other.adapter_id == "cup"
    requests.clear()
    registry.delete("cup", template.revision)
    assert len(requests) <= 30
    assert registry.page(1).adapters[0].latest == other.head
