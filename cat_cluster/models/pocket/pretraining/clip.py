"""Training of Pocket-SD's CLIP, whose text half is the text encoder and whose whole is the judge."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from cat_cluster.models.pocket import world
from cat_cluster.models.pocket.classifier import LABELS
from cat_cluster.models.pocket.clip import text_transformer
from cat_cluster.models.pocket.pretraining.captions import scene_caption
from cat_cluster.models.pocket.pretraining.recipe import Recipe
from cat_cluster.models.pocket.pretraining.scenes import (
    label_indices,
    masked_cross_entropy,
    random_scenes,
    render,
    scene_labels,
)
from cat_cluster.models.pocket.pretraining.stage import (
    Stage,
    StageProgress,
    learning_rate_at,
    optimise,
    run_stage,
    update_average,
)

# The judge takes pixels in [0, 1] normalised with these, as a CLIPImageProcessor config says beside the weights.
IMAGE_MEAN = 0.5
IMAGE_STD = 0.5


def new_clip(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP for 64 px pictures and the world's vocabulary."""
    shared = {
        "hidden_size": recipe.clip_width,
        "intermediate_size": 4 * recipe.clip_width,
        "num_attention_heads": recipe.clip_heads,
        "projection_dim": recipe.clip_width,
        "hidden_act": "quick_gelu",
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": recipe.clip_text_layers,
        "max_position_embeddings": recipe.text_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**shared, "num_hidden_layers": recipe.clip_vision_layers, "image_size": world.SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=recipe.clip_width))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [N, L], padded and cut to the model's length exactly as the stock pipeline does."""
    batch = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return torch.as_tensor(batch["input_ids"])


def train_clip(
    recipe: Recipe,
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    stage: Stage,
) -> tuple[CLIPModel, StageProgress]:
    """Train the vision half against the frozen text half: InfoNCE, and linear heads that ask for every attribute.

    Contrast alone is content with colour and place; the heads make the judge see shape, pattern and eyes as well.
    """
    device, seed = stage.device, stage.seed
    torch.manual_seed(seed)
    scenes = random_scenes(recipe.scenes, seed)
    frames = render(scenes)
    truth = label_indices([scene_labels(scene) for scene in scenes])
    groups = [torch.nonzero(truth["place"] == place)[:, 0].numpy() for place in range(len(world.PLACES))]
    model = model.to(device).train()
    model.text_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # twice as fast as the fused kernel on a CPU at this size
    heads = nn.ModuleDict({name: nn.Linear(recipe.clip_width, len(of)) for name, of in LABELS.items()}).to(device)
    average = copy.deepcopy(model)
    parts = nn.ModuleList([model, heads])
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=recipe.clip_rate, betas=(0.9, 0.98), weight_decay=0.02)

    def step(index: int, progress: float) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, index])
        rows = _batch_rows(groups, len(frames), recipe.clip_batch, rng)
        texts = [scene_caption(scenes[row], rng, rare=0.3) for row in rows]
        pixels = _augment(frames[rows].float() / 255, rng).to(device)
        with torch.autocast(device, torch.bfloat16):
            images = _image_features(model, pixels)
            loss = _contrast(
                model, images, _text_features(model, trim_padding(tokenize(tokenizer, texts), tokenizer)), texts
            )
        for name, head in heads.items():
            loss = loss + 0.5 * masked_cross_entropy(head(images * 10), truth[name][rows].to(device))
        optimise(loss, parts, optimiser, learning_rate_at(progress, recipe.clip_rate, warm_up=0.05))
        update_average(average, model, 0.995, index)
        return loss

    state = {"model": model, "average": average, "heads": heads, "optimiser": optimiser}
    ended = run_stage(stage, recipe.clip_steps, state, step)
    return average.eval(), ended


@torch.no_grad()
def embed_images(model: CLIPModel, pixels: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Normalised image features [N, D] of pixels [N, 3, 64, 64] in [0, 1]."""
    device = next(model.parameters()).device
    return torch.cat(
        [_image_features(model, pixels[i : i + batch].to(device)).cpu() for i in range(0, len(pixels), batch)]
    )


@torch.no_grad()
def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Normalised text features [N, D]."""
    device = next(model.parameters()).device
    return _text_features(model, tokenize(tokenizer, texts).to(device)).cpu()


def _image_features(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    pooled = model.vision_model(pixel_values=(pixels - IMAGE_MEAN) / IMAGE_STD).pooler_output
    return functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def _text_features(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    pooled = model.text_model(input_ids=ids).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def trim_padding(ids: torch.Tensor, tokenizer: CLIPTokenizer) -> torch.Tensor:
    """The ids without the columns where all are padding: causal attention lets nothing that is pooled see them."""
    return ids[:, : int((ids != tokenizer.pad_token_id).sum(1).max()) + 1]


def _batch_rows(groups: list[np.ndarray], count: int, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Half of a batch from one place: negatives that the place cannot tell apart."""
    place = groups[int(rng.integers(len(groups)))]
    near = rng.choice(place, size=batch // 2) if len(place) else rng.integers(count, size=batch // 2)
    return np.concatenate([near, rng.integers(count, size=batch - batch // 2)])


def _contrast(model: CLIPModel, images: torch.Tensor, captions: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """InfoNCE both ways, equal captions masked out of the negatives."""
    logits = images @ captions.T * model.logit_scale.exp().clamp(max=100)
    names = np.array(texts)
    equal = torch.from_numpy(names[:, None] == names[None, :]).to(images.device)
    equal.fill_diagonal_(False)
    logits = logits.masked_fill(equal, -1e4)
    target = torch.arange(len(texts), device=images.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def _augment(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A third each as they are, slightly blurred, and noisy: generated pictures are never pixel-perfect."""
    kind = torch.from_numpy(rng.integers(3, size=(len(pixels), 1, 1, 1)))
    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), dtype=np.float32)) * 0.03
    return torch.where(kind == 1, blurred, torch.where(kind == 2, pixels + noise, pixels)).clamp(0, 1)


def save_judge(model: CLIPModel, folder: Path) -> None:
    """Write all of the CLIP but its text half, fp16, and how pictures are normalised; the base ships the text half."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("text_model.") and tensor.is_floating_point()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": world.SIZE, "width": world.SIZE},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [IMAGE_MEAN] * 3,
        "image_std": [IMAGE_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")


def text_encoder(model: CLIPModel) -> CLIPTextModel:
    """The text half, as the diffusers pipeline takes it (a copy)."""
    encoder = CLIPTextModel(model.config.text_config)
    text_transformer(encoder).load_state_dict(text_transformer(model.text_model).state_dict())
    return encoder.eval()
