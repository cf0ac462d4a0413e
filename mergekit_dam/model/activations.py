"""What a model keeps between forward and backward, and what its blocks make beside that, measured
without computing anything."""

import copy
import logging
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, masking_utils
from transformers.integrations import moe

from mergekit_dam.model.live import Live, storage_of, tensors
from mergekit_dam.model.skeleton import blocks_of, make_model

TOKENS = 64  # of the trial, where each token keeps the same however long the row is
MANY = 2**20  # tokens, beside which a block's weights do not count
OWN = (Tensor, UserDict)  # of which a block that runs once more has its own; others are containers


@dataclass(frozen=True)
class Activations:
    """Bytes for each token of a step, the head left out."""

    all: float  # what autograd keeps of the whole model, but for its weights
    largest: float  # of the block that keeps most
    inputs: float  # of all blocks
    taught: float  # what a block without gradients has at most
    passing: float  # what one with gradients has at most, beside what it keeps


def measure(
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokens: int,
    frozen: Collection[str] = (),  # parameters without gradients
    *,
    trust_remote_code: bool,
) -> Activations:
    """Runs the model on tensors without storage. Where attention keeps every pair of tokens (it is
    `eager`, or has a mask for a window), for a row of so many. Models that cannot run so are
    estimated: like a Llama of their sizes."""
    window = getattr(config.get_text_config(), "sliding_window", None) or tokens + 1
    try:
        with without_storage():
            model = make_model(config, dtype, trust_remote_code=trust_remote_code)
            for name, parameter in model.named_parameters(remove_duplicate=False):
                parameter.requires_grad_(name not in frozen)
            has_pairs = model.config._attn_implementation == "eager" or window <= tokens
            return _measure(model, tokens if has_pairs else TOKENS)
    except Exception:  # whatever stops such a run would not stop a real one
        return _estimate(config.get_text_config(), dtype)


@contextmanager
def without_storage() -> Iterator[None]:
    """A context whose tensors have no storage; without the traceback that torch logs for an
    operation that it cannot run so."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _without_values():
            yield
    finally:
        log.disabled = before


@contextmanager
def _without_values() -> Iterator[None]:
    """transformers looks whether positions are those of several rows in one, and makes a mask for
    them where it cannot see that: positions without storage do not tell. Products of experts it
    has to make in an operation that runs without storage in all dtypes."""
    packed = patch.object(
        masking_utils, "find_packed_sequence_indices", lambda _: None, create=True
    )
    experts = patch.object(moe, "_can_use_grouped_mm", lambda *_: False, create=True)
    with packed, experts:
        yield


def _measure(model: nn.Module, tokens: int) -> Activations:
    of_all, largest, inputs = _kept(model, tokens)
    taught, most = _at_most(model, tokens)
    return Activations(of_all, largest, inputs, taught, max(most - largest, 0))


def _kept(model: nn.Module, tokens: int) -> tuple[float, float, float]:
    """Bytes for each token: that all blocks keep, that the largest does, and that all are given."""
    own = {storage_of(t) for t in (*model.parameters(), *model.buffers())}
    kept: dict[Any, Tensor] = {}  # holding the tensors keeps their storages apart
    blocks, inputs = [], 0

    def keep(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor
        return tensor

    def size() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal inputs
        given = [x for x in (*args[:1], kwargs.get("hidden_states")) if isinstance(x, Tensor)]
        inputs += sum(x.numel() * x.element_size() for x in given)
        blocks.append(size())

    def after(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        blocks[-1] = size() - blocks[-1]

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(model, 1, tokens, before, after)
    return size() / tokens, max(blocks) / tokens, inputs / tokens


def _at_most(model: nn.Module, tokens: int) -> tuple[float, float]:
    """Bytes for each token that a block has at most, without gradients and with them: of so many
    tokens that the gradients of its weights do not count. Embeddings and norms take less than
    layers, and most models have one kind of these: the pass ends after the last kind's first."""
    rows, found = max(1, MANY // tokens), {}
    blocks = [block for _, block in blocks_of(model.base_model)]
    layers = [block for block in blocks if any(block.children())] or blocks
    left = {_kind(block) for block in layers}

    def after(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if (kind := _kind(block)) in left:
            left.remove(kind)
            found[kind] = _alone(block, *tree_map_only(OWN, _as_given, (args, kwargs)))
        if not left:
            raise _Enough

    with suppress(_Enough):
        _run(model, rows, tokens, lambda *_: None, after)
    taught, most = map(max, zip(*found.values(), strict=True))
    return taught / rows / tokens, most / rows / tokens


def _run(model: nn.Module, rows: int, tokens: int, before: Callable, after: Callable) -> None:
    """A pass, with hooks around each block."""
    with ExitStack() as hooks:
        for _, block in blocks_of(model.base_model):
            for add, hook in (
                (block.register_forward_pre_hook, before),
                (block.register_forward_hook, after),
            ):
                hooks.callback(add(hook, with_kwargs=True).remove)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        model.base_model(input_ids=ids, use_cache=False)


class _Enough(Exception):
    """Ends a pass."""


def _kind(block: nn.Module) -> tuple:
    """What blocks that take about the same have in common: masks, which few keep, are not told
    apart."""
    return type(block), *(parameter.shape for parameter in block.parameters())


def _as_given(given: Any) -> Any:
    """Without what it was made of; what layers share, and write to, in a copy."""
    if isinstance(given, Tensor):
        return given.detach().requires_grad_(given.requires_grad).clone()
    copied = copy.copy(given)
    for key, value in given.items():
        copied[key] = tree_map_only(OWN, _as_given, value)
    return copied


def _alone(block: nn.Module, args: tuple, kwargs: dict) -> tuple[int, int]:
    """Bytes that a block has at most by itself, without gradients and with them."""
    with torch.no_grad(), Live() as taught:
        block.forward(*args, **kwargs)  # without the hooks
    with Live() as most:
        made = [
            tensor for tensor in tensors(block.forward(*args, **kwargs)) if tensor.requires_grad
        ]
        if made:
            torch.autograd.backward(made, [torch.empty_like(tensor) for tensor in made])
    block.zero_grad()
    return taught.most, most.most


def inner_width(config: PretrainedConfig) -> int:
    """Of a layer's widest states; of the widest layer, where each has its own."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(inner) if isinstance(inner, Sequence) else inner


def _estimate(config: PretrainedConfig, dtype: torch.dtype) -> Activations:
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = inner_width(config)
    wide = max(inner, width)
    layer, inputs, taught, passing = (
        n * dtype.itemsize for n in (12 * width + 4 * inner, layers * width, 4 * wide, 2 * wide)
    )
    return Activations(layers * layer, layer, inputs, taught, passing)
