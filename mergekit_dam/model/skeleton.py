"""The merged model's modules without weights, and which output tensor each parameter is.

No code here is for one architecture: transformers builds the modules, and the roles of the
parameters follow from the kinds of modules that own them.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import init_empty_weights
from mergekit.architecture.json_definitions import NAME_TO_ARCH
from mergekit.common import get_auto_cls
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_dam.errors import DamError
from mergekit_dam.model.assembly import Assemblies, Assembly, assemble

Kind = Literal["linear", "embedding", "norm", "bias"]


@dataclass(frozen=True)
class Role:
    """What an output tensor is in the model."""

    kind: Kind
    shape: tuple[int, ...]
    input_axis: int = -1  # the axis of a layer's inputs: -2 where the weight is [in, out]


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are places without storage, its buffers real.

    Buffers that a checkpoint holds (the correction biases of routers) are output tensors too.
    They have no role, nor have parameters that transformers does not train, nor those that no
    text reaches (a vision tower): nothing trains them, and their coefficients keep the start.
    """

    model: PreTrainedModel
    tensors: dict[str, str]  # parameter or buffer -> output tensor; tied parameters share one
    roles: dict[str, Role]  # output tensor -> its role
    assemblies: tuple[Assembly, ...] = ()  # of the parameters that are no single output tensor

    def untied(self) -> list[str]:
        """Parameters that the config ties to another, and that the merge writes all the same."""
        tied = self.model.all_tied_weights_keys.items()
        return [own for own, other in tied if self.tensors[own] != self.tensors[other]]

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """The parts whose weights are made together, with their full names."""
        return blocks_of(self.model)

    def read_blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Those that text goes through."""
        read = _read_by_text(self.model)
        return ((path, block) for path, block in self.blocks() if f"{path}.".startswith(read))

    def inputs(self, path: str) -> set[str]:
        """The output tensors that a block's weights are made of."""
        direct = {name for own, name in self.tensors.items() if own.startswith(f"{path}.")}
        made = (a for a in self.assemblies if any(p.startswith(f"{path}.") for p in a.parameters))
        return direct.union(*(assembly.names for assembly in made))


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
    with init_empty_weights(include_buffers=False):  # rotary buffers are computed, not loaded
        model = make_model(config, dtype, trust_remote_code=trust_remote_code)
    architecture = type(model).__name__
    _require_causal(model, architecture)
    assemblies = assemble(model, output_tensors)
    tensors = _output_names(model, assemblies, architecture)
    skeleton = Skeleton(
        model=model,
        tensors=tensors,
        roles=_roles(model, tensors, assemblies),
        assemblies=tuple(assemblies.composed),
    )
    set_places(model, torch.device("cpu"))
    return skeleton


def make_model(
    config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool
) -> PreTrainedModel:
    """Raises DamError where transformers cannot build the model."""
    architecture = (config.architectures or ["?"])[0]
    try:
        model = get_auto_cls(architecture).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise DamError(
            f"transformers cannot build the architecture {architecture} ({error}): the fit needs "
            "it; update transformers, or allow the model's own code with --trust-remote-code."
        ) from error
    return model.eval()


def make_trained(
    config: PretrainedConfig,
    dtype: torch.dtype,
    frozen: Collection[str],
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """`make_model`, of which all parameters but the frozen ones have gradients."""
    model = make_model(config, dtype, trust_remote_code=trust_remote_code)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name not in frozen)
    return model


def set_places(model: nn.Module, device: torch.device) -> None:
    """Parameters that have a shape and a device, no storage, and NaN for a value.

    Models ask a weight for its device and send their inputs there: on the meta device these
    would be lost. And a weight that nobody gives computes with NaN, not with what is in memory.
    """
    for module in model.modules():
        for name, place in module._parameters.items():
            if place is not None and place.is_floating_point():
                nan = torch.full((), torch.nan, dtype=place.dtype, device=device)
                module._parameters[name] = nn.Parameter(nan.expand(place.shape), False)


# Weights are made anew for each call; these change them in place as they run.
CHANGE_THEIR_WEIGHTS = ("RwkvForCausalLM",)


def _require_causal(model: PreTrainedModel, architecture: str) -> None:
    """The fit masks no padding and takes every position for a prediction; an encoder does not."""
    if model.config.is_encoder_decoder or not (model.can_generate() or model.is_custom_code()):
        raise DamError(
            f"{architecture} is not a causal language model: the fit distils predictions of the "
            "next token. mergekit's other methods merge it."
        )
    if architecture in CHANGE_THEIR_WEIGHTS:
        raise DamError(
            f"{architecture} rescales its weights in place as it runs, so it cannot be fitted: "
            "mergekit's other methods merge it."
        )


def _output_names(
    model: PreTrainedModel, assemblies: Assemblies, architecture: str
) -> dict[str, str]:
    """For every parameter that is one output tensor, tied ones too, that tensor's name; also for
    every buffer that a checkpoint holds.

    Without storage a tied head is a parameter of its own, so the sharing is made explicit here;
    but a head that the merge writes, since a source has its own, is loaded as it is written.
    """
    tied, direct = model.all_tied_weights_keys, assemblies.direct
    composed = {name for assembly in assemblies.composed for name in assembly.parameters}
    names = {}
    for name, value in model.state_dict().items():
        if name in composed or not value.is_floating_point():  # integers are copied, not merged
            continue
        source = direct.get(name) or direct.get(tied.get(name, name))
        if source is None:
            raise DamError(_unwritten(name, architecture, model.state_dict()))
        names[name] = source
    return names


def _unwritten(name: str, architecture: str, parameters: Collection[str]) -> str:
    """Why the merge lacks a parameter: mergekit describes another model; or it describes none,
    infers the layers, and keeps what all of them have, by the names that the files have."""
    reason = (
        "mergekit's description of this architecture lacks it (an option in config.json, or a "
        "newer transformers, has added it)"
    )
    if architecture not in NAME_TO_ARCH:
        reason = (
            "mergekit does not describe this architecture, and merges tensors by the names that "
            "the sources' files have, among which it is not"
            if _is_everywhere(name, parameters)
            else "mergekit does not describe this architecture; it takes all layers to be alike, "
            "and drops tensors that some of them lack"
        )
    return (
        f"The merge has no tensor for {name} of {architecture}, so it cannot be fitted, and would "
        f"not be whole if merged: {reason}."
    )


def _is_everywhere(name: str, parameters: Collection[str]) -> bool:
    """Whether all layers have such a parameter; or it is no layer's."""
    layers, number, rest = re.fullmatch(r"(?:(.*?)\.(\d+)\.)?(.*)", name).groups()
    if number is None:
        return True
    others = {
        own.removeprefix(f"{layers}.").partition(".")[0]
        for own in parameters
        if own.startswith(f"{layers}.")
    }
    return all(f"{layers}.{other}.{rest}" in parameters for other in others)


def _roles(
    model: PreTrainedModel, tensors: dict[str, str], assemblies: Assemblies
) -> dict[str, Role]:
    """Output tensor -> what it is in the model."""
    owners, roles = dict(_owners(model)), {}
    read = _read_by_text(model)
    for parameter, name in tensors.items():
        module, value = owners.get(parameter, (None, None))  # none: a buffer
        if value is not None and value.requires_grad and parameter.startswith(read):
            roles.setdefault(name, _role(parameter, module, tuple(value.shape)))
    for assembly in assemblies.composed:
        module, _ = owners[assembly.target]
        if assembly.target.startswith(read):
            for name, shape in assembly.shapes.items():
                roles[name] = _role(name, module, shape, is_transposed=assembly.is_transposing)
    return roles


def _read_by_text(model: PreTrainedModel) -> tuple[str, ...]:
    """What the names begin with of all that text goes through: "" (all names do), or, in a model
    that sees or hears too, the decoder's, the embedding's and the head's."""
    if model.config.get_text_config() is model.config:
        return ("",)
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if any(module is part for part in parts)
    )


def _owners(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, torch.Tensor]]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, (module, parameter)


def _role(
    name: str, module: nn.Module, shape: tuple[int, ...], *, is_transposed: bool = False
) -> Role:
    """The role of a tensor whose owner keeps it as [out, in], unless `is_transposed`."""
    if name.rpartition(".")[2].endswith("bias"):
        return Role("bias", shape)
    if isinstance(module, nn.Embedding):
        return Role("embedding", shape)
    if len(shape) < 2:
        return Role("norm", shape)
    # Some experts keep [experts, in, out], and say so.
    is_transposed ^= isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return Role("linear", shape, input_axis=-2 if is_transposed else -1)


def blocks_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
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
            yield from blocks_of(child, f"{path}.")
