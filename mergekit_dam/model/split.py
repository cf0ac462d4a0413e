"""A causal language model in two: up to the states before its head, and the head.

The states are small, the logits that the head makes of them [tokens, vocabulary] are not. In two
parts, the head runs on those positions alone that are wanted, some at a time. What a model does to
its logits after the head (soft caps, scales) is part of its own `forward`, which runs here as it
is: once with its inner model cut short, once with its inner model answering the given states.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


def inner_model(model: PreTrainedModel) -> nn.Module:
    """The part of a model whose last states its head makes logits of; the model itself where there
    is none."""
    if model.base_model is not model:
        return model.base_model
    # Llama 4 says another prefix than its part has.
    return _beside(model.get_output_embeddings(), model.get_input_embeddings(), model) or model


def _beside(head: nn.Module | None, embedding: nn.Module, module: nn.Module) -> nn.Module | None:
    """The outermost part that has the embedding, with what is around it, and not the head, if the
    model has one."""
    for child in module.children():
        inside = set(child.modules())
        if embedding in inside and child is not embedding:
            return _beside(head, embedding, child) if head in inside else child
    return None


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """How far others may be from values that are the same but for what is rounded on the way."""
    return torch.finfo(dtype).eps ** 0.5 / 4 * values.abs().max()


class Split:
    """The two parts of a model whose logits at a position depend on the state there alone.

    Any other model is left whole: its logits are its states, and its head does nothing.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._answer: type | None = None  # what the inner model returns
        inner = inner_model(model)
        self.is_whole = inner is model
        self._take(inner)

    def _take(self, inner: nn.Module) -> None:
        """As the inner model, whose `forward` then does what a pass's context has in its place."""
        own = inner.forward
        instead: ContextVar[Callable[..., Any]] = ContextVar("instead", default=own)

        @functools.wraps(own)  # models look at the arguments that it takes
        def forward(*args, **kwargs):
            return instead.get()(*args, **kwargs)

        self._forward, self._instead = own, instead
        self._inside = frozenset(map(id, inner.modules()))
        if not self.is_whole:
            inner.forward = forward

    @property
    def is_known(self) -> bool:
        """Whether a pass has shown what the parts are."""
        return self.is_whole or self._answer is not None

    def states(self, input_ids: Tensor) -> Tensor:  # [rows, length] -> [rows, length, width]
        """Padding on the right needs no mask: attention is causal, so no real token sees it."""
        if not self.is_whole:
            was_known, outputs = self.is_known, self.reach(input_ids)
            if not was_known:
                self._find_out(outputs)
        if self.is_whole:
            return self._model(input_ids=input_ids, use_cache=False).logits
        return outputs[0]

    def reach(self, input_ids: Tensor) -> Any:
        """What the inner model returns."""
        outputs = self._inner_outputs(input_ids)
        if outputs is None and not self.is_known:  # OPT calls a part of its inner model
            self._take(self._model.get_decoder())
            outputs = self._inner_outputs(input_ids)
        self._answer = type(outputs)
        return outputs

    def logits(self, states: Tensor) -> Tensor:  # [tokens, width] -> [tokens, vocabulary]
        return states if self.is_whole else self._tail(states[None]).squeeze(0)

    def in_head(self, module: nn.Module) -> bool:
        """Whether a module belongs to the second part."""
        return not self.is_whole and id(module) not in self._inside

    def _inner_outputs(self, input_ids: Tensor) -> Any:
        """What the inner model returns when the model calls it in its own way."""

        def until_here(*args, **kwargs):
            raise _Reached(self._forward(*args, **kwargs))

        with self._answering(until_here):
            try:
                self._model(input_ids=input_ids, use_cache=False)
            except _Reached as end:
                return end.args[0]
        return None

    @torch.no_grad()
    def _find_out(self, outputs: Any) -> None:
        """Whether the head on some positions gives what it gives on all, tried on a few."""
        try:
            states = torch.randn_like(outputs[0][:2, :3])  # [2 rows, 3, width], or fewer
            expected = self._tail(states).flatten(0, 1)
            parts = states.flatten(0, 1).split(2)
            found = torch.cat([self._tail(part[None])[0] for part in parts])
            bound = rounding(expected, found.dtype)
            self.is_whole = not bool((found - expected).abs().max() <= bound)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            self.is_whole = True

    def _tail(self, states: Tensor) -> Tensor:  # [rows, length, width] -> [.., .., vocabulary]
        kind = self._answer
        is_named = isinstance(kind, type) and issubclass(kind, ModelOutput)
        answer = kind(last_hidden_state=states) if is_named else (states,)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with self._answering(lambda *args, **kwargs: answer):
            return self._model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def _answering(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within it, and in this pass, `forward` is the inner model's own."""
        before = self._instead.set(forward)
        try:
            yield
        finally:
            self._instead.reset(before)


class _Reached(Exception):
    """Ends a model's `forward` where its inner model has returned."""
