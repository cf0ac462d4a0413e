"""What the fit minimises: distillation terms over each source's own rows, and the terms on the
coefficients (arXiv 2410.08371, section 3.2)."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mergekit_dam import losses
from mergekit_dam.config.settings import COMPARISONS, Objective
from mergekit_dam.fit.batches import groups
from mergekit_dam.fit.chunks import ChunkedLoss, Section
from mergekit_dam.formula import alignment
from mergekit_dam.model import Head, MergedModel, Mixture, NotMixedError, View

LOSSES = {name: getattr(losses, name) for name in COMPARISONS}

# Source, input_ids, lengths and starts of some of its rows -> its states, as `row_states` has them;
# None: they are to be computed.
Teach = Callable[[int, Tensor, Tensor, Tensor], list[Tensor] | None]


class Distillation(nn.Module):
    """Loss of a step. Its parameters are the merged model's coefficients, and no others."""

    def __init__(
        self,
        merged: MergedModel,
        objective: Objective,
        known_tokens: Sequence[Tensor | None] = (),  # for each source, see `Plan.known_tokens`
        teach: Teach | None = None,  # default: the sources' own models, now
    ):
        super().__init__()
        self._teach = teach
        self.merged = merged
        self._known = dict(enumerate(known_tokens))
        self._objective = objective
        weights = {name: getattr(objective, name) for name in COMPARISONS}
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._interference = interference(merged) if objective.weighted_overlap else None

    def forward(
        self, input_ids: Tensor, lengths: Tensor, starts: Tensor, sources: Tensor
    ) -> dict[str, Tensor]:
        """`loss`, and each of its terms unweighted; terms of one source end in its number.

        All sources' rows go through the merged model together; each source teaches on its own
        rows alone. The loss is the sum over the sources of a mean over their tokens, so that a
        batch of copies has the loss of one.
        """
        loss, terms = self._regularise()
        counts = _shared((lengths - 1 - starts).clamp_min(0), sources)
        owners = sources.tolist()
        own = {
            source: [r for r, owner in enumerate(owners) if owner == source] for source in counts
        }
        student, taught = self._states(own, input_ids, lengths, starts)
        heads = _Heads(self.merged)
        sections = [
            self._section(
                heads, source, counts[source], [student[r] for r in rows], torch.cat(taught[source])
            )
            for source, rows in own.items()
        ]
        if sections:
            distil = ChunkedLoss(self.merged.head(), self.merged.vocabulary, self._weights)
            distilled, found = distil(sections)
            loss = loss + distilled
            for source, of_source in zip(own, found, strict=True):
                terms |= {f"{name}_{source + 1}": term for name, term in of_source.items()}
        return {"loss": loss, **terms}

    def _states(
        self, own: Mapping[int, list[int]], *inputs: Tensor
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Those of the merge for all rows, and those of each source for its `own`."""
        taught = {
            source: self._teach and self._teach(source, *(part[rows] for part in inputs))
            for source, rows in own.items()
        }
        live = {source: own[source] for source, states in taught.items() if states is None}
        with contextlib.suppress(NotMixedError):
            student, found = self._live(live, *inputs)
            return student, {**taught, **found}
        # Out here, where nothing holds the pass that has failed: from now on source by source.
        student, found = self._live(live, *inputs)
        return student, {**taught, **found}

    def _live(
        self, own: Mapping[int, list[int]], *inputs: Tensor
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """`_states`, of the sources whose states are not kept."""
        every = None, range(len(inputs[0]))
        if len(own) < 2 or not self.merged.mixes():
            student, *found = row_states(self.merged, *inputs, [every, *own.items()])
            return student, dict(zip(own, found, strict=True))
        owners = Owners(source for source, rows in own.items() for _ in rows)
        together = owners, [row for rows in own.values() for row in rows]
        student, found = row_states(self.merged, *inputs, [every, together])
        rest = iter(found)
        return student, {source: list(itertools.islice(rest, len(own[source]))) for source in own}

    def _section(
        self,
        heads: "_Heads",
        source: int,
        count: float,  # of its tokens, over all processes
        student: Sequence[Tensor],  # the merge's states, and the source's [tokens, width]
        teacher: Tensor,
    ) -> Section:
        """Terms are sums over tokens, divided by `count`."""

        def teach(some: slice) -> Tensor:
            with torch.no_grad():
                return heads.of(source)(teacher[some])

        def compare(student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
            share, temperature = len(student) / count, self._objective.temperature
            student, teacher = among((student, teacher), self._known.get(source))
            return {
                name: share * LOSSES[name](student, teacher, temperature) for name in self._weights
            }

        return Section(student, teach, compare)

    def _regularise(self) -> tuple[Tensor, dict[str, Tensor]]:
        trained = self.merged.regularised()
        loss, terms = torch.zeros((), device=self.merged.device), {}
        for name in ("similarity", "l1", "l2", "overlap", "weighted_overlap"):
            if weight := getattr(self._objective, name):
                if name == "weighted_overlap":
                    term = losses.overlap(trained, self._interference)
                else:
                    term = getattr(losses, name)(trained)
                loss = loss + weight * term
                terms[name] = term.detach()
        return loss, terms


class _Heads:
    """The sources' heads, of which one is there at a time: it may be a copy, in another dtype."""

    def __init__(self, merged: MergedModel):
        self._merged, self._source, self._head = merged, None, None

    def of(self, source: int) -> Head:
        if source != self._source:
            self._head = None  # goes before the next comes
            self._source, self._head = source, self._merged.head(source)
        return self._head


def among(logits: Sequence[Tensor], known: Tensor | None) -> Sequence[Tensor]:
    """Logits [tokens, vocabulary] over the tokens that a source knows: one that it lacks takes no
    part in that source's loss."""
    if known is None:
        return logits
    return [part[:, known.to(part.device)] for part in logits]


class Owners(tuple[int, ...]):
    """The source of each of some rows, where each is to be seen as its own has it."""


def row_states(
    merged: MergedModel,
    input_ids: Tensor,  # [rows, longest]
    lengths: Tensor,  # [rows]
    starts: Tensor,  # [rows]
    views: Sequence[tuple[View | Owners | None, Sequence[int]]],  # each with the rows that it sees
) -> list[list[Tensor]]:
    """For each view, for each of its rows [tokens, width], of the positions that count: those from
    a row's start whose next token is real. Padding, a row's end and what predicts its prompt do
    not."""
    ends, starts = lengths.tolist(), starts.tolist()
    passes = [
        (number, *own)
        for number, (view, rows) in enumerate(views)
        for own in _passes(view, rows, ends)
    ]
    found = merged.all_states(
        [(input_ids[rows, : max(ends[row] for row in rows)], view) for _, view, rows in passes]
    )
    states = {
        (number, row): own[starts[row] : ends[row] - 1]
        for (number, _, rows), together in zip(passes, found, strict=True)
        for row, own in zip(rows, together, strict=True)
    }
    return [[states[number, row] for row in rows] for number, (_, rows) in enumerate(views)]


def _passes(
    view: View | Owners | None, rows: Sequence[int], ends: Sequence[int]
) -> Iterator[tuple[View | None, list[int]]]:
    """What each pass of a view sees, and its rows in its order."""
    for together in groups([ends[row] for row in rows]):
        if not isinstance(view, Owners):
            yield view, [rows[index] for index in together]
            continue
        together = sorted(together, key=view.__getitem__)
        length = max(ends[rows[index]] for index in together)
        mixture = Mixture(tuple(view[index] for index in together), length)
        is_one = len(mixture.counts) == 1
        yield mixture.owners[0] if is_one else mixture, [rows[index] for index in together]


def _shared(tokens: Tensor, sources: Tensor) -> dict[int, float]:
    """For each source its number of tokens [rows] in this step: over several processes, whose
    gradients are averaged, the mean of theirs."""
    counts = torch.zeros(int(sources.max()) + 1, device=sources.device)
    counts.index_add_(0, sources, tokens.float())
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
        counts /= torch.distributed.get_world_size()
    return {source: count for source, count in enumerate(counts.tolist()) if count}


@torch.no_grad()
def interference(merged: MergedModel) -> list[Tensor]:
    """For each trained tensor [pairs, *B]: sin²(2θ), θ being the angle between D_i and D_j.

    Nothing for parts that are parallel or orthogonal, most for 45 degrees, as in the published
    `weighted_overlap`.
    """
    result = []
    for name, c in merged.trained_coefficients().items():
        stack = merged.stack(name)
        parts, base = stack.parts
        cosines = [
            alignment(first, second, base, c.shape[1:])
            for first, second in itertools.combinations(parts[: stack.teachers], 2)
        ]
        squares = torch.stack(cosines).square() if cosines else c.new_zeros(0, *c.shape[1:])
        result.append(4 * squares * (1 - squares))
    return result
