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

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mergekit_dam import kernels

ALIGNED = [["tt.divisibility", 16]]
SHAPE = (4096, 11008)
BROADCASTS = {"column": (1, 11008), "row": (4096, 1), "tensor": (1, 1), "element": SHAPE}
VARIANTS = [  # sources, dtype, base
    (3, "bf16", None), (kernels.TOGETHER, "bf16", None), (kernels.TOGETHER, "fp32", "*fp32"),
]  # fmt: skip


def arguments(layout: kernels._Layout, count: int, dtype: str, base: str | None) -> dict:
    own = {key: getattr(layout, key) for key in ("stack", "kept", "summed")}
    names = ("stack_stride", "kept_stride", "summed_stride")
    return own | {
        "merged": f"*{dtype}", "partial": "*fp32", "outer": f"*{dtype}", "coefficients": "*fp32",
        "sources": (f"*{dtype}",) * count, "base": base, "PREPARED": False, "COUNT": count,
        "WIDE": tl.float32, "tiles_kept": layout.tiles_kept, "tiles_summed": layout.tiles_summed,
        "chunks": 32, "TILE_SUMMED": layout.tile[0], "TILE_KEPT": layout.tile[1],
        "TILES": kernels.STEPS,
    } | dict(zip(names, layout.strides, strict=True))  # fmt: skip


def compiled(kernel: triton.JITFunction, given: dict, target: GPUTarget) -> str:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if isinstance(value, tuple):
            signature[name] = value
            attributes |= {(index, place): ALIGNED for place in range(len(value))}
        elif isinstance(value, str):
            signature[name], attributes[(index,)] = value, ALIGNED
        elif parameter.is_constexpr or value is None or value == 1:  # as a launch specialises
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            attributes |= {(index,): ALIGNED} if value % 16 == 0 else {}
    source = ASTSource(kernel, signature, constants, attributes)
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
            "variant": variant,
            "loads": sorted(set(re.findall(r"ld\.global\.v\d+", ptx))),
            "spilled": spilled(ptx),
        }
        for capability in sys.argv[1:]
        for kernel, numbers in (
            (kernels._combine_kernel, kernels.MERGED),
            (kernels._gradient_kernel, kernels.SUMMED),
        )
        for granularity, broadcast in BROADCASTS.items()
        for variant in VARIANTS
        for given in [arguments(kernels._layout(SHAPE, broadcast, numbers), *variant)]
        for ptx in [compiled(kernel, given, GPUTarget("cuda", int(capability), 32))]
    ]
    print(json.dumps(found))
