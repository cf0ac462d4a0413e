"""Chooses merges on fit rows: the best of a small grid, or by evolution."""

from collections.abc import Iterable
from dataclasses import dataclass

from mergekit.config import MergeConfiguration

from mergekit_dam.compare.candidates import Candidate, Ingredients, weighted
from mergekit_dam.compare.ground import Ground
from mergekit_dam.compare.in_memory import merge_in_memory
from mergekit_dam.errors import DamError

START = 0.9  # densities; weights start as the plain average
SPREAD = 0.2  # the first standard deviation, for weights and densities alike
HEAVIEST, SPARSEST = 1.5, 0.05
HOPELESS = 1e9  # in the place of infinity, which has no rank among others


@dataclass(frozen=True)
class Choice:
    best: Candidate
    tried: int


def configuration(candidate: Candidate) -> MergeConfiguration:
    return MergeConfiguration.model_validate(candidate.document)


def best_of(candidates: Iterable[Candidate], ground: Ground, seed: int) -> Choice:
    """The candidate with the lowest mean KL on fit rows; where there is but one, it is taken
    without a look."""
    candidates = list(candidates)
    if len(candidates) == 1:
        return Choice(candidates[0], 1)
    kls = [_kl(candidate, ground, seed) for candidate in candidates]
    return Choice(candidates[kls.index(min(kls))], len(candidates))


def evolve(given: Ingredients, ground: Ground, seed: int, evaluations: int) -> Choice:
    """CMA-ES (Hansen, 2016) over a weight and a density for each source, in whole generations.

    Begins with the plain average. Raises DamError where the library `cma` is not installed.
    """
    cma = _library()
    count = len(given.sources)
    has_base = given.base is not None and given.base not in given.sources

    def candidate(point) -> Candidate:
        values = [round(float(value), 4) for value in point]  # as the YAML will have them
        return weighted(given, values[:count], values[count:] if has_base else None)

    start = [1 / count] * count + [START] * count * has_base
    low = [0.0] * count + [SPARSEST] * count * has_base
    high = [HEAVIEST] * count + [1.0] * count * has_base
    options = {"bounds": [low, high], "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(start, SPREAD, options)
    average = weighted(given, [1 / count] * count, [1.0] * count if has_base else None)
    best, lowest, tried = average, _kl(average, ground, seed), 1
    while tried + strategy.popsize <= evaluations:
        points = strategy.ask()
        kls = [_kl(candidate(point), ground, seed) for point in points]
        strategy.tell(points, [min(kl, HOPELESS) for kl in kls])
        tried += len(points)
        if min(kls) < lowest:
            best, lowest = candidate(points[kls.index(min(kls))]), min(kls)
    return Choice(best, tried)


def _library():
    try:
        import cma
    except ImportError:
        raise DamError("it needs the library cma: `pip install 'mergekit-dam[evolve]'`") from None
    return cma


def _kl(candidate: Candidate, ground: Ground, seed: int) -> float:
    tensors = merge_in_memory(configuration(candidate), ground.plan, seed)
    return ground.search_kl(ground.merge(tensors))
