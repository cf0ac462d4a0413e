"""Held-out KL on the way of a fit, every so many steps."""

from collections.abc import Callable, Sequence

from transformers import Trainer, TrainerCallback

from mergekit_dam.coefficients import Figures, HeldOut

KEY = "held_out_kl_"  # and the source's number from 1, in the Trainer's logs


class Watch(TrainerCallback):
    """Logs the held-out figures with the Trainer, whose checkpoints keep them for a resumed fit."""

    def __init__(self, trainer: Trainer, every: int, evaluate: Callable[[], Sequence[Figures]]):
        self._trainer, self._every, self._evaluate = trainer, every, evaluate

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            figures = self._evaluate()
            self._trainer.log({f"{KEY}{n}": f.kl for n, f in enumerate(figures, 1)})


def watched(trainer: Trainer, sources: int) -> tuple[HeldOut, ...]:
    """What was logged so far, one point for each evaluation."""
    keys = [f"{KEY}{number}" for number in range(1, sources + 1)]
    return tuple(
        HeldOut(step=entry["step"], kl=tuple(entry[key] for key in keys))
        for entry in trainer.state.log_history
        if keys[0] in entry
    )
