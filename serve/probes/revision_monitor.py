"""What probing knows about one revision: its judge, its canonical pairs, its drift monitors and their state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cat_cluster.data.concepts import has_token
from cat_cluster.errors import EvaluationError
from cat_cluster.evaluation.drift import LEAST_PAIRS, SCORES, DriftMonitor
from cat_cluster.evaluation.evaluate import image_templates
from cat_cluster.evaluation.judges import Judge, feature_rows
from cat_cluster.evaluation.metrics import paired_similarity, similarity
from cat_cluster.evaluation.prompts import fill
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.prompt_weights import is_weighted
from cat_cluster.registry.manifest import Manifest
from cat_cluster.spec.choices import DriftState, ProbeScore
from cat_cluster.spec.fields import words
from serve.calls import ImageCall

Array = NDArray[np.float64]
ProbeCall = tuple[ImageCall, Manifest | None]  # an image to generate with a revision, or with the base alone
LoadJudge = Callable[[str, BaseModel], Judge]
DECOY_DRIFT: ProbeScore = "decoy_drift"
_SEVERITY: Mapping[DriftState, int] = {"ok": 0, "warning": 1, "alarm": 2}


@dataclass(frozen=True)
class CanonicalPair:
    """Pair `index` of a concept as it was evaluated: its prompts y_T and y, and the scores it had.

    decoy: the prompt with a word that was never taught in the token's place, of a pair that was measured with it.
    """

    token: str
    index: int
    with_token: ImageCall
    without_token: ImageCall
    expected: Mapping[str, float]
    decoy: ImageCall | None = None

    def calls(self, manifest: Manifest) -> list[ProbeCall]:
        """The adapter's images of y_T and y, and the base's of y; then the adapter's and the base's of the decoy."""
        decoy: list[ProbeCall] = [] if self.decoy is None else [(self.decoy, manifest), (self.decoy, None)]
        return [(self.with_token, manifest), (self.without_token, manifest), (self.without_token, None), *decoy]

    @property
    def base_calls(self) -> list[ImageCall]:
        """Those of `calls` that the base draws."""
        return [self.without_token, *([] if self.decoy is None else [self.decoy])]


@dataclass(frozen=True)
class DriftStatus:
    """The drift of a revision. probes, last: kind -> number, and Unix time, of this replica's probes.

    scores: kind -> score -> the last probe's; reference: token -> score -> mean when the adapter was measured;
    statistics: token -> score -> detector -> share of its limit.
    """

    state: Literal["unknown", DriftState] = "unknown"
    reason: str | None = None
    probes: Mapping[str, int] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The status as JSON."""
        return asdict(self)


@dataclass(eq=False)
class RevisionMonitor:
    """A monitored revision; `drift_monitors` lacks a concept whose reference is too small for live probes.

    canonical: the last canonical probe's verdict; reason: of the last verdict that was not ok; alarm_handled: whether
    the alarm was acted on.
    """

    judge: Judge
    pairs: tuple[CanonicalPair, ...]
    photos: Mapping[str, Array]
    drift_monitors: Mapping[str, DriftMonitor]
    reference: Mapping[str, Mapping[str, float]]
    canonical: DriftState | None = None
    reason: str | None = None
    alarm_handled: bool = False
    cursor: int = 0
    probes: dict[str, int] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def pair(self) -> CanonicalPair:
        """The canonical pair whose turn it is."""
        return self.pairs[self.cursor % len(self.pairs)]

    @property
    def state(self) -> DriftState | None:
        """The worst state of canonical and live probes; None before the first probe."""
        states = [drift.state for drift in self.drift_monitors.values() if drift.probes > 0]
        states += [self.canonical] if self.canonical is not None else []
        return max(states, key=_SEVERITY.__getitem__, default=None)

    def status(self) -> DriftStatus:
        """The state with everything behind it."""
        state = self.state
        return DriftStatus(
            state=state or "unknown",
            reason=self.reason if state in ("warning", "alarm") else None,
            probes=dict(self.probes),
            last=dict(self.last),
            scores=dict(self.scores),
            reference=self.reference,
            statistics={token: drift.shares for token, drift in self.drift_monitors.items()},
        )

    def reset(self) -> None:
        """Forget what probes found; the counts stay."""
        for drift in self.drift_monitors.values():
            drift.reset()
        self.canonical, self.reason, self.alarm_handled = None, None, False


def worst_state(states: Sequence[str]) -> str:
    """Return the worst of the drift states of several revisions: an alarm, a warning, one not known, or "ok"."""
    return max(states, key=("ok", "unknown", "warning", "alarm").index, default="unknown")


def open_monitor(manifest: Manifest, base: BaseModel, load_judge: LoadJudge) -> RevisionMonitor:
    """Return the monitor of a revision; EvaluationError says why it cannot be probed. Takes a second: use a thread."""
    stored = manifest.reference
    if stored is None:
        raise EvaluationError(
            f"{manifest.name} was published unmeasured and cannot be probed: train its spec with evaluation.enabled"
        )
    try:
        named, concepts = stored["judge"], {c.token: stored["concepts"][c.token] for c in manifest.concepts}
        photos = {token: np.asarray(found["photos"], dtype=np.float64) for token, found in concepts.items()}
        scores = {
            token: {name: [float(v) for v in found[name]] for name in SCORES} for token, found in concepts.items()
        }
        decoys = {token: _decoy_scores(found) for token, found in concepts.items()}
        name, digest = str(named["name"]), named["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{manifest.name} has no usable reference scores: train its spec again") from error
    judge = load_judge(name, base)
    if judge.digest != digest:
        raise EvaluationError(
            f"{manifest.name} was measured by judge {name!r} with other weights than the one here, and scores of two "
            "judges do not compare: serve with that judge, or train its spec again"
        )
    by_concept = [
        _canonical_pairs(manifest, base, c.token, c.class_noun, scores[c.token], decoys[c.token])
        for c in manifest.concepts
    ]
    reference = {t: {name: float(np.mean(own[name])) for name in SCORES} for t, own in scores.items()}
    for token, found in decoys.items():
        if found.drifts:
            reference[token][DECOY_DRIFT] = float(np.mean(list(found.drifts.values())))
    return RevisionMonitor(
        judge=judge,
        pairs=tuple(pair for pair in chain.from_iterable(zip_longest(*by_concept)) if pair is not None),
        photos=photos,
        drift_monitors={t: DriftMonitor(own) for t, own in scores.items() if len(own[SCORES[0]]) >= LEAST_PAIRS},
        reference=reference,
    )


@dataclass(frozen=True)
class _Decoys:
    """How far a word that was never taught moved the base's images, by index of the pair; none in old manifests."""

    word: str = ""
    drifts: Mapping[int, float] = field(default_factory=dict)


def _decoy_scores(concept: Mapping[str, Any]) -> _Decoys:
    stored = concept.get("decoy")
    if stored is None:
        return _Decoys()
    drifts = {int(pair): float(drift) for pair, drift in zip(stored["pairs"], stored["drift"], strict=True)}
    return _Decoys(str(stored["word"]), drifts)


def _canonical_pairs(
    manifest: Manifest,
    base: BaseModel,
    token: str,
    class_noun: str,
    scores: Mapping[str, Sequence[float]],
    decoys: _Decoys,
) -> list[CanonicalPair]:
    spec = manifest.settings.evaluation
    templates = image_templates(spec, base)
    if {len(scores[name]) for name in SCORES} != {len(templates)}:
        raise EvaluationError(
            f"{manifest.name}: its evaluation prompts are not those of its reference scores, as after an update of "
            "cat-cluster's defaults: train its spec again"
        )

    pairs = []
    for i, template in enumerate(templates):
        prompt = fill(template, class_noun, token)
        with_token = ImageCall(
            "probe", prompt, seed=spec.seed + i, steps=spec.steps, guidance=spec.guidance, sampler=spec.sampler
        )
        without_token = replace(with_token, prompt=fill(template, class_noun, None))
        expected = {name: scores[name][i] for name in SCORES}
        decoy = None
        if i in decoys.drifts:
            expected[DECOY_DRIFT] = decoys.drifts[i]
            decoy = replace(with_token, prompt=fill(template, class_noun, decoys.word))
        pairs.append(CanonicalPair(token, i, with_token, without_token, expected, decoy))
    return pairs


def live_token(manifest: Manifest, call: ImageCall) -> str | None:
    """Return the token that a user's call can be probed for; None where its scores do not compare with the reference.

    Compares: one token of the adapter beside its class noun, full strength, guidance, no negative prompt, no weights.
    """
    named = [concept for concept in manifest.concepts if has_token(call.prompt, concept.token)]
    if len(named) != 1 or not set(words(named[0].class_noun)) <= set(words(call.prompt)):
        return None
    spec = manifest.settings.evaluation
    plain = all(member.strength == 1.0 for member in call.adapters) and not call.negative_prompt.strip()
    plain = plain and not is_weighted(call.prompt, call.weighting)
    return named[0].token if plain and (call.guidance > 1.0) == (spec.guidance > 1.0) else None


def score_images(
    judge: Judge, photos_MF: Array, images_NHWC: Sequence[NDArray[np.uint8]]
) -> tuple[dict[str, float], Array]:
    """Return the scores of images and the features [1 or 2, F] of those that the base drew.

    images_NHWC: the adapter's of y_T and y and the base's of y; or five, then the adapter's and the base's of a decoy.
    kps = 1 - s(y, y_T);  identity = mean s(y_T, photos);  base_drift = 1 - s(base y, y)      (design 4, one pair)
    decoy_drift = 1 - s(base decoy, decoy)
    """
    rows = feature_rows(judge, np.stack(images_NHWC))
    with_token, without_token, base_alone = rows[0:1], rows[1:2], rows[2:3]
    scores = {
        "kps": float(1.0 - paired_similarity(without_token, with_token)[0]),
        "identity": float(similarity(with_token, photos_MF).mean()),
        "base_drift": float(1.0 - paired_similarity(base_alone, without_token)[0]),
    }
    if len(rows) == 5:
        scores[DECOY_DRIFT] = float(1.0 - paired_similarity(rows[4:5], rows[3:4])[0])
    return scores, rows[2::2].copy()
