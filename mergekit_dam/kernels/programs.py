"""The kernels.

Tensors of one kind (a block's matrices, say) go together: starting a kernel for each takes a
processor longer than a GPU needs for a small one. A table in the GPU's memory says where each
tensor is, and its shape.
"""

import triton
import triton.language as tl

# The table has a column for each tensor. Its rows, below the first of the tensor's programs: its
# sizes along the kept and the summed axis; how many coefficients a source has; how many tiles lie
# along the kept axis, and along the summed one, of the tensor or of one program; where the result
# goes, an address or a place among the sums; the addresses of the coefficients or the weight's
# gradient, of the base, and of each source.
KEPT, SUMMED, OWN, TILES_KEPT, TILES, RESULT, FACTOR, BASE, SOURCES = (
    tl.constexpr(row) for row in range(1, 10)
)


@triton.jit
def _own_column(table, WIDTH: tl.constexpr):
    """Where the table tells of the tensor that this program works on, and which of the tensor's
    programs this is."""
    program = tl.program_id(0).to(tl.int64)
    firsts = tl.load(table + tl.arange(0, WIDTH))
    column = table + tl.sum((firsts <= program).to(tl.int32), 0) - 1
    return column, program - tl.load(column)


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """In two roundings from float64, as torch does."""
    if DTYPE != tl.float64:  # noqa: SIM300  for Triton
        values = values.to(tl.float32)
    return values.to(DTYPE)


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    found = tl.load(address).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _size(address, IS_ALIGNED: tl.constexpr):
    found = tl.load(address)
    if IS_ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def _own_tensor(table, WIDTH: tl.constexpr, IS_SIDE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Its column, this program's number among its own, its sizes, and its numbers of tiles."""
    column, program = _own_column(table, WIDTH)
    kept = _size(column + KEPT * WIDTH, IS_ALIGNED and IS_SIDE)
    summed = _size(column + SUMMED * WIDTH, IS_ALIGNED and not IS_SIDE)
    tiles, tiles_kept = tl.load(column + TILES * WIDTH), tl.load(column + TILES_KEPT * WIDTH)
    return column, program, kept, summed, tiles, tiles_kept


@triton.jit
def _places(kept, summed, e, m, k, IS_SIDE: tl.constexpr):
    """Where the numbers at `m` of the summed and `k` of the kept axis lie, and which there are."""
    if IS_SIDE:
        at = e * kept * summed + (m * kept)[:, None] + k[None, :]
    else:
        at = e * kept * summed + (k * summed)[None, :] + m[:, None]
    return at, (m < summed)[:, None] & (k < kept)[None, :]


@triton.jit
def combine_kernel(
    table,
    WIDTH: tl.constexpr, DTYPES: tl.constexpr, BASE_DTYPE: tl.constexpr, OTHER: tl.constexpr,
    WRITTEN: tl.constexpr, WIDE: tl.constexpr, IS_PREPARED: tl.constexpr,
    TILE_SUMMED: tl.constexpr, TILE_KEPT: tl.constexpr,
    IS_SIDE: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(DTYPES)
    column, program, kept, summed, tiles, tiles_kept = _own_tensor(
        table, WIDTH, IS_SIDE, IS_ALIGNED
    )
    own = _size(column + OWN * WIDTH, IS_ALIGNED and IS_SIDE)
    m = program % tiles * TILE_SUMMED + tl.arange(0, TILE_SUMMED)
    program = program // tiles
    k = program % tiles_kept * TILE_KEPT + tl.arange(0, TILE_KEPT)
    e = program // tiles_kept
    at, inside = _places(kept, summed, e, m, k, IS_SIDE)
    coefficients = _pointer(column + FACTOR * WIDTH, WIDE, IS_ALIGNED) + e * kept + k
    total = tl.zeros([TILE_SUMMED, TILE_KEPT], WIDE)
    if BASE_DTYPE is not None:
        origin = tl.load(
            _pointer(column + BASE * WIDTH, BASE_DTYPE, IS_ALIGNED) + at, inside, 0.0
        ).to(WIDE)
    for i in tl.static_range(COUNT):
        factor = tl.load(coefficients + i * own, k < kept, 0.0).to(WIDE)
        source = _pointer(column + (SOURCES + i) * WIDTH, DTYPES[i], IS_ALIGNED)
        part = tl.load(source + at, inside, 0.0).to(WIDE)
        if BASE_DTYPE is not None and not IS_PREPARED:
            part -= origin
        total += part * factor[None, :]
    if BASE_DTYPE is not None:
        total += origin
    total = _rounded(total, WRITTEN)
    if OTHER != WRITTEN:
        total = _rounded(total, OTHER)
    tl.store(_pointer(column + RESULT * WIDTH, OTHER, IS_ALIGNED) + at, total, inside)


@triton.jit(do_not_specialize=["chunks", "places"])
def gradient_kernel(
    table, partial, chunks, places,
    WIDTH: tl.constexpr, DTYPES: tl.constexpr, BASE_DTYPE: tl.constexpr, OTHER: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_SUMMED: tl.constexpr, TILE_KEPT: tl.constexpr,
    IS_SIDE: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of the summed axis, tile by tile, a sum for each source in registers."""
    COUNT: tl.constexpr = len(DTYPES)
    column, program, kept, summed, tiles, tiles_kept = _own_tensor(
        table, WIDTH, IS_SIDE, IS_ALIGNED
    )
    chunk = program % chunks
    program = program // chunks
    k = program % tiles_kept * TILE_KEPT + tl.arange(0, TILE_KEPT)
    e = program // tiles_kept
    outer = _pointer(column + FACTOR * WIDTH, OTHER, IS_ALIGNED)
    sources, totals = (), ()
    for i in tl.static_range(COUNT):
        sources = sources + (_pointer(column + (SOURCES + i) * WIDTH, DTYPES[i], IS_ALIGNED),)  # noqa: RUF005
        totals = totals + (tl.zeros([TILE_SUMMED, TILE_KEPT], WIDE),)  # noqa: RUF005  for Triton
    if BASE_DTYPE is not None:
        base = _pointer(column + BASE * WIDTH, BASE_DTYPE, IS_ALIGNED)
    tile = chunk * tiles
    last = tile + tiles
    while tile < last:
        m = tile * TILE_SUMMED + tl.arange(0, TILE_SUMMED)
        at, inside = _places(kept, summed, e, m, k, IS_SIDE)
        slope = tl.load(outer + at, inside, 0.0).to(WIDE)
        if BASE_DTYPE is not None:
            origin = tl.load(base + at, inside, 0.0).to(WIDE)
        grown = ()
        for i in tl.static_range(COUNT):
            part = tl.load(sources[i] + at, inside, 0.0).to(WIDE)
            if BASE_DTYPE is not None:
                part -= origin
            grown = grown + (totals[i] + part * slope,)  # noqa: RUF005
        totals = grown
        tile += 1
    first = chunk * places + tl.load(column + RESULT * WIDTH) + e * kept + k
    for i in tl.static_range(COUNT):
        tl.store(
            partial + first + i * tl.load(column + OWN * WIDTH), tl.sum(totals[i], 0), k < kept
        )
