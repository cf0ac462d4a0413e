"""Which output tensors each of a model's parameters is made of, and how.

A checkpoint's tensors and a model's parameters are not always the same: transformers renames
some and fuses others (a layer's experts become one tensor). Its own registry of conversions,
which loading goes by, is followed here, so that the fit makes its model of the merge's tensors
exactly as loading will make it of the merged checkpoint.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from mergekit_dam.errors import DamError

Inputs = Mapping[str, Sequence[str]]  # a converter's source pattern -> output tensors


class Assembly:
    """Parameters that are made of parts: of several output tensors, or of pieces of one."""

    def __init__(
        self,
        converter: WeightConverter,
        inputs: Inputs,
        target: str,  # the first parameter that is made
        model: PreTrainedModel,
    ):
        self._converter, self._inputs, self.target = converter, dict(inputs), target
        self._model = model
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the output tensors it is made of
        for operation in converter.operations:
            _let_gradients_through(operation)

    @property
    def names(self) -> list[str]:
        """The output tensors that it is made of."""
        return [name for names in self._inputs.values() for name in names]

    @property
    def parameters(self) -> list[str]:
        """The model's parameters that it makes."""
        first, *others = self._converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]

    @property
    def is_transposing(self) -> bool:
        """Whether a matrix' inputs and outputs change places on the way."""
        return sum(isinstance(op, Transpose) for op in self._converter.operations) % 2 == 1

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter -> value, made of the output tensors; differentiable in them."""
        for pattern, names in self._inputs.items():
            self._converter.collected_tensors[pattern] = [tensors[name] for name in names]
        made = self._converter.convert(self.target, model=self._model, config=self._model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}


def _let_gradients_through(operation: ConversionOps) -> None:
    """transformers converts under a `torch.no_grad` that wraps plain tensor code: unwrap it."""
    operation.convert = MethodType(inspect.unwrap(type(operation).convert), operation)
    for inner in vars(operation).values():
        if isinstance(inner, ConversionOps):
            _let_gradients_through(inner)


@dataclass(frozen=True)
class Assemblies:
    """What loading a checkpoint with the given tensors does."""

    direct: dict[str, str] = field(default_factory=dict)  # parameter or buffer -> output tensor
    composed: list[Assembly] = field(default_factory=list)


def assemble(model: PreTrainedModel, output_tensors: Collection[str]) -> Assemblies:
    """Match the parameters and buffers of a model on the meta device with output tensors.

    Raises DamError where a parameter is made in a way that gradients cannot follow.
    """
    expected = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    result = Assemblies()
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(output_tensors, key=dot_natural_key):  # the order in which loading stacks
        rules = (renamings, converters, model.base_model_prefix, expected)
        target, pattern = rename_source_key(name, *rules)
        if target not in expected and name in expected:  # already as the model has it
            target, pattern = name, None
        if target in expected and pattern is None:
            result.direct[target] = name
        elif target in expected:
            groups[target][pattern].append(name)
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    for target, inputs in groups.items():
        converter = by_pattern[next(iter(inputs))]
        result.composed.append(_composed(converter, inputs, target, model, renamings))
    return result


def _composed(
    converter: WeightConverter,
    inputs: Inputs,
    target: str,
    model: PreTrainedModel,
    renamings: Sequence[WeightRenaming],
) -> Assembly:
    assembly = Assembly(copy.deepcopy(converter), inputs, target, model)
    try:
        assembly.shapes.update(_shapes(assembly, converter, model, renamings))
        _require_gradients(assembly, model)
    except (RuntimeError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise DamError(
            f"transformers makes {target} of {', '.join(assembly.names[:3])} and others in a way "
            f"that the fit cannot follow ({error}): this architecture cannot be fitted."
        ) from error
    return assembly


def _shapes(
    assembly: Assembly,
    converter: WeightConverter,
    model: PreTrainedModel,
    renamings: Sequence[WeightRenaming],
) -> dict[str, tuple[int, ...]]:
    """Output tensor -> shape: the parameters taken apart, as saving does it."""
    reverse, expected = converter.reverse_transform(), model.state_dict()
    for parameter in assembly.parameters:
        whole, pattern = reverse.rename_source_key(parameter)
        reverse.collected_tensors[pattern].append(expected[parameter])
    parts = reverse.convert(whole, model=model, config=model.config)
    result = {}
    for name in assembly.names:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        part = parts[renamed]
        result[name] = tuple((part[0] if isinstance(part, list) else part).shape)
    return result


def _require_gradients(assembly: Assembly, model: PreTrainedModel) -> None:
    """A trial without storage: every parameter of its shape, every output tensor reached."""
    inputs = {
        name: torch.empty(shape, device="meta", requires_grad=True)
        for name, shape in assembly.shapes.items()
    }
    with torch.enable_grad():
        made = assembly(inputs)
        total = torch.stack([value.sum() for value in made.values()]).sum()
    expected = model.state_dict()
    for name in assembly.parameters:
        if made[name].shape != expected[name].shape:
            raise ValueError(f"{name} would be {list(made[name].shape)}")
    torch.autograd.grad(total, list(inputs.values()))  # raises where one is not reached
