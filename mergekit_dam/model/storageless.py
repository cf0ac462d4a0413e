"""Runs on tensors without storage: what a model would make, without making it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel, masking_utils
from transformers.integrations import moe

LOG = logging.getLogger(__name__)
Found = TypeVar("Found")


def without_storage(
    run: Callable[[], Found], estimate: Callable[[], Found], what: str, device: str = "cpu"
) -> Found:
    """What `run` finds where tensors have no storage, as they would be on `device`. If the model
    cannot run so: an estimate, and a warning that what it takes in memory for `what` is one."""
    try:
        with _tensors_without_storage(), _attention_of(device):
            return run()
    except Exception as error:  # whatever stops such a run would not stop a real one
        LOG.warning(
            "What %s of this model takes in memory cannot be measured beforehand, so it is "
            "estimated, like that of a Llama of its sizes (%s).",
            what,
            str(error).rstrip("."),
        )
        return estimate()


@contextmanager
def _tensors_without_storage() -> Iterator[None]:
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
    """A context in which transformers asks no tensor for its values."""
    # It would make a mask where it cannot see that positions are those of one row.
    rows = patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None, create=True)
    # Products of experts run without storage in some dtypes alone.
    experts = patch.object(moe, "_grouped_mm", _as_of_one_expert, create=True)
    # Not all that sets first values runs without storage, nor has to.
    values = patch.object(PreTrainedModel, "initialize_weights", lambda _: None, create=True)
    with rows, experts, values:
        yield


def _as_of_one_expert(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Of the same size, and autograd keeps the same for it, as if each expert had its own rows."""
    return x.to(weights.dtype) @ weights[0]


@contextmanager
def _attention_of(device: str) -> Iterator[None]:
    """A context in which torch's attention keeps what it does on `device`. Tensors without storage
    are a CPU's, whose fused kernel takes values as wide as keys alone. With others, as those of
    latent attention, every pair of tokens is kept there; on a GPU it is not."""
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        query, key = (_as_wide(tensor, value.shape[-1]) for tensor in (query, key))
        return plain(query, key, value, *args, **kwargs)

    is_gpu = torch.device(device).type != "cpu"
    with patch.object(F, "scaled_dot_product_attention", attention if is_gpu else plain):
        yield


def _as_wide(tensor: Tensor, width: int) -> Tensor:
    """A view where it can be one, which keeps all of the tensor."""
    own = tensor.shape[-1]
    return F.pad(tensor, (0, width - own)) if own < width else tensor[..., :width]


def inner_width(config: PretrainedConfig) -> int:
    """Of a layer's widest states; of the widest layer, where each has its own."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return max(inner) if isinstance(inner, Sequence) else inner
