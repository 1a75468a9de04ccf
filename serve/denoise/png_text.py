"""The text chunks of a served PNG: our own keys, and the `parameters` line that other tools read."""

from __future__ import annotations

from serve.calls import ImageCall


def png_text(call: ImageCall, seed: int, served_by: str, digest: str | None) -> dict[str, str]:
    """Return the text chunks of an image; digest: sha256 of the adapter's weights.

    `parameters` follows AUTOMATIC1111's form, so that its readers show prompt, sampler, seed and model.
    """
    text = {
        "prompt": call.prompt,
        "negative_prompt": call.negative_prompt,
        "seed": str(seed),
        "steps": str(call.steps),
        "guidance": str(call.guidance),
        "sampler": call.sampler,
        "strength": str(call.strength),
        "model": served_by,
        "request_id": call.request_id,
    }
    if digest is not None:
        text["adapter_sha256"] = digest
    return {**text, "parameters": _parameters(call, seed, served_by, digest)}


def _parameters(call: ImageCall, seed: int, served_by: str, digest: str | None) -> str:
    lines = [call.prompt]
    if call.negative_prompt:
        lines.append(f"Negative prompt: {call.negative_prompt}")
    facts = [
        f"Steps: {call.steps}",
        f"Sampler: {call.sampler}",
        f"CFG scale: {call.guidance:g}",
        f"Seed: {seed}",
        f"Model: {served_by}",
    ]
    if digest is not None:
        facts.append(f'Lora hashes: "{served_by}: {digest[:12]}"')
    return "\n".join([*lines, ", ".join(facts)])
