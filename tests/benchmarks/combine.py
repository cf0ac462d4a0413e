"""Making a merged weight and reducing its gradient, against what moving the bytes takes.

    python -m tests.benchmarks.combine [--shape tiny|cpu|7b] [--sources 3] [--repeat 20]

One matrix [intermediate, hidden] of the shape's model, column coefficients. The floor is a copy
that reads and writes as many bytes as the pass must: the sources and the merged weight, or the
sources and the weight's gradient. On a GPU the kernels and plain torch run in turns.
"""

from collections.abc import Callable

import click
import torch
from torch import Tensor

from mergekit_dam import formula
from tests.benchmarks.fit_step import SHAPES
from tests.benchmarks.measuring import Step, alternate, machine, peak_of, table

FLOOR = "a copy of as many bytes"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="7b")
@click.option("--sources", default=3)
@click.option("--repeat", default=20)
@click.option("--device", default=None)
def main(shape: str, sources: int, repeat: int, device: str | None) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = (torch.bfloat16,) if device != "cpu" else (torch.float32, torch.bfloat16)
    print(machine(device))
    for dtype in dtypes:
        size = (SHAPES[shape].intermediate_size, SHAPES[shape].hidden_size)
        print(f"\n{sources} x {list(size)}, {dtype}\n")
        steps = _steps(size, sources, dtype, device)
        peaks = {name: peak_of(step, device) for name, step in steps.items()}
        several = {name: _several(step, device) for name, step in steps.items()}
        print(table(alternate(several, repeat, device), peaks, FLOOR))


def _steps(size: tuple[int, int], count: int, dtype: torch.dtype, device: str) -> dict[str, Step]:
    weights = [torch.randn(size, device=device).to(dtype) for _ in range(count + 1)]
    outer, *sources = weights
    half = torch.cat(weights).flatten()[: (count + 1) * outer.numel() // 2]  # read, then written
    steps: dict[str, Step] = {FLOOR: half.clone}
    for name, kernels in _ways(device).items():
        steps |= {
            f"merge, {name}": _merge(sources, kernels),
            f"gradient, {name}": _gradient(sources, outer, kernels),
        }
    return steps


def _ways(device: str) -> dict[str, Callable]:
    found = formula._kernels(torch.device(device))
    ways = {"plain torch": lambda _: None}
    return ways if found is None else {"kernels": lambda _: found, **ways}


def _coefficients(sources: list[Tensor]) -> Tensor:
    count, width = len(sources), sources[0].shape[1]
    return torch.full((count, 1, width), 1 / count, device=sources[0].device)


def _merge(sources: list[Tensor], kernels: Callable) -> Step:
    coefficients = _coefficients(sources)

    def step() -> None:
        formula._kernels = kernels
        formula.combine(coefficients, sources)

    return step


def _gradient(sources: list[Tensor], outer: Tensor, kernels: Callable) -> Step:
    coefficients = _coefficients(sources).requires_grad_()
    formula._kernels = kernels
    merged = formula.combine(coefficients, sources)

    def step() -> None:
        formula._kernels = kernels
        torch.autograd.grad(merged, coefficients, outer, retain_graph=True)

    return step


def _several(step: Step, device: str) -> Step:
    """On a GPU so many that what starts one takes no part in the time."""

    def steps() -> None:
        for _ in range(1 if device == "cpu" else 50):
            step()

    return steps


if __name__ == "__main__":
    main()
