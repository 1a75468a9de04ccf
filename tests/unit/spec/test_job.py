"""Job specs: every bad field is named in one error, overrides merge key by key, digests are canonical."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from cat_cluster.errors import SpecError
from cat_cluster.spec.concept import DEFAULT_ALPHA, ConceptSpec
from cat_cluster.spec.job import (
    AdapterSpec,
    ClusterSpec,
    EvaluationSpec,
    JobSpec,
    ResolvedAdapter,
    TrainingSpec,
    load_spec,
    spec_json_schema,
)

SPECS = Path(__file__).parents[3] / "jobs" / "specs"
Document = dict[str, Any]


def minimal() -> Document:
    return {
        "name": "spring",
        "adapters": [{"id": "cup", "concepts": [{"token": "sks", "class_noun": "cup", "images": "photos"}]}],
    }


def with_value(document: Document, path: tuple[str | int, ...], value: object) -> Document:
    changed = copy.deepcopy(document)
    target: Any = changed
    for part in path[:-1]:
        target = target.setdefault(part, {}) if isinstance(part, str) else target[part]
    target[path[-1]] = value
    return changed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path


def write(folder: Path, document: Document | str) -> Path:
    path = folder / "job.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
    return path


def refusal(folder: Path, document: Document | str) -> str:
    path = write(folder, document)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def test_minimal_spec_has_the_documented_defaults(folder: Path) -> None:
    job = load_spec(write(folder, minimal()))
    (adapter,) = job.resolved()
    assert (adapter.id, adapter.base, adapter.method) == ("cup", "pocket", "cat")
    assert adapter.training == TrainingSpec()
    assert adapter.evaluation == EvaluationSpec()
    assert adapter.concepts[0].alpha == DEFAULT_ALPHA
    assert adapter.concepts[0].images == str(folder / "photos")
    assert job.storage is None


def test_every_bad_field_is_listed_with_its_path_and_line(folder: Path) -> None:
    message = refusal(
        folder,
        """\
name: spring
bass: pocket
adapters:
  - id: cup
    concepts:
      - {token: sks, class_noun: cup, images: photos}
      - {token: "a b", class_noun: cup, images: nowhere, alpha: .nan}
  - id: cup
    concepts:
      - {class_noun: fish, images: photos}
    training: {stepz: 3, rank: 0}
training: {learning_rate: quick, rows_per_concept: 1.5}
training: {steps: true}
""",
    )
    lines = message.splitlines()[1:]
    found = {line.split(" (line ")[0].strip(): line for line in lines}
    assert set(found) == {
        "bass",
        "adapters[0].concepts[1].token",
        "adapters[0].concepts[1].images",
        "adapters[0].concepts[1].alpha",
        "adapters[1].id",
        "adapters[1].concepts[0].token",
        "adapters[1].training.stepz",
        "adapters[1].training.rank",
        "training",
        "training.steps",
    }
    assert "(line 2)" in found["bass"]
    assert "did you mean base?" in found["bass"]
    assert "'a b' must be one word" in found["adapters[0].concepts[1].token"]
    assert str(folder / "nowhere") in found["adapters[0].concepts[1].images"]
    assert "finite" in found["adapters[0].concepts[1].alpha"]
    assert "taken by adapters[0].id" in found["adapters[1].id"]
    assert "is missing" in found["adapters[1].concepts[0].token"]
    assert "did you mean steps?" in found["adapters[1].training.stepz"]
    assert "greater than or equal to 1, got 0" in found["adapters[1].training.rank"]
    assert "lines 12 and 13" in found["training"]
    assert "must be a number, got true" in found["training.steps"]
    assert lines == sorted(lines, key=lambda line: int(line.split("(line ")[1].split(")")[0]))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("method",), "dreambooth", "not available in this version; available: cat, lora"),
        (("method",), "textual_inversion", "not available in this version"),
        (("method",), "kat", "'cat' or 'lora'"),
        (("adapters", 0, "method"), "dreambooth", "not available in this version"),
        (("adapters", 0, "id"), "Cup", "adapters[0].id"),
        (("adapters", 0, "id"), "-cup", "adapters[0].id"),
        (("adapters", 0, "id"), "c" * 64, "adapters[0].id"),
        (("adapters", 0, "id"), "cup\n", None),
        (("adapters",), [], "adapters"),
        (("adapters",), {"id": "cup"}, "must be a list"),
        (("adapters", 0, "concepts"), [], "adapters[0].concepts"),
        (("adapters", 0, "training"), 3, "must be keys with values, got 3"),
        (("training",), None, "must be keys with values, got nothing"),
        (("steps",), 3, "steps belongs under training"),
        (("training", "alpha"), 3, "alpha belongs under concepts"),
        (("training", "zzzzz"), 3, "allowed here: steps, rank"),
        (("adapters", 0, "concepts", 0, "token"), 12, "write it in quotes"),
        (("adapters", 0, "concepts", 0, "token"), "a,b", "one word"),
        (("adapters", 0, "concepts", 0, "token"), "", "adapters[0].concepts[0].token"),
        (("adapters", 0, "concepts", 0, "token"), "{x}", "braces"),
        (("adapters", 0, "concepts", 0, "token"), "Cup", "a word of the class noun 'cup'"),
        (("adapters", 0, "concepts", 0, "class_noun"), "tea sks", "concepts[0].token (line"),
        (("adapters", 0, "concepts", 0, "class_noun"), ",", "class_noun"),
        (("adapters", 0, "concepts", 0, "token"), "photo", "an ordinary word of the prior prompt"),
        (("adapters", 0, "concepts", 0, "alpha"), -1, "greater than or equal to 0"),
        (("adapters", 0, "concepts", 0, "weight"), 0, "greater than 0"),
        (
            ("adapters", 0, "concepts", 0, "images"),
            "gs://bucket/cup",
            "not supported: images lie in a folder or under s3://",
        ),
        (("adapters", 0, "concepts", 0, "template"), "a photo of a cup", "must hold {token}"),
        (("adapters", 0, "concepts", 0, "template"), "a {token}-ish cup", "as a word of its own"),
        (("adapters", 0, "concepts", 0, "template"), "a {token} {noun}", "'{noun}' is not a place"),
        (("adapters", 0, "concepts", 0, "template"), "sks or {token}", "ordinary word of the prior prompt"),
        (("training", "learning_rate"), 0, "greater than 0"),
        (("training", "learning_rate"), float("inf"), "finite"),
        (("training", "cat_fraction"), 0, "greater than 0"),
        (("training", "cat_fraction"), 1.01, "less than or equal to 1"),
        (("training", "decoy_fraction"), -0.1, "greater than or equal to 0"),
        (("training", "decoy_fraction"), 1, "less than 1"),
        (("training", "ema"), 0, "greater than 0"),
        (("training", "init_from"), "Mug", "'Mug' names no published adapter; write its id, id@alias or id@r-"),
        (("training", "init_from"), "mug@r-123", "names no published adapter"),
        (("training", "init_from"), "../mug", "names no published adapter"),
        (("training", "block_lr_weights"), {"middle": 1.0}, "'middle' is not a group of blocks; the groups are down"),
        (("training", "block_lr_weights"), {"up": 0}, "up has 0; write a number above 0"),
        (("training", "block_lr_weights"), {"up": float("nan")}, "write a number above 0"),
        (("training", "block_lr_weights"), 0.5, "must map blocks to factors"),
        (("training", "text_encoder", "learning_rate"), 0, "greater than 0"),
        (("training", "text_encoder", "learning_rat"), 1.0, "did you mean learning_rate"),
        (("training", "text_encoder"), 0.5, "must be keys with values"),
        (("training", "ema"), 1, "less than 1"),
        (("training", "resolution"), 65, "multiple of 8"),
        (("training", "seed"), 2**63, "less than or equal"),
        (("training", "warmup_steps"), 300, "300 must be less than steps, which is 300"),
        (("training", "general_prompts"), "photos", "is not a file"),
        (("training", "max_grad_norm"), 0, "greater than 0"),
        (("training", "drift_budget"), 0, "greater than 0"),
        (("training", "alpha_schedule"), "rising", "'constant', 'high_noise' or 'low_noise'"),
        (("training", "teacher"), "cached", "'online' or 'pool'"),
        (("training", "pool_size"), 0, "greater than or equal to 1"),
        (("training", "blocks"), "down", "'all', 'mid_up' or 'up'"),
        (("training", "compile"), "fast", "training.compile"),
        (("cluster", "workers"), 0, "or a pair [least, most]"),
        (("cluster", "workers"), [3, 2], "or a pair [least, most]"),
        (("cluster", "workers"), [1, 2, 3], "or a pair [least, most]"),
        (("cluster", "workers"), True, "or a pair [least, most]"),
        (("cluster", "zero_stage"), 4, "0, 1, 2 or 3"),
        (("evaluation", "prompts"), "some", "default or a list of prompts"),
        (("evaluation", "prompts"), [], "default or a list of prompts"),
        (("evaluation", "prompts"), ["a cup"], "must hold {} once"),
        (("evaluation", "prompts"), ["a {}", "a sks {}"], "evaluation.prompts[1]"),
        (("evaluation", "sampler"), "ddpm", "'dpmpp_2m_sde_karras' or 'lcm'"),
    ],
)
def test_a_bad_value_is_refused_at_its_place(
    folder: Path, path: tuple[str | int, ...], value: object, expected: str | None
) -> None:
    document = with_value(minimal(), path, value)
    if expected is None:  # Spaces around a value are not the user's intent, so they are taken off.
        assert load_spec(write(folder, document)).adapters[0].id == "cup"
        return
    message = refusal(folder, document)
    assert expected in message
    assert "1 field cannot" in message.splitlines()[0]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("token", "s\u200bk", r"'s\u200bk' holds '\u200b', which nobody sees or types; type the token anew"),
        ("token", "a\x01", r"holds '\x01', which"),
        ("class_noun", "c\x00up", r"the control character '\x00'; type it anew"),
        ("template", "a {token}\x1b[31m", r"the control character '\x1b'; type it anew"),
    ],
)
def test_what_nobody_can_type_is_refused(folder: Path, field: str, value: str, told: str) -> None:
    message = refusal(folder, with_value(minimal(), ("adapters", 0, "concepts", 0, field), value))
    assert told in message
    assert message.count("\n") == 1
    assert message.replace("\n", "").isprintable()


@pytest.mark.parametrize("token", ["sks", "\u732b", "caf\u00e9", "<shs>", "e\u0301te", "\U0001f600"])
def test_tokens_of_every_script_are_accepted(folder: Path, token: str) -> None:
    document = with_value(minimal(), ("adapters", 0, "concepts", 0, "token"), token)
    assert load_spec(write(folder, document)).adapters[0].concepts[0].token == token


def test_repeated_ids_and_tokens_are_refused(folder: Path) -> None:
    document = minimal()
    concept = document["adapters"][0]["concepts"][0]
    document["adapters"][0]["concepts"].append({**concept, "token": "SKS"})
    document["adapters"].append(copy.deepcopy(minimal()["adapters"][0]))
    message = refusal(folder, document)
    assert "adapters[0].concepts[1].token" in message
    assert "adapters[1].id" in message
    assert "adapters[1].concepts" not in message  # Two adapters may use the same token.


def test_a_token_must_not_name_another_concept_of_the_adapter(folder: Path) -> None:
    document = minimal()
    document["adapters"][0]["concepts"].append({"token": "Cup", "class_noun": "fish", "images": "photos"})
    assert "another concept's class noun 'cup'" in refusal(folder, document)


def test_overrides_merge_key_by_key(folder: Path) -> None:
    document = minimal()
    document["training"] = {"steps": 100, "rank": 4, "warmup_steps": 20}
    document["evaluation"] = {"steps": 10}
    first = document["adapters"][0]
    document["adapters"].append(
        {
            **copy.deepcopy(first),
            "id": "other",
            "method": "lora",
            "base": "./bases/mine",
            "training": {"rank": 16, "max_grad_norm": None, "steps": 400},
            "evaluation": {"enabled": False},
        }
    )
    plain, changed = load_spec(write(folder, document)).resolved()
    assert plain.training == TrainingSpec(steps=100, rank=4, warmup_steps=20)
    assert changed.training == TrainingSpec(steps=400, rank=16, max_grad_norm=None, warmup_steps=20)
    assert changed.evaluation == EvaluationSpec(steps=10, enabled=False)
    assert (changed.method, changed.base) == ("lora", str(folder / "bases" / "mine"))


def test_a_learning_rate_of_adamw_is_not_taken_for_that_of_another_optimiser(folder: Path) -> None:
    document = with_value(minimal(), ("training", "optimizer"), "prodigy")
    assert "training.learning_rate" in (found := refusal(folder, document))
    assert "optimizer is prodigy: give it, 1.0, and lr_schedule: constant" in found
    document["training"]["learning_rate"] = 1.0
    assert load_spec(write(folder, document)).resolved()[0].training.learning_rate == 1.0
    document["adapters"][0]["training"] = {"optimizer": "adafactor"}
    assert load_spec(write(folder, document)).resolved()[0].training.learning_rate == 1.0, "the job gives one"
    document["cluster"] = {"zero_stage": 2}
    assert "adafactor (adapter" in (found := refusal(folder, document))
    assert "cluster.zero_stage" in found
    document["cluster"] = {"zero_stage": 0}
    load_spec(write(folder, document))


def test_prodigy_refuses_a_rate_of_text_encoders(folder: Path) -> None:
    document = with_value(minimal(), ("training",), {"optimizer": "prodigy", "learning_rate": 1.0})
    document["adapters"][0]["training"] = {"text_encoder": {"learning_rate": 1.0}}
    assert "adapters[0].training.text_encoder.learning_rate" in (found := refusal(folder, document))
    assert "prodigy finds one step size for all layers" in found
    document["adapters"][0]["training"] = {"text_encoder": {}}
    assert load_spec(write(folder, document)).resolved()[0].training.text_encoder is not None


def test_factors_on_blocks_that_are_not_adapted_or_have_no_rate_of_their_own_are_refused(folder: Path) -> None:
    document = with_value(minimal(), ("training",), {"blocks": "up", "block_lr_weights": {"up": 2.0, "down": 0.5}})
    assert "training.block_lr_weights.down" in (found := refusal(folder, document))
    assert "down is not adapted with blocks: up" in found
    document["training"] |= {"blocks": "all"}
    load_spec(write(folder, document))
    document["training"] |= {"optimizer": "prodigy", "learning_rate": 1.0}
    assert "prodigy finds one step size for all blocks" in refusal(folder, document)


def test_what_an_adapter_of_the_job_is_trained_on_from_is_named_with_its_revision(folder: Path) -> None:
    """An alias would name another revision once the job has published one: resuming would train a third."""
    document = minimal()
    own = document["adapters"][0]["id"]
    document["training"] = {"init_from": f"{own}@latest"}
    assert f"{own} is trained by this job; name a revision" in (found := refusal(folder, document))
    assert "training.init_from" in found
    document["training"] = {}
    document["adapters"][0]["training"] = {"init_from": own}
    assert "adapters[0].training.init_from" in refusal(folder, document)
    for other in (f"{own}@r-0123456789ab", "another", "another@prod"):
        document["adapters"][0]["training"] = {"init_from": other}
        assert load_spec(write(folder, document)).resolved()[0].training.init_from == other


def test_rules_between_fields_hold_for_merged_settings(folder: Path) -> None:
    document = with_value(minimal(), ("training",), {"steps": 100, "warmup_steps": 50})
    document["adapters"][0]["training"] = {"steps": 50}
    assert "training.warmup_steps" in refusal(folder, document)
    document["adapters"][0]["training"] = {"warmup_steps": 250}  # Below the default of 300? The job says 100.
    assert "adapters[0].training.warmup_steps" in refusal(folder, document)
    document["adapters"][0]["training"] = {"warmup_steps": 250, "steps": 500}
    assert load_spec(write(folder, document)).resolved()[0].training.warmup_steps == 250


def test_paths_are_relative_to_the_spec_and_names_stay_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "jobs").mkdir()
    (folder / "my-base").mkdir()
    (folder / "prompts.txt").write_text("a red cup\n")
    document = minimal()
    document["adapters"][0]["concepts"][0]["images"] = "../photos"
    document |= {"base": "../my-base", "storage": "store", "training": {"general_prompts": "../prompts.txt"}}
    document["evaluation"] = {"judge": "openai/clip-vit-base-patch32"}
    write(folder / "jobs", document)
    monkeypatch.chdir(folder / "jobs")
    job = load_spec(Path("job.yaml"))
    assert job.adapters[0].concepts[0].images == str(folder / "photos")
    assert job.base == str(folder / "my-base")
    assert job.storage == str(folder / "jobs" / "store")
    assert job.training.general_prompts == str(folder / "prompts.txt")
    assert job.evaluation.judge == "openai/clip-vit-base-patch32"
    for url in ("s3://bucket/prefix", "file:///tmp/store"):
        assert load_spec(write(folder, with_value(minimal(), ("storage",), url))).storage == url


def test_a_job_written_out_and_read_back_is_the_same_job(folder: Path) -> None:
    document = with_value(minimal(), ("training", "steps"), 100)
    document["adapters"][0]["training"] = {"rank": 2}
    document["evaluation"] = {"prompts": ["a {} in snow"]}
    document["cluster"] = {"workers": [1, 4]}
    job = load_spec(write(folder, document))
    again = JobSpec.model_validate(json.loads(job.model_dump_json()))
    assert again.resolved() == job.resolved()
    assert again.cluster == job.cluster
    (adapter,) = job.resolved()
    assert ResolvedAdapter.model_validate(json.loads(adapter.model_dump_json())).digest() == adapter.digest()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_digest_does_not_depend_on_key_order_or_how_numbers_are_written(seed: int) -> None:
    shuffle = random.Random(seed)

    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            shuffle.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}
        return [shuffled(item) for item in value] if isinstance(value, list) else value

    document = minimal()
    document["training"] = {"steps": 100, "learning_rate": 0.001, "max_grad_norm": 2}
    document["adapters"][0]["training"] = {"rank": 4, "seed": 7}
    rewritten = shuffled(with_value(document, ("training", "learning_rate"), "1e-3"))
    rewritten = with_value(rewritten, ("training", "max_grad_norm"), 2.0)
    before, after = JobSpec.model_validate(document), JobSpec.model_validate(rewritten)
    assert before.resolved()[0].digest() == after.resolved()[0].digest()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("training", "steps"), 401),
        (("training", "decoy_fraction"), 0.25),
        (("training", "accumulate"), 2),
        (("training", "ema"), 0.99),
        (("training", "init_from"), "mug@r-0123456789ab"),
        (("training", "block_lr_weights"), {"down": 0.5}),
        (("training", "text_encoder"), {}),
        (("training", "text_encoder"), {"learning_rate": 0.001}),
        (("training",), {"optimizer": "prodigy", "learning_rate": 0.002}),
        (("training", "noise_offset"), 0.1),
        (("training", "aspect_buckets"), True),
        (("training", "masked_loss"), True),
        (("training", "caption_dropout"), 0.1),
        (("training", "tag_dropout"), 0.1),
        (("training", "shuffle_tags"), True),
        (("training", "prompt_chunks"), 2),
        (("base",), "other/base"),
        (("method",), "lora"),
        (("adapters", 0, "id"), "mug"),
        (("adapters", 0, "concepts", 0, "token"), "zwx"),
        (("adapters", 0, "concepts", 0, "alpha"), 1.0),
        (("adapters", 0, "concepts", 0, "captions"), "txt"),
        (("adapters", 0, "training"), {"rank": 4}),
        (("evaluation", "seed"), 3),
    ],
)
def test_digest_changes_with_what_decides_the_result(path: tuple[str | int, ...], value: object) -> None:
    before = JobSpec.model_validate(minimal()).resolved()[0]
    after = JobSpec.model_validate(with_value(minimal(), path, value)).resolved()[0]
    assert before.digest() != after.digest()


def test_a_digest_of_the_time_before_there_were_decoys_is_found() -> None:
    """Written down then: a field that came later changes no revision until it is used."""
    before = "ea05bf64fe6e0fecad7fab1870858c8fe44ad2beea38357306bee88fee62b4d0"
    assert JobSpec.model_validate(minimal()).resolved()[0].digest() == before
    for name, default in (
        ("decoy_fraction", 0),
        ("accumulate", 1),
        ("ema", None),
        ("noise_offset", 0.0),
        ("optimizer", "adamw"),
        ("block_lr_weights", None),
        ("init_from", None),
        ("text_encoder", None),
        ("aspect_buckets", False),
        ("masked_loss", False),
        ("caption_dropout", 0.0),
        ("tag_dropout", 0.0),
        ("shuffle_tags", False),
        ("prompt_chunks", 1),
    ):
        given = with_value(minimal(), ("training", name), default)
        assert JobSpec.model_validate(given).resolved()[0].digest() == before


def test_digest_leaves_out_places_and_cluster_but_not_the_general_prompts(tmp_path: Path) -> None:
    elsewhere = with_value(minimal(), ("adapters", 0, "concepts", 0, "images"), "/elsewhere")
    elsewhere |= {"storage": "/store", "cluster": {"workers": 7}, "name": "autumn"}
    digest = JobSpec.model_validate(minimal()).resolved()[0].digest()
    assert JobSpec.model_validate(elsewhere).resolved()[0].digest() == digest

    first, same, other = (tmp_path / name for name in ("first.txt", "same.txt", "other.txt"))
    for path, text in ((first, "a cup"), (same, "a cup"), (other, "a fish")):
        path.write_text(text)
    digests = [
        JobSpec.model_validate(with_value(minimal(), ("training", "general_prompts"), str(path))).resolved()[0].digest()
        for path in (first, same, other)
    ]
    assert digests[0] == digests[1] != digests[2]
    first.unlink()
    gone = with_value(minimal(), ("training", "general_prompts"), str(first))
    with pytest.raises(SpecError, match="general_prompts"):
        JobSpec.model_validate(gone).resolved()[0].digest()


SHIPPED = {
    "single.yaml": "pocket",
    "joint.yaml": "pocket",
    "lora-baseline.yaml": "pocket",
    "batch.yaml": "pocket",
    "sd15-gpu.yaml": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl-gpu.yaml": "stabilityai/stable-diffusion-xl-base-1.0",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_are_valid_where_their_photos_are(tmp_path: Path, name: str) -> None:
    text = (SPECS / name).read_text(encoding="utf-8")
    place = tmp_path / "jobs" / "specs" / name
    place.parent.mkdir(parents=True)
    place.write_text(text, encoding="utf-8")
    for adapter in yaml.safe_load(text)["adapters"]:
        for concept in adapter["concepts"]:
            (place.parent / concept["images"]).resolve().mkdir(parents=True, exist_ok=True)
    job = load_spec(place)
    assert job.name == place.stem
    assert job.storage in (str(tmp_path / "cat-storage"), "s3://adapters/prod")
    assert {adapter.base for adapter in job.resolved()} == {SHIPPED[name]}


def test_the_batch_has_twenty_concepts() -> None:
    job = JobSpec.model_validate(yaml.safe_load((SPECS / "batch.yaml").read_text(encoding="utf-8")))
    assert sum(len(adapter.concepts) for adapter in job.adapters) == 20


def test_the_baseline_differs_from_cat_in_the_method_alone() -> None:
    document = yaml.safe_load((SPECS / "lora-baseline.yaml").read_text(encoding="utf-8"))
    lora, cat = JobSpec.model_validate(document).resolved()
    assert (lora.method, cat.method) == ("lora", "cat")
    assert lora.training.draw_key == cat.training.draw_key == "striped-cup"
    assert lora.model_copy(update={"id": cat.id, "method": "cat"}) == cat


def test_there_is_a_shipped_spec_test_for_each_shipped_spec() -> None:
    assert {path.name for path in SPECS.glob("*.yaml")} == SHIPPED.keys()


@pytest.mark.parametrize(
    "model", [JobSpec, AdapterSpec, ConceptSpec, TrainingSpec, EvaluationSpec, ClusterSpec, ResolvedAdapter]
)
def test_every_field_is_described_and_no_spec_can_be_changed(model: type[BaseModel]) -> None:
    assert all(field.description for field in model.model_fields.values())
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"


def test_json_schema_describes_all_sections() -> None:
    schema = json.loads(json.dumps(spec_json_schema()))
    assert {"TrainingSpec", "EvaluationSpec", "ClusterSpec", "AdapterSpec", "ConceptSpec"} <= set(schema["$defs"])
    assert schema["required"] == ["name", "adapters"]
    assert schema["additionalProperties"] is False


def test_specs_made_in_python_refuse_the_same_things() -> None:
    with pytest.raises(ValidationError, match="class noun"):
        ConceptSpec(token="cup", class_noun="cup", images="photos")
    with pytest.raises(ValidationError, match="rank"):
        TrainingSpec(rank=0)
    with pytest.raises(ValidationError, match="frozen"):
        TrainingSpec().steps = 3


@pytest.mark.parametrize("given", [{}, {"token": "SKS"}, {"class_noun": "big  cup"}])
def test_a_folder_of_kohyas_says_what_token_and_class_noun_are(folder: Path, given: Document) -> None:
    (folder / "10_sks big cup").mkdir()
    concepts = [{"images": "10_sks big cup", **given}]
    job = load_spec(write(folder, with_value(minimal(), ("adapters", 0, "concepts"), concepts)))
    written = [{"token": "sks", "class_noun": "big cup", "images": "10_sks big cup", **given}]
    other = load_spec(write(folder, with_value(minimal(), ("adapters", 0, "concepts"), written)))
    assert job == other
    assert job.resolved()[0].digest() == other.resolved()[0].digest()
    assert job == JobSpec.model_validate(job.model_dump())


@pytest.mark.parametrize(
    ("name", "token", "noun"),
    [
        ("s3://bucket/train/005_sks, cup/", "sks", "cup"),
        ("/a/1_sks_cup man", "sks_cup", "man"),
        ("1_<shs> cat statue", "<shs>", "cat statue"),
    ],
)
def test_the_name_is_split_as_kohyas_trainer_does(name: str, token: str, noun: str) -> None:
    concept = ConceptSpec.model_validate({"images": name})
    assert (concept.token, concept.class_noun) == (token, noun)
    assert ConceptSpec.model_validate({"images": "1_sks", "class_noun": "man"}).token == "sks"


@pytest.mark.parametrize(
    "name", ["sks cup", "x_sks cup", "0_sks cup", "-1_sks cup", "10_", "10_ ,", "10 sks cup", "1.5_sks cup"]
)
def test_other_names_say_nothing(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ConceptSpec.model_validate({"images": name})
    assert [error["loc"] for error in caught.value.errors()] == [("token",), ("class_noun",)]


def test_a_name_that_does_not_fit_what_is_given_fills_nothing_in(folder: Path) -> None:
    for name in ("10_sks cup", "10_sks"):
        (folder / name).mkdir()
    document = with_value(
        minimal(),
        ("adapters", 0, "concepts"),
        [
            {"token": "zwx", "images": "10_sks cup"},
            {"class_noun": "fish", "images": "10_sks cup"},
            {"images": "10_sks"},
            {"token": "ohwx", "class_noun": "fish", "images": "10_sks cup"},
        ],
    )
    lines = refusal(folder, document).splitlines()
    places = [line.partition(" (")[0].removeprefix("  adapters[0].concepts") for line in lines[1:]]
    assert places == ["[0].class_noun", "[1].token", "[2].class_noun"]
    assert "'10_sks cup' is named for 'sks', not 'zwx'; give it here" in lines[1]
    assert "'10_sks cup' is named for 'cup', not 'fish'; give it here" in lines[2]
    assert "it may be left out where the folder's name has it" in lines[3]


def test_tags_that_are_kept_from_nothing_are_refused(folder: Path) -> None:
    document = with_value(minimal(), ("training", "keep_tags"), 2)
    assert "training.keep_tags (line" in (found := refusal(folder, document))
    assert "keeps tags that nothing leaves out or moves" in found
    kept = [
        load_spec(write(folder, with_value(document, ("training", key), value))).resolved()[0].digest()
        for key, value in (("tag_dropout", 0.1), ("shuffle_tags", True))
    ]
    without = with_value(minimal(), ("training", "shuffle_tags"), True)
    assert load_spec(write(folder, without)).resolved()[0].digest() not in kept
