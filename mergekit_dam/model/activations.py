"""What a model keeps between forward and backward, and what its blocks make beside that, measured
without computing anything."""

import copy
import math
from collections import UserDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig

from mergekit_dam.model.live import Live, storage_of, tensors
from mergekit_dam.model.skeleton import blocks_of, make_trained
from mergekit_dam.model.split import inner_model
from mergekit_dam.model.storageless import inner_width, without_storage

TOKENS = (64, 97)  # of the trials: parts of a row that are a multiple of one are not of the other
WINDOWS = ("sliding_window", "attention_chunk_size")  # of attention, in tokens
ALIKE = 0.005  # by how much figures differ that are the same
MANY = 2**20  # tokens, beside which a block's weights do not count
OWN = (Tensor, UserDict)  # of which a block that runs once more has its own; others are containers


@dataclass(frozen=True)
class Activations:
    """Bytes for each token of a step, the head left out."""

    all: float  # what autograd keeps of the whole model, but for its weights
    largest: float  # of the block that keeps most
    inputs: float  # that blocks are given, up to that one
    later: float  # and later ones
    given: float  # of that, what that one is given
    passed: float  # gradients of what that one is given
    taught: float  # what a block without gradients has at most
    most: float  # what one has at most that runs without gradients, then again with them
    passing: float  # beside what it keeps


def measure(
    config: PretrainedConfig,
    dtype: torch.dtype,
    lengths: Collection[int],
    frozen: Collection[str] = (),  # parameters without gradients
    *,
    trust_remote_code: bool,
    device: str = "cpu",
) -> dict[int, Activations]:
    """Of rows of each of these lengths, on a device. Runs the model on tensors without storage; one
    that cannot run so is estimated: like a Llama of its sizes."""

    def run() -> dict[int, Activations]:
        model = make_trained(config, dtype, frozen, trust_remote_code=trust_remote_code)
        return _of_lengths(model, set(lengths))

    def estimate() -> dict[int, Activations]:
        return dict.fromkeys(lengths, _estimate(config.get_text_config(), dtype))

    return without_storage(run, estimate, "a step", device)


def _of_lengths(model: nn.Module, lengths: Collection[int]) -> dict[int, Activations]:
    """Measured once where a token keeps the same however long its row is. Not so attention that
    keeps every pair of tokens, or has a mask for a window, and state spaces that go through a row
    in parts of a fixed length."""
    text = model.config.get_text_config()
    window = min(getattr(text, key, None) or math.inf for key in WINDOWS)
    trials = [_kept(model, tokens) for tokens in TOKENS]
    of_each = (kept.all / tokens for kept, tokens in zip(trials, TOKENS, strict=True))
    if math.isclose(*of_each, rel_tol=ALIKE):
        alike = _measure(model, TOKENS[0], trials[0])
    else:
        alike, window = None, 0
    return {
        length: alike if length < window else _measure(model, length, _kept(model, length))
        for length in lengths
    }


def _kept(model: nn.Module, tokens: int) -> "_Kept":
    kept = _Kept(model)
    with saved_tensors_hooks(kept.keep, lambda nothing: nothing):
        _run(model, 1, tokens, kept.before, kept.after)
    return kept


def _measure(model: nn.Module, tokens: int, kept: "_Kept") -> Activations:
    fullest = max(kept.blocks.values(), key=lambda block: block.inputs + block.kept)
    later = max(block.inputs for block in kept.blocks.values()) - fullest.inputs
    sizes = kept.all, fullest.kept, fullest.inputs, later, fullest.given, fullest.passed
    return Activations(*(size / tokens for size in sizes), *_at_most(model, tokens, kept))


@dataclass
class _Seen:
    """Of a block, in bytes."""

    inputs: int  # what it and those before it are given
    given: int  # what it is given
    passed: int  # of that, what has gradients
    kept: int  # of what it makes


class _Kept:
    """What autograd keeps of a pass, but for the model's weights. Autograd holds this, so this
    holds nothing that autograd holds in its turn: they would keep each other forever."""

    def __init__(self, model: nn.Module):
        self._own = {storage_of(t) for t in (*model.parameters(), *model.buffers())}
        self._tensors: dict[int, Tensor] = {}  # holding them keeps their storages apart
        self._given: dict[int, Tensor] = {}  # to blocks
        self._outputs: dict[nn.Module, dict[int, Tensor]] = {}  # by their places
        self.blocks: dict[nn.Module, _Seen] = {}
        self.kinds: dict[tuple, nn.Module] = {}  # the first block of each

    def keep(self, tensor: Tensor) -> None:
        if storage_of(tensor) not in self._own:
            self._tensors[storage_of(tensor)] = tensor.detach()

    def before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        all_given = tensors((args, kwargs))
        given = {storage_of(tensor): tensor for tensor in all_given}
        self._given |= {key: tensor.detach() for key, tensor in given.items()}
        self.kinds.setdefault(_kind(block, all_given), block)
        passed = _bytes(tensor for tensor in given.values() if tensor.requires_grad)
        before = self._made  # taken off from what is there after it
        inputs, own = _bytes(self._given.values()), _bytes(given.values())
        self.blocks[block] = _Seen(inputs, own, passed, -before)

    def after(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.blocks[block].kept += self._made
        inputs = {storage_of(tensor) for tensor in tensors((args, kwargs))}
        outputs = {n: t for n, t in enumerate(tensors(output)) if t.requires_grad}
        own = {n: t.detach() for n, t in outputs.items() if storage_of(t) not in inputs}
        self._outputs.setdefault(block, own)  # of the first time, which is run again

    def passed_on(self, block: nn.Module) -> set[int]:
        """Which of its outputs have gradients, by their places: those that another block is given,
        and not weights of attention that some models return and nobody looks at. All, where
        blocks are given none of them, but something that was made of them."""
        outputs = self._outputs[block]
        given = {n for n, tensor in outputs.items() if storage_of(tensor) in self._given}
        return given or set(outputs)

    @property
    def all(self) -> int:
        return _bytes(self._tensors.values())

    @property
    def _made(self) -> int:
        return _bytes(t for key, t in self._tensors.items() if key not in self._given)


def _bytes(tensors: Iterable[Tensor]) -> int:  # with storages of their own
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _kind(block: nn.Module, given: Sequence[Tensor]) -> tuple:
    """What blocks that take the same have in common, however many rows they are given."""
    parameters = ((parameter.shape, parameter.requires_grad) for parameter in block.parameters())
    return type(block), *parameters, *(tensor.shape[1:] for tensor in given)


def _at_most(model: nn.Module, tokens: int, kept: _Kept) -> tuple[float, float, float]:
    """Bytes for each token that a block has at most: without gradients, with them, and beside what
    it keeps. Of so many tokens that the gradients of its weights do not count. Embeddings and norms
    take less than layers, and most models have one kind of these: the pass ends after the last
    kind's first."""
    rows, found = max(1, MANY // tokens), []
    layers = {block for block in kept.kinds.values() if any(block.children())}
    left = layers or set(kept.kinds.values())

    def after(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if block in left:
            left.remove(block)
            given = tree_map_only(OWN, _as_given, (args, kwargs))
            alone = _alone(block, kept.passed_on(block), *given)
            taught, most = (size / rows / tokens for size in alone)
            beside = most - kept.blocks[block].kept / tokens
            found.append((taught, max(taught, most), beside))
        if not left:
            raise _Enough

    with suppress(_Enough):
        _run(model, rows, tokens, lambda *_: None, after)
    taught, most, passing = map(max, zip(*found, strict=True))
    return taught, most, max(passing, 0)


def _run(model: nn.Module, rows: int, tokens: int, before: Callable, after: Callable) -> None:
    """A pass, with hooks around each block."""
    inner = inner_model(model)
    inside = set(inner.modules())
    with ExitStack() as hooks:
        for block in (block for _, block in blocks_of(model) if block in inside):
            for add, hook in (
                (block.register_forward_pre_hook, before),
                (block.register_forward_hook, after),
            ):
                hooks.callback(add(hook, with_kwargs=True).remove)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        inner(input_ids=ids, use_cache=False)


class _Enough(Exception):
    """Ends a pass."""


def _as_given(given: Any) -> Any:
    """Without what it was made of; what layers share, and write to, in a copy."""
    if isinstance(given, Tensor):
        return given.detach().requires_grad_(given.requires_grad).clone()
    copied = copy.copy(given)
    for key, value in given.items():
        copied[key] = tree_map_only(OWN, _as_given, value)
    return copied


def _alone(
    block: nn.Module, outputs: Collection[int], args: tuple, kwargs: dict
) -> tuple[int, int]:
    """Bytes that a block has at most by itself, without gradients and with those of some of its
    outputs."""
    with torch.no_grad(), Live() as taught:
        made = tensors(block.forward(*args, **kwargs))  # without the hooks
        if left := [tensor for n, tensor in enumerate(made) if n not in outputs]:
            del made
            block.forward(*args, **kwargs)  # the next, while the model holds what it will drop
        del left
    with Live() as most:
        made = tensors(block.forward(*args, **kwargs))  # all of which are there until the end
        if outputs:  # gradients that nobody holds
            sum((made[place] * 1).sum() for place in outputs).backward()
    block.zero_grad()
    return taught.most, most.most


def _estimate(config: PretrainedConfig, dtype: torch.dtype) -> Activations:
    layers, width = config.num_hidden_layers, config.hidden_size
    inner = inner_width(config)
    wide = max(inner, width)
    layer, passed, taught, passing = (
        n * dtype.itemsize for n in (12 * width + 4 * inner, width, 4 * wide, 2 * wide)
    )
    return Activations(
        all=layers * layer,
        largest=layer,
        inputs=layers * passed,
        later=0,
        given=passed,
        passed=passed,
        taught=taught,
        most=layer + passing,
        passing=passing,
    )
