"""The ground on which all merges are measured: the same rows, the same teachers, one model.

The rows that the tables count were seen by no fit and no search. A fit gets the others, and holds
out some of those for itself; a search gets a sample of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.compare.answers import Answer, exact_matches
from mergekit_dam.compare.cost import metered
from mergekit_dam.compare.records import Cost, Scores
from mergekit_dam.config import Recipe
from mergekit_dam.data import Row, SourceData, others, together
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.device import choose_dtype
from mergekit_dam.fit.evaluate import next_tokens, perplexity, sums
from mergekit_dam.fit.memory import free_memory
from mergekit_dam.fit.objective import row_states
from mergekit_dam.fit.prepare import own_model, own_models, skeleton_of
from mergekit_dam.model import Head, MergedModel, SourceWeights, View
from mergekit_dam.plan import Plan

SHARE_FOR_FITS = 0.05  # of a fit's rows, which it holds out for itself
TOKENS = 2**12  # that go through a model at once
LOGITS = 2**24  # the same, of a model that has no states beside its logits
KEPT = 2**32  # bytes of teachers' states that are kept in host memory; others are made again
HELD = 0.5  # of what is free on the device, for the weights of a student or of a teacher


def rows_of_fits(data: Sequence[SourceData]) -> list[SourceData]:
    """What a fit sees: nothing of the held-out rows here, and held-out rows of its own."""
    divided = []
    for source in data:
        count = max(1, round(SHARE_FOR_FITS * len(source.train)))
        held_out = source.train[:count]
        divided.append(SourceData(others(source.train[count:], held_out), held_out))
    return divided


@dataclass(frozen=True)
class Student:
    """What is measured: whatever a model computes with the weights of one view."""

    model: MergedModel
    view: View

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """[tokens, width], of the positions that count: see `row_states`."""
        ids, ends, starts = (inputs[key] for key in ("input_ids", "lengths", "starts"))
        return torch.cat(*row_states(self.model, ids, ends, starts, [(self.view, range(len(ids)))]))

    def head(self) -> Head:
        return self.model.head(self.view)


@dataclass
class Exam:
    """Rows of one source, on which students are compared with it."""

    source: int
    batches: list[dict[str, Tensor]]
    known: Tensor | None  # the tokens that the source knows
    answers: list[Answer]
    kept: dict[int, Tensor]  # the teacher's states [tokens, width] of some batches


class Ground:
    """Holds no merge; scores what it is given. Weights go to the device as a whole where they fit
    there, else a block at a time."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        data: Sequence[SourceData],
        answers: Sequence[list[Answer]],
        *,
        device: str,
        search_rows: int,
    ):
        self.plan, self.device = plan, device
        self._recipe = recipe
        weights = SourceWeights(plan, needs_base=False)
        self._dtype = choose_dtype(recipe.settings, weights.dtypes(), device)
        skeleton = skeleton_of(plan, weights, self._dtype)
        own = own_models(recipe, plan, self._dtype, "cpu")
        self._merged = MergedModel(skeleton, weights, {}, set(), self._dtype, own).to(device)
        self._room = KEPT
        self._held_out = [
            self._exam(number, source.held_out, answers[number])
            for number, source in enumerate(data)
        ]
        with metered(self.layers, device) as meter:
            self._search = [
                self._exam(number, source.train[:search_rows], [])
                for number, source in enumerate(data)
            ]
        self.cost_of_search: Cost = meter.cost  # the teachers' part, which every search needs

    @property
    def layers(self) -> int:
        return layers(self.plan)

    def source(self, number: int) -> Student:
        return self._student(self._merged, number)

    def base(self) -> Student:
        model = own_model(self.plan.base, self._recipe, self.plan, self._dtype, "cpu")
        return self._student(model.to(self.device), 0)

    def merge(self, tensors: Mapping[str, Tensor]) -> Student:
        return self._student(self._merged, tensors)

    @torch.no_grad()
    def score(self, student: Student) -> tuple[Scores, ...]:
        """On each source's held-out rows."""
        return tuple(self._scores(student, exam) for exam in self._held_out)

    @torch.no_grad()
    def search_kl(self, student: Student) -> float:
        """Mean over the sources, on fit rows; infinite for a merge that gives no numbers."""
        kls = [self._figures(student, exam)[1] for exam in self._search]
        mean = sum(kls) / len(kls)
        return mean if math.isfinite(mean) else math.inf

    def _student(self, model: MergedModel, view: View) -> Student:
        model, view = model.speaker(view)
        size = model.model.num_parameters() * self._dtype.itemsize
        is_held = size <= HELD * free_memory(self.device)
        return Student(model, model.all_weights(view) if is_held else view)

    @torch.no_grad()
    def _exam(self, source: int, rows: Sequence[Row], answers: list[Answer]) -> Exam:
        known, teacher = self.plan.known_tokens(self.plan.sources[source]), self.source(source)
        is_split = self._merged.has_head(source)
        size = TOKENS if is_split else LOGITS // self._merged.vocabulary
        exam = Exam(source, list(_batches(rows, source, size, self.device)), known, answers, {})
        for number, inputs in enumerate(exam.batches):
            if self._room <= 0:
                break
            exam.kept[number] = teacher.states(inputs).cpu()
            self._room -= exam.kept[number].nbytes
        return exam

    def _scores(self, student: Student, exam: Exam) -> Scores:
        tokens, kl, nll, agreeing = self._figures(student, exam)
        exact = None
        if exam.answers:
            with student.model.speaking_as(student.view) as model:
                exact = exact_matches(model, exam.answers, self.plan.tokenizer)
        return Scores(
            tokens=tokens,
            kl=kl,
            perplexity=perplexity(nll),
            agreement=agreeing,
            answers=len(exam.answers),
            exact=exact,
        )

    def _figures(self, student: Student, exam: Exam) -> tuple[int, float, float, float]:
        """(tokens, KL, negative log-likelihood, agreement), means over the tokens."""
        tokens, totals = 0, torch.zeros(4, dtype=torch.float64)
        heads = student.head(), self._merged.head(exam.source)
        # Held where it has to speak again, and no longer than for this.
        teacher = self.source(exam.source) if len(exam.kept) < len(exam.batches) else None
        for number, inputs in enumerate(exam.batches):
            own, kept = student.states(inputs), exam.kept.get(number)
            wanted = teacher.states(inputs) if kept is None else kept.to(own.device)
            targets = torch.cat(next_tokens(inputs))
            vocabulary = self._merged.vocabulary
            count, found = sums(heads, own, wanted, targets, exam.known, vocabulary)
            tokens, totals = tokens + count, totals + found
        # No tokens where the source lacks every target.
        kl, nll, _, agreeing = (totals / max(tokens, 1)).tolist()
        return tokens, kl, nll, agreeing


def layers(plan: Plan) -> int:
    return plan.model_config.get_text_config().num_hidden_layers


def _batches(
    rows: Sequence[Row], source: int, tokens: int, device: str
) -> Iterator[dict[str, Tensor]]:
    for some in together(rows, tokens):
        yield {k: v.to(device) for k, v in batch(some, [source] * len(some)).items()}
