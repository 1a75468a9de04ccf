"""The log of a process of the service: lines of JSON on stderr, where whatever runs the process collects them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

_LOGGERS = ("cat_cluster", "serve")  # ours, and no library's


class JsonLines(logging.Formatter):
    """Records as lines of JSON; those of requests, which are JSON already, as they are."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        message = record.getMessage()
        if message.startswith("{"):
            return message
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if record.exc_info:  # some say that there is none by None, some by False
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def write_logs() -> None:
    """Send this process' own records to stderr; a second time does nothing."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if any(isinstance(handler.formatter, JsonLines) for handler in logger.handlers):
            continue
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
