"""The method on a GPU agrees with the processor; run with `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rc_ray.core.fused_lora import fuse_lora
from rc_ray.core.loading import choose_dtype, load_language_model
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.trainable_lora import with_lora
from rc_ray.core.training import TorchEngine, TrainingModule, train_steps
from rc_ray.core.training_plan import TrainingPlan
from rc_ray.training_config import TrainingConfig
from tests.core.test_training import make_domain
from tests.tiny import ADJECTIVES, NOUNS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TITLES = [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_scores_agree_with_the_processor(folder: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        lm = load_language_model(folder, torch.float32, device)
        ranker = Ranker(lm, "tools", TITLES, np.arange(42), PromptRenderer(lm.tokenizer))
        with torch.no_grad():
            prepared = ranker.prepare([["Old Piano", "Red Lamp"], []], [range(42), [3, 1, 7]])
            found.append([score.cpu().numpy() for score in ranker.score(prepared)])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-3)


def test_training_in_bf16_follows_fp32_on_the_processor(folder: Path) -> None:
    config = TrainingConfig(batch_size=4, num_steps=10, learning_rate=5e-3)
    curves = []
    for device, dtype in (("cpu", torch.float32), ("cuda", choose_dtype("auto", "cuda"))):
        lm = load_language_model(folder, dtype, device)
        plan = TrainingPlan(
            [make_domain()], PromptRenderer(lm.tokenizer), config, seed=5, num_listed=3
        )
        model = with_lora(lm.model, config.lora, seed=0)
        engine = TorchEngine(TrainingModule(model, plan.tries, config).to(device), config)
        steps = train_steps(
            engine,
            plan,
            device=torch.device(device),
            learning_rate=lambda engine=engine: engine.optimizer.param_groups[0]["lr"],
        )
        curves.append([step["loss"] for step in steps])
    assert curves[1] == pytest.approx(curves[0], abs=0.1)


@pytest.mark.parametrize("style", ["sequence", "instruct"])
def test_packed_texts_agree_with_the_dense_mask(folder: Path, style: str) -> None:
    config = TrainingConfig.model_validate(
        {"batch_size": 6, "style": style, "activation_checkpointing": style == "instruct"}
    )
    found = []
    for is_packed in (True, False):
        lm = load_language_model(folder, torch.float32, "cuda")
        plan = TrainingPlan(
            [make_domain()], PromptRenderer(lm.tokenizer, style), config, seed=5, num_listed=3
        )
        model = with_lora(lm.model, config.lora, seed=0)
        fuse_lora(model)
        module = TrainingModule(model, plan.tries, config).to("cuda")
        module.is_packed = is_packed
        module.train()
        (batch,) = plan.batches(0)
        loss = module(batch.to(torch.device("cuda")))
        loss.backward()
        grads = [p.grad.cpu() for p in module.parameters() if p.grad is not None]
        found.append((loss.item(), grads))
    (loss, grads), (wanted_loss, wanted) = found
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    for got, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4)
