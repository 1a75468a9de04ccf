"""The service in one process: from a call to its events, on a real registry of random adapters."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from cat_cluster.errors import SpecError
from cat_cluster.lora.formats import write_adapter
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.pipeline.published_adapters import DrawRequest, draw_images
from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.spec.job import ConceptSpec, ResolvedAdapter
from cat_cluster.spec.sections import EvaluationSpec, TrainingSpec
from cat_cluster.store import LocalStore
from cat_cluster.telemetry import SERVING_METRICS, Metrics, PrometheusBackend
from serve.calls import Accepted, Event, Failed, Finished, ImageCall, Preview, Progress
from serve.denoise.rows import Rows
from serve.service import Service
from serve.settings import ProbeSettings, ServeSettings
from tests.support.denoised_images import random_adapter
from tests.support.engines import wait_until

LEVELS = 1  # of 255: PNGs are 8-bit, so a pixel may round to the neighbouring level
CUP = ImageCall("request-1", "a photo of a sks cup", "cup", seed=11, steps=4)
Pixels = NDArray[np.int16]


@dataclass
class Shop:
    """A base folder and a registry of adapters for it."""

    folder: Path
    base: BaseModel
    registry: Registry

    def publish(self, adapter_id: str, seed: int, **changes: Any) -> Manifest:
        weights = random_adapter(self.base, seed)
        factor = changes.pop("factor", 1.0)
        for layer in weights.layers.values():
            layer.up.mul_(factor)
        resolved = ResolvedAdapter(
            id=adapter_id,
            base=str(self.folder),
            method="cat",
            concepts=(ConceptSpec(token="sks", class_noun="cup", images="photos"),),
            training=TrainingSpec(rank=3, seed=seed),
            evaluation=EvaluationSpec(),
        )
        fields: dict[str, Any] = {
            "adapter_id": adapter_id,
            "resolved": resolved,
            "base_name": str(self.folder),
            "base_fingerprint": self.base.fingerprint,
            "image_digests": ["1" * 64],
            "weights": weights,
            "training": {},
        }
        return self.registry.publish(AdapterDraft(**{**fields, **changes}))


@pytest.fixture(scope="module")
def shop(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    storage = tmp_path_factory.mktemp("storage")
    shop = Shop(tiny_base_folder, load_base_model(str(tiny_base_folder)), Registry(LocalStore(storage)))
    for seed, name in enumerate(("cup", "mug", "jar"), 1):
        shop.publish(name, seed)
    shop.publish("foreign", 1, base_fingerprint="f" * 64)
    shop.publish("wild", 5, factor=1e30)
    return shop


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    mine = ("cat-", "adapter-")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(mine)])


@asynccontextmanager
async def open_service(shop: Shop, **settings: Any) -> AsyncIterator[Service]:
    chosen = {"max_rows": 8, "slots": 2, "max_rank": 4, "probes": ProbeSettings(enabled=False), **settings}
    storage = shop.registry.store.url
    document = ServeSettings(base=str(shop.folder), storage=storage, device="cpu", threads=1, **chosen)
    backend = PrometheusBackend()
    service = Service.open(document, Metrics(backend, SERVING_METRICS))
    service.exposition = backend.exposition
    async with service:
        yield service
        await until(lambda: leased(service) == 0 and service._in_flight == 0, service)


async def until(condition: Callable[[], bool], what: object = None) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def leased(service: Service) -> int:
    return sum(slot["leases"] for slot in service._parts.cache.status()["held"])


async def events(service: Service, call: ImageCall) -> list[Event]:
    async with asyncio.timeout(60):
        return [event async for event in service.generate(call)]


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await main()

    asyncio.run(whole())


def pixels(png: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


def pictures(found: list[Event]) -> list[Pixels]:
    assert not [event for event in found if isinstance(event, Failed)], found
    finished = sorted((event for event in found if isinstance(event, Finished)), key=lambda event: event.index)
    return [pixels(event.png) for event in finished]


def failure_of(found: list[Event]) -> Failed:
    assert isinstance(found[-1], Failed), found
    assert not [event for event in found if isinstance(event, Finished)]
    return found[-1]


# -- what comes back -----------------------------------------------------------------------------------------------


def test_the_events_of_a_call_are_in_order(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            found = await events(service, replace(CUP, count=2, previews=2, progress=True))
            manifest = shop.registry.resolve("cup")
            assert found[0] == Accepted(manifest.name)
            assert {type(event) for event in found[1:]} == {Progress, Preview, Finished}
            for index in range(2):
                own = [event for event in found[1:] if event.index == index]  # type: ignore[union-attr]
                assert isinstance(own[-1], Finished)
                assert own[-1].seed == CUP.seed + index
                assert [e.step for e in own if isinstance(e, Progress)] == [1, 2, 3, 4]
                shown = [(e.number, e.step, e.steps) for e in own if isinstance(e, Preview)]
                assert shown == [(0, 1, 4), (1, 3, 4)]
                assert all(pixels(e.png).shape == (192, 192, 3) for e in own if isinstance(e, Preview))
                assert own[-1].facts["most_rows"] == 4
            text = (await service.metrics()).decode()
            assert 'cat_serve_images_total{outcome="done"} 2.0' in text

    run(main)


def test_a_png_says_how_it_was_made(shop: Shop) -> None:
    call = replace(CUP, prompt="a caf\u00e9 cup", negative_prompt="red", strength=0.5, sampler="euler")

    async def main() -> None:
        async with open_service(shop) as service:
            [finished] = [e for e in await events(service, call) if isinstance(e, Finished)]
            manifest = shop.registry.resolve("cup")
            digest = manifest.objects["weights"].sha256
            text = Image.open(io.BytesIO(finished.png)).text  # type: ignore[attr-defined]
            parameters = text.pop("parameters").splitlines()
            assert text == {
                "prompt": "a caf\u00e9 cup",
                "negative_prompt": "red",
                "seed": "11",
                "steps": "4",
                "guidance": "4.0",
                "sampler": "euler",
                "strength": "0.5",
                "model": manifest.name,
                "request_id": "request-1",
                "adapter_sha256": digest,
            }
            assert parameters[:2] == ["a caf\u00e9 cup", "Negative prompt: red"]
            assert parameters[2].startswith("Steps: 4, Sampler: euler, CFG scale: 4, Seed: 11, Model: cup@")
            assert f"{manifest.name}: {digest[:12]}" in parameters[2]

    run(main)


def test_images_are_those_of_the_command_line_and_of_stock_diffusers(shop: Shop, tmp_path: Path) -> None:
    """Concurrent calls of several adapters, strengths and samplers, against one image at a time by other code."""

    class Nobody:
        def images(self, adapter_id: str, done: int, total: int) -> None: ...

    calls = [
        replace(CUP, count=2),
        replace(CUP, model="mug", strength=0.5, sampler="dpmpp_2m"),
        replace(CUP, model="jar", guidance=1.0, steps=6),
        replace(CUP, model=None, sampler="euler"),
        replace(CUP, model="mug", size=(24, 16), negative_prompt="red"),
    ]

    async def main() -> list[list[Event]]:
        async with open_service(shop) as service:
            return await asyncio.gather(*(events(service, call) for call in calls))

    answers = asyncio.run(main())
    for call, answer in zip(calls[:4], answers, strict=False):
        request = DrawRequest(
            call.prompt, call.model, str(shop.folder), call.seed, call.steps, call.guidance, call.sampler,
            call.strength, call.count,
        )  # fmt: skip
        paths = draw_images(request, tmp_path / "image.png", shop.registry, "cpu", Nobody())
        for ours, path in zip(pictures(answer), paths, strict=True):
            assert np.abs(ours - pixels(path.read_bytes())).max() <= LEVELS
    pipeline = StableDiffusionPipeline.from_pretrained(shop.folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    for call, answer in ((calls[0], answers[0]), (calls[4], answers[4])):
        weights = shop.registry.load_weights(shop.registry.resolve(call.model or ""))
        write_adapter(weights, tmp_path / str(call.model), "diffusers", adapter_id="test", metadata={})
        pipeline.load_lora_weights(tmp_path / str(call.model), weight_name="pytorch_lora_weights.safetensors")
        width, height = call.size or (16, 16)
        for index, ours in enumerate(pictures(answer)):
            theirs = pipeline(
                call.prompt,
                negative_prompt=call.negative_prompt,
                width=width,
                height=height,
                num_inference_steps=call.steps,
                guidance_scale=call.guidance,
                generator=torch.Generator("cpu").manual_seed(call.seed + index),
            ).images[0]
            assert np.abs(ours - np.asarray(theirs, dtype=np.int16)).max() <= LEVELS
        pipeline.unload_lora_weights()
    moved = np.abs(pictures(answers[0])[0] - pictures(answers[1])[0]).max()
    assert moved > 5 * LEVELS, "the adapters do nothing, so nothing was compared"


def test_more_adapters_than_slots_take_turns(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, slots=1) as service:
            calls = [replace(CUP, model=model, seed=seed) for seed in range(4) for model in ("cup", "mug", "jar")]
            for answer in await asyncio.gather(*(events(service, call) for call in calls)):
                assert len(pictures(answer)) == 1

    run(main)


# -- errors --------------------------------------------------------------------------------------------------------


def test_errors_end_a_call_and_only_that(shop: Shop) -> None:
    bad = {
        "AdapterNotFoundError": replace(CUP, model="nobody"),
        "RegistryError": replace(CUP, model="Not A Name"),
        "AdapterMismatchError": replace(CUP, model="foreign"),
        "ServingError": replace(CUP, model="wild"),
        "SpecError": replace(CUP, size=(17, 16)),
        "OverloadedError": replace(CUP, count=10_000),
        "DeadlineError": replace(CUP, steps=100, deadline_s=0.001),
    }

    async def main() -> None:
        async with open_service(shop) as service:
            good, *answers = await asyncio.gather(
                events(service, CUP), *(events(service, call) for call in bad.values())
            )
            assert len(pictures(good)) == 1
            assert [failure_of(answer).kind for answer in answers] == list(bad)
            assert "not finite" in failure_of(answers[3]).message
            assert failure_of(answers[5]).retry_after == 1.0
            for steps in (0, 101):
                assert "num_inference_steps" in failure_of(await events(service, replace(CUP, steps=steps))).message
            assert failure_of(await events(service, replace(CUP, sampler="heun"))).kind == "SpecError"  # type: ignore[arg-type]
            assert failure_of(await events(service, replace(CUP, seed=2**64))).kind == "ServingError"

    run(main)


def test_a_damaged_adapter_is_named(shop: Shop) -> None:
    manifest = shop.publish("damaged", 9)
    path = Path(shop.registry.store.url.removeprefix("file://")) / manifest.objects["weights"].key
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    async def main() -> None:
        async with open_service(shop) as service:
            found = failure_of(await events(service, replace(CUP, model="damaged")))
            assert found.kind in ("AdapterFormatError", "RegistryError")
            assert "damaged" in found.message

    run(main)


def test_settings_that_do_not_fit_leave_no_thread(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, sizes=("17x16",)):
            pass

    with pytest.raises(SpecError, match="multiple of"):
        run(main)


def test_a_service_that_cannot_warm_up_leaves_no_thread(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with open_service(shop):
            pass

    monkeypatch.setattr(Rows, "step", lambda rows: 1 / 0)
    with pytest.raises(Exception, match="cannot be computed"):
        run(main)


# -- going away ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [Accepted, Progress, Preview])
def test_closing_the_iterator_cancels(shop: Shop, after: type[Event]) -> None:
    async def main() -> None:
        async with open_service(shop, max_steps=1000) as service:
            async with aclosing(service.generate(replace(CUP, steps=900, previews=9, progress=True))) as stream:
                async for event in stream:
                    if isinstance(event, after):
                        break
                else:
                    pytest.fail("it ended by itself")
            await until(lambda: service._parts.engine.active == 0)
            assert service._in_flight == 0

    run(main)


def test_a_call_that_waits_for_a_slot_is_cancelled_without_a_trace(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, slots=1) as service:
            cache = service._parts.cache
            held = await asyncio.wrap_future(cache.lease(shop.registry.resolve("cup")))
            waiting = [asyncio.create_task(events(service, replace(CUP, model="mug", count=2))) for _ in range(3)]
            late = await events(service, replace(CUP, model="mug", deadline_s=0.2))
            assert failure_of(late).kind == "DeadlineError"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert service._in_flight == 0
            held.release()
            assert len(pictures(await events(service, replace(CUP, model="mug")))) == 1

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_calls_cancelled_at_any_moment_leave_no_lease(shop: Shop, seed: int) -> None:
    """Also between the grant of a lease on the cache's thread and the moment the event loop hears of it."""
    rng = np.random.default_rng(seed)

    async def main() -> None:
        async with open_service(shop, slots=1) as service:
            for _ in range(25):
                calls = [replace(CUP, model=model, steps=1) for model in ("cup", "mug", "jar")]
                tasks = [asyncio.create_task(events(service, call)) for call in calls]
                await asyncio.sleep(rng.random() * 0.01)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: leased(service) == 0)
            assert len(pictures(await events(service, CUP))) == 1

    run(main)


def test_a_refused_image_gives_its_slot_back(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, max_rows=2, max_waiting=1, slots=1) as service:
            answers = await asyncio.gather(*(events(service, replace(CUP, steps=20, seed=s)) for s in range(2)))
            more = await asyncio.gather(*(events(service, replace(CUP, steps=20, count=2, seed=s)) for s in range(6)))
            kinds = {answer[-1].kind for answer in more if isinstance(answer[-1], Failed)}
            assert kinds == {"OverloadedError"}
            assert len(answers) == 2
            await until(lambda: leased(service) == 0)
            assert len(pictures(await events(service, replace(CUP, model="mug")))) == 1

    run(main)


def test_a_flood_is_counted_while_it_is_looked_up(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, max_rows=2, max_waiting=4) as service:
            answers = await asyncio.gather(*(events(service, replace(CUP, seed=seed)) for seed in range(30)))
            failed = [answer for answer in answers if isinstance(answer[-1], Failed)]
            refused_at_once = [answer for answer in failed if len(answer) == 1]
            assert len(refused_at_once) == 25, "the room is for five"
            assert len(failed) <= 26, "the engine's own queue takes four"

    run(main)


def test_closing_ends_calls_with_an_error(shop: Shop) -> None:
    async def main() -> list[list[Event]]:
        async with open_service(shop, max_steps=1000) as service:
            tasks = [asyncio.create_task(events(service, replace(CUP, steps=900, count=3))) for _ in range(3)]
            await until(lambda: service._parts.engine.active > 0)
            await service.__aexit__()
            answers = await asyncio.gather(*tasks)
            assert failure_of(await events(service, CUP)).kind == "EngineStoppedError"
            return answers

    assert {failure_of(answer).kind for answer in asyncio.run(main())} == {"EngineStoppedError"}


# -- revisions -----------------------------------------------------------------------------------------------------


def test_a_new_revision_goes_live_and_requests_in_flight_keep_theirs(shop: Shop) -> None:
    old = shop.publish("moving", 20)

    async def main() -> None:
        async with open_service(shop, alias_ttl_s=0.05) as service:
            call = replace(CUP, model="moving")
            before = pictures(await events(service, call))[0]
            stream = service.generate(replace(call, steps=60, progress=True))
            first = [await anext(stream), await anext(stream)]
            new = shop.publish("moving", 21)
            await asyncio.sleep(0.06)
            assert (await events(service, call))[0] == Accepted(new.name)
            assert first[0] == Accepted(old.name)
            rest = [event async for event in stream]
            assert isinstance(rest[-1], Finished)
            assert Image.open(io.BytesIO(rest[-1].png)).text["model"] == old.name  # type: ignore[attr-defined]
            named = pictures(await events(service, replace(call, model=old.name)))[0]
            assert np.abs(named - before).max() <= LEVELS
            after = pictures(await events(service, call))[0]
            assert np.abs(after - before).max() > LEVELS

    run(main)


def test_status_and_health(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop) as service:
            await events(service, CUP)
            status = await service.status()
            assert status["sizes"] == ["16x16", "24x16", "16x24"]
            assert status["images"] == {"waiting": 0, "active": 0, "in_flight": 0}
            assert status["stuck_for_s"] < 10
            service.check_health()
        with pytest.raises(Exception, match="must be replaced"):
            service.check_health()

    run(main)
