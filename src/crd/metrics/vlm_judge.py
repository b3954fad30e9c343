"""A vision-language model as a scorer: any OpenAI-compatible endpoint (vLLM, Ollama, OpenAI) rates image and prompt.

The way of asking is that of UnifiedReward's pointwise scores (alignment, coherence, style, each from 1 to 5), in words
of our own and for any model: scores of different models, rubrics or image sizes do not compare, nor do they with
published UnifiedReward numbers.

Source: UnifiedReward, arXiv 2503.05236, pointwise scoring.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from crd.console import progress_steps
from crd.errors import CRDError
from crd.metrics.vlm_config import BASE_URL_ENV, VLMJudgeConfig, vlm_config
from crd.metrics.vlm_rubric import (
    SCORE_RANGE,
    UnusableAnswerError,
    answer_text,
    messages,
    parse_answer,
    rubric_text,
    score,
)
from crd.rewards.signature import quote

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI
    from openai.types.chat import ChatCompletionMessageParam

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 8.0  # between requests after unusable answers; doubles. As openai's own.
NO_KEY = "none"  # openai refuses an empty key; servers without keys ignore what they get
MATCHING, MISMATCHING = "a red circle", "a blue car at night"


class NoScoreError(CRDError):
    """One image got no score, and another image may get one."""


class VLMJudge:
    """Score in [1, 5]: the mean of three ratings of an image and its prompt by a vision-language model.

        score = (alignment + coherence + style) / 3

    One request per image, several at a time, each the same whatever else is scored beside it. An image gets at most
    `1 + max_retries` requests: openai's own retries (server down, silence, HTTP 408, 409, 429, 5xx) and those after
    answers that cannot be read count together. A refused key or an unknown model ends the call at once.

    `gaps` counts the images without a score so far, with `on_failure: gap`. They are None, never a number.

    Args:
        source: a YAML file of `VLMJudgeConfig` fields; None = `CRD_VLM_BASE_URL` and `CRD_VLM_MODEL`.

    Raises:
        CRDError: no openai package, or settings, a key or a rubric that do not fit.
    """

    score_range = SCORE_RANGE

    def __init__(self, source: str | None = None) -> None:
        _import_openai()
        self.config: VLMJudgeConfig = vlm_config(source)
        self.config.api_key()
        self.gaps = 0
        self._rubric = rubric_text(self.config.rubric)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
        """Scores of B images against their B prompts.

        Args:
            images: B PIL images.
            prompts: B prompts.

        Returns:
            B numbers in [1, 5]; None = a gap, with `on_failure: gap`.

        Raises:
            CRDError: a refused key, an unknown model, an image without a score (`on_failure: error`), or none of B
                images got one.
            ValueError: B differs.
        """
        if len(images) != len(prompts):
            raise ValueError(f"prompts must be one for each of the {len(images)} images, got {len(prompts)}")
        if not images:
            return []
        results = self._score_all(images, prompts)
        missing = [result for result in results if isinstance(result, NoScoreError)]
        if len(missing) == len(results):
            raise CRDError(f"none of {len(results)} images got a score; the first: {missing[0]}") from missing[0]
        self.gaps += len(missing)
        return [None if isinstance(result, NoScoreError) else result for result in results]

    @property
    def leaves_gaps(self) -> bool:
        """Whether an image without a score is None rather than an error."""
        return self.config.on_failure == "gap"

    def self_test(self) -> list[float]:
        """Refuse a judge that is out of reach, or does not tell a fitting prompt from another.

        Returns:
            Scores of a drawn red circle for a prompt that asks for one, and for one that asks for a car.

        Raises:
            CRDError: from the requests, or the first score is not the higher one.
        """
        picture = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(picture).ellipse((56, 56, 200, 200), fill=(220, 20, 30))
        results = self._score_all([picture, picture], [MATCHING, MISMATCHING])
        scores: list[float] = []
        for result in results:
            if isinstance(result, NoScoreError):
                raise CRDError(f"self-test of the VLM judge: {result}") from result
            scores.append(result)
        if not scores[0] > scores[1]:
            raise CRDError(
                f"{self._endpoint} scores a drawn red circle {scores[0]:.2f} for {MATCHING!r} and {scores[1]:.2f} for "
                f"{MISMATCHING!r}, the first must be higher; choose a model that sees images"
            )
        return scores

    @property
    def _endpoint(self) -> str:
        return f"{self.config.model} at {self.config.base_url}"

    def _client(self) -> OpenAI:
        # A client per call: a judge stays picklable, and a forked process shares no connection.
        return _import_openai()(
            base_url=self.config.base_url, api_key=self.config.api_key() or NO_KEY, timeout=self.config.timeout_s
        )

    def _score_all(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | NoScoreError]:
        """One result per image, in their order; a `NoScoreError` only with `on_failure: gap`."""
        stop = threading.Event()
        with progress_steps("VLM judge") as progress, self._client() as client:
            pool = ThreadPoolExecutor(min(self.config.concurrency, len(images)))
            try:
                futures = [
                    pool.submit(self._score_or_gap, client, image, prompt, stop)
                    for image, prompt in zip(images, prompts, strict=True)
                ]
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    progress(done, len(futures))
            finally:
                # After a failure or Ctrl-C: requests under way end, no other is sent.
                stop.set()
                pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]

    def _score_or_gap(
        self, client: OpenAI, image: Image.Image, prompt: str, stop: threading.Event
    ) -> float | NoScoreError:
        try:
            return self._score(client, image, prompt, stop)
        except NoScoreError as error:
            if self.config.on_failure == "error":
                raise
            return error

    def _score(self, client: OpenAI, image: Image.Image, prompt: str, stop: threading.Event) -> float:
        asked = messages(self._rubric, prompt, _data_url(image, self.config.image_size))
        left, unusable = self.config.max_retries, 0
        while True:
            completion, retries = self._request(client, asked, prompt, left, self.config.seed + unusable)
            left -= retries
            try:
                return score(parse_answer(answer_text(completion)))
            except UnusableAnswerError as error:
                delay = min(FIRST_DELAY_S * 2**unusable, LONGEST_DELAY_S)
                if left == 0 or stop.wait(delay):
                    raise self._no_score(prompt, str(error)) from error
            left -= 1
            unusable += 1

    def _request(
        self, client: OpenAI, asked: list[ChatCompletionMessageParam], prompt: str, max_retries: int, seed: int
    ) -> tuple[str, int]:
        """The body of the answer, and how many retries openai needed for it."""
        import openai

        try:
            # The raw answer knows its retries; its body is checked here, not by openai, which trusts the server.
            raw = client.with_options(max_retries=max_retries).chat.completions.with_raw_response.create(
                model=self.config.model,
                messages=asked,
                temperature=self.config.temperature,
                max_tokens=self.config.max_tokens,
                seed=seed,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            variable = self.config.api_key_env
            advice = f"set {variable} to the right key" if variable else "name the variable of its key in api_key_env"
            raise CRDError(f"{self._endpoint} refused access: {_told(error)}; {advice}") from error
        except openai.NotFoundError as error:
            raise CRDError(
                f"{self._endpoint} was not found: {_told(error)}; check the model's name, and the URL ({BASE_URL_ENV} "
                "or base_url, which mostly ends in /v1)"
            ) from error
        except openai.APITimeoutError as error:
            reason = f"silent for {self.config.timeout_s:g} s (retries: {max_retries}); raise timeout_s"
            raise self._no_score(prompt, reason) from error
        except openai.APIConnectionError as error:
            reason = f"out of reach, {quote(repr(error.__cause__))} (retries: {max_retries}); is the server running?"
            raise self._no_score(prompt, reason) from error
        except openai.APIStatusError as error:
            raise self._no_score(prompt, f"it answered {_told(error)}; see the server's log") from error
        return raw.http_response.text, raw.retries_taken

    def _no_score(self, prompt: str, reason: str) -> NoScoreError:
        return NoScoreError(f"{self._endpoint} gave no score for the prompt {quote(prompt)}: {reason}")


def _import_openai() -> type[OpenAI]:
    try:
        import openai

        # openai loads these at their first use; here, once, rather than in several threads.
        import openai.resources.chat
    except ImportError as error:
        raise CRDError('the VLM judge needs the openai package; pip install -e ".[vlm]"') from error
    return openai.OpenAI


def _data_url(image: Image.Image, longest: int | None) -> str:
    """The image as a PNG data URL, no side longer than `longest` px."""
    picture = image.convert("RGB")
    if longest is not None and max(picture.size) > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _told(error: APIStatusError) -> str:
    return quote(error.message, limit=203)
