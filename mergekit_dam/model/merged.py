"""The merged model: coefficients are its only parameters, weights exist one block at a time.

Every block of the skeleton (a decoder layer, an embedding, the final norm, the head) runs
with weights made on the spot, in the places of its own. Where gradients are wanted
the backward pass makes a block's weights again (see `recompute`): one block's merged weights exist
at a time. A teacher is the same skeleton with one source's own tensors in place of the merged
ones; it costs no extra weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_dam.model.block import Block, Call, with_made_weights
from mergekit_dam.model.head import Head
from mergekit_dam.model.mixture import Mixer, Mixture, agrees, serves
from mergekit_dam.model.paths import Path, arrive, begun, drive
from mergekit_dam.model.recompute import Recompute, run
from mergekit_dam.model.skeleton import Skeleton, set_places
from mergekit_dam.model.split import Split
from mergekit_dam.model.views import View, Views
from mergekit_dam.model.weights import SourceWeights, Stack


class MergedModel(nn.Module):
    """Logits of the merge, or of a source, for right-padded token ids."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: SourceWeights,
        coefficients: Mapping[str, Tensor],  # output tensor -> [N, *B], float32
        trained: frozenset[str] | set[str],  # output tensors whose coefficients get gradients
        dtype: torch.dtype = torch.float32,  # of the forward pass
        teachers: "Mapping[int, MergedModel] | None" = None,  # of sources with other layers
    ):
        super().__init__()
        self._names = {name: name.replace(".", "/") for name in coefficients}
        for name, value in coefficients.items():
            parameter = nn.Parameter(value.detach().clone().float(), name in trained)
            self.register_parameter(self._names[name], parameter)
        self._weights, self._dtype = weights, dtype
        self._teachers = dict(teachers or {})
        self._views = Views(weights, lambda name: getattr(self, self._names[name]), dtype)
        self._view: View = "merge"  # of a pass that does not say whose weights it sees
        self._intercept: Call | None = None
        self.recompute: Recompute = "block"
        # In a tuple, so that the skeleton is no submodule: its parameters are none of ours.
        self._skeleton = (with_made_weights(skeleton, self._views.weights, self._call),)
        self._split, self._mixer = Split(self.model), Mixer()
        self._blocks = tuple(m for m in self.model.modules() if isinstance(m, Block))
        weights.group(block.names() for block in self._blocks)

    @property
    def model(self) -> nn.Module:
        return self._skeleton[0]

    def coefficients(self) -> dict[str, Tensor]:
        """Output tensor -> [N, *B]; the parameters themselves."""
        return {name: getattr(self, key) for name, key in self._names.items()}

    def trained_coefficients(self) -> dict[str, Tensor]:
        return {name: c for name, c in self.coefficients().items() if c.requires_grad}

    def _apply(self, fn, recurse=True):
        """`.to(device)` takes the skeleton's buffers and places along, which are none of ours."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fn(buffer)
        self._views.device = fn(torch.zeros(())).device
        set_places(self.model, self.device)
        self._mixer = Mixer()
        for teacher in self._teachers.values():
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def vocabulary(self) -> int:
        """How many logits a position has."""
        return self.model.config.get_text_config().vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the forward pass."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._views.device

    def regularised(self) -> list[Tensor]:
        """Each trained tensor's coefficients [n, *B], of the n sources that teach and have it."""
        found = ((self._weights[n], c) for n, c in self.trained_coefficients().items())
        return [stack.own(c, stack.teachers) for stack, c in found]

    def not_finite(self) -> tuple[int, str] | None:
        """(source, output tensor) of the sources' first weight that is NaN or infinite."""
        return self._weights.not_finite()

    def forward(self, input_ids: Tensor) -> Tensor:  # [rows, length] -> [rows, length, vocabulary]
        """Padding on the right needs no mask: attention is causal, so no real token sees it."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    @contextmanager
    def speaking_as(self, view: View) -> Iterator["MergedModel"]:
        """A context with the model that computes what `view` computes: this one, or, for a source
        whose layers are not all in the merge, in their places, the source's own."""
        model, view = self.speaker(view)
        with model._seen_as(view):
            yield model

    def speaker(self, view: View | None) -> "tuple[MergedModel, View]":
        """The model that computes what a view computes, by default the present one, and that
        model's view."""
        if isinstance(view, int) and view in self._teachers:
            return self._teachers[view], 0
        return self, self._view if view is None else view

    def states(self, input_ids: Tensor, view: View | None = None) -> Tensor:
        """[rows, length, width]: what the head of a view makes logits of."""
        model, view = self.speaker(view)
        with model._seen_as(view), torch.set_grad_enabled(_has_gradients(view)):
            return model._split.states(input_ids)

    def all_states(self, passes: Sequence[tuple[Tensor, View | None]]) -> list[Tensor]:
        """`states` of each pass. Those of the merge go through the blocks side by side, so that a
        block's weights are made once for all of them; so do those of the sources, where tensors
        are fetched for each block."""
        spoken = [(*self.speaker(view), ids) for ids, view in passes]
        together = [
            index
            for index, (model, view, _) in enumerate(spoken)
            if model is self and (view == "merge" or self._weights.is_fetched)
        ]
        found = self._side_by_side([(spoken[index][2], spoken[index][1]) for index in together])
        result = dict(zip(together, found, strict=True))
        return [result[n] if n in result else self.states(*p) for n, p in enumerate(passes)]

    def _side_by_side(self, passes: Sequence[tuple[Tensor, View]]) -> list[Tensor]:
        if len(passes) < 2:
            return [self.states(*own) for own in passes]
        self._learn_split(passes[0][1])
        paths = [
            Path(self._split.states, ids, view, has_gradients=_has_gradients(view))
            for ids, view in passes
        ]
        with self.abreast(paths):
            drive(paths, self._outputs)
        return [path.result for path in paths]

    def _learn_split(self, view: View) -> None:
        """Before several passes, which could not try the head on the way."""
        if not self._split.is_known:
            with torch.no_grad():
                self.states(torch.zeros(2, 3, dtype=torch.long, device=self.device), view)

    def _outputs(self, block: Block, calls: Sequence[tuple[tuple, dict]], view: View) -> list[Any]:
        """A block's outputs for several calls, its weights made once."""
        with torch.set_grad_enabled(_has_gradients(view)):
            if torch.is_grad_enabled():
                return run(block, calls, self.recompute)
            if isinstance(view, Mixture):
                weights = {source: block.weights(source) for source in view.counts}
                return self._mixer.run_each(block, weights, view, calls)
            return block.run_each(calls, block.weights(view, whole=False))

    def mixes(self) -> bool:
        """Whether rows of several sources go through it in one pass, whose view is a `Mixture`;
        tried once, on a few tokens."""
        if self._mixer.works is None:
            may = not self._teachers and serves(self.device) and self._has_no_copies()
            self._mixer.works = may and agrees(self._side_by_side, self.vocabulary, self.device)
        return self._mixer.works

    def _has_no_copies(self) -> bool:
        """Whether sources' tensors are used as they lie. Copies would be there of all sources."""
        is_assembled = any(block.is_assembled for block in self._blocks)
        return not is_assembled and self._weights.stored == {self._dtype}

    def head(self, view: View | None = None) -> Head:
        """The head of a view, its weights made once."""
        model, view = self.speaker(view)
        inside = [block for block in model._blocks if model._split.in_head(block)]
        made = {block.path: block.weights(view) for block in inside}
        return Head(model._split, made, model.intercepted)

    def has_head(self, source: int) -> bool:
        """Whether a source's states are something else than its logits, which a pass shows."""
        model, view = self.speaker(source)
        model._learn_split(view)
        return not model._split.is_whole

    def as_average(self):
        """A context in which the model is the plain average of its sources."""
        return self._seen_as("average")

    def is_average(self) -> bool:
        """Whether its coefficients make it so; of sparsified task vectors none do."""
        return not self._weights.is_prepared and all(
            torch.equal(c, _average(c, self._weights[name]))
            for name, c in self.coefficients().items()
        )

    @contextmanager
    def intercepted(self, call: Call) -> Iterator[None]:
        """A context in which every block is run by `call(block, args, kwargs)`."""
        before, self._intercept = self._intercept, call
        try:
            yield
        finally:
            self._intercept = before

    @contextmanager
    def abreast(self, paths: Sequence[Path]) -> Iterator[None]:
        """A context in which all paths stand at a block of the model, at first its first."""
        with self.intercepted(arrive), begun(paths):
            yield

    @torch.no_grad()
    def all_weights(self, view: View) -> dict[str, Tensor]:
        """Output tensor -> its weight as a view of this model has it, which is a view in its turn:
        made once, and not for each pass anew."""
        made: dict[str, Tensor] = {}
        for block in self._blocks:
            made |= self._views.weights(view, [n for n in block.names() if n not in made])
        return made

    def trained_blocks(self) -> list[Block]:
        """The blocks that have trained tensors of their own."""
        trained = self.trained_coefficients().keys()
        return [block for block in self._blocks if trained & set(block.tensors.values())]

    def stack(self, name: str) -> Stack:
        """The inputs of one output tensor."""
        return self._weights[name]

    def _call(self, block: Block, args: tuple, kwargs: dict):
        if self._intercept is not None:
            return self._intercept(block, args, kwargs)
        return self._outputs(block, [(args, kwargs)], self._view)[0]

    @contextmanager
    def _seen_as(self, view: View):
        before, self._view = self._view, view
        try:
            yield
        finally:
            self._view = before


def _has_gradients(view: View) -> bool:
    """Only the merge's passes, where gradients are wanted at all."""
    return torch.is_grad_enabled() and view == "merge"


def _average(coefficients: Tensor, stack: Stack) -> Tensor:
    """Those of the plain average, of the same shape."""
    result = torch.zeros_like(coefficients)
    result[list(stack.rows[: stack.teachers])] = 1 / stack.teachers
    return result
