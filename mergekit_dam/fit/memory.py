"""What a step of a fit keeps in memory, beside the sources."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig

from mergekit_dam.config.settings import Objective
from mergekit_dam.fit import chunks
from mergekit_dam.fit.container import memory_left
from mergekit_dam.fit.workload import Workload
from mergekit_dam.formula import at_once
from mergekit_dam.model import Recompute, Skeleton
from mergekit_dam.model.activations import Activations
from mergekit_dam.model.logits import Logits
from mergekit_dam.model.lookup import is_shared
from mergekit_dam.model.mixture import serves
from mergekit_dam.products import kept_code

PATHS = 2  # of a row that is evaluated: the merge's and the source's
KEPT = 2  # of what a block is given, in each: its own, and what the first was given
# Of the logits, in float32, for each term: at most, and until it is differentiated. For `kl` the
# log-probabilities of merge and source, and their distance and two steps of its gradient.
COPIES = {"kl": (5, 2), "reverse_kl": (5, 2), "jsd": (7, 3), "mse": (1, 0), "entropy": (3, 1)}


@dataclass(frozen=True)
class Rows:
    """Of about the same length, that are computed together."""

    tokens: int  # of all of them
    kept: Activations  # for each token


@dataclass(frozen=True)
class Needs:
    """Of a step, in bytes, without the sources. Which tensors live at a peak was found by listing
    them (docs/performance.md)."""

    tokens: int  # of all sources' rows
    rows: int  # of a step
    groups: tuple[Rows, ...]  # in which these are computed, the longest first
    widest: int  # tokens of one source's rows
    states: int  # the final hidden states of the tokens
    blocks: int  # the merged weights of all blocks but embeddings and head
    block: int  # of the largest of them
    gradients: int  # of that, those that are trained
    matrix: int  # the largest of these
    table: int = 0  # of an embedding, the rows that are looked up, and what is made for them
    head: int = 0  # the head's merged weights, and a source's where they are a copy
    losses: int = 0  # of a chunk of tokens, from the logits to their gradients and the head's
    coefficients: int = 0  # their gradients, and their products in the terms that compare them
    optimizer: int = 0  # coefficients with their moments
    known: int = 0  # of pairs of sources, for `weighted_overlap`
    last: int = 0  # at the end of backward, on coefficients alone; or in the optimiser's step
    taught: float = 0  # of a teacher's block
    alone: float = 0  # while a row is evaluated alone
    piece: int = 0  # of a weight whose gradient is reduced, what is made of it at a time
    cast: int = 0  # a source's block, where it is a copy in another dtype
    code: int = 0  # that a library makes for products of these shapes, and keeps
    parameters: int = 0  # how many numbers the matrices of all blocks and the head have

    def with_code(self, recompute: Recompute) -> int:
        """The peak, and what is kept beside tensors."""
        return self.of(recompute) + self.code

    def of(self, recompute: Recompute) -> int:
        """The peak of all tensors: in a teacher's block, while the head's losses are computed,
        gradients of a block's weights, those of an embedding, which come last, the optimiser's
        step, or in a block when a long row is evaluated."""
        is_again = recompute == "block"
        kept = self._sum("inputs" if is_again else "all")
        held = self.blocks if recompute == "none" else 0
        later = self._sum("later") if is_again else 0
        at_head = self.head + self.losses + 3 * self.states + later
        passing = max(self.cast + self.taught, at_head, *self._in_a_block(recompute))
        step = kept + held + self.coefficients + passing
        always = self.optimizer + self.known
        return int(always + max(step, self.coefficients + self.table, self.last, self.alone))

    def _sum(self, name: str) -> float:
        return sum(rows.tokens * getattr(rows.kept, name) for rows in self.groups)

    def _in_a_block(self, recompute: Recompute) -> Iterator[float]:
        """While its gradients are computed, those of the shortest rows first: activations go as
        they are differentiated, and weights go with the last of their gradients."""
        is_again = recompute == "block"
        there = self._sum("passed") + self._sum("largest") * is_again
        there += self.block if recompute != "none" else 0
        waiting = 0  # gradients of weights, for those of longer rows
        for rows in reversed(self.groups):
            kept = rows.kept  # what is made again is counted as it is differentiated
            beside = rows.tokens * (
                (kept.most - kept.largest if is_again else kept.passing) - kept.passed
            )
            yield there + waiting + self._with_the_largest(beside, recompute)
            there, waiting = there - rows.tokens * kept.largest, self.gradients
        if recompute == "weights":  # made again, they stay until all their gradients are there
            yield there + self.gradients + max(self.piece, beside)
        else:  # they are gone; gradients are reduced in parts
            yield there - self.block + self.gradients + self.piece

    def _with_the_largest(self, beside: float, recompute: Recompute) -> float:
        """With the gradient of the largest weight, too. When that comes, about half of what else is
        made is there; when all of that is, the weight has gone, unless all stay."""
        if recompute == "weights":
            return self.matrix + beside
        return max(beside, self.matrix + beside / 2)


def needs(
    config: PretrainedConfig,
    skeleton: Skeleton,
    dtype: torch.dtype,
    work: Workload,
    kept: Mapping[int, Activations],  # of rows of each of its lengths
    logits: Logits,  # of a chunk of them, see `chunk_of`
    objective: Objective,
    *,
    device: str,
    is_cast: bool,  # the passes are in another dtype than the sources
    shapes: Mapping[str, Sequence[int]],  # output tensor -> [*B], of its coefficients
    trained: Mapping[str, int],  # output tensor -> how many coefficients it has, of all sources
    sources: int,  # which have coefficients
    optimizer: tuple[int, int],  # see `optimizer.memory`
) -> Needs:
    model = skeleton.model  # what its ends take, the losses between them take more
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    inner = {p: b for p, b in skeleton.read_blocks() if not any(b is end for end in ends)}
    names = {path: skeleton.tensors.get(f"{path}.weight") for path in inner}
    tables = {p: b for p, b in inner.items() if isinstance(b, nn.Embedding) and names[p]}
    own = {path: block for path, block in inner.items() if path not in tables}
    sizes = {p: sum(parameter.numel() for parameter in b.parameters()) for p, b in own.items()}
    most, frozen = max(sizes, key=sizes.__getitem__), frozen_parameters(skeleton, trained)
    with_gradients = [
        parameter.numel()
        for name, parameter in own[most].named_parameters()
        if f"{most}.{name}" not in frozen
    ]
    vocabulary, tokens = config.get_text_config().vocab_size, sum(work.largest)
    teachers, numbers = len(work.largest), list(trained.values())
    where = torch.device(device)
    known, coefficients, last = _of_coefficients(numbers, sources, teachers, objective)
    passes = [[Rows(sum(g.tokens), kept[g.length]) for g in own] for own in work.candidates]
    looked_up = [_of_table(t.weight, tokens, shapes[names[path]]) for path, t in tables.items()]
    return Needs(
        tokens=tokens,
        rows=work.rows,
        groups=tuple(max(passes, key=lambda own: sum(r.tokens * r.kept.all for r in own))),
        widest=work.widest,
        states=tokens * logits.width * dtype.itemsize,
        taught=max(tokens * kept[length].taught for tokens, length in _taught(work, where)),
        alone=work.alone * (kept[work.alone].taught + PATHS * KEPT * kept[work.alone].given),
        piece=_of_a_piece(max(with_gradients, default=0), dtype, where),
        cast=sizes[most] * dtype.itemsize * is_cast,
        blocks=sum(sizes.values()) * dtype.itemsize,
        block=sizes[most] * dtype.itemsize,
        gradients=sum(with_gradients) * dtype.itemsize,
        matrix=max(with_gradients, default=0) * dtype.itemsize,
        table=max(looked_up, default=0) * dtype.itemsize,
        head=logits.weights * dtype.itemsize * (2 if is_cast else 1),
        losses=_at_head(work, vocabulary, logits, dtype, objective, where),
        coefficients=coefficients,
        optimizer=optimizer[0],
        known=known,
        last=max(optimizer[1], last),
        code=kept_code(_linear(skeleton), work.together, _untrained(work), dtype, where),
        parameters=sum(sizes.values()) + logits.weights,
    )


def _linear(skeleton: Skeleton) -> list[torch.Size]:
    """The shapes of its layers' weights."""
    modules = chain.from_iterable(block.modules() for _, block in skeleton.read_blocks())
    return [module.weight.shape for module in modules if isinstance(module, nn.Linear)]


def _untrained(work: Workload) -> set[int]:
    """Tokens that go through without gradients: of a source, or of a row that is evaluated."""
    return {*work.taught, *range(work.alone + 1)}


def _taught(work: Workload, device: torch.device) -> Iterator[tuple[int, int]]:
    """Tokens that go through a block at once without gradients, and the length of their rows."""
    for group in chain(*work.candidates):
        yield (sum if serves(device) else max)(group.tokens), group.length


def frozen_parameters(skeleton: Skeleton, trained: Collection[str]) -> set[str]:
    """The parameters of the model that have no gradients, if these output tensors are trained."""
    untrained = (a for a in skeleton.assemblies if not any(name in trained for name in a.names))
    single = (parameter for parameter, name in skeleton.tensors.items() if name not in trained)
    return {*single, *(parameter for own in untrained for parameter in own.parameters)}


def _of_coefficients(
    trained: Sequence[int], sources: int, teachers: int, objective: Objective
) -> tuple[int, int, int]:
    """Bytes: what the terms that compare coefficients keep for all steps; the gradients, with what
    these terms keep in a step; and what is there while the last, `similarity`, is differentiated,
    which looks at all tensors of a shape at once."""
    gradients = 4 * sum(trained)
    compared = gradients * teachers / sources  # a base that does not teach takes no part
    alike = max((size * count for size, count in Counter(trained).items()), default=0)
    pairs = compared * (teachers - 1) / 2  # one number of each pair of sources
    terms = bool(objective.overlap) + bool(objective.weighted_overlap)
    similar, last = 0.0, 0.0
    if objective.similarity:
        similar = 2 * compared
        last = gradients + similar + 16 * alike * teachers / sources
    known = pairs if objective.weighted_overlap else 0
    return int(known), int(gradients + similar + 2 * pairs * terms), int(last)


def _of_a_piece(numbers: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of a weight and its gradient: a product, and what is widened to float32."""
    if device.type != "cpu":  # kernels need none
        return 0
    return 4 * min(numbers, at_once(device)) * (1 + (dtype.itemsize < 4))


def _of_table(table: torch.Tensor, tokens: int, coefficients: Sequence[int]) -> int:
    """Numbers: of the rows that are looked up, and of the parts in which they are made, or of their
    gradients; where they are not made alone, of the whole, too."""
    rows, width = table.shape
    is_alone = is_shared(coefficients) and tokens <= rows
    return width * (2 * tokens + rows * (not is_alone))


def _at_head(
    work: Workload,
    vocabulary: int,
    logits: Logits,
    dtype: torch.dtype,
    objective: Objective,
    device: torch.device,
) -> int:
    """Of a chunk of tokens: its logits and their gradients, and beside them what the terms make of
    a piece of one source's, or the gradient that it adds to the head's."""
    chunk, size = chunk_of(work, vocabulary), dtype.itemsize
    section = min(chunk, work.widest)
    piece = _longest(section, vocabulary, chunks.piece_of(device))
    is_sum = chunk < sum(work.largest)  # of several chunks' gradients, in float32
    terms = vocabulary * (section * size + piece * _of_a_logit(objective, dtype))
    added = 4 * logits.trained
    return max(
        logits.kept + terms + added * is_sum,
        logits.most + added * (is_sum or size < 4),
    )


def chunk_of(work: Workload, vocabulary: int) -> int:
    """Tokens of which there are logits at once."""
    return _longest(sum(work.largest), vocabulary, chunks.CHUNK)


def _longest(tokens: int, vocabulary: int, numbers: int) -> int:
    """Tokens of a chunk of so many numbers at most."""
    chunk = next(chunks.slices(tokens, vocabulary, numbers))
    return chunk.stop - chunk.start


def _of_a_logit(objective: Objective, dtype: torch.dtype) -> int:
    """Bytes for each number of a piece's logits while their gradients are computed: what the terms
    make of them in float32, and the gradient. The last term is differentiated first."""
    most, kept = 0, 0
    for name, (working, saved) in COPIES.items():
        if getattr(objective, name):
            most, kept = max(most, kept + working), kept + saved
    return dtype.itemsize + 4 * most


def free_memory(device: str) -> int:
    """Bytes that are free on a device now."""
    if torch.device(device).type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # by torch, for what comes
    return int(min(psutil.virtual_memory().available, memory_left()))


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:  # which rounds to 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
