"""The sizes that an ingress knows: learnt anew after a minute, and kept while no engine tells them."""

from __future__ import annotations

import asyncio

import pytest

from cat_cluster.errors import EngineStoppedError, SpecError
from serve.http.served_sizes import ServedSizes
from tests.support.ingress_server import ScriptedEngine

SIZES = {"sizes": ["16x16", "24x16"]}


def test_known_sizes_are_kept_however_old_and_learnt_anew() -> None:
    now, engine = [0.0], ScriptedEngine(state=SIZES)
    served = ServedSizes(lambda: engine, clock=lambda: now[0])

    async def main() -> None:
        assert await served.choose(None, 1.0) == (16, 16)
        now[0] = 10_000.0
        engine.state = {"engines": 0, "drift": {}}  # asleep
        assert await served.choose((24, 16), 1.0) == (24, 16)
        engine.refusal = EngineStoppedError("no engine responds: try again")  # being replaced
        assert await served.choose(None, 1.0) == (16, 16)
        engine.refusal, engine.state = None, {"sizes": ["32x32"]}
        assert await served.choose(None, 1.0) == (32, 32)
        with pytest.raises(SpecError, match="size: 16x16 is not served; choose one of 32x32"):
            await served.choose((16, 16), 1.0)

    asyncio.run(main())


def test_without_an_engine_in_time_it_is_said() -> None:
    engine = ScriptedEngine(state=SIZES, refusal=EngineStoppedError("no engine is running: try again"))
    served = ServedSizes(lambda: engine)
    for _ in range(2):
        with pytest.raises(EngineStoppedError, match="no engine is running"):
            asyncio.run(served.choose(None, 1.0))
