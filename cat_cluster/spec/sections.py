"""The sections of a job spec that say how to train, measure, watch and spread the work; every field has a default."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from cat_cluster.spec.choices import (
    AlphaSchedule,
    Blocks,
    LearningRateSchedule,
    OptimizerName,
    Precision,
    PriorPrompt,
    SamplerName,
    Targets,
)
from cat_cluster.spec.fields import (
    MOST_CHUNKS,
    BlockFactors,
    Conditions,
    Count,
    Fraction,
    NameOrFolder,
    NotNegative,
    PackSize,
    Pixels,
    Positive,
    Prompts,
    PromptsFile,
    PublishedAdapter,
    Seed,
    Share,
    Text,
    Whole,
    Workers,
)
from cat_cluster.spec.yaml_file import FieldError


class Section(BaseModel):
    """A part of a spec: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, str_strip_whitespace=True, validate_default=False
    )

    @classmethod
    def refuse(cls, errors: Iterable[FieldError]) -> None:
        """Raise the errors as one validation error, each at its own place below the section; no errors raise none."""
        details = [
            InitErrorDetails(type=PydanticCustomError("refused", "{text}", {"text": text}), loc=place, input=None)
            for place, text in errors
        ]
        if details:
            raise ValidationError.from_exception_data(cls.__name__, details)


class TextEncoderSpec(Section):
    """How an adapter trains layers of the text encoders beside those of the U-Net."""

    learning_rate: Positive | None = Field(
        default=None,
        le=1.0e30,
        description="Highest learning rate of text encoders' layers; none means training.learning_rate.",
    )


class TrainingSpec(Section):
    """How adapters are trained; every field has a default, so a part of it is a whole spec too."""

    steps: Count = Field(default=300, description="Optimiser steps.")
    rank: Count = Field(default=8, description="Rank of the LoRA weights.")
    optimizer: OptimizerName = Field(
        default="adamw",
        description="AdamW, Adafactor, or Prodigy, which finds its step size; the last two need a rate.",
    )
    init_from: PublishedAdapter | None = Field(
        default=None,
        description="Published adapter to train on from, of the same base and rank: id, id@alias or id@revision; none "
        "starts anew.",
    )
    learning_rate: Positive = Field(
        default=2.0e-3,
        le=1.0e30,
        description="Highest learning rate: adafactor's is relative to each matrix's size, prodigy's scales the one it "
        "finds. A float32 step must hold it.",
    )
    block_lr_weights: BlockFactors | None = Field(
        default=None,
        description="Factors on the learning rate of the U-Net's blocks down, mid and up, as in {down: 0.5}; those not "
        "named have 1.",
    )
    rows_per_concept: Count = Field(default=4, description="Rows of a U-Net call that each concept gets.")
    accumulate: Count = Field(
        default=1,
        description="U-Net calls of a step, whose gradients add up: as many times the rows, in the memory of one call.",
    )
    prior_prompt: PriorPrompt = Field(
        default="mixture", description="Prompts on which the CAT term holds the adapter to the base model."
    )
    decoy_fraction: Share = Field(
        default=0.0,
        description="Share of the CAT rows whose prior prompt is a decoy: the caption with another odd word, or "
        "another token of the adapter, in the token's place.",
    )
    general_prompts: PromptsFile | None = Field(
        default=None, description="Text file with one prompt a line for the mixture; none means the base model's own."
    )
    caption_dropout: Share = Field(
        default=0.0,
        description="Share of the rows whose caption is cut down to token and class noun.",
    )
    tag_dropout: Share = Field(
        default=0.0,
        description="Share of a caption's tags, parted by commas, that a row leaves out; never one with the token or a "
        "word of the class noun.",
    )
    shuffle_tags: bool = Field(
        default=False,
        description="Put a caption's tags into another order in each row; one with the token or a word of the class "
        "noun stays where it is.",
    )
    keep_tags: Whole = Field(
        default=0, description="First tags of a caption that are never left out or moved, as kohya's keep_tokens."
    )
    prompt_chunks: Count = Field(
        default=1,
        le=MOST_CHUNKS,
        description="Chunks, each as long as the text encoder reads at once, that are read of a caption or prior "
        "prompt at most; what is behind them is cut off.",
    )
    targets: Targets = Field(default="attention_ff", description="Which linear layers of the U-Net are adapted.")
    blocks: Blocks = Field(
        default="all",
        description="Which blocks of the U-Net are adapted; the backward stops below the first adapted layer.",
    )
    text_encoder: TextEncoderSpec | None = Field(
        default=None,
        description="Adapt the text encoders too, as in {learning_rate: 1.0e-3}; {} does so at the U-Net's rate, none "
        "leaves them alone.",
    )
    lr_schedule: LearningRateSchedule = Field(
        default="cosine", description="Course of the learning rate after warm-up; linear and cosine fall to 0."
    )
    warmup_steps: Whole | None = Field(
        default=None,
        description="Steps in which the learning rate rises from 0, fewer than steps; none means a fifteenth of them.",
    )
    weight_decay: NotNegative = Field(
        default=0.01, description="Decoupled weight decay: each step takes learning rate times it off the weights."
    )
    max_grad_norm: Positive | None = Field(
        default=1.0, description="Largest gradient norm of one adapter, clipped per slot; none means no clipping."
    )
    ema: Share | None = Field(
        default=None,
        gt=0,
        description="Decay of a moving average of the weights over the steps, which becomes the adapter; none means "
        "the last weights.",
    )
    noise_offset: NotNegative = Field(
        default=0.0,
        description="Size of a random shift of each latent channel's noise, so that very dark and bright images are "
        "learned; 0.05 to 0.1 is usual.",
    )
    min_snr_gamma: Positive | None = Field(
        default=None, description="Gamma of min-SNR weighting; none weighs all timesteps alike."
    )
    cat_fraction: Fraction = Field(
        default=0.5, description="Share of rows that carry the CAT term, at weight 1 / share."
    )
    alpha_schedule: AlphaSchedule = Field(
        default="constant",
        description="How alpha depends on the timestep: the same everywhere, rising with the noise from 0 to twice "
        "alpha, or falling with it.",
    )
    drift_budget: Positive | None = Field(
        default=None,
        description="Share of the identity loss that the CAT loss is held to by adjusting alpha; none keeps alpha.",
    )
    teacher: Literal["online", "pool"] = Field(
        default="online",
        description="The base model predicts in every step, or once for a pool of fixed draws that all rows use.",
    )
    pool_size: Count = Field(default=64, description="Fixed draws per crop of a photo when teacher is pool.")
    joint_rows: bool = Field(default=True, description="Predict rows with and without the token in one U-Net call.")
    precision: Precision = Field(default="fp32", description="Arithmetic of the U-Net calls.")
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations: less memory, more time.")
    compile: bool = Field(
        default=False, description="Compile the U-Net's blocks with torch.compile; needs a compiler, pays on a GPU."
    )
    resolution: Pixels | None = Field(
        default=None,
        description="Side of the square crops in pixels, a multiple of 8 (with aspect_buckets, of the base's own step, "
        "64 for Stable Diffusion); none means the base model's own.",
    )
    aspect_buckets: bool = Field(
        default=False,
        description="Crop each photo to the size nearest to its own shape, of at most the pixels of a square crop.",
    )
    masked_loss: bool = Field(
        default=False,
        description="Learn only what each photo's mask marks (1-mask.png beside 1.jpg, or its own transparency), and "
        "hold the rest of the picture to the base model.",
    )
    crops_per_image: Count = Field(
        default=1, description="Crops of each photo: 1 is the centre; more adds random ones."
    )
    seed: Seed = Field(default=0, description="Seed of every random draw of the training.")
    draw_key: Text | None = Field(
        default=None,
        description="Name that keys the draws beside the seed; none means the adapter's id. Adapters with the same "
        "one see equal draws, for paired comparisons.",
    )

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises: those given, else a fifteenth of all."""
        return self.steps // 15 if self.warmup_steps is None else self.warmup_steps

    @property
    def changes_tags(self) -> bool:
        """Whether rows leave out tags of their captions, or have them in another order."""
        return self.tag_dropout > 0 or self.shuffle_tags

    @property
    def changes_captions(self) -> bool:
        """Whether captions differ from row to row."""
        return self.caption_dropout > 0 or self.changes_tags

    @property
    def rows_of_step(self) -> int:
        """Rows of an optimiser step that each concept gets, in all its calls together."""
        return self.rows_per_concept * self.accumulate

    @property
    def bf16(self) -> bool:
        """Whether the U-Net calls run under autocast to bfloat16."""
        return self.precision == "bf16"


class EvaluationSpec(Section):
    """How a trained adapter is measured."""

    enabled: bool = Field(default=True, description="Measure the adapter after training.")
    prompts: Prompts = Field(
        default="default", description="Evaluation prompts, each with {} where the subject goes, or default."
    )
    images_per_prompt: Count = Field(default=4, description="Seeds per prompt and arm.")
    steps: Count = Field(default=25, description="Denoising steps of each image.")
    guidance: NotNegative = Field(default=4.0, description="Classifier-free guidance scale; up to 1 means none.")
    sampler: SamplerName = Field(default="ddim", description="Sampler of each image.")
    judge: NameOrFolder = Field(
        default="auto",
        description="Model that measures similarity: auto, pocket, pocket-classifier, a CLIP folder or hub id.",
    )
    seed: Seed = Field(default=1000, description="First seed of the evaluation images.")
    require: Conditions | None = Field(
        default=None,
        description='Gates, metric to condition, as in {kps: ">=0.1", base_drift: "<=0.12"}; an adapter that fails '
        "one is stored as rejected, without alias.",
    )


class ClusterSpec(Section):
    """How the work is spread; none of it changes the adapters."""

    workers: Workers = Field(default=1, description="Workers per pack, or [least, most] for an elastic number.")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        default=None,
        description="DeepSpeed ZeRO stage: 3 shards the base over the workers; none is plain data-parallel torch.",
    )
    max_pack: PackSize = Field(
        default="auto", description="Most adapters trained together in one forward; auto measures what memory allows."
    )
    max_failures: Whole = Field(default=3, description="Lost workers that a pack survives before it counts as failed.")
    checkpoint_every: Count = Field(default=50, description="The most steps that an interruption may cost.")


class MonitoringSpec(Section):
    """What is recorded while training, beside the metrics; none of it changes the adapters."""

    tensorboard: bool = Field(default=False, description="Write TensorBoard event files into the run's folder.")
    samples_every: Count | None = Field(
        default=None, description="Steps between sample grids of every adapter; none draws none."
    )


SECTIONS: Mapping[str, type[Section]] = {
    "training": TrainingSpec,
    "text_encoder": TextEncoderSpec,
    "cluster": ClusterSpec,
    "evaluation": EvaluationSpec,
    "monitoring": MonitoringSpec,
}
