from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rc_ray.baselines_config import SasrecConfig
from rc_ray.core.histories import Histories
from rc_ray.core.sasrec import WEIGHTS_FILE, Sasrec, _batches, train_sasrec
from rc_ray.core.self_attention import SelfAttention, full_softmax_loss
from rc_ray.errors import ArtifactError

SMALL = SasrecConfig(
    hidden_size=16, num_layers=2, num_heads=2, dropout=0.1, max_length=8, batch_size=16
)


def network(seed: int = 0, num_items: int = 12) -> SelfAttention:
    torch.manual_seed(seed)
    made = SelfAttention(num_items, SMALL).eval()
    with torch.no_grad():  # weights of the initial size would hide a leak in rounding errors
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def cycles(num: int = 60, length: int = 7) -> list[tuple[int, ...]]:
    return [tuple((start + step) % 3 for step in range(length)) for start in range(num)]


def test_later_items_do_not_change_earlier_states() -> None:
    made = network()
    before = made(torch.tensor([[3, 1, 4, 1, 5]]))
    after = made(torch.tensor([[3, 1, 4, 9, 2]]))
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().max() > 0.01


def test_earlier_items_and_their_order_do_change_later_states() -> None:
    made = network()
    last = made(torch.tensor([[3, 1, 4], [1, 3, 4], [7, 1, 4]]))[:, -1]
    assert (last[0] - last[1]).abs().max() > 0.01
    assert (last[0] - last[2]).abs().max() > 0.01


def test_padding_on_the_left_changes_nothing() -> None:
    made = network()
    bare = made(torch.tensor([[3, 1, 4]]))
    padded = made(torch.tensor([[-1, -1, -1, 3, 1, 4], [0, 1, 2, 3, 4, 5]]))
    torch.testing.assert_close(padded[:1, 3:], bare, rtol=0, atol=1e-6)
    assert torch.isfinite(padded).all()


def test_scores_do_not_depend_on_who_is_scored_beside() -> None:
    model = Sasrec(network(), np.ones(12, dtype=np.int64), SMALL)
    histories = [(3, 1, 4), (2,), (), tuple(range(12)), (5, 6)]
    together = model.scores(histories)
    alone = np.concatenate([model.scores([history]) for history in histories])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # The latest `max_length` items are read and no other.
    np.testing.assert_allclose(together[3], model.scores([tuple(range(4, 12))])[0], atol=1e-5)


@pytest.mark.parametrize("max_logits", [1, 5 * 7, 3 * 7 + 1, 10**6])
def test_the_loss_is_the_full_softmax_in_value_and_gradient_whatever_the_chunks(
    max_logits: int,
) -> None:
    torch.manual_seed(1)
    states = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (11,))
    probabilities = torch.exp(states @ items.T)
    probabilities = probabilities / probabilities.sum(dim=1, keepdim=True)
    expected = -torch.log(probabilities[torch.arange(11), targets]).sum()
    wanted = torch.autograd.grad(3.0 * expected, (states, items))
    loss = full_softmax_loss(states, items, targets, max_logits)
    found = torch.autograd.grad(3.0 * loss, (states, items))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)


def test_the_reported_loss_is_the_mean_over_all_items_but_the_first() -> None:
    # A learning rate that changes nothing and no dropout: the loss of the untouched network.
    config = SMALL.model_copy(
        update={"dropout": 0.0, "learning_rate": 1e-12, "max_rounds": 1, "min_round_steps": 1}
    )
    train = [(0, 1, 2), (3,), (4, 5, 6, 7)]
    rounds = train_sasrec(train, 9, config, [], seed=0)
    found = next(rounds)["loss"]
    with pytest.raises(StopIteration) as end:
        next(rounds)
    model = end.value.value.network
    losses = []
    for history in train:
        for place in range(1, len(history)):
            logits = model(torch.tensor([history[:place]]))[0, -1] @ model.items.weight.T
            losses.append(F.cross_entropy(logits, torch.tensor(history[place])).item())
    assert len(losses) == 5
    assert found == pytest.approx(np.mean(losses), rel=1e-5)


def test_every_item_but_the_first_is_a_target_once_an_epoch_with_half_a_row_before_it() -> None:
    rng = np.random.default_rng(0)
    histories = [  # no item twice, so that a target tells its place
        tuple(range(100 * user, 100 * user + int(rng.integers(1, 40)))) for user in range(50)
    ]
    for epoch in (0, 1):
        found: list[tuple[tuple[int, ...], int]] = []
        for rows, targets in _batches(Histories.of(histories), SMALL, (0, epoch)):
            assert rows.shape == targets.shape
            assert rows.shape[1] <= SMALL.max_length
            for row, wanted in zip(rows, targets, strict=True):
                for place in np.flatnonzero(wanted >= 0):
                    seen = row[: place + 1]
                    found.append((tuple(seen[seen >= 0].tolist()), int(wanted[place])))
        places = {(one[-1], target): one for one, target in found}
        assert len(places) == len(found) == sum(len(one) - 1 for one in histories)
        for history in histories:
            for place in range(1, len(history)):
                seen = places[history[place - 1], history[place]]
                assert seen == history[place - len(seen) : place]
                assert len(seen) >= min(place, SMALL.max_length // 2)


def test_a_cycle_is_learned() -> None:
    config = SMALL.model_copy(update={"learning_rate": 3e-3, "max_rounds": 10})
    model = Sasrec.fit(cycles(), 5, config, [], seed=0)
    starts = [(0,), (1,), (2,), (0, 1), (1, 2, 0), (2, 0, 1, 2)]
    best = model.scores(starts).argmax(axis=1)
    assert best.tolist() == [(history[-1] + 1) % 3 for history in starts]


def test_items_never_learned_tie_below_all_others() -> None:
    config = SMALL.model_copy(update={"max_rounds": 1})
    scores = Sasrec.fit(cycles(), 6, config, [], seed=0).scores([(0, 1), ()])
    assert (scores[:, 3:] == scores[:, 3:4]).all()
    assert (scores[:, 3] < scores[:, :3].min(axis=1)).all()


def test_the_same_seed_gives_the_same_model_and_leaves_the_callers_chance_alone() -> None:
    config = SMALL.model_copy(update={"max_rounds": 2})
    valid = [((0, 1), 2)]
    torch.manual_seed(5)
    first = Sasrec.fit(cycles(), 4, config, valid, seed=1).scores([(0,)])
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    again = Sasrec.fit(cycles(), 4, config, valid, seed=1).scores([(0,)])
    other = Sasrec.fit(cycles(), 4, config, valid, seed=2).scores([(0,)])
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_best_round_is_kept_and_training_ends_without_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9])
    monkeypatch.setattr("rc_ray.core.sasrec.catalogue_ndcg", lambda *_: next(values))
    fields = {"patience": 3, "max_rounds": 30, "learning_rate": 1e-2, "min_round_steps": 6}
    config = SMALL.model_copy(update=fields)
    rounds = train_sasrec(cycles(), 5, config, [((0, 1), 2)], seed=0)
    found = []
    while True:
        try:
            found.append(next(rounds))
        except StopIteration as end:
            model = end.value
            break
    assert [one["valid_ndcg"] for one in found] == [0.1, 0.3, 0.2, 0.3, 0.1]
    # 60 pieces make epochs of 4 steps, and a round is whole epochs.
    assert [one["step"] for one in found] == [8, 16, 24, 32, 40]
    assert model.chosen == {"step": 16, "valid_ndcg": 0.3}
    until_then = Sasrec.fit(cycles(), 5, config.model_copy(update={"max_rounds": 2}), [], seed=0)
    np.testing.assert_array_equal(model.scores([(0,)]), until_then.scores([(0,)]))


def test_a_model_is_the_same_from_disk(tmp_path: Path) -> None:
    model = Sasrec(network(), np.array([1] * 11 + [0]), SMALL, {"step": 3, "valid_ndcg": 0.5})
    model.save(tmp_path / "sasrec")
    again = Sasrec.load(tmp_path / "sasrec")
    assert again.config == SMALL
    assert again.chosen == model.chosen
    np.testing.assert_array_equal(again.scores([(1, 2)]), model.scores([(1, 2)]))


@pytest.mark.parametrize("harm", ["missing", "cut", "shape"])
def test_a_damaged_model_is_refused_in_one_line(tmp_path: Path, harm: str) -> None:
    Sasrec(network(), np.ones(12, dtype=np.int64), SMALL).save(tmp_path / "sasrec")
    path = tmp_path / "sasrec" / WEIGHTS_FILE
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        other = SMALL.model_copy(update={"hidden_size": 8})
        Sasrec(SelfAttention(12, other), np.ones(12, dtype=np.int64), SMALL).save(
            tmp_path / "sasrec"
        )
    with pytest.raises(ArtifactError, match=r"sasrec\.safetensors") as error:
        Sasrec.load(tmp_path / "sasrec")
    assert "\n" not in str(error.value)


def test_histories_of_one_item_cannot_train() -> None:
    with pytest.raises(ValueError, match="two items"):
        next(train_sasrec([(0,), (1,)], 3, SMALL, [], seed=0))
