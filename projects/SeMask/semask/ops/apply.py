"""Putting faster forms into a built model: the one place that decides which, and that does it.

A faster form is a subclass of the plain module in :mod:`semask.modeling` that it replaces. It
computes the same, up to rounding, from the same parameters and buffers. ``apply_fast_paths`` only
changes the class of a module that has been built (as PyTorch's ``fully_shard`` does), so names in
the state dict, hooks, optimizers and references to the module stay as they are.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class FastPath:
    """One way to be faster.

    Attributes:
        does: what it does, for the log.
        suits: whether "auto" takes it on this device.
        forms: {plain class: the subclass that takes its place}. A form calls ``super().forward``
            where its way does not apply, so that several forms of one class can be combined.
    """

    does: str
    suits: Callable[[torch.device], bool]
    forms: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)


def apply_to_modules(model: nn.Module, paths: Collection[FastPath]) -> nn.Module:
    """Make the modules of a model faster, in place.

    A module is replaced where its class is exactly the plain one: what subclasses it may compute
    something else. Where a form has a method ``set_up``, it is called on each module once, for
    what it keeps beside the parameters.

    Args:
        model: built, on any device, before ``DistributedDataParallel`` and ``torch.compile``.
        paths: later ones are tried first where several have a form of the same class.

    Returns:
        ``model``.
    """
    for module in list(model.modules()):
        plain = type(module)
        forms = tuple(_forms_of(plain, paths))
        if forms:
            module.__class__ = _combined(plain, forms)
            for form in forms:
                set_up = getattr(form, "set_up", None)
                if set_up is not None:
                    set_up(module)
    return model


def _forms_of(plain: type[nn.Module], paths: Collection[FastPath]) -> Iterator[type[nn.Module]]:
    for path in reversed(list(paths)):
        if plain in path.forms:
            yield path.forms[plain]


# One class for each combination, so that equal models have equal classes.
_combinations: dict[tuple[type[nn.Module], ...], type[nn.Module]] = {}


def _combined(plain: type[nn.Module], forms: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    if len(forms) == 1:
        return forms[0]
    if forms not in _combinations:
        _combinations[forms] = type(f"Fast{plain.__name__}", forms, {"__module__": __name__})
    return _combinations[forms]
