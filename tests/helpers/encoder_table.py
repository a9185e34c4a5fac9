"""The families of timm's networks that can have semantic layers, tried one by one.

PYTHONPATH=projects/SeMask python tests/helpers/encoder_table.py writes docs/encoders.md.
"""

import functools
import re
import warnings
from collections.abc import Collection
from pathlib import Path

import semask

# isort: split
import timm
import torch
from timm.models import get_arch_name, list_models

import semask.modeling.backbone.mix_transformer  # noqa: F401  (registers its networks)
from semask.errors import ConfigError
from semask.modeling import TimmEncoder

DOCUMENT = Path(__file__).parents[2] / "docs" / "encoders.md"
# Networks of a family whose name has the first of these stand for it: small ones.
_SMALL = (
    *("test", "pico", "atto", "femto", "nano", "micro", "tiny", "_t", "b0"),
    *("s12", "s18", "small", "xs", "_s"),
)
_CHOSEN = {"senet": "legacy_seresnet18", "levit": "levit_128s"}
_NAME = re.compile(r"MODEL\.TIMM\.NAME '[^']*'(?: cannot have semantic layers)?: ")


@functools.cache
def families() -> dict[str, str]:
    """A small network of each family, by the name of timm's file."""
    names: dict[str, list[str]] = {}
    for name in list_models():
        module = timm.models.model_entrypoint(get_arch_name(name)).__module__
        names.setdefault(module.rpartition(".")[2], []).append(name)
    return {
        family: _CHOSEN.get(family)
        or next((name for part in _SMALL for name in members if part in name), members[0])
        for family, members in sorted(names.items())
    }


def refusal(name: str) -> str:
    """Why a network is refused; "" if it works."""
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            TimmEncoder(name)
    except ConfigError as error:
        return _NAME.sub("", str(error)).partition(" Use a network such as")[0]
    return ""


def working() -> list[str]:
    """The networks that the table says to work."""
    return re.findall(r"^\| \w+ \| (\w+) \| \*\*works\*\* \|$", DOCUMENT.read_text(), re.MULTILINE)


def document(known: Collection[str] = ()) -> str:
    """The text of docs/encoders.md.

    Args:
        known: networks that have been found to work, which are not tried again.
    """
    results = {name: "" if name in known else refusal(name) for name in families().values()}
    rows = [
        f"| {family} | {name} | {results[name] or '**works**'} |"
        for family, name in families().items()
    ]
    count = sum(not result for result in results.values())
    return _TEXT.format(version=timm.__version__, rows="\n".join(rows), count=count)


_TEXT = """\
# Encoders

`MODEL.BACKBONE.NAME SeMaskTimm` puts semantic layers after the stages of a network of timm, whose
name is `MODEL.TIMM.NAME`. The network must return features at strides 4, 8, 16 and 32, from modules
that run sequentially, on images of any size. Swin is this project's own:
`MODEL.BACKBONE.NAME SeMaskSwin`.

`tests/helpers/encoder_table.py` writes this page, and a test checks it. One small network of
each family is tried (a family is a file of timm {version}; `mix_transformer` is this project's).
Those of {count} families work: their features equal timm's, they can be trained, and with gamma 0
their semantic layers change nothing (`tests/test_timm_families.py`). Other networks of a family may
differ; each is checked when it is built.

| family | tried | result |
| --- | --- | --- |
{rows}
"""

if __name__ == "__main__":
    DOCUMENT.write_text(document())
