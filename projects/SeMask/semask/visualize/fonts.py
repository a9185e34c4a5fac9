"""The font of a text: matplotlib's DejaVu Sans, or an installed one for characters it lacks."""

import functools
import logging
import os

import numpy as np
from PIL import ImageFont

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1024)
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that has the characters of a text.

    Without one, such as for Chinese where no Chinese font is installed, it is DejaVu Sans, which
    draws boxes instead; this is logged once.

    Args:
        text: one line.
        size: in pixels.
    """
    wanted = np.array([ord(character) for character in text if character.isprintable()], np.int32)
    for path in (_default(), *(() if _has(_default(), wanted) else _installed())):
        if _has(path, wanted):
            return _font(path, size)
    _log_once()
    return _font(_default(), size)


def _has(path: str, wanted: np.ndarray) -> bool:
    return bool(np.isin(wanted, _characters(path)).all())


@functools.cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.cache
def _default() -> str:
    """DejaVu Sans: Pillow's own font has no accented letters."""
    import matplotlib  # imported here: it takes 30 MiB

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.cache
def _characters(path: str) -> np.ndarray:
    """The code points of a font file; none if it cannot be used."""
    from matplotlib.ft2font import FT2Font

    try:
        _font(path, 12)  # Pillow refuses some bitmap fonts
        return np.array(sorted(FT2Font(path).get_charmap()), np.int32)
    except (OSError, RuntimeError):
        return np.zeros(0, np.int32)


@functools.cache
def _installed() -> tuple[str, ...]:
    """Paths of the system's fonts, regular ones without serifs first."""
    from matplotlib import font_manager

    def rank(path: str) -> tuple[bool, bool, str]:
        name = os.path.basename(path).lower()
        styled = any(word in name for word in ("bold", "italic", "oblique", "light", "thin"))
        return styled, "serif" in name, path

    return tuple(sorted(font_manager.findSystemFonts(), key=rank))


@functools.cache
def _log_once() -> None:
    logger.warning(
        "No installed font has all characters of the names, so pictures show boxes instead of some "
        "of them. Install one that has, for Chinese, Japanese and Korean for example Noto Sans CJK "
        "(fonts-noto-cjk on Debian and Ubuntu)."
    )
