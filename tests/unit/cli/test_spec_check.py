"""`spec check` says what was read of each concept's photos, and what was not."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from cat_cluster.cli.app import app

SPEC = """
name: two
adapters:
  - id: pair
    concepts:
      - {token: sks, class_noun: cup, images: cup}
      - {token: ohwx, class_noun: fish, images: fish}
"""


def test_spec_check_counts_photos_and_names_their_captions_and_what_it_passed_over(tmp_path: Path) -> None:
    for name in ("cup/0.jpg", "cup/1.avif", "fish/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / name)
    for stem in ("0", "1"):
        (tmp_path / "cup" / f"{stem}.caption").write_text("a sks cup")
    (tmp_path / "fish" / "[old] :x: notes.md").touch()
    (tmp_path / "fish" / "\x1b[31mred\x1b]0;\a.xyz").touch()
    (tmp_path / "spec.yaml").write_text(SPEC)
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml")])
    assert result.exit_code == 0
    assert "   sks: 2 photos, captions from .caption files\n" in result.stderr
    template = "the template 'a photo of a ohwx fish'"
    assert (
        f"   ohwx: 1 photo, captions from {template}; passed over: \\x1b[31mred\\x1b]0;\\x07.xyz, [old] :x: notes.md\n"
        in result.stderr
    )
    result = CliRunner().invoke(app, ["spec", "check", str(tmp_path / "spec.yaml"), "--json"])
    assert json.loads(result.stdout)["read"] == {
        "pair": [
            {"token": "sks", "photos": 2, "captions_from": ".caption files", "passed_over": []},
            {
                "token": "ohwx",
                "photos": 1,
                "captions_from": template,
                "passed_over": ["\x1b[31mred\x1b]0;\a.xyz", "[old] :x: notes.md"],
            },
        ]
    }
