"""The classes and materials of the drawn scenes, and a picture and its label map, made of shapes.

Chance and materials are integers only. Nothing depends on a floating-point rounding, on a C
library or on a random stream that NumPy may change, so that a seed gives the same pixels on every
machine.
"""

from collections.abc import Sequence

import numpy as np

Colour = tuple[int, int, int]

# Of each material: (rows, columns) between the lattice points of its noise's octaves, and its
# colours from the darkest to the lightest.
MATERIALS: dict[str, tuple[list[tuple[int, int]], tuple[Colour, Colour, Colour]]] = {
    "blue": ([(12, 70), (4, 26)], ((92, 152, 212), (128, 184, 228), (184, 220, 240))),
    "white": ([(12, 16), (5, 6)], ((206, 216, 232), (234, 239, 246), (253, 253, 254))),
    "grey": ([(8, 8), (3, 3), (2, 2)], ((92, 90, 98), (134, 132, 134), (178, 175, 172))),
    "green": ([(9, 11), (4, 4), (2, 2)], ((70, 122, 52), (104, 156, 66), (146, 186, 88))),
    "yellow": ([(6, 6), (2, 3)], ((232, 160, 40), (248, 198, 66), (255, 232, 132))),
    "bark": ([(12, 2)], ((80, 56, 40), (104, 76, 54), (128, 98, 72))),
}
# The brightnesses in which every material occurs, in 128ths.
TONES = (108, 116, 124, 132, 140)

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


class Dice:
    """Random integers from the raw output of PCG64, the stream that NumPy promises to keep."""

    def __init__(self, *key: int) -> None:
        """Seed with the numbers ``key``; equal keys give equal throws."""
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def integer(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in ``percent`` of 100 throws."""
        return self.integer(1, 100) <= percent

    def octets(self, *shape: int) -> np.ndarray:
        """An int32 array of ``shape`` with values 0..255."""
        count = int(np.prod(shape))
        words = self._bits.random_raw((count + 7) // 8).astype("<u8")
        return words.view(np.uint8)[:count].astype(np.int32).reshape(shape)


def value_noise(dice: Dice, height: int, width: int, cell_y: int, cell_x: int) -> np.ndarray:
    """Smooth random hills: random values on a lattice, interpolated between.

    Args:
        dice: where the lattice values come from.
        height: rows of the result.
        width: columns of the result.
        cell_y: rows between lattice points.
        cell_x: columns between lattice points.

    Returns:
        (height, width) int32, 0..255.
    """
    row, weight_y = _cells(height, cell_y)
    column, weight_x = _cells(width, cell_x)
    lattice = dice.octets(row[-1] + 2, column[-1] + 2)
    rows = lattice[row] * (256 - weight_y)[:, None] + lattice[row + 1] * weight_y[:, None]
    return (rows[:, column] * (256 - weight_x) + rows[:, column + 1] * weight_x) >> 16


def _cells(length: int, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of ``length`` positions: its lattice cell, and a smooth weight 0..256 in it."""
    position = np.arange(length)
    offset = position % cell
    weight = 256 * offset * offset * (3 * cell - 2 * offset) // cell**3
    return position // cell, weight.astype(np.int32)


def fractal_noise(dice: Dice, height: int, width: int, cells: list[tuple[int, int]]) -> np.ndarray:
    """Noise of several cell sizes, each counting half as much as the one before.

    Args:
        dice: where the lattice values come from.
        height: rows of the result.
        width: columns of the result.
        cells: (cell_y, cell_x) of each octave.

    Returns:
        (height, width) int32, 0..255.
    """
    total = np.zeros((height, width), np.int32)
    for cell_y, cell_x in cells:
        total = 2 * total + value_noise(dice, height, width, cell_y, cell_x)
    return total // (2 ** len(cells) - 1)


def sheet(dice: Dice, name: str, height: int, width: int, scale: int) -> np.ndarray:
    """A sheet of a material, from which all its objects in an image are cut.

    Args:
        dice: where the noise comes from.
        name: a key of ``MATERIALS``.
        height: rows.
        width: columns.
        scale: the sheet's pixels are enlarged this many times.

    Returns:
        At least (height, width) uint8, from the material's darkest to its lightest.
    """
    cells, _ = MATERIALS[name]
    noise = fractal_noise(dice, -(-height // scale), -(-width // scale), cells)
    # Averaging octaves draws the values together; spread them out again.
    noise = np.clip((noise - 128) * 3 // 2 + 128, 0, 255).astype(np.uint8)
    return noise.repeat(scale, axis=0).repeat(scale, axis=1)


def colours(dice: Dice, name: str) -> np.ndarray:
    """What the values of a material's sheet look like, in each tone.

    Args:
        dice: where the variation between images comes from.
        name: a key of ``MATERIALS``.

    Returns:
        (len(TONES), 256, 3) int32 RGB, 0..255.
    """
    _, (dark, middle, light) = MATERIALS[name]
    shift = dice.octets(3) * 17 // 256 - 8
    low, mid, high = (np.array(colour, np.int32) + shift for colour in (dark, middle, light))
    level = np.arange(256, dtype=np.int32)[:, None]
    ramp = np.where(
        level < 128,
        low + (mid - low) * level // 128,
        mid + (high - mid) * (level - 128) // 128,
    )
    return np.stack([np.clip(ramp * tone >> 7, 0, 255) for tone in TONES])


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
