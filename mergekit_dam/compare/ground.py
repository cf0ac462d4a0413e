"""The ground on which all merges are measured: the same rows, the same teachers, one model.

The rows that the tables count were seen by no fit and no search. A fit gets the others, and holds
out some of those for itself; a search gets a sample of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mergekit_dam import losses
from mergekit_dam.compare.answers import Answer, exact_matches
from mergekit_dam.compare.cost import metered
from mergekit_dam.compare.records import Cost, Scores
from mergekit_dam.config import Recipe
from mergekit_dam.data import Row, SourceData, together
from mergekit_dam.fit.batches import batch
from mergekit_dam.fit.device import choose_dtype
from mergekit_dam.fit.evaluate import perplexity
from mergekit_dam.fit.objective import among
from mergekit_dam.fit.prepare import own_model, own_models, skeleton_of
from mergekit_dam.model import MergedModel, SourceWeights
from mergekit_dam.plan import Plan

SHARE_FOR_FITS = 0.05  # of a fit's rows, which it holds out for itself
BATCH_ELEMENTS = 2**24  # logits of a batch: 64 MB in float32
BATCH_TOKENS = 2**12
KEPT_ELEMENTS = 2**28  # teachers' logits that are kept: 1 GB in float32; others are made again

Student = Callable[[], AbstractContextManager[MergedModel]]


def rows_of_fits(data: Sequence[SourceData]) -> list[SourceData]:
    """What a fit sees: nothing of the held-out rows here, and held-out rows of its own."""
    divided = []
    for source in data:
        count = max(1, round(SHARE_FOR_FITS * len(source.train)))
        divided.append(SourceData(train=source.train[count:], held_out=source.train[:count]))
    return divided


@dataclass
class Exam:
    """Rows of one source, on which students are compared with it."""

    source: int
    batches: list[dict[str, Tensor]]
    known: Tensor | None  # the tokens that the source knows
    answers: list[Answer]
    kept: dict[int, Tensor]  # the teacher's logits [tokens, vocabulary] of some batches


class Ground:
    """Holds no merge; scores what it is given. Weights stay on the CPU and go to the device a
    block at a time."""

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
        self._room = KEPT_ELEMENTS
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
        return lambda: self._merged.speaking_as(number)

    def base(self) -> Student:
        model = own_model(self.plan.base, self._recipe, self.plan, self._dtype, "cpu")
        model = model.to(self.device)
        return lambda: model.speaking_as(0)

    def merge(self, tensors: Mapping[str, Tensor]) -> Student:
        return lambda: self._merged.speaking_as(tensors)

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

    def _exam(self, source: int, rows: Sequence[Row], answers: list[Answer]) -> Exam:
        known = self.plan.known_tokens(self.plan.sources[source])
        vocabulary = self.plan.model_config.get_text_config().vocab_size
        exam = Exam(
            source, list(_batches(rows, source, vocabulary, self.device)), known, answers, {}
        )
        for number, inputs in enumerate(exam.batches):
            size = int(inputs["lengths"].sum()) * vocabulary
            if size <= self._room:
                self._room -= size
                exam.kept[number] = self._teach(exam, inputs)
        return exam

    @torch.no_grad()
    def _teach(self, exam: Exam, inputs: dict[str, Tensor]) -> Tensor:
        return self._merged.teach(exam.source, inputs["input_ids"])[_counted(inputs, exam.known)]

    def _scores(self, student: Student, exam: Exam) -> Scores:
        tokens, kl, nll, agreeing = self._figures(student, exam)
        exact = None
        if exam.answers:
            with student() as model:
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
        tokens, kl, nll, agreeing = 0, 0.0, 0.0, 0.0
        for number, inputs in enumerate(exam.batches):
            mask = _counted(inputs, exam.known)
            with student() as model:
                logits = model(inputs["input_ids"])[mask]
            teacher = exam.kept.get(number)
            teacher = self._teach(exam, inputs) if teacher is None else teacher
            logits, teacher = among((logits, teacher), exam.known)
            targets = inputs["input_ids"].roll(-1, dims=1)[mask]
            if exam.known is not None:
                targets = torch.searchsorted(exam.known.to(targets.device), targets)
            count = len(targets)
            if count:
                tokens += count
                kl += losses.kl(logits, teacher).item() * count
                nll += F.cross_entropy(logits.float(), targets).item() * count
                agreeing += (logits.argmax(-1) == teacher.argmax(-1)).sum().item()
        total = max(tokens, 1)  # none where the source lacks every target
        return tokens, kl / total, nll / total, agreeing / total


def layers(plan: Plan) -> int:
    return plan.model_config.get_text_config().num_hidden_layers


def _counted(inputs: dict[str, Tensor], known: Tensor | None) -> Tensor:  # [rows, longest]
    """Positions that count in their row, and whose next token is known to the source."""
    input_ids = inputs["input_ids"]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    mask = (positions >= inputs["starts"][:, None]) & (positions < inputs["lengths"][:, None] - 1)
    if known is not None:
        mask = mask & torch.isin(input_ids.roll(-1, dims=1), known.to(input_ids.device))
    return mask


def _batches(
    rows: Sequence[Row], source: int, vocabulary: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Rows of similar length together, as many as a batch of logits has room for."""
    for some in together(rows, min(BATCH_TOKENS, BATCH_ELEMENTS // vocabulary)):
        yield {k: v.to(device) for k, v in batch(some, [source] * len(some)).items()}
