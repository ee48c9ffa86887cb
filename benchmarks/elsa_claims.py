"""The claims of elsa.py, measured over seeds: every method, ablation and channel on equal clients.

    python benchmarks/elsa_claims.py                          the small world, 5 seeds
    python benchmarks/elsa_claims.py --summary                tables from what has been run already
    python benchmarks/elsa_claims.py --world trec --model DIR --max-length 32 --lr 2e-3 ...
    python benchmarks/elsa_claims.py --read RUN               the models of one run of elsa.py or
                                                              beyond/elsa_*.py, read through every
                                                              channel, and attacked

Every (seed, setting) is one JSON file under --out, so the work can be stopped, continued, and split
over processes with --seeds and --part I/N. Channels, attacks and times are those of beyond/; where
a setting names no channel, it is elsa.py's, the paper's sketch. The claims of the small world:
    C1  Clusters of the trusted clients are the domains, exactly.
    C2  Every poisoned client is trusted less than every honest one.
    C3  ELSA beats flat FedAvg by at least 20 points here, and ties (within 2 points) when the
        domains do not contradict each other (topics-same, nobody poisoned).
    C4  What a channel costs in accuracy at its bytes.
    C5  What the three attacks recover.
    C6  The latency-aware assignment shortens the round's critical path against random edges.
A claim "holds" when the mean paired difference has the claimed sign and a paired t-test over the
seeds gives p < 0.05, "not shown" when p is larger, "fails" when the sign is the other one.
"""
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scipy import stats

import common
import elsa
from beyond import elsa_attacks, elsa_channels, elsa_plan

PLAIN = {"ssop": "none", "channel": "none"}


def channels():
    """Name -> flags of every channel, without SS-OP."""
    found = {}
    for ratio in (1.0, .5, .25):
        for recovery in ("median", "lsq"):
            found[f"sketch {ratio:g} {recovery}"] = {
                "channel": "sketch", "ratio": ratio, "recovery": recovery}
    for ratio in (.5, .25, .125, .0625):
        found[f"lowrank {ratio:g}"] = {"channel": "lowrank", "ratio": ratio}
    for ratio in (.25, .125):
        found[f"lowrank {ratio:g} 8 bit"] = {"channel": "lowrank", "ratio": ratio, "bits": 8}
    for bits in (8, 4, 2):
        found[f"quant {bits} bit"] = {"channel": "quant", "bits": bits}
    for ratio, recovery in ((.5, "median"), (.5, "lsq"), (.25, "lsq")):
        found[f"adapters {ratio:g} {recovery}"] = {
            "channel": "sketch", "ratio": ratio, "recovery": recovery, "sketch": "adapters"}
    found["adapters 8 bit"] = {"channel": "quant", "bits": 8, "sketch": "adapters"}
    return {name: {**PLAIN, "bits": 32, "sketch": "activations", **flags}
            for name, flags in found.items()}


def plan(world):
    """Name -> (method, flags) of one seed."""
    found = {m: (m, {}) for m in elsa.METHODS} if world == "topics" else \
        {m: (m, PLAIN) for m in ("central", "fedavg", "elsa")}
    if world == "topics":
        found["elsa no trust"] = ("elsa", {"no_trust": True})
        found["elsa no clusters"] = ("elsa", {"no_cluster": True})
        found["elsa cloud mix 1"] = ("elsa", {"cloud_mix": 1.0})
    else:
        found["elsa no trust"] = ("elsa", {**PLAIN, "no_trust": True})
        found["elsa cloud 1"] = ("elsa", {**PLAIN, "cloud_every": 1})
    found["ssop none"] = ("elsa", PLAIN)
    found["ssop link"] = ("elsa", {**PLAIN, "ssop": "link"})
    for rank in (8, 16, 32) if world == "topics" else (8, 32, 128):
        found[f"ssop edge {rank}"] = ("elsa", {**PLAIN, "ssop": "edge", "ssop_rank": rank})
    found |= {name: ("elsa", flags) for name, flags in channels().items()}
    if world != "topics":
        for name, flags in channels().items():
            if name.startswith("sketch"):
                for mode in ("link", "edge"):
                    found[f"{name} {mode}"] = ("elsa", {**flags, "ssop": mode, "ssop_rank": 32})
        for name in ("lowrank 0.25 8 bit", "lowrank 0.125 8 bit"):
            found[f"{name} link"] = ("elsa", {**channels()[name], "ssop": "link", "ssop_rank": 32})
        found["quant 8 bit edge"] = ("elsa", {**channels()["quant 8 bit"], "ssop": "edge",
                                              "ssop_rank": 32})
    return found


def parse(words):
    """Flags of elsa.py with the channels of beyond/elsa_channels.py -> settings."""
    seam = elsa_channels.SEAM
    parser = elsa.build_parser(__doc__, seam["channels"], [elsa_channels.add_bits])
    return elsa.resolve(parser.parse_args(words), settle=seam["settle"])


def cut_setup(setup, rank, seed):
    """The set-up with SS-OP of a smaller rank: singular vectors are nested."""
    turns = [elsa.SubspaceRotation.random_turn(rank, common.torch_generator(seed, "rotation", k))
             for k in range(len(setup["bases"]))]
    known = setup.setdefault("directions", {})  # of low rank: the first to need them shares them
    return {**setup, "bases": [b[:, :rank].contiguous() for b in setup["bases"]], "turns": turns,
            "directions": known}


def measure(options, dataset, seed, wanted, folder, largest):
    """Run the wanted settings of one seed; write one JSON file each."""
    where = folder / f"{dataset}-{seed}"
    names = [n for n in wanted if not (where / f"{n}.json").exists()]
    if not names:
        return
    out = where / f"run-{common.cache_key(*names)}"  # parts of one seed may run side by side
    command = ["--dataset", dataset, "--seed", str(seed), "--out-dir", str(out),
               "--overwrite", "--ssop-rank", str(largest), *options]
    args = parse(command)
    rank = {"tiny": 16, "tiny-decoder": 16}.get(args.model, 32)
    with common.Run(args, "claims") as run:
        world = elsa.build_federation(args, run, elsa_channels.CHANNELS)
        setup, plain = elsa.set_up(world, run), dict(vars(args))
        for name in names:
            method, change = wanted[name]
            vars(args).update({**plain, "ssop_rank": rank, **change})
            small = cut_setup(setup, args.ssop_rank, seed)
            if method == "central":
                args.rounds = min(args.rounds, 3)
            state, start = elsa.fresh_state(method), time.process_time()
            history = elsa.train_method(world, run, method, small, state, lambda state: None)
            found = {"history": history, "bytes": state["bytes"], "rounds": args.rounds,
                     "cpu_seconds": round(time.process_time() - start, 1)}
            if name == "elsa":
                found |= grouping(world, small, history)
                found["privacy"] = {r: elsa_attacks.privacy_report(
                    world, cut_setup(setup, r, seed), state["cloud"])
                    for r in (8, 16, 32, 128, 384) if r <= largest}
            common.write_json(where / f"{name}.json", found)
            print(f"{dataset} seed {seed} {name}: served {history[-1]['served']:.2f}, "
                  f"{found['cpu_seconds']} CPU-s", file=sys.stderr, flush=True)
            vars(args).update(plain)


def grouping(world, setup, history):
    """C1, C2 and C6 of one seed."""
    groups, labels, _ = elsa.place_clients(world, "elsa", setup)
    pairs = {(world.domain[k], labels[k]) for k in world.honest if labels[k] is not None}
    domains = set(world.domain)
    trust = setup["trust"]
    bad, good = list(world.poisoned), world.honest
    same = [setup["distance"][a, b].item() for a in good for b in good
            if a < b and world.domain[a] == world.domain[b]]
    other = [setup["distance"][a, b].item() for a in good for b in good
             if a < b and world.domain[a] != world.domain[b]]
    latency, rng = world.network["latency"], common.numpy_generator(world.args.seed, "random place")
    members, edges = [k for g in groups.values() for k in g], world.args.edges
    draws = [rng.permutation(members).tolist() for _ in range(20)]
    near = {e: [k for k in members if int(latency[k].argmin()) == e] for e in range(edges)}
    return {"clusters_exact": len(pairs) == len(domains) == len({c for _, c in pairs}),
            "honest_dropped": sum(labels[k] is None for k in good),
            "poisoned_kept": sum(labels[k] is not None for k in bad),
            "trust_margin": (min(trust[k].item() for k in good)
                             - max((trust[k].item() for k in bad), default=0.0)),
            "auc": statistics.mean((trust[g] > trust[b]).item() + .5 * (trust[g] == trust[b]).item()
                                   for g in good for b in bad) if bad else None,
            "distance_same": statistics.median(same),
            "distance_other": statistics.median(other) if other else None,
            "seconds": elsa_plan.round_seconds(world, groups, history),
            "seconds_nearest": elsa_plan.round_seconds(world, near, history),
            "seconds_random": statistics.mean(elsa_plan.round_seconds(
                world, {e: d[e::edges] for e in range(edges)}, history) for d in draws)}


def read_run(folder, only):
    """ELSA's final models of a finished run through every channel and kind of SS-OP, untrained for
    it, and the attacks at several ranks."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    flags = parse([])
    vars(flags).update({k: v for k, v in settings.items() if v is not None}, resume=False,
                       overwrite=True, out_dir=folder / "read", data_dir=Path(settings["data_dir"]))
    with common.Run(flags, "read") as run:
        state = common.load_tensors(folder / "checkpoint.pt", "a checkpoint of elsa.py")["state"]
        world, setup = elsa.build_federation(flags, run, elsa_channels.CHANNELS), state["setup"]
        state, seed = state["trained"]["elsa"], flags.seed
        if "directions" not in setup:  # not trained through low rank: those of the trained model
            setup["warm"] = state["cloud"]
        groups = list(elsa.place_clients(world, "elsa", setup)[0].values())
        cuts = {k: world.cuts[k] for g in groups for k in g}
        wanted = {"none": PLAIN, **channels()}
        wanted = {f"{n}, ssop {m}": {**f, "ssop": m} for n, f in wanted.items()
                  if not n.startswith("adapters") for m in ("none", "link", "edge")
                  if m == "none" or n in ("none", "quant 8 bit") or n.startswith("sketch")}
        wanted = {n: f for n, f in wanted.items() if not only or n.replace(",", "") in only}
        largest = setup["bases"][0].shape[1]
        ranks = [r for r in (8, 32, 128) if r <= largest]
        privacy = {r: elsa_attacks.privacy_report(world, cut_setup(setup, r, seed), state["cloud"])
                   for r in ranks} if not only else {}
        if not only:
            print_attacks(world, flags, setup, state["cloud"], privacy)
        print("\n| channel | bytes | error | served % | cloud % |\n|---|---|---|---|---|")
        small = cut_setup(setup, min(32, largest), seed)
        x = None
        for name, change in wanted.items():
            vars(flags).update(change)
            codecs, _ = elsa.make_codecs(world, small, world.cuts[0])
            links = {k: elsa.make_link(world, small, k, codecs) for k in range(len(world.clients))}
            found = elsa.evaluate(world, run, groups, state, links, cuts)
            if x is None:
                ids, mask = world.batch(world.clients[0][1][:64])
                elsa.load_adapters(world.model, state["cloud"])
                x = world.model.part1(ids, mask, world.cuts[0][0])[0].detach()[mask > 0]
            link = elsa.Link(codecs)
            error = ((link.carry(x, elsa.EXCHANGES[0]) - x).norm() / x.norm()).item()
            share = link.sent[elsa.EXCHANGES[0]] / (x.numel() * x.element_size())
            print(f"| {name} | {share:.3f} | {error:.2f} | {found['served']:.1f} | "
                  f"{found['cloud']:.1f} |", flush=True)


def print_attacks(world, flags, setup, state, by_rank):
    """The attacks at several ranks without a channel, then through every channel at one rank."""
    print("| r | attack | top-1 % | top-5 % |\n|---|---|---|---|")
    for rank, rows in by_rank.items():
        for name, first, five in rows:
            print(f"| {rank} | {name} | {first:.1f} | {five:.1f} |")
    rank = min(32, setup["bases"][0].shape[1])
    print(f"\nthrough a channel, r {rank}, top-1 % | in the clear | under SS-OP | complement | "
          "Procrustes |\n|---|---|---|---|---|")
    small = cut_setup(setup, rank, flags.seed)
    for name, change in channels().items():
        if not name.startswith("adapters") and not name.endswith("lsq"):  # lsq sends the same
            vars(flags).update(change)
            codecs, _ = elsa.make_codecs(world, setup, world.cuts[0])
            rows = elsa_attacks.privacy_report(world, small, state, codecs.get(elsa.EXCHANGES[0]))
            print(f"| {name.removesuffix(' median')} | "
                  + " | ".join(f"{row[1]:.1f}" for row in rows) + " |", flush=True)


def spread(numbers, digits=1):
    numbers = [n for n in numbers if n is not None]
    if not numbers:
        return "-"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def verdict(better, worse, margin=0.0):
    """Is better - worse + margin > 0, paired over seeds?"""
    gaps = [a - b + margin for a, b in zip(better, worse, strict=True)]
    mean = statistics.mean(gaps)
    p = stats.ttest_1samp(gaps, 0).pvalue if len(gaps) > 1 and len(set(gaps)) > 1 else 1.0
    word = "fails" if mean < 0 else "holds" if p < .05 else "not shown"
    return (f"{word} (mean {mean - margin:+.2f}, p {p:.3f}, "
            f"{sum(g > 0 for g in gaps)}/{len(gaps)} seeds)")


def summarise(folder, dataset):
    """Print the markdown tables of one data set."""
    runs = {}
    for path in sorted(folder.glob(f"{dataset}-[0-9]*/*.json")):
        if path.parent.name.rpartition("-")[0] == dataset:
            seed = int(path.parent.name.rpartition("-")[2])
            runs.setdefault(path.stem, {})[seed] = json.loads(path.read_text())
    if not runs:
        return
    print(f"\n### {dataset}\n\n| setting | served % | cloud % | MB a round | CPU-s | seeds |\n"
          "|---|---|---|---|---|---|")
    for name, by_seed in runs.items():
        last = [r["history"][-1] for r in by_seed.values()]
        cpu = statistics.mean(r["cpu_seconds"] for r in by_seed.values())
        print(f"| {name} | {spread([h['served'] for h in last])} | "
              f"{spread([h['cloud'] for h in last])} | "
              f"{statistics.mean(h['megabytes'] for h in last):.2f} | {cpu:.0f} | {len(last)} |")

    def served(name, key="served"):
        return [r["history"][-1][key] for _, r in sorted(runs[name].items())]

    def of(key):
        return [r[key] for _, r in sorted(runs["elsa"].items())]

    if "elsa" not in runs:
        return
    n = len(of("auc"))
    print(f"""
- C1 clusters are the domains: {sum(of('clusters_exact'))} of {n} seeds; honest clients dropped \
{sum(of('honest_dropped'))}, poisoned kept {sum(of('poisoned_kept'))}; median KL within a domain \
{spread(of('distance_same'))}, between {spread(of('distance_other'))}
- C2 least honest trust minus largest poisoned trust: {spread(of('trust_margin'), 2)}, AUC \
{spread(of('auc'), 2)}
- C6 seconds of a round: ELSA {spread(of('seconds'), 2)}, nearest \
{spread(of('seconds_nearest'), 2)}, random {spread(of('seconds_random'), 2)}; shorter than random: \
{verdict(of('seconds_random'), of('seconds'))}""")
    if "fedavg" in runs:
        print(f"- C3 ELSA 20 points above FedAvg: {verdict(served('elsa'), served('fedavg'), -20)}")
        print(f"- ELSA's cloud model within 2 points of FedAvg: "
              f"{verdict(served('elsa', 'cloud'), served('fedavg'), 2)}")
        print(f"- ELSA's edges within 2 points of FedAvg: "
              f"{verdict(served('elsa'), served('fedavg'), 2)}")
    print("\n| r | attack | top-1 % | top-5 % |\n|---|---|---|---|")
    reports = of("privacy")
    for rank in reports[0]:
        for i, row in enumerate(reports[0][rank]):
            if i or rank == next(iter(reports[0])):
                print(f"| {rank if i else '-'} | {row[0]} | "
                      f"{spread([r[rank][i][1] for r in reports])} | "
                      f"{spread([r[rank][i][2] for r in reports])} |")


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--world", choices=["topics", "topics-same", "trec", "sst2"],
                        default="topics", help="default %(default)s")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="default %(default)s")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th setting from the I-th on")
    parser.add_argument("--only", default=None, help="comma-separated settings (default: all)")
    parser.add_argument("--out", type=Path, default=Path("runs/elsa-claims"),
                        help="default %(default)s")
    parser.add_argument("--read", type=Path, default=None,
                        help="a finished run of elsa.py or of beyond/elsa_*.py")
    parser.add_argument("--summary", action="store_true",
                        help="run nothing; print what --out holds")
    args, options = parser.parse_known_args()  # the rest goes to elsa.py
    if args.read:
        return read_run(args.read, args.only and args.only.split(","))
    if args.summary:
        for dataset in ("topics", "topics-same", "trec", "sst2"):
            summarise(args.out, dataset)
        return
    wanted = plan("topics" if args.world == "topics" else "real")
    if args.world == "topics-same":
        wanted = {m: (m, {}) for m in ("fedavg", "elsa")}
        options = ["--poison", "", *options]
    if args.only:
        wanted = {n: wanted[n] for n in args.only.split(",")}
    first, parts = map(int, args.part.split("/"))
    wanted = {n: w for i, (n, w) in enumerate(wanted.items()) if i % parts == first}
    largest = 32 if args.world.startswith("topics") else 384
    for seed in map(int, args.seeds.split(",")):
        measure(options, args.world, seed, wanted, args.out, largest)


if __name__ == "__main__":
    common.run_cli(main, continues=True)
