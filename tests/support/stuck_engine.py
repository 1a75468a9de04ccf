"""An engine whose steps can be made to hang, for tests of what becomes of it."""

from __future__ import annotations

import os
import time
from typing import Any

from serve import app


class StuckEngine(app.EngineReplica):
    """A replica that gets stuck when told."""

    async def stick(self, pid: int) -> None:
        """Let every step from now on hang, if this is the process."""
        if os.getpid() == pid:
            running: Any = self._service._parts.engine._running_images
            running.step = lambda *_, **__: time.sleep(3600)
