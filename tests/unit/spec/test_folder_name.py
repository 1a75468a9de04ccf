"""Names of folders as kohya's trainer reads them."""

from __future__ import annotations

import pytest

from cat_cluster.spec.folder_name import FolderName, read_folder_name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("10_sks cup", FolderName(10, "sks", "cup")),
        ("train/007_ohwx, tea cup/", FolderName(7, "ohwx", "tea cup")),
        ("1_sks", FolderName(1, "sks", "")),
        ("2024_summer trip", None),  # a year
        ("0_sks cup", None),
        ("sks cup", None),
        ("10_", None),
    ],
)
def test_a_name_says_repeats_token_and_class_noun(name: str, said: FolderName | None) -> None:
    assert read_folder_name(name) == said
