"""What a training does in a given time, and the matrix product that its speed is held against."""

from __future__ import annotations

import time

import torch

from rc_ray.core.model import LanguageModel


class Meter:
    """Counts from the end of the first step on, until the time is over."""

    def __init__(self, limit_s: float, device: torch.device, *, by_clock: bool) -> None:
        self._limit_s, self._device = limit_s, device
        self._by_clock = by_clock or device.type == "cuda"
        self._start: float | None = None
        self.num_tokens = self.num_titles = self.num_steps = 0
        self.seconds = 0.0

    def start(self) -> None:
        """Count the first step too, which warms nothing up that time is short for."""
        self._start = self._now()

    def step(self, num_tokens: int, num_titles: int) -> bool:
        """Count a finished step; whether the time is over."""
        if self._start is None:
            self.start()
            return False
        self.num_tokens += num_tokens
        self.num_titles += num_titles
        self.num_steps += 1
        self.seconds = self._now() - self._start
        return self.seconds > self._limit_s

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        if self._by_clock:
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()


def product_peak(lm: LanguageModel, *, by_clock: bool) -> float:
    """Floating-point operations per second of a large matrix product, the fastest of several."""
    size = 8192 if lm.device.type == "cuda" else 1536
    x, y = (torch.ones(size, size, dtype=lm.dtype, device=lm.device) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        meter = Meter(0.0, lm.device, by_clock=by_clock)
        meter.start()
        for _ in range(4):
            x @ y
        meter.step(0, 0)
        best = min(best, meter.seconds)
    return 4 * 2 * size**3 / best
