"""How a module is recognised, offered another forward, checked against its own, and given it back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_RECORD = "_star_replaced"
"""Where a module keeps, by name, the attributes of its own that were replaced; None where it had only its class's."""

UNSERVED = ("cache_params", "past_key_values", "seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments of the originals' forwards with which a call goes to the original: old names, and packed sequences."""


@dataclass(frozen=True)
class Offer:
    """A forward that a module could have instead of its own.

    Attributes:
        operators: The `star_kernels` operators that it calls.
        forward: Takes the module and what the module's own forward takes.
    """

    operators: tuple[str, ...]
    forward: Forward


@dataclass(frozen=True)
class Rule:
    """One kind of module.

    Attributes:
        applies: Whether a module is of this kind, by its class's name and its attributes.
        offers: Forwards for it, of which the first that gives the original's numbers is taken; or why there is none.
        probe: Arguments for both, on which their numbers are compared: (module, a maker of random tensors).
    """

    applies: Callable[[nn.Module], bool]
    offers: Callable[[Any], list[Offer] | str]
    probe: Callable[[Any, Callable[..., Tensor]], Arguments]


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class."""
    return type(module).__name__


def is_from_transformers(module: nn.Module) -> bool:
    """Return whether a module's very class is defined in transformers; a subclass from elsewhere is its author's."""
    return type(module).__module__.startswith("transformers.models.")


def lacks(module: nn.Module, *names: str) -> str | None:
    """Say which of these names the module does not have; None when it has all."""
    missing = [name for name in names if not hasattr(module, name)]
    return f"it has no {', '.join(missing)}" if missing else None


def defines(module: nn.Module, *names: str) -> str | None:
    """Say which functions the file that defines the module's class does not have; None when it has all.

    A version of transformers that keeps its states another way also cuts its mixers into other functions.
    """
    scope = vars(sys.modules[type(module).__module__])
    missing = [name for name in names if name not in scope]
    return f"this version of transformers writes it another way (no {', '.join(missing)})" if missing else None


def is_plain_linear(*layers: Any) -> bool:
    """Return whether each is a torch.nn.Linear, neither quantised nor wrapped: its weight can be read directly."""
    return all(type(layer) is nn.Linear for layer in layers)


def original(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a replaced module had."""
    return type(module).forward(module, *args, **kwargs)


def or_original(forward: Forward) -> Forward:
    """Return a forward that leaves a call with an argument of `UNSERVED` to the original."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in UNSERVED):
            return original(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return wrapped


def bind(module: nn.Module, forward: Forward) -> MethodType:
    """Return a forward bound to a module.

    Methods are pickled by their function's name: with this one, a model that torch.save keeps whole comes back with its
    classes' own forwards.
    """
    forward.__name__ = "forward"
    return MethodType(forward, module)


def replace(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of one module, past torch's registration, and remember what it had."""
    record: dict[str, Any] = module.__dict__.setdefault(_RECORD, {})
    record.setdefault(name, module.__dict__.get(name))
    module.__dict__[name] = value


def give_back(module: nn.Module) -> bool:
    """Undo every `replace` on one module; return whether there was any."""
    record = module.__dict__.pop(_RECORD, None)
    for name, value in (record or {}).items():
        if value is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = value
    return record is not None


def choose(module: nn.Module, rule: Rule, known: dict[Any, Offer | str]) -> Offer | str:
    """Return the forward to give a module, or in words why it keeps its own.

    Args:
        module: The module, of the rule's kind.
        rule: The rule.
        known: What was chosen for modules of the same class, sizes and settings; extended.
    """
    if "forward" in module.__dict__:
        return "something else has replaced its forward (such as the hooks of device_map)"
    tensors = [*module.parameters(), *module.buffers()]
    if any(one.is_meta for one in tensors):
        return "its weights are on the meta device"
    floating = [one for one in tensors if one.is_floating_point()]
    sizes = tuple((one.dtype, one.device, tuple(one.shape)) for one in tensors)
    key = (type(module), sizes, getattr(module, "layer_type", None))
    if key not in known:
        offers = rule.offers(module)
        known[key] = offers if isinstance(offers, str) else _first_that_agrees(module, rule, offers, floating)
    return known[key]


def _first_that_agrees(module: nn.Module, rule: Rule, offers: list[Offer], tensors: list[Tensor]) -> Offer | str:
    """Compare each offered forward with the original on random tokens."""
    first = tensors[0] if tensors else torch.empty(0)
    generator = torch.Generator(first.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=first.device, dtype=torch.float32)
        return drawn.to(first.dtype)

    args, kwargs = rule.probe(module, normal)
    # The order of float32 sums moves a module's output by some 1e-6 of its size, bfloat16 inside it by some 1e-2; what
    # is another formula is off by far more.
    tolerance = 1e-4 if first.dtype in (torch.float32, torch.float64) else 6e-2
    worst = ""
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        try:
            with _left_as_it_was(module):
                want = _tensor(type(module).forward(module, *args, **kwargs)).float()
        except Exception as error:  # Whatever a module that is not known raises is its reason.
            return f"its own forward does not take random tokens: {error}"
        if not bool(want.isfinite().all()):
            return "its own forward does not give finite numbers on random tokens"
        size = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
        for offer in offers:
            with _left_as_it_was(module):
                got = _tensor(offer.forward(module, *args, **kwargs)).float()
            if got.shape != want.shape:
                worst = f"the kernels give shape {tuple(got.shape)} where it gives {tuple(want.shape)}"
                continue
            off = float((got - want).abs().max()) / size
            if off <= tolerance:
                return offer
            worst = f"the kernels' numbers differ from its own by {off:.1e} of their size: another formula"
    return worst


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Give a module and those in it their attributes back: some keep the state of what they last ran."""
    before = [(one, dict(one.__dict__)) for one in module.modules()]
    try:
        yield
    finally:
        for one, attributes in before:
            one.__dict__.clear()
            one.__dict__.update(attributes)


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
