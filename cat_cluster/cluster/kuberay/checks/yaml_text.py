"""YAML as Kubernetes reads it, and text that Kubernetes, YAML 1.1 and YAML 1.2 read alike.

Kubernetes' parser (sigs.k8s.io/yaml, from Go's yaml.v2) is one of its own: `y` and `n` are booleans, as in YAML 1.1,
`08`, `1e3` and `0o17` are numbers, and times are text.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

TAG = "tag:yaml.org,2002:"
WIDTH = 120
# What a plain scalar is that begins with one of the characters; the patterns are tried in turn.
_BOOL = (
    f"{TAG}bool",
    re.compile(r"y|Y|yes|Yes|YES|true|True|TRUE|on|On|ON|n|N|no|No|NO|false|False|FALSE|off|Off|OFF"),
)
_NULL = (f"{TAG}null", re.compile(r"~|null|Null|NULL|"))
_NAMED_FLOAT = (f"{TAG}float", re.compile(r"\.nan|\.NaN|\.NAN|[-+]?\.(inf|Inf|INF)"))
# Underscores are taken out before a number is read, but not before one that begins with a point.
_POINT = (f"{TAG}float", re.compile(r"\.[0-9](_?[0-9])*([eE][-+]?[0-9](_?[0-9])*)?"))
_INT = (f"{TAG}int", re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|0[oO]?[0-7]+|0[bB][01]+|[1-9][0-9]*|0)"))
_FLOAT = (f"{TAG}float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"))
_KINDS = {
    **dict.fromkeys("yYtTfFoO", (_BOOL,)),
    **dict.fromkeys("nN", (_BOOL, _NULL)),
    **dict.fromkeys(("~", ""), (_NULL,)),
    ".": (_NAMED_FLOAT, _POINT),
    **dict.fromkeys("+-", (_NAMED_FLOAT, _INT, _FLOAT)),
    **dict.fromkeys("0123456789", (_INT, _FLOAT)),
}


def plain_tag(text: str) -> str:
    """Return the tag that Kubernetes gives a scalar without quotes: that of text, bool, null, int, float or merge."""
    tag = _form(text)
    # What overflows is left as text.
    is_text = tag == f"{TAG}float" and text[-1].isdigit() and math.isinf(float(text.replace("_", "")))
    return f"{TAG}str" if is_text else tag


def dump(value: Any) -> str:
    """Return a value as YAML for people: texts of several lines as they are, nothing by reference.

    Each text stands in quotes that some parser would read as something else.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    return text


def _form(text: str) -> str:
    """Return the tag of what a plain scalar looks like."""
    if text == "<<":
        return f"{TAG}merge"
    for tag, pattern in _KINDS.get(text[:1], ()):
        if pattern.fullmatch(text.replace("_", "") if pattern in (_INT[1], _FLOAT[1]) else text):
            return tag
    return f"{TAG}str"


class _Dumper(yaml.CSafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _text(dumper: yaml.CSafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if _form(text) == f"{TAG}str" else "'"
    return dumper.represent_scalar(f"{TAG}str", text, style=style)


_Dumper.add_representer(str, _text)
