"""A causal language model in two: up to the states before its head, and the head.

The states are small, the logits that the head makes of them [tokens, vocabulary] are not. In two
parts, the head runs on those positions alone that are wanted, some at a time. What a model does to
its logits after the head (soft caps, scales) is part of its own `forward`, which runs here as it
is: once with its inner model cut short, once with its inner model answering the given states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


class Split:
    """The two parts of a model whose logits at a position depend on the state there alone.

    Any other model is left whole: its logits are its states, and its head does nothing.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._answer: type | None = None  # what the inner model returns
        self.is_whole = model.base_model is model

    def states(self, input_ids: Tensor) -> Tensor:  # [rows, length] -> [rows, length, width]
        """Padding on the right needs no mask: attention is causal, so no real token sees it."""
        if not self.is_whole:
            outputs = self._inner_outputs(input_ids)
            if self._answer is None:
                self._find_out(outputs, input_ids)
        if self.is_whole:
            return self._model(input_ids=input_ids, use_cache=False).logits
        return outputs[0]

    def logits(self, states: Tensor) -> Tensor:  # [tokens, width] -> [tokens, vocabulary]
        return states if self.is_whole else self._tail(states[None])[0]

    def in_head(self, module: nn.Module) -> bool:
        """Whether a module belongs to the second part."""
        if self.is_whole:
            return False
        return all(module is not inner for inner in self._model.base_model.modules())

    def _inner_outputs(self, input_ids: Tensor) -> Any:
        """What the inner model returns when the model calls it in its own way."""
        inner = self._model.base_model.forward

        def until_here(*args, **kwargs):
            raise _Reached(inner(*args, **kwargs))

        with _answering(self._model.base_model, until_here):
            try:
                self._model(input_ids=input_ids, use_cache=False)
            except _Reached as end:
                return end.args[0]
        return None

    @torch.no_grad()
    def _find_out(self, outputs: Any, input_ids: Tensor) -> None:
        """Whether the head on some positions gives what it gives on all, tried on a few."""
        self._answer = type(outputs)
        try:
            states = torch.randn_like(outputs[0][:2, :3])  # [2 rows, 3, width], or fewer
            expected = self._tail(states).flatten(0, 1)
            parts = states.flatten(0, 1).split(2)
            found = torch.cat([self._tail(part[None])[0] for part in parts])
            bound = torch.finfo(found.dtype).eps ** 0.5 / 4 * expected.abs().max()
            self.is_whole = not bool((found - expected).abs().max() <= bound)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            self.is_whole = True

    def _tail(self, states: Tensor) -> Tensor:  # [rows, length, width] -> [.., .., vocabulary]
        kind = self._answer
        is_named = isinstance(kind, type) and issubclass(kind, ModelOutput)
        answer = kind(last_hidden_state=states) if is_named else (states,)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with _answering(self._model.base_model, lambda *args, **kwargs: answer):
            return self._model(input_ids=ids, use_cache=False).logits


class _Reached(Exception):
    """Ends a model's `forward` where its inner model has returned."""


@contextmanager
def _answering(module: nn.Module, forward) -> Iterator[None]:
    """A context in which `forward` is a module's own."""
    before = vars(module).get("forward")  # of its own, where something has wrapped it
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
