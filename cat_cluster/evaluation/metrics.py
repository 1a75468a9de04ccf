"""The metrics of an adapter, as pure functions of unit feature rows, one equation above each.

s(i, j) = (1 + cos(f_i, f_j)) / 2 throughout; y is a prompt without the token, y_T the same prompt with it.
`harmonic` means are over s in [0, 1]: one image far from all others weighs more than in a plain mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cat_cluster.errors import EvaluationError

Array = NDArray[np.float64]


def similarity(left_NF: Array, right_MF: Array) -> Array:
    """Return s of every left row with every right row, [N, M] in [0, 1].

    s(i, j) = (1 + cos(f_i, f_j)) / 2          (CAT, utils/eval_utils.py; rows are unit vectors)
    """
    similar: Array = np.clip((1.0 + _rows(left_NF) @ _rows(right_MF).T) / 2.0, 0.0, 1.0)
    return similar


def paired_similarity(left_NF: Array, right_NF: Array) -> Array:
    """Return s of each row with its partner, [N] in [0, 1]; refuses sets of different size."""
    similar: Array = np.clip((1.0 + np.einsum("nf,nf->n", *_pairs(left_NF, right_NF))) / 2.0, 0.0, 1.0)
    return similar


def harmonic_mean(values: Array) -> float:
    """Return n / sum(1 / v) of values in [0, 1]; a zero among them makes it 0, which is its limit."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    if flat.size == 0:
        raise EvaluationError("a metric has no images to compare: generate at least one image per prompt")
    return 0.0 if bool((flat <= 0.0).any()) else float(flat.size / np.sum(1.0 / flat))


def kps(without_NF: Array, with_NF: Array) -> float:
    """Return the Knowledge Preservation Score of same-seed pairs from the adapted model; higher is better.

    kps = 1 - H,  H = harmonic mean_n s(f(y)_n, f(y_T)_n)          (CAT paper, section 4; pairing by seed is ours)
    """
    return 1.0 - harmonic_mean(paired_similarity(without_NF, with_NF))


def kps_all_pairs(without_NF: Array, with_NF: Array) -> float:
    """Return KPS over all pairs, for comparison with work that does not pair by seed; higher is better.

    kps_all_pairs = 1 - harmonic mean_{n,m} s(f(y)_n, f(y_T)_m)
    """
    return 1.0 - harmonic_mean(similarity(without_NF, with_NF))


def identity_similarity(with_NF: Array, photos_MF: Array) -> float:
    """Return how much the images with the token look like the concept's photos; higher is better.

    identity = harmonic mean_{n,m} s(f(y_T)_n, photo_m)
    """
    return harmonic_mean(similarity(with_NF, photos_MF))


def identity_gain(with_NF: Array, base_with_NF: Array, photos_MF: Array) -> float:
    """Return what training added to the identity similarity; higher is better, 0 for an untrained adapter.

    identity_gain = identity(adapted images of y_T) - identity(base images of y_T)
    """
    return identity_similarity(with_NF, photos_MF) - identity_similarity(base_with_NF, photos_MF)


def prompt_similarity(with_NF: Array, text_NF: Array) -> float:
    """Return how well the images with the token still follow the rest of their prompt; higher is better.

    prompt_similarity = mean_n cos(f(y_T)_n, text(y)_n)          (raw cosine, as published)
    """
    return float(np.einsum("nf,nf->n", *_pairs(with_NF, text_NF)).mean())


def base_drift(base_without_NF: Array, without_NF: Array) -> float:
    """Return how far the adapter moved images that have no token; lower is better, 0 = nothing moved.

    base_drift = mean_n (1 - s(base(y)_n, f(y)_n)), pairs of the same prompt and seed
    """
    return float((1.0 - paired_similarity(base_without_NF, without_NF)).mean())


def diversity_ratio(without_NF: Array, base_without_NF: Array) -> float:
    """Return how much variety of the base model is left where the token is absent; 1 = all of it.

    diversity_ratio = mean_{n<m} (1 - s(f(y)_n, f(y)_m)) / mean_{n<m} (1 - s(base(y)_n, base(y)_m))
    """
    without_NF, base_without_NF = _pairs(without_NF, base_without_NF)
    if len(without_NF) < 2:
        raise EvaluationError("diversity_ratio needs two images without the token: raise evaluation.images_per_prompt")
    base = _spread(base_without_NF)
    if base == 0.0:
        # A base that generates one single image has no variety to lose.
        return 1.0
    return _spread(without_NF) / base


def leak_matrix(adapted: Sequence[Sequence[Array]], base: Sequence[Sequence[Array]], photos: Sequence[Array]) -> Array:
    """Return which trigger brings which concept, [K, J]; 0 = no more than in the base model.

    leak[i, j] = mean_{n,m} s(f_ij_n, photo_i_m) - mean_{n,m} s(base_ij_n, photo_i_m)

    `adapted[i][j]` are feature rows of concept i's prompts with trigger j, `base[i][j]` those of the base model.
    """
    return np.array(
        [
            [
                float(similarity(image, photo).mean() - similarity(reference, photo).mean())
                for image, reference in zip(images, references, strict=True)
            ]
            for images, references, photo in zip(adapted, base, photos, strict=True)
        ],
        dtype=np.float64,
    )


def _spread(features_NF: Array) -> float:
    rows = _rows(features_NF)
    upper = np.triu_indices(len(rows), k=1)
    return float((1.0 - similarity(rows, rows)[upper]).mean())


def _pairs(left_NF: Array, right_NF: Array) -> tuple[Array, Array]:
    left, right = _rows(left_NF), _rows(right_NF)
    if left.shape != right.shape:
        raise EvaluationError(
            f"same-seed pairs need equal sets of images, got features {left.shape} and {right.shape}: "
            "generate both sets with the same prompts and seeds"
        )
    return left, right


def _rows(features: Array) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2:
        raise EvaluationError(f"features must be rows [N, F], got an array of shape {rows.shape}")
    return rows
