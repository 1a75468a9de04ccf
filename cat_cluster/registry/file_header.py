"""What an adapter's file says of itself: the `ss_*` keys of kohya's trainer and the `modelspec.*` keys of ModelSpec.

ComfyUI, AUTOMATIC1111, InvokeAI and the sites that collect adapters show them. Only what is known is said, and nothing
of when or where the file was written: the same adapters make the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cat_cluster.registry.manifest import AdapterDraft, Manifest

if TYPE_CHECKING:
    from cat_cluster.lora.formats import AdapterWeights

# Width of the text that cross-attention reads -> the family's name in ModelSpec, and in kohya's trainer.
_FAMILIES: Mapping[tuple[int | None, bool], tuple[str, str | None]] = {
    (768, False): ("stable-diffusion-v1", "sd_v1"),
    (768, True): ("stable-diffusion-v1", "sd_v1_v"),
    (1024, False): ("stable-diffusion-v2-512", "sd_v2"),
    (1024, True): ("stable-diffusion-v2-768-v", "sd_v2_v"),
    (2048, False): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    (2048, True): ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
}
_PHOTO = re.compile(r"photo-(\d+)-\d+\.png")  # names as pipeline/publish.py gives them


@dataclass(frozen=True)
class FileSubject:
    """One adapter of a file. concepts: (token, class noun, number of photos); settings: its training's, where known.

    record: what its manifest keeps of the training.
    """

    name: str
    base_name: str
    concepts: tuple[tuple[str, str, int], ...]
    settings: Mapping[str, Any]
    record: Mapping[str, Any]

    @classmethod
    def of_draft(cls, draft: AdapterDraft, revision: str) -> FileSubject:
        """Describe what is about to be published as `revision`."""
        resolved = draft.resolved
        return cls(
            name=f"{draft.adapter_id}@{revision}",
            base_name=draft.base_name,
            concepts=_concepts(((one.token, one.class_noun) for one in resolved.concepts), draft.samples),
            settings=resolved.model_dump(mode="json").get("training", {}),
            record=draft.training,
        )

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> FileSubject:
        """Describe a published adapter."""
        return cls(
            name=manifest.name,
            base_name=manifest.base_name,
            concepts=_concepts(((one.token, one.class_noun) for one in manifest.concepts), manifest.objects),
            settings=manifest.spec.get("training", {}),
            record=manifest.training,
        )


def shown_metadata(subjects: Sequence[FileSubject], weights: AdapterWeights, output_name: str) -> dict[str, str]:
    """Return the keys that other programs show of a file with these adapters summed, `weights`, for its header.

    The hashes are not among them: they are of the file's own tensors, and to_safetensors adds them.
    """
    first = subjects[0]
    concepts = [concept for subject in subjects for concept in subject.concepts]
    tokens = ", ".join(dict.fromkeys(token for token, _, _ in concepts))
    v_prediction = bool(first.record.get("prediction_type") == "v_prediction")
    architecture, version = _FAMILIES.get((_text_width(weights), v_prediction), (first.base_name, None))
    found: dict[str, Any] = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "+".join(subject.name for subject in subjects),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.trigger_phrase": tokens,
        "ss_output_name": output_name,
        "ss_sd_model_name": first.base_name,
        "ss_base_model_version": version,
        "ss_v2": None if version is None else str(version.startswith("sd_v2")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": weights.rank,
        "ss_network_alpha": float(weights.rank),
        "ss_tag_frequency": json.dumps(
            {f"1_{token} {noun}": {f"{token} {noun}": n or 1} for token, noun, n in concepts}
        ),
        "ss_num_train_images": sum(count for _, _, count in concepts) or None,
    }
    if "prediction_type" in first.record:
        found["modelspec.prediction_type"] = "v" if v_prediction else "epsilon"
    if len(subjects) > 1:
        found["modelspec.merged_from"] = ", ".join(subject.name for subject in subjects)
    elif first.settings:
        found |= _of_training(first)
    return {name: str(value) for name, value in found.items() if value is not None}


def _of_training(subject: FileSubject) -> dict[str, Any]:
    settings, side = subject.settings, subject.record.get("resolution")
    rate, of_text = settings.get("learning_rate"), settings.get("text_encoder")
    return {
        "modelspec.resolution": None if side is None else f"{side}x{side}",
        "ss_resolution": None if side is None else f"({side}, {side})",
        "ss_enable_bucket": settings.get("aspect_buckets", False),
        "ss_steps": settings.get("steps"),
        "ss_max_train_steps": settings.get("steps"),
        "ss_learning_rate": rate,
        "ss_text_encoder_lr": None if of_text is None else of_text.get("learning_rate") or rate,
        "ss_lr_scheduler": settings.get("lr_schedule"),
        "ss_optimizer": settings.get("optimizer", "adamw"),
        "ss_seed": settings.get("seed"),
        "ss_min_snr_gamma": settings.get("min_snr_gamma"),
        "ss_noise_offset": settings.get("noise_offset") or None,
        # Not ss_caption_dropout_rate: there captions are dropped whole, and here cut down to token and class noun.
        "ss_caption_tag_dropout_rate": settings.get("tag_dropout") or None,
        "ss_shuffle_caption": settings.get("shuffle_tags") or None,
        "ss_keep_tokens": settings.get("keep_tags") or None,
    }


def _concepts(named: Iterable[tuple[str, str]], objects: Iterable[str]) -> tuple[tuple[str, str, int], ...]:
    of_concept = [int(match[1]) for name in objects if (match := _PHOTO.fullmatch(name))]
    return tuple((token, noun, of_concept.count(k)) for k, (token, noun) in enumerate(named))


def _text_width(weights: AdapterWeights) -> int | None:
    keys = (layer for name, layer in weights.layers.items() if name.endswith("attn2.to_k"))
    return next((layer.down.shape[1] for layer in keys), None)
