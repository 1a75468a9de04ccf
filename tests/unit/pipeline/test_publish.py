"""Samples of a revision say that a model drew them; its photos do not."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cat_cluster.data.concepts import load_concept
from cat_cluster.evaluation.results import ConceptImages, Evaluation
from cat_cluster.pipeline.publish import photo_objects, sample_objects
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.sections import EvaluationSpec
from tests.support.provenance import DRAWN, said_in_xmp, xmp_of


def test_samples_are_marked_as_drawn_and_photos_are_not(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 2, 32, 32, 3), dtype=np.uint8)
    drawn = ConceptImages("sks", "cup", ("a cup",), ("a sks cup",), (0, 1), *pictures, photos=pictures[0])
    samples = sample_objects(Evaluation((drawn,), (), {}, EvaluationSpec()))
    for name, expected in (("with", drawn.with_token), ("without", drawn.without_token)):
        for n, picture in enumerate(expected):
            data = samples[f"sample-0-{name}-{n}.png"]
            assert said_in_xmp(xmp_of(data)) == DRAWN
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)

    Image.fromarray(pictures[0, 0]).save(tmp_path / "1.png")
    spec = ConceptSpec(token="sks", class_noun="cup", images=str(tmp_path), captions="template")
    photo = photo_objects([load_concept(spec)])["photo-0-000.png"]
    with Image.open(io.BytesIO(photo)) as image:
        image.load()
        assert "xmp" not in image.info
        assert np.array_equal(np.asarray(image), pictures[0, 0])
