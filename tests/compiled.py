"""Compile the kernels for some NVIDIA GPUs, which needs none; print what they load at once.

python tests/compiled.py 80 89 90
"""

import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mergekit_dam import kernels

ALIGNED = [["tt.divisibility", 16]]
LAYOUTS = {  # of bfloat16 tensors [4096, 11008]
    "column": kernels._layout((4096, 11008), (1, 11008)),
    "row": kernels._layout((4096, 11008), (4096, 1)),
    "tensor": kernels._layout((4096, 11008), (1, 1)),
}


def arguments(layout: kernels._Layout) -> dict:
    own = {key: getattr(layout, key) for key in ("stack", "kept", "summed")}
    names = ("stack_stride", "kept_stride", "summed_stride")
    return own | {
        "merged": "*bf16", "partial": "*fp32", "outer": "*bf16", "coefficients": "*fp32",
        "sources": ("*bf16",) * 3, "base": None, "PREPARED": False, "COUNT": 3, "WIDE": tl.float32,
        "tiles_kept": layout.tiles_kept, "tiles_summed": layout.tiles_summed, "chunks": 32,
        "TILE_SUMMED": layout.tile[0], "TILE_KEPT": layout.tile[1], "TILES": kernels.STEPS,
    } | dict(zip(names, layout.strides, strict=True))  # fmt: skip


def compiled(kernel: triton.JITFunction, layout: kernels._Layout, target: GPUTarget) -> str:
    signature, constants, attributes = {}, {}, {}
    given = arguments(layout)
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


if __name__ == "__main__":
    found = [
        {
            "capability": capability,
            "kernel": kernel.fn.__name__,
            "layout": name,
            "loads": sorted(set(re.findall(r"ld\.global\.v\d+|ld\.local", ptx))),
        }
        for capability in sys.argv[1:]
        for kernel in (kernels._combine_kernel, kernels._gradient_kernel)
        for name, layout in LAYOUTS.items()
        for ptx in [compiled(kernel, layout, GPUTarget("cuda", int(capability), 32))]
    ]
    print(json.dumps(found))
