"""Held-out KL on the way of a fit: the curve, the best coefficients of it, and when to stop."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from mergekit_dam.coefficients import Figures, HeldOut
from mergekit_dam.config import Settings
from mergekit_dam.fit.processes import is_main
from mergekit_dam.fit.resume import keep, kept
from mergekit_dam.fit.verdict import mean_kl, warn_if_kept
from mergekit_dam.model import MergedModel

KEY = "held_out_kl_"  # and the source's number from 1, in the Trainer's logs


class Best:
    """The coefficients with the lowest mean held-out KL so far; a file keeps them for a fit that
    is resumed."""

    def __init__(self, merged: MergedModel, path: Path, *, resume: bool):
        self._trained, self._path = merged.trained_coefficients(), path
        self._kl, self._kept = float("inf"), {}
        if resume:
            self._restore()

    @property
    def is_known(self) -> bool:
        return bool(self._kept)

    def offer(self, figures: Sequence[Figures]) -> None:
        """Keep the present coefficients if they are the best."""
        if mean_kl(figures) >= self._kl:
            return
        self._kl = mean_kl(figures)
        self._kept = {name: c.detach().cpu().clone() for name, c in self._trained.items()}
        if is_main():
            keep(self._path, self._kept, kl=repr(self._kl))

    def take(self, end: Sequence[Figures]) -> bool:
        """Set the best coefficients, if those of the end, with their figures, are not."""
        if self._kl >= mean_kl(end):
            return False
        for name, value in self._kept.items():
            self._trained[name].data.copy_(value)
        return True

    def _restore(self) -> None:
        """Nothing where an interrupted fit has left nothing sound: it is found again."""
        found, metadata = kept(self._path, self._trained)
        with contextlib.suppress(KeyError, ValueError):
            if found.keys() == self._trained.keys():
                self._kl, self._kept = float(metadata["kl"]), found


class Watch(TrainerCallback):
    """Runs a trainer. With `dam.evaluate_every` it logs the held-out figures on the way, which the
    Trainer's checkpoints keep for a resumed fit, ends a fit that gets no better, and keeps the best
    coefficients."""

    def __init__(
        self,
        trainer: Trainer,
        settings: Settings,
        evaluate: Callable[[], Sequence[Figures]],
        best: Best,
    ):
        self._trainer, self._evaluate, self._best = trainer, evaluate, best
        self._every, self._patience = settings.evaluate_every, settings.patience
        self._start: Sequence[Figures] = ()

    def train(self, start: Sequence[Figures], checkpoint: str | None) -> None:
        """From a start with these figures, or on from a checkpoint."""
        self._start = start
        if self._every and checkpoint is None:
            self._best.offer(start)
        if checkpoint and self._had_ended(checkpoint):
            return
        if self._every:
            self._trainer.add_callback(self)
        self._trainer.train(resume_from_checkpoint=checkpoint)

    def end(self) -> Sequence[Figures]:
        """The figures of the coefficients that the fit ends with."""
        figures = self._evaluate()
        if self._best.take(figures):
            figures = self._evaluate()
        if self._every and is_main():
            warn_if_kept(self._start, figures)
        return figures

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            # Processes whose roundings differ must not differ over when to stop.
            (figures,) = broadcast_object_list([self._evaluate()])
            self._best.offer(figures)
            should_log = control.should_log
            self._trainer.log({f"{KEY}{n}": f.kl for n, f in enumerate(figures, 1)})
            control.should_log = should_log  # this step's loss is still to come
            if self._patience and self._is_stuck():
                control.should_training_stop = True

    def _is_stuck(self) -> bool:
        curve = [sum(point.kl) for point in watched(self._trainer)]
        return bool(curve) and len(curve) - 1 - curve.index(min(curve)) >= self._patience

    def _had_ended(self, checkpoint: str) -> bool:
        """Whether the fit was killed after its last step, or the one with which it stopped. All is
        then as it was there; the Trainer would make one step more."""
        earlier = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        before, self._trainer.state = self._trainer.state, earlier
        has_stopped = self._patience and self._best.is_known and self._is_stuck()
        if earlier.global_step < earlier.max_steps and not has_stopped:
            self._trainer.state = before
            return False
        self._trainer.model.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
        return True


def watched(trainer: Trainer) -> tuple[HeldOut, ...]:
    """What was logged so far, one point for each evaluation."""
    points = []
    for entry in trainer.state.log_history:
        found = {key: value for key, value in entry.items() if key.startswith(KEY)}
        if found:
            kl = tuple(found[f"{KEY}{number}"] for number in range(1, len(found) + 1))
            points.append(HeldOut(step=entry["step"], kl=kl))
    return tuple(points)
