"""Train the bundled world's image-text model from scratch, on pictures drawn as they are needed.

    python -m crd.tiny.train_image_text --work image-text

Contrastive: each picture must find its caption among those of the batch, and each caption its picture. A batch is made
of families: a subject and three near misses of it, all drawn, so that half-right pictures and captions are always at
hand and none is ever only a wrong answer. Pictures are disturbed as those of a generative model are.

Further losses, of layers that are thrown away, say more about each picture than one choice among 32 does: which letter
or object has its middle in which cell (without it a short training hardly learns letters), which letter stands where in
the word, which words the caption has.

Resumable: the same command goes on from the last saved state. At the end the averaged weights are written to `--out`;
`python -m crd.tiny.image_text_card` measures them.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), section
2.3, arXiv 2103.00020.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from crd.errors import CRDError
from crd.geneval.metadata import COLORS
from crd.tiny.detector_data import Disturbance, Objects, disturb
from crd.tiny.image_text import (
    CELLS,
    FEATURES,
    FOLDER,
    MAX_WORDS,
    VOCABULARY,
    WIDTH,
    build_image_text,
    save_image_text,
    tokens,
)
from crd.tiny.image_text_card import retrieval
from crd.tiny.pretrain_state import State, log
from crd.tiny.render import LEVELS, SIZE
from crd.tiny.scene_prompts import SCENE_CLASSES
from crd.tiny.subjects import (
    WORD_LENGTHS,
    Mark,
    Subject,
    caption_of,
    draw_with_marks,
    is_training,
    meaning,
    near_misses,
    random_subject,
)
from crd.tiny.training_loop import run_training, training_options
from crd.tiny.vocabulary import LETTERS

VAE = FOLDER.parent / "model" / "vae"
FAMILY = 4  # a subject and its near misses
SCENES = 0.5  # share of families
CLIMB = (0.08, 0.14, 0.2)  # shares of the training after which it leaves levels 0, 1 and 2 for 3 and 4
READING, SPELLING, NAMING = 1.0, 1.0, 0.1  # weights of the further losses
IGNORED = -1  # any answer is right
MARKS = ("", *LETTERS, *SCENE_CLASSES)  # what a cell may have in its middle, first nothing
SOFT = Disturbance(vae=0.15, latent_noise=0.4, blur=0.3, noise=0.1, light=0.1, tint=0.04, zoom=0.06, shift=1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training_options("crd.tiny.train_image_text", __doc__.splitlines()[0], out=FOLDER, vae=VAE)
    parser.set_defaults(images=80_000, batch=32, save_every=10_000)
    parser.add_argument("--eval-every", type=int, default=20_000, help="images between two measurements")
    return parser.parse_args(argv)


def draw_families(rng: np.random.Generator, size: int, progress: float) -> tuple[Tensor, Objects, list[Subject]]:
    """Pictures (B, 3, 64, 64) in [-1, 1], what is in them and their subjects in random order, `FAMILY` alike each.

    Letters and objects are of a class in `MARKS`, and their boxes are their middles; a letter's color is `IGNORED`.

    Args:
        rng: draws all that is random.
        size: B, a multiple of `FAMILY`.
        progress: share of the training that is done, in [0, 1].
    """
    drawn: list[tuple[Subject, np.ndarray, list[Mark]]] = []
    while len(drawn) < size:
        climbed = sum(progress >= share for share in CLIMB)
        level = LEVELS[climbed + int(climbed == len(CLIMB) and rng.random() < 0.5)]
        first = random_subject(rng, level, SCENES)
        family = [first, *near_misses(first, rng, FAMILY - 1, is_training)]
        drawn += [(subject, *draw_with_marks(subject, rng, level)) for subject in family]
    # The order decides which pictures pass the VAE.
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    images = torch.from_numpy(np.stack([picture for _, picture, _ in drawn])).permute(0, 3, 1, 2) / 127.5 - 1.0
    rows = [(i, MARKS.index(mark.name), IGNORED if mark.color is None else COLORS.index(mark.color), mark.x, mark.y)
            for i, (_, _, marks) in enumerate(drawn) for mark in marks]  # fmt: skip
    table = torch.tensor(rows, dtype=torch.float32)
    picture, kind, color = table[:, :3].long().T
    return images, Objects(picture, kind, color, table[:, [3, 4, 3, 4]]), [subject for subject, *_ in drawn]


def cells_of(marks: Objects) -> tuple[Tensor, Tensor]:
    """Row and column (M,) int64 of the cell of each mark's middle."""
    column, row = (marks.boxes[:, :2] / SIZE * torch.tensor([CELLS[1], CELLS[0]])).long().T
    return row.clamp(0, CELLS[0] - 1), column.clamp(0, CELLS[1] - 1)


def marked_cells(marks: Objects, pictures: int) -> Tensor:
    """What each cell (B, *CELLS) int64 has in its middle, a number in `MARKS`; `IGNORED` around a mark."""
    wanted = torch.zeros(pictures, *CELLS, dtype=torch.int64)
    row, column = cells_of(marks)
    for down, right in sorted(((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)), key=lambda step: step == (0, 0)):
        y, x = (row + down).clamp(0, CELLS[0] - 1), (column + right).clamp(0, CELLS[1] - 1)
        middle = (down, right) == (0, 0)
        wanted[marks.picture, y, x] = marks.class_index if middle else torch.full_like(x, IGNORED)
    return wanted


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, meanings: list[str]) -> Tensor:
    """Mean cross-entropy of finding caption by picture and picture by caption.

        logits_ij = scale cos(image_i, text_j),    j left out for i if it means the same and is another

    Args:
        images: (B, D) unit vectors.
        texts: (B, D) unit vectors of their captions.
        scale: () above 0.
        meanings: B names of what is to be seen.
    """
    numbers = torch.tensor([meanings.index(name) for name in meanings])
    alike = (numbers[:, None] == numbers) & ~torch.eye(len(numbers), dtype=torch.bool)
    logits = (scale * images @ texts.T).masked_fill(alike, -torch.inf)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Reader(nn.Module):
    """Guesses letters and words of a caption from its picture; used while training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Conv2d(WIDTH, len(MARKS), 1)
        self.color = nn.Conv2d(WIDTH, len(COLORS), 1)
        self.letter = nn.Linear(FEATURES, WORD_LENGTHS[1] * (1 + len(LETTERS)))
        self.word = nn.Linear(FEATURES, len(VOCABULARY))
        nn.init.constant_(self.word.bias, -3.0)

    def reading(self, maps: Tensor, marks: Objects) -> Tensor:
        """Cross-entropy of what the cells have in their middle and of the objects' colors there, a mark.

        Args:
            maps: (B, WIDTH, *CELLS) of the pictures.
            marks: of the pictures, as `draw_families` gives them.
        """
        wanted = marked_cells(marks, len(maps))
        kinds = F.cross_entropy(self.cell(maps).float(), wanted, ignore_index=IGNORED, reduction="sum")
        row, column = cells_of(marks)
        guesses = self.color(maps).float()[marks.picture, :, row, column]
        colors = F.cross_entropy(guesses, marks.color_index, ignore_index=IGNORED, reduction="sum")
        return (kinds + colors) / len(marks.picture)

    def loss(self, features: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy a letter's place of the pictures of words, and a caption's of its words.

        Args:
            features: (B, 320) of the pictures.
            table: (B, 2, 14) tokens of their captions.
        """
        letters = torch.zeros(len(table), MAX_WORDS + WORD_LENGTHS[1], dtype=torch.int64)
        letters = letters.scatter_(1, table[:, 1], table[:, 0])[:, MAX_WORDS:]
        spelled = letters.any(dim=1)
        guesses = self.letter(features[spelled]).unflatten(1, (WORD_LENGTHS[1], -1)).flatten(0, 1).float()
        words = torch.zeros(len(table), len(VOCABULARY)).scatter_(1, table[:, 0], 1.0)
        named = F.binary_cross_entropy_with_logits(self.word(features).float(), words, reduction="none")
        known = named[:, 1 + len(LETTERS) :].sum(dim=1).mean()
        return F.cross_entropy(guesses, letters[spelled].flatten()) if spelled.any() else known * 0.0, known


def train(args: argparse.Namespace) -> None:
    """Train until `--images`, and write the model; an interrupted training writes none.

    Raises:
        CRDError: a batch that is no number of whole families.
    """
    if args.batch < FAMILY or args.batch % FAMILY:
        raise CRDError(f"--batch must be a positive multiple of {FAMILY}, got {args.batch}; change it")
    model = build_image_text(args.seed)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        reader = Reader()
    state = State(args.work, {"model": model, "reader": reader}, args.lr)
    model.train()

    def step(images: int) -> dict[str, float]:
        rng = np.random.default_rng((args.seed, 11, images))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + images)
        pictures, marks, subjects = draw_families(rng, args.batch, images / args.images)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            pictures, marks = disturb(pictures, marks, SOFT, vae, generator)
            maps, table = model.image.maps(pictures), tokens([caption_of(subject) for subject in subjects])
            features, reading = model.image.features(maps), reader.reading(maps, marks)
            seen, told = model.image.embed(features), model.embed_texts(table)
            spelling, naming = reader.loss(features, table)
        loss = contrastive_loss(seen, told, model.scale, [meaning(subject) for subject in subjects])
        (loss + READING * reading + SPELLING * spelling + NAMING * naming).backward()
        numbers = {"loss": loss, "reading": reading, "spelling": spelling, "naming": naming, "scale": model.scale}
        return {name: number.item() for name, number in numbers.items()}

    def measure(images: int) -> None:
        if images % args.eval_every < args.batch:
            state.swap_average()
            model.eval()
            log(args.work, {**retrieval(model, 192), **state.counters})
            model.train()
            state.swap_average()

    if run_training(args, state, step, warm=100, cool=0.5, after=measure):
        save_image_text(model, args.out)


def main(argv: list[str] | None = None) -> None:
    train(parse_arguments(argv))


if __name__ == "__main__":
    main()
