"""Screenshots of pages, by the browser that is installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HEIGHT = 4200


def screenshot(page: Path, width: int) -> np.ndarray:
    """The upper part of a page in a window of this width: (HEIGHT, width, 3) uint8."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    # A window is not as narrow as a phone; a frame is.
    style = f"border:0;width:{width}px;height:{HEIGHT}px"
    frame, picture = page.parent / "frame.html", page.parent / "screenshot.png"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.name}" style="{style}">')
    profile = page.parent / "profile"
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}"),
            f"--window-size={max(width, 500)},{HEIGHT}",
            *(f"--screenshot={picture}", frame.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.array(Image.open(picture).convert("RGB"))
    assert pixels.shape == (HEIGHT, max(width, 500), 3)
    return pixels[:, :width]


def count(pixels: np.ndarray, *color: int) -> int:
    """The number of pixels of a colour."""
    return int((np.abs(pixels.astype(int) - color).max(axis=-1) < 3).sum())


def assert_is_readable(pixels: np.ndarray) -> None:
    """Dark text on white paper, and nothing is cut off at the right."""
    assert count(pixels, 255, 255, 255) > pixels.size / 3 / 3
    assert count(pixels, 0x1D, 0x24, 0x30) > 1000
    assert (pixels[:, -10:] == 255).all()
