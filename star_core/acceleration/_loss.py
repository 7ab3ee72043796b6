"""The loss of a causal language model whose logits nobody asked for.

Where a model is given labels, its output layer returns logits that are not computed yet. transformers' loss takes the
cross entropy from what they would be computed from; whoever else touches them gets the tensor that they stand for.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from star_core.acceleration._linear import linear
from star_core.acceleration._rules import bind, class_name, is_plain_linear
from star_kernels import linear_cross_entropy

OPERATORS = ("linear_cross_entropy",)

_deferring = threading.local()

# Asking for these needs no logits.
_FREE = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu")
) | frozenset({Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point})


class DeferredLogits(Tensor):
    """Logits, (..., V), that are computed when something other than the loss reads them.

    They are after * cap(before * (hidden @ weight.T + bias)), where cap is tanh or nothing: what the models of
    transformers do between their output layer and the loss.
    """

    hidden: Tensor
    layer: nn.Linear
    before: float
    capped: bool
    after: float
    product_dtype: torch.dtype | None
    version: int
    computed: Tensor | None

    @staticmethod
    def __new__(
        cls: type[DeferredLogits],
        hidden: Tensor,
        layer: nn.Linear,
        dtype: torch.dtype,
        before: float = 1.0,
        capped: bool = False,
        after: float = 1.0,
    ) -> DeferredLogits:
        """Stand for the logits of hidden, (..., D)."""
        shape = (*hidden.shape[:-1], layer.out_features)
        self: DeferredLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.hidden, self.layer = hidden, layer
        self.before, self.capped, self.after = before, capped, after
        self.product_dtype = _autocast_dtype(hidden)
        self.version = layer.weight._version
        self.computed = None
        return self

    def changed(self, **fields: Any) -> DeferredLogits:
        """Return the same logits with other factors or another dtype."""
        kept = {name: getattr(self, name) for name in ("dtype", "before", "capped", "after")}
        return DeferredLogits(self.hidden, self.layer, **(kept | fields))

    def compute(self) -> Tensor:
        """Return the logits as a plain tensor, computed once.

        Raises:
            RuntimeError: the weights that they are computed from have changed since.
        """
        if self.computed is None:
            if self.layer.weight._version != self.version:
                raise RuntimeError(
                    "logits of an accelerated model were first read after its output layer had changed: read them "
                    "before the optimizer's step, or call the model without labels"
                )
            logits = F.linear(self.hidden, self.layer.weight, self.layer.bias)
            # In the order of the originals: their dtype is the layer's until after the factors.
            logits = logits if self.before == 1.0 else logits * self.before
            logits = torch.tanh(logits) if self.capped else logits
            logits = logits if self.after == 1.0 else logits * self.after
            self.computed = logits.to(self.dtype)
        return self.computed

    def cross_entropy(self, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """Return the cross entropy of targets (N,), N rows of logits, without computing these."""
        hidden, narrow = self.hidden.reshape(-1, self.hidden.shape[-1]), self.product_dtype
        weight = self.layer.weight if narrow is None else self.layer.weight.to(narrow)
        hidden = hidden if narrow is None else hidden.to(narrow)
        scale = self.before * self.after
        hidden = hidden if scale == 1.0 else hidden * scale
        bias = None if self.layer.bias is None else self.layer.bias * scale
        softcap = self.after if self.capped else None
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            softcap=softcap,
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Put off what is put off easily, answer what needs no logits, and else compute them and go on."""
        kwargs = kwargs or {}
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        logits = args[0] if args else None
        if isinstance(logits, DeferredLogits) and logits.computed is None and not kwargs:
            later = _put_off(func, logits, args[1:])
            if later is not None:
                return later
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute the logits for whatever reaches them past `__torch_function__`."""
        return func(*_computed(args), **_computed(kwargs or {}))


def _put_off(func: Callable[..., Any], logits: DeferredLogits, rest: tuple[Any, ...]) -> DeferredLogits | None:
    """Return logits changed by a function that need not be computed for it; None where they must be."""
    if func is Tensor.float:
        return logits.changed(dtype=torch.float32)
    if func is Tensor.to and len(rest) == 1 and isinstance(rest[0], torch.dtype) and rest[0].is_floating_point:
        return logits.changed(dtype=rest[0])
    if func in (torch.tanh, Tensor.tanh) and not logits.capped and logits.after == 1.0:
        return logits.changed(capped=True)
    if len(rest) != 1 or not isinstance(rest[0], int | float):
        return None
    if func in (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul):
        factor = float(rest[0])
    elif func in (Tensor.div, Tensor.__truediv__, torch.div) and rest[0]:
        factor = 1.0 / rest[0]
    else:
        return None
    name = "after" if logits.capped else "before"
    return logits.changed(**{name: getattr(logits, name) * factor})


def _computed(value: Any) -> Any:
    """Put computed logits in the place of those that are not, in nested arguments."""
    if isinstance(value, DeferredLogits):
        return value.compute()
    if isinstance(value, tuple | list):
        return type(value)(_computed(one) for one in value)
    if isinstance(value, dict):
        return {name: _computed(one) for name, one in value.items()}
    return value


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives the operands of a product; None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    otherwise: Callable[..., Tensor],
    **kwargs: Any,
) -> Tensor:
    """Take transformers' causal loss, token t's logits against label t + 1, from logits that are not computed yet.

    `otherwise` is transformers' own function, which serves computed ones.
    """
    if not isinstance(logits, DeferredLogits) or logits.computed is not None or logits.shape[-1] != vocab_size:
        return otherwise(
            logits=logits.compute() if isinstance(logits, DeferredLogits) else logits,
            labels=labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels is None, and so is shift_labels: the loss needs one of them")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.hidden.device)
    if num_items_in_batch is None:
        return logits.cross_entropy(targets, ignore_index, "mean")
    total = logits.cross_entropy(targets, ignore_index, "sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def head_forward(self: Any, input: Tensor) -> Tensor:
    """Run the output layer, or put it off while its model takes a loss."""
    if torch.compiler.is_compiling() or not getattr(_deferring, "on", False):
        return linear(input, self.weight, self.bias)
    return DeferredLogits(input, self, _autocast_dtype(input) or input.dtype)


@contextmanager
def _put_logits_off() -> Iterator[None]:
    before = getattr(_deferring, "on", False)
    _deferring.on = True
    try:
        yield
    finally:
        _deferring.on = before


def model_forward(kind: type[nn.Module]) -> Callable[..., Any]:
    """Return the forward for models of a class: its own, with the logits put off where labels are given."""
    own = kind.forward
    names = list(inspect.signature(own).parameters)
    place = names.index("labels") - 1 if "labels" in names else None

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and place is not None and len(args) > place:
            labels = args[place]
        if labels is None or torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        with _put_logits_off():
            return own(self, *args, **kwargs)

    return forward


def applies(module: nn.Module) -> bool:
    """Return whether a module is a causal language model with an output layer."""
    return class_name(module).endswith("ForCausalLM") and hasattr(module, "lm_head")


def offer(module: Any) -> dict[nn.Module, dict[str, Any]] | str:
    """Return what to replace in a causal language model, by module and attribute; or why nothing."""
    loss = getattr(module, "loss_function", None)
    if loss is None or getattr(loss, "__name__", "") != "ForCausalLMLoss":
        return "its loss is not transformers' for causal language models"
    if not is_plain_linear(module.lm_head):
        return "its output layer is not a plain linear layer"
    if "labels" not in inspect.signature(type(module).forward).parameters:
        return "its forward takes no labels"
    if any("forward" in one.__dict__ for one in (module, module.lm_head)):
        return "something else has replaced its forward (such as the hooks of device_map)"
    if module.lm_head.weight.is_meta:
        return "its weights are on the meta device"
    return {
        module: {
            "forward": bind(module, model_forward(type(module))),
            "_loss_function": functools.partial(causal_lm_loss, otherwise=loss),
        },
        module.lm_head: {"forward": bind(module.lm_head, head_forward)},
    }
