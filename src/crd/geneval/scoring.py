"""The three GenEval scores of an image: as the benchmark has it, with exact counts, and graded for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crd.geneval.detections import PUBLISHED, Detections, Thresholds, kept
from crd.geneval.metadata import RELATIONS, Include, Metadata
from crd.geneval.relations import relations

__all__ = ["Score", "Scores", "score_batch", "score_image"]


@dataclass(frozen=True)
class Score:
    """Scores of one image; `reasons` tells why `official` or `strict` is 0, and is empty where both are 1."""

    official: float  # 0 or 1
    strict: float  # 0 or 1
    soft: float  # in [0, 1]
    reasons: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of B images."""

    official: np.ndarray  # (B,) float64, 0 or 1
    strict: np.ndarray  # (B,) float64, 0 or 1
    soft: np.ndarray  # (B,) float64 in [0, 1]
    reasons: tuple[tuple[str, ...], ...]  # (B,)


@dataclass(frozen=True, eq=False)
class _Group:
    """How the objects of one include did."""

    class_name: str
    indices: np.ndarray  # (min(n, count),) its most confident objects
    matched: bool  # in the official sense: at least `count`
    exact: bool  # in the strict sense: matched, exactly `count`, and the same of the group it is placed by
    terms: tuple[float, ...]  # of the soft score
    reasons: tuple[str, ...]


def score_image(
    detections: Detections, metadata: Metadata, thresholds: Thresholds = PUBLISHED, paper_compat: bool = False
) -> Score:
    """Judge the objects of one image by what its prompt asks for.

        official = 1 if of every include the `count` most confident objects exist and have its color and position,
                     and of no exclude there are `count`
        strict   = official, and of every include there are exactly `count`
        soft     = mean over the terms of all includes; excludes give none
                     count:    max(0, 1 - |n - count| / count)
                     color:    max(0, 1 - |n_color - count| / count) if n = count, else 0
                     position: 1 if count, color and every pair hold, and the other group matched exactly, else 0

    Args:
        detections: the objects of the image; colors at least where `objects_to_color` says.
        metadata: the prompt.
        thresholds: which objects count.
        paper_compat: append a further soft term 1 after a position whose pairs were compared and failed, as
            Flow-GRPO's code does. This alone: the count term stays floored at 0, where that code lets it go below.

    Raises:
        CRDError: as `kept`.
        ValueError: a color is needed of an object that was not looked at.

    Source: official GenEval, arXiv 2310.11513; soft Flow-GRPO, arXiv 2505.05470.
    """
    objects = kept(detections, metadata, thresholds)
    groups: list[_Group] = []
    for wanted in metadata.include:
        group = _count_and_color(wanted, objects[wanted.class_name], detections, metadata.prompt)
        if wanted.position is not None:
            relation, target = wanted.position
            group = _place(group, relation, groups[target], detections, thresholds.position, paper_compat)
        groups.append(group)
    excess = tuple(
        f"{banned.class_name}: expected fewer than {banned.count}, found {len(objects[banned.class_name])}"
        for banned in metadata.exclude
        if len(objects[banned.class_name]) >= banned.count
    )
    terms = [term for group in groups for term in group.terms]
    return Score(
        official=float(not excess and all(group.matched for group in groups)),
        strict=float(not excess and all(group.exact for group in groups)),
        soft=sum(terms) / len(terms),
        reasons=tuple(reason for group in groups for reason in group.reasons) + excess,
    )


def score_batch(
    detections: Sequence[Detections],
    metadata: Sequence[Metadata],
    thresholds: Thresholds = PUBLISHED,
    paper_compat: bool = False,
) -> Scores:
    """`score_image` of B images, each with its own prompt.

    Raises:
        CRDError: as `kept`.
        ValueError: B differs, or a color is needed of an object that was not looked at.
    """
    if len(detections) != len(metadata):
        raise ValueError(f"metadata must be one for each of the {len(detections)} images, got {len(metadata)}")
    scores = [score_image(d, m, thresholds, paper_compat) for d, m in zip(detections, metadata, strict=True)]
    official, strict, soft = np.array([(s.official, s.strict, s.soft) for s in scores]).reshape(-1, 3).T
    return Scores(official, strict, soft, tuple(s.reasons for s in scores))


def _count_and_color(wanted: Include, found: np.ndarray, detections: Detections, prompt: str) -> _Group:
    n, count, name = len(found), wanted.count, wanted.class_name
    top = found[:count]
    matched, exact, terms, reasons = n >= count, n == count, [_closeness(n, count)], []
    if n != count:
        reasons.append(f"{name}: expected {'exactly ' if matched else ''}{count}, found {n}")
    if wanted.color is not None:
        seen = _colors(detections, top, prompt) if matched else []
        right = seen.count(wanted.color)
        terms.append(_closeness(right, count) if exact else 0.0)
        if matched and right < count:
            matched = exact = False
            tally = " and ".join(f"{seen.count(color)} {color}" for color in sorted(set(seen)))
            reasons.append(f"{name}: expected {count} {wanted.color}, found {tally}")
    return _Group(name, top, matched, exact, tuple(terms), tuple(reasons))


def _place(
    group: _Group, relation: str, target: _Group, detections: Detections, threshold: float, paper_compat: bool
) -> _Group:
    """`group` with its position judged: every object of it against every object of `target`."""
    wish = f"{group.class_name}: expected {relation} {target.class_name}"
    reasons = list(group.reasons)
    holds = group.matched and target.matched
    if group.matched and not target.matched:
        reasons.append(f"{wish}, found no {target.class_name} that fits")
    elif group.matched:
        seen = relations(detections.boxes[group.indices], detections.boxes[target.indices], threshold)
        fits = seen[..., RELATIONS.index(relation)]
        holds = bool(fits.all())
        if not holds:
            true = [RELATIONS[i] for i in np.flatnonzero(seen[~fits][0])]
            reasons.append(f"{wish}, found {' and '.join(true) or 'no relation'}")
    # Where counts are exact the groups compared above are whole, so the strict comparison is the same one.
    compared = group.exact and target.exact
    exact = compared and holds
    extra = (1.0,) if paper_compat and compared and not holds else ()
    terms = (*group.terms, float(exact), *extra)
    return _Group(group.class_name, group.indices, holds, exact, terms, tuple(reasons))


def _colors(detections: Detections, indices: np.ndarray, prompt: str) -> list[str]:
    known = detections.colors or (None,) * len(detections.labels)
    found = []
    for index in indices:
        color = known[index]
        if color is None:
            raise ValueError(f"prompt {prompt!r:.80} needs the color of object {index} ({detections.labels[index]}), "
                             "got None; classify objects_to_color(...) and add the names by with_colors")  # fmt: skip
        found.append(color)
    return found


def _closeness(n: int, count: int) -> float:
    return max(0.0, 1 - abs(n - count) / count)
