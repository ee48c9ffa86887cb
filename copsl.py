"""CoPSL: Pareto sets of several multi-objective problems, learned together

Shang et al., "Collaborative Pareto Set Learning in Multiple Multi-Objective Optimization Problems",
IJCNN 2024, arXiv 2404.01224. Authors' code: github.com/ckshang/CoPSL (read at 02a297f).

The idea
    A network that maps a preference between objectives to a solution holds the whole Pareto set of
    a problem. CoPSL learns K problems at once: one shared layer reads the preference, and one tower
    per problem turns what it found into a solution. Training draws preferences and descends a
    scalarisation of the objectives; no data and no population are needed.

Run
    python copsl.py                                        the paper's F1-F6, 10 seeds: 1/2 minute
    python copsl.py --problems re                          its engineering problems RE31-34, RE37
    python copsl.py --method all --loss tch                CoPSL, CoPSL with GradNorm, separate PSL
    python copsl.py --recipe tuned                         our recipe: same network, better fronts
    python copsl.py --problems mine.py:Truss mine.py:Beam  your own (see data.get_problem)

Paper map (our numbers, in the order of the paper's method section)
    Eq. E1  Pareto set model        CoPSL.forward, PSL
    Eq. E2  scalarisations          scalarize
    Eq. E3  collaborative loss      train_step
    Eq. E4  GradNorm                gradnorm_weights, CoPSL.shared_gradient_norms
    Eq. E5  hypervolume             evaluate, common.hypervolume

Symbols
    p         preferences    (S, B, m)       on the simplex; + 1e-4 in training
    f         values         (S, K, B, m)    objectives, all minimised
    x         solutions      K x (S, B, n)   in the unit cube; Problem.scale brings them to bounds
    z         ideal          (m,)            reference of the scalarisations; the paper's is 0
    m, n_k    n_obj, n_vars  numbers         objectives, variables of problem k
    K, S, B   problems, seeds, preferences a step (--seeds 10, --batch 30)
    γ, μ, α   gamma, mu, alpha               --gamma 100, --mu .1, --alpha 1.75
    w, G, r   weights, norms, rates  (S, K)  GradNorm: weights, gradient norms, training rates

Cost
    A step on F1-F6 is 6 x 30 rows through three small layers: all overhead of small operations.
    Here towers are stacked into one tensor, problems are tensor expressions without loops over
    variables, and all seeds are trained at once as a leading dimension, so that most of the time is
    matrix products. GradNorm takes one more backward pass, to the shared layer's output, instead of
    K. benchmarks/copsl_speed.py measures both beside a plain arrangement.

Results
    F1-F6, 10 seeds, half a CPU-minute: mean HV .8169 (the authors' code .8228), tuned .8680, front
    at 100 points .8718. `tuned` is above the paper's recipe on all 11 problems of the paper.
    Training takes a fifth of a plain arrangement's CPU time a seed, GradNorm a twelfth. Spreads,
    NSGA-II/III and MOEA/D at equal evaluations, what does not hold: benchmarks/RESULTS.md.

Where we depart (the marks can be searched for)
    DEVIATION 1   COSMOS subtracts γ cos(p, f), as its authors do; the CoPSL code adds it (--recipe
                  official adds it too).
    DEVIATION 2   all seeds train in one process, each with generators of its own; the authors' code
                  runs them one by one. Same numbers, other random draws.
    DEVIATION 3   --recipe tuned is ours: see TUNED.
    DEVIATION 4   GradNorm's weights stay above 1e-3: Adam's steps could take one below 0, and its
                  problem would then be made worse on purpose.
    UNSPECIFIED 1 test preferences for m > 3: the largest Das-Dennis set of at most 210 points.

References
    PSL: Lin et al., NeurIPS 2022. COSMOS: Ruchte and Grabocka, ICDM 2021. Smooth Tchebycheff: Lin
    et al., ICML 2024. GradNorm: Chen et al., ICML 2018. RE: Tanabe and Ishibuchi, 2020.
"""
# ================================================================================================
# Setup
# ================================================================================================
import csv
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

METHODS = {"copsl": "CoPSL", "copsl-gradnorm": "CoPSL + GradNorm", "psl": "PSL, one by one"}
LOSSES = ["mtch", "tch", "ls", "cosmos", "stch", "smtch"]
GROUPS = {"f": ["f1", "f2", "f3", "f4", "f5", "f6"], "re": ["re31", "re32", "re33", "re34", "re37"]}

# --recipe: what training does beside descending the loss. Ours (DEVIATION 3) was chosen on seeds
# that benchmarks/RESULTS.md does not report; the network and the budget are the paper's.
PAPER = {"loss": "mtch", "lr": 1e-3, "betas": (.9, .999), "even": False, "normalise": False,
         "mean": False, "clip": None, "decay": False, "saturation": 0, "circle": True}
TUNED = {
    "loss": "smtch", "lr": 5e-3, "betas": (.9, .95),
    "even": True,         # preferences evenly over the simplex, its edges included
    "normalise": True,    # objectives by running estimates of ideal and nadir
    "mean": True,         # mean over preferences instead of the sum
    "clip": 1.0,          # gradient norm of each seed's network
    "decay": True,        # cosine learning rate
    "saturation": 2e-4,   # keeps solutions off the flat ends of the sigmoid
    "circle": False,      # test preferences on the simplex, where training draws its own
}

# ================================================================================================
# Model: from a preference to a solution of every problem
# ================================================================================================


class CoPSL(nn.Module):
    """K Pareto sets over one shared layer (E1), S independent networks ("seeds") at once.

    n_obj: m; n_vars: [n_1 ... n_K]; generators: one torch.Generator per seed for the initial draw
    (default: torch's own, one seed). forward(p (S, B, m)) -> list of K solutions (S, B, n_k) in the
    unit cube. Initialised as nn.Linear. Every parameter has shape (S, 1 or K, in, out); towers are
    padded to the largest n_k, and padding never gets a gradient.
    """
    shared = True

    def __init__(self, n_obj, n_vars, width=256, generators=(None,)):
        super().__init__()
        self.n_obj, self.n_vars, self.width = n_obj, list(n_vars), width
        towers = len(self.n_vars)
        sizes = [(1 if self.shared else towers, n_obj, width), (towers, width, width),
                 (towers, width, max(self.n_vars))]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for count, fan_in, fan_out in sizes:
            for group, rows in ((self.weights, fan_in), (self.biases, 1)):
                draws = [torch.rand(count, rows, fan_out, generator=g) for g in generators]
                group.append((2 * torch.stack(draws) - 1) / math.sqrt(fan_in))
        self.branches = None

    def forward(self, preferences):
        (w1, w2, w3), (b1, b2, b3) = self.weights, self.biases
        h = F.relu(preferences[:, None] @ w1 + b1)  # (S, 1 or K, B, width)
        h = h.expand(-1, len(self.n_vars), -1, -1)  # (S, K, B, width): what each tower reads
        if h.requires_grad:
            self.branches = h
        # Eq. (E1): x_k = sigmoid(tower_k(shared(p)))
        x = torch.sigmoid(F.relu(h @ w2 + b2) @ w3 + b3)  # (S, K, B, max n)
        return [x[:, k, :, :n] for k, n in enumerate(self.n_vars)]

    def shared_gradient_norms(self, preferences, losses):
        """‖∇_W L_k‖ for the shared layer's weight W and every problem. losses (S, K) -> (S, K).

        One backward pass serves all problems: L_k reaches W only through its own branch, so the
        gradient at the branches keeps the problems apart. The graph is kept for the caller.
        """
        h = self.branches
        at_branch, = torch.autograd.grad(losses.sum(), h, retain_graph=True)  # (S, K, B, width)
        per_weight = preferences[:, None].mT @ (at_branch * (h > 0))  # (S, K, m, width)
        return per_weight.flatten(2).norm(dim=-1)

    def num_parameters(self):
        """Parameters of one seed's network, padding not counted."""
        first = sum(p[0].numel() for p in (self.weights[0], self.biases[0]))
        w = self.width
        return first + sum((w + 1) * w + (w + 1) * n for n in self.n_vars)


class PSL(CoPSL):
    """K separate networks m - 256 - 256 - n_k, stacked: the baseline that shares nothing."""
    shared = False


# ================================================================================================
# Method: pure functions, to be copied
# ================================================================================================


def scalarize(values, preferences, kind, ideal=0.0, rho=.01, gamma=100.0, mu=.1, cosmos_sign=-1):
    """One number per solution, to be minimised (E2).

    values f: (..., m); preferences p > 0: (..., m), broadcast against them; ideal z: (m,) or number
    kind: "ls", "tch", "mtch", "cosmos" as in the paper; "stch" smooth Tchebycheff (Lin et al. 2024)
    and "smtch" its form with weights 1/p, as mtch has them, normalised to sum 1
    rho: weight of the sum that keeps (m)tch strictly monotone; gamma, cosmos_sign: COSMOS's angle
    term; mu > 0: how smooth the maximum is, in units of f -> (...).
    """
    f, p = values - ideal, preferences
    if kind == "ls":  # Eq. (E2a): Σ_j p_j f_j
        return (p * f).sum(-1)
    if kind == "tch":  # Eq. (E2b): max_j p_j f_j + ρ Σ_j f_j
        return (p * f).amax(-1) + rho * f.sum(-1)
    if kind == "mtch":  # Eq. (E2c): max_j f_j / p_j + ρ Σ_j f_j
        return (f / p).amax(-1) + rho * f.sum(-1)
    if kind == "cosmos":  # Eq. (E2d): Σ_j p_j f_j - γ cos(p, f)   DEVIATION 1
        return (p * f).sum(-1) + cosmos_sign * gamma * F.cosine_similarity(p, f, dim=-1)
    weights = p if kind == "stch" else (1 / p) / (1 / p).sum(-1, keepdim=True)
    # Smooth Tchebycheff: μ log Σ_j exp(w_j f_j / μ) -> max_j w_j f_j as μ -> 0
    return mu * torch.logsumexp(weights * f / mu, dim=-1)


def dirichlet_preferences(steps, batch, n_obj, generator=None):
    """Preferences ~ Dirichlet(1, ..., 1) + 1e-4, as the paper. -> (steps, batch, m)."""
    e = -torch.rand(steps, batch, n_obj, generator=generator).clamp_min(1e-30).log()
    return e / e.sum(-1, keepdim=True) + 1e-4


def even_preferences(steps, batch, n_obj, generator=None, stretch=.05):
    """Like dirichlet_preferences, but each step's batch lies evenly: a randomly shifted lattice.

    The lattice is Kronecker's with the generalised golden ratio; sorted coordinates cut [0, 1] into
    m parts that are uniform on the simplex. It is stretched a little and clipped, so that edges
    and corners are drawn too: the ends of a front are seldom seen otherwise. For m > 2 this is not
    even-handed: the edges of the middle objectives occur less often (cuts are sorted when clipped).
    """
    golden = 1.0
    for _ in range(60):  # the root of g^m = g + 1
        golden = (1 + golden) ** (1 / n_obj)
    slope = torch.tensor([golden ** -(j + 1) for j in range(n_obj - 1)])
    shift = torch.rand(steps, 1, n_obj - 1, generator=generator)
    cuts = (torch.arange(batch)[:, None] * slope + shift) % 1  # (steps, B, m - 1)
    cuts = (cuts * (1 + 2 * stretch) - stretch).clamp(0, 1).sort(-1)[0]
    ends = torch.zeros(steps, batch, 1)
    return torch.cat([ends, cuts, ends + 1], -1).diff(dim=-1) + 1e-4


def update_range(ideal, nadir, values, keep=.9):
    """Running estimates of the best and worst values of a front, from a batch on its way there.

    ideal: the smallest value so far; nadir: moving average of a batch's largest. ideal, nadir:
    (..., 1, m) or None at first; values: (..., B, m) -> (ideal, nadir), detached.
    """
    low, high = values.detach().aminmax(dim=-2, keepdim=True)
    if ideal is None:
        return low, high
    return torch.minimum(ideal, low), keep * nadir + (1 - keep) * high


def gradnorm_weights(weights, losses, first_losses, norms, optimizer, alpha=1.75):
    """One GradNorm step (E4): move the weights so that all problems train at one rate.

    weights: (S, K) leaf tensor that `optimizer` steps, changed in place, sum K afterwards; losses,
    first_losses: (S, K) L_k now and at step 0; norms: (S, K) ‖∇_W L_k‖ of the unweighted losses.
    """
    G = weights.detach() * norms
    rates = losses / first_losses
    rates = rates / rates.mean(-1, keepdim=True)  # r_k: below 1 trains faster than the mean
    target = G.mean(-1, keepdim=True) * rates ** alpha
    # Eq. (E4): minimise Σ_k |G_k - mean(G) r_k^α| over w only; its gradient in closed form
    weights.grad = torch.sign(G - target) * norms
    optimizer.step()
    with torch.no_grad():
        weights.clamp_(min=1e-3)  # DEVIATION 4
        weights *= weights.shape[-1] / weights.sum(-1, keepdim=True)


def clip_gradients(parameters, limit):
    """Scale each seed's gradient over all parameters (S, ...) to norm <= limit, in place."""
    grads = [p.grad for p in parameters]
    norm = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()  # (S,)
    factor = (limit / (norm + 1e-6)).clamp(max=1)
    for g in grads:
        g *= factor.view(-1, *[1] * (g.dim() - 1))


# ================================================================================================
# Train and evaluate
# ================================================================================================


class World:
    """The fixed part of a run: the problems, this process's seeds, the preferences to test on."""

    def __init__(self, problems, seeds, args, device, dtype=torch.float32):
        self.problems, self.seeds, self.args = problems, seeds, args
        self.n_obj, self.device, self.dtype = problems[0].n_obj, device, dtype
        self.recipe = dict(TUNED if args.recipe == "tuned" else PAPER)
        self.recipe |= {k: getattr(args, k) for k in ("loss", "lr") if getattr(args, k) is not None}
        self.boxes = [(p.lower.to(device, dtype), (p.upper - p.lower).to(device, dtype))
                      for p in problems]
        self.test = test_preferences(self.n_obj, args.eval_points, self.recipe["circle"])
        self.test = self.test.to(device, dtype)  # (N, m)

    def network(self, method):
        """A freshly drawn network, and its optimiser."""
        generators = [common.torch_generator(s, "init") for s in self.seeds]  # DEVIATION 2
        kind = PSL if method == "psl" else CoPSL
        net = kind(self.n_obj, [p.n_var for p in self.problems], self.args.width, generators)
        net = net.to(self.device, self.dtype)
        return net, torch.optim.Adam(net.parameters(), self.recipe["lr"], self.recipe["betas"],
                                     fused=True)

    def preferences(self):
        """All training preferences, a pure function of the seeds: (steps, S, B, m)."""
        draw = even_preferences if self.recipe["even"] else dirichlet_preferences
        return torch.stack([draw(self.args.steps, self.args.batch, self.n_obj,
                                 common.torch_generator(s, "preferences")) for s in self.seeds],
                           1).to(self.device, self.dtype)

    def values(self, solutions):
        """K solutions (S, B, n_k) of the unit cubes -> objectives (S, K, B, m)."""
        return torch.stack([p(low + width * x) for p, (low, width), x in
                            zip(self.problems, self.boxes, solutions, strict=True)], 1)


def test_preferences(n_obj, count, circle):
    """m = 2: `count` points of the segment, or of the quarter circle; else Das-Dennis. (N, m)."""
    if n_obj == 2:
        t = torch.linspace(0, 1, count or 100, dtype=torch.float64)
        p = torch.stack([t, 1 - t], -1)
        p = F.normalize(p, dim=-1) if circle else p
    else:  # UNSPECIFIED 1
        p = data.das_dennis(n_obj, count or (105 if n_obj == 3 else 210))
    return p


def train_step(world, net, optimizer, p, state):
    """One step of all seeds on preferences p (S, B, m) -> losses (S, K) before the step."""
    args, recipe = world.args, world.recipe
    solutions = net(p)
    f = world.values(solutions)  # (S, K, B, m)
    if recipe["normalise"]:
        state["ideal"], state["nadir"] = update_range(state["ideal"], state["nadir"], f)
        f = (f - state["ideal"]) / (state["nadir"] - state["ideal"]).clamp_min(1e-12)
    sign = 1 if args.recipe == "official" else -1  # DEVIATION 1
    g = scalarize(f, p[:, None], recipe["loss"], 0.0, .01, args.gamma, args.mu, sign)  # (S, K, B)
    losses = g.mean(-1) if recipe["mean"] else g.sum(-1)
    # Eq. (E3): Σ_k w_k Σ_b g(f_k(x_k(p_b)), p_b), with w = 1 unless GradNorm moves it
    loss = losses.sum()
    if state["weights"] is not None:
        norms = net.shared_gradient_norms(p, losses)
        loss = (state["weights"].detach() * losses).sum()
    if recipe["saturation"]:  # DEVIATION 3: the mean squared logit of the sigmoids, weighed lightly
        logits = [torch.logit(x, 1e-6).square().mean((1, 2)).sum() for x in solutions]
        loss = loss + recipe["saturation"] * sum(logits)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe["clip"]:
        clip_gradients(net.parameters(), recipe["clip"])
    optimizer.step()
    losses = losses.detach()
    if state["weights"] is not None:
        state["first"] = losses if state["first"] is None else state["first"]
        gradnorm_weights(state["weights"], losses, state["first"], norms, state["weigher"],
                         args.alpha)
    return losses


@torch.no_grad()
def evaluate(world, net):
    """Hypervolumes (E5) of every seed -> dict seed -> {"hv": K numbers, "hv_official": K numbers}.

    hv: (f - ideal) / (nadir - ideal), reference 1.1. hv_official: f / nadir as the authors' code,
    whose nadirs differ from the suite's for some problems.
    """
    f = world.values(net(world.test.expand(len(world.seeds), -1, -1)))  # (S, K, N, m)
    common.check_finite(f, "an objective of the learned fronts")
    corner = [1.1] * world.n_obj

    def volume(points, low, high):
        # Eq. (E5): HV of (f - low) / (high - low) with reference (1.1, ..., 1.1)
        return common.hypervolume((points.cpu().double() - low) / (high - low), corner)

    return {seed: {"hv": [volume(f[s, k], q.ideal, q.nadir) for k, q in enumerate(world.problems)],
                   "hv_official": [volume(f[s, k], 0 * q.nadir, q.hv_nadir)
                                   for k, q in enumerate(world.problems)]}
            for s, seed in enumerate(world.seeds)}


def train(world, run, method, saved, save):
    """Train all seeds of one method -> (network, {"history", "parameters", "spent"}).

    history: {step: what evaluate found}; spent: CPU seconds, of earlier processes too.
    saved: what `save` got, or None. Evaluates every --eval-every steps and after the last.
    """
    args, recipe = world.args, world.recipe
    net, optimizer = world.network(method)
    state = {"ideal": None, "nadir": None, "weights": None, "first": None}
    if method == "copsl-gradnorm":
        state["weights"] = torch.ones(len(world.seeds), len(world.problems), dtype=world.dtype,
                                      device=world.device, requires_grad=True)
        # as the networks' own, so do the authors
        state["weigher"] = torch.optim.Adam([state["weights"]], recipe["lr"], recipe["betas"])
    history, start, spent = {}, 0, 0.0
    if saved is None:
        history[0] = run.gather(evaluate(world, net))
    else:
        start, history, spent = saved["step"], saved["history"], saved["spent"]
        unpack(saved["seeds"], world, net, optimizer, state)
    preferences, began = world.preferences(), time.process_time()
    for step in run.progress(range(start, args.steps), METHODS[method], initial=start,
                             total=args.steps):
        if recipe["decay"]:
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * (1 + math.cos(math.pi * step / args.steps)) / 2
        losses = train_step(world, net, optimizer, preferences[step], state)
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            common.check_finite(losses, f"{method}: the loss after step {done}")
            history[done] = run.gather(evaluate(world, net))
            now = [v for found in history[done].values() for v in found["hv"]]
            run.log(method=method, step=done, loss=losses.mean().item(), hv=sum(now) / len(now))
        if done % args.save_every == 0 or done == args.steps:
            save({"method": method, "step": done, "history": history,
                  "spent": spent + time.process_time() - began,
                  "seeds": run.gather(pack(world, net, optimizer, state))})
    return net, {"history": history, "parameters": net.num_parameters(),
                 "spent": spent + time.process_time() - began}


def pack(world, net, optimizer, state):
    """Everything that training changes, per seed: dict seed -> dict name -> tensor."""
    found = {}
    for i, p in enumerate(net.parameters()):
        moments = optimizer.state.get(p, {})
        found |= {f"p{i}": p, **{f"{k}{i}": v for k, v in moments.items() if k != "step"}}
    found |= {k: state[k] for k in ("ideal", "nadir", "weights", "first") if state[k] is not None}
    if state["weights"] is not None:
        moments = state["weigher"].state[state["weights"]]
        found |= {f"w-{k}": v for k, v in moments.items() if k != "step"}
    step = next(iter(optimizer.state.values()))["step"]
    return {seed: {"step": step.clone(), **{k: t[s].detach().clone() for k, t in found.items()}}
            for s, seed in enumerate(world.seeds)}


def unpack(seeds, world, net, optimizer, state):
    """The reverse of pack, for this process's seeds."""
    mine = [seeds[s] for s in world.seeds]
    found = {k: torch.stack([t[k] for t in mine]).to(world.device) for k in mine[0]}
    step = found["step"][0]
    for i, p in enumerate(net.parameters()):
        p.data.copy_(found[f"p{i}"])
        optimizer.state[p] = {"step": step.clone(), **{k: found[f"{k}{i}"]
                                                       for k in ("exp_avg", "exp_avg_sq")}}
    for key in ("ideal", "nadir", "first"):
        state[key] = found.get(key)
    if state["weights"] is not None:
        state["weights"].data.copy_(found["weights"])
        state["weigher"].state[state["weights"]] = {
            "step": step.cpu().clone(), **{k: found[f"w-{k}"] for k in ("exp_avg", "exp_avg_sq")}}


def summarise(history, names):
    """{"hv" | "hv_official" | "initial_hv": {problem: one number per seed, in seed order}}."""
    first, last = history[min(history)], history[max(history)]

    def table(found, key):
        return {n: [found[s][key][k] for s in sorted(found)] for k, n in enumerate(names)}

    curve = {step: [sum(found[s]["hv"]) / len(names) for s in sorted(found)]
             for step, found in history.items()}
    return {"hv": table(last, "hv"), "hv_official": table(last, "hv_official"),
            "initial_hv": table(first, "hv"), "curve": curve}


# ================================================================================================
# Command line
# ================================================================================================


def build_parser():
    """All flags; defaults are the paper's."""
    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    number = common.number
    group = parser.add_argument_group("problems")
    group.add_argument("--problems", nargs="+", default=["f"], metavar="NAME",
                       help="names such as f1 zdt3 dtlz2-3 re33, FILE.py:NAME, or a group: f "
                            "(F1-F6, default), re (the paper's RE31-34, RE37); all with the same "
                            "number of objectives")
    group.add_argument("--eval-points", type=number(int, low=2), default=None,
                       help="preferences to test on (default: 100 for 2 objectives, 105 for 3)")
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="psl,copsl",
                       help=f"{', '.join(METHODS)}, several with commas, or all (default "
                            "%(default)s)")
    group.add_argument("--recipe", choices=["paper", "official", "tuned"], default="paper",
                       help="paper; official: the authors' code (DEVIATION 1); tuned: ours, same "
                            "network and budget (DEVIATION 3)")
    group.add_argument("--loss", choices=LOSSES, default=None,
                       help="scalarisation (default: mtch, the paper's; smtch with --recipe tuned)")
    group.add_argument("--gamma", type=number(float, low=0), default=100.0,
                       help="γ of COSMOS (paper %(default)s)")
    group.add_argument("--mu", type=number(float, above=0), default=.1,
                       help="μ of stch and smtch: smoothness of the maximum, in units of the "
                            "objectives (default %(default)s, ours)")
    group.add_argument("--alpha", type=number(float, low=0), default=1.75,
                       help="α of GradNorm: how strongly rates are made equal (code %(default)s)")
    group = parser.add_argument_group("training")
    group.add_argument("--seeds", type=number(int, low=1), default=10,
                       help="independent networks, trained at once: --seed, --seed + 1, ... "
                            "(default %(default)s)")
    group.add_argument("--steps", type=number(int, low=1), default=500,
                       help="steps (paper %(default)s)")
    group.add_argument("--batch", type=number(int, low=1), default=30,
                       help="preferences a step (paper %(default)s)")
    group.add_argument("--lr", type=number(float, above=0), default=None,
                       help="learning rate of Adam (paper 1e-3; tuned 5e-3)")
    group.add_argument("--width", type=number(int, low=1), default=256,
                       help="units of each hidden layer (paper %(default)s)")
    group.add_argument("--eval-every", type=number(int, low=1), default=10,
                       help="steps between evaluations (default %(default)s; authors' code 1)")
    group.add_argument("--save-every", type=number(int, low=1), default=100,
                       help="steps between checkpoints (default %(default)s)")
    return parser


def resolve(args):
    """Expand names; refuse what does not go together."""
    names = list(METHODS) if args.method == "all" else args.method.split(",")
    for name in names:
        if name not in METHODS:
            raise common.UserError(
                f"--method {name!r} is unknown; there are {', '.join(METHODS)} and all")
    args.method = ",".join(dict.fromkeys(names))
    words = [w for word in args.problems
             for w in ([word] if ".py:" in word else word.lower().split(","))]
    args.problems = list(dict.fromkeys(n for w in words for n in GROUPS.get(w, [w])))
    args.threads = args.threads or 1
    return args


def load_problems(args):
    """The problems of --problems; UserError unless all have the same number of objectives."""
    problems = [data.get_problem(name, args.data_dir, args.seed) for name in args.problems]
    counts = {p.name: p.n_obj for p in problems}
    if len(counts) < len(problems):
        raise common.UserError("--problems: results are kept by name, so names must differ; got "
                               + ", ".join(p.name for p in problems))
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{n} has {m}" for n, m in counts.items())
        raise common.UserError("CoPSL's shared layer reads one preference for all problems, so "
                               f"they must have the same number of objectives; {told}. "
                               "coaction.py takes any mix")
    return problems


def write_solutions(world, net, method, folder):
    """For the first seed: solutions-<method>-<problem>.csv with a row p, x, f per preference."""
    with torch.no_grad():
        xs = net(world.test.expand(len(world.seeds), -1, -1))
        f = world.values(xs)[0]  # (K, N, m)
    for k, problem in enumerate(world.problems):
        x = world.boxes[k][0] + world.boxes[k][1] * xs[k][0]
        header = [f"p{j + 1}" for j in range(world.n_obj)]
        header += [f"x{i + 1}" for i in range(problem.n_var)]
        header += [f"f{j + 1}" for j in range(world.n_obj)]
        rows = torch.cat([world.test, x, f[k]], -1).tolist()

        def write(path, header=header, rows=rows):
            with open(path, "w", newline="") as handle:
                csv.writer(handle).writerows([header, *rows])
        name = "".join(c if c.isalnum() else "-" for c in problem.name)
        common.atomic_write(folder / f"solutions-{method}-{name}.csv", write)
    return f.cpu()


def draw_figure(world, fronts, results, references, path):
    """One panel per problem: the reference front, each method's front (first seed), mean HV."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    okabe_ito = ["#D55E00", "#009E73", "#0072B2"]  # colour-blind safe
    styles = dict(zip(METHODS, zip(okabe_ito, "ox^", strict=True), strict=True))
    problems, deep = world.problems, world.n_obj >= 3
    columns = min(len(problems), 3)
    rows = -(-len(problems) // columns)
    figure = plt.figure(figsize=(4.4 * columns, 3.6 * rows + .5), layout="constrained")
    for k, problem in enumerate(problems):
        axes = figure.add_subplot(rows, columns, k + 1, projection="3d" if deep else None)
        shown = references[k] / problem.nadir
        inside = (shown <= 1.3).all(-1)  # a front may reach far beyond the nadir that is used
        axes.scatter(*shown[inside][:, :3].T, s=3, color="#AAAAAA", alpha=.5, label="reference")
        for method, front in fronts.items():
            f = front[k] / problem.nadir
            f = f[(f <= 1.3).all(-1)]
            colour, marker = styles[method]
            axes.scatter(*f[:, :3].T, s=12, color=colour, marker=marker, linewidths=.8, alpha=.8,
                         label=METHODS[method])
        means = {m: sum(results[m]["hv"][problem.name]) / world.args.seeds for m in fronts}
        hv = "\n".join(f"{METHODS[m].split(',')[0]} {v:.4f}" for m, v in means.items())
        if deep:
            axes.set_zlabel("$f_3$")
            axes.view_init(25, 40)
            axes.set_title(f"{problem.name}   HV " + hv.replace("\n", ", "), fontsize=9)
        else:
            axes.set_title(problem.name, fontsize=10)
            axes.text(.97, .96, "HV\n" + hv, transform=axes.transAxes, ha="right", va="top",
                      fontsize=8)
        axes.set(xlabel="$f_1$ / nadir", ylabel="$f_2$ / nadir")
        axes.locator_params(nbins=4 if deep else 6)
        axes.tick_params(labelsize=8)
        if k == 0:
            handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"CoPSL: learned fronts of seed {world.args.seed}, HV of "
                    f"{world.args.seeds} seeds, {world.args.recipe} recipe")
    common.atomic_write(path, lambda p: figure.savefig(p, dpi=130))
    plt.close(figure)


def main(argv=None):
    """The command: every method of --method in turn, each resumable, then the report."""
    args = resolve(build_parser().parse_args(argv))
    problems = load_problems(args)
    with common.Run(args, "copsl") as run:
        if run.world > args.seeds:
            raise common.UserError(f"{run.world} processes, but only --seeds {args.seeds} to share")
        seeds = run.share(range(args.seed, args.seed + args.seeds))
        state = run.load() or {"done": {}, "trained": {}, "current": None}
        run.begin()
        world = World(problems, seeds, args, run.device)
        for method in args.method.split(","):
            if method in state["done"]:
                continue

            def save(current):
                run.save({**state, "current": current},
                         f"{current['method']}, step {current['step']}")
            net, state["done"][method] = train(world, run, method, state["current"], save)
            state["current"] = None
            state["trained"][method] = run.gather(
                {s: [p[i] for p in net.parameters()] for i, s in enumerate(seeds)})
            run.save(state, method)
        report(world, run, state)


def report(world, run, state):
    """Tables, figure, solutions, result.json and the RESULT line (by rank 0)."""
    names = [p.name for p in world.problems]
    results = {m: summarise(found["history"], names) for m, found in state["done"].items()}
    if run.rank:
        return
    references = [data.reference_front(p) for p in world.problems]
    corner = [1.1] * world.n_obj
    ceiling = [common.hypervolume((f - p.ideal) / (p.nadir - p.ideal), corner)
               for f, p in zip(references, world.problems, strict=True)]

    def spread(numbers):
        t = torch.tensor(numbers, dtype=torch.float64)
        return f"{t.mean():.4f}" + (f" ±{t.std():.4f}" if len(t) > 1 else "")

    for key, title in (("hv", "HV of (f - ideal) / (nadir - ideal)"),
                       ("hv_official", "HV of f / nadir, as the authors' code")):
        run.table([title, *names], [
            *([METHODS[m], *(spread(results[m][key][n]) for n in names)] for m in results),
            *([["reference front", *(f"{v:.4f}" for v in ceiling)]] if key == "hv" else [])])
        print()
    run.table(["", "parameters", "CPU-s, all seeds"],
              [[METHODS[m], found["parameters"], found["spent"]] for m, found in
               state["done"].items()])
    print(f"mean ± std over {world.args.seeds} seeds; CPU-s of this process, evaluation included\n")
    fronts = {}
    for method in results:
        net, _ = world.network(method)
        mine = [state["trained"][method][s] for s in world.seeds]
        for i, p in enumerate(net.parameters()):
            p.data.copy_(torch.stack([tensors[i] for tensors in mine]))
        fronts[method] = write_solutions(world, net, method, run.out_dir)
    draw_figure(world, fronts, results, references, run.out_dir / "figure.png")
    shown = "copsl" if "copsl" in results else list(results)[-1]
    means = {n: sum(v) / len(v) for n, v in results[shown]["hv"].items()}
    args = world.args
    run.finish({"problems": names, "recipe": args.recipe, "loss": world.recipe["loss"],
                "seeds": args.seeds, "seed": args.seed, "reference_hv": ceiling,
                "results": results},
               script="copsl", method=shown, recipe=args.recipe, loss=world.recipe["loss"],
               seeds=args.seeds, hv=sum(means.values()) / len(means),
               **{f"hv_{n}".replace(":", "-").replace("=", "-"): v for n, v in means.items()},
               out=run.out_dir)


if __name__ == "__main__":
    common.run_cli(main)
