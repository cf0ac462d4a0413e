"""The layers of a block whose coefficients have a least-squares solution, and what they compute."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from mergekit_dam.least_squares.objective import (
    EmbeddingObjective,
    LayerObjective,
    LinearObjective,
    NormObjective,
)
from mergekit_dam.model import Arrival, Block


@dataclass(frozen=True)
class Call:
    """What went into a module and came out, for some rows."""

    args: tuple
    kwargs: dict
    output: Tensor | None = None  # where it was not asked for


@dataclass(frozen=True)
class Layer:
    """A module of a block that is affine in its own weights."""

    path: str  # in the block; "" is the block itself
    module: nn.Module
    weight: str  # output tensors
    bias: str | None  # None also where it is not trained

    @property
    def tensors(self) -> list[str]:
        return [self.weight] + ([self.bias] if self.bias else [])

    def own(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its weights among those of its block."""
        prefix = f"{self.path}." if self.path else ""
        names = [name for name, _ in self.module.named_parameters(recurse=False)]
        return {name: block[prefix + name] for name in names}

    def objective(self) -> LayerObjective:
        if isinstance(self.module, nn.Embedding):
            return EmbeddingObjective(self.weight)
        if isinstance(self.module, nn.Linear | Conv1D):
            axis = -2 if isinstance(self.module, Conv1D) else -1
            return LinearObjective(self.weight, self.bias, axis)
        return NormObjective(self.weight, self.bias)

    def add(
        self,
        objective: LayerObjective,
        merged: Call,  # in the merge so far
        source: Call,  # in the source, for the same rows
        real: Tensor,  # [rows, length], False at padding
        own: Mapping[str, Tensor],  # the merge's weights of the module
        wanted: Mapping[str, Tensor],  # the source's
        weight: float,  # of a token
    ) -> bool:
        """Add some rows to an objective; False where rows and tokens cannot be told apart."""
        if isinstance(objective, EmbeddingObjective):
            tokens = merged.args[0].expand(real.shape)[real]
            counts = torch.bincount(tokens, minlength=len(wanted["weight"]))
            objective.add(counts, wanted["weight"], weight)
            return True
        inputs, output = merged.args[0], source.output
        if isinstance(objective, NormObjective):
            inputs, shift = _affine(self.module, own, merged.args, merged.kwargs)
            output = output - shift
        if self.bias is None and "bias" in own:
            output = output - own["bias"]
        x, y = of_tokens(inputs, real), of_tokens(output, real)
        if x is None or y is None or len(x) != len(y):
            return False
        if isinstance(objective, NormObjective):
            shape = (-1, *own["weight"].shape)
            x, y = x.reshape(shape), y.reshape(shape)
        objective.add(x, y, weight)
        return True


def layers(block: Block, trained: Collection[str]) -> list[Layer]:
    """The layers of a block whose weights are output tensors and trained."""
    found = []
    for path, module in block.block.named_modules():
        names = {
            name: block.tensors.get(f"{path}.{name}" if path else name)
            for name, _ in module.named_parameters(recurse=False)
        }
        weight, bias = names.pop("weight", None), names.pop("bias", None)
        if weight in trained and not names and _is_affine(module):
            found.append(Layer(path, module, weight, bias if bias in trained else None))
    return found


def _is_affine(module: nn.Module) -> bool:
    """Whether the output is affine in the weights, in one of the three ways that are known."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if isinstance(module, nn.Embedding):
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    x = torch.linspace(-1, 2, 2 * module.weight.numel(), dtype=module.weight.dtype)
    x = x.reshape(1, 2, *module.weight.shape).cpu()
    try:
        return _is_scaling(module, x)
    except Exception:  # it wants other arguments: not a layer that we know
        return False


def _is_scaling(module: nn.Module, x: Tensor) -> bool:
    """Whether a module multiplies something by its weight, element by element, and adds its
    bias."""
    weights = {
        name: torch.linspace(0.5, 1.5, p.numel(), dtype=p.dtype).reshape(p.shape)
        for name, p in module.named_parameters(recurse=False)
    }
    scaled, shift = _affine(module, weights, (x,), {})
    expected = scaled * weights["weight"] + shift + weights.get("bias", 0.0)
    return torch.allclose(functional_call(module, weights, (x,)), expected, rtol=0.02, atol=0.02)


def _affine(
    module: nn.Module, weights: Mapping[str, Tensor], args: tuple, kwargs: dict
) -> tuple[Tensor, Tensor]:
    """x and a of a module's output x * weight + a + bias."""
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    shift = functional_call(module, zeros, args, kwargs)
    ones = {**zeros, "weight": torch.ones_like(weights["weight"])}
    return functional_call(module, ones, args, kwargs) - shift, shift


def of_tokens(values: Tensor, real: Tensor) -> Tensor | None:
    """The real tokens' values, [tokens, ...]; None where the tokens' axes are not recognised."""
    if values.shape[:2] == real.shape:
        return values.flatten(0, 1) if real.all() else values[real]
    if values.dim() > 2 and (values.shape[0], values.shape[2]) == real.shape:  # heads come first
        return values.transpose(1, 2)[real]
    if values.shape[0] == real.numel():
        return values[real.flatten()]
    return None


class _Enough(Exception):
    """All that was to be seen has been seen."""


def calls(
    block: Block,
    weights: Mapping[str, Tensor],
    wanted: Sequence[Layer],
    arrival: Arrival,
    *,
    outputs: bool = True,
) -> dict[str, Call]:
    """Run a block until each of the wanted layers has been called; their first calls, by path.
    Without `outputs` the last of them is not computed."""
    seen: dict[str, Call] = {}

    def record(path: str):
        def hook(module, args, kwargs, output=None):
            seen.setdefault(path, Call(args, kwargs, output))
            if len(seen) == len(wanted):
                raise _Enough

        return hook

    hooks = [_hook(layer.module, record(layer.path), after=outputs) for layer in wanted]
    _run(block, weights, arrival, hooks)
    return seen


def _hook(module: nn.Module, hook: Callable, *, after: bool):
    if after:
        return module.register_forward_hook(hook, with_kwargs=True)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _run(block: Block, weights: Mapping[str, Tensor], arrival: Arrival, hooks: Sequence) -> Any:
    """A block's output, or None where a hook has seen enough."""
    try:
        return block.run_with(weights, *arrival.args, **arrival.kwargs)
    except _Enough:
        return None
    finally:
        for hook in hooks:
            hook.remove()


def arriving(
    block: Block,
    weights: Mapping[str, Tensor],
    point: Layer | None,
    arrival: Arrival,
    *,
    without: Layer | None = None,
) -> Tensor:
    """The input of a later layer, or the block's output, as if `without` had given zeros."""
    seen: list[Tensor] = []

    def stop(module, args):
        seen.append(args[0])
        raise _Enough

    hooks = []
    if without is not None:
        hooks = [without.module.register_forward_hook(lambda m, a, output: output * 0)]
    if point is not None:
        hooks.append(point.module.register_forward_pre_hook(stop))
    output = _run(block, weights, arrival, hooks)
    return seen[0] if seen else (output[0] if isinstance(output, tuple) else output)


def adds_to(
    block: Block,
    weights: Mapping[str, Tensor],
    layer: Layer,
    point: Layer | None,
    arrival: Arrival,
) -> bool:
    """Whether what arrives at a point is the layer's output and something else, added up."""
    output = calls(block, weights, [layer], arrival)[layer.path].output
    whole = arriving(block, weights, point, arrival)
    rest = arriving(block, weights, point, arrival, without=layer)
    if not isinstance(whole, Tensor) or whole.shape != output.shape or not rest.any():
        return False
    return bool((whole - rest - output).norm() <= 0.01 * output.norm())


def in_order(
    block: Block, weights: Mapping[str, Tensor], found: Sequence[Layer], arrival: Arrival
) -> Iterator[list[Layer]]:
    """The layers in the order in which the block calls them, those of one input together."""
    by_path = {layer.path: layer for layer in found}
    group, shared = [], None
    for path, call in calls(block, weights, found, arrival, outputs=False).items():
        if group and call.args[0] is not shared:
            yield group
            group = []
        group.append(by_path[path])
        shared = call.args[0]
    if group:
        yield group
