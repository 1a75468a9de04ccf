"""Calls that fail, are cancelled or come too many at once: they harm no other call, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import logging
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cat_cluster.errors import EvaluationError, SpecError
from serve.calls import Accepted, Edit, Event, Failed, Preview, Progress
from serve.denoise.image import EngineImage
from serve.denoise.rows import ImageRows, Rows
from serve.running_call import RunningCall
from serve.settings import ProbeSettings
from tests.support.services import CUP, Shop, events, failure_of, leased, open_service, pictures, run, stack, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_thread_is_left")]


def test_errors_end_a_call_and_only_that(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {
        "AdapterNotFoundError": replace(CUP, adapters=stack("nobody")),
        "AdapterMismatchError": replace(CUP, adapters=stack("foreign")),
        "NotFiniteError": replace(CUP, adapters=stack("wild")),
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
            assert "not finite" in failure_of(answers[2]).message
            assert failure_of(answers[4]).retry_after == 1.0
            monkeypatch.setattr(service._parts.engine, "expected_wait", lambda: 17.0)
            assert failure_of(await events(service, bad["DeadlineError"])).retry_after == 17.0
            for steps in (0, 101):
                assert "num_inference_steps" in failure_of(await events(service, replace(CUP, steps=steps))).message
            assert failure_of(await events(service, replace(CUP, sampler="heun"))).kind == "SpecError"  # type: ignore[arg-type]
            assert failure_of(await events(service, replace(CUP, seed=2**64))).kind == "ServingError"

    run(main)


def test_the_log_has_what_clients_are_not_told(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Of a fault they get the id alone, by which it is found."""
    wild, fault = (
        replace(CUP, request_id="wild", adapters=stack("wild")),
        replace(CUP, request_id="fault", seed=2**64),
    )

    async def main() -> None:
        async with open_service(shop) as service:
            for call in (wild, fault, replace(CUP, request_id="late", steps=100, deadline_s=0.001)):
                failure_of(await events(service, call))

    run(main)
    told = [line for line in map(logging.LogRecord.getMessage, caplog.records) if ": an image of " in line]
    assert told[0].startswith(f"wild: an image of {shop.registry.resolve('wild').name}: the image is not finite")
    assert told[1].startswith(f"fault: an image of {shop.registry.resolve('cup').name}: the image could not be started")
    assert len(told) == 2


def test_a_damaged_adapter_is_named(shop: Shop) -> None:
    manifest = shop.publish("damaged", 9)
    path = Path(shop.registry.store.url.removeprefix("file://")) / manifest.objects["weights"].key
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")

    async def main() -> None:
        async with open_service(shop) as service:
            found = failure_of(await events(service, replace(CUP, adapters=stack("damaged"))))
            assert found.kind in ("AdapterFormatError", "RegistryError")
            assert "damaged" in found.message

    run(main)


def test_a_probe_that_is_asked_for_and_cannot_be_made_is_an_error(shop: Shop) -> None:
    async def main() -> None:
        async with open_service(shop, probes=ProbeSettings(canonical_every_s=3600.0)) as service:
            with pytest.raises(EvaluationError, match="published unmeasured"):
                await service.admin("probe", "cup")

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
            (held,) = await cache.lease([shop.registry.resolve("cup")])
            waiting = [
                asyncio.create_task(events(service, replace(CUP, adapters=stack("mug"), count=2))) for _ in range(3)
            ]
            late = await events(service, replace(CUP, adapters=stack("mug"), deadline_s=0.2))
            assert failure_of(late).kind == "DeadlineError"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert service._in_flight == 0
            held.release()
            assert len(pictures(await events(service, replace(CUP, adapters=stack("mug"))))) == 1

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_calls_cancelled_at_any_moment_leave_no_lease(shop: Shop, seed: int) -> None:
    """Also between the copy into a slot and the moment that those who wait for it lease it."""
    rng = np.random.default_rng(seed)

    async def main() -> None:
        async with open_service(shop, slots=1) as service:
            for _ in range(25):
                calls = [replace(CUP, adapters=stack(model), steps=1) for model in ("cup", "mug", "jar")]
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
            assert len(pictures(await events(service, replace(CUP, adapters=stack("mug"))))) == 1

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


def test_calls_that_end_leave_nothing_to_the_collector(shop: Shop) -> None:
    """Ray Serve freezes what a replica has: a cycle would hold texts and latents until a full collection, for hours."""
    edit = Edit(bytes(3 * 16 * 16), None, 0.5)
    calls = [
        CUP,
        replace(CUP, count=2, steps=8, previews=2, progress=True),
        replace(CUP, adapters=stack("foreign"), count=2),
        replace(CUP, adapters=stack("wild"), count=2),
        replace(CUP, steps=100, deadline_s=0.05),
        replace(CUP, adapters=stack("nobody")),
        replace(CUP, adapters=stack("cup", "mug:0.5"), count=2),
        replace(CUP, adapters=stack("jar", "foreign"), count=2),
        replace(CUP, adapters=stack("cup", "nobody")),
        replace(CUP, size=(16, 16), count=2, edit=edit),
        replace(CUP, size=(16, 16), steps=100, deadline_s=0.01, edit=edit),
    ]
    kinds = (EngineImage, ImageRows, RunningCall)

    async def main() -> None:
        async with open_service(shop, max_steps=1000, max_rank=6) as service:
            await events(service, CUP)
            gc.collect()
            gc.disable()
            try:
                for call in calls:
                    await events(service, call)
                for after in (Accepted, Progress):
                    async with aclosing(service.generate(replace(CUP, steps=900, count=2, progress=True))) as stream:
                        async for event in stream:
                            if isinstance(event, after):
                                break
                await until(lambda: not [one for one in gc.get_objects() if type(one) in kinds])
            finally:
                gc.enable()

    run(main)
