"""LAION's aesthetic predictor v2: how much people like an image, whatever was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from crd.errors import CRDError
from crd.metrics.clip_embeddings import load_clip
from crd.metrics.hub_files import companion, find_file
from crd.metrics.score_head import score_head
from crd.metrics.scorer import BatchScorer, PreferenceScorer
from crd.metrics.state_dicts import read_weights, split

WEIGHTS = "aesthetic-model.pth"
CLIP_MODEL = "openai/clip-vit-large-patch14"
HEAD = "layers."


class AestheticScore(PreferenceScorer):
    """`head(e)`, e the unit image embedding of CLIP ViT-L/14: a rating from about 1 to 10. Prompts are not looked at.

    Args:
        source: hub id, local folder or file of the head; None = `aesthetic-model.pth` of
            `trl-lib/ddpo-aesthetic-predictor`. The CLIP is read from the same folder if it is there (its
            `config.json`), else from `openai/clip-vit-large-patch14`.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor (`sac+logos+ava1-l14-linearMSE.pth`).
    """

    published = "trl-lib/ddpo-aesthetic-predictor"

    def load(self, device: str) -> BatchScorer:
        """The CLIP and the head, and their ratings."""
        path = find_file(self.source, WEIGHTS)
        (weights,) = split(read_weights(path), (HEAD,), (), path)
        head = score_head(weights, path).to(device)
        clip = load_clip(companion(self.source, "config.json", CLIP_MODEL), device, "the aesthetic score")
        wanted, got = weights["0.weight"].shape[1], clip.model.config.projection_dim
        if wanted != got:
            raise CRDError(f"{path} rates embeddings of {wanted} numbers, its CLIP makes {got}; use {CLIP_MODEL}")

        def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            rated: Tensor = head(clip.images(images)).squeeze(-1)
            return rated

        return score
