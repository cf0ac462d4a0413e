"""The head of the merge, or of a source, with weights made once for many chunks of tokens."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from mergekit_dam.model.block import Block, Call
from mergekit_dam.model.split import Split


class Head:
    """Makes logits [tokens, vocabulary] of states [tokens, width]."""

    def __init__(
        self,
        split: Split,
        made: Mapping[str, Mapping[str, Tensor]],  # path of a block -> its weights
        intercepted: Callable[[Call], AbstractContextManager],  # see `MergedModel.intercepted`
    ):
        self._split, self._intercepted = split, intercepted
        self._made = {
            (path, name): weight for path, own in made.items() for name, weight in own.items()
        }
        # The weights as leaves: what they are made of is no matter of each call.
        self._leaves = {
            key: weight.detach().requires_grad_(weight.requires_grad)
            for key, weight in self._made.items()
        }

    def __call__(self, states: Tensor) -> Tensor:
        with self._intercepted(self._run):
            return self._split.logits(states)

    def _run(self, block: Block, args: tuple, kwargs: dict):
        own = {name: leaf for (path, name), leaf in self._leaves.items() if path == block.path}
        return block.run_with(own, *args, **kwargs)

    def trained(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, leaf) of each weight that has a gradient: the leaf is what a call uses, the
        weight what it was made as."""
        return [(w, self._leaves[key]) for key, w in self._made.items() if w.requires_grad]
