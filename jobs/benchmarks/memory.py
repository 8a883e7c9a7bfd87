"""The highest use of memory of a benchmark's own process."""

from __future__ import annotations

import re
from pathlib import Path

import torch


class Memory:
    """The highest use of memory from now on, in MB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.at_start = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
            self.at_start = self.peak()

    def peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) / 1024
