"""The settings of the VLM judge: which endpoint is asked, how, and what happens when it gives no score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crd.errors import CRDError
from crd.setting_checks import check_count, check_number, check_secret, check_text, http_url
from crd.text_files import known_fields, read_settings

BASE_URL_ENV = "CRD_VLM_BASE_URL"
MODEL_ENV = "CRD_VLM_MODEL"
FAILURE_MODES = ("error", "gap")
OF = "the VLM judge"  # whose settings these are
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
            check_text(name, self.__dict__[name], OF)
        for name in ("api_key_env", "rubric"):
            if self.__dict__[name] is not None:
                check_text(name, self.__dict__[name], OF)
        if http_url(self.base_url) is None:
            raise CRDError(f"base_url must be of the form http://host:port/v1, got {self.base_url!r}")
        check_number("timeout_s", self.timeout_s, OF, positive=True)
        check_number("temperature", self.temperature, OF, positive=False)
        for name, least in (("max_retries", 0), ("concurrency", 1), ("max_tokens", 1), ("seed", 0)):
            check_count(name, self.__dict__[name], OF, least)
        if self.seed + self.max_retries > LARGEST_SEED:
            raise CRDError(f"seed + max_retries must be at most {LARGEST_SEED}, got {self.seed} + {self.max_retries}")
        if self.image_size is not None:
            check_count("image_size", self.image_size, OF, 1)
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
        check_secret(key, self.api_key_env)
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
    return read_settings(path, "VLM judge settings", missing, _from_fields)


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
