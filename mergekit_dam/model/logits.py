"""What the head keeps of a chunk of tokens, measured without computing anything.

A model may do more to its logits than to make them: soft caps and scales keep copies.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mergekit_dam.model.live import Live
from mergekit_dam.model.skeleton import blocks_of, make_trained
from mergekit_dam.model.split import Split
from mergekit_dam.model.storageless import without_storage

TOKENS = 8  # of the pass that finds the states


@dataclass(frozen=True)
class Logits:
    """Of a chunk of tokens."""

    width: int  # of a state
    weights: int  # how many numbers the head's have
    trained: int  # of these
    kept: int  # bytes: of logits, of their gradients, and of what the model keeps beside them
    most: int  # as they are differentiated, with the weights' gradients


def measure_head(
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokens: int,
    frozen: Collection[str] = (),  # parameters without gradients
    *,
    trust_remote_code: bool,
) -> Logits:
    """Of so many tokens. A head that cannot run without storage is estimated: one matrix that is
    trained."""

    def run() -> Logits:
        model = make_trained(config, dtype, frozen, trust_remote_code=trust_remote_code)
        return _measure(model, Split(model), tokens)

    def estimate() -> Logits:
        text = config.get_text_config()
        weights = text.vocab_size * text.hidden_size
        kept = 2 * tokens * text.vocab_size * dtype.itemsize
        return Logits(text.hidden_size, weights, weights, kept, kept + weights * dtype.itemsize)

    return without_storage(run, estimate, "the head")


def _measure(model: PreTrainedModel, split: Split, tokens: int) -> Logits:
    with torch.no_grad():
        outputs = split.reach(torch.zeros(1, TOKENS, dtype=torch.long))
    states = outputs[0].new_empty(tokens, outputs[0].shape[-1]).requires_grad_()
    inside = (block for _, block in blocks_of(model) if split.in_head(block))
    weights = {id(p): p for block in inside for p in block.parameters()}.values()
    trained = [weight for weight in weights if weight.requires_grad]
    with Live() as live:
        logits = split.logits(states)
        slope = torch.empty_like(logits)
        kept = live.now
        torch.autograd.grad(logits, [states, *trained], slope, allow_unused=True)
    numbers = (sum(weight.numel() for weight in some) for some in (weights, trained))
    return Logits(states.shape[-1], *numbers, kept, live.most)
