"""Landscapes in which the texture of a thing does not determine its class.

Every image has five materials, and every material makes two classes: blue is sky or lake, white
is cloud or snow, yellow is the sun or a hay bale, grey is mountain or road, green is grass or
tree. Both classes of a pair are cut from the same sheet, in brightnesses drawn alike, so that a
small patch of one looks exactly like a small patch of the other; only the surroundings differ.
"""

import numpy as np

from semask.data.datasets.scenes.painting import (
    CLOUD,
    GRASS,
    HAY,
    LAKE,
    MOUNTAIN,
    RIM,
    ROAD,
    SCALE,
    SKY,
    SNOW,
    SUN,
    TREE,
    Dice,
    Painting,
    fractal_noise,
    value_noise,
)

# Raised whenever a change here, or in what is imported above, changes a pixel.
GENERATOR_VERSION = 1


def _skyline(p: Painting, base: int, rise: int, cells: list[int]) -> np.ndarray:
    """For each column the row where the ground begins, at most ``rise`` above ``base``."""
    profile = fractal_noise(p.dice, 1, p.width, [(1, cell) for cell in cells])[0]
    return base - profile * rise // 255


def _heap(p: Painting, label: int, cy: int, cx: int, ry: int) -> None:
    """Something white: a flat ellipse with rounder ones along its upper edge."""
    rx = ry * p.dice.integer(2, 4)
    parts = [(cy, cx, ry * 2 // 3, rx)]
    for _ in range(p.dice.integer(3, 6)):
        radius = p.dice.integer(ry * 2 // 3, ry + 2)
        rise, shift = p.dice.integer(0, ry * 2 // 3), p.dice.integer(-rx * 2 // 3, rx * 2 // 3)
        parts.append((cy - rise, cx + shift, radius, radius * 3 // 2))
    p.ellipses(label, p.tone(), parts)


def _mountains(p: Painting, horizon: int) -> None:
    """Up to three ranges, the nearer ones lower, some with snow on top."""
    layers = p.dice.integer(1, 3)
    tone = -1
    for layer in range(layers):
        rise = p.dice.integer(70, 160) * (layers - layer) // layers
        ridge = _skyline(p, horizon + 8, rise, [90, 40, 18, 8, 4])
        body = p.y >= ridge
        tone = p.tone(other_than=tone)
        p.shape(body, MOUNTAIN, tone)
        if p.dice.chance(60):
            crest = int(ridge.min())
            ragged = value_noise(p.dice, 1, p.width, 1, 9)[0] * 24 // 255 - 12
            line = crest + (horizon - crest) * p.dice.integer(25, 60) // 100 + ragged
            p.shape(body & (p.y < line), SNOW, p.tone())


def _lake(p: Painting, horizon: int) -> None:
    """Water from side to side, or a rounded lake."""
    tone = p.tone()
    if p.dice.chance(45):
        top = horizon + p.dice.integer(10, 24)
        bottom = top + (p.height - top) * p.dice.integer(30, 75) // 100
        upper, lower = _skyline(p, top + 6, 12, [80, 30]), _skyline(p, bottom + 8, 20, [80, 30])
        p.shape((p.y >= upper) & (p.y < lower), LAKE, tone)
        return
    ry = p.dice.integer(16, 40)
    rx = ry * p.dice.integer(2, 4)
    cy = p.dice.integer(horizon + ry + 8, max(p.height - ry, horizon + ry + 8))
    cx = p.dice.integer(0, p.width)
    upper, lower = _skyline(p, 8, 16, [50, 20]), _skyline(p, 8, 16, [50, 20])
    reach = np.maximum(rx * rx - (p.x[0] - cx) ** 2, 0) * ry // (rx * rx)
    p.shape((p.y > cy - reach + upper) & (p.y < cy + reach + lower) & (reach > 0), LAKE, tone)


def _road(p: Painting, horizon: int) -> None:
    """From the lower edge towards the horizon, narrowing and swinging."""
    depth = p.height - horizon
    near, far = p.dice.integer(p.width // 5, p.width * 4 // 5), p.dice.integer(0, p.width)
    bend = p.dice.integer(-p.width // 2, p.width // 2)
    half = p.dice.integer(p.width // 12, p.width // 6)
    t = np.maximum(p.y - horizon, 0)
    u = depth - t
    centre = (near * t * t + 2 * (near + bend) * t * u + far * u * u) // (depth * depth)
    width = 3 + half * t // depth
    p.shape((p.y >= horizon) & (abs(p.x - centre) <= width), ROAD, p.tone())


def _tree(p: Painting, base: int, cx: int, size: int) -> None:
    """A trunk that stands on row ``base``, and a crown, of ``size`` in all."""
    ground = p.tone_at(base, cx)
    p.shadow((base, cx + size // 6, max(size // 12, 2), size * 2 // 5))
    trunk = max(size // 16, 2)
    top, bottom, left, right = p.box(base - size // 2, base + 2, cx - trunk, cx + trunk)
    stem = np.ones((bottom - top, right - left), bool)
    p.shape(stem, TREE, p.tone(), top, left, made_of="bark")
    tone = p.tone(other_than=ground)
    if p.dice.chance(40):
        _conifer(p, base - size // 6, cx, size, tone)
    else:
        _crown(p, base - size * 2 // 3, cx, size // 3, tone)


def _conifer(p: Painting, base: int, cx: int, size: int, tone: int) -> None:
    """Three triangles, one above the other."""
    for tier in range(3):
        low, high = base - size * tier // 4, base - size * (5 * tier + 9) // 20
        half = size * (9 - 2 * tier) // 30
        top, bottom, left, right = p.box(high - RIM, low, cx - half - RIM, cx + half + RIM)
        reach = (p.y[top:bottom] - high) * half // (low - high)
        p.shape(abs(p.x[:, left:right] - cx) <= reach, TREE, tone, top, left)


def _crown(p: Painting, cy: int, cx: int, radius: int, tone: int) -> None:
    """Overlapping discs."""
    for _ in range(p.dice.integer(5, 8)):
        dy = p.dice.integer(-radius // 2, radius // 2)
        dx = p.dice.integer(-radius * 2 // 3, radius * 2 // 3)
        part = p.dice.integer(radius // 2, radius * 2 // 3)
        p.ellipses(TREE, tone, [(cy + dy, cx + dx, part, part)])


def _clouds(p: Painting, horizon: int, count: int) -> None:
    for _ in range(count):
        cy = p.dice.integer(8, max(horizon - 30, 10))
        _heap(p, CLOUD, cy, p.dice.integer(0, p.width), p.dice.integer(7, 16))


def _disc(p: Painting, label: int, cy: int, cx: int) -> None:
    """The sun around (cy, cx), or a bale that stands there."""
    radius = p.dice.integer(14, 24)
    if label == HAY:
        cy -= radius
        p.shadow((cy + radius, cx + 6, radius // 3, radius + 4))
    p.ellipses(label, p.tone(), [(cy, cx, radius, radius)])


def _heaven(p: Painting, horizon: int) -> None:
    """Everything above the ground, from far to near."""
    p.shape(np.ones((p.height, p.width), bool), SKY, p.tone())
    if p.dice.chance(80):
        _disc(p, SUN, p.dice.integer(10, horizon - 16), p.dice.integer(0, p.width))
    behind, in_front = p.dice.integer(0, 2), p.dice.integer(0, 2)
    _clouds(p, horizon, behind)
    if p.dice.chance(75):
        _mountains(p, horizon)
    _clouds(p, horizon, in_front)


def _earth(p: Painting, horizon: int) -> None:
    """Hills of grass with a lake between them, a road, and snow that has not melted."""
    dice = p.dice
    tone = p.tone()
    p.shape(p.y >= _skyline(p, horizon + 6, dice.integer(4, 26), [150, 60]), GRASS, tone)
    hills = dice.integer(1, 3)
    lake_after = dice.integer(0, hills) if dice.chance(80) else -1
    for hill in range(hills + 1):
        if hill:
            base = horizon + (p.height - horizon) * hill // (hills + 1)
            tone = p.tone(other_than=tone)
            p.shape(p.y >= _skyline(p, base + 24, 50, [170, 60]), GRASS, tone)
        if hill == lake_after:
            _lake(p, horizon)
    if dice.chance(65):
        _road(p, horizon + dice.integer(8, 30))
    if dice.chance(45):
        for _ in range(dice.integer(1, 3)):
            y, x = _meadow(p, horizon + 20)
            _heap(p, SNOW, y, x, dice.integer(5, 11))


def _meadow(p: Painting, top: int) -> tuple[int, int]:
    """A random place on grass."""
    for _ in range(20):
        y, x = p.dice.integer(top, p.height - 1), p.dice.integer(0, p.width - 1)
        if p.label[y, x] == GRASS:
            break
    return y, x


def _things(p: Painting, horizon: int) -> None:
    """Trees and hay bales."""
    dice = p.dice
    places = [(*_meadow(p, horizon + 12), TREE) for _ in range(dice.integer(1, 7))]
    if dice.chance(60):
        places += [(*_meadow(p, horizon + 30), HAY) for _ in range(dice.integer(1, 3))]
    # What stands lower in the picture is nearer.
    for y, x, label in sorted(places):
        if label == TREE:
            near = (y - horizon) * 100 // (p.height - horizon)
            _tree(p, y, x, dice.integer(40, 60) + near * dice.integer(40, 100) // 100)
        else:
            _disc(p, HAY, y, x)


def _photograph(p: Painting) -> np.ndarray:
    """The finished picture as a camera sees it, (H, W, 3) uint8 at the final size."""
    dice, image = p.dice, p.image()
    parts = [image[row::SCALE, column::SCALE] for row in range(SCALE) for column in range(SCALE)]
    image = np.sum(parts, axis=0) // SCALE**2
    if dice.chance(30):
        wide = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
        image = rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] >> 4
    contrast, light = dice.integer(100, 144), dice.integer(-16, 20)
    warmth = dice.integer(-8, 12)
    gain = np.array([128 + warmth, 128, 128 - warmth], np.int32)
    image = ((image - 128) * contrast // 128 + 128 + light) * gain >> 7
    noise = dice.octets(*image.shape) + dice.octets(*image.shape) - 255
    return np.clip(image + (noise * dice.integer(2, 12) >> 8), 0, 255).astype(np.uint8)


def render_scene(seed: int, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene; equal arguments give equal pixels, everywhere.

    Args:
        seed: of the whole dataset.
        split: number of the split.
        index: number of the image in its split.

    Returns:
        The photograph, (H, W, 3) uint8 RGB, and its label map, (H, W) uint8 with indices of
        ``CLASSES``; H and W lie in 144..176.
    """
    dice = Dice(seed, split, index)
    height, width = dice.integer(144, 176), dice.integer(144, 176)
    p = Painting(dice, height * SCALE, width * SCALE)
    horizon = dice.integer(p.height * 28 // 100, p.height * 62 // 100)
    _heaven(p, horizon)
    _earth(p, horizon)
    _things(p, horizon)
    return _photograph(p), p.label[::SCALE, ::SCALE].copy()
