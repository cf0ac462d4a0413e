"""Making a layer's merged weights and reducing their gradients, against moving as many bytes.

    python -m tests.benchmarks.combine [--shape tiny|cpu|7b] [--sources 3] [--repeat 20]

The seven matrices of a decoder layer of the shape's model, column coefficients. The floor is a copy
that reads and writes as many bytes as the pass must: the sources and the merged weights, or the
sources and the weights' gradients. On a GPU the kernels and plain torch run in turns.
"""

from collections.abc import Callable

import click
import torch
from torch import Tensor

from mergekit_dam import formula
from mergekit_dam.inputs import Inputs, Together
from tests.benchmarks.fit_step import SHAPES, chosen
from tests.benchmarks.measuring import Step, alternate, machine, peak_of, table

FLOOR = "a copy of as many bytes"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="7b")
@click.option("--sources", default=3)
@click.option("--repeat", default=20)
@click.option("--device", default=None)
def main(shape: str, sources: int, repeat: int, device: str | None) -> None:
    device = chosen(device)
    dtypes = (torch.bfloat16,) if device != "cpu" else (torch.float32, torch.bfloat16)
    print(machine(device))
    for dtype in dtypes:
        wide, width = SHAPES[shape].intermediate_size, SHAPES[shape].hidden_size
        sizes = [(width, width)] * 4 + [(wide, width)] * 2 + [(width, wide)]
        print(f"\n{sources} x {sizes}, {dtype}\n")
        steps = _steps(sizes, sources, dtype, device)
        peaks = {name: peak_of(step, device) for name, step in steps.items()}
        several = {name: _several(step, device) for name, step in steps.items()}
        print(table(alternate(several, repeat, device), peaks, FLOOR))


def _steps(sizes: list[tuple[int, int]], count: int, dtype, device: str) -> dict[str, Step]:
    layer = [[torch.randn(s, device=device).to(dtype) for _ in range(count + 1)] for s in sizes]
    outers = [outer for outer, *_ in layer]
    inputs = Together(Inputs(tuple(sources), None, None) for _, *sources in layer)
    halves = [torch.cat(own).flatten().chunk(2) for own in layer]
    steps: dict[str, Step] = {FLOOR: lambda: [read.copy_(other) for read, other in halves]}
    for name, kernels in _ways(device).items():
        steps |= {
            f"merge, {name}": _merge(inputs, dtype, kernels),
            f"gradient, {name}": _gradient(inputs, outers, dtype, kernels),
        }
    return steps


def _ways(device: str) -> dict[str, Callable]:
    found = formula._kernels(torch.device(device))
    ways = {"plain torch": lambda _: None}
    return ways if found is None else {"kernels": lambda _: found, **ways}


def _coefficients(inputs: Together) -> list[Tensor]:
    count, device = len(inputs[0].sources), inputs[0].sources[0].device
    shapes = [(count, 1, own.sources[0].shape[1]) for own in inputs]
    return [torch.full(s, 1 / count, device=device, requires_grad=True) for s in shapes]


def _merge(inputs: Together, dtype: torch.dtype, kernels: Callable) -> Step:
    coefficients = _coefficients(inputs)

    def step() -> None:
        formula._kernels = kernels
        with torch.no_grad():
            formula.combine_all(coefficients, inputs, [dtype] * len(inputs))

    return step


def _gradient(inputs: Together, outers: list[Tensor], dtype, kernels: Callable) -> Step:
    formula._kernels = kernels
    coefficients = _coefficients(inputs)
    merged = formula.combine_all(coefficients, inputs, [dtype] * len(inputs))

    def step() -> None:
        formula._kernels = kernels
        torch.autograd.grad(merged, coefficients, outers, retain_graph=True)

    return step


def _several(step: Step, device: str) -> Step:
    """On a GPU so many that waiting for its end takes no part in the time."""

    def steps() -> None:
        for _ in range(1 if device == "cpu" else 20):
            step()

    return steps


if __name__ == "__main__":
    main()
