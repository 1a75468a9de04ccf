"""What an import reads of photos: they measure an adapter that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from cat_cluster.pipeline import importing


def test_masks_beside_photos_are_no_photos(tmp_path: Path) -> None:
    """The folder that an adapter was trained on elsewhere has the masks of that trainer."""
    Image.new("RGB", (48, 40), "red").save(tmp_path / "1.png")
    Image.new("L", (48, 40), 255).save(tmp_path / "1-mask.png")
    request = importing.ImportRequest(tmp_path / "a.safetensors", "mug", ["sks"], ["cup"], [tmp_path])
    (concept,) = importing._concepts(request)
    assert [example.path.name for example in concept.examples] == ["1.png"]
