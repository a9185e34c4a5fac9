"""Names in pictures, in scripts that the usual font lacks."""

import importlib
import os
from types import ModuleType

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import semask.visualize.fonts

FOLDER = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
USUAL, OTHER = (os.path.join(FOLDER, name) for name in ("DejaVuSans.ttf", "STIXGeneral.ttf"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the system's fonts."""
    paths: list[str] = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: paths)
    return paths


@pytest.fixture
def fonts(installed: list[str]) -> ModuleType:
    """The module, which has not looked at the system's fonts yet."""
    return importlib.reload(semask.visualize.fonts)


def test_an_installed_font_draws_what_the_usual_one_lacks(
    fonts: ModuleType, installed: list[str]
) -> None:
    usual, other = (set(FT2Font(path).get_charmap()) for path in (USUAL, OTHER))
    name = next(chr(code) for code in sorted(other - usual) if chr(code).isprintable())
    installed += [os.path.join(FOLDER, "none.ttf"), OTHER]
    assert fonts.font_for(f"ab {name}", 13).path == OTHER
    assert fonts.font_for("Gebäude", 13).path == USUAL


def test_without_such_a_font_it_is_logged_once(
    fonts: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("街道", "建築物", "caf\udce9"):
        assert fonts.font_for(name, 13).path == USUAL
    assert [record.levelname for record in caplog.records] == ["WARNING"]
