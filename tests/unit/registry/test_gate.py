"""Which prompts ask for an adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cat_cluster.registry import AdapterDraft, Manifest, Registry
from cat_cluster.registry.gate import gate_note, opens_gate
from cat_cluster.store import LocalStore

MakeDraft = Callable[..., AdapterDraft]


@pytest.fixture(scope="module")
def cup(make_draft: MakeDraft, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Registry(LocalStore(tmp_path_factory.mktemp("gate"))).publish(make_draft())


def taught(cup: Manifest, *tokens: str) -> Manifest:
    (concept,) = cup.concepts
    return cup.model_copy(update={"concepts": tuple(concept.model_copy(update={"token": one}) for one in tokens)})


@pytest.mark.parametrize(
    ("tokens", "prompt", "opens"),
    [
        (("sks",), "a photo of a sks cup", True),
        (("sks",), "SKS, a cup", True),
        (("sks",), "a photo of a cup", False),
        (("sks",), "a photo of a sksy cup", False),
        (("sks",), "a photo of a xsks cup", False),
        (("sks",), "a photo of a sks2 cup", False),
        (("sks",), "", False),
        (("sks",), "a picture of a cup, sks.", True),
        (("sks",), 'the "sks" cup!', True),
        (("sks",), "a (sks:1.3) cup and a sks-cup", True),
        (("sks",), "a sks_cup", True),
        (("sks",), "the sks's handle", True),
        (("<s1>",), "a photo of <s1>", True),
        (("s.s",), "a photo of a sxs cup", False),
        (("sks", "zwx"), "a zwx fish", True),
        (("sks", "zwx"), "an ohwx dog", False),
        ((), "a cup", True),  # nothing could ask for it
    ],
)
def test_a_prompt_asks_for_an_adapter_by_one_of_its_tokens(
    cup: Manifest, tokens: tuple[str, ...], prompt: str, opens: bool
) -> None:
    assert opens_gate(taught(cup, *tokens), prompt) is opens


def test_the_note_says_what_would_have_brought_it(cup: Manifest) -> None:
    assert gate_note(taught(cup, "sks", "zwx")) == "gate: cup is left out, for the prompt does not name sks or zwx"
