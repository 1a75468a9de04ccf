"""Which example, noise, timestep and prior prompt each row gets: a pure function of named keys.

Every draw is keyed by (seed, adapter id, concept token, step, row within the concept) on a counter-based
generator (Philox) on the CPU. It never depends on the place in a pack, the rank, the device or what was drawn
before, so packing, resuming and sharding cannot change what an adapter sees.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cat_cluster.data.caption_changes import changed_caption
from cat_cluster.data.concepts import remove_token, replace_token
from cat_cluster.data.keys import keyed_generator
from cat_cluster.data.views import views_of_step
from cat_cluster.models.conditioning import Sizes
from cat_cluster.spec.choices import AlphaSchedule
from cat_cluster.spec.sections import TrainingSpec

# Half of the mixture is the paper's own prior prompt. The empty prompt is the one classifier-free guidance runs beside
# every image; the general prompts are those that never name the class. Decision 0005 has what each part is worth.
MIXTURE_TOKEN_REMOVED = 0.50
MIXTURE_EMPTY = 0.25
# Of the decoys of a caption in which another token of the adapter can stand; a joint adapter has few other tokens and
# many odd words, and each of those tokens brings a concept.
OTHER_TOKENS = 0.5


@dataclass(frozen=True)
class Decoys:
    """What stands in the token's place in the decoys of a view: odd words, or other tokens of the adapter."""

    odd_words: tuple[str, ...]
    other_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class ConceptMaterial:
    """All a training run needs of one concept: N views (images x crops), cached.

    moments: VAE mean and log variance of each view, N of [2C, H, W], whose H and W may differ.
    prompts, removed_prompts: the caption of each view with and without the concept's token, N each.
    sizes: what an SDXL base is told of each view's size and crop, N.
    masks: of each view, N of [1, H, W] in [0, 1], 1 where the concept is; None for one that is all concept; or none.
    decoys: those of each view, N, or none where training has no decoy rows.
    """

    token: str
    class_noun: str
    alpha: float
    weight: float
    moments: tuple[Tensor, ...]
    prompts: tuple[str, ...]
    removed_prompts: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    decoys: tuple[Decoys, ...] = ()
    masks: tuple[Tensor | None, ...] = ()

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """The sha256 of each view's moments, N."""
        return tuple(hashlib.sha256(view.contiguous().numpy().tobytes()).hexdigest() for view in self.moments)


@dataclass(frozen=True, eq=False)
class AdapterTask:
    """One adapter's part of a pack: its concepts and settings, and the general prompts that its mixture draws from.

    Raises ValueError where decoy rows are wanted of a concept that has no decoys.
    """

    adapter_id: str
    concepts: tuple[ConceptMaterial, ...]
    training: TrainingSpec
    general_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lacking = [c.token for c in self.concepts if c.alpha > 0 and not c.decoys]
        if self.training.decoy_fraction > 0 and lacking:
            raise ValueError(f"{self.adapter_id}: decoy_fraction needs decoys, and concept {lacking[0]!r} has none")

    @property
    def draw_key(self) -> str:
        """What keys the draws: the adapter's id unless a study pairs two adapters on equal draws."""
        return self.training.draw_key or self.adapter_id

    @property
    def pool_size(self) -> int | None:
        """M, the fixed draws per view that all rows come from; None draws every row anew."""
        return self.training.pool_size if self.training.teacher == "pool" else None


@dataclass(frozen=True, eq=False)
class Draw:
    """A draw (z0, e, t, y), and the sizes of its view.

    prompt, removed_prompt: the row's caption y_T, and the same without the token.
    pool_key: for a fixed draw of a pool, all that the base's prediction depends on beside y; else None.
    """

    pool_key: str | None
    moments: Tensor
    posterior_noise: Tensor
    noise: Tensor
    timestep: int
    prompt: str
    removed_prompt: str
    prior_prompt: str
    sizes: Sizes

    @property
    def key(self) -> str | None:
        """For a fixed draw of a pool, all that the base's prediction depends on; else None."""
        return None if self.pool_key is None else f"{self.pool_key}\x1f{self.prior_prompt}"


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one step of a pack, in the order (adapter, concept, row).

    adapter_B, concept_B: index of the adapter within the pack and of the concept within the adapter.
    moments, posterior_noise, noise: VAE moments, B of [2C, H, W], and the draws for z0 and e, B of [C, H, W] each;
    rows of one size can be stacked. timestep_B: t.
    prompts, sizes, masks: the caption, the size and crop, and the mask (or None) of each row's view, B.
    identity_weight_B: weight_k / sum weight / rows_k: the identity rows' place in the adapter's loss.
    cat_row_M: the rows of the M terms that hold the adapter to the base, with the base's prompt (prior_prompts, M),
    their weight (cat_weight_M) and their entry of the pool (pool_keys, M; None without one). outside_M: False for CAT
    terms, of weight alpha_k * a(t) * identity weight * rows / CAT rows; True where what is outside the row's mask is
    held, at weight alpha_k * a(t) * identity weight.
    """

    adapter_B: Tensor
    concept_B: Tensor
    moments: tuple[Tensor, ...]
    posterior_noise: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    timestep_B: Tensor
    prompts: tuple[str, ...]
    sizes: tuple[Sizes, ...]
    masks: tuple[Tensor | None, ...]
    identity_weight_B: Tensor
    cat_row_M: Tensor
    prior_prompts: tuple[str, ...]
    cat_weight_M: Tensor
    pool_keys: tuple[str | None, ...]
    outside_M: Tensor


@dataclass(frozen=True, eq=False)
class _Term:
    """A term that holds a row to the base's prediction on the draw's prior prompt."""

    draw: Draw
    weight: float
    outside: bool


@dataclass(frozen=True, eq=False)
class _Row:
    adapter: int
    concept: int
    draw: Draw
    mask: Tensor | None
    identity_weight: float
    terms: tuple[_Term, ...]


def draw_batch(tasks: Sequence[AdapterTask], steps: Sequence[int | None], num_timesteps: int) -> Batch:
    """Draw the rows of one step of a pack.

    tasks: the pack. steps: at which step each adapter is, counted from 0; None for one that trains no more.
    num_timesteps: T of the noise schedule. Raises ValueError when no adapter trains.
    """
    rows = [
        row
        for index, (task, step) in enumerate(zip(tasks, steps, strict=True))
        if step is not None
        for row in _adapter_rows(task, index, step, num_timesteps)
    ]
    if not rows:
        raise ValueError("no adapter of the pack trains any more")
    terms = [(i, term) for i, row in enumerate(rows) for term in row.terms]
    return Batch(
        adapter_B=torch.tensor([row.adapter for row in rows]),
        concept_B=torch.tensor([row.concept for row in rows]),
        moments=tuple(row.draw.moments for row in rows),
        posterior_noise=tuple(row.draw.posterior_noise for row in rows),
        noise=tuple(row.draw.noise for row in rows),
        timestep_B=torch.tensor([row.draw.timestep for row in rows]),
        prompts=tuple(row.draw.prompt for row in rows),
        sizes=tuple(row.draw.sizes for row in rows),
        masks=tuple(row.mask for row in rows),
        identity_weight_B=torch.tensor([row.identity_weight for row in rows]),
        cat_row_M=torch.tensor([i for i, _ in terms], dtype=torch.long),
        prior_prompts=tuple(term.draw.prior_prompt for _, term in terms),
        cat_weight_M=torch.tensor([term.weight for _, term in terms]),
        pool_keys=tuple(term.draw.key for _, term in terms),
        outside_M=torch.tensor([term.outside for _, term in terms], dtype=torch.bool),
    )


def pool_entries(task: AdapterTask, num_timesteps: int) -> Iterator[Draw]:
    """Yield all entries of the pools of a task's concepts whose CAT term counts, in a fixed order."""
    for concept in task.concepts if task.pool_size is not None else ():
        for view in range(len(concept.prompts)) if concept.alpha > 0 else ():
            for entry in range(task.pool_size or 0):
                drawn = _pool_draw(task, concept, view, entry, num_timesteps)
                yield drawn
                if _mask(concept, view) is not None:
                    yield replace(drawn, prior_prompt=drawn.removed_prompt)


def alpha_factor(schedule: AlphaSchedule, t: float) -> float:
    """Return a(t), which alpha is multiplied with at t = (timestep + 1/2) / T; its mean over the schedule is 1."""
    match schedule:
        case "constant":
            return 1.0
        case "high_noise":
            return 2.0 * t
        case "low_noise":
            return 2.0 * (1.0 - t)


def _adapter_rows(task: AdapterTask, index: int, step: int, num_timesteps: int) -> Iterator[_Row]:
    training = task.training
    rows, total_weight = training.rows_of_step, sum(concept.weight for concept in task.concepts)
    cat_scale = _cat_scale(task, step)
    position = 0
    for k, concept in enumerate(task.concepts):
        key = (training.seed, task.draw_key, concept.token)
        views = views_of_step(key, step, rows, [(view.shape[1], view.shape[2]) for view in concept.moments])
        # Stratified over the concept's rows: each t is uniform, together they cover the schedule evenly.
        offset = keyed_generator(*key, step, "timestep").random()
        for r, view in enumerate(views):
            place = (offset + r) / rows % 1.0
            if task.pool_size is None:
                name = (*key, step, r)
                draw = _draw(task, concept, view, int(num_timesteps * place), name, keyed_generator(*name))
            else:
                draw = _pool_draw(task, concept, view, int(task.pool_size * place), num_timesteps)
            weight = concept.weight / total_weight / rows
            held = concept.alpha * weight * alpha_factor(training.alpha_schedule, (draw.timestep + 0.5) / num_timesteps)
            yield _Row(
                adapter=index,
                concept=k,
                draw=draw,
                mask=_mask(concept, view),
                identity_weight=weight,
                terms=_terms(concept, view, draw, held, cat_scale[position]),
            )
            position += 1


def _terms(concept: ConceptMaterial, view: int, draw: Draw, weight: float, cat_scale: float) -> tuple[_Term, ...]:
    terms = [_Term(draw, weight * cat_scale, outside=False)]
    if _mask(concept, view) is not None:
        terms.append(_Term(replace(draw, prior_prompt=draw.removed_prompt), weight, outside=True))
    return tuple(term for term in terms if term.weight > 0)


def _mask(concept: ConceptMaterial, view: int) -> Tensor | None:
    return concept.masks[view] if concept.masks else None


def _draw(
    task: AdapterTask,
    concept: ConceptMaterial,
    view: int,
    timestep: int,
    name: tuple[str | int, ...],
    generator: np.random.Generator,
) -> Draw:
    """Draw all but the timestep, with the generator of the key `name`."""
    moments = concept.moments[view]
    shape = (moments.shape[0] // 2, *moments.shape[1:])
    prompt, removed = _captions(task, concept, view, name)
    prior = _prior_prompt(task, concept, removed, generator)
    decoy = _decoy(task, concept, view, prompt, name)
    return Draw(
        pool_key=None,
        moments=moments,
        posterior_noise=_normal(generator, shape),
        noise=_normal(generator, shape) + _noise_offset(task, shape[0], name),
        timestep=timestep,
        prompt=prompt,
        removed_prompt=removed,
        prior_prompt=prior if decoy is None else decoy,
        sizes=concept.sizes[view],
    )


def _pool_draw(task: AdapterTask, concept: ConceptMaterial, view: int, entry: int, num_timesteps: int) -> Draw:
    """Entry m of a view's pool; its timestep lies in the m-th of M equal strata, so a row's place still decides it."""
    name = (task.training.seed, task.draw_key, concept.token, "pool", view, entry, task.pool_size or 0)
    generator = keyed_generator(*name)
    timestep = int(num_timesteps * (entry + generator.random()) / (task.pool_size or 1))
    drawn = _draw(task, concept, view, timestep, name, generator)
    # All that the base's prediction depends on beside the base and y; adapters on equal draws share their entries.
    content = (concept.digests[view], *concept.sizes[view], *name, timestep, task.training.noise_offset)
    return replace(drawn, pool_key="\x1f".join(str(part) for part in content))


def _cat_scale(task: AdapterTask, step: int) -> list[float]:
    """Return 1/p for the rows that carry the CAT term this step and 0 for the others.

    Only rows of concepts with alpha > 0 compete. Where p * candidates is whole, so many are chosen in every step; else
    the next whole number above or below, so that after any number of steps their share is p: with one row and p = 1/2
    every second step has the term.
    """
    training = task.training
    rows = [k for k in range(len(task.concepts)) for _ in range(training.rows_of_step)]
    candidates = [i for i, k in enumerate(rows) if task.concepts[k].alpha > 0]
    scale = [0.0] * len(rows)
    wanted = training.cat_fraction * len(candidates)
    count = _whole(wanted * (step + 1)) - _whole(wanted * step)
    for c in keyed_generator(training.seed, task.draw_key, step, "cat_rows").permutation(len(candidates))[:count]:
        scale[candidates[c]] = 1.0 / training.cat_fraction
    return scale


def _whole(value: float) -> int:
    return math.floor(value + 1e-6)  # a product that should be whole may come out a little below


def _captions(task: AdapterTask, concept: ConceptMaterial, view: int, name: tuple[str | int, ...]) -> tuple[str, str]:
    """The caption of a row with and without the token; what changes in it has a generator of its own, as decoys."""
    caption = concept.prompts[view]
    if not task.training.changes_captions:
        return caption, concept.removed_prompts[view]
    generator = keyed_generator(*name, "caption")
    changed = changed_caption(caption, concept.token, concept.class_noun, task.training, generator)
    return changed, remove_token(changed, concept.token)


def _prior_prompt(task: AdapterTask, concept: ConceptMaterial, removed: str, generator: np.random.Generator) -> str:
    u, general = generator.random(), int(generator.integers(max(1, len(task.general_prompts))))
    match task.training.prior_prompt:
        case "token_removed":
            return removed
        case "class_noun":
            return f"a photo of a {concept.class_noun}"
        case "empty":
            return ""
        case "mixture":
            if u < MIXTURE_TOKEN_REMOVED or not task.general_prompts:
                return removed
            return "" if u < MIXTURE_TOKEN_REMOVED + MIXTURE_EMPTY else task.general_prompts[general]


def _noise_offset(task: AdapterTask, channels: int, name: tuple[str | int, ...]) -> Tensor:
    """What is added to the noise of a row's channels, [C, 1, 1]: the offset times one normal draw for each.

    From crosslabs.org/blog/diffusion-with-offset-noise; with a generator of its own, as decoys.
    """
    if not task.training.noise_offset:
        return torch.zeros(channels, 1, 1)
    return task.training.noise_offset * _normal(keyed_generator(*name, "noise_offset"), (channels, 1, 1))


def _decoy(
    task: AdapterTask, concept: ConceptMaterial, view: int, prompt: str, name: tuple[str | int, ...]
) -> str | None:
    """The decoy of a row that has one: its caption with something else in the token's place.

    It has a generator of its own, so that a row's other draws are the same with decoys as without. A smaller share of
    decoys is a part of a larger one.
    """
    if not task.training.decoy_fraction or not concept.decoys:
        return None
    generator, decoys = keyed_generator(*name, "decoy"), concept.decoys[view]
    share, kind = generator.random(2)
    if share >= task.training.decoy_fraction:
        return None
    words = decoys.other_tokens if decoys.other_tokens and kind < OTHER_TOKENS else decoys.odd_words
    return replace_token(prompt, concept.token, words[generator.integers(len(words))])


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
