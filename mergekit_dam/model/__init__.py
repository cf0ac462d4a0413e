"""The merged model of the fit: a Hugging Face skeleton whose weights are made block by block."""

from mergekit_dam.model.block import Block
from mergekit_dam.model.head import Head
from mergekit_dam.model.merged import MergedModel
from mergekit_dam.model.mixture import Mixture, NotMixedError
from mergekit_dam.model.offload import Offload
from mergekit_dam.model.paths import Arrival, Path
from mergekit_dam.model.recompute import Recompute
from mergekit_dam.model.skeleton import Role, Skeleton, build_skeleton
from mergekit_dam.model.views import View
from mergekit_dam.model.weights import SourceWeights, Stack

__all__ = [
    "Arrival",
    "Block",
    "Head",
    "MergedModel",
    "Mixture",
    "NotMixedError",
    "Offload",
    "Path",
    "Recompute",
    "Role",
    "Skeleton",
    "SourceWeights",
    "Stack",
    "View",
    "build_skeleton",
]
