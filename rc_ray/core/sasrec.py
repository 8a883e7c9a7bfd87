"""SASRec: self-attention over the items of a history (Kang and McAuley 2018, arXiv 1808.09781).

Trained with the full softmax cross-entropy over the catalogue instead of one sampled negative,
which decides whether SASRec is strong ("Turning Dross Into Gold Loss", arXiv 2309.07602). Rows are
as long as the longest of their batch, and batches are made of pieces of near equal length, for most
histories are short.

Letters: N users, I items, B rows, T items of a row, H hidden size, P supervised places.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rc_ray import artifacts
from rc_ray.baselines_config import SasrecConfig
from rc_ray.core.baselines import Case, Scores, catalogue_ndcg, log_popularity, valid_sample
from rc_ray.core.histories import Histories
from rc_ray.core.self_attention import SelfAttention, full_softmax_loss
from rc_ray.errors import ArtifactError

CONFIG_FILE = "sasrec.json"
WEIGHTS_FILE = "sasrec.safetensors"
_ROWS_PER_PASS = 512
_POOLED_BATCHES = 32
"""Batches whose rows are sorted by length together."""

Counts = npt.NDArray[np.int64]


class SasrecMetrics(TypedDict):
    """What one round of training leaves."""

    step: int
    """Optimiser steps done."""
    loss: float
    """Mean negative log-likelihood of the round, nats per item."""
    valid_ndcg: float
    """NDCG@10 over the whole catalogue, 0 without validation cases."""
    seconds: float


class Sasrec:
    """A trained SASRec.

    Args:
        network: its weights.
        num_train: (I,) training interactions; items without any were never learned.
        config: as it was trained.
        chosen: where training stopped, for the record.
    """

    def __init__(
        self,
        network: SelfAttention,
        num_train: Counts,
        config: SasrecConfig,
        chosen: dict[str, Any] | None = None,
    ) -> None:
        self.network = network.eval()
        self.num_train = num_train
        self.config = config
        self.chosen = dict(chosen or {})

    @classmethod
    def fit(
        cls,
        train: Sequence[Sequence[int]],
        num_items: int,
        config: SasrecConfig,
        valid: Sequence[Case],
        *,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> Sasrec:
        """Run `train_sasrec` to its end."""
        rounds = train_sasrec(train, num_items, config, valid, seed=seed, device=device)
        while True:
            try:
                next(rounds)
            except StopIteration as end:
                model: Sasrec = end.value
                return model

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[int]]) -> Scores:
        """(N, I) logits of the next item; an empty history gets the log of popularity."""
        packed = Histories.of(histories)
        lengths = np.minimum(packed.lengths, self.config.max_length)
        table = np.empty((len(packed), len(self.num_train)), dtype=np.float32)
        table[lengths == 0] = log_popularity(self.num_train)
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        device = self.network.items.weight.device
        for start in range(0, len(order), _ROWS_PER_PASS):
            users = order[start : start + _ROWS_PER_PASS]
            ends = packed.offsets[users + 1]
            width = int(lengths[users].max())
            rows = _padded(packed.values, ends - lengths[users], ends, width)
            last = self.network(torch.from_numpy(rows).to(device))[:, -1]  # (B, H)
            table[users] = (last @ self.network.items.weight.T).cpu().numpy()
        unknown = self.num_train == 0
        if unknown.any() and not unknown.all():
            table[:, unknown] = table[:, ~unknown].min(axis=1, keepdims=True) - 1.0
        return table

    def save(self, folder: Path) -> None:
        """Write `sasrec.safetensors` and `sasrec.json` into a folder, which appears whole."""
        with artifacts.replaced_dir(folder) as work:
            tensors = {
                name: tensor.detach().cpu().contiguous()
                for name, tensor in self.network.state_dict().items()
            }
            save_file(
                {**tensors, "num_train": torch.from_numpy(self.num_train)}, work / WEIGHTS_FILE
            )
            artifacts.write_json(
                work / CONFIG_FILE,
                {"config": self.config.model_dump(mode="json"), "chosen": self.chosen},
            )

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> Sasrec:
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing, damaged or of another shape.
        """
        settings = artifacts.read_json(folder / CONFIG_FILE)
        try:
            config = SasrecConfig.model_validate(settings["config"])
            tensors = load_file(folder / WEIGHTS_FILE)
            num_train = tensors.pop("num_train").numpy()
            network = SelfAttention(len(num_train), config)
            network.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ArtifactError(
                f"{folder / WEIGHTS_FILE}: missing, damaged or not of this model ({said}); "
                "train it again"
            ) from None
        return cls(network.to(device), num_train, config, settings.get("chosen"))


def train_sasrec(
    train: Sequence[Sequence[int]],
    num_items: int,
    config: SasrecConfig,
    valid: Sequence[Case],
    *,
    seed: int,
    device: str | torch.device = "cpu",
) -> Generator[SasrecMetrics, None, Sasrec]:
    """Train on every item of the histories but the first, yielding after each round.

    Args:
        train: one history per user, oldest first.
        num_items: I.
        config: sizes, optimiser and when to stop.
        valid: histories with their next items; their NDCG@10 over the whole catalogue decides which
            round's weights are kept and when to stop. Where empty the last round's are kept.
        seed: of weights, batches and dropout.
        device: where the network runs.

    Returns:
        The best model, as the generator's value.

    Raises:
        ValueError: no history has two items.
    """
    histories = Histories.of(train)
    if not (histories.lengths > 1).any():
        raise ValueError("no training history has two items or more")
    num_train = np.bincount(histories.values, minlength=num_items).astype(np.int64)
    cases = valid_sample(valid, config.num_valid_users)
    with _seeded(seed, 0, device):
        network = SelfAttention(num_items, config).to(device)
    optimizer = torch.optim.Adam(
        network.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), fused=True
    )
    best, best_ndcg, best_step = copy.deepcopy(network.state_dict()), -1.0, 0
    step = epoch = num_worse = 0
    for round_ in range(config.max_rounds):
        start = time.perf_counter()
        first_step, total, num_targets = step, 0.0, 0
        network.train()
        with _seeded(seed, round_ + 1, device):
            while step == first_step or step - first_step < config.min_round_steps:
                for rows, targets in _batches(histories, config, (seed, epoch)):
                    loss, num = _step(network, optimizer, rows, targets, config, device)
                    total, num_targets, step = total + loss, num_targets + num, step + 1
                epoch += 1
        model = Sasrec(network, num_train, config)
        value = catalogue_ndcg(model.scores, cases, num_items) if cases else 0.0
        num_worse += 1
        if value > best_ndcg or not cases:
            best, best_ndcg, best_step = copy.deepcopy(network.state_dict()), value, step
            num_worse = 0
        yield SasrecMetrics(
            step=step,
            loss=total / num_targets,
            valid_ndcg=value,
            seconds=time.perf_counter() - start,
        )
        if num_worse >= config.patience:
            break
    network.load_state_dict(best)
    chosen = {"step": best_step, "valid_ndcg": best_ndcg if cases else None}
    return Sasrec(network, num_train, config, chosen)


def _step(
    network: SelfAttention,
    optimizer: torch.optim.Optimizer,
    rows: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    config: SasrecConfig,
    device: str | torch.device,
) -> tuple[float, int]:
    """One optimiser step on (B, T) rows and targets, -1 where none: the summed loss and P."""
    wanted = torch.from_numpy(targets).to(device)
    states = network(torch.from_numpy(rows).to(device))[wanted >= 0]  # (P, H)
    items = wanted[wanted >= 0]
    loss = full_softmax_loss(states, network.items.weight, items, config.max_logits)
    optimizer.zero_grad(set_to_none=True)
    (loss / len(items)).backward()
    optimizer.step()
    return float(loss.detach()), len(items)


def _batches(
    histories: Histories, config: SasrecConfig, seed: tuple[int, int]
) -> Generator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]], None, None]:
    """All pieces of all histories once, in batches of near equal length: rows and targets."""
    rng = np.random.default_rng(seed)
    starts, firsts, ends = _pieces(histories, config.max_length, rng)
    order = rng.permutation(len(starts))
    pool = config.batch_size * _POOLED_BATCHES
    batches = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort((ends - starts)[part], kind="stable")]
        batches += [
            part[at : at + config.batch_size] for at in range(0, len(part), config.batch_size)
        ]
    for number in rng.permutation(len(batches)):
        chosen = batches[number]
        width = int((ends - starts)[chosen].max())
        rows = _padded(histories.values, starts[chosen], ends[chosen], width)
        yield rows, _padded(histories.values, firsts[chosen] + 1, ends[chosen] + 1, width)


def _pieces(
    histories: Histories, max_length: int, rng: np.random.Generator
) -> tuple[Counts, Counts, Counts]:
    """Ranges of `values`: where reading starts, the first place with a target, where both end.

    The target of a place is the item after it; every item but a history's first is a target once.
    A history longer than a row is cut at places that change with every epoch. Its pieces overlap by
    half a row, for a target right after a cut would have no history, as no user in use has.
    """
    begins, lengths = histories.offsets[:-1], histories.lengths - 1  # the last one is not read
    short = (lengths > 0) & (lengths <= max_length)
    starts, firsts, ends = [begins[short]], [begins[short]], [begins[short] + lengths[short]]
    stride = (max_length + 1) // 2
    for row in np.flatnonzero(lengths > max_length):
        cuts = np.arange(max_length - int(rng.integers(stride)), lengths[row], stride)
        edges = np.concatenate([[0], cuts, [lengths[row]]])
        starts.append(np.maximum(edges[1:] - max_length, 0) + begins[row])
        firsts.append(edges[:-1] + begins[row])
        ends.append(edges[1:] + begins[row])
    return np.concatenate(starts), np.concatenate(firsts), np.concatenate(ends)


def _padded(
    values: npt.NDArray[np.int32], starts: Counts, ends: Counts, width: int
) -> npt.NDArray[np.int64]:
    """(B, T) the ranges of `values`, right-aligned, -1 before them."""
    places = ends[:, None] - width + np.arange(width)
    rows = values[np.clip(places, 0, len(values) - 1)].astype(np.int64)
    return np.where(places >= starts[:, None], rows, -1)


@contextmanager
def _seeded(seed: int, part: int, device: str | torch.device) -> Iterator[None]:
    """Chance of its own inside the block; the caller's goes on after it as before."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed * 1_000_003 + part)
        yield
