"""The plan of the leak matrix: which prompts are made for which cell."""

from __future__ import annotations

import numpy as np
import pytest

from cat_cluster.data.concepts import Concept
from cat_cluster.evaluation.leaks import leak_prompts, measure_decoys, measure_leaks, triggers_of


def concepts(*names: tuple[str, str]) -> list[Concept]:
    return [Concept(token, noun, 1.0, 1.0, ()) for token, noun in names]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_is_a_cell_for_every_token_none_and_a_decoy(count: int) -> None:
    chosen = concepts(("sks", "cup"), ("zwx", "fish"), ("ohwx", "car"))[:count]
    cells = leak_prompts(chosen, {concept.token: [("a {} here", 7)] for concept in chosen})
    assert {(cell.row, cell.column) for cell in cells} == {(i, j) for i in range(count) for j in range(count + 2)}
    assert len(triggers_of(chosen)) == count + 2


def test_prompts_keep_the_class_noun_of_the_row_and_take_the_trigger_of_the_column() -> None:
    chosen = concepts(("sks", "cup"), ("zwx", "fish"))
    pairs = {"sks": [("a {} here", 7)], "zwx": [("a {} there", 8)]}
    prompts = {(cell.row, cell.column): (*cell.prompts, *cell.seeds) for cell in leak_prompts(chosen, pairs)}
    assert prompts[0, 1] == ("a zwx cup here", 7)
    assert prompts[1, 1] == ("a zwx fish there", 8)
    assert prompts[1, 2] == ("a fish there", 8)
    assert prompts[0, 3] == ("a wjq cup here", 7)


def test_only_what_the_adapter_added_counts() -> None:
    chosen = concepts(("sks", "cup"))
    east, north = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    adapted = {(0, 0): east, (0, 1): north, (0, 2): north}
    base = {(0, 0): north, (0, 1): north, (0, 2): east}
    found = measure_leaks(chosen, adapted, base, [east])
    assert found.values.tolist() == [[0.5, 0.0, -0.5]]
    assert found.decoy_gain == -0.5
    assert found.to_json() == {
        "tokens": ["sks"],
        "triggers": ["sks", "none", "decoy wjq"],
        "values": [[0.5, 0.0, -0.5]],
    }


def test_the_drift_of_a_decoy_is_a_plain_loop_over_its_images() -> None:
    chosen, rng = concepts(("sks", "cup"), ("wjq", "fish")), np.random.default_rng(0)
    cells = leak_prompts(chosen, {"sks": [("a {} here", 7), ("a {} there", 9)], "wjq": [("a {} here", 7)]})

    def rows(count: int) -> np.ndarray:
        found = rng.normal(size=(count, 5))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    adapted, base = ({(cell.row, cell.column): rows(len(cell.seeds)) for cell in cells} for _ in range(2))
    found = measure_decoys(chosen, cells, adapted, base)
    assert [(one.token, one.word, one.seeds) for one in found] == [("sks", "xvk", (7, 9)), ("wjq", "xvk", (7,))]
    for row, one in enumerate(found):
        pairs = zip(one.drifts, adapted[row, 3], base[row, 3], strict=True)
        assert all(drift == pytest.approx((1 - float(image @ plain)) / 2) for drift, image, plain in pairs)
