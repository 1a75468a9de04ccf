"""Long and weighted prompts against a plain loop over chunks with transformers' text encoder, and over tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from cat_cluster.errors import SpecError
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.conditioning import Conditioning, Sizes, Text
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.models.prompts import encode_prompts
from cat_cluster.models.text_limit import Chunk
from tests.support.texts import states_of

WORD = "cup "  # one token of Pocket's tokenizer, of whose chunks 30 are between the marks


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model("pocket")


def looped(folder: Path, parts: list[list[tuple[str, float]]], most: int = 99) -> Tensor:
    """[n L, D] of parts that each start a chunk, of words with their weights: one chunk after the other."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    room, found = tokenizer.model_max_length - 2, []
    for part in parts:
        tokens, weights = list[int](), list[float]()
        for text, weight in part:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            tokens += ids
            weights += [weight] * len(ids)
        starts = range(0, max(1, len(tokens)), room)
        found += [(tokens[start : start + room], weights[start : start + room]) for start in starts]
    states = []
    for tokens, weights in found[:most]:
        row = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(row))
        with torch.no_grad():
            state = encoder(torch.tensor([row]))[0][0].double()
        before = sum(float(value) for value in state.flatten()) / state.numel()
        for place, weight in enumerate(weights, 1):
            state[place] *= weight
        after = sum(float(value) for value in state.flatten()) / state.numel()
        states.append(state * (before / after) if any(weight != 1.0 for weight in weights) else state)
    return torch.cat(states)


def states(texts: Sequence[Text]) -> Tensor:
    return torch.stack([text.states for text in texts])


def encoded(base: BaseModel, text: str, weighting: str = "none", chunks: int = 4) -> Tensor:
    (found,) = encode_prompts(base, base.text_limit, [Prompt(text, weighting, chunks)])  # type: ignore[arg-type]
    return found.states


@pytest.mark.parametrize("words", [0, 1, 29, 30, 31, 60, 61, 120, 121, 400])
def test_chunks_are_those_of_a_loop(base: BaseModel, words: int) -> None:
    found = encoded(base, WORD * words)
    assert len(found) == 32 * min(4, max(1, -(-words // 30)))
    torch.testing.assert_close(found.double(), looped(base.folder, [[(WORD * words, 1.0)]], 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_prompt_of_one_chunk_without_syntax_is_as_ever_to_the_bit(base: BaseModel, chunks: int) -> None:
    texts = ["", "a sks cup", WORD * 30, "a cup, red; on a table: 5 o'clock", "caf\u00e9 xq9 \U0001f600"]
    expected = states_of(base, texts)
    for weighting in ("none", "a1111"):
        prompts = [Prompt(text, weighting, chunks) for text in texts]  # type: ignore[arg-type]
        assert torch.equal(states(encode_prompts(base, base.text_limit, prompts)), expected)
    brackets = ["a (cup:1.2)", "((a)) [b] \\(c\\) BREAK d"]
    found = encode_prompts(base, base.text_limit, [Prompt(text, "none", chunks) for text in brackets])
    assert torch.equal(states(found), states_of(base, brackets)), "without weighting brackets are text"
    assert torch.equal(encoded(base, WORD * 90, chunks=1), states_of(base, [WORD * 90])[0]), "cut, as it was"


@pytest.mark.parametrize("mask", [False, True])
def test_padding_and_mask_are_the_tokenizers_own(tiny_base_folder: Path, tmp_path: Path, mask: bool) -> None:
    """A base of Stable Diffusion 2's kind pads with another token than that of the end; a few want a mask."""
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "copy"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}))
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": mask}))
    other = load_base_model(str(folder))
    assert other.tokenizer.pad_token_id != other.tokenizer.eos_token_id
    texts = ["a cup", "", "a photo"]
    found = encode_prompts(other, other.text_limit, [Prompt(text, chunks=3) for text in texts])
    assert torch.equal(states(found), states_of(other, texts))


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (sks:1.5) cup", [[("a", 1.0), ("sks", 1.5), ("cup", 1.0)]]),
        ("(a) ((cup)) on [grass]", [[("a", 1.1), ("cup", 1.21), ("on", 1.0), ("grass", 1 / 1.1)]]),
        ("a cup, (snow:0)", [[("a cup,", 1.0), ("snow", 0.0)]]),
        ("(" + WORD * 35 + ":1.4) red", [[(WORD * 35, 1.4), ("red", 1.0)]]),
        (WORD * 40 + "(sks:2)", [[(WORD * 40, 1.0), ("sks", 2.0)]]),
        ("a cup BREAK (sks:1.3)", [[("a cup", 1.0)], [("sks", 1.3)]]),
        ("BREAK a BREAK BREAK b BREAK", [[], [("a", 1.0)], [], [("b", 1.0)]]),
        ("(a BREAK b:1.2)", [[("a", 1.2)], [("b", 1.2)]]),
        (WORD * 30 + "BREAK red", [[(WORD * 30, 1.0)], [("red", 1.0)]]),
        (WORD * 31 + "BREAK red", [[(WORD * 31, 1.0)], [("red", 1.0)]]),
        (f"a (big{' ' * 400}cup:1.3)", [[("a", 1.0), ("big cup", 1.3)]]),
        (f"(red {WORD * 2000}:1.3) sks", [[(f"red {WORD * 200}", 1.3)]]),
        ("a BREAK " * 9, [[("a", 1.0)]] * 9),
    ],
)
def test_weights_are_those_of_a_loop_over_tokens(
    base: BaseModel, prompt: str, parts: list[list[tuple[str, float]]]
) -> None:
    found = encoded(base, prompt, "a1111")
    torch.testing.assert_close(found.double(), looped(base.folder, parts, 4), rtol=1e-4, atol=1e-4)
    if any(weight != 1.0 for part in parts for _, weight in part):
        plain = encoded(base, prompt.translate(str.maketrans("", "", "()[]:.0123456789")), "a1111")
        assert plain.shape != found.shape or float((plain - found).abs().max()) > 1e-3


def test_a_chunk_does_not_depend_on_what_is_encoded_with_it(base: BaseModel) -> None:
    prompts = [Prompt("a (sks:1.5) cup", "a1111", 4), Prompt(WORD * 70, "none", 4), Prompt("[red]", "a1111", 4)]
    for together, prompt in zip(encode_prompts(base, base.text_limit, prompts), prompts, strict=True):
        (alone,) = encode_prompts(base, base.text_limit, [prompt])
        torch.testing.assert_close(together.states, alone.states, rtol=1e-4, atol=1e-5)


def test_a_mean_that_is_rounding_alone_is_not_restored(tiny_base_folder: Path) -> None:
    """This encoder's last normalisation leaves no mean: restoring it would divide rounding by rounding."""
    tiny = load_base_model(str(tiny_base_folder))
    found, plain = encoded(tiny, "(a:2)", "a1111"), encoded(tiny, "a", "a1111")
    assert torch.equal(found[1], 2 * plain[1])
    assert torch.equal(found[[0, *range(2, 77)]], plain[[0, *range(2, 77)]])


def test_a_weight_that_cannot_be_is_refused(base: BaseModel) -> None:
    with pytest.raises(SpecError, match="prompt: 'a' has the weight 11"):
        encoded(base, "(a:11)", "a1111")


def test_what_is_read_is_told_in_words(base: BaseModel) -> None:
    """`split` and `chunks` agree: what is told to be read is encoded, and what is told to be cut is not."""
    limit = base.text_limit
    assert limit.split(Prompt(WORD * 31)) == ((WORD * 30).rstrip(), WORD)
    assert limit.split(Prompt(WORD * 31, chunks=2)) == (WORD * 31, "")
    assert limit.split(Prompt(WORD * 61 + "sks", chunks=2))[1] == WORD + "sks"
    assert limit.split(Prompt("a (cup:1.2) [red]", "a1111")) == ("a cup red", "")
    assert limit.split(Prompt("a BREAK (b:1.2) BREAK c d", "a1111", 2)) == ("a b", "c d")
    assert limit.split(Prompt(f"({WORD * 29}:1.2) red (sks:1.1)", "a1111")) == (f"{WORD * 29}red", "sks")
    assert limit.split(Prompt("BREAK a", "a1111")) == ("", "a")
    assert limit.chunks(Prompt("BREAK a", "a1111")) == [Chunk()]


def test_texts_of_one_length_need_no_mask() -> None:
    short, long = torch.ones(2, 3), torch.full((4, 3), 2.0)
    told = [Sizes.drawn(16, 16)] * 2
    alike = Conditioning.of([Text(short), Text(short)], told)
    assert alike.own_text is None
    assert alike.states.shape == (2, 2, 3)
    unlike = Conditioning.of([Text(short), Text(long)], told)
    texts, own = unlike.states, unlike.own_text
    assert own is not None
    assert own.tolist() == [[True, True, False, False], [True] * 4]
    assert texts[0].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    assert torch.equal(texts[1], long)
