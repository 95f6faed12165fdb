"""The kernels of attention on GPUs: over the paged cache or packed keys and values, and the sum of what was split.

A program attends for a few tokens of one sequence and the query heads of one key/value head, which share the keys that
it reads; the keys are read in tiles with an online softmax (FlashAttention-2, Dao, 2023; the cut along keys is
Flash-Decoding's, Dao et al., 2023). M rows of queries, N keys of a tile; other letters: see ops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from puna.ops.triton_overlap import await_turn
from puna.ops.triton_rounding import INTERPRETED, rounded

# Weights of int8 values carry the values' scales, which may be small; this keeps them out of float16's subnormals, and
# values up to float16's highest below its infinity.
WEIGHT_SHIFT = tl.constexpr(64.0)


@triton.jit
def _tile_of(program, query_starts, sequences, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of a program, and which of its tiles; sequence b's are counted from query_starts[b] / TOKENS + b."""
    found = 0
    for first in range(0, sequences, 256):
        b = first + tl.arange(0, 256)
        starts = tl.load(query_starts + b, mask=b < sequences, other=0)
        found += tl.sum(((b < sequences) & (starts // TOKENS + b <= program)).to(tl.int32))
    sequence = found - 1
    return sequence, program - tl.load(query_starts + sequence) // TOKENS - sequence


@triton.jit
def _unpacked(pairs, KIND: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two bytes in each int16 -> the number in the lower one, the number in the higher one; both exact in float16.

    A code becomes the bits of 1024 + 128 + code, less 1152: a conversion of integers would be an instruction, and a
    slow one, for each. On the GPU both are spelled out, since compilers work on single bytes where these take four.
    """
    if INTERPRETED:
        low, high = pairs & 0xFF, (pairs >> 8) & 0xFF
        if KIND == "int8":
            even = (low ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
            odd = (high ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
        else:
            even = low.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            odd = high.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif KIND == "int8":
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 high, bias;
            mov.b32 bias, 0x64806480;
            shr.b32 high, $2, 8;
            lop3.b32 $0, $2, 0x00ff00ff, bias, 0x6a;
            lop3.b32 $1, high, 0x00ff00ff, bias, 0x6a;
            sub.f16x2 $0, $0, bias;
            sub.f16x2 $1, $1, bias;
            }""",
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 low, high;
            prmt.b32 sorted, $2, $2, 0x3120;
            mov.b32 {low, high}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even.to(DTYPE), odd.to(DTYPE)


@triton.jit
def _tile(base, rows, d, present, SIZE: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """SIZE numbers of each row, zeros up to a power of two and, where MASKED, in rows that are not present."""
    pointers = base + rows[:, None] + d[None, :]
    WHOLE: tl.constexpr = triton.next_power_of_2(SIZE) == SIZE
    if MASKED and WHOLE:
        return tl.load(pointers, mask=present[:, None], other=0)
    if MASKED:
        return tl.load(pointers, mask=present[:, None] & (d < SIZE)[None, :], other=0)
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows[:, None] >= 0) & (d < SIZE)[None, :], other=0)


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:  # it would take bfloat16's bits for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _merge(highest, total, sums, odd_sums, highest2, total2, sums2, odd_sums2):  # type: ignore[no-untyped-def]
    """The sums over two sets of keys together. Spelled out to the rounding, since two kernels must agree on it."""
    top = tl.maximum(highest, highest2)
    safe = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(highest - safe), tl.exp2(highest2 - safe)
    total = tl.fma(total, a, total2 * b)
    sums = tl.fma(sums, a[:, None], sums2 * b[:, None])
    odd_sums = tl.fma(odd_sums, a[:, None], odd_sums2 * b[:, None])
    return top, total, sums, odd_sums


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query,
    odd_query,
    positions,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    outer_stride,
    scale_stride,
    begin,
    end,
    oldest,
    length,
    window,
    scale,
    highest,
    total,
    sums,
    odd_sums,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys begin .. end - 1, of which begin is a multiple of N, to what is summed up so far.

    SIZE: of a row, in numbers, or in pairs of bytes. total: [M], or [M, N] to be added up in the end.
    """
    PAIRED: tl.constexpr = KIND != "float"
    d = tl.arange(0, triton.next_power_of_2(SIZE))
    # Blocks are looked up one tile ahead: a load whose address is another load's result would halve the pipeline.
    n = begin + tl.arange(0, N)
    if BLOCK > 0:
        next_blocks = tl.load(table + n.to(tl.uint32) // BLOCK, mask=(n >= oldest) & (n < length), other=0)
    for start in tl.range(begin, end, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        present = n < length
        if WINDOWED:
            present = present & (n >= oldest)
        # Where each row is; what is not present is read from some block, and not used.
        if BLOCK == 0:
            rows = n.to(tl.int64) * outer_stride
        else:
            blocks = next_blocks.to(tl.int64)
            next_blocks = tl.load(table + (n + N).to(tl.uint32) // BLOCK, mask=n + N < length, other=0)
            offsets = (n.to(tl.uint32) % BLOCK).to(tl.int32)
            rows = blocks * outer_stride + offsets * SIZE
        key = _tile(keys, rows, d, present, SIZE, MASKED and BLOCK == 0)
        if PAIRED:
            even, odd = _unpacked(key, KIND, query.dtype)
            scores = _dot(query, tl.trans(even), None, PRECISION)
            scores = _dot(odd_query, tl.trans(odd), scores, PRECISION)
        else:
            scores = _dot(query, tl.trans(key.to(query.dtype)), None, PRECISION)
        if KIND == "int8":
            at = blocks * scale_stride + offsets
            scores = scores * tl.load(key_scales + at)[None, :]
        if MASKED:
            visible = n[None, :] <= positions[:, None]
            if WINDOWED:
                visible = visible & (n[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(highest, tl.max(scores, 1) * scale)
        safe = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
        # As written, so that a token's bits don't depend on which operations a compiler joins where.
        weights = tl.exp2(tl.fma(scores, scale, -safe[:, None]))
        shrink = tl.exp2(highest - safe)
        if len(total.shape) == 2:
            total = tl.fma(total, shrink[:, None], weights)
        else:
            total = tl.fma(total, shrink, tl.sum(weights, 1))
        sums = sums * shrink[:, None]
        if KIND == "int8":
            weights = weights * (tl.load(value_scales + at, mask=present, other=0.0) * WEIGHT_SHIFT)[None, :]
        weights = weights.to(query.dtype)
        value = _tile(values, rows, d, present, SIZE, MASKED)
        if PAIRED:
            odd_sums = odd_sums * shrink[:, None]
            even, odd = _unpacked(value, KIND, query.dtype)
            sums = _dot(weights, even, sums, PRECISION)
            odd_sums = _dot(weights, odd, odd_sums, PRECISION)
        else:
            sums = _dot(weights, value.to(query.dtype), sums, PRECISION)
        highest = top
    return highest, total, sums, odd_sums


# Numbers that change from step to step must not each be compiled for.
@triton.jit(
    do_not_specialize=["sequences", "tokens", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "sequence_lengths"],
)
def attention_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    values,
    key_scales,
    value_scales,
    output,
    partial_highest,
    partial_totals,
    partial_sums,
    block_tables,
    query_starts,
    sequence_lengths,
    scale,
    window,
    sequences,
    tokens,
    query_stride,
    head_stride,
    outer_stride,
    kv_head_stride,
    scale_stride,
    kv_head_scale_stride,
    table_stride,
    FEW: tl.constexpr,
    FIRST_OF_MANY: tl.constexpr,
    SPLIT: tl.constexpr,
    FIXED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """Program (tile of tokens, key/value head, split of the keys).

    FEW: program i takes sequence i if it has no more tokens than fit a tile; else tiles of all sequences are counted
    through, and those of sequences of FIRST_OF_MANY - 1 tokens or less are left to others.
    SPLIT: the third axis has several programs, and results go to partial_... [splits, T, H] and [splits, T, H, D].
    FIXED: keys after which sums start anew; 0 where they need not.
    """
    await_turn(OVERLAP)
    TOKENS: tl.constexpr = M // GROUP
    D_PADDED: tl.constexpr = triton.next_power_of_2(D)
    PAIRED: tl.constexpr = KIND != "float"
    SIZE: tl.constexpr = D // 2 if PAIRED else D
    kv_head, split = tl.program_id(1), tl.program_id(2)
    if FEW:
        sequence, tile = tl.program_id(0), 0
    else:
        # The tiles with the most keys, which come last, are the first to start.
        sequence, tile = _tile_of(tl.num_programs(0) - 1 - tl.program_id(0), query_starts, sequences, TOKENS)
    first_row = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - first_row
    if FEW:
        if count > TOKENS or count == 0:
            return
    elif tile * TOKENS >= count or count < FIRST_OF_MANY:
        return
    length = tl.load(sequence_lengths + sequence)

    d = tl.arange(0, D_PADDED)
    # Row r of the tile is token r / GROUP and head r % GROUP.
    r = tl.arange(0, M)
    token = tile * TOKENS + r // GROUP
    real = (r < TOKENS * GROUP) & (token < count)
    token = tl.where(real, token, tile * TOKENS)
    head = kv_head * GROUP + r % GROUP
    positions = length - count + token
    first_position = length - count + tile * TOKENS
    last_position = tl.minimum(first_position + TOKENS, length) - 1

    row = (first_row + token).to(tl.int64)
    query += row[:, None] * query_stride + head[:, None] * head_stride
    if PAIRED:
        # Bytes are read in pairs, two neighbours of a row as one int16, and taken apart into the even and the odd ones:
        # tensor cores want two *keys'* values in a register, and only 16 bits at a time are transposed on the way from
        # shared memory. Every code and e4m3 number is a float16; weights are rounded less in these than in bfloat16.
        pair = tl.arange(0, D_PADDED // 2)
        pair_mask = real[:, None] & (pair < D // 2)[None, :]
        q = tl.load(query + 2 * pair[None, :], mask=pair_mask, other=0.0)
        odd_q = tl.load(query + 2 * pair[None, :] + 1, mask=pair_mask, other=0.0)
        if q.dtype != tl.float32:
            q, odd_q = q.to(tl.float16), odd_q.to(tl.float16)
    else:
        q = tl.load(query + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
        odd_q = q

    if BLOCK == 0:
        keys += (first_row - (length - count)).to(tl.int64) * outer_stride
        values += (first_row - (length - count)).to(tl.int64) * outer_stride
    keys += kv_head * kv_head_stride
    values += kv_head * kv_head_stride
    key_scales += kv_head * kv_head_scale_stride
    value_scales += kv_head * kv_head_scale_stride
    table = block_tables + sequence.to(tl.int64) * table_stride

    oldest = tl.maximum(first_position - window + 1, 0) if WINDOWED else 0
    begin, end = oldest // N * N, last_position + 1
    if FIXED > 0:
        begin = oldest // FIXED * FIXED
        if SPLIT:
            begin = split * FIXED
            end = tl.minimum(end, begin + FIXED)
            begin = tl.maximum(begin, oldest // N * N)
    elif SPLIT:
        part = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(2)), N) * N
        begin += split * part
        end = tl.minimum(end, begin + part)

    highest = tl.full([M], float("-inf"), tl.float32)
    # Of few rows each thread adds up its own weights, and these are added up in the end: sums across threads take time.
    total = tl.zeros([M, N] if M <= 16 and FIXED == 0 else [M], tl.float32)
    sums = tl.zeros([M, D_PADDED // 2 if PAIRED else D_PADDED], tl.float32)
    odd_sums = tl.zeros([M, D_PADDED // 2 if PAIRED else 1], tl.float32)
    if FIXED > 0 and not SPLIT:
        for first in range(begin, end, FIXED):
            highest2, total2, sums2, odd_sums2 = _attend(
                q, odd_q, positions, keys, values, key_scales, value_scales, table, outer_stride, scale_stride,
                tl.maximum(first, oldest // N * N), tl.minimum(first + FIXED, end), oldest, length, window, scale,
                tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32),
                tl.zeros([M, D_PADDED // 2 if PAIRED else D_PADDED], tl.float32),
                tl.zeros([M, D_PADDED // 2 if PAIRED else 1], tl.float32),
                True, WINDOWED, KIND, SIZE, BLOCK, N, STAGES, PRECISION,
            )  # fmt: skip
            highest, total, sums, odd_sums = _merge(highest, total, sums, odd_sums, highest2, total2, sums2, odd_sums2)
    else:
        if not FEW and FIXED == 0:
            # Tiles that all rows see whole need no masks.
            whole = tl.minimum((first_position + 1) // N * N, end)
            if WINDOWED:
                partly = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), N) * N, end)
                partly = tl.maximum(partly, begin)
                highest, total, sums, odd_sums = _attend(
                    q, odd_q, positions, keys, values, key_scales, value_scales, table, outer_stride,
                    scale_stride, begin, partly, oldest, length, window, scale, highest, total, sums, odd_sums,
                    True, WINDOWED, KIND, SIZE, BLOCK, N, STAGES, PRECISION,
                )  # fmt: skip
                begin = partly
            highest, total, sums, odd_sums = _attend(
                q, odd_q, positions, keys, values, key_scales, value_scales, table, outer_stride,
                scale_stride, begin, whole, oldest, length, window, scale, highest, total, sums, odd_sums,
                False, WINDOWED, KIND, SIZE, BLOCK, N, STAGES, PRECISION,
            )  # fmt: skip
            begin = tl.maximum(whole, begin)
        highest, total, sums, odd_sums = _attend(
            q, odd_q, positions, keys, values, key_scales, value_scales, table, outer_stride,
            scale_stride, begin, end, oldest, length, window, scale, highest, total, sums, odd_sums,
            True, WINDOWED, KIND, SIZE, BLOCK, N, STAGES, PRECISION,
        )  # fmt: skip

    if M <= 16 and FIXED == 0:
        total = tl.sum(total, 1)
    if KIND == "int8":
        sums, odd_sums = sums / WEIGHT_SHIFT, odd_sums / WEIGHT_SHIFT
    result = tl.interleave(sums, odd_sums) if PAIRED else sums
    mask = real[:, None] & (d < D)[None, :]
    if not SPLIT:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        out = output + row[:, None] * HEADS * D + head[:, None] * D + d[None, :]
        tl.store(out, rounded(result, output.dtype.element_ty), mask=mask)
    else:
        at = (split.to(tl.int64) * tokens + row) * HEADS + head
        tl.store(partial_highest + at, highest, mask=real)
        tl.store(partial_totals + at, total, mask=real)
        # Sums of nothing are not read either.
        tl.store(partial_sums + at[:, None] * D + d[None, :], result, mask=mask & (total > 0.0)[:, None])


@triton.jit(do_not_specialize=["tokens", "splits"])
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_highest,
    partial_totals,
    partial_sums,
    output,
    tokens,
    splits,
    SPLITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """The result of a token and head from its splits: all at once, or one by one as a program without splits would.

    SPLITS: a power of two that is not below `splits`.
    """
    await_turn(OVERLAP)
    D_PADDED: tl.constexpr = triton.next_power_of_2(D)
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D_PADDED)
    first = token.to(tl.int64) * HEADS + head
    if FIXED:
        highest = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        sums = tl.zeros([1, D_PADDED], tl.float32)
        none = tl.zeros([1, 1], tl.float32)
        for split in range(splits):
            at = first + split * tokens * HEADS + tl.arange(0, 1)
            highest2, total2 = tl.load(partial_highest + at), tl.load(partial_totals + at)
            mask = (d < D)[None, :] & (total2 > 0.0)[:, None]
            sums2 = tl.load(partial_sums + at[:, None] * D + d[None, :], mask=mask, other=0.0)
            highest, total, sums, none = _merge(highest, total, sums, none, highest2, total2, sums2, none)
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output + first * D + d[None, :],
            rounded(result, output.dtype.element_ty),
            mask=(d < D)[None, :],
        )
    else:
        z = tl.arange(0, SPLITS)
        at = z.to(tl.int64) * tokens * HEADS + first
        highest = tl.load(partial_highest + at, mask=z < splits, other=float("-inf"))
        total = tl.load(partial_totals + at, mask=z < splits, other=0.0)
        mask = (d < D)[None, :] & (total > 0.0)[:, None]
        sums = tl.load(partial_sums + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        top = tl.max(highest, 0)
        factors = tl.exp2(highest - tl.where(top == float("-inf"), 0.0, top))
        everything = tl.sum(total * factors, 0)
        result = tl.sum(sums * factors[:, None], 0) / tl.where(everything == 0.0, 1.0, everything)
        out = output + first * D + d
        tl.store(out, rounded(result, output.dtype.element_ty), mask=d < D)
