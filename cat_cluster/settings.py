"""Settings of a machine, not of a job: read from the environment, prefix CAT_."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from cat_cluster.errors import SpecError


class Settings(BaseSettings):
    """Where adapters and caches are kept and which device computes; each field is the variable CAT_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="CAT_", env_ignore_empty=True, frozen=True)

    storage: str = Field(default="./cat-storage", description="Folder or URL of the adapter registry.")
    cache_dir: Annotated[Path, AfterValidator(Path.expanduser)] = Field(
        default=Path("~/.cache/cat-cluster"),
        validate_default=True,
        description="Folder of caches; it may be deleted at any time.",
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
        description="Device that computes: cpu, cuda, cuda:1, mps, or auto: a GPU where there is one.",
    )


def load_settings() -> Settings:
    """Read the settings from the environment; raises SpecError naming the variable that has a bad value."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"CAT_{str(detail['loc'][0]).upper()}={detail['input']}: {detail['msg']}; "
            f"{Settings.model_fields[str(detail['loc'][0])].description}"
            for detail in error.errors()
        ]
        raise SpecError("\n".join(lines)) from None
