"""Times at which a RayCronJob starts its job, as KubeRay reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SHORTHANDS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, Mapping[str, int]], ...] = (  # name, least, most, names of values
    ("minute", 0, 59, {}),
    ("hour", 0, 23, {}),
    ("day of the month", 1, 31, {}),
    ("month", 1, 12, {name: number for number, name in enumerate(_MONTHS, 1)}),
    ("day of the week", 0, 6, {name: number for number, name in enumerate(_DAYS)}),
)


def schedule_problem(schedule: str) -> str | None:
    """Return what is wrong with a schedule as the operator reads it (robfig/cron, ParseStandard), None if nothing."""
    if schedule in _SHORTHANDS or re.fullmatch(r"@every (\d+(\.\d+)?(h|m|s|ms))+", schedule):
        return None
    parts = schedule.split()
    if len(parts) != len(_FIELDS):
        return f"must have {len(_FIELDS)} fields, as in '0 3 * * *', or be one of {', '.join(_SHORTHANDS)}"
    for part, (name, least, most, names) in zip(parts, _FIELDS, strict=True):
        for entry in part.split(","):
            if not _fits(entry, least, most, names):
                return f"{entry!r} is no {name}: {least} to {most}, *, a range such as 1-5, or steps such as */15"
    return None


def _fits(entry: str, least: int, most: int, names: Mapping[str, int]) -> bool:
    found = re.fullmatch(r"(?:[*?]|(\w+)(?:-(\w+))?)(?:/(\d+))?", entry)
    if found is None or (found[3] is not None and int(found[3]) < 1):
        return False
    ends = [names.get(text.lower(), int(text) if text.isdecimal() else -1) for text in found.groups()[:2] if text]
    return all(least <= end <= most for end in ends) and ends == sorted(ends)
