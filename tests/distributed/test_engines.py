"""Every engine gives the same curve and adapter on the same data, and resumes exactly."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rc_ray import zero
from rc_ray.checkpoints import check_model, read_state
from rc_ray.config import Experiment
from rc_ray.core.adapters import Adapter
from rc_ray.core.domains import read_domain
from rc_ray.core.loading import load_language_model
from rc_ray.engines import Learner, build_learner, check_trained
from rc_ray.errors import ArtifactError
from rc_ray.training_config import DeepSpeedConfig

pytestmark = pytest.mark.distributed

ENGINES = [
    DeepSpeedConfig(zero_stage=0),
    DeepSpeedConfig(zero_stage=1),
    DeepSpeedConfig(zero_stage=2),
    DeepSpeedConfig(zero_stage=3),
    DeepSpeedConfig(zero_stage=2, offload="cpu"),
    DeepSpeedConfig(zero_stage=3, offload="cpu"),
]
IDS = [f"zero{e.zero_stage}-{e.offload}" for e in ENGINES]


@pytest.fixture(autouse=True)
def every_matrix_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed keeps matrices below 100,000 elements whole: all of a tiny model."""
    original = zero.deepspeed_settings

    def settings(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(*args, **kwargs)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr(zero, "deepspeed_settings", settings)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A gloo group of this process alone, as a Ray Train worker would find one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }.items():
            patch.setenv(name, value)
        patch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


def learner(
    experiment: Experiment,
    deepspeed: DeepSpeedConfig | None,
    *,
    dtype: torch.dtype = torch.float32,
    checkpoint: Path | None = None,
) -> Learner:
    data = experiment.run_dir / "data"
    with zero.sharded_loading(
        deepspeed, experiment.train, dtype=dtype, world_size=1, use_gpu=False
    ):
        lm = load_language_model(experiment.model.path, dtype)
    return build_learner(
        lm,
        [read_domain(data / name) for name in experiment.data.spirit],
        experiment.train,
        seed=experiment.seed,
        num_listed=experiment.data.num_negatives,
        base_name="tiny",
        deepspeed=deepspeed,
        checkpoint=checkpoint,
    )


def curve(trained: Learner) -> list[float]:
    return [metrics["loss"] for metrics in trained.steps()]


def assert_same(a: Adapter, b: Adapter, tolerance: float = 0.0) -> None:
    assert a.modules.keys() == b.modules.keys()
    for name, pair in a.modules.items():
        torch.testing.assert_close(pair.a, b.modules[name].a, atol=tolerance, rtol=0)
        torch.testing.assert_close(pair.b, b.modules[name].b, atol=tolerance, rtol=0)
        assert pair.scale == b.modules[name].scale


@pytest.mark.parametrize("deepspeed", ENGINES, ids=IDS)
def test_deepspeed_trains_as_torch_does(make_run, deepspeed: DeepSpeedConfig) -> None:
    experiment = make_run("train.learning_rate=0.01")
    plain, sharded = learner(experiment, None), learner(experiment, deepspeed)
    expected, got = curve(plain), curve(sharded)
    assert len(expected) == experiment.train.num_steps
    assert expected[-1] < expected[0]
    assert got == pytest.approx(expected, abs=5e-5)
    adapter = sharded.adapter()
    check_trained(adapter, Path())
    assert_same(plain.adapter(), adapter, tolerance=5e-5)


@pytest.mark.parametrize("deepspeed", [None, *ENGINES[1:4:2]], ids=["torch", *IDS[1:4:2]])
def test_a_step_in_parts_is_the_whole_step(
    make_run, tmp_path: Path, deepspeed: DeepSpeedConfig | None
) -> None:
    # Half of the steps are clipped: Adam alone would forgive a wrong scale.
    settings = ("train.learning_rate=0.01", "train.max_grad_norm=1.6")
    whole = learner(make_run(*settings), None)
    expected = curve(whole)
    experiment = make_run(*settings, "train.micro_batch_size=1")
    parts = learner(experiment, deepspeed)
    got = []
    for metrics in parts.steps():
        got.append(metrics["loss"])
        if metrics["step"] == 1:
            parts.save(tmp_path / "checkpoint", 2)
    assert got == pytest.approx(expected, abs=5e-5)
    # Sums in another order: Adam makes steps of 1e-2 of what rounding leaves of tiny gradients.
    assert_same(whole.adapter(), parts.adapter(), tolerance=5e-5)
    # A run that fits no more goes on in smaller parts.
    experiment = make_run(*settings, "train.micro_batch_size=2")
    resumed = learner(experiment, deepspeed, checkpoint=tmp_path / "checkpoint")
    assert curve(resumed) == pytest.approx(expected[2:], abs=5e-5)
    assert_same(whole.adapter(), resumed.adapter(), tolerance=5e-5)


@pytest.mark.parametrize("deepspeed", [None, *ENGINES[1:4]], ids=["torch", *IDS[1:4]])
def test_a_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(
    make_run, tmp_path: Path, deepspeed: DeepSpeedConfig | None
) -> None:
    # Dropout: the random numbers of a step must not depend on the steps before it.
    experiment = make_run("train.lora.dropout=0.2", "train.learning_rate=0.01")
    unbroken = learner(experiment, deepspeed)
    losses = curve(unbroken)
    broken = learner(experiment, deepspeed)
    for metrics in broken.steps():
        if metrics["step"] == 2:
            broken.save(tmp_path / "checkpoint", 3)
            break
    resumed = learner(experiment, deepspeed, checkpoint=tmp_path / "checkpoint")
    assert resumed.start_step == 3
    assert curve(resumed) == losses[3:]
    assert_same(unbroken.adapter(), resumed.adapter())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, ENGINES[3]),
        (ENGINES[0], ENGINES[2]),
        (ENGINES[1], None),
        (ENGINES[2], ENGINES[5]),
        (ENGINES[3], ENGINES[1]),
        (ENGINES[5], ENGINES[4]),
        (ENGINES[4], ENGINES[0]),
    ],
    ids=lambda engine: f"zero{engine.zero_stage}-{engine.offload}" if engine else "torch",
)
def test_another_engine_goes_on_where_the_first_one_stopped(
    make_run, tmp_path: Path, first: DeepSpeedConfig | None, second: DeepSpeedConfig | None
) -> None:
    # Clipped, decayed and scheduled, so that every part of the state matters.
    experiment = make_run(
        "train.learning_rate=0.01",
        "train.max_grad_norm=1.6",
        "train.weight_decay=0.1",
        "train.schedule=linear",
    )
    plain = learner(experiment, None)
    expected = curve(plain)
    start = learner(experiment, first)
    for metrics in start.steps():
        if metrics["step"] == 2:
            start.save(tmp_path / "checkpoint", 3)
            break
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "adapter",
        "optimizer.safetensors",
        "state.json",
    ]
    resumed = learner(experiment, second, checkpoint=tmp_path / "checkpoint")
    assert_same(start.adapter(), resumed.adapter())
    assert curve(resumed) == pytest.approx(expected[3:], abs=5e-5)
    assert_same(plain.adapter(), resumed.adapter(), tolerance=5e-5)


@pytest.mark.parametrize("deepspeed", [None, *ENGINES[:4]], ids=["torch", *IDS[:4]])
def test_fp32_masters_of_a_bf16_run_outlive_a_resume(
    make_run, tmp_path: Path, deepspeed: DeepSpeedConfig | None
) -> None:
    # Steps of 1e-4 are lost on bf16 copies of the weights.
    experiment = make_run("train.learning_rate=0.0001")
    unbroken = learner(experiment, deepspeed, dtype=torch.bfloat16)
    for metrics in unbroken.steps():
        if metrics["step"] == 2:
            unbroken.save(tmp_path / "checkpoint", 3)
    resumed = learner(
        experiment, deepspeed, dtype=torch.bfloat16, checkpoint=tmp_path / "checkpoint"
    )
    curve(resumed)
    assert_same(unbroken.adapter(), resumed.adapter())


def test_bf16_follows_fp32(make_run) -> None:
    experiment = make_run("train.learning_rate=0.01")
    expected = curve(learner(experiment, None))
    for deepspeed in (None, DeepSpeedConfig(zero_stage=0), DeepSpeedConfig(zero_stage=2)):
        got = curve(learner(experiment, deepspeed, dtype=torch.bfloat16))
        assert got == pytest.approx(expected, abs=0.1)


def test_the_saved_adapter_is_a_peft_folder(make_run, tmp_path: Path) -> None:
    from peft import PeftModel

    experiment = make_run("train.learning_rate=0.01")
    trained = learner(experiment, None)
    curve(trained)
    trained.save(tmp_path, experiment.train.num_steps)
    ids = torch.arange(5, 25)[None]
    expected = trained.peft_model.eval()(ids).logits
    base = load_language_model(experiment.model.path, torch.float32).model
    before = base(ids).logits
    reopened = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(reopened(ids).logits, expected)
    assert not torch.allclose(before, expected)


def test_a_damaged_checkpoint_is_named(make_run, tmp_path: Path) -> None:
    experiment = make_run()
    trained = learner(experiment, None)
    next(trained.steps())
    trained.save(tmp_path, 1)
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="optimizer.safetensors: damaged checkpoint"):
        learner(experiment, None, checkpoint=tmp_path)


def test_a_checkpoint_of_another_model_is_refused(make_run, tmp_path: Path) -> None:
    experiment = make_run()
    trained = learner(experiment, None)
    next(trained.steps())
    trained.save(tmp_path / "checkpoint", 1)
    state = read_state(tmp_path / "checkpoint")
    shape = dict(state.base_shape)
    with pytest.raises(ArtifactError, match="of another model: of tiny, the experiment says other"):
        check_model(vars(state), "other", shape)
    with pytest.raises(ArtifactError, match="with hidden_size 32, tiny now has 64"):
        check_model(vars(state), "tiny", {**shape, "hidden_size": 64})
    other = make_run("train.lora.rank=2")
    with pytest.raises(ArtifactError, match="LoRA matrix of shape"):
        learner(other, None, checkpoint=tmp_path / "checkpoint")


def test_an_adapter_that_learned_nothing_is_refused(make_run) -> None:
    untrained = learner(make_run(), None)
    with pytest.raises(ArtifactError, match="trained nothing"):
        check_trained(untrained.adapter(), Path("spirit"))


@pytest.mark.parametrize("deepspeed", [None, ENGINES[3]], ids=["torch", IDS[3]])
def test_the_best_adapter_outlives_a_resume_and_patience_ends_the_run(
    make_run, tmp_path: Path, deepspeed: DeepSpeedConfig | None
) -> None:
    # A rate far too high after a good start: validation worsens soon.
    settings = (
        "train.learning_rate=0.3",
        "train.warmup_fraction=0.5",
        "train.lora.dropout=0.3",
        "train.num_steps=12",
        "train.valid_every=1",
        "train.patience=2",
    )
    experiment = make_run(*settings)
    unbroken = learner(experiment, deepspeed)
    adapters, losses = [], []
    for metrics in unbroken.steps():
        adapters.append(unbroken.adapter())
        losses.append(metrics["valid_loss"])
        if metrics["step"] == 1:
            unbroken.save(tmp_path / "checkpoint", 2)
    best = min(range(len(losses)), key=losses.__getitem__)
    # Two validations without a new best, and not a step more.
    assert len(losses) == best + 1 + 2 < 12
    assert unbroken.finished
    assert (unbroken.best.loss, unbroken.best.num_steps) == (losses[best], best + 1)
    assert_same(adapters[best], unbroken.result())
    resumed = learner(experiment, deepspeed, checkpoint=tmp_path / "checkpoint")
    assert [metrics["valid_loss"] for metrics in resumed.steps()] == losses[2:]
    assert_same(unbroken.result(), resumed.result())
    # Validating changes nothing about the training.
    plain = learner(make_run(*settings[:-2]), deepspeed)
    for metrics in plain.steps():
        if metrics["step"] == best:
            assert_same(adapters[best], plain.adapter())
            break
    # A run that patience has ended stays ended.
    unbroken.save(tmp_path / "ended", len(losses))
    ended = learner(experiment, deepspeed, checkpoint=tmp_path / "ended")
    assert list(ended.steps()) == []
    assert_same(adapters[best], ended.result())
