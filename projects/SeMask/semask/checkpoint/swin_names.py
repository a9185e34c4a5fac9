"""The names that Swin and SeMask's original release give to a backbone's parameters."""

import re
from collections.abc import Callable

# (pattern, replacement) in order; every name goes through all of them.
_RULES = (
    (r"\blayers\.(\d+)\.downsample\.", r"merging.\1."),
    (r"\blayers\.(\d+)\.", r"stages.\1."),
    (r"\.semantic_layer\.norm1\.", ".semantic_layer.norm."),
    (r"\.class_injection\.(\d+)\.", r".blocks.\1."),
    (r"\.mlp_cls_q\.", ".query."),
    (r"\.mlp_cls_k\.", ".key."),
    (r"\.mlp_v\.", ".value."),
    (r"\.mlp_res\.", ".proj."),
)


def own_backbone_name(name: str) -> str:
    """This project's name of a backbone's parameter.

    Args:
        name: as published, with "backbone." in front.
    """
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^backbone\.norm(\d)\.", with_stage("backbone.output_norms.res{}."), name)


def with_stage(template: str) -> Callable[[re.Match[str]], str]:
    """Puts Detectron2's number of the stage that a match names into a template (0 is 2)."""
    return lambda match: template.format(int(match.group(1)) + 2)
