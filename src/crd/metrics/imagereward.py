"""ImageReward v1.0: a BLIP trained on how people ranked the images of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from crd.geneval.detectors.loading import load_tokenizer
from crd.metrics.blip_weights import text_encoder, vision_encoder
from crd.metrics.hub_files import companion, find_file
from crd.metrics.pixels import cut_square, normalized
from crd.metrics.score_head import score_head
from crd.metrics.scorer import BatchScorer, PreferenceScorer
from crd.metrics.state_dicts import read_weights, split

WEIGHTS = "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35  # of a prompt, with the marks of beginning and end
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, as published
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
# BLIP's projections for its contrastive loss, which the score does not pass.
UNUSED = frozenset(f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias"))


class ImageReward(PreferenceScorer):
    """`(head(h) - MEAN) / STD`, h the first token of the prompt, read by a BERT that attends to the image's tokens.

    The published MEAN and STD put scores around 0 with a deviation of about 1. Images: the shorter side resized to
    224 px (bicubic), the middle cut out, CLIP's mean and deviation. Prompts are cut at 35 tokens. An alpha channel is
    dropped before the resizing, by the original after it.

    Args:
        source: hub id, local folder or file; None = `ImageReward.pt` of `THUDM/ImageReward`. The tokenizer is read from
            the same folder if it is there, else from `google-bert/bert-base-uncased`.

    Source: Xu et al., arXiv 2304.05977; github.com/THUDM/ImageReward.
    """

    published = "THUDM/ImageReward"

    def load(self, device: str) -> BatchScorer:
        """The encoders and the head, and their normalised scores."""
        path = find_file(self.source, WEIGHTS)
        tokenizer = load_tokenizer(companion(self.source, "tokenizer_config.json", TOKENIZER))
        of_vision, of_text, of_head = split(read_weights(path), (VISION, TEXT, HEAD), UNUSED, path)
        vision = vision_encoder(of_vision, path, VISION).to(device)
        text = text_encoder(of_text, path, TEXT).to(device)
        head = score_head(of_head, path).to(device)
        side = vision.config.image_size

        def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            pixels = normalized([cut_square(image, side) for image in images])
            tokens = tokenizer(
                list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            hidden = text(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                encoder_hidden_states=vision(pixel_values=pixels.to(device)).last_hidden_state,
            ).last_hidden_state
            raw: Tensor = head(hidden[:, 0]).squeeze(-1)
            return (raw - MEAN) / STD

        return score
