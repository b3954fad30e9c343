"""PickScore v1: a CLIP ViT-H/14 trained on which of two images people picked."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from crd.metrics.clip_embeddings import load_clip
from crd.metrics.hub_files import companion
from crd.metrics.scorer import BatchScorer, PreferenceScorer

PREPARATION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(PreferenceScorer):
    """`exp(logit_scale) cos(image embedding, text embedding)`, about 20 to 23; some code divides it by 26.

    Prompts are cut at 77 tokens. Tokenizer and image processor are those of the CLIP it was trained from: of the
    folder `source` if it has them, else of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.

    Args:
        source: hub id or folder of the model in transformers format; None = `yuvalkirstain/PickScore_v1`.

    Source: Kirstain et al., arXiv 2305.01569.
    """

    published = "yuvalkirstain/PickScore_v1"

    def load(self, device: str) -> BatchScorer:
        """The CLIP's scaled cosines."""
        preparation = companion(self.source, "preprocessor_config.json", PREPARATION)
        clip = load_clip(self.source, device, "PickScore", preparation)
        scale = clip.model.logit_scale.float().exp()

        def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            return scale * clip.cosines(images, prompts)

        return score
