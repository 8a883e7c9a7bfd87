"""The top of a whole catalogue: our search against `generate()` with beams over the same titles.

    python jobs/benchmarks/catalogue.py runs/demo/data/action --users 8 --beams 10 20

Needs a prepared domain (`rc-ray prepare jobs/demo.yaml`). The same model, prompts and process, one
thread. The baseline is transformers' `generate()` with beam search and `prefix_allowed_tokens_fn`
over the title trie, one user at a time; with `renormalize_logits=True` and no length penalty, a
beam's score is the title's log likelihood as we define it. Titles of the history are not allowed,
in either. Ours and the baseline take turns, a few users each. `--exact` users are also ranked
by scoring every title, which shows what beams miss. Seconds are those of the processor, so that
other programs on the machine do not count; the wall's are printed beside.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from rc_ray.assets import model_dir
from rc_ray.core.domains import read_domain, sample
from rc_ray.core.loading import load_language_model
from rc_ray.core.prompts import PromptRenderer
from rc_ray.core.ranking import Ranker
from rc_ray.core.search import Found, top_k


class Clock:
    """Seconds of one contestant, summed over its turns."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def time(self, work: Callable[[], object]) -> object:
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.no_grad():
            result = work()
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall
        return result


class TitleTrie:
    """What people write for `prefix_allowed_tokens_fn`: nested dicts and counts of titles below."""

    def __init__(self, titles: Sequence[Sequence[int]], end: int) -> None:
        self.end = end
        self.root: dict = {"count": len(titles)}
        for title in titles:
            node = self.root
            for token in title:
                node = node.setdefault(token, {"count": 0})
                node["count"] += 1

    def allowed(
        self, titles_taken: Sequence[Sequence[int]], prompt_length: int
    ) -> Callable[[int, torch.Tensor], list[int]]:
        """The function for one user, whose history is not to come again."""
        taken: dict[tuple[int, ...], int] = {}
        for title in titles_taken:
            for depth in range(len(title)):
                prefix = tuple(title[: depth + 1])
                taken[prefix] = taken.get(prefix, 0) + 1

        def tokens(_: int, sequence: torch.Tensor) -> list[int]:
            node, prefix = self.root, tuple(sequence[prompt_length:].tolist())
            for token in prefix:
                node = node.get(token, {})
            found = [
                token
                for token, below in node.items()
                if token != "count" and below["count"] > taken.get((*prefix, token), 0)
            ]
            return found or [self.end]

        return tokens


def beams_of(
    ranker: Ranker, trie: TitleTrie, history: Sequence[str], num_beams: int, k: int
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Titles, as tokens, that beam search returns, and their scores."""
    prompt = ranker.prompt_tokens(history, ())
    taken = [ranker.renderer.title(ranker.titles[item]) for item in ranker.chosen_items(history)]
    ids = torch.tensor([prompt])
    output = ranker.lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=num_beams,
        num_return_sequences=k,
        do_sample=False,
        length_penalty=0.0,
        renormalize_logits=True,
        early_stopping=False,
        max_new_tokens=1 + max(len(title) for title in map(ranker.renderer.title, ranker.titles)),
        eos_token_id=ranker.renderer.terminator[-1],
        pad_token_id=ranker.renderer.terminator[-1],
        prefix_allowed_tokens_fn=trie.allowed(taken, len(prompt)),
        return_dict_in_generate=True,
        output_scores=True,
    )
    end = ranker.renderer.terminator[-1]
    found = []
    for row in output.sequences[:, len(prompt) :].tolist():
        found.append(tuple(row[: row.index(end) + 1]) if end in row else tuple(row))
    return found, output.sequences_scores.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("domain_dir", type=Path)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--exact", type=int, default=2, help="users scored title by title too")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--beams", type=int, nargs="+", default=[10])
    parser.add_argument("--style", choices=["sequence", "brief"], default="sequence")
    parser.add_argument("--max-nodes", type=int, default=4096)
    parser.add_argument("--turn", type=int, default=8, help="users per turn")
    args = parser.parse_args()

    torch.set_num_threads(1)
    lm = load_language_model(model_dir("smollm2-135m-instruct", print), torch.float32)
    domain = read_domain(args.domain_dir)
    renderer = PromptRenderer(lm.tokenizer, args.style)
    ranker = Ranker(lm, domain.name, domain.titles, domain.num_train, renderer)
    titles = [renderer.title(title) for title in domain.titles]
    trie = TitleTrie(titles, renderer.terminator[-1])
    cases = sample(domain.cases("test"), args.users, seed=7)
    histories = [[domain.titles[item] for item in case.history] for case in cases]
    nothing = np.zeros((2, len(titles)))

    def search(some: Sequence[Sequence[str]]) -> list[Found]:
        return top_k(
            ranker,
            some,
            args.k,
            alpha=0.0,
            gamma=0.0,
            prior_in_trie=False,
            empty=nothing,
            log_prior=nothing[0],
            max_nodes=args.max_nodes,
        )

    lengths = [len(ranker.prompt_tokens(history, ())) for history in histories]
    print(
        f"{domain.name}: {len(titles)} items, {len(histories)} users, prompts of "
        f"{np.mean(lengths):.0f} tokens on average, k = {args.k}, style {args.style}"
    )
    search(histories[:1])  # warm up
    beams_of(ranker, trie, histories[0][-1:], 2, 1)
    ours, clock = [], Clock()
    theirs: dict[int, list] = {beams: [] for beams in args.beams}
    clocks = {beams: Clock() for beams in args.beams}
    for start in range(0, len(histories), args.turn):
        some = histories[start : start + args.turn]
        ours += clock.time(lambda some=some: search(some))
        for beams in args.beams:
            for history in some:
                work = lambda h=history, b=beams: beams_of(ranker, trie, h, b, args.k)  # noqa: E731
                theirs[beams].append(clocks[beams].time(work))

    nodes = [found.num_nodes_read for found in ours]
    print(
        f"ours: {np.mean([found.is_proved for found in ours]):.0%} proved; trie nodes read per "
        f"user: median {np.median(nodes):.0f}, most {max(nodes)}"
    )
    print(
        f"{'':12} {'users/s':>8} {'(wall)':>8} {'ratio':>6} {'(wall)':>7} {'same top-1':>11} "
        f"{f'of our top {args.k}':>15}"
    )
    print(f"{'ours':12} {len(ours) / clock.cpu_s:8.3f} {len(ours) / clock.wall_s:8.3f}")
    for beams, rows in theirs.items():
        same = [
            titles[one.items[0]] == found[0] for one, (found, _) in zip(ours, rows, strict=True)
        ]
        kept = [
            len({titles[item] for item in one.items} & set(found))
            / len({titles[item] for item in one.items})
            for one, (found, _) in zip(ours, rows, strict=True)
        ]
        other = clocks[beams]
        print(
            f"{f'{beams} beams':12} {len(rows) / other.cpu_s:8.3f} {len(rows) / other.wall_s:8.3f} "
            f"{other.cpu_s / clock.cpu_s:6.1f} {other.wall_s / clock.wall_s:7.1f} "
            f"{np.mean(same):11.0%} {np.mean(kept):15.0%}"
        )

    if not args.exact:
        return
    whole = Clock()
    everything = range(len(titles))
    ours_missed, missed = 0, dict.fromkeys(theirs, 0)
    furthest = 0.0
    for row, history in enumerate(histories[: args.exact]):
        scores = whole.time(lambda h=history: ranker.log_likelihoods([h], [everything])[0]).numpy()
        best: list[tuple[int, ...]] = []
        for item in np.argsort(-scores, kind="stable"):
            if titles[item] not in best:
                best.append(titles[item])
            if len(best) == args.k:
                break
        ours_missed += len(set(best) - {titles[item] for item in ours[row].items})
        ours_at = np.array(ours[row].items)
        furthest = max(furthest, float(np.abs(scores[ours_at] - ours[row].scores).max()))
        for beams, rows in theirs.items():
            missed[beams] += len(set(best) - set(rows[row][0]))
    count = min(args.exact, len(histories))
    print(
        f"every title scored, {count} users: {count / whole.cpu_s:.3f} users/s; largest difference "
        f"of a score {furthest:.1e}; of {count * args.k} best titles ours missed {ours_missed}, "
        + ", ".join(f"{beams} beams missed {number}" for beams, number in missed.items())
    )


if __name__ == "__main__":
    main()
