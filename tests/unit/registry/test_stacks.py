"""Names of stacks: whatever is printed is read again as it was, and everything else is refused in a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_cluster.errors import RegistryError
from cat_cluster.registry import Reference
from cat_cluster.registry.stacks import MAX_STRENGTH, StackMember, parse_member, parse_stack, stack_name

IDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
ALIASES = st.from_regex(r"(?!r-)[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
REVISIONS = st.from_regex(r"r-[0-9a-f]{12}", fullmatch=True)


@st.composite
def references(draw: st.DrawFn) -> Reference:
    if draw(st.booleans()):
        return Reference(draw(IDS), revision=draw(REVISIONS))
    return Reference(draw(IDS), alias=draw(ALIASES))


@given(members=st.lists(references(), min_size=1, max_size=8, unique_by=lambda one: one.adapter_id))
def test_the_name_of_a_stack_is_read_as_what_it_names(members: list[Reference]) -> None:
    assert parse_stack(stack_name(str(one) for one in members)) == tuple(members)


@given(reference=references(), strength=st.floats(0, MAX_STRENGTH))
def test_a_member_is_read_as_what_it_names(reference: Reference, strength: float) -> None:
    assert parse_member(f"{reference}:{strength!r}") == StackMember(reference, strength)
    assert parse_member(str(reference)) == StackMember(reference, 1.0)


@given(text=st.text(max_size=80) | st.text("cup+@:-r0.1 ", max_size=30))
def test_any_text_is_a_stack_of_well_formed_references_or_an_error(text: str) -> None:
    try:
        found = parse_stack(text)
    except RegistryError:
        return
    spelt = text.split("+")
    assert len(found) == len(spelt)
    for one, part in zip(found, spelt, strict=True):
        assert part in (str(one), one.adapter_id)
        assert part != one.adapter_id or one == Reference(part)


@given(text=st.text("cup@:-r0.1naife+ ", max_size=20))
def test_any_text_is_a_member_with_a_finite_strength_or_an_error(text: str) -> None:
    try:
        found = parse_member(text)
    except RegistryError:
        return
    name, colon, number = text.partition(":")
    assert name in (str(found.reference), found.reference.adapter_id)
    assert found.strength == (float(number) if colon else 1.0)
    assert 0 <= found.strength <= 2


@pytest.mark.parametrize("text", ["cup+mug+cup", "cup@prod+cup", "cup@r-0123456789ab+mug+cup@r-ba9876543210"])
def test_an_adapter_named_twice_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="cup is named twice"):
        parse_stack(text)


@pytest.mark.parametrize("text", ["cup:", "cup:x", "cup:nan", "cup:inf", "cup:1,5"])
def test_what_is_no_strength_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match=f"^'{text}' names no strength"):
        parse_member(text)


@pytest.mark.parametrize("text", ["cup:-1", "cup:2.0001", "cup:-1e-9", "cup@prod:1e40"])
def test_a_strength_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match=f"^'{text}' is out of range: a strength is 0 to 2$"):
        parse_member(text)


@pytest.mark.parametrize("text", ["cup:0.5:0.2", "cup:1:", "cup@prod:x:1"])
def test_two_strengths_as_other_tools_have_them_are_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="has two strengths: an adapter has one, for the U-Net and the text enc"):
        parse_member(text)


@pytest.mark.parametrize("text", ["cup+mug", "cup + mug", "cup:0.5+mug:0.7", "cup+mug:0.7", "cup@prod+mug"])
def test_several_adapters_where_one_belongs_are_to_be_named_one_by_one(text: str) -> None:
    with pytest.raises(RegistryError, match="names several adapters: name each by itself, with an --adapter"):
        parse_member(text)


@pytest.mark.parametrize("text", ["", "+", "cup+", "+cup", "cup++mug", "cup +mug", "Cup+mug", "cup+mug@", "cup:1+mug"])
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="is not a"):
        parse_stack(text)
