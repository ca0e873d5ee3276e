"""The settings of the service, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from ..config import CONF

# Hydra parses a folder named 2024 as a number.
Text = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]
Kind = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff"]
PILLOW_PIXELS = 178_000_000  # Pillow itself refuses larger pictures
MAX_ANSWERS = 1000


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Batch(_Strict):
    """How requests are collected, see Batcher."""

    size: PositiveInt
    wait_ms: NonNegativeFloat


class Limits(_Strict):
    """Limits for one request."""

    upload_bytes: PositiveInt
    pixels: Annotated[int, Field(gt=0, le=PILLOW_PIXELS)]
    kinds: Annotated[list[Kind], Field(min_length=1)]
    queue: PositiveInt
    seconds: PositiveFloat


class Settings(_Strict):
    """See conf/serve.yaml."""

    index_dir: Text
    checkpoints: list[Text]
    gallery: Text | None
    overrides: list[Text]
    host: Text | None
    port: Annotated[int, Field(ge=1, le=65535)]
    token_file: Text | None
    private: bool
    k: Annotated[int, Field(ge=1, le=MAX_ANSWERS)]
    threshold: float | None
    known_at: Annotated[float, Field(ge=0, le=1)]
    thumbnail: Annotated[int, Field(ge=1, le=4096)]
    batch: Batch
    limits: Limits


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Check the values of conf/serve.yaml. Raises ValueError with the first bad key, its value, what is allowed, and the
    default.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(part for part in fault["loc"] if isinstance(part, str))  # without the place in a list
        default = OmegaConf.select(OmegaConf.load(CONF / "serve.yaml"), key)
        typed = "null" if default is None else str(default).replace("'", "").replace(" ", "")
        raise ValueError(
            f"{key}={fault['input']}: {fault['msg'][0].lower()}{fault['msg'][1:]}; the default is {key}={typed}"
        ) from error
