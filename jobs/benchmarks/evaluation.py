"""Ranking 20 candidates: our one pass against one pass per candidate and against generation.

    python jobs/benchmarks/evaluation.py runs/demo/data/action --users 8

Needs a prepared domain (`rc-ray prepare jobs/demo.yaml`). The same model, users and candidates, one
thread, one process; the contestants take turns.

- ours: `Ranker`, several users in a pass, the prompt once, all candidates behind it.
- one by one: prompt and title of each candidate as a row of its own, the rows of a user as one
  padded batch, the log probabilities of the title's tokens summed. It sums over the whole
  vocabulary, ours over the catalogue's titles, so the orders need not agree.
- generation: an instruct prompt that lists the candidates and asks for the five best; greedy
  `generate()` with a key-value cache, up to 60 new tokens, one user at a time.

Seconds are those of the processor, so that other programs on the machine do not count; the wall's
are printed beside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from rc_ray.assets import model_dir
from rc_ray.core.domains import RankingCase, read_domain, sample
from rc_ray.core.loading import load_language_model
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker

QUESTION = "Name the five of these titles that the user chooses next, best first, one a line."
NUM_NEW_TOKENS = 60


class Clock:
    """Seconds and tokens of one contestant, summed over its turns."""

    def __init__(self, work: Callable[[Sequence[RankingCase]], int]) -> None:
        self._work = work
        self.cpu_s = self.wall_s = 0.0
        self.num_tokens = self.num_users = 0

    def run(self, cases: Sequence[RankingCase]) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.no_grad():
            self.num_tokens += self._work(cases)
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall
        self.num_users += len(cases)


class Contest:
    """The three ways to rank, on one model and one domain."""

    def __init__(self, domain_dir: Path, style: str, max_titles: int) -> None:
        self.lm = load_language_model(model_dir("smollm2-135m-instruct", print), torch.float32)
        self.domain = read_domain(domain_dir)
        self.max_titles = max_titles
        self.renderer = PromptRenderer(self.lm.tokenizer, style)  # type: ignore[arg-type]
        self.ranker = Ranker(
            self.lm,
            self.domain.name,
            self.domain.titles,
            self.domain.num_train,
            self.renderer,
            max_titles=max_titles,
        )

    def ours(self, cases: Sequence[RankingCase]) -> int:
        """All users and candidates together; returns the tokens read, padding included."""
        listed = [case.candidates for case in cases]
        prepared = self.ranker.prepare([self._history(case) for case in cases], listed)
        self.ranker.score(prepared)
        return sum(batch.states.shape[0] * batch.states.shape[1] for batch in prepared.batches)

    def one_by_one(self, cases: Sequence[RankingCase]) -> int:
        """A row per candidate, a batch per user."""
        count = 0
        for case in cases:
            prompt = self.ranker.prompt_tokens(self._history(case), case.candidates)
            titles = [list(self.renderer.title(self.domain.titles[i])) for i in case.candidates]
            longest = max(map(len, titles))
            ids = torch.tensor([prompt + t + [0] * (longest - len(t)) for t in titles])
            mask = torch.tensor(
                [[1] * (len(prompt) + len(t)) + [0] * (longest - len(t)) for t in titles]
            )
            output = self.lm.model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=longest + 1
            )
            log_probs = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)
            targets = ids[:, len(prompt) :]
            chosen = log_probs.gather(2, targets[..., None])[..., 0]
            (chosen * mask[:, len(prompt) :]).sum(dim=1)
            count += ids.numel()
        return count

    def generation(self, cases: Sequence[RankingCase]) -> int:
        """Five titles in the model's own words, one user at a time."""
        count = 0
        for case in cases:
            ids = torch.tensor([self._instruct_prompt(case)])
            output = self.lm.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NUM_NEW_TOKENS,
                use_cache=True,
                pad_token_id=self.lm.tokenizer.eos_token_id,
            )
            count += output.shape[1]
        return count

    def _history(self, case: RankingCase) -> list[str]:
        return [self.domain.titles[item] for item in case.history]

    def _instruct_prompt(self, case: RankingCase) -> list[int]:
        history = " || ".join(self._history(case)[-self.max_titles :])
        listed = " || ".join(self.domain.titles[item] for item in case.candidates)
        text = f"A user chose, in this order: {history}\nCandidates: {listed}\n{QUESTION}"
        rendered = self.lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(self.lm.tokenizer.encode(rendered, add_special_tokens=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain_dir", type=Path)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--turn", type=int, default=4, help="users per turn of each contestant")
    parser.add_argument("--style", choices=["sequence", "brief"], default="brief")
    parser.add_argument("--max-titles", type=int, default=15)
    args = parser.parse_args()

    torch.set_num_threads(1)
    contest = Contest(args.domain_dir, args.style, args.max_titles)
    cases = sample(contest.domain.cases("test"), args.users, seed=7)
    print(
        f"{contest.domain.name}: {len(cases)} users, {np.mean([len(c.candidates) for c in cases])} "
        f"candidates, style {args.style}, up to {args.max_titles} titles in a prompt"
    )
    contest.ours(cases[:1])  # warm up
    clocks = {
        "ours": Clock(contest.ours),
        "one by one": Clock(contest.one_by_one),
        "generation": Clock(contest.generation),
    }
    for start in range(0, len(cases), args.turn):
        for clock in clocks.values():
            clock.run(cases[start : start + args.turn])

    ours = clocks["ours"]
    print(f"{'':12} {'users/s':>8} {'(wall)':>8} {'ratio':>6} {'(wall)':>7} {'tokens/user':>12}")
    for name, clock in clocks.items():
        print(
            f"{name:12} {clock.num_users / clock.cpu_s:8.3f} {clock.num_users / clock.wall_s:8.3f} "
            f"{clock.cpu_s / ours.cpu_s:6.1f} {clock.wall_s / ours.wall_s:7.1f} "
            f"{clock.num_tokens / clock.num_users:12.0f}"
        )


if __name__ == "__main__":
    main()
