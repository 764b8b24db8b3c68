"""Global memory, as ranges of host buffers, and the shared memory of a program, with what watches over its use.

Findings are kinds of mistake, each with the PTX line that made it and, where two accesses meet, the other one's. What is looked for in
shared memory, by byte:

- a race: written by one warp and read or written by another without a barrier in between;
- cp.async in flight: touched before the wait that makes it visible (its bytes are poison until then, too);
- wgmma in flight: written while a matrix instruction may still read it;
- async proxy: read by wgmma after ordinary stores (or cp.async) without fence.proxy.async;
- what was never written.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable

import numpy as np

from .bank_conflicts import BankConflicts

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SHARED_BASE = 1024  # shared addresses begin here, as on Hopper, where the first KiB is the system's: address 0 is a mistake
POISON = 0xFF  # of bytes: not a number in float32, float16 and bfloat16


class EmulatedFault(RuntimeError):
    """What would stop the kernel on a GPU: an address outside of every buffer, or one that is not aligned."""


class GlobalMemory:
    """Buffers by address, for one launch. `add` takes the bytes of a host buffer (writable), `load` and `store` addresses of one access per
    thread.

    Programs run in no order: what one of them writes, another may neither read nor write.
    """

    def __init__(self) -> None:
        self.bases: list[int] = []
        self.buffers: list[tuple[int, np.ndarray, str]] = []
        self.program = 0  # the one that runs, from 1
        # By base, of each byte: the program that wrote it, the one that read it (several: -1).
        self.writers: dict[int, np.ndarray] = {}
        self.readers: dict[int, np.ndarray] = {}

    def add(self, address: int, data: np.ndarray, name: str) -> None:
        """data: uint8. A range inside one that is known already is that one."""
        assert address % 16 == 0, "a buffer that is not aligned as a GPU's are"
        place = bisect.bisect_right(self.bases, address)
        if place and address + len(data) <= self.buffers[place - 1][0] + len(self.buffers[place - 1][1]):
            return
        if len(data):
            self.bases.insert(place, address)
            self.buffers.insert(place, (address, data, name))
            self.writers[address], self.readers[address] = np.zeros(len(data), np.int32), np.zeros(len(data), np.int32)

    def contents(self) -> list[np.ndarray]:
        """A copy of all bytes."""
        return [data.copy() for _, data, _ in self.buffers]

    def put_back(self, contents: list[np.ndarray]) -> None:
        for (address, data, _), kept in zip(self.buffers, contents, strict=True):
            data[:] = kept
            self.writers[address][:] = self.readers[address][:] = 0
        self.program = 0

    def _find(self, addresses: np.ndarray, size: int, what: str) -> list[tuple[np.ndarray | slice, int, np.ndarray]]:
        """(which of the addresses, the buffer's base, its bytes)."""
        if (addresses & np.uint64(size - 1)).any():
            raise EmulatedFault(f"misaligned {what} of {size} bytes at {int(addresses[addresses % size != 0][0]):#x}")
        place = bisect.bisect_right(self.bases, int(addresses[0])) - 1
        if place >= 0:
            base, data, _ = self.buffers[place]
            if int(addresses.min()) >= base and int(addresses.max()) + size <= base + len(data):
                return [(slice(None), base, data)]
        places = np.searchsorted(np.array(self.bases, np.uint64), addresses, "right").astype(np.int64) - 1
        found = []
        for place in np.unique(places):
            which = np.nonzero(places == place)[0]
            base, data, name = self.buffers[max(place, 0)]
            end = base + len(data)
            outside = which if place < 0 else which[addresses[which] + np.uint64(size) > np.uint64(end)]
            if len(outside):
                address = int(addresses[outside[0]])
                raise EmulatedFault(
                    f"{what} out of bounds: thread {outside[0]} of those active, and {len(outside) - 1} more; "
                    f"address {address:#x}, {size} bytes; nearest is {name} at {base:#x} to {end:#x} ({address - end:+d} from its end)"
                )
            found.append((which, base, data))
        return found

    def load(self, addresses: np.ndarray, width: int, count: int, what: str, line: int, findings: Findings) -> np.ndarray:
        """(threads, count) of `width` bytes each."""
        size = width * count
        result = np.empty((len(addresses), count), UNSIGNED[width])
        for which, base, data in self._find(addresses, size, what):
            index = (addresses[which] - np.uint64(base)).astype(np.int64) // size
            if self._others(_rows(self.writers[base], size)[index]).any():
                findings.add("race: global memory is read that another program writes", line)
            readers = _rows(self.readers[base], size)
            readers[index] = np.where(self._others(readers[index]), -1, self.program)
            result[which] = _rows(data, size)[index].view(UNSIGNED[width])
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, what: str, line: int, findings: Findings) -> None:
        """values: (threads, count)."""
        size = values.dtype.itemsize * values.shape[1]
        for which, base, data in self._find(addresses, size, what):
            index = (addresses[which] - np.uint64(base)).astype(np.int64) // size
            for verb, programs in (("writes", self.writers[base]), ("reads", self.readers[base])):
                if self._others(_rows(programs, size)[index]).any():
                    findings.add(f"race: global memory is written that another program {verb}", line)
            _rows(self.writers[base], size)[index] = self.program
            _rows(data, size)[index] = np.ascontiguousarray(values[which]).view(np.uint8)

    def _others(self, programs: np.ndarray) -> np.ndarray:
        return (programs != 0) & (programs != self.program)


def _rows(array: np.ndarray, size: int) -> np.ndarray:
    """One element for each byte, by what an access of that many bytes takes. What is left over at the end, none can take: it is aligned."""
    return array[: len(array) // size * size].reshape(-1, size)


class Findings:
    """What was found, each (kind, PTX line, other PTX line or 0) once, with a count and a first example."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int, int]] = Counter()
        self.examples: dict[tuple[str, int, int], str] = {}

    def add(self, kind: str, line: int, other: int = 0, example: str = "", count: int = 1) -> None:
        self.counts[kind, line, other] += count
        self.examples.setdefault((kind, line, other), example)

    def kinds(self) -> set[str]:
        return {kind for kind, _, _ in self.counts}

    def report(self, place: Callable[[int], str]) -> dict[str, str]:
        """By kind: how often, at how many pairs of PTX lines, and the first of these, which `place` describes."""
        lines = {}
        for found in sorted(self.kinds()):
            pairs = [pair for pair in self.counts if pair[0] == found]
            (_, line, other), total = pairs[0], sum(self.counts[pair] for pair in pairs)
            where = (f", first at {place(line)}" if line else "") + (f" after {place(other)}" if other else "")
            lines[found] = f"{found}: {total} x at {len(pairs)} places{where} [{self.examples[pairs[0]]}]"
        return lines


class SharedMemory:
    """The bytes of one program. Addresses are those the kernel sees.

    Every access is an (n,) array of addresses, all of one width (1, 2, 4, 8 or 16 bytes), and the warp of each.
    """

    def __init__(self, size: int, warps: int, findings: Findings, conflicts: BankConflicts | None = None) -> None:
        self.size = -(-size // 1024) * 1024
        self.given = size
        self.warps, self.findings, self.conflicts = warps, findings, conflicts
        self.bytes = np.full(self.size, POISON, np.uint8)
        self.writer = np.zeros(self.size, np.uint8)  # 1 + warp; of this barrier interval
        self.readers = np.zeros((warps, self.size), np.uint8)
        self.written = np.zeros(self.size, np.uint8)
        self.copying = np.zeros(self.size, np.uint8)  # by cp.async, not waited for
        self.multiplying = np.zeros(self.size, np.uint8)  # read by wgmma, not waited for
        self.dirty = np.zeros(self.size, np.uint8)  # by an ordinary store 1, by cp.async 2, without fence.proxy.async
        self.write_line = np.zeros(self.size // 4, np.int32)
        self.read_line = np.zeros(self.size // 4, np.int32)
        self.copies = self.multiplications = 0
        self._ones = {width: UNSIGNED[min(width, 8)](0x0101010101010101 >> 64 - 8 * min(width, 8)) for width in (1, 2, 4, 8, 16)}

    def _index(self, addresses: np.ndarray, width: int, warp: np.ndarray, line: int) -> np.ndarray:
        if self.conflicts is not None:
            self.conflicts.add(addresses, width, warp, line)
        index = addresses.astype(np.int64) - SHARED_BASE
        if len(index) and (int(index.min()) < 0 or int(index.max()) + width > self.given):
            raise EmulatedFault(f"PTX line {line}: shared address {int(index.min())} to {int(index.max()) + width} of {self.given} bytes")
        if (index & (width - 1)).any():
            raise EmulatedFault(f"PTX line {line}: misaligned shared access of {width} bytes")
        return index // width

    def _words(self, array: np.ndarray, width: int) -> np.ndarray:
        """As elements of `width` bytes, along the last axis; 16 bytes as two numbers of 8."""
        if width == 16:
            return array.view(np.uint64).reshape(*array.shape[:-1], -1, 2)
        return array.view(UNSIGNED[width])

    def load(self, addresses: np.ndarray, width: int, warp: np.ndarray, line: int) -> np.ndarray:
        """(n, width) bytes."""
        index = self._index(addresses, width, warp, line)
        self.reading(index, width, warp, line)
        return self.bytes.reshape(-1, width)[index]

    def store(self, addresses: np.ndarray, values: np.ndarray, warp: np.ndarray, line: int) -> None:
        """values: (n, width) bytes."""
        width = values.shape[1]
        index = self._index(addresses, width, warp, line)
        rows = self.bytes.reshape(-1, width)
        rows[index] = values
        self.writing(index, width, warp, line)
        lost = (rows[index] != values).any(1)
        if lost.any() and width >= 4:  # a GPU has one NaN, numpy several
            both_nan = np.isnan(rows[index].view(np.float32)) & np.isnan(values.view(np.float32))
            lost = ~(both_nan | (rows[index].view(np.uint32) == values.view(np.uint32))).all(1)
        if lost.any():
            example = f"thread {int(np.argmax(lost))} of those active"
            self.findings.add("two threads store different values at once", line, 0, example, int(lost.sum()))

    def reading(self, index: np.ndarray, width: int, warp: np.ndarray, line: int) -> None:
        own = (warp + 1).astype(self._ones[width].dtype) * self._ones[width]
        own = own[:, None] if width == 16 else own
        writer = self._words(self.writer, width)[index]
        if ((writer != 0) & (writer != own)).any():
            self._conflict("race: read after another warp's write", index, width, warp, line, self.write_line)
        if self.copies and self._words(self.copying, width)[index].any():
            self._report("cp.async in flight: read before its wait", index, width, line, self.copying, self.write_line)
        written = self._words(self.written, width)[index]
        if (written != self._ones[width]).any():
            self._report("read of what was never written", index, width, line, 1 - self.written, self.write_line)
        flat = warp.astype(np.int64) * (self.size // width) + index
        self._words(self.readers.reshape(-1), width)[flat] = self._ones[width]
        self.read_line[index if width == 4 else index * width // 4] = line

    def writing(self, index: np.ndarray, width: int, warp: np.ndarray, line: int, kind: int = 1) -> None:
        ones = self._ones[width]
        own = (warp + 1).astype(ones.dtype) * ones
        own = own[:, None] if width == 16 else own
        view = self._words(self.writer, width)
        writer = view[index]
        if ((writer != 0) & (writer != own)).any():
            self._conflict("race: write after another warp's write", index, width, warp, line, self.write_line)
        read = self._words(self.readers, width)[:, index] != 0
        others = np.arange(self.warps)[:, None] != warp
        if (read & (others[..., None] if width == 16 else others)).any():
            self._report_write_after_read(index, width, warp, line)
        if self.copies and self._words(self.copying, width)[index].any():
            self._report("cp.async in flight: written before its wait", index, width, line, self.copying, self.write_line)
        if self.multiplications and self._words(self.multiplying, width)[index].any():
            self._report("wgmma in flight: its operand is written before the wait", index, width, line, self.multiplying, self.read_line)
        view[index] = own
        self._words(self.written, width)[index] = ones
        self._words(self.dirty, width)[index] = ones * ones.dtype.type(kind)
        self.write_line[index if width == 4 else index * width // 4] = line
        if width > 4:
            for part in range(1, width // 4):
                self.write_line[index * (width // 4) + part] = line

    def _bytes_of(self, index: np.ndarray, width: int) -> np.ndarray:
        return index[:, None] * width + np.arange(width)

    def _conflict(self, kind: str, index: np.ndarray, width: int, warp: np.ndarray, line: int, lines: np.ndarray) -> None:
        places = self._bytes_of(index, width)
        writer = self.writer[places]
        bad = (writer != 0) & (writer != (warp + 1)[:, None])
        for other in np.unique(lines[places[bad] // 4]) if bad.any() else ():
            which = bad & (lines[places // 4] == other)
            lane, byte = np.argwhere(which)[0]
            example = f"byte {places[lane, byte]} of shared memory, warps {writer[lane, byte] - 1} and {warp[lane]}"
            self.findings.add(kind, line, int(other), example, int(which.sum()))

    def _report_write_after_read(self, index: np.ndarray, width: int, warp: np.ndarray, line: int) -> None:
        places = self._bytes_of(index, width)
        read = (self.readers[:, places] != 0) & (np.arange(self.warps)[:, None, None] != warp[:, None])
        other, lane, byte = np.argwhere(read)[0]
        example = f"byte {places[lane, byte]} of shared memory, warps {other} and {warp[lane]}"
        last = int(self.read_line[places[lane, byte] // 4])
        self.findings.add("race: write after another warp's read", line, last, example, int(read.sum()))

    def _report(self, kind: str, index: np.ndarray, width: int, line: int, flags: np.ndarray, lines: np.ndarray) -> None:
        places = self._bytes_of(index, width)
        lane, byte = np.argwhere(flags[places] != 0)[0]
        place = places[lane, byte]
        self.findings.add(kind, line, int(lines[place // 4]), f"byte {place} of shared memory", int((flags[places] != 0).sum()))

    def barrier(self) -> None:
        self.writer[:] = 0
        self.readers[:] = 0

    # cp.async: `begin` when issued, `finish` at the wait.

    def begin_copy(self, addresses: np.ndarray, width: int, warp: np.ndarray, line: int) -> np.ndarray:
        index = self._index(addresses, width, warp, line)
        self.bytes.reshape(-1, width)[index] = POISON
        self.writing(index, width, warp, line, 2)
        self._words(self.copying, width)[index] = self._ones[width]
        self.copies += 1
        return index

    def finish_copy(self, index: np.ndarray, values: np.ndarray, warp: np.ndarray, line: int) -> None:
        """values: (n, width) bytes."""
        width = values.shape[1]
        self.bytes.reshape(-1, width)[index] = values
        self.copies -= 1
        self._words(self.copying, width)[index] = 0
        self.writing(index, width, warp, line, 2)

    # wgmma reads through the async proxy, all warps of a group together.

    def begin_multiply(self, rows: np.ndarray, warps: range, line: int) -> None:
        """rows: which 16-byte rows of shared memory, each once."""
        for warp in warps:  # what one warp of the group wrote, the others read too: as if each read everything
            self.reading(rows, 16, np.full(len(rows), warp), line)
        dirty = self._words(self.dirty, 16)[rows]
        if dirty.any():
            flags = self.dirty[self._bytes_of(rows, 16)]
            for number, name in ((1, "a store"), (2, "cp.async")):
                if (flags == number).any():
                    kind, mask = f"async proxy: wgmma reads what {name} wrote, without fence.proxy.async", self.dirty == number
                    self._report(kind, rows, 16, line, mask, self.write_line)
        self._words(self.multiplying, 16)[rows] += self._ones[16]
        self.multiplications += 1

    def finish_multiply(self, rows: np.ndarray, warps: range, line: int) -> None:
        self._words(self.multiplying, 16)[rows] -= self._ones[16]
        self.multiplications -= 1
        for warp in warps:
            self._words(self.readers[warp], 16)[rows] = self._ones[16]
        self.read_line[rows * 4] = line

    def fence_proxy(self) -> None:
        self.dirty[:] = 0
