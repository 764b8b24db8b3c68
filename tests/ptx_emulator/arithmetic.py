"""What the translated instructions call: arithmetic for which numpy has no operator of the same meaning. Arrays over threads."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
where, fmin, fmax, minimum, maximum = np.where, np.fmin, np.fmax, np.minimum, np.maximum
sqrt, copysign, trunc, rint, floor, ceil = np.sqrt, np.copysign, np.trunc, np.rint, np.floor, np.ceil


def fma(a, b, c):
    return (a.astype(f8) * b + c).astype(f4)


def flush(x):
    """Denormal float32 to zero."""
    return np.where(np.abs(x) < f4(1.1754943508222875e-38), np.copysign(f4(0), x), x)


def exp2(x):
    return flush(np.exp2(flush(x).astype(f8)).astype(f4))


def log2(x):
    return np.log2(flush(x).astype(f8)).astype(f4)


def divide(a, b):
    """C's integer division; by zero gives all ones, as GPUs do."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, 1, b).astype(b.dtype))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    floor = a // safe
    floor = floor + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), floor)


def remainder(a, b):
    return a - divide(a, b) * b


def mul_hi(a, b):
    if a.dtype.itemsize == 4:
        wide = i8 if a.dtype.kind == "i" else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], object).astype(a.dtype)


def shift_left(a, count):
    bits = a.dtype.itemsize * 8
    return np.where(count >= bits, a.dtype.type(0), a << np.minimum(count, bits - 1).astype(a.dtype))


def shift_right(a, count):
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), shifted)


def funnel_left(low, high, count, wrap):
    count = count & u4(31) if wrap else np.minimum(count, u4(32))
    both = (high.astype(u8) << u8(32)) | low
    return ((both << count.astype(u8)) >> u8(32)).astype(u4)


def funnel_right(low, high, count, wrap):
    count = count & u4(31) if wrap else np.minimum(count, u4(32))
    both = (high.astype(u8) << u8(32)) | low
    return (both >> count.astype(u8)).astype(u4)


def bit_field(a, position, length, signed):
    """bfe, of uint32 or uint64 bits."""
    bits = a.dtype.itemsize * 8
    position, length = position & u4(255), length & u4(255)
    field = shift_right(a, position)
    inside = np.minimum(length, bits)
    mask = np.where(inside == bits, ~a.dtype.type(0), shift_left(np.ones_like(a), inside) - a.dtype.type(1))
    field = field & mask
    if signed:
        last = np.minimum(position + length - u4(1), u4(bits - 1))
        sign = (shift_right(a, last) & a.dtype.type(1)).astype(bool) & (length > 0)
        field = np.where(sign, field | ~mask, field)
    return field


def bit_insert(a, b, position, length):
    mask = shift_left(shift_left(np.ones_like(a), np.minimum(length & u4(255), 32)) - a.dtype.type(1), position & u4(255))
    return (b & ~mask) | (shift_left(a, position & u4(255)) & mask)


def permute_bytes(a, b, selector):
    both = ((b.astype(u8) << u8(32)) | a).view(u1).reshape(-1, 8)
    result = np.zeros((len(both), 4), u1)
    for byte in range(4):
        nibble = (selector >> u4(4 * byte)) & u4(15)
        value = both[np.arange(len(both)), (nibble & u4(7)).astype(i8)]
        result[:, byte] = np.where(nibble & u4(8), np.where(value & u1(128), u1(255), u1(0)), value)
    return result.view(u4).reshape(-1)


def logic3(a, b, c, table):
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def count_bits(a):
    return np.bitwise_count(a).astype(u4)


def leading_zeros(a):
    bits = a.dtype.itemsize * 8
    return (bits - np.array([int(x).bit_length() for x in a])).astype(u4)


def reverse_bits(a):
    return np.array([int(f"{int(x):0{a.dtype.itemsize * 8}b}"[::-1], 2) for x in a], a.dtype)


def to_bf16(x):
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x).view(u4)
    rounded = ((bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)).astype(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def to_f16(x):
    return x.astype(f2).view(u2)


def from_f16(bits):
    return bits.view(f2).astype(f4)


def pack(low, high):
    return low.astype(u4) | (high.astype(u4) << u4(16))


def halves(operation, kind, pair, *operands):
    """An operation on bf16, f16 (uint16 bits) or two of them in a uint32, by way of float32."""
    read, write = (from_bf16, to_bf16) if kind == "bf16" else (from_f16, to_f16)
    if not pair:
        return write(operation(*(read(operand) for operand in operands)))
    low = write(operation(*(read(operand.astype(u2)) for operand in operands)))
    high = write(operation(*(read((operand >> u4(16)).astype(u2)) for operand in operands)))
    return pack(low, high)


def to_integer(x, dtype, rounding):
    """cvt of float to integer: saturates, and what is not a number becomes 0."""
    rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(f8))
    limits = np.iinfo(dtype)
    clipped = np.clip(np.where(np.isnan(rounded), 0, rounded), float(limits.min), float(limits.max))
    result = clipped.astype(dtype)
    return np.where(clipped >= float(limits.max), dtype(limits.max), result) if dtype(0).itemsize == 8 else result


def not_equal(a, b):
    """Ordered, as setp.ne of floats."""
    return (a != b) & (a == a) & (b == b)
