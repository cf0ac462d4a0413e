"""The merged model: coefficients are its only parameters, weights exist one block at a time.

Every block of the skeleton (a decoder layer, an embedding, the final norm, the head) runs
through `torch.func.functional_call` with weights made on the spot. Where gradients are wanted
this happens inside `torch.utils.checkpoint`, so that the backward pass makes a block's weights
and activations again: one block's merged weights exist at a time. A teacher is the same
skeleton with one source's own tensors in place of the merged ones; it costs no extra weights.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mergekit_dam.errors import DamError
from mergekit_dam.formula import alignment, combine
from mergekit_dam.model.assembly import Assembly
from mergekit_dam.model.skeleton import Skeleton, set_places
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
        self._view: int | Literal["merge", "average"] = "merge"  # whose weights the blocks get
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
        """`.to(device)` takes the skeleton's buffers and places along, which are none of ours."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else fn(buffer)
        set_places(self.model, fn(torch.zeros(())).device)
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

    def not_finite(self) -> tuple[int, str] | None:
        """(source, output tensor) of the first weight that is NaN or infinite."""
        for name in self._weights.names():
            stack = self._weights[name]
            for row, source in zip(stack.rows, stack.sources, strict=True):
                if not torch.isfinite(source).all():
                    return row, name
        return None

    @torch.no_grad()
    def interference(self) -> list[Tensor]:
        """For each trained tensor [pairs, *B]: sin²(2θ), θ being the angle between D_i and D_j.

        Nothing for parts that are parallel or orthogonal, most for 45 degrees, as in the
        published `weighted_overlap`.
        """
        result = []
        for name, c in self.trained_coefficients().items():
            stack = self._weights[name]
            parts, base = stack.parts
            cosines = [
                alignment(first, second, base, c.shape[1:])
                for first, second in itertools.combinations(parts, 2)
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
        with self._seen_as(source):
            return self(input_ids)

    def as_average(self):
        """A context in which the model is the plain average of its sources."""
        return self._seen_as("average")

    @contextmanager
    def _seen_as(self, view):
        before, self._view = self._view, view
        try:
            yield
        finally:
            self._view = before

    def _recomputes(self) -> bool:
        return self._view == "merge" and torch.is_grad_enabled()

    def _make(self, name: str) -> Tensor:
        """One weight of the present view, in the dtype of the forward pass."""
        if self._view == "merge":
            return self.merged_weight(name).to(self._dtype)
        stack = self._weights[name]
        if self._view == "average":
            share = torch.full((len(stack.rows), *[1] * len(stack.shape)), 1 / len(stack.rows))
            share = share.to(stack.sources[0].device)
            return combine(share, stack.sources, dtype=stack.dtype).to(self._dtype)
        weight = stack.source(self._view)
        if weight is None:
            raise DamError(
                f"Source number {self._view + 1} has no tensor {name}, which the merged model "
                "needs, so it cannot teach: leave it out, or give it as the base alone."
            )
        return weight.to(self._dtype)

    def merged_weight(self, name: str) -> Tensor:
        """An output tensor, rounded as the merge will write it; the gradient passes through."""
        stack, coefficients = self._weights[name], getattr(self, self._names[name])
        if len(stack.rows) < len(coefficients):
            coefficients = coefficients[list(stack.rows)]
        if torch.finfo(stack.dtype).bits >= torch.finfo(self._dtype).bits:
            return stack.merge(coefficients, stack.dtype)
        return _StraightThrough.apply(stack.merge(coefficients, self._dtype), stack.dtype)


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
        path: str,  # its name in the skeleton
        tensors: Mapping[str, str],  # the block's parameters and buffers -> output tensors
        assemblies: Sequence[Assembly],  # of its other parameters
        make: Callable[[str], Tensor],
        recomputes: Callable[[], bool],
    ):
        super().__init__()
        self.block, self._path = block, path
        self._tensors, self._assemblies = dict(tensors), tuple(assemblies)
        self._make, self._recomputes = make, recomputes

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
        for assembly in self._assemblies:
            made = assembly({name: self._make(name) for name in assembly.names})
            weights |= {name.removeprefix(f"{self._path}."): w for name, w in made.items()}
        return functional_call(self.block, weights, args, kwargs, tie_weights=False)


def _with_made_weights(
    skeleton: Skeleton, make: Callable[[str], Tensor], recomputes: Callable[[], bool]
) -> nn.Module:
    """Put a `_Block` in the place of every block of the skeleton."""
    missing = set(skeleton.tensors) | {p for a in skeleton.assemblies for p in a.parameters}
    for path, block in list(skeleton.blocks()):
        own = {name for name in missing if name.startswith(f"{path}.")}
        tensors = {
            name.removeprefix(f"{path}."): skeleton.tensors[name]
            for name in own & skeleton.tensors.keys()
        }
        assemblies = [a for a in skeleton.assemblies if own.issuperset(a.parameters)]
        missing -= own
        parent, _, child = path.rpartition(".")
        wrapped = _Block(block, path, tensors, assemblies, make, recomputes)
        setattr(skeleton.model.get_submodule(parent), child, wrapped)
    # A parameter without a value would compute with uninitialised memory, silently.
    if missing:
        raise DamError(f"The fit gives no weights to {', '.join(sorted(missing))} of the model.")
    return skeleton.model
