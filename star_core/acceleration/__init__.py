"""Put the kernels under a model of transformers, in place, and take them away again."""

from __future__ import annotations

from typing import Any

from torch import nn

from star_core.acceleration import (
    _attention,
    _delta,
    _experts,
    _gated_mlp,
    _griffin,
    _linear,
    _loss,
    _mamba,
    _mamba2,
    _norm,
    _short_conv,
)
from star_core.acceleration._report import AccelerationReport, Kept, Replaced
from star_core.acceleration._rules import (
    Offer,
    Rule,
    bind,
    choose,
    class_name,
    give_back,
    is_from_transformers,
    replace,
)

__all__ = ["AccelerationReport", "Kept", "Replaced", "accelerate", "restore"]

_RULES: tuple[Rule, ...] = (
    _mamba.RULE,
    _mamba2.RULE,
    _short_conv.RULE,
    _delta.RULE,
    _attention.RULE,
    *_griffin.RULES,
    _gated_mlp.RULE,
    _experts.RULE,
    *_norm.RULES,
)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Swap the slow paths of a transformers model for star_kernels' operators, in place.

    On a CPU, its wide float32 dense layers go through oneDNN, whose sums are in another order.

    Args:
        model: Any module; what it holds of transformers' known kinds is replaced, wherever it lies.

    Returns:
        What was replaced and what was not, and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, needs a torch.nn.Module")
    restore(model)
    replaced: list[Replaced] = []
    kept: list[Kept] = []
    known: dict[Any, Offer | str] = {}
    for path, module in model.named_modules():
        if not is_from_transformers(module):
            continue
        if _loss.applies(module):
            changes = _loss.offer(module)
            if isinstance(changes, str):
                kept.append(Kept(path, class_name(module), changes))
            else:
                for part, attributes in changes.items():
                    for name, value in attributes.items():
                        replace(part, name, value)
                replaced.append(Replaced(path, class_name(module), _loss.OPERATORS))
        rule = next((one for one in _RULES if one.applies(module)), None)
        if rule is None:
            continue
        offer = choose(module, rule, known)
        if isinstance(offer, str):
            kept.append(Kept(path, class_name(module), offer))
        else:
            replace(module, "forward", bind(module, offer.forward))
            replaced.append(Replaced(path, class_name(module), offer.operators))
    # Last, so that the offers above were compared with modules as they were.
    for path, module in model.named_modules():
        if is_from_transformers(module):
            for name, layer in _linear.inside(module):
                replace(layer, "forward", bind(layer, _linear.forward))
                replaced.append(Replaced(f"{path}.{name}".removeprefix("."), class_name(layer), _linear.OPERATORS))
    return AccelerationReport(tuple(replaced), tuple(kept))


def restore(model: nn.Module) -> bool:
    """Undo `accelerate`: every module gets back exactly what it had.

    Args:
        model: A module that `accelerate` was given, a copy of it, or a part of either.

    Returns:
        Whether there was anything to undo.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, needs a torch.nn.Module")
    undone = [give_back(module) for module in model.modules()]
    return any(undone)
