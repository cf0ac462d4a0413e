"""Whether a model's predictions are made of what is before them alone."""

import torch

from mergekit_dam.errors import DamError
from mergekit_dam.model import MergedModel
from mergekit_dam.model.split import rounding

SHARED, OTHER = 4, 2  # tokens of two rows: those that they begin with, and those that follow


@torch.no_grad()
def require_causal(merged: MergedModel) -> None:
    """Tried on a few tokens, since a model's class and config need not tell: an encoder that
    predicts masked tokens, for one. All positions of such a model see what follows; another's
    experts may take one of them otherwise, by a rounding. Raises DamError."""
    ids = torch.arange(SHARED + OTHER, device=merged.device).repeat(2, 1)
    ids[1, SHARED:] += OTHER  # other tokens than those of the first row
    one, other = merged.states(ids % merged.vocabulary)[:, :SHARED].float()
    if bool(((one - other).abs().amax(-1) > rounding(one, merged.dtype)).all()):
        raise DamError(
            f"{type(merged.model).__name__} with this config.json sees later tokens: the fit "
            "distils predictions of the next token. mergekit's other methods merge it."
        )
