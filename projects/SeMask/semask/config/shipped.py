"""The shipped config files, in a checkout or an installed package."""

import difflib
import os
from pathlib import Path

from semask.errors import ConfigError

# An installed package contains the folder; in a checkout it is at the top level.
_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[4] / "configs")


def config_folder() -> Path:
    """The folder of the shipped config files.

    Raises:
        ConfigError: this installation has none.
    """
    for folder in _FOLDERS:
        if folder.is_dir():
            return folder
    raise ConfigError(
        "This installation of semask has no config files. Install it from a checkout "
        "with 'pip install .', or give the path of a file."
    )


def config_names() -> list[str]:
    """The names that `config_path` accepts, such as ``"ade20k/semask_swin_tiny_fpn"``."""
    folder = config_folder()
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("_"))


def config_path(name: str | os.PathLike[str]) -> str:
    """The path of a config file.

    Args:
        name: a path, or the name of a shipped config such as ``"ade20k/semask_swin_tiny_fpn"``,
            with or without ``.yaml``.

    Returns:
        ``name`` itself if such a file exists, otherwise the path of the shipped file.

    Raises:
        ConfigError: there is neither; the message lists similar names.
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
        f"Similar names are: {', '.join(near)}."
    )
