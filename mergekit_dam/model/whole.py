"""A source as a plain model of transformers', which can write text with a key-value cache."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_dam.model.skeleton import build_skeleton
from mergekit_dam.plan import Plan


def load_whole(plan: Plan, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a plan with one source, as the fit sees it: adapters merged, dtypes cast.

    `dtype` is that of the forward pass; None: the widest of the weights. Raises DamError for what
    cannot be read or built.
    """
    (source,) = plan.sources
    tensors = {
        name: inputs[source].to(device)
        for name, inputs in plan.load(plan.tensors)
        if source in inputs
    }
    dtype = dtype or _widest(tensors)
    skeleton = build_skeleton(
        plan.model_config,
        frozenset(name for name, tensor in tensors.items() if tensor.is_floating_point()),
        dtype=dtype,
        trust_remote_code=plan.options.trust_remote_code,
    )
    model = skeleton.model
    values = {name: tensors[tensor] for name, tensor in skeleton.tensors.items()}
    for assembly in skeleton.assemblies:
        values |= assembly({name: tensors[name] for name in assembly.names})
    for name, value in values.items():
        _put(model, name, value.to(dtype))
    return model.to(device)


def _widest(tensors: dict[str, Tensor]) -> torch.dtype:
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    return torch.float32 if len(dtypes) != 1 or torch.float64 in dtypes else dtypes.pop()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
