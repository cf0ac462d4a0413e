"""mergekit's own merge of a config, kept in memory.

The plan, the methods, the order of work and the rounding are those of `mergekit-yaml`; only the
last step differs: what takes the tensors keeps them and writes nothing.
"""

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, TaskUniverse
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.tokenizer import BuildTokenizer
from torch import Tensor

from mergekit_dam.errors import DamError, in_one_line
from mergekit_dam.plan import Plan


class _Kept(dict[str, Tensor]):
    """Stands in for mergekit's writer of checkpoints."""

    def save_tensor(self, name: str, tensor: Tensor, clone: bool = False) -> None:
        self[name] = tensor

    def finalize(self) -> None:
        pass


def merge_in_memory(merge: MergeConfiguration, plan: Plan, seed: int) -> dict[str, Tensor]:
    """Output tensor -> what `mergekit-yaml --random-seed SEED` would write, on the CPU.

    `plan` gives the options and, where vocabularies are aligned, the tokens in its order. Raises
    DamError for what mergekit refuses.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _merge(merge.model_copy(deep=True), plan, plan.options)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
        raise DamError(f"mergekit cannot make this merge: {in_one_line(error)}") from error


def _merge(merge: MergeConfiguration, plan: Plan, options: MergeOptions) -> dict[str, Tensor]:
    LoaderCache().setup(options=options)
    architecture = get_architecture_info(merge, options)
    config = _model_out_config(merge, architecture, options.trust_remote_code)
    tasks = MergePlanner(merge, architecture, options, config).plan_to_disk(out_path="")
    universe, kept = TaskUniverse(tasks), _Kept()
    ready = {}
    for task in tasks:
        if isinstance(task, SaveTensor):
            ready[universe.get_handle(task.writer_task)] = kept
        elif isinstance(task, BuildTokenizer):  # a union's order differs from call to call
            ready[universe.get_handle(task)] = plan.vocabulary.info
    targets = [handle for task in tasks if (handle := universe.get_handle(task)) not in ready]
    executor = Executor(targets, options.device, "cpu", cached_values=ready)
    for _ in executor.run(quiet=True):
        pass
    return dict(kept)
