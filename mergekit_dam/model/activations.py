"""How much a model keeps between forward and backward, measured without computing anything."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig, masking_utils

from mergekit_dam.model.skeleton import blocks_of, make_model

TOKENS = 64  # of the trial, where each token keeps the same however long the row is


@dataclass(frozen=True)
class Activations:
    """Bytes for each token of a step, the head left out."""

    all: float  # what autograd keeps of the whole model, but for its weights
    largest: float  # of the block that keeps most
    inputs: float  # of all blocks
    widest: float  # the largest tensor of those that are kept


def measure(
    config: PretrainedConfig, dtype: torch.dtype, tokens: int, *, trust_remote_code: bool
) -> Activations:
    """Runs the model on tensors without storage. Where attention keeps every pair of tokens (it is
    `eager`, or has a mask for a window), for a row of so many. Models that cannot run so are
    estimated: like a Llama of their sizes."""
    window = getattr(config.get_text_config(), "sliding_window", None) or tokens + 1
    try:
        with without_storage():
            model = make_model(config, dtype, trust_remote_code=trust_remote_code)
            has_pairs = model.config._attn_implementation == "eager" or window <= tokens
            return _measure(model, tokens if has_pairs else TOKENS)
    except Exception:  # whatever stops such a run would not stop a real one
        return _estimate(config.get_text_config(), dtype)


@contextmanager
def without_storage() -> Iterator[None]:
    """A context whose tensors have no storage; without the traceback that torch logs for an
    operation that it cannot run so, such as the grouped products of experts in float32."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _without_packed_rows():
            yield
    finally:
        log.disabled = before


@contextmanager
def _without_packed_rows() -> Iterator[None]:
    """transformers looks whether positions are those of several rows in one, and makes a mask for
    them where it cannot see that: positions without storage do not tell."""
    with patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None, create=True):
        yield


def _measure(model: nn.Module, tokens: int) -> Activations:
    own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[Any, Tensor] = {}  # holding the tensors keeps their storages apart
    blocks, inputs = [], 0

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal inputs
        given = [x for x in (*args[:1], kwargs.get("hidden_states")) if isinstance(x, Tensor)]
        inputs += sum(x.numel() * x.element_size() for x in given)
        blocks.append(size())

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        blocks[-1] = size() - blocks[-1]

    for _, block in blocks_of(model.base_model):
        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    widest = max(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return Activations(*(n / tokens for n in (size(), max(blocks), inputs, widest)))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _estimate(config: PretrainedConfig, dtype: torch.dtype) -> Activations:
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    wide = max(inner, width)
    layer, inputs, widest = (
        n * dtype.itemsize for n in (12 * width + 4 * inner, layers * width, wide)
    )
    return Activations(layers * layer, layer, inputs, widest)
