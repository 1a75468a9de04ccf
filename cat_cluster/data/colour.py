"""Colours of photos: from the profile that is embedded in a file to sRGB, which base models are trained on."""

from __future__ import annotations

import io
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

# Rounding to 8 bits moves a channel by one: a profile that moves none further is sRGB itself, and most photos have it.
_ROUNDING = 1
_PROFILE_MODES: dict[str, Literal["RGB", "L", "CMYK"]] = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class ProfileError(Exception):
    """An embedded colour profile is damaged, or is for another kind of pixels than the photo's."""


class ColourProfile:
    """An embedded ICC profile. Raises ProfileError when its bytes are none."""

    def __init__(self, content: bytes) -> None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
            space = profile.profile.xcolor_space.strip()
            if space not in _PROFILE_MODES:
                raise ProfileError(f"it is for {space} colours")
            self.mode = _PROFILE_MODES[space]
            self._transform = ImageCms.buildTransform(
                profile,
                ImageCms.createProfile("sRGB"),
                self.mode,
                "RGB",
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
        except (OSError, ImageCms.PyCMSError) as error:
            raise ProfileError(str(error)) from error

    def is_srgb(self) -> bool:
        """Say whether converting by this profile changes no colour beyond rounding."""
        if self.mode == "CMYK":
            return False
        probe = _lattice() if self.mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        before, after = (np.asarray(image, dtype=np.int16) for image in (probe.convert("RGB"), self.to_srgb(probe)))
        return int(np.abs(after - before).max()) <= _ROUNDING

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Return an opaque image in sRGB, mode RGB, without a profile. Raises ProfileError when the two do not fit."""
        colours = "CMYK" if image.mode == "CMYK" else "RGB" if image.mode not in ("1", "L") else "L"
        if colours != self.mode and (colours, self.mode) != ("L", "RGB"):  # grey is a colour of any RGB space
            raise ProfileError(f"it is for {self.mode} pixels and the photo's are {colours}")
        converted = self._transform.apply(image if image.mode == self.mode else image.convert(self.mode))
        # Pillow notes the profile of sRGB. A file that is written from this image needs none, and is then a plain one.
        converted.info.pop("icc_profile", None)
        return converted


@cache
def _lattice() -> Image.Image:
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(18, -1, 3))
