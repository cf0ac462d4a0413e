"""The merged model: coefficients are its only parameters, weights exist one block at a time.

Every block of the skeleton (a decoder layer, an embedding, the final norm, the head) runs
through `torch.func.functional_call` with weights made on the spot. Where gradients are wanted
this happens inside `torch.utils.checkpoint`, so that the backward pass makes a block's weights
and activations again: one block's merged weights exist at a time. A teacher is the same
skeleton with one source's own tensors in place of the merged ones; it costs no extra weights.
"""

import itertools
from collections.abc import Callable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mergekit_dam.errors import DamError
from mergekit_dam.formula import alignment, combine
from mergekit_dam.model.skeleton import Skeleton
from mergekit_dam.model.weights import SourceWeights


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
        self._source: int | None = None  # whose weights the blocks get; None: the merged ones
        # In a tuple, so that the skeleton is no submodule: its parameters are none of ours.
        self._skeleton = (_with_made_weights(skeleton, self._make, self._recomputes),)

    @property
    def model(self) -> nn.Module:
        return self._skeleton[0]

    def coefficients(self) -> dict[str, Tensor]:
        """Output tensor -> [N, *B]; the parameters themselves."""
        return {name: getattr(self, key) for name, key in self._names.items()}

    def trained_coefficients(self) -> dict[str, Tensor]:
        return {name: c for name, c in self.coefficients().items() if c.requires_grad}

    def _apply(self, fn, recurse=True):
        """`.to(device)` takes the skeleton's buffers along, which are no buffers of ours."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fn(buffer)
        for teacher in self._teachers.values():
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def regularised(self) -> list[Tensor]:
        """Each trained tensor's coefficients [n, *B], of the n sources that have the tensor."""
        return [
            c if len(rows) == len(c) else c[list(rows)]
            for name, c in self.trained_coefficients().items()
            for rows in [self._weights[name].rows]
        ]

    @torch.no_grad()
    def interference(self) -> list[Tensor]:
        """For each trained tensor [pairs, *B]: sin²(2θ), θ being the angle between D_i and D_j.

        Nothing for parts that are parallel or orthogonal, most for 45 degrees, as in the
        published `weighted_overlap`.
        """
        result = []
        for name, c in self.trained_coefficients().items():
            stack = self._weights[name]
            cosines = [
                alignment(first, second, stack.base, c.shape[1:])
                for first, second in itertools.combinations(stack.sources, 2)
            ]
            squares = torch.stack(cosines).square() if cosines else c.new_zeros(0, *c.shape[1:])
            result.append(4 * squares * (1 - squares))
        return result

    def forward(self, input_ids: Tensor) -> Tensor:  # [rows, length] -> [rows, length, vocabulary]
        """Padding on the right needs no mask: attention is causal, so no real token sees it."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def teach(self, source: int, input_ids: Tensor) -> Tensor:
        """Logits [rows, length, vocabulary] of one source on its own.

        A source whose layers are not all in the merge, in their places, is a model of its own.
        """
        if source in self._teachers:
            return self._teachers[source].teach(0, input_ids)
        with self._weights_of(source):
            return self(input_ids)

    @contextmanager
    def _weights_of(self, source: int):
        self._source = source
        try:
            yield
        finally:
            self._source = None

    def _recomputes(self) -> bool:
        return self._source is None and torch.is_grad_enabled()

    def _make(self, name: str) -> Tensor:
        """One weight, merged or a source's, in the dtype of the forward pass."""
        if self._source is None:
            return self.merged_weight(name).to(self._dtype)
        weight = self._weights[name].source(self._source)
        if weight is None:
            raise DamError(
                f"Source number {self._source + 1} has no tensor {name}, which the merged model "
                "needs, so it cannot teach: leave it out, or give it as the base alone."
            )
        return weight.to(self._dtype)

    def merged_weight(self, name: str) -> Tensor:
        """An output tensor, rounded as the merge will write it; the gradient passes through."""
        stack, coefficients = self._weights[name], getattr(self, self._names[name])
        if len(stack.rows) < len(coefficients):
            coefficients = coefficients[list(stack.rows)]
        if torch.finfo(stack.dtype).bits >= torch.finfo(self._dtype).bits:
            return combine(coefficients, stack.sources, stack.base, stack.dtype)
        weight = combine(coefficients, stack.sources, stack.base, self._dtype)
        return _StraightThrough.apply(weight, stack.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounding to a narrower dtype whose gradient is not rounded."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


class _Block(nn.Module):
    """Stands in a block's place in the skeleton and gives it its weights at each call."""

    def __init__(
        self,
        block: nn.Module,
        tensors: Mapping[str, str],  # the block's parameters -> output tensors
        make: Callable[[str], Tensor],
        recomputes: Callable[[], bool],
    ):
        super().__init__()
        self.block = block
        self._tensors, self._make, self._recomputes = dict(tensors), make, recomputes

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask their layers for attributes, such as attention_type
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args, **kwargs):
        if self._recomputes():
            return checkpoint(
                self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return self._run(*args, **kwargs)

    def _run(self, *args, **kwargs):
        weights = {local: self._make(name) for local, name in self._tensors.items()}
        return functional_call(self.block, weights, args, kwargs, tie_weights=False)


def _with_made_weights(
    skeleton: Skeleton, make: Callable[[str], Tensor], recomputes: Callable[[], bool]
) -> nn.Module:
    """Put a `_Block` in the place of every block of the skeleton."""
    covered = set()
    for path, block in list(skeleton.blocks()):
        local = [name for name, _ in block.named_parameters(remove_duplicate=False)]
        tensors = {name: skeleton.tensors[f"{path}.{name}"] for name in local}
        covered.update(f"{path}.{name}" for name in local)
        parent, _, child = path.rpartition(".")
        setattr(
            skeleton.model.get_submodule(parent), child, _Block(block, tensors, make, recomputes)
        )
    # A parameter without a value would compute with uninitialised memory, silently.
    missing = set(skeleton.tensors) - covered
    if missing:
        raise DamError(f"The fit gives no weights to {', '.join(sorted(missing))} of the model.")
    return skeleton.model
