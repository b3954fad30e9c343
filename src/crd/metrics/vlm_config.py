"""The settings of the VLM judge: which endpoint is asked, how, and what happens when it gives no score."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crd.errors import CRDError, told_of
from crd.text_files import known_fields, read_settings

BASE_URL_ENV = "CRD_VLM_BASE_URL"
MODEL_ENV = "CRD_VLM_MODEL"
FAILURE_MODES = ("error", "gap")
LARGEST_SEED = 2**31 - 1  # what every server takes


@dataclass(frozen=True)
class VLMJudgeConfig:
    """An OpenAI-compatible endpoint and how it is asked; `base_url` and `model` have no default.

    Raises:
        CRDError: a value of another type, or outside its range.
    """

    base_url: str  # such as http://localhost:8000/v1 (vLLM), http://localhost:11434/v1 (Ollama)
    model: str  # as the server names it
    api_key_env: str | None = "OPENAI_API_KEY"  # the environment variable that holds the key; None = there is no key
    timeout_s: float = 60.0  # seconds that the server may stay silent
    max_retries: int = 3  # of one image, for unusable answers and failed requests together
    concurrency: int = 8  # requests under way at a time
    max_tokens: int = 256  # of an answer, which is one short line
    temperature: float = 0.0
    seed: int = 0  # of the first request of an image; the one after an unusable answer has the next
    rubric: str | None = None  # a text file of your own criteria; None = `crd.metrics.vlm_rubric.CRITERIA`
    image_size: int | None = 1024  # px; images with a longer side are made smaller before they are sent; None = as is
    on_failure: str = "error"  # an image without a score ends the call; "gap": it is None, and counted

    def __post_init__(self) -> None:
        for name in ("base_url", "model"):
            _check_text(name, self.__dict__[name])
        for name in ("api_key_env", "rubric"):
            if self.__dict__[name] is not None:
                _check_text(name, self.__dict__[name])
        _check_url(self.base_url)
        _check_number("timeout_s", self.timeout_s, positive=True)
        _check_number("temperature", self.temperature, positive=False)
        _check_count("max_retries", self.max_retries, 0)
        _check_count("concurrency", self.concurrency, 1)
        _check_count("max_tokens", self.max_tokens, 1)
        _check_count("seed", self.seed, 0)
        if self.seed + self.max_retries > LARGEST_SEED:
            raise CRDError(f"seed + max_retries must be at most {LARGEST_SEED}, got {self.seed} + {self.max_retries}")
        if self.image_size is not None:
            _check_count("image_size", self.image_size, 1)
        if self.on_failure not in FAILURE_MODES:
            raise CRDError(f"on_failure must be one of {', '.join(FAILURE_MODES)}, got {self.on_failure!r}")

    def api_key(self) -> str | None:
        """The key, from the environment; None if the server needs none.

        Raises:
            CRDError: the variable is not set, or holds no key.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise CRDError(
                f"the VLM judge reads its key from {self.api_key_env}, which is not set; set it "
                "(to any word if the server needs no key, or write `api_key_env: null` in its .yaml file)"
            )
        # The key itself is never shown: messages end up in logs.
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise CRDError(f"{self.api_key_env} holds characters that no key has, such as a space or a line end; "
                           "set it to the key alone")  # fmt: skip
        return key


def vlm_config(source: str | None) -> VLMJudgeConfig:
    """The settings of a judge.

    Args:
        source: a YAML file of `VLMJudgeConfig` fields; None = defaults, with the endpoint of `CRD_VLM_BASE_URL` and
            `CRD_VLM_MODEL`.

    Raises:
        CRDError: no such file, no mapping, an unknown key (the nearest is named), a missing or wrong value, or one
            of the two variables not set.
    """
    if source is None:
        return VLMJudgeConfig(base_url=_from_environment(BASE_URL_ENV), model=_from_environment(MODEL_ENV))
    path = Path(source)
    missing = f"no VLM judge settings at {path}; give a .yaml file with base_url and model"
    values = read_settings(path, "VLM judge settings", missing)
    with told_of(str(path)):
        return _from_fields(values)


def _from_fields(values: Mapping[Any, Any]) -> VLMJudgeConfig:
    given = known_fields(values, VLMJudgeConfig, "VLM judge setting")
    for field in dataclasses.fields(VLMJudgeConfig):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise CRDError(f"{field.name} of the VLM judge is missing; add a line `{field.name}: ...`")
    return VLMJudgeConfig(**given)


def _from_environment(variable: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise CRDError(f"the VLM judge needs {BASE_URL_ENV} and {MODEL_ENV}, and {variable} is not set; "
                       "set it, or give a .yaml file")  # fmt: skip
    return value


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise CRDError(f"{name} of the VLM judge must be text, got {value!r}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or unbalanced brackets
        valid = False
    if not valid or any(letter.isspace() for letter in url):
        raise CRDError(f"base_url must be of the form http://host:port/v1, got {url!r}")


def _check_number(name: str, value: object, positive: bool) -> None:
    is_number = not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < math.inf
    if not is_number or (positive and value == 0):
        wanted = "a positive number" if positive else "a number of at least 0"
        raise CRDError(f"{name} of the VLM judge must be {wanted}, got {value!r}")


def _check_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CRDError(f"{name} of the VLM judge must be a whole number of at least {least}, got {value!r}")
