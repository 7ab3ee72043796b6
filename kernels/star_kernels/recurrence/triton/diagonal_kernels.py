"""The kernels of the diagonal scan and the RG-LRU: what one program does."""

# Tuples that grow in an unrolled loop change their type.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from star_kernels._triton_math import expm1, sigmoid


@triton.jit
def _join(first_decay, first, second_decay, second):
    """Run the second segment from the end of the first."""
    return second_decay * first_decay, tl.where(first == 0.0, second, second_decay * first + second)


@triton.jit
def _row(x, row, at):
    """Return one row of x, (1, BLOCK)."""
    return tl.sum(tl.where(row == at, x, 0.0), 0, keep_dims=True)


@triton.jit
def _starts(decays, ends, state, row, SEGMENTS: tl.constexpr):
    """Return the state before each segment, and that after the last."""
    ends = tl.where(row == 0, _join(1.0, state, decays, ends)[1], ends)
    _, ends = tl.associative_scan((decays, ends), 0, _join)
    before = tl.gather(ends, tl.maximum(row - 1, 0) + tl.zeros_like(ends).to(tl.int32), 0)
    return tl.where(row == 0, state, before), _row(ends, row, SEGMENTS - 1)


@triton.jit
def _starts_reversed(decays, ends, state, row, SEGMENTS: tl.constexpr):
    """Return what comes to each segment from behind, and what leaves the first."""
    ends = tl.where(row == SEGMENTS - 1, _join(1.0, state, decays, ends)[1], ends)
    _, ends = tl.associative_scan((decays, ends), 0, _join, reverse=True)
    behind = tl.gather(ends, tl.minimum(row + 1, SEGMENTS - 1) + tl.zeros_like(ends).to(tl.int32), 0)
    return tl.where(row == SEGMENTS - 1, state, behind), _row(ends, row, 0)


@triton.jit
def _lru_terms(x, recurrence, gate, rate):
    """Return the decay, the scale of the input and both open gates; rate = c log_lambda."""
    r = sigmoid(recurrence)
    log_decay = r * rate
    return tl.exp(log_decay), tl.sqrt(-expm1(2.0 * log_decay)), r, sigmoid(gate)


@triton.jit
def _terms(first, second, third, rate, valid, LRU: tl.constexpr, ACC: tl.constexpr):
    """Return a token's decay and input; (decay, x) or (x, recurrence gate, input gate) came in."""
    if LRU:
        decay, scale, _, gate = _lru_terms(first.to(ACC), second.to(ACC), third.to(ACC), rate)
        return tl.where(valid, decay, 1.0), tl.where(valid, scale * (gate * first.to(ACC)), 0.0)
    else:
        return tl.where(valid, first.to(ACC), 1.0), second.to(ACC)


@triton.jit
def _load(
    first, second, third, token, stop, inside, first_token, second_token, third_token,
    TOKENS: tl.constexpr, LRU: tl.constexpr,
):  # fmt: skip
    a = ()
    b = ()
    c = ()
    for r in tl.static_range(TOKENS):
        at = token + r
        valid = inside & (at < stop)
        a += (tl.load(first + at * first_token, mask=valid, other=0.0),)
        b += (tl.load(second + at * second_token, mask=valid, other=0.0),)
        c += (tl.load(third + at * third_token, mask=valid, other=0.0) if LRU else valid,)
    return a, b, c


@triton.jit
def _bounds(sequence, ends, ends_step, length, slots, PACKED: tl.constexpr, SPAN: tl.constexpr):
    """Return a sequence's batch row, its first token, one past its last, and the first of its kept states."""
    if PACKED:
        begin = tl.load(ends + sequence * ends_step).to(tl.int64)
        stop = tl.load(ends + (sequence + 1) * ends_step).to(tl.int64)
        return sequence * 0, begin, stop, begin // SPAN + sequence
    else:
        return sequence, sequence * 0, sequence * 0 + length, sequence * slots


@triton.jit
def diagonal_forward(
    first, second, third, log_lambda, state, ends, h_out, final, kept, c, length, slots, width, blocks,
    first_batch, first_token, first_channel, second_batch, second_token, second_channel, third_batch, third_token,
    third_channel, lambda_step, state_row, state_channel, ends_step,
    LRU: tl.constexpr, STATE: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
    SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a sequence with a block of channels."""
    SPAN: tl.constexpr = SEGMENTS * TOKENS
    program = tl.program_id(0).to(tl.int64)
    sequence = program // blocks
    batch, begin, stop, slot = _bounds(sequence, ends, ends_step, length, slots, PACKED, SPAN)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < width
    row = tl.arange(0, SEGMENTS)[:, None]
    first += batch * first_batch + channel * first_channel
    second += batch * second_batch + channel * second_channel
    third += batch * third_batch + channel * third_channel
    h_out += batch * length * width + channel
    kept += slot * width + channel
    final += sequence * width + channel
    rate = tl.zeros([1, BLOCK], ACC)
    if LRU:
        rate = tl.load(log_lambda + channel * lambda_step, mask=inside, other=0.0).to(ACC) * c
    carry = tl.zeros([1, BLOCK], ACC)
    if STATE:
        carry = tl.load(state + sequence * state_row + channel * state_channel, mask=inside, other=0.0).to(ACC)
    if stop <= begin:
        tl.store(final, carry, mask=inside)
    for start in range(begin, stop, SPAN):
        if KEEP:
            tl.store(kept + (start - begin) // SPAN * width, carry, mask=inside)
        token = start + row * TOKENS
        loaded = _load(
            first, second, third, token, stop, inside, first_token, second_token, third_token, TOKENS, LRU
        )  # fmt: skip
        decays = tl.full([SEGMENTS, BLOCK], 1.0, ACC)
        local = tl.zeros([SEGMENTS, BLOCK], ACC)
        terms = ()
        for r in tl.static_range(TOKENS):
            valid = inside & (token + r < stop)
            term = _terms(loaded[0][r], loaded[1][r], loaded[2][r], rate, valid, LRU, ACC)
            terms += (term,)
            local = term[0] * local + term[1]
            decays = decays * term[0]
        h, carry = _starts(decays, local, carry, row, SEGMENTS)
        for r in tl.static_range(TOKENS):
            at = token + r
            h = terms[r][0] * h + terms[r][1]
            tl.store(h_out + at * width, h, mask=inside & (at < stop))
            tl.store(final + tl.zeros_like(at), h, mask=inside & (at == stop - 1))


@triton.jit
def diagonal_backward(
    dh, dfinal, first, second, third, log_lambda, ends, kept, dfirst, dsecond, dthird, dlambda, dstate, c,
    length, slots, width, blocks, dh_batch, dh_token, dh_channel, dfinal_row, dfinal_channel,
    first_batch, first_token, first_channel, second_batch, second_token, second_channel, third_batch, third_token,
    third_channel, lambda_step, ends_step,
    LRU: tl.constexpr, HIDDEN: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr,
    SEGMENTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a sequence with a block of channels, last tokens first, from the states kept before each span."""
    SPAN: tl.constexpr = SEGMENTS * TOKENS
    program = tl.program_id(0).to(tl.int64)
    sequence = program // blocks
    batch, begin, stop, slot = _bounds(sequence, ends, ends_step, length, slots, PACKED, SPAN)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < width
    row = tl.arange(0, SEGMENTS)[:, None]
    first += batch * first_batch + channel * first_channel
    second += batch * second_batch + channel * second_channel
    third += batch * third_batch + channel * third_channel
    dh += batch * dh_batch + channel * dh_channel
    target = batch * length * width + channel
    kept += slot * width + channel
    rate = tl.zeros([1, BLOCK], ACC)
    if LRU:
        rate = tl.load(log_lambda + channel * lambda_step, mask=inside, other=0.0).to(ACC) * c
    drate = tl.zeros([SEGMENTS, BLOCK], ACC)
    carry = tl.zeros([1, BLOCK], ACC)
    if FINAL:
        carry = tl.load(dfinal + sequence * dfinal_row + channel * dfinal_channel, mask=inside, other=0.0).to(ACC)
    spans = (stop - begin + SPAN - 1) // SPAN
    for number in range(spans):
        span = spans - 1 - number
        token = begin + span * SPAN + row * TOKENS
        loaded = _load(
            first, second, third, token, stop, inside, first_token, second_token, third_token, TOKENS, LRU
        )  # fmt: skip
        upstream = ()
        for r in tl.static_range(TOKENS):
            d = tl.zeros([SEGMENTS, BLOCK], ACC)
            if HIDDEN:
                d = tl.load(dh + (token + r) * dh_token, mask=inside & (token + r < stop), other=0.0)
            upstream += (d,)
        decays = tl.full([SEGMENTS, BLOCK], 1.0, ACC)
        local = tl.zeros([SEGMENTS, BLOCK], ACC)
        terms = ()
        for r in tl.static_range(TOKENS):
            valid = inside & (token + r < stop)
            term = _terms(loaded[0][r], loaded[1][r], loaded[2][r], rate, valid, LRU, ACC)
            terms += (term,)
            local = term[0] * local + term[1]
            decays = decays * term[0]
        start = tl.load(kept + span * width, mask=inside, other=0.0)
        h = _starts(decays, local, start, row, SEGMENTS)[0]
        before = ()
        for r in tl.static_range(TOKENS):
            before += (h,)
            h = terms[r][0] * h + terms[r][1]
        local = tl.zeros([SEGMENTS, BLOCK], ACC)
        for r in tl.static_range(TOKENS - 1, -1, -1):
            local = terms[r][0] * (local + upstream[r].to(ACC))
        pull, carry = _starts_reversed(decays, local, carry, row, SEGMENTS)
        for r in tl.static_range(TOKENS - 1, -1, -1):
            at = token + r
            valid = inside & (at < stop)
            pull += upstream[r].to(ACC)
            ddecay = pull * before[r]
            place = target + at * width
            if LRU:
                x = loaded[0][r].to(ACC)
                decay, scale, recurrence, gate = _lru_terms(x, loaded[1][r].to(ACC), loaded[2][r].to(ACC), rate)
                dscale = pull * (gate * x)
                # The slope of the root is infinite where nothing decays; held at its value for 1 - a^2 = 1e-12.
                dlog = ddecay * decay - dscale * (decay * decay / tl.maximum(scale, 1e-6))
                tl.store(dfirst + place, pull * scale * gate, mask=valid)
                tl.store(dsecond + place, dlog * rate * recurrence * (1.0 - recurrence), mask=valid)
                tl.store(dthird + place, pull * scale * x * gate * (1.0 - gate), mask=valid)
                drate += tl.where(valid, dlog * recurrence, 0.0)
            else:
                tl.store(dfirst + place, ddecay, mask=valid)
                tl.store(dsecond + place, pull, mask=valid)
            pull = terms[r][0] * pull
    tl.store(dstate + sequence * width + channel, carry, mask=inside)
    if LRU:
        total = tl.sum(drate, 0, keep_dims=True) * c
        tl.store(dlambda + sequence * width + channel, total, mask=inside)


@triton.jit
def diagonal_step(
    state, first, second, third, log_lambda, h_out, new, c, width, blocks, state_row, state_channel,
    first_row, first_channel, second_row, second_channel, third_row, third_channel, lambda_step,
    LRU: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a block of one row's channels."""
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    a = tl.load(first + row * first_row + channel * first_channel, mask=inside, other=0.0)
    b = tl.load(second + row * second_row + channel * second_channel, mask=inside, other=0.0)
    rate = tl.zeros([BLOCK], ACC)
    gate = b
    if LRU:
        gate = tl.load(third + row * third_row + channel * third_channel, mask=inside, other=0.0)
        rate = tl.load(log_lambda + channel * lambda_step, mask=inside, other=0.0).to(ACC) * c
    h = tl.load(state + row * state_row + channel * state_channel, mask=inside, other=0.0).to(ACC)
    decay, driven = _terms(a, b, gate, rate, inside, LRU, ACC)
    h = decay * h + driven
    tl.store(h_out + row * width + channel, h, mask=inside)
    tl.store(new + row * width + channel, h, mask=inside)
