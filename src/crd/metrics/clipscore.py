"""CLIPScore: how near an image is to its prompt in CLIP's space."""

from __future__ import annotations

from crd.metrics.clip_embeddings import load_clip
from crd.metrics.scorer import BatchScorer, PreferenceScorer


class CLIPScore(PreferenceScorer):
    """`cos(image embedding, text embedding)` by CLIP ViT-L/14, as it is: not scaled, not clipped at 0.

    This is the scale on which RL fine-tuning papers report it (0.24 to 0.29); Hessel et al. report
    `2.5 max(cos, 0)` by ViT-B/32. Prompts are cut at 77 tokens.

    Args:
        source: hub id or folder of a CLIP in transformers format; None = `openai/clip-vit-large-patch14`.

    Source: CLIP, arXiv 2103.00020; CLIPScore, arXiv 2104.08718.
    """

    published = "openai/clip-vit-large-patch14"

    def load(self, device: str) -> BatchScorer:
        """The CLIP's cosines."""
        return load_clip(self.source, device, "CLIPScore").cosines
