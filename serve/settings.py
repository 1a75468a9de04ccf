"""Settings of the service: one frozen document that `serve deploy`, the command line and tests all give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cat_cluster.models.prompt_weights import PROMPT_CHUNKS
from cat_cluster.spec.choices import DriftPolicy, Precision, ServedTargets, Weighting
from cat_cluster.spec.fields import MOST_CHUNKS


class ProbeSettings(BaseModel):
    """When adapters are probed for drift, and what an alarm does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="Probe adapters while serving.")
    share: float = Field(default=0.01, gt=0, le=0.5, description="Share of row-steps that probes are given under load.")
    live_share: float = Field(
        default=0.1, ge=0, le=1, description="Share of finished user images with a token that are probed."
    )
    canonical_every_s: float = Field(
        default=600.0, gt=0, description="Seconds between canonical probes of a resident adapter."
    )
    tolerance: float = Field(
        default=0.005, gt=0, description="Largest change of a canonical pair's score that is not a fault."
    )
    policy: DriftPolicy = Field(
        default="annotate",
        description="What an alarm does: annotate responses, fall back to the previous revision, or quarantine.",
    )


MAX_STACK = 32
SLEEP_AFTER_S = 1800.0  # two starts an hour at most: more look like engines that fail and are replaced


class SigningSettings(BaseModel):
    """With what images are signed: paths of files, for the key itself is in no setting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificates: Path = Field(
        description="PEM file of certificates: the signer's own, then each authority above it that is not a root."
    )
    key: Path = Field(description="PEM file of the private key of the first certificate, not encrypted.")
    time_stamps: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s/]+\S*$",
        description="Address of a time-stamping authority (RFC 3161), asked for each image; none: no time stamps.",
    )


class SafetySettings(BaseModel):
    """Which images are flagged, and what happens to them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path = Field(
        description="Local folder of a transformers image classification model: config.json, preprocessor_config.json "
        "and safetensors; no code of it is executed."
    )
    labels: tuple[str, ...] = Field(min_length=1, description="The model's labels that flag an image.")
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="Score from which on one of these labels flags an image."
    )
    action: Literal["refuse", "mark"] = Field(
        default="refuse",
        description="refuse: what is flagged, or cannot be checked, is not returned; mark: it is, and is said to be.",
    )


class ServeSettings(BaseModel):
    """How one service serves; every field has a default. API keys are secrets and come from CAT_API_KEYS alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str = Field(
        default="pocket",
        description="Base model: pocket, a diffusers folder or .safetensors checkpoint, here or under s3://, or a hub "
        "id.",
    )
    storage: str = Field(default="./cat-storage", description="Registry: a folder or an s3:// address.")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$", description="Device of the engine.")
    precision: Literal["auto", Precision] = Field(
        default="auto", description="Arithmetic of the base: auto is bf16 on a GPU and fp32 elsewhere."
    )
    compile: bool = Field(default=False, description="Compile the U-Net's blocks; swapping adapters compiles nothing.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the U-Net; none: all cores.")
    max_rows: int = Field(
        default=16, ge=2, le=256, description="Most U-Net rows in one call; a guided image takes two."
    )
    row_buckets: tuple[int, ...] | None = Field(
        default=None, description="Sizes a call is padded to; none: every even number on a CPU, a few on a GPU."
    )
    sizes: tuple[str, ...] | None = Field(
        default=None, description="Image sizes served, as WxH; none: the base's own, portrait and landscape."
    )
    slots: int = Field(default=16, ge=1, le=4096, description="Adapters held on the device at once.")
    max_rank: int = Field(
        default=32, ge=1, le=256, description="Largest rank of an adapter, or of the adapters of one image together."
    )
    max_stack: int = Field(default=8, ge=1, le=MAX_STACK, description="Most adapters of one image.")
    targets: ServedTargets = Field(
        default="all",
        description="Layers of the U-Net that adapters may change; all: every linear layer and 1x1 convolution.",
    )
    host_mib: int = Field(default=1024, ge=1, description="MiB of adapters kept in host memory.")
    disk_cache: Path | None = Field(default=None, description="Folder of downloaded adapters; none: no disk tier.")
    disk_mib: int = Field(default=4096, ge=1, description="MiB of adapters kept in the disk cache.")
    alias_ttl_s: float = Field(default=2.0, ge=0, description="Seconds after which an alias is looked up again.")
    missing_ttl_s: float = Field(default=5.0, ge=0, description="Seconds for which an unknown adapter stays unknown.")
    load_timeout_s: float = Field(default=30.0, gt=0, description="Longest wait for an adapter to load.")
    pins: tuple[str, ...] = Field(default=(), description="Adapters loaded at start and never evicted.")
    max_steps: int = Field(default=100, ge=1, le=1000, description="Most denoising steps of an image.")
    max_prompt_chunks: int = Field(
        default=PROMPT_CHUNKS,
        ge=1,
        le=MOST_CHUNKS,
        description="Most chunks of a prompt that are read; 1: its start alone.",
    )
    weighting: Weighting = Field(
        default="none",
        description="Of requests without it: `a1111` weights words as `(word:1.2)`, to `none` that is text.",
    )
    max_waiting: int = Field(
        default=256, ge=1, description="Images that may wait, beside those being drawn; one more is refused."
    )
    deadline_s: float = Field(default=120.0, gt=0, description="Seconds after which a request is given up.")
    stuck_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds without a step, while there is work, after which an engine is replaced; compiling counts.",
    )
    images_per_key: int = Field(default=64, ge=1, description="Images in flight of one API key, per ingress process.")
    requests_per_minute: int | None = Field(
        default=None, ge=1, description="Requests a minute of one API key, per ingress process; none: no limit."
    )
    max_body_bytes: int = Field(
        default=524288, ge=1024, description="Largest request body; the longest prompt fits, however it is escaped."
    )
    body_timeout_s: float = Field(default=10.0, gt=0, description="Seconds within which a request's body must arrive.")
    max_upload_bytes: int = Field(
        default=16 * 2**20, ge=1024, description="Largest body of an edit: its image, its mask and its fields."
    )
    upload_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds within which the body of an edit must arrive."
    )
    max_uploads: int = Field(
        default=16,
        ge=1,
        description="Edits and uploads of photos read at once, per ingress process; at most half of one API key.",
    )
    training: bool = Field(
        default=True,
        description="Take photos and runs over HTTP, for a training service that works on the same storage.",
    )
    max_photos_bytes: int = Field(
        default=128 * 2**20,
        ge=1024,
        description="Largest upload of photos to train with; unpacked they may have twice as much.",
    )
    photos_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds within which such an upload must arrive, and those it may be read."
    )
    max_photos: int = Field(
        default=400, ge=1, description="Most files of such an upload: photos, their masks and captions."
    )
    max_photo_pixels: int = Field(default=64_000_000, ge=1024, description="Most pixels of one of its photos.")
    max_files_per_key: int = Field(default=200, ge=1, description="Uploads that the storage keeps for one API key.")
    max_training_steps: int = Field(default=10_000, ge=1, description="Most steps of an adapter of a run over HTTP.")
    max_run_adapters: int = Field(default=64, ge=1, description="Most adapters of a run over HTTP.")
    training_sources: tuple[str, ...] = Field(
        default=(),
        description="Where a run over HTTP may have photos beside its uploads: prefixes as `s3://concepts/public`.",
    )
    max_event_streams: int = Field(
        default=64, ge=1, description="Streams of a job's events at once, per ingress process; at most half of one key."
    )
    show_photos: bool = Field(
        default=False, description="Show every caller the photos that adapters were taught with, not only admins."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Other sites, as `https://example.com`, whose pages may draw and read."
    )
    signing: SigningSettings | None = Field(
        default=None, description="Certificates and key that sign images with C2PA; none: images are not signed."
    )
    safety: SafetySettings | None = Field(
        default=None, description="Classifier that drawn images are checked with; none: images are not checked."
    )
    probes: ProbeSettings = Field(default=ProbeSettings(), description="Drift probes.")

    @field_validator("cors_origins")
    @classmethod
    def _name_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if split_origin(origin) is None or origin != origin.lower():
                raise ValueError(
                    f"{origin!r} is not the origin of a page: write scheme, host and, if it is not the scheme's own, "
                    "port, in small letters and without a path, as https://example.com or http://localhost:3000"
                )
        return origins

    @model_validator(mode="after")
    def _fits(self) -> ServeSettings:
        if len(self.pins) >= self.slots:
            raise ValueError(f"pins: {len(self.pins)} adapters cannot be pinned in {self.slots} slots; raise slots")
        if self.row_buckets is not None and (
            list(self.row_buckets) != sorted({*self.row_buckets}) or self.row_buckets[-1] != self.max_rows
        ):
            raise ValueError(f"row_buckets must rise and end at max_rows ({self.max_rows})")
        return self


class Deployment(BaseModel):
    """How many of each there are; everything else about a deployment is ServeSettings'."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: ServeSettings = Field(default=ServeSettings(), description="How each engine serves.")
    min_engines: int = Field(
        default=1, ge=0, description="Fewest engines; 0: the last one ends when nobody asks, and a request starts one."
    )
    max_engines: int | None = Field(
        default=None,
        ge=1,
        description="Most engines; more than the fewest means autoscaling. None: the fewest, and at least one.",
    )
    sleep_after_s: float | None = Field(
        default=None,
        ge=60,
        description="Seconds without a request after which the last engine ends, where min_engines is 0. None: 1800.",
    )
    ingresses: int = Field(default=1, ge=1, description="HTTP processes.")
    ingress_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Ray resources of an ingress, to keep it on nodes that have them; none: any node."
    )
    engine_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray sets aside for an engine.")
    engine_gpus: float = Field(default=0.0, ge=0, description="GPUs of an engine.")

    @model_validator(mode="after")
    def _rises(self) -> Deployment:
        if self.most_engines < self.min_engines:
            raise ValueError(f"max_engines must be at least min_engines ({self.min_engines})")
        if self.sleep_after_s is not None and not self.may_sleep:
            raise ValueError("sleep_after_s: no engine sleeps unless min_engines is 0; leave it out, or set that")
        return self

    @property
    def may_sleep(self) -> bool:
        """Whether there may be no engine."""
        return self.min_engines == 0

    @property
    def most_engines(self) -> int:
        """The most engines there may be."""
        return max(1, self.min_engines) if self.max_engines is None else self.max_engines


def split_origin(origin: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of `http[s]://host[:port]`, None for any other text, such as `null` and `*`."""
    try:
        parts = urlsplit(origin)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    is_whole = origin.lower() == f"{parts.scheme}://{parts.netloc}".lower() and "@" not in parts.netloc
    if port is None or not parts.hostname or not is_whole or "*" in parts.hostname:
        return None
    return parts.scheme, parts.hostname, port


def bad_settings(error: ValidationError, whole: str) -> list[str]:
    """Return what is wrong with each setting, after its path; `whole` stands for all where two do not go together."""
    return [
        f"{'.'.join(map(str, bad['loc'])) or whole}: {bad['msg'].removeprefix('Value error, ')}"
        for bad in error.errors()
    ]
