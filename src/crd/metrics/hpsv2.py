"""HPS v2.1: a CLIP ViT-H/14 trained on which image of a set people preferred."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from crd.errors import CRDError
from crd.geneval.detectors.loading import load_tokenizer
from crd.metrics.clip_embeddings import image_embeddings, text_embeddings
from crd.metrics.hub_files import companion, find_file
from crd.metrics.open_clip_weights import clip_from_open_clip
from crd.metrics.pixels import normalized, pad_square
from crd.metrics.scorer import BatchScorer, PreferenceScorer
from crd.metrics.state_dicts import read_weights

WEIGHTS = "HPS_v2.1_compressed.pt"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2(PreferenceScorer):
    """`cos(image embedding, text embedding)`, about 0.2 to 0.3; some code shows it times 100.

    Images are prepared as the original does it: the longer side resized to 224 px (bicubic), black bars around what is
    not square, CLIP's mean and deviation. Three differences: float32 where the original computes in mixed precision; an
    alpha channel is dropped, the original hands it on to the network; an image that is not square but already 224 px on
    its longer side gets its bars too.

    Texts are cut at 77 tokens, the end token kept, and pooled at the first end token. open_clip's tokenizer pads with 0
    and pools at the highest id: the same token, and nothing after it is attended to, so that padding does not matter.
    open_clip also repairs mis-decoded characters and HTML entities in a prompt; transformers' tokenizer leaves them.

    Args:
        source: hub id, local folder or file; None = `HPS_v2.1_compressed.pt` of `xswu/HPSv2`. The tokenizer is read
            from the same folder if it is there, else from `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.

    Source: Wu et al., arXiv 2306.09341; github.com/tgxs002/HPSv2.
    """

    published = "xswu/HPSv2"

    def load(self, device: str) -> BatchScorer:
        """The CLIP's cosines."""
        path = find_file(self.source, WEIGHTS)
        tokenizer = load_tokenizer(companion(self.source, "tokenizer_config.json", TOKENIZER))
        model = clip_from_open_clip(read_weights(path, "state_dict"), path).to(device)
        end, side = model.config.text_config.eos_token_id, model.config.vision_config.image_size
        if tokenizer.eos_token_id != end:
            raise CRDError(
                f"the tokenizer for {path} must end texts with token {end}, got {tokenizer.eos_token_id}; "
                f"use that of {TOKENIZER}"
            )

        def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
            pixels = normalized([pad_square(image, side) for image in images])
            return (image_embeddings(model, pixels) * text_embeddings(model, tokenizer, prompts)).sum(dim=-1)

        return score
