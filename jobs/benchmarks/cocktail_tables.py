"""What a finished study of the cocktail says, as Markdown tables and one drawing of the weights.

    rc-ray run jobs/cocktail_study.yaml
    python jobs/benchmarks/cocktail_tables.py runs/cocktail_study/config.yaml --svg weights.svg

Reads the run folder alone: nothing is scored anew, no Ray is started and nothing else is written.
Domains whose ingredient saw few users (`data.num_training_users`) are told apart from the others.
Differences of means are paired, over the warm test users of all domains of a kind one after
another, with 95 % bootstrap intervals and p-values after Holm's correction over a table's rows.
*Raw* is the likelihood as trained, before alpha, gamma and the prior are chosen.

Letters: N test users.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from rc_ray import charts, recipes
from rc_ray.artifacts import read_json
from rc_ray.core.bootstrap import holm, paired_bootstrap
from rc_ray.curves import read_curve
from rc_ray.mix_config import LearnedMix
from rc_ray.requests import MAIN
from rc_ray.score_settings import Floats

sys.path.insert(0, str(Path(__file__).parent))
from study import ONE_CALIBRATION, Study, read_study

NUM_BOOTSTRAP = 5000
MEASURES = ("NDCG@10", ONE_CALIBRATION, "HR@1")
CONTROLS = (
    "uniform",
    "base",
    "ingredient",
    "spirit",
    "joint",
    "random_spirit",
    "sum",
    "ties",
    "dare_ties",
    "knots",
    "one_weight",
    "paper_loss",
    "anchored",
    "distilled",
    "calibrated",
    "transductive",
    "clicks",
    "lorahub",
    "guarded",
)
"""What the cocktail is compared with, where the run has it."""
UNMIXED = ("base", "spirit", "ingredient", "joint")
"""What equal weights are compared with."""
NUM_GROUPS = 4
"""Parts of the users by the entropy of their lists."""


def correlation(one: Sequence[float] | Floats, two: Sequence[float] | Floats) -> str:
    """Spearman's; a dash where one side does not vary."""
    if min(np.ptp(one), np.ptp(two)) < 1e-12:
        return "–"
    return f"{spearmanr(one, two).statistic:+.2f}"


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_systems(study: Study, split: str) -> None:
    """NDCG@10 of every system, baselines too, on the main lists of a split."""
    table = pq.read_table(study.folder.evaluate_dir / "results.parquet").to_pylist()
    cells = {
        (row["domain"], row["system"]): row
        for row in table
        if (row["split"], row["candidates"], row["metric"]) == (split, MAIN, "NDCG@10")
    }
    domains = [name for name in study.experiment.data.tested if any(d == name for d, _ in cells)]
    if not domains:
        return
    num_users = {
        domain: next(r["num_users"] for (d, _), r in cells.items() if d == domain)
        for domain in domains
    }
    print(f"NDCG@10, {split} items:\n")
    rows = []
    for system in study.experiment.evaluate.systems:
        found = [cells.get((domain, system)) for domain in domains]
        told = [
            f"{one['value']:.3f} ± {(one['ci_high'] - one['ci_low']) / 2:.3f}" if one else "–"
            for one in found
        ]
        values = [one["value"] for one in found if one]
        mean = f"{fmean(values):.3f}" if len(values) == len(domains) else "–"
        rows.append([system, *told, mean])
    print_table(["system", *(f"{d} ({num_users[d]})" for d in domains), "mean"], rows)


def print_gains(study: Study, system: str, controls: Sequence[str]) -> None:
    """What a system has over each control."""
    for kind, domains in study.kinds.items():
        for measure in MEASURES:
            own = study.pooled(domains, system, measure)
            if own is None:
                continue
            found = []
            for control in controls:
                other = study.pooled(domains, control, measure)
                if other is not None:
                    found.append((control, *paired_bootstrap(own, other, NUM_BOOTSTRAP, 0)))
            adjusted = holm([row[-1] for row in found])
            told = f"{kind} ({', '.join(domains)}; {len(own)} users)"
            print(f"{system} minus control, {measure}, {told}:\n")
            print_table(
                ["control", "difference", "95 % interval", "p after Holm"],
                (
                    [name, f"{gain:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{p:.3f}"]
                    for (name, gain, low, high, _), p in zip(found, adjusted, strict=True)
                ),
            )


def print_prompts(study: Study, measure: str) -> None:
    """The curve over the number of prompts."""
    made = recipes.mixes(study.experiment)
    numbered = sorted(
        (mix.num_prompts or 0, name)
        for name, mix in made.items()
        if isinstance(mix, LearnedMix) and (name.startswith("prompts_") or name == "cocktail")
    )
    if len(numbered) < 2:
        return
    print(f"How many prompts are enough, and the difference to equal weights; {measure}:\n")
    rows = []
    for num, name in numbered:
        cells = [str(num)]
        for domains in study.kinds.values():
            own, equal = (study.pooled(domains, one, measure) for one in (name, "uniform"))
            if own is None or equal is None:
                cells += ["–", "–"]
                continue
            gain, low, high, _ = paired_bootstrap(own, equal, NUM_BOOTSTRAP, 0)
            cells += [f"{own.mean():.3f}", f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"]
        rows.append(cells)
    print_table(
        ["prompts", *(f"{kind}{end}" for kind in study.kinds for end in ("", ", gain"))], rows
    )


def print_seeds(study: Study, measure: str) -> None:
    """Inductive beside transductive, over the seeds of learning the weights."""
    made = recipes.mixes(study.experiment)
    cocktail = made["cocktail"]
    assert isinstance(cocktail, LearnedMix)

    def seeds_of(prompts_of: str) -> list[str]:
        wanted = cocktail.model_dump(exclude={"seed", "prompts_of"})
        return [
            name
            for name, mix in made.items()
            if name != "random_spirit"
            and isinstance(mix, LearnedMix)
            and mix.prompts_of == prompts_of
            and mix.model_dump(exclude={"seed", "prompts_of"}) == wanted
        ]

    inductive, transductive = seeds_of("other_users"), seeds_of("scored_users")
    if len(inductive) < 2 or not transductive:
        return
    print(f"Weights learned on other users or on the scored ones, by seed; {measure}:\n")
    rows = []
    for kind, domains in study.kinds.items():
        means: list[str] = []
        users = []
        for names in (inductive, transductive):
            found = [study.pooled(domains, name, measure) for name in names]
            kept = [one for one in found if one is not None]
            if not kept:
                return
            values = [float(one.mean()) for one in kept]
            spread = stdev(values) if len(values) > 1 else 0.0
            means.append(" ".join(f"{v:.3f}" for v in values) + f" (SD {spread:.4f})")
            users.append(np.mean(kept, axis=0))
        gain, low, high, _ = paired_bootstrap(users[1], users[0], NUM_BOOTSTRAP, 0)
        rows.append([kind, *means, f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]"])
    print_table(["ingredient", "other users", "scored users", "scored minus other"], rows)


def print_entropy(study: Study) -> None:
    """Entropy beside quality: over systems of a domain, and over users of the cocktail."""
    systems = [
        name
        for name in study.experiment.evaluate.systems
        if all((domain, name) in study.entropies for domain in study.experiment.data.ingredients)
    ]
    mixes = [name for name in systems if study.experiment.is_mixed(name)]
    print("Over the mixes of a domain, raw entropy of the test lists against quality (Spearman):\n")
    rows = []
    for domain in study.experiment.data.ingredients:
        level = [float(study.entropies[domain, name].mean()) for name in mixes]
        cells = [f"{min(level):.3f} to {max(level):.3f}"]
        for values in (
            [study.raw[domain, name] for name in mixes],
            [study.hits[domain, name] for name in mixes],
            [study.measured[domain, name, "warm", "NDCG@10"] for name in mixes],
            [study.measured[domain, name, "warm", "HR@1"] for name in mixes],
        ):
            cells.append(correlation(level, [float(one.mean()) for one in values]))
        rows.append([domain, *cells])
    print_table(
        [
            f"domain ({len(mixes)} mixes)",
            "entropy, nats",
            "raw NDCG@10",
            "raw HR@1",
            "NDCG@10 as served",
            "HR@1 as served",
        ],
        rows,
    )
    print("Over the users of the cocktail, a quarter each from the lowest entropy up, raw HR@1:\n")
    rows = []
    for domain in study.experiment.data.ingredients:
        level, hit = study.entropies[domain, "cocktail"], study.hits[domain, "cocktail"]
        parts = np.array_split(np.argsort(level, kind="stable"), NUM_GROUPS)
        told = [f"{hit[part].mean():.3f} (at {level[part].mean():.2f} nats)" for part in parts]
        rows.append([domain, *told, correlation(level, hit)])
    print_table(
        ["domain", "surest quarter", "second", "third", "least sure", "Spearman over users"], rows
    )
    print("What learning did to the entropy, mean over domains (prompts: first and last step):\n")
    rows = []
    for name in study.learned(study.experiment.data.ingredients[0]):
        if name not in mixes:
            continue
        curves = [
            read_curve(study.folder.mix_dir(domain, name) / "entropy.jsonl", "entropy")
            for domain in study.experiment.data.ingredients
        ]
        ends = [(curve[0][1], curve[-1][1]) for curve in curves if curve]
        prompts = (
            f"{fmean(e[0] for e in ends):.3f} to {fmean(e[1] for e in ends):.3f}" if ends else "–"
        )
        test = fmean(
            float(study.entropies[d, name].mean()) for d in study.experiment.data.ingredients
        )
        equal = fmean(
            float(study.entropies[d, "uniform"].mean()) for d in study.experiment.data.ingredients
        )
        rows.append([name, prompts, f"{test:.3f}", f"{test - equal:+.3f}"])
    print_table(["mix", "on its prompts", "on the test lists", "less equal weights"], rows)


def print_weights(study: Study, svg: Path | None) -> None:
    """How the learned weights look: by mix, by projection, by layer."""
    domains = study.experiment.data.ingredients
    print("Mean weight of the spirit:\n")
    print_table(
        ["mix", *domains],
        (
            [name, *(f"{study.mixture(domain, name).mean('spirit'):.2f}" for domain in domains)]
            for name in study.learned(domains[0])
        ),
    )
    drawings = []
    for kind, names in study.kinds.items():
        mixtures = [study.mixture(domain, "cocktail") for domain in names]
        columns = mixtures[0].columns()
        mean = {
            place: fmean(mixture.of("spirit")[place] for mixture in mixtures)
            for place in mixtures[0].weights
        }
        print(f"The cocktail's weight of the spirit by layer and projection, {kind}:\n")
        layers = sorted({layer for layer, _ in mean})
        rows = [
            [str(layer), *(f"{mean[layer, column]:.2f}" for column in columns)] for layer in layers
        ]
        rows.append(["mean", *(f"{fmean(mean[at, c] for at in layers):.2f}" for c in columns)])
        print_table(["layer", *columns], rows)
        drawings.append((kind, charts.heat_map(mean, columns, centre=mixtures[0].uniform)))
    if svg is not None:
        svg.write_text(drawn(drawings), encoding="utf-8")


def drawn(panels: Sequence[tuple[str, str]]) -> str:
    """One standing SVG of the charts side by side, with colours of its own."""
    style = (
        "text{font:11px sans-serif;fill:#333}.above{fill:#c2410c}.below{fill:#0b6bcb}"
        ".cell{stroke:#ccc;stroke-width:.4}.tip{display:none}"
    )
    width, height = charts.WIDTH, 300
    parts = []
    for place, (title, chart) in enumerate(panels):
        inner = chart.replace("<svg ", f'<svg x="{place * width}" y="24" width="{width}" ', 1)
        parts.append(f'<text x="{place * width + 34}" y="16">{title}</text>{inner}')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {height}" '
        f'role="img"><title>Weight of the spirit by layer and projection</title>'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )


def print_guard(study: Study) -> None:
    """What each guard chose."""
    rows: list[Mapping[str, object]] = []
    for domain in study.experiment.data.ingredients:
        path = study.folder.cocktail_dir(domain) / "guard.json"
        if path.exists():
            rows.append({"domain": domain, **read_json(path)})
    if rows:
        print("What the guards chose:\n")
        print_table(
            ["domain", "serves", "why", "collapse"],
            (
                [
                    str(row["domain"]),
                    str(row["chosen"]),
                    str(row["why"]),
                    str(row["collapse"] or "no"),
                ]
                for row in rows
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.yaml in the folder of a finished run")
    parser.add_argument("--svg", type=Path, help="where the drawing of the weights goes")
    arguments = parser.parse_args()
    study = read_study(arguments.config)
    for split in ("warm", "cold"):
        print_systems(study, split)
    print_gains(study, "cocktail", CONTROLS)
    print_gains(study, "uniform", UNMIXED)
    for measure in ("NDCG@10", ONE_CALIBRATION):
        print_prompts(study, measure)
        print_seeds(study, measure)
    print_entropy(study)
    print_weights(study, arguments.svg)
    print_guard(study)


if __name__ == "__main__":
    main()
