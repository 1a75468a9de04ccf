"""The messages between an ingress and an engine: plain, picklable values, whichever process each is in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from cat_cluster import errors
from cat_cluster.errors import CatClusterError, RegistryError
from cat_cluster.models.prompt_weights import Prompt
from cat_cluster.registry.stacks import StackMember, parse_stack
from cat_cluster.spec.choices import SamplerName, Weighting

AdminAction = Literal["load", "unload", "pin", "unpin", "prefetch", "probe", "release"]
FileKind = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class FileFormat:
    """How an image is written. quality: of JPEG and WebP, 0 (the smallest file) to 100; PNG loses nothing."""

    kind: FileKind = "png"
    quality: int = 100

    @property
    def media_type(self) -> str:
        """As it stands in headers and data URLs."""
        return f"image/{self.kind}"


@dataclass(frozen=True)
class Edit:
    """An image to edit, of the call's size. pixels: RGB, row by row.

    mask: a byte for each pixel, 1 where it is edited, else 0; None: all of it is.
    strength: the share of the steps that are made, in (0, 1].
    """

    pixels: bytes = field(repr=False)
    mask: bytes | None = field(repr=False)
    strength: float


@dataclass(frozen=True)
class ImageCall:
    """A request for `count` images of one stack of adapters: image i uses seed + i.

    adapters: whose changes add up, each at its strength; none: the base alone. size: (width, height) in pixels,
    None for the base's own. previews: partial images per image. deadline_s: seconds from now. progress: send Progress.
    gate: leave out adapters none of whose tokens the prompt has. file: the format of images and previews. weighting:
    how words of both prompts are weighted. prompt_chunks: how many chunks of each are read at most. edit: the image to
    begin with, of `size`, which is not None then; None: noise alone. trace: of what the call is a part, as W3C's
    headers say it.
    """

    request_id: str
    prompt: str
    adapters: tuple[StackMember, ...] = ()
    negative_prompt: str = ""
    count: int = 1
    size: tuple[int, int] | None = None
    seed: int = 0
    steps: int = 25
    guidance: float = 4.0
    sampler: SamplerName = "ddim"
    weighting: Weighting = "none"
    prompt_chunks: int = 1
    gate: bool = False
    previews: int = 0
    progress: bool = False
    deadline_s: float | None = None
    file: FileFormat = FileFormat()
    edit: Edit | None = None
    trace: Mapping[str, str] | None = field(default=None, compare=False)

    @property
    def prompts(self) -> tuple[Prompt, Prompt]:
        """The prompt and the negative one, with how they are read."""
        positive = Prompt(self.prompt, self.weighting, self.prompt_chunks)
        return positive, replace(positive, text=self.negative_prompt, negative=True)

    def pinned(self, model: str) -> ImageCall:
        """Return the call with the revisions in it that Accepted.model names, whatever its aliases name by then.

        Adapters that the gate leaves out are not among them, and stay as they are.
        """
        try:
            named = parse_stack(model) if self.adapters else ()
        except RegistryError:
            return self  # the name of the base: the gate left all of them out
        # That name may be an adapter's id too, without a revision.
        revisions = {one.adapter_id: one for one in named if one.revision is not None}
        return replace(
            self,
            adapters=tuple(
                replace(member, reference=revisions.get(member.reference.adapter_id, member.reference))
                for member in self.adapters
            ),
        )


@dataclass(frozen=True)
class Accepted:
    """The call is queued; `model` is what serves it (`id@r-...`, of a stack `id@r-...+id@r-...`, or the base's name).

    drift: the drift state of the revision ("ok", "warning", "alarm", "unknown"), of a stack the worst one. note: why a
    revision is another than requested, what of the prompts is not read, or not as it may be meant, and which previews
    are not sent, if so.
    """

    model: str
    drift: str = "unknown"
    note: str | None = None


@dataclass(frozen=True)
class Progress:
    """Image `index` has done `step` of `steps` denoising steps."""

    index: int
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A cheap image (a file's bytes) of image `index` after `step` of `steps`; `number` counts an image's previews."""

    index: int
    number: int
    step: int
    steps: int
    image: bytes


@dataclass(frozen=True)
class Verdict:
    """What the safety checker says of an image. flagged: None where it failed; label, score: the worst that it saw."""

    flagged: bool | None
    label: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Finished:
    """Image `index` is done: a file's bytes that carry its parameters. `facts`: waiting and denoising, batch sizes.

    safety: None where nothing checks images.
    """

    index: int
    seed: int
    image: bytes
    facts: Mapping[str, Any] = field(default_factory=dict)
    safety: Verdict | None = None


@dataclass(frozen=True)
class Failed:
    """The call ends here: `kind` is the name of a class in cat_cluster.errors, `message` says what to do."""

    kind: str
    message: str
    retry_after: float | None = None

    @classmethod
    def of(cls, error: CatClusterError) -> Failed:
        """Return an error as the event that ends a call."""
        return cls(type(error).__name__, str(error), getattr(error, "retry_after", None))

    def to_error(self) -> Exception:
        """Return the error again, of the same class; one that is not of our tree is a RuntimeError."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, CatClusterError)):
            return RuntimeError(f"{self.kind}: {self.message}")
        if issubclass(kind, errors.BusyError) and self.retry_after is not None:
            return kind(self.message, self.retry_after)
        return kind(self.message)


@dataclass(frozen=True)
class Refused:
    """Image `index` is done and kept back, for the reason of `failure`; the call goes on."""

    index: int
    seed: int
    failure: Failed


Event = Accepted | Progress | Preview | Finished | Refused | Failed


class EngineClient(Protocol):
    """An engine as an ingress sees it: in this process, or a Ray Serve deployment behind a handle."""

    def generate(self, call: ImageCall) -> AsyncIterator[Event]:
        """Yield Accepted, then events of the images, until each is Finished or Refused, or one Failed ends the call.

        Closing the iterator cancels what is left at the next step.
        """

    async def admin(self, action: AdminAction, reference: str) -> dict[str, Any]:
        """Act on an adapter in every engine; raises CatClusterError."""

    async def status(self) -> dict[str, Any]:
        """Return the engine's state as JSON; see Service.status."""

    async def sizes(self, wait_s: float) -> list[str]:
        """Return the sizes of images, as WxH, the base's own first; EngineStoppedError when no engine is there in time.

        As a call for images does, and unlike `status`, it waits for an engine, and starts one that sleeps.
        """

    async def metrics(self) -> bytes:
        """Return the engine's metrics in Prometheus' text format."""
