"""The merged model's modules without weights, and which output tensor each parameter is.

No code here is for one architecture: transformers builds the modules, and the roles of the
parameters follow from the kinds of modules that own them.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import init_empty_weights
from mergekit.common import get_auto_cls
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_dam.errors import DamError

Kind = Literal["linear", "embedding", "norm", "bias"]


@dataclass(frozen=True)
class Role:
    """What an output tensor is in the model."""

    kind: Kind
    shape: tuple[int, ...]
    input_axis: int = -1  # the axis of a layer's inputs: -2 where the weight is [in, out]


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, its buffers real."""

    model: PreTrainedModel
    tensors: dict[str, str]  # parameter -> output tensor; tied parameters share one
    roles: dict[str, Role]  # output tensor -> its role

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts whose weights are made together, with their full names."""
        return _blocks("", self.model)


def build_skeleton(
    config: PretrainedConfig,
    output_tensors: Collection[str],
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Skeleton:
    """The modules that `config` describes, matched with the plan's output tensors.

    Raises DamError where transformers cannot build the model, or a parameter has no tensor.
    """
    architecture = (config.architectures or ["?"])[0]
    try:
        with init_empty_weights(include_buffers=False):  # rotary buffers are computed, not loaded
            model = get_auto_cls(architecture).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise DamError(
            f"transformers cannot build the architecture {architecture} ({error}): the fit needs "
            "it; update transformers, or allow the model's own code with --trust-remote-code."
        ) from error
    model.eval()
    tensors = _output_names(model, output_tensors, architecture)
    owners = dict(_owners(model))
    roles = {}
    for parameter, name in tensors.items():
        roles.setdefault(name, _role(parameter, *owners[parameter]))
    return Skeleton(model=model, tensors=tensors, roles=roles)


def _output_names(
    model: PreTrainedModel, output_tensors: Collection[str], architecture: str
) -> dict[str, str]:
    """For every parameter, tied ones too, the output tensor that holds it.

    Without storage a tied head is a parameter of its own, so the sharing is made explicit here.
    """
    tied = model.all_tied_weights_keys
    names = {}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        name = tied.get(parameter, parameter)
        if name not in output_tensors:
            name = parameter
        if name not in output_tensors:
            raise DamError(
                f"The merge writes no tensor for {parameter} of {architecture}: mergekit's "
                "description of this architecture and transformers' differ, so it cannot be fitted."
            )
        names[parameter] = name
    return names


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, torch.Tensor]]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, (module, parameter)


def _role(name: str, module: nn.Module, parameter: torch.Tensor) -> Role:
    shape = tuple(parameter.shape)
    if name.rpartition(".")[2].endswith("bias"):
        return Role("bias", shape)
    if isinstance(module, nn.Embedding):
        return Role("embedding", shape)
    if parameter.ndim < 2:
        return Role("norm", shape)
    return Role("linear", shape, input_axis=-2 if isinstance(module, Conv1D) else -1)


def _blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The items of module lists (decoder layers), and what owns parameters outside of them.

    A module that owns parameters directly is a block with all that is below it.
    """
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if next(child.parameters(), None) is None:
            continue
        owns_parameters = next(child.parameters(recurse=False), None) is not None
        if owns_parameters or isinstance(module, nn.ModuleList):
            yield path, child
        else:
            yield from _blocks(f"{path}.", child)
