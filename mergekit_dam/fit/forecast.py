"""What a fit will need, from the headers of the sources' files alone."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from mergekit_dam.config import Settings
from mergekit_dam.config.recipe import data_entries
from mergekit_dam.data import Row, SourceData
from mergekit_dam.fit import processes
from mergekit_dam.fit.device import choose_dtype
from mergekit_dam.fit.memory import Needs, chunk_of, frozen_parameters, needs
from mergekit_dam.fit.optimizer import memory as optimizer_memory
from mergekit_dam.fit.place import Place, groups_of, place
from mergekit_dam.fit.start import choose_start, foreseen_shapes, trained_tensors
from mergekit_dam.fit.workload import Group, Workload, with_an_empty_one, workload
from mergekit_dam.headers import HeaderShapes
from mergekit_dam.least_squares import StartNeeds, start_needs
from mergekit_dam.model import Skeleton, build_skeleton
from mergekit_dam.model.activations import Activations, measure
from mergekit_dam.model.logits import Logits, measure_head
from mergekit_dam.plan import Plan

CACHE = {"default_factory": dict, "init": False, "repr": False, "compare": False}


@dataclass(frozen=True)
class Forecast:
    """What a fit will need here."""

    numbers: dict[str, int]  # output tensor -> numbers that its coefficients have
    trained: int  # of these numbers
    dtype: torch.dtype  # of the forward pass
    sizes: dict[str, int]  # output tensor -> bytes that the fit holds for it
    held: int  # of all of them, and of sources that are models of their own, once more
    work: Workload
    needs: Needs  # of a step
    place: Place


def merged_skeleton(plan: Plan, shapes: HeaderShapes) -> Skeleton:
    """Raises DamError where the model cannot be built."""
    return build_skeleton(
        plan.model_config,
        set(shapes.names()),
        trust_remote_code=plan.options.trust_remote_code,
    )


@dataclass(frozen=True)
class Outline:
    """What a forecast is made from, whatever the settings."""

    plan: Plan
    shapes: HeaderShapes
    skeleton: Skeleton
    device: str
    data: Sequence[SourceData]  # of each source, where all were read
    # What was measured for other settings.
    _steps: dict[Hashable, dict[int, Activations]] = field(**CACHE)
    _heads: dict[Hashable, Logits] = field(**CACHE)
    _starts: dict[Hashable, StartNeeds] = field(**CACHE)

    def foresee(self, settings: Settings) -> Forecast:
        plan, shapes, skeleton = self.plan, self.shapes, self.skeleton
        coefficients = foreseen_shapes(settings, shapes, skeleton)
        numbers = {name: len(plan.sources) * prod(shape) for name, shape in coefficients.items()}
        names = trained_tensors(skeleton, settings)
        trained = {name: numbers[name] for name in names if name in numbers}
        count = sum(trained.values())
        dtype = choose_dtype(settings, shapes.dtypes(), self.device)
        is_cast = shapes.dtypes() != {dtype}
        sizes = held(shapes, settings, skeleton)
        work = foreseen_work(plan, settings, self.data)
        all_held = sum(sizes.values()) + own_models(plan, shapes)
        found = needs(
            plan.model_config,
            skeleton,
            dtype,
            work,
            self._of_step(work.lengths, dtype, trained),
            self._of_head(work, dtype, trained),
            settings.objective,
            device=self.device,
            is_cast=is_cast,
            shapes=coefficients,
            trained=trained,
            sources=len(plan.sources),
            optimizer=_of_optimizer(plan, settings, count),
        )
        where = place(
            settings,
            self.device,
            found,
            all_held,
            groups_of(skeleton, sizes),
            self._of_start(settings, dtype, names, trained),
            made=sum(held(shapes, settings, skeleton, only_made=True).values()),
            own=len(plan.models_of_their_own) / len(plan.sources),
            is_cast=is_cast,
        )
        return Forecast(numbers, count, dtype, sizes, all_held, work, found, where)

    def place(self, settings: Settings) -> Place:
        return self.foresee(settings).place

    def _of_step(
        self, lengths: Collection[int], dtype: torch.dtype, trained: Collection[str]
    ) -> Mapping[int, Activations]:
        """Of rows of each length, which is measured once for what is computed and trained so."""
        found = self._steps.setdefault((dtype, frozenset(trained)), {})
        if missing := set(lengths) - found.keys():
            found |= measure(
                self.plan.model_config, dtype, missing, frozen_parameters(self.skeleton, trained),
                trust_remote_code=self.plan.options.trust_remote_code, device=self.device,
            )  # fmt: skip
        return found

    def _of_head(self, work: Workload, dtype: torch.dtype, trained: Collection[str]) -> Logits:
        config = self.plan.model_config
        chunk = chunk_of(work, config.get_text_config().vocab_size)
        key = dtype, frozenset(trained), chunk
        if key not in self._heads:
            self._heads[key] = measure_head(
                config, dtype, chunk, frozen_parameters(self.skeleton, trained),
                trust_remote_code=self.plan.options.trust_remote_code,
            )  # fmt: skip
        return self._heads[key]

    def _of_start(
        self,
        settings: Settings,
        dtype: torch.dtype,
        names: Collection[str],
        trained: Mapping[str, int],
    ) -> StartNeeds | None:
        """Of one that solves; measured once for rows of the same lengths."""
        plan, sources = self.plan, len(self.plan.sources)
        if choose_start(settings, plan) != "least_squares":
            return None
        rows = start_rows(plan, settings, self.data)
        lengths = tuple(tuple(map(len, own)) for own in rows)
        places = max(trained.values(), default=0) // sources
        key = dtype, frozenset(names), lengths, places
        if key not in self._starts:
            self._starts[key] = start_needs(
                plan.model_config, self.skeleton, dtype, rows, names, sources, places,
                trust_remote_code=plan.options.trust_remote_code, device=self.device,
            )  # fmt: skip
        return self._starts[key]


def _of_optimizer(plan: Plan, settings: Settings, trained: int) -> tuple[int, int]:
    turns = settings.basis == "differences" and settings.formula == "weights"
    return optimizer_memory(trained, len(plan.sources), along_differences=turns)


def own_models(plan: Plan, shapes: HeaderShapes) -> int:
    """Bytes of the sources that the merge's skeleton cannot speak for: held once more, whole."""
    return sum(map(shapes.whole, plan.models_of_their_own))


def foreseen_work(plan: Plan, settings: Settings, data: Sequence[SourceData]) -> Workload:
    """Of all steps; where the rows were not read, or there are no steps, as if every pass had the
    longest."""
    train = _lengths(plan, settings, [own.train for own in data])
    if is_read(plan, data) and settings.max_steps:
        held_out = _lengths(plan, settings, [own.held_out for own in data])
        alone = max(length for own in (*train, *held_out) for length in own)
        return workload(train, settings, processes.count(), alone=alone)
    together = Group(max(map(max, train)), tuple(settings.batch_size * max(o) for o in train))
    passes = max(settings.max_steps, 0) * settings.accumulation
    return Workload(
        candidates=(tuple(with_an_empty_one([together])),),
        rows=settings.batch_size * len(train),
        alone=together.length,
        widest=max(together.tokens),
        steps=max(settings.max_steps, 0),
        passes=passes,
        tokens=passes * sum(together.tokens),
        together=frozenset([sum(together.tokens)]),
        taught=frozenset(together.tokens),
    )


def is_read(plan: Plan, data: Sequence[SourceData]) -> bool:
    return len(data) == len(plan.teachers)


def _lengths(plan: Plan, settings: Settings, rows: Sequence[Sequence[Row]]) -> list[list[int]]:
    """Of each source's rows, or of one that is as long as settings and model let it be."""
    entries = data_entries(settings, plan.teachers)
    own = [entries[source].max_length if source in entries else None for source in plan.teachers]
    limits = [length or settings.max_length for length in own]
    if len(rows) == len(limits):
        return [[min(len(r), most) for r in o] for o, most in zip(rows, limits, strict=True)]
    positions = getattr(plan.model_config.get_text_config(), "max_position_embeddings", None)
    return [[min(most, positions or most)] for most in limits]


def start_rows(plan: Plan, settings: Settings, data: Sequence[SourceData]) -> list[list[Row]]:
    """Of each source, those that the least-squares start reads, or as many of the longest."""
    count = settings.calibration_rows
    rows = [own.train[:count] for own in data]
    lengths = _lengths(plan, settings, rows)
    if not is_read(plan, data):
        return [[Row([0] * length)] * count for (length,) in lengths]
    return [
        [Row(row.ids[:length]) for row, length in zip(*both, strict=True)]
        for both in zip(rows, lengths, strict=True)
    ]


def held(
    shapes: HeaderShapes, settings: Settings, skeleton: Skeleton, *, only_made: bool = False
) -> dict[str, int]:
    """Output tensor -> bytes that a fit holds for it; `only_made`: that no file holds as well."""
    return shapes.bytes(
        {name: role.shape for name, role in skeleton.roles.items()},
        base=settings.formula == "task_vectors",
        prepared=settings.sparsify != "task_arithmetic",
        only_made=only_made,
    )
