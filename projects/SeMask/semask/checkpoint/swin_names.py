"""Names of a backbone's parameters in other projects and in former releases of this one.

The others are Swin's and SeMask's original releases.
"""

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _numbered(template: str, shift: int) -> Callable[[re.Match[str]], str]:
    """A replacement by the pattern's first group and its second one, a number, plus ``shift``."""
    return lambda match: template.format(match.group(1), int(match.group(2)) + shift)


# (pattern, replacement); every name goes through all of a list, in order.
_IN_BACKBONE = r"^((?:backbone\.)?(?:bottom_up\.)?)"
# Names of this project from before the encoder was a separate module.
_FORMER_RULES: tuple[Rule, ...] = (
    (_IN_BACKBONE + r"(patch_embed\.|absolute_pos_embed$)", r"\1encoder.stem.\2"),
    (_IN_BACKBONE + r"merging\.(\d+)\.", _numbered("{}encoder.stages.{}.downsample.", 1)),
    (_IN_BACKBONE + r"stages\.(\d+)\.semantic_layer\.", _numbered("{}semantic_layers.res{}.", 2)),
    (_IN_BACKBONE + r"stages\.", r"\1encoder.stages."),
)
_PUBLISHED_RULES: tuple[Rule, ...] = (
    (r"\blayers\.(\d+)\.downsample\.", r"merging.\1."),
    (r"\blayers\.(\d+)\.", r"stages.\1."),
    *_FORMER_RULES,
    (r"(\bsemantic_layers\.\w+)\.norm1\.", r"\1.norm."),
    (r"\.class_injection\.(\d+)\.", r".blocks.\1."),
    (r"\.mlp_cls_q\.", ".query."),
    (r"\.mlp_cls_k\.", ".key."),
    (r"\.mlp_v\.", ".value."),
    (r"\.mlp_res\.", ".proj."),
    (r"^(backbone)\.norm(\d)\.", _numbered("{}.output_norms.res{}.", 2)),
)


def own_backbone_name(name: str) -> str:
    """This project's name of a backbone's parameter.

    Args:
        name: as published, with "backbone." in front.
    """
    return _apply(_PUBLISHED_RULES, name)


def present_name(name: str) -> str:
    """The present name of a parameter with a former name; most names are equal."""
    return _apply(_FORMER_RULES, name)


def has_former_names(names: Iterable[str]) -> bool:
    """Whether parameters have names from before the encoder was a separate module."""
    return any(present_name(name) != name for name in names)


def with_stage(template: str) -> Callable[[re.Match[str]], str]:
    """Puts Detectron2's number of the stage that a match names into a template (0 is 2)."""
    return lambda match: template.format(int(match.group(1)) + 2)


def _apply(rules: tuple[Rule, ...], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
