"""Compile the kernels for some NVIDIA GPUs, which needs none; print what they load at once, and the
bytes of registers that they spill.

python tests/compiled.py 80 89 90
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mergekit_dam import kernels
from mergekit_dam.kernels.groups import DTYPES, Group, Kind
from mergekit_dam.kernels.launches import TOGETHER, constants
from mergekit_dam.kernels.layout import MERGED, SUMMED, Layout, layout_of
from mergekit_dam.kernels.programs import combine_kernel, gradient_kernel

SHAPE = (4096, 11008)
BROADCASTS = {"column": (1, 11008), "row": (4096, 1), "tensor": (1, 1), "element": SHAPE}
WIDE, NARROW = torch.float32, torch.bfloat16
VARIANTS = [  # dtypes of the sources, and of a base
    ((NARROW,) * 3, None), ((NARROW,) * TOGETHER, None), ((NARROW, WIDE), NARROW),
    ((WIDE,) * TOGETHER, WIDE),
]  # fmt: skip


def chosen(layout: Layout, dtypes: tuple[torch.dtype, ...], base: torch.dtype | None) -> dict:
    kind = Kind(dtypes, base, dtypes[0], dtypes[0], False, layout.is_side, True)
    group = Group(kind, (0,), (layout,), 1, 1, ())
    own = {"WRITTEN": DTYPES[kind.written], "IS_PREPARED": False}
    return constants(group) | own


def compiled(kernel: triton.JITFunction, given: dict, target: GPUTarget) -> str:
    types = {"table": "*i64", "partial": "*fp32", "chunks": "i32", "places": "i32"}
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "constexpr") for name in names}
    own = {name: given[name] for name in names if name in given}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, own, aligned)
    return triton.compile(source, target, kernels.OPTIONS).asm["ptx"]


def spilled(ptx: str) -> int | None:
    """Bytes, by NVIDIA's assembler; None where it does not know this version of PTX."""
    assembler = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "ptxas"
    architecture = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", "-arch", architecture, file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.findall(r"(\d+) bytes spill", done.stderr)
    return sum(map(int, found)) if done.returncode == 0 else None


if __name__ == "__main__":
    found = [
        {
            "capability": capability,
            "kernel": kernel.fn.__name__,
            "granularity": granularity,
            "variant": str(variant),
            "loads": sorted(set(re.findall(r"ld\.global\.v\d+", ptx))),
            "spilled": spilled(ptx),
        }
        for capability in sys.argv[1:]
        for kernel, numbers in (
            (combine_kernel, MERGED),
            (gradient_kernel, SUMMED),
        )
        for granularity, broadcast in BROADCASTS.items()
        for variant in VARIANTS
        for given in [chosen(layout_of(SHAPE, broadcast, numbers), *variant)]
        for ptx in [compiled(kernel, given, GPUTarget("cuda", int(capability), 32))]
    ]
    print(json.dumps(found))
