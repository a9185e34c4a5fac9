"""Where the shipped configuration files are, in a checkout and in an installed package alike."""

import difflib
import os
from pathlib import Path

from semask.errors import ConfigError

# An installed package carries the folder inside itself; in a checkout it lies at the top.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[4] / "configs")


def config_folder() -> Path:
    """The folder of the shipped configuration files.

    Raises:
        ConfigError: this installation carries none.
    """
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise ConfigError(
        "This installation of semask carries no configuration files. Install it from a checkout "
        "with 'pip install .', or give the path of a file."
    )


def config_names() -> list[str]:
    """The names that `config_path` knows, such as ``"ade20k/semask_swin_tiny_fpn"``."""
    folder = config_folder()
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def config_path(name: str | os.PathLike[str]) -> str:
    """The path of a configuration file.

    Args:
        name: a path, or the name of a shipped configuration such as
            ``"ade20k/semask_swin_tiny_fpn"``, with or without ``.yaml``.

    Returns:
        ``name`` itself where such a file exists, otherwise the path of the shipped file.

    Raises:
        ConfigError: there is neither; the message lists the nearest names.
    """
    given = os.fspath(name)
    if os.path.isfile(given):
        return given
    stem = given.removesuffix(".yaml").removeprefix("configs/")
    known = config_names()
    if stem in known:
        return str(config_folder() / f"{stem}.yaml")
    near = difflib.get_close_matches(stem, known, n=3, cutoff=0.4) or known
    raise ConfigError(
        f"There is no config file '{given}', nor a shipped config of that name. "
        f"Near to it are: {', '.join(near)}."
    )
