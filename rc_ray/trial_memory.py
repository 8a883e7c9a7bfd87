"""How much main memory a trial needs, estimated before it starts.

    process + weights + max(training, ranking)

    process   what Python, torch, transformers and Ray take: 0.7 * 10^9 bytes
    weights   parameters * bytes of the base's precision (4 where the precision is chosen later)
    training  16 bytes per LoRA parameter (fp32 value, gradient, Adam's two moments), and for the
              backward pass through each adapted layer (20 H + 10 I) values per token of one pass,
              H the hidden and I the intermediate size; with `loss: vocabulary` also 3 fp32 rows of
              the vocabulary per token
    ranking   a copy of the adapted layers' weights, to take the folded adapter out again, and
              (4 H + 3 I) values per token of one pass

A pass has (`micro_batch_size` or `batch_size`) rows of `max_titles` titles, of at most `max_tokens`
tokens; a title is taken to have one token per 3 characters. Domains that train
together each have a LoRA, and share passes of up to `tokens_per_pass` tokens. On a GPU the main
memory holds the process, with CUDA's 3 * 10^9 bytes, and the weights on their way.

The numbers in it are a fit, no theory: they keep the estimate a little above three measured peaks
of SmolLM2-135M in fp32. No other model and no GPU was measured. Peak of the process in GB, and in
brackets this estimate with the titles' real number of tokens: 259 tokens a pass 1.97 (2.16), 1,441
tokens 5.65 (5.97), 527 tokens with the upper 10 layers 1.51 (1.83). `activation_checkpointing` is
not counted: such trials need less. Whoever knows better sets `tune.memory_per_trial_gb`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rc_ray.errors import ArtifactError
from rc_ray.training_config import TrainingConfig

_PROCESS_BYTES = 700_000_000
_CUDA_PROCESS_BYTES = 3_000_000_000
_CHARACTERS_PER_TOKEN = 3.0


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base LLM that decide the memory of a trial."""

    num_parameters: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocabulary_size: int


def read_shape(folder: Path) -> BaseShape:
    """Read a model folder's sizes, from its configuration and the heads of its weight files.

    Raises:
        ArtifactError: the folder is no model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        num_parameters = 0
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    size = 1
                    for length in file.get_slice(name).get_shape():
                        size *= length
                    num_parameters += size
        return BaseShape(
            num_parameters,
            int(config["num_hidden_layers"]),
            int(config["hidden_size"]),
            int(config.get("intermediate_size") or 4 * config["hidden_size"]),
            int(config["vocab_size"]),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: its sizes cannot be read: {error}") from None


def tokens_per_title(domain_dirs: Iterable[Path]) -> float:
    """The largest mean of these prepared domains, from their titles' characters.

    A domain that cannot be read counts for nothing here: its trials will say so.
    """
    found = [1.0]
    for folder in domain_dirs:
        try:
            titles = pq.read_table(folder / "items.parquet", columns=["title"])["title"]
            characters = pc.mean(pc.utf8_length(titles)).as_py() or 0.0
        except (OSError, pa.ArrowException):
            continue
        found.append(1.0 + characters / _CHARACTERS_PER_TOKEN)
    return max(found)


def estimate_bytes(
    shape: BaseShape,
    setting: TrainingConfig,
    *,
    dtype: str,
    use_gpu: bool,
    tokens_per_title: float,
    tokens_per_batch: int,
    num_listed: int,
    num_domains: int = 1,
    tokens_per_pass: int = 0,
) -> int:
    """Main memory of one trial's process, in bytes.

    Args:
        shape: the base's sizes.
        setting: of the training.
        dtype: the base's precision, `auto` counts as fp32.
        use_gpu: whether the model lives on a GPU.
        tokens_per_title: mean over a domain's titles.
        tokens_per_batch: of the ranking of validation users.
        num_listed: candidates beside the target in an `instruct` prompt.
        num_domains: whose LoRAs train in the process.
        tokens_per_pass: that several domains may share.
    """
    width = 2 if dtype == "bfloat16" else 4
    weights = shape.num_parameters * width
    if use_gpu:
        return _CUDA_PROCESS_BYTES + weights
    hidden, inner = shape.hidden_size, shape.intermediate_size
    num_layers = max(0, shape.num_layers - setting.lora.first_layer)
    # Seven linear layers: four of the attention, three of the feed-forward part.
    lora = setting.lora.rank * num_layers * (4 * 2 * hidden + 3 * (hidden + inner))
    adapted = num_layers * (4 * hidden * hidden + 3 * hidden * inner)
    num_titles = setting.max_titles + (num_listed + 1 if setting.style == "instruct" else 0)
    row = min(setting.max_tokens, math.ceil(tokens_per_title * num_titles))
    tokens = (setting.micro_batch_size or setting.batch_size) * row
    if num_domains > 1:
        tokens = max(tokens, tokens_per_pass)
    training = num_domains * 16 * lora + tokens * num_layers * (20 * hidden + 10 * inner) * width
    if setting.loss == "vocabulary":
        training += tokens * shape.vocabulary_size * 3 * 4
    ranking = adapted * width + tokens_per_batch * (4 * hidden + 3 * inner) * width
    return _PROCESS_BYTES + weights + max(training, ranking)
