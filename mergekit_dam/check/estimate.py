"""What a fit will need, from the plan and the headers alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from mergekit_dam.check.parameters import is_idle
from mergekit_dam.check.speed import Speed, duration, measure_speed
from mergekit_dam.config.settings import Settings
from mergekit_dam.fit.batches import StepRows
from mergekit_dam.fit.forecast import Forecast, Outline, is_read
from mergekit_dam.fit.memory import size
from mergekit_dam.fit.place import Place, lack
from mergekit_dam.fit.resume import folder_of, states_of
from mergekit_dam.fit.start import choose_start, trained_tensors
from mergekit_dam.fit.teachers import bytes_of, rows_of_a_fit
from mergekit_dam.fit.trainer import KEPT
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.model import Recompute, Skeleton
from mergekit_dam.places import free_disk
from mergekit_dam.plan import Plan


@dataclass(frozen=True)
class Estimate:
    """What a merge needs; bytes."""

    sources: int  # that teach
    has_base: bool  # whether the base has coefficients, too
    output_tensors: int
    trained_tensors: int
    held_twice: tuple[str, ...]  # which sources are, and why
    unreached_tensors: int  # in the file and the merge, but no text reaches them
    coefficients: int  # numbers in the file
    trained: int  # of them trained
    weights: int  # of all sources together
    tokens: int  # that a step computes together, at most
    step: dict[str, int]  # `recompute` -> what a step takes beside the sources
    seconds: float  # for so many tokens; 0 where too little memory is free to time anything
    fit_seconds: float  # of all steps; 0 where it is unknown how many
    file: int
    checkpoints: int
    states: int  # of the sources on their rows, where they are kept
    room: int  # on the disk
    place: Place
    lack: str | None  # of what is here

    def __str__(self) -> str:
        steps = ", ".join(f"{size(b)} (recompute: {mode})" for mode, b in self.step.items())
        start = f"; the start {size(self.place.start)}" if self.place.start else ""
        states = f", states of the sources {size(self.states)}" if self.states else ""
        whole = f", {duration(self.fit_seconds)} for all steps" if self.fit_seconds else ""
        lines = [
            f"{self.sources} sources{' and the base' if self.has_base else ''}, "
            f"{self.output_tensors} output tensors, "
            f"{self.trained_tensors} of them with trained coefficients",
            *self.held_twice,
            f"{self.unreached_tensors} output tensors keep their start, since no text reaches them"
            if self.unreached_tensors
            else None,
            f"{self.coefficients:,} coefficients, {self.trained:,} of them trained",
            f"memory: weights {size(self.weights)}; a step of at most {self.tokens:,} tokens "
            f"{steps}{start}",
            f"time: about {duration(self.seconds)} for so many tokens{whole}"
            if self.seconds
            else None,
            str(self.place),
            f"disk: coefficient file {size(self.file)}, checkpoints {size(self.checkpoints)}"
            f"{states}",
            self._lacking_disk,
            self.lack,
        ]
        return "\n".join(filter(None, lines))

    @property
    def _lacking_disk(self) -> str:
        needed = self.file + self.checkpoints + self.states
        if needed <= self.room:
            return ""
        live = ", or set `dam.teacher: live`" if self.states else ""
        return (
            f"The fit's files need about {size(needed)} of the disk, which has room for "
            f"{size(self.room)}: make more{live}."
        )


def estimate(outline: Outline, settings: Settings, out: str) -> Estimate:
    """Of a fit that writes the file `out`."""
    plan, skeleton, found = outline.plan, outline.skeleton, outline.foresee(settings)
    width, dtype = plan.model_config.get_text_config().hidden_size, found.dtype
    speed = _speed(found, settings, width, len(plan.sources))
    sees_all = settings.teacher == "cached" and is_read(plan, outline.data)
    rows = rows_of_a_fit(StepRows(outline.data), settings, 1) if sees_all else []
    has_steps = settings.max_steps != 0
    coefficients = sum(found.numbers.values())
    return Estimate(
        sources=len(plan.teachers),
        has_base=plan.has_base,
        output_tensors=len(found.numbers),
        trained_tensors=len(trained_tensors(skeleton, settings)),
        held_twice=tuple(_held_twice(plan, settings)),
        unreached_tensors=len(found.numbers.keys() - skeleton.roles.keys()),
        coefficients=coefficients,
        trained=found.trained,
        weights=sum(found.sizes.values()),
        tokens=found.needs.tokens,
        step={mode: found.needs.with_code(mode) for mode in get_args(Recompute)},
        seconds=speed.seconds(1, found.needs.tokens) if speed else 0,
        fit_seconds=speed.seconds(found.work.passes, found.work.tokens) if speed else 0,
        file=4 * coefficients,
        checkpoints=_checkpoints(settings, plan, found),
        states=bytes_of(rows, width, dtype) * has_steps,
        room=_room(out),
        place=found.place,
        lack=lack(found.place, settings, outline.place),
    )


def _speed(found: Forecast, settings: Settings, width: int, sources: int) -> Speed | None:
    """None on a device that has no room for what is timed."""
    parameters, is_live = found.needs.parameters, settings.teacher == "live"
    try:
        return measure_speed(
            parameters, width, sources, found.dtype, found.place, held=found.held, is_live=is_live
        )
    except RuntimeError:  # torch's, of memory; what the fit lacks is told anyway
        return None


def _checkpoints(settings: Settings, plan: Plan, found: Forecast) -> int:
    """Bytes at most at once: the oldest goes when the next is whole. In each are all coefficients,
    and of those that are trained two moments, two thirds of an optimiser; beside them those of the
    start, and the best so far."""
    coefficients = 4 * sum(found.numbers.values())
    each = coefficients + 2 * found.needs.optimizer // 3
    count = min(KEPT + 1, math.ceil(found.work.steps / settings.checkpoint_every))
    if settings.max_steps < 0 and not found.work.steps:  # of rows that are yet to be written
        count = KEPT + 1
    beside = coefficients * (choose_start(settings, plan) == "least_squares")
    return count * each + beside + 4 * found.trained * bool(settings.evaluate_every)


def _room(out: str) -> int:
    """Bytes that a fit may take of a disk: those that are free, and those that it has already."""
    folder = folder_of(out)
    files = (path for own in (folder, states_of(folder)) for path in own.rglob("*"))
    return free_disk(folder) + sum(path.stat().st_size for path in files if path.is_file())


def _held_twice(plan: Plan, settings: Settings) -> Iterator[str]:
    """Of each source that is a model of its own beside the merge: why; and what follows."""
    others = plan.models_of_their_own
    for source in others:
        reason = "its layers are not those of the merge"
        if keys := ", ".join(plan.differing_keys(source)[:3]):
            reason = f"its config.json differs from the merge's in {keys}"
        yield f"{source} is held twice, within the merge and as a model of its own: {reason}"
    if others and settings.start is None and choose_start(settings, plan) == "average":
        yield "so the fit starts from the average: least squares compares layer with layer"


def misfits(settings: Settings, shapes: HeaderShapes, skeleton: Skeleton) -> Iterator[str]:
    """What the merged model needs and the sources, which agree with each other, do not give."""
    for name, role in skeleton.roles.items():
        shape = shapes.shape(name)
        if shape is not None and shape != role.shape:
            yield (
                f"{name} has shape {list(shape)} in the sources, but config.json of the merge "
                f"makes it {list(role.shape)}: choose the `base_model` whose config fits"
            )
            break
    for rule in settings.granularity if not isinstance(settings.granularity, str) else ():
        if is_idle(rule.filter, shapes.names()):
            yield f"`dam.granularity`: no tensor's name has {rule.filter!r} in it"
    if settings.max_steps and not any(
        getattr(settings.train, role.kind) for role in skeleton.roles.values()
    ):
        yield "`dam.train` leaves no tensor of this model to train: switch a kind on"
