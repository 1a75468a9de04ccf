"""What the timing benchmarks share: tasks of drawn concepts, and variants timed turn by turn in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

from cat_cluster.data.crops import Size
from cat_cluster.data.draws import AdapterTask, ConceptMaterial, draw_batch
from cat_cluster.data.latents import TextCache
from cat_cluster.data.parts import step_parts
from cat_cluster.lora.bank import LoraBank, adapted_layers
from cat_cluster.models.base_model import BaseModel, compiled_blocks
from cat_cluster.models.conditioning import Sizes
from cat_cluster.spec.choices import Blocks
from cat_cluster.spec.sections import TrainingSpec
from cat_cluster.training.engine import TorchEngine, autocast
from cat_cluster.training.methods import initial_weights
from cat_cluster.training.step import train_step
from cat_cluster.training.teacher import TeacherPool

PHOTOS = 6
RANK = 8
OPTIMISER = TrainingSpec(learning_rate=2.0e-3, warmup_steps=20, steps=1000)
Step = Callable[[], None]


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed; the defaults are the reference: three calls, the teacher asked about every row."""

    alpha: float = 3.0
    joint_rows: bool = False
    fraction: float = 1.0
    pool_size: int | None = None
    blocks: Blocks = "all"
    bf16: bool = False
    compile: bool = False


SPEC_DEFAULTS = StepOptions(alpha=5.0, joint_rows=True, fraction=0.5)  # the spec's defaults


PLAIN_LORA = StepOptions(alpha=0.0)


def concept_task(
    base: BaseModel, name: str, rows: int, options: StepOptions, sizes: Sequence[Size] | None = None
) -> AdapterTask:
    """Return the task of one concept with six made-up photos: a step's time does not depend on what they show.

    sizes: of the photos' crops, in pixels; by default the base's own square.
    """
    generator = torch.Generator().manual_seed(len(name))
    sizes = [Size.square(base.resolution)] * PHOTOS if sizes is None else sizes
    latents = [(side.height // base.pixels_per_latent, side.width // base.pixels_per_latent) for side in sizes]
    places = ("on grass", "on sand", "in snow", "at night", "at sunset", "on a table")
    concept = ConceptMaterial(
        token="sks",
        class_noun="cup",
        alpha=options.alpha,
        weight=1.0,
        moments=tuple(torch.randn(2 * base.latent_channels, *shape, generator=generator) for shape in latents),
        prompts=tuple(f"a photo of a sks cup {place}" for place in places),
        removed_prompts=tuple(f"a photo of a cup {place}" for place in places),
        sizes=tuple(Sizes.drawn(size.height, size.width) for size in sizes),
    )
    pool = {} if options.pool_size is None else {"teacher": "pool", "pool_size": options.pool_size}
    changes = {
        "rows_per_concept": rows,
        "cat_fraction": options.fraction,
        "joint_rows": options.joint_rows,
        "precision": "bf16" if options.bf16 else "fp32",
    }
    training = OPTIMISER.model_copy(update={**changes, **pool})
    return AdapterTask(name, (concept,), training, base.general_prompts())


@contextmanager
def pack_step(
    base: BaseModel, tasks: Sequence[AdapterTask], options: StepOptions, pool: TeacherPool | None = None
) -> Iterator[Step]:
    """Open a pack and give a function that does one whole step of it: draws, predictions, backward, optimiser.

    The teacher's pool is filled before, as training does; one that is given keeps what it knows from turn to turn.
    """
    layers = adapted_layers(base.unet, "attention_ff", options.blocks)
    bank = LoraBank.attach(base.unet, layers=layers)
    with ExitStack() as stack:
        stack.callback(bank.detach)
        if options.compile:
            stack.enter_context(compiled_blocks(base.unet))
        for slot, task in enumerate(tasks, start=1):
            bank.new_trainable(slot, initial_weights(base.unet, layers, rank=RANK, seed=0, draw_key=task.draw_key))
        slots = [(bank.named_parameters(slot), task.training) for slot, task in enumerate(tasks, start=1)]
        engine = TorchEngine(base, slots, (), options.bf16)
        trainings = [task.training for task in tasks]
        encode, steps = TextCache(base), count()
        pool = TeacherPool() if pool is None else pool
        pool.fill(base, bank, encode, tasks, partial(autocast, base, bf16=options.bf16))

        def step() -> None:
            batch = draw_batch(tasks, [next(steps)] * len(tasks), base.schedule.num_timesteps)
            for part in step_parts(batch, [training.accumulate for training in trainings], 0, 1):
                train_step(base, bank, encode, part.batch, trainings, engine, pool)
            engine.step()
            synchronise(base)

        yield step


def synchronise(base: BaseModel) -> None:
    """Wait for the device, so that a clock read after it has seen the work."""
    if base.device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Step, times: int) -> float:
    """Return the seconds that one of `times` runs of `work` took, in the mean."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


@dataclass(frozen=True)
class Timed:
    """Seconds of one variant in each turn; turns of all variants alternate, so that a slow minute hits all alike."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle turn, seconds."""
        return statistics.median(self.turns)

    def ratio(self, other: Timed) -> float:
        """Return the median over turns of this variant's time over the other's in the same turn."""
        return statistics.median(a / b for a, b in zip(self.turns, other.turns, strict=True))


def take_turns(variants: Mapping[str, Callable[[], float]], turns: int) -> dict[str, Timed]:
    """Let every variant measure itself once per turn (the first turn warms up and is not counted)."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, measure in variants.items():
            seconds = measure()
            if turn > 0:
                found[name].append(seconds)
    return {name: Timed(tuple(times)) for name, times in found.items()}
