"""Text that Kubernetes, YAML 1.1 and YAML 1.2 read alike."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.cluster.kuberay.checks.yaml_text import TAG, dump, plain_tag

# What a parser may take for something else, or for the structure around it.
AMBIGUOUS = st.from_regex(r"[-+]?[.0-9yYnNtfoO~][-+._:0-9a-fA-FxXobeEn~ #]{0,6}", fullmatch=True)
TEXTS = st.one_of(AMBIGUOUS, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_what_is_written_reads_back(value: Any) -> None:
    assert yaml.safe_load(dump({"a": value})) == {"a": value}


@pytest.mark.parametrize(
    "text", ["y", "n", "Y", "08", "1e3", "012345678901", "0o17", "on", "null", "~", "", "1_0", "1:30"]
)
def test_what_some_parser_reads_as_another_type_is_quoted(text: str) -> None:
    assert dump({"name": text}) == f"name: '{text}'\n"
    assert dump({text: 1}) == f"'{text}': 1\n"


@pytest.mark.parametrize("text", ["cat-cluster", "8Gi", "500m", "cpu", "s3://bucket/prod", "2.60.0", "yes-no", "/tmp"])
def test_other_texts_are_not(text: str) -> None:
    assert dump([text]) == f"- {text}\n"


@given(st.from_regex(r"[-+]?[.0-9yYnNtTfFoO~][-+._0-9a-fA-FxXobeEnNsSuUlLrR~]{0,5}", fullmatch=True))
def test_numbers_of_yaml_1_2_are_quoted(text: str) -> None:
    """The core schema of YAML 1.2, section 10.3.2."""
    core = {
        "null": r"null|Null|NULL|~",
        "bool": r"true|True|TRUE|false|False|FALSE",
        "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
    }
    if any(re.fullmatch(pattern, text) for pattern in core.values()):
        assert dump([text]) == f"- '{text}'\n"


def test_a_number_that_overflows_is_text_to_kubernetes_alone() -> None:
    assert plain_tag("1e310") == f"{TAG}str"
    assert plain_tag("1e300") == f"{TAG}float"
    assert dump(["1e310"]) == "- '1e310'\n"


def test_several_lines_stay_lines_in_any_script() -> None:
    assert dump({"spec.yaml": "name: Frühjahr\nmethod: cat\n"}) == "spec.yaml: |\n  name: Frühjahr\n  method: cat\n"
    shared = ["a"]
    assert dump([shared, shared]) == "- - a\n- - a\n"
