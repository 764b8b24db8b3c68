"""Wavefronts of shared memory: how many a kernel's accesses take, and how many of them only because threads meet in a bank."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .parser import Kernel


class BankConflicts:
    """Counts by PTX line, over all programs that ran."""

    def __init__(self) -> None:
        self.programs = 0
        self.wavefronts: Counter[int] = Counter()
        self.needed: Counter[int] = Counter()
        self._known: dict[tuple, tuple[int, int]] = {}

    def add(self, addresses: np.ndarray, width: int, warp: np.ndarray, line: int) -> None:
        """addresses of the active threads in order, bytes of each, its warp."""
        key = width, addresses.tobytes(), warp.tobytes()
        if key not in self._known:
            self._known[key] = wavefronts(addresses, width, warp)
        found, needed = self._known[key]
        self.wavefronts[line] += found
        self.needed[line] += needed

    def report(self, kernel: Kernel) -> list[str]:
        """Of a program: all wavefronts, then those of each line of the kernel's source that takes more than it needs, worst first."""
        programs, extra = max(1, self.programs), self.wavefronts - self.needed
        total, excess = self.wavefronts.total() / programs, extra.total() / programs
        lines = [f"{total:.0f} wavefronts of shared memory a program, {excess:.0f} by bank conflicts"]
        alike: dict[tuple[str, str], list[int]] = {}
        for line in extra:
            alike.setdefault((kernel.instruction(line).source, kernel.instruction(line).opcode), []).append(line)
        for (source, opcode), same in sorted(alike.items(), key=lambda item: -sum(extra[line] for line in item[1])):
            found, more = (sum(counts[line] for line in same) / programs for counts in (self.wavefronts, extra))
            lines.append(f"{found:.0f}, {more:.0f} by conflicts, in {len(same)} {opcode} of {source}, first at line {min(same)}")
        return lines


def wavefronts(addresses: np.ndarray, width: int, warp: np.ndarray) -> tuple[int, int]:
    """Of one access, and without conflicts. Of more than 4 bytes a thread, a warp's threads go in halves or quarters."""
    total = needed = 0
    lanes = 32 if width <= 4 else 128 // width
    for number in np.unique(warp):
        mine = addresses[warp == number].astype(np.int64)
        for start in range(0, len(mine), lanes):
            places = mine[start : start + lanes, None] + np.arange(0, max(width, 4), 4)
            words = np.unique(places >> 2)
            total += int(np.bincount(words % 32).max())
            needed += -(-len(words) // 32)
    return total, needed
