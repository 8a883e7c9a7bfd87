from __future__ import annotations

import numpy as np
import pytest
import torch

from rc_ray.baselines_config import TitleEmbeddingConfig
from rc_ray.core.loading import load_language_model
from rc_ray.core.model import LanguageModel
from rc_ray.core.title_embedding import TitleEmbedding, TitleStates, embed_titles, unit_vectors
from tests.tiny import make_model

TITLES = ["Red Lamp", "Blue River", "Old", "Red Lamp", "A much longer title than the others"]
BOTH = TitleEmbeddingConfig(layers=(0.5, 1.0))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(make_model(tmp_path_factory.mktemp("model")), torch.float32)


def test_a_title_is_the_mean_state_of_its_tokens(lm: LanguageModel) -> None:
    states = embed_titles(lm, TITLES, BOTH)
    assert states.layers == (1, 2)
    assert states.values.shape == (2, 5, 32)
    # Byte tokens, the start token before and the newline behind; equal titles run once.
    assert states.num_tokens == sum(len(title) + 2 for title in set(TITLES))
    for place, title in enumerate(TITLES):
        ids = [lm.tokenizer.bos_token_id, *lm.tokenizer.encode(title + "\n")]
        with torch.no_grad():
            output = lm.model(torch.tensor([ids]), output_hidden_states=True)
        expected = output.hidden_states[1][0, 1:].mean(dim=0).numpy()
        np.testing.assert_allclose(states.values[0, place], expected, atol=1e-4)


def test_batches_and_further_layers_change_nothing(lm: LanguageModel) -> None:
    whole = embed_titles(lm, TITLES, BOTH)
    single = embed_titles(lm, TITLES, BOTH.model_copy(update={"tokens_per_batch": 1}))
    np.testing.assert_allclose(single.values, whole.values, atol=1e-4)
    lower = embed_titles(lm, TITLES, BOTH.model_copy(update={"layers": (0.5,)}))
    np.testing.assert_allclose(lower.values[0], whole.values[0], atol=1e-4)
    np.testing.assert_array_equal(whole.values[:, 0], whole.values[:, 3])


def test_layers_above_the_deepest_one_are_not_run(lm: LanguageModel) -> None:
    ran = []
    layers = lm.model.get_decoder().layers
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)
    ]
    try:
        embed_titles(lm, TITLES, BOTH.model_copy(update={"layers": (0.5,)}))
    finally:
        for hook in hooks:
            hook.remove()
    assert set(ran) == {0}


def test_centred_vectors_have_length_one_and_the_directions_from_the_mean() -> None:
    # The mean is (2, 2); from there the points lie at (2, 0), (-1, 1), (-1, -1).
    found = unit_vectors(np.array([[4, 2], [1, 3], [1, 1]], dtype=np.float32), "centred")
    half = 0.5**0.5
    np.testing.assert_allclose(found, [[1, 0], [-half, half], [-half, -half]], atol=1e-6)


def test_whitening_divides_by_the_deviation_softly() -> None:
    # Variances 4, 1 and 1/4 along the axes, so the median is 1; each point is one axis's own.
    values = np.diag([2.0, 1.0, 0.5]).repeat(2, axis=0) * 3**0.5
    values[1::2] *= -1
    values = np.concatenate([values, [[2.0, 1.0, 0.5], [-2.0, -1.0, -0.5]]]) + 7.0
    # Of 8 points: 2 * (3 + 1) * sigma^2 / 8 = sigma^2; the two last ones tie the axes together.
    covariance = np.cov(values.T, bias=True)
    np.testing.assert_allclose(np.diag(covariance), [4.0, 1.0, 0.25])
    variances, axes = np.linalg.eigh(covariance)
    expected = (values - 7.0) @ axes / np.sqrt(variances + np.median(variances))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = unit_vectors(values.astype(np.float32), "whitened")
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)
    # A strong axis no longer drowns the others.
    plain = unit_vectors(values.astype(np.float32), "centred")
    assert found[6] @ found[0] < plain[6] @ plain[0] - 0.1


def test_whitening_stands_fewer_titles_than_dimensions() -> None:
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    found = unit_vectors(values, "whitened")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    alone = unit_vectors(values[:1], "whitened")
    assert (alone == 0.0).all()


def test_the_score_is_the_cosine_with_the_recency_weighted_mean() -> None:
    items = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    scores = TitleEmbedding(items, decay=0.5).scores([(0,), (0, 1), (1, 1, 0), ()])
    root = 1.25**0.5
    np.testing.assert_allclose(
        scores,
        [
            [1, 0, -1],
            [0.5 / root, 1 / root, -0.5 / root],  # half of item 0 and all of item 1
            [1 / 1.5625**0.5, 0.75 / 1.5625**0.5, -1 / 1.5625**0.5],
            [0, 0, 0],
        ],
        atol=1e-6,
    )
    assert scores.dtype == np.float32


def test_validation_chooses_layer_and_decay() -> None:
    # In the second layer 0 and 1 lie together, and 2 and 3 do; in the first one 0 and 2 do.
    alike = np.array([[[0, 1], [1, 0], [0, 1.1], [1.1, 0]], [[0, 1], [0, 1.1], [1, 0], [1.1, 0]]])
    states = TitleStates((3, 6), alike.astype(np.float32), num_tokens=0)
    config = TitleEmbeddingConfig(transforms=("centred",), decays=(1.0, 0.5))
    chosen = TitleEmbedding.fit(states, config, [((0,), 1), ((0, 2), 3), ((2, 0), 1)])
    assert chosen.chosen == {
        "layer": 6,
        "transform": "centred",
        "decay": 0.5,
        "valid_ndcg": 1.0,
    }
