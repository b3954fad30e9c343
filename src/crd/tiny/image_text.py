"""A small image-text model of the bundled world: 64 x 64 pictures and their captions in one space of unit vectors.

Two towers trained from scratch by `python -m crd.tiny.train_image_text`. Words of a caption are tokens, the letters of
a quoted word are one token each, with their place in the word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from crd.errors import CRDError
from crd.geneval.metadata import COLORS, RELATIONS
from crd.geneval.prompts import COUNT_WORDS, noun_phrase
from crd.tiny.detector import pixels
from crd.tiny.render import SIZE
from crd.tiny.residual import Residual
from crd.tiny.scene_prompts import SCENE_CLASSES
from crd.tiny.subjects import WORD_LENGTHS, WordSubject, caption_of, read_caption
from crd.tiny.trained_files import load_trained, save_trained
from crd.tiny.vocabulary import JOINTS, LETTERS, THEMES

FOLDER = Path(__file__).parent / "judges"
NAME = "image_text"
WIDTH = 128
CELLS = (8, 16)  # rows and columns of a picture
FEATURES = 320  # numbers a picture, before the last layer
EMBEDDING = 96  # numbers a picture or caption
MAX_WORDS = 10  # outside quotes: "a photo of an orange umbrella and a yellow kite"
MAX_TOKENS = 14  # "a neon sign at night with the word" and six letters
MAX_SCALE = 100.0


def _words() -> tuple[str, ...]:
    """All words of the bundled world's captions outside quotes, sorted."""
    phrases = [*THEMES.values(), *JOINTS, *RELATIONS, "a photo of", "and", *COLORS]
    phrases += [noun_phrase(name, count) for name in SCENE_CLASSES for count in (1, *COUNT_WORDS)]
    phrases += [noun_phrase(SCENE_CLASSES[0], 1, color) for color in COLORS]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = ("", *LETTERS, *_words())  # number 0 pads
_MEANING = {"embedding": EMBEDDING, "vocabulary": list(VOCABULARY)}
_NUMBER = {token: number for number, token in enumerate(VOCABULARY)}


def tokens(captions: Sequence[str]) -> Tensor:
    """Token numbers and places of captions.

    Args:
        captions: B captions of the bundled world.

    Returns:
        (B, 2, 14) int64: numbers in `VOCABULARY`, 0 where there is no token; places, those of a quoted word's letters
        counted from `MAX_WORDS` on.

    Raises:
        CRDError: a caption of no picture of the bundled world.
    """
    table = torch.zeros(len(captions), 2, MAX_TOKENS, dtype=torch.int64)
    for row, text in zip(table, captions, strict=True):
        subject = read_caption(text)
        quoted = subject.word if isinstance(subject, WordSubject) else ""
        words = caption_of(subject).partition('"')[0].split()
        places = [*range(len(words)), *range(MAX_WORDS, MAX_WORDS + len(quoted))]
        for column, (token, place) in enumerate(zip([*words, *quoted], places, strict=True)):
            row[0, column], row[1, column] = _NUMBER[token], place
    return table


class ImageTower(nn.Module):
    """Convolutions down to 8 x 16 cells, all cells side by side through one layer, and another.

    Letters stand side by side: cells are half as wide as they are high. Where a letter stands in its word decides which
    caption is meant, so each cell has weights of its own.
    """

    def __init__(self, width: int = WIDTH, of_a_cell: int = 20) -> None:
        super().__init__()
        self.cells = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            Residual(width // 2, F.gelu),
            nn.Conv2d(width // 2, width, 3, stride=(2, 1), padding=1),
            Residual(width, F.gelu),
            nn.GroupNorm(8, width),
        )
        self.code = nn.Conv2d(width, of_a_cell, 1)
        self.gather = nn.Linear(of_a_cell * CELLS[0] * CELLS[1], FEATURES)
        self.mix = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, EMBEDDING)

    def maps(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1] to cells (B, WIDTH, *CELLS)."""
        found: Tensor = self.cells(images.contiguous(memory_format=torch.channels_last))
        return found

    def features(self, maps: Tensor) -> Tensor:
        """Cells (B, WIDTH, *CELLS) to (B, 320)."""
        found = F.gelu(self.gather(self.code(maps).flatten(1)))
        out: Tensor = found + F.gelu(self.mix(found))
        return out

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, 320) to unit vectors (B, EMBEDDING) float32."""
        return F.normalize(self.head(features).float(), dim=-1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [-1, 1] to unit vectors (B, EMBEDDING) float32."""
        return self.embed(self.features(self.maps(images)))


class TextTower(nn.Module):
    """Attention among a caption's tokens, their mean."""

    def __init__(self, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(len(VOCABULARY), width)
        self.place = nn.Embedding(MAX_WORDS + WORD_LENGTHS[1], width)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, EMBEDDING)

    def forward(self, table: Tensor) -> Tensor:
        """Tokens (B, 2, 14), see `tokens`, to unit vectors (B, EMBEDDING) float32."""
        here = table[:, 0] > 0
        x = self.token(table[:, 0]) + self.place(table[:, 1])
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~here)
        kept = self.norm(x) * here[..., None]
        return F.normalize(self.head(kept.sum(dim=1) / here.sum(dim=1, keepdim=True)).float(), dim=-1)


class ImageTextModel(nn.Module):
    """Both towers and the scale of their cosines.

    Trained so that `softmax_j(scale cos(image, text_j))` picks the caption of a picture among others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageTower(), TextTower()
        self.log_scale = nn.Parameter(torch.tensor(2.7))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by in the softmax, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, 96) float32 of pictures (B, 3, 64, 64) in [-1, 1]."""
        found: Tensor = self.image(images)
        return found

    def embed_texts(self, table: Tensor) -> Tensor:
        """Unit vectors (B, 96) float32 of captions' tokens (B, 2, 14)."""
        found: Tensor = self.text(table)
        return found


def build_image_text(seed: int = 0) -> ImageTextModel:
    """A model with random weights, reproducible by `seed`; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImageTextModel()
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def picture_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of 64 x 64 px as (B, 3, 64, 64) in [-1, 1].

    Raises:
        CRDError: a picture of another size; resized, it would be judged by pixels that nobody drew.
    """
    for index, image in enumerate(images):
        if image.size != (SIZE, SIZE):
            raise CRDError(f"the tiny image-text model judges pictures of {SIZE} x {SIZE} px, got image {index} of "
                           f"{image.width} x {image.height}; it is for the bundled world alone")  # fmt: skip
    return pixels(images)


def save_image_text(model: ImageTextModel, folder: Path) -> None:
    """Write `image_text.safetensors` in float16 and `image_text.json`, which says what its tokens mean."""
    save_trained(model, folder / NAME, _MEANING)


def load_image_text(folder: Path = FOLDER) -> ImageTextModel:
    """The model that `save_image_text` wrote, float32, ready to judge.

    Raises:
        CRDError: no such model, a damaged file, or one that was trained for other captions.
    """
    # The fused layer of torch takes another GELU on a GPU than on a CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    model = build_image_text()
    again = "reinstall crd, or train it: python -m crd.tiny.train_image_text"
    load_trained(model, folder / NAME, _MEANING, kind="image-text", name="model", again=again)
    return model
