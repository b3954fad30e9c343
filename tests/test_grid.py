"""Contact sheets: where pictures lie, and how much room their headers take."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from crd.grid import GridRow, draw_grid

CELL = 40
RED, BLUE = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))


@pytest.mark.parametrize(
    ("header", "lines"), [("", 1), ("short", 1), ("two words", 2), ("many words that go on and on and on", 3)]
)
def test_headers_are_wrapped_and_pictures_lie_below(header: str, lines: int) -> None:
    sheet = draw_grid([GridRow("title", [RED, BLUE], ["1", "2"])], [header, ""], CELL)
    head = 4 + 14 * lines
    assert sheet.height == head + CELL + 14 + 4
    for place, color in enumerate(((255, 0, 0), (0, 0, 255))):
        left = 130 + place * (CELL + 4)
        picture = np.asarray(sheet.crop((left, head, left + CELL, head + CELL)))
        assert (picture == color).all()
    # Nothing is written beyond the column: the second one has no header.
    assert (np.asarray(sheet.crop((130 + CELL + 4, 0, sheet.width, head))) == 255).all()


def test_a_picture_that_is_not_square_keeps_its_shape() -> None:
    wide = Image.new("RGB", (16, 8), "red")
    picture = np.asarray(draw_grid([GridRow("a", [wide])], [""], CELL).crop((130, 18, 130 + CELL, 18 + CELL)))
    assert (picture[10:30] == (255, 0, 0)).all()
    assert (np.concatenate([picture[:10], picture[30:]]) == 255).all()


def test_rows_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every row must hold 2 images, got \[2, 1\]"):
        draw_grid([GridRow("a", [RED, BLUE]), GridRow("b", [RED])], ["", ""], CELL)
