"""The classes of the drawn scenes, and a picture and its label map, made of shapes."""

from collections.abc import Sequence

import numpy as np

from semask.data.datasets.scenes.texture import MATERIALS, TONES, Dice, colours, sheet

CLASSES = ["sky", "cloud", "sun", "mountain", "snow", "lake", "grass", "tree", "hay", "road"]
SKY, CLOUD, SUN, MOUNTAIN, SNOW, LAKE, GRASS, TREE, HAY, ROAD = range(10)
COLORS = [
    [135, 190, 235],
    [240, 240, 245],
    [255, 215, 40],
    [130, 120, 115],
    [200, 225, 250],
    [40, 100, 190],
    [150, 205, 90],
    [30, 115, 50],
    [225, 150, 50],
    [85, 85, 95],
]
# The two classes made of each material.
CLASSES_OF_MATERIAL = {
    "blue": (SKY, LAKE),
    "white": (CLOUD, SNOW),
    "yellow": (SUN, HAY),
    "grey": (MOUNTAIN, ROAD),
    "green": (GRASS, TREE),
}
MATERIAL_OF_CLASS = {label: name for name, pair in CLASSES_OF_MATERIAL.items() for label in pair}


# A picture is drawn this many times larger and averaged, for soft edges. All lengths are in pixels
# of the large picture.
SCALE = 2
# Objects are cut from up to this far away on the sheet, so that neighbours' textures do not join.
_SHEET_MARGIN = 64
RIM = 2
# Brightness of rims and shadows, in 128ths.
_DARK = 98

Ellipse = tuple[int, int, int, int]
"""Row and column of the centre, vertical and horizontal radius."""


class Painting:
    """One scene while it is drawn, later shapes over earlier ones.

    It is kept as numbers of materials, tones and shades, and coloured once at the end.
    """

    def __init__(self, dice: Dice, height: int, width: int) -> None:
        """An empty picture.

        Args:
            dice: source of all random choices.
            height, width: of the picture in pixels.
        """
        self.dice = dice
        self.height, self.width = height, width
        self.y = np.arange(height)[:, None]
        self.x = np.arange(width)[None, :]
        self.label = np.zeros((height, width), np.uint8)
        self._paint = np.zeros((height, width), np.uint8)
        self._grain = np.zeros((height, width), np.uint8)
        self._shade = np.zeros((height, width), np.uint8)
        size = (height + _SHEET_MARGIN, width + _SHEET_MARGIN)
        self._sheets = {name: sheet(dice, name, *size, SCALE) for name in MATERIALS}
        self._colours = np.concatenate([colours(dice, name) for name in MATERIALS])
        self._first_paint = {name: i * len(TONES) for i, name in enumerate(MATERIALS)}

    def image(self) -> np.ndarray:
        """The picture so far, (height, width, 3) int32 RGB, 0..255."""
        looks = self._paint.astype(np.int32) * 256 + self._grain
        return self._colours.reshape(-1, 3)[looks] * self._shade[..., None] >> 7

    def tone(self, other_than: int = -1) -> int:
        """A brightness for one object, drawn alike for all classes."""
        tone = self.dice.integer(0, len(TONES) - 1)
        return self.tone(other_than) if tone == other_than else tone

    def tone_at(self, y: int, x: int) -> int:
        """The brightness of what is at a place."""
        return int(self._paint[y, x]) % len(TONES)

    def shape(
        self,
        mask: np.ndarray,
        label: int,
        tone: int,
        top: int = 0,
        left: int = 0,
        made_of: str | None = None,
    ) -> None:
        """Lay a shape on the picture, with a darker rim.

        Args:
            mask: (h, w) bool; the shape.
            label: its class.
            tone: brightness, an index of ``TONES``.
            top: row of the picture where the mask begins.
            left: column of the picture where the mask begins.
            made_of: material; the class's own by default.
        """
        name = made_of or MATERIAL_OF_CLASS[label]
        y, x = (self.dice.integer(0, _SHEET_MARGIN) for _ in range(2))
        height, width = mask.shape
        area = (slice(top, top + height), slice(left, left + width))
        cut = self._sheets[name][y + top : y + top + height, x + left : x + left + width]
        np.copyto(self._grain[area], cut, where=mask)
        self._paint[area][mask] = self._first_paint[name] + tone
        self._shade[area][mask] = 128
        self.label[area][mask] = label
        inner = mask.copy()
        inner[RIM:] &= mask[:-RIM]
        inner[:-RIM] &= mask[RIM:]
        inner[:, RIM:] &= mask[:, :-RIM]
        inner[:, :-RIM] &= mask[:, RIM:]
        self._shade[area][mask & ~inner] = _DARK

    def ellipses(self, label: int, tone: int, ellipses: Sequence[Ellipse]) -> None:
        """Lay the union of some ellipses on the picture."""
        mask, top, left = self._union(ellipses)
        self.shape(mask, label, tone, top, left)

    def shadow(self, ellipse: Ellipse) -> None:
        """Darken an ellipse of the grass."""
        mask, top, left = self._union([ellipse])
        area = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        self._shade[area][mask & (self.label[area] == GRASS)] = _DARK

    def box(self, top: int, bottom: int, left: int, right: int) -> tuple[int, int, int, int]:
        """The given box, cut at the picture's border."""
        rows, columns = (
            np.clip([top, bottom], 0, self.height),
            np.clip([left, right], 0, self.width),
        )
        return int(rows[0]), int(rows[1]), int(columns[0]), int(columns[1])

    def _union(self, ellipses: Sequence[Ellipse]) -> tuple[np.ndarray, int, int]:
        """Mask, top and left."""
        top, bottom, left, right = self.box(
            min(cy - ry for cy, cx, ry, rx in ellipses) - RIM,
            max(cy + ry for cy, cx, ry, rx in ellipses) + 1 + RIM,
            min(cx - rx for cy, cx, ry, rx in ellipses) - RIM,
            max(cx + rx for cy, cx, ry, rx in ellipses) + 1 + RIM,
        )
        mask = np.zeros((bottom - top, right - left), bool)
        for cy, cx, ry, rx in ellipses:
            dy, dx = self.y[top:bottom] - cy, self.x[:, left:right] - cx
            mask |= dy * dy * (rx * rx) + dx * dx * (ry * ry) <= rx * rx * ry * ry
        return mask, top, left
