"""Characters that nobody sees: what may not hold them, and how names of files that do are shown."""

from __future__ import annotations

import re
import unicodedata

CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # within [] of a pattern: category Cc but for tabs and line ends
_CONTROL = re.compile(f"[{CONTROLS}]")


def control_character(text: str) -> str | None:
    """Return the first control character of a text but for tabs and line ends, None if there is none."""
    found = _CONTROL.search(text)
    return None if found is None else found[0]


def unseen_character(word: str) -> str | None:
    """Return the first character of a word that nobody sees or types, such as a zero-width space; None without."""
    return next((one for one in word if unicodedata.category(one).startswith("C")), None)


def shown_name(name: object) -> str:
    r"""Return a file's name or path as people are to see it: as it is, but for what a terminal obeys (as \x1b)."""
    return "".join(
        one if one.isprintable() or unicodedata.category(one) == "Zs" else _escaped(one) for one in str(name)
    )


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]
