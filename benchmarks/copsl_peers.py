"""CoPSL beside evolutionary algorithms at equal evaluations: hypervolume and CPU seconds.

The idea
    CoPSL's training evaluates 500 x 30 = 15,000 solutions of every problem. NSGA-II, NSGA-III and
    MOEA/D (pymoo) get as many, and as many points in the end: a population of 100 for two
    objectives, 105 for three, where CoPSL is asked for 100 or 105 preferences. Each population is
    a front of its own; a trained network answers any other preference too.

Run
    pip install pymoo==0.6.2                      not in requirements.txt: nothing else needs it
    python benchmarks/copsl_peers.py              5 seeds, the 11 problems of the paper: minutes
    python benchmarks/copsl_peers.py --summary    run nothing, print what --out holds

Prints
    Tables of hypervolume, mean ± std over seeds, as copsl.evaluate computes it: `hv` of
    (f - ideal) / (nadir - ideal), `hv_official` of f / nadir as CoPSL's authors do, reference 1.1;
    and CPU seconds a seed. Every (problem, algorithm, seed) is a file of its own in --out, and what
    is there is not run again.

What each algorithm gets
    pymoo's defaults. Objectives are handed over as (f - ideal) / (nadir - ideal), which the paper's
    recipe for CoPSL does not have: MOEA/D needs it where scales differ, the other two do not mind.
    MOEA/D is pymoo's ParallelMOEAD, which mates the population at once and takes a fraction of
    MOEAD's time; its decomposition is Tchebycheff for two objectives, PBI for three. 105 does not
    divide 15,000: with three objectives the algorithms take 15,015 evaluations. CPU seconds of
    CoPSL are those of a run over all problems of a group (f or re) and all seeds at once, divided
    by both numbers, without evaluation.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import copsl
import data

EVALUATIONS = 15_000
PEERS = {"nsga2": "NSGA-II", "nsga3": "NSGA-III", "moead": "MOEA/D"}
OURS = {"copsl-paper": "CoPSL, paper", "copsl-tuned": "CoPSL, tuned"}


class Silent:
    """A common.Run that shows and keeps nothing."""
    def progress(self, items, *_, **__):
        return items

    def gather(self, part):
        return part

    def log(self, **row):
        pass


def train_ours(recipe, names, seeds):
    """Train CoPSL on a group of problems, all seeds at once -> {(problem, seed): row}."""
    args = copsl.resolve(copsl.build_parser().parse_args(
        ["--recipe", recipe, "--problems", *names, "--seed", str(min(seeds)),
         "--seeds", str(len(seeds)), "--eval-every", "500"]))
    world = copsl.World(copsl.load_problems(args), seeds, args, torch.device("cpu"))
    began = time.process_time()
    net, _ = copsl.train(world, Silent(), "copsl", None, lambda current: None)
    spent = (time.process_time() - began) / len(seeds) / len(names)
    found = copsl.evaluate(world, net)
    return {(name, seed): {"hv": found[seed]["hv"][k], "hv_official": found[seed]["hv_official"][k],
                           "cpu_seconds": spent, "evaluations": args.steps * args.batch}
            for k, name in enumerate(names) for seed in seeds}


def run_peer(kind, problem, seed):
    """One run of pymoo -> row: hypervolumes of the final population, CPU seconds."""
    from pymoo.algorithms.moo.moead import ParallelMOEAD
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize
    from pymoo.util.ref_dirs import get_reference_directions

    class Handed(Problem):
        def __init__(self):
            super().__init__(n_var=problem.n_var, n_obj=problem.n_obj, xl=problem.lower.numpy(),
                             xu=problem.upper.numpy())

        def _evaluate(self, x, out, *_, **__):
            f = problem(torch.from_numpy(x))
            out["F"] = ((f - problem.ideal) / (problem.nadir - problem.ideal)).numpy()

    parts = {2: 99, 3: 13}[problem.n_obj]  # 100 and 105 directions
    directions = get_reference_directions("das-dennis", problem.n_obj, n_partitions=parts)
    algorithm = {"nsga2": lambda: NSGA2(pop_size=len(directions)),
                 "nsga3": lambda: NSGA3(directions), "moead": lambda: ParallelMOEAD(directions)}
    began = time.process_time()
    result = minimize(Handed(), algorithm[kind](), ("n_eval", EVALUATIONS), seed=seed)
    spent = time.process_time() - began
    points = torch.from_numpy(result.pop.get("F"))
    points = points[common.non_dominated(points)]
    corner, f = [1.1] * problem.n_obj, problem.ideal + points * (problem.nadir - problem.ideal)
    return {"hv": common.hypervolume(points, corner),
            "hv_official": common.hypervolume(f / problem.hv_nadir, corner),
            "cpu_seconds": spent, "evaluations": result.algorithm.evaluator.n_eval}


def spread(numbers, digits=4):
    std = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{std}"


def summarise(found, names):
    """Print Markdown tables of {(problem, algorithm): list of rows}."""
    labels = {k: v for k, v in {**PEERS, **OURS}.items() if any((n, k) in found for n in names)}
    count = {k: {len(found.get((n, k), [])) for n in names} for k in labels}
    for key, title in (("hv", "HV of (f - ideal) / (nadir - ideal)"),
                       ("hv_official", "HV of f / nadir, the authors'"),
                       ("cpu_seconds", "CPU seconds a seed and problem")):
        print(f"\n| {title} | " + " | ".join(labels.values()) + " |")
        print("|---|" + "---|" * len(labels))
        for name in names:
            digits = 2 if key == "cpu_seconds" else 4
            cells = [spread([row[key] for row in found[name, k]], digits) if (name, k) in found
                     else "-" for k in labels]
            print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nseeds: " + ", ".join(f"{labels[k]} {'-'.join(map(str, sorted(c)))}"
                                  for k, c in count.items()))
    for ours in OURS:
        won = [f"{label} {sum(mean_hv(found, n, ours) > mean_hv(found, n, k) for n in both)}"
               f"/{len(both)}" for k, label in PEERS.items()
               if (both := [n for n in names if (n, k) in found and (n, ours) in found])]
        print(f"problems on which {OURS[ours]}'s mean hv is above: " + ", ".join(won))


def mean_hv(found, name, kind):
    return statistics.mean(row["hv"] for row in found[name, kind])


def main(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("--seeds", type=common.number(int, low=1), default=5,
                        help="0 ... N - 1; default %(default)s")
    parser.add_argument("--problems", nargs="+", default=["f", "re"],
                        help="groups of copsl.py: f, re; default both")
    parser.add_argument("--algorithms", default=",".join([*PEERS, *OURS]),
                        help="comma-separated; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/copsl-peers"),
                        help="default %(default)s")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing; print what --out holds")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        import pymoo  # noqa: F401
    except ImportError:
        raise common.UserError("this comparison needs pymoo: pip install pymoo==0.6.2") from None
    seeds, kinds = list(range(args.seeds)), args.algorithms.split(",")
    names = [n for group in args.problems for n in copsl.GROUPS.get(group, [group])]

    def path(name, kind, seed):
        return args.out / f"{name}-{kind}-{seed}.json"

    if not args.summary:
        for seed in seeds:
            for name in names:
                for kind in set(kinds) & set(PEERS):
                    if not path(name, kind, seed).exists():
                        common.write_json(path(name, kind, seed),
                                          run_peer(kind, data.get_problem(name), seed))
        for group in args.problems:
            members = copsl.GROUPS.get(group, [group])
            for kind in set(kinds) & set(OURS):
                if all(path(n, kind, s).exists() for n in members for s in seeds):
                    continue
                for (n, s), row in train_ours(kind.split("-")[1], members, seeds).items():
                    common.write_json(path(n, kind, s), row)
    found = {}
    for name in names:
        for kind in kinds:
            rows = [json.loads(path(name, kind, s).read_text()) for s in seeds
                    if path(name, kind, s).exists()]
            if rows:
                found[name, kind] = rows
    summarise(found, names)


if __name__ == "__main__":
    common.run_cli(main)
