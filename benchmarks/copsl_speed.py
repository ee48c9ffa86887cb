"""What CoPSL costs: copsl.py against the plain arrangement, in one process.

The idea
    copsl.py stacks towers, problems and seeds into single tensor operations and evaluates every 10
    steps. This script first checks that the losses stay those of benchmarks/copsl_plain.py, then
    measures what that saves on the paper's experiment (F1-F6, 500 steps of 30 preferences).

Run
    python benchmarks/copsl_speed.py             one thread, four minutes
    python benchmarks/copsl_speed.py --quick     seconds: a few steps, whose ratios mean little

Prints
    All times are CPU seconds of this process (time.process_time), medians over --repeats of pieces
    of --steps steps, taken in turn, so that a busy machine disturbs all; given per seed and for 500
    steps. The last line is RESULT key=value ...:
    same_losses, same_gradnorm   largest relative difference of a loss to plain, float64, 20 steps
    train_1, train_10            training only, plain / ours at 1 and at 10 seeds, per seed
    run_1, run_10                with tests: plain after every step, ours every 10 steps, checkpoint
    gradnorm_1, gradnorm_10      training only with GradNorm
    floor_10                     ours / the matrix products of its steps as bare torch.bmm calls
    tuned_share, tuned_share_1   CPU seconds a seed until --recipe tuned has the mean HV that the
                                 paper's recipe ends with, tests every 5 steps, / plain's whole run;
                                 for 10 seeds at once and for one; tuned_step: after which step
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copsl
import data
from benchmarks import copsl_plain as plain

STEPS, SEEDS = 500, 10  # of the paper

# ================================================================================================
# Both sides
# ================================================================================================


class Clocked:
    """A common.Run for copsl.train that keeps nothing but the time of every evaluation."""

    def __init__(self):
        self.began, self.rows = time.process_time(), []

    def progress(self, items, *_, **__):
        return items

    def gather(self, part):
        return part

    def log(self, **row):
        self.rows.append((row["step"], time.process_time() - self.began, row["hv"]))


def build_world(seeds, *options, dtype=torch.float32):
    args = copsl.resolve(copsl.build_parser().parse_args(["--seeds", str(seeds), *options]))
    return copsl.World(copsl.load_problems(args), list(range(seeds)), args, torch.device("cpu"),
                       dtype)


def fresh_state(world, method, lr=1e-3):
    """What copsl.train hands to train_step."""
    state = {"ideal": None, "nadir": None, "weights": None, "first": None}
    if method == "copsl-gradnorm":
        state["weights"] = torch.ones(len(world.seeds), len(world.problems), dtype=world.dtype,
                                      requires_grad=True)
        state["weigher"] = torch.optim.Adam([state["weights"]], lr)
    return state


class Ours:
    """Training steps of copsl.py, one piece after another, without evaluation."""

    def __init__(self, seeds, method):
        self.world, self.step = build_world(seeds), 0
        self.net, self.optimizer = self.world.network(method)
        self.state = fresh_state(self.world, method)
        self.preferences = self.world.preferences()

    def __call__(self, steps):
        for _ in range(steps):
            p = self.preferences[self.step % STEPS]
            copsl.train_step(self.world, self.net, self.optimizer, p, self.state)
            self.step += 1


def whole_run(seeds, steps, *options):
    """copsl.train from the first draw to the last evaluation -> Clocked, history."""
    world, run = build_world(seeds, "--steps", str(steps), *options), Clocked()
    _, found = copsl.train(world, run, "copsl", None, lambda current: None)
    return run, found["history"]


class Floor:
    """The matrix products of a step as torch.bmm: forward, and both products of backward.

    The gradient at the preferences is never needed, so the first layer has one product less.
    """

    def __init__(self, seeds, towers=6, batch=30, width=256, n_obj=2, n_var=6):
        def draw(*shape):
            return torch.randn(*shape)
        every = seeds * towers
        layers = [(seeds, n_obj, width), (every, width, width), (every, width, n_var)]
        self.layers = [(draw(s, batch, a), draw(s, a, b), draw(s, batch, b)) for s, a, b in layers]

    def __call__(self, steps):
        for _ in range(steps):
            for i, (x, w, at_output) in enumerate(self.layers):
                torch.bmm(x, w)
                torch.bmm(x.mT, at_output)
                if i:
                    torch.bmm(at_output, w.mT)

# ================================================================================================
# Same numbers
# ================================================================================================


def same_problems():
    """Largest relative difference between plain's F1-F6 and data.py's on random points."""
    gaps = []
    for k, kind in enumerate(plain.PROBLEMS):
        x = torch.rand(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        a, b = kind().evaluate(x), data.get_problem(f"f{k + 1}")(x)
        gaps.append(((a - b).abs() / b.abs().clamp_min(1e-3)).max().item())
    return max(gaps)


def same_losses(method, steps=20):
    """Largest relative difference between plain's losses and ours, from the same weights."""
    world = build_world(1, dtype=torch.float64)
    ours, optimizer = world.network(method)
    state, preferences = fresh_state(world, method), world.preferences()
    problems = [kind() for kind in plain.PROBLEMS]
    net = plain.PlainCoPSL(2, [p.n_var for p in problems]).double()
    with torch.no_grad():
        for k, tower in enumerate([net.shared, *net.towers]):
            layers = [(tower, 0, 0)] if k == 0 else [(tower[0], 1, k - 1), (tower[2], 2, k - 1)]
            for linear, i, t in layers:
                linear.weight.copy_(ours.weights[i][0, t].mT)
                linear.bias.copy_(ours.biases[i][0, t, 0])
    adam, weigher = plain.plain_optimizer(net), torch.optim.Adam([net.weights], 1e-3)
    gap, first = 0.0, None
    for p in preferences[:steps]:
        a = copsl.train_step(world, ours, optimizer, p, state)[0]
        if method == "copsl":
            b = plain.plain_step(net, problems, p[0], adam)
        else:
            b = plain.plain_gradnorm_step(net, problems, p[0], adam, weigher, first)
            first = b if first is None else first
        gap = max(gap, ((a - b).abs() / b.abs()).max().item())
    return gap

# ================================================================================================
# Comparisons
# ================================================================================================


def measure(units, repeats, steps):
    """units: {name: (callable of steps, seeds)} -> {name: median CPU-s a seed for 500 steps}."""
    for go, _ in units.values():
        go(max(1, steps // 10))  # caches warm, Adam's moments there
    times = {name: [] for name in units}
    for _ in range(repeats):
        for name, (go, seeds) in units.items():
            began = time.process_time()
            go(steps)
            times[name].append((time.process_time() - began) * STEPS / steps / seeds)
    return {name: statistics.median(t) for name, t in times.items()}


def compare_speed(options):
    """Tables of (a)-(d) -> ratios."""
    def plain_whole(steps):
        plain.plain_train(0, steps, evaluate=True)

    units = {
        "plain": (lambda steps: plain.plain_train(0, steps), 1),
        "ours 1": (Ours(1, "copsl"), 1), "ours 10": (Ours(SEEDS, "copsl"), SEEDS),
        "floor 10": (Floor(SEEDS), SEEDS),
        "plain run": (plain_whole, 1),
        "run 1": (lambda steps: whole_run(1, steps), 1),
        "run 10": (lambda steps: whole_run(SEEDS, steps), SEEDS),
        "plain gradnorm": (lambda steps: plain.plain_train(0, steps, gradnorm=True), 1),
        "gradnorm 1": (Ours(1, "copsl-gradnorm"), 1),
        "gradnorm 10": (Ours(SEEDS, "copsl-gradnorm"), SEEDS),
        "psl 10": (Ours(SEEDS, "psl"), SEEDS)}
    t = measure(units, options.repeats, options.steps)
    ratios = {"train_1": t["plain"] / t["ours 1"], "train_10": t["plain"] / t["ours 10"],
              "run_1": t["plain run"] / t["run 1"], "run_10": t["plain run"] / t["run 10"],
              "gradnorm_1": t["plain gradnorm"] / t["gradnorm 1"],
              "gradnorm_10": t["plain gradnorm"] / t["gradnorm 10"],
              "floor_10": t["ours 10"] / t["floor 10"]}
    rows = [("training, plain", "plain", None), ("training, ours, 1 seed", "ours 1", "train_1"),
            ("training, ours, 10 seeds", "ours 10", "train_10"),
            ("its matrix products alone, 10 seeds", "floor 10", None),
            ("training, PSL (nothing shared), ours, 10 seeds", "psl 10", None),
            ("whole run, plain, test every step", "plain run", None),
            ("whole run, ours, 1 seed, every 10", "run 1", "run_1"),
            ("whole run, ours, 10 seeds, every 10", "run 10", "run_10"),
            ("GradNorm, plain", "plain gradnorm", None),
            ("GradNorm, ours, 1 seed", "gradnorm 1", "gradnorm_1"),
            ("GradNorm, ours, 10 seeds", "gradnorm 10", "gradnorm_10")]
    print(f"\n| {STEPS} steps on F1-F6 | CPU-s a seed | plain / ours |\n|---|---|---|")
    for what, name, key in rows:
        print(f"| {what} | {t[name]:.3f} | {f'{ratios[key]:.2f}' if key else ''} |")
    print(f"\nours / floor at 10 seeds: {ratios['floor_10']:.2f}", flush=True)
    return ratios, t


def compare_tuned(options, t):
    """When --recipe tuned has the paper recipe's final mean HV -> RESULT entries."""
    steps = str(STEPS if not options.quick else options.steps)
    found = {}
    final = whole_run(SEEDS, int(steps), "--eval-every", steps)[0].rows[-1][2]
    for seeds in (SEEDS, 1):
        rows = whole_run(seeds, int(steps), "--recipe", "tuned", "--eval-every",
                         "1" if options.quick else "5")[0].rows
        step, spent, hv = next((r for r in rows if r[2] >= final), rows[-1])
        share = spent / seeds / t["plain run"]
        word = "reached" if hv >= final else "NOT reached"
        print(f"tuned, {seeds} seed(s): mean HV {final:.4f} of the paper's recipe {word} after "
              f"step {step}, {spent / seeds:.3f} CPU-s a seed, {share:.3f} of plain's whole run; "
              f"at the end {rows[-1][2]:.4f} after {rows[-1][1] / seeds:.2f} CPU-s a seed",
              flush=True)
        suffix = "" if seeds == SEEDS else "_1"
        found |= {f"tuned_share{suffix}": share, f"tuned_step{suffix}": step}
    return {**found, "paper_hv": final, "tuned_hv": rows[-1][2]}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=None, help="default 5; 1 with --quick")
    parser.add_argument("--steps", type=int, default=None,
                        help="of a measured piece; default 100; 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    options = parser.parse_args(argv)
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.steps = options.steps or (2 if options.quick else 100)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    began = time.perf_counter(), time.process_time()
    same = {"same_losses": same_losses("copsl"), "same_gradnorm": same_losses("copsl-gradnorm")}
    print(f"largest relative difference to plain, float64: problems {same_problems():.1e}, losses "
          f"of 20 steps {same['same_losses']:.1e}, with GradNorm {same['same_gradnorm']:.1e}")
    if max(*same.values(), same_problems()) > 1e-8:
        sys.exit("copsl.py and the plain arrangement do not compute the same")
    ratios, t = compare_speed(options)
    ratios |= compare_tuned(options, t)
    spent = time.perf_counter() - began[0], time.process_time() - began[1]
    print(f"\nCPU times, medians of {options.repeats}, 1 thread, torch {torch.__version__}; wall / "
          f"CPU time {spent[0] / spent[1]:.2f}; whole script {spent[0]:.0f} s")
    print("RESULT " + " ".join(f"{k}={v:.1e}" for k, v in same.items()) + " "
          + " ".join(f"{k}={v:.4g}" for k, v in ratios.items()))


if __name__ == "__main__":
    main()
