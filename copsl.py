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
    python copsl.py --problems mine.py:Truss mine.py:Beam  your own (see data.OwnProblem)

Paper map (the numbering is ours, in the order of the paper's method section)
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
    F1-F6, 10 seeds, half a CPU-minute: mean HV of f / nadir .8166 (the authors' programs, 10 seeds:
    .8201), tuned .8677, front at 100 points .8718. `tuned` is above the paper's recipe on all 11
    problems of the paper. Training takes a fifth of a plain arrangement's CPU time a seed, GradNorm
    a twelfth. Spreads, NSGA-II/III and MOEA/D at equal evaluations, what does not hold:
    benchmarks/RESULTS.md.

Where we depart (the marks can be searched for)
    DEVIATION 1   COSMOS subtracts γ cos(p, f), as its authors do; the CoPSL code adds it (--recipe
                  official adds it too).
    DEVIATION 2   all seeds train in one process, each with generators of its own; the authors' code
                  runs them one by one. The same training, other random draws.
    DEVIATION 3   --recipe tuned is ours: see TUNED.
    DEVIATION 4   GradNorm's weights are kept at 1e-3 or more before they are rescaled: Adam's steps
                  could take one below 0, and its problem would then be made worse on purpose.
    UNSPECIFIED 1 test preferences for m > 3: the largest Das-Dennis set of at most 210 points.

References
    PSL: Lin et al., NeurIPS 2022. COSMOS: Ruchte and Grabocka, ICDM 2021. Smooth Tchebycheff: Lin
    et al., ICML 2024. GradNorm: Chen et al., ICML 2018. RE: Tanabe and Ishibuchi, 2020.
"""
# ================================================================================================
# Setup
# ================================================================================================
import math
import time

import numpy as np
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
    """K Pareto sets over one shared layer, S independent networks ("seeds") at once.

    n_obj: m; n_vars: [n_1 ... n_K]; generators: one torch.Generator per seed for the initial draw
    (default: torch's own, one seed). forward(p (S, B, m)) -> list of K solutions (S, B, n_k) in the
    unit cube: scale them to your bounds.
    Fits: any problem whose objectives torch can differentiate, any floating dtype and device; train
    it in float32 or float64. One optimiser serves all S, as no seed's loss sees another's weights.
    """
    shared = True

    def __init__(self, n_obj, n_vars, width=256, generators=(None,)):
        super().__init__()
        self.n_obj, self.n_vars, self.width = n_obj, list(n_vars), width
        towers, widest = len(self.n_vars), max(self.n_vars)
        # The paper's network is a shared Linear(m, 256) and K towers Linear(256, 256) -
        # Linear(256, n_k), and an experiment trains it for S seeds. Written like that it is S · K
        # products of small matrices a layer; here each layer is one tensor (S, towers, in, out) and
        # one batched product. Two things make that possible:
        #   - the shared layer is a layer with 1 tower, which broadcasts over the K of the next one;
        #   - the K last layers are padded to the largest n_k. forward cuts the padding off, so no
        #     gradient reaches it, and Adam leaves it as it was drawn.
        first = 1 if self.shared else towers
        layers = [self._draw(count, fan_in, fan_out, generators) for count, fan_in, fan_out in
                  ((first, n_obj, width), (towers, width, width), (towers, width, widest))]
        self.weights = nn.ParameterList(w for w, _ in layers)  # 3 x (S, 1 or K, in, out)
        self.biases = nn.ParameterList(b for _, b in layers)  # 3 x (S, 1 or K, 1, out)

    @staticmethod
    def _draw(count, fan_in, fan_out, generators):
        """A layer's weights and biases, drawn as nn.Linear draws them: U(± 1 / √fan_in)."""
        tensors = []
        for rows in (fan_in, 1):
            draws = torch.stack([torch.rand(count, rows, fan_out, generator=g) for g in generators])
            tensors.append(nn.Parameter((2 * draws - 1) / math.sqrt(fan_in)))
        return tensors

    def forward(self, preferences):
        return self.solve(self.read(preferences))

    def read(self, preferences):
        """The shared layer: preferences (S, B, m) -> what each tower reads (S, K, B, width)."""
        h = F.relu(preferences[:, None] @ self.weights[0] + self.biases[0])  # (S, 1 or K, B, width)
        # Nothing is copied here, but from now on every tower has a branch of its own, and so has
        # its gradient: shared_gradient_norms lives on that.
        return h.expand(-1, len(self.n_vars), -1, -1)  # (S, K, B, width)

    def solve(self, h):
        """The towers: (S, K, B, width) -> list of K solutions (S, B, n_k)."""
        # Eq. (E1): x_k(p) = sigmoid(tower_k(shared(p))). The sigmoid keeps x_k inside the unit
        # cube, which Problem.scale stretches to the bounds of problem k.
        h = F.relu(h @ self.weights[1] + self.biases[1])  # (S, K, B, width)
        x = torch.sigmoid(h @ self.weights[2] + self.biases[2])  # (S, K, B, max n)
        return [x[:, k, :, :n] for k, n in enumerate(self.n_vars)]

    def shared_gradient_norms(self, preferences, h, losses):
        """‖∇_W L_k‖ for the shared layer's weight W and every problem, in one backward pass.

        preferences (S, B, m), h = read(preferences), losses (S, K) computed from solve(h)
        -> (S, K). The graph is kept for the caller.
        """
        # GradNorm asks how hard each problem pulls at the shared weights. The plain way is K
        # backward passes, one for each problem:
        #     [torch.autograd.grad(losses[:, k].sum(), W, retain_graph=True) for k in range(K)]
        # But L_k reaches W through branch k only. So one backward pass of the sum, stopped at the
        # branches, has all K gradients side by side, and the last layer is done by hand: with
        # h = relu(p W + b), ∂L_k/∂W = pᵀ (∂L_k/∂h_k where h_k > 0). The same numbers for one pass.
        at_branch, = torch.autograd.grad(losses.sum(), h, retain_graph=True)  # (S, K, B, width)
        per_weight = preferences[:, None].mT @ (at_branch * (h > 0))  # (S, K, m, width)
        return per_weight.flatten(2).norm(dim=-1)  # (S, K)

    def num_parameters(self):
        """Parameters of one seed's network, padding not counted."""
        w, first = self.width, self.weights[0][0].numel() + self.biases[0][0].numel()
        return first + sum((w + 1) * w + (w + 1) * n for n in self.n_vars)


class PSL(CoPSL):
    """K separate networks m - 256 - 256 - n_k, stacked: the baseline, which shares no parameter."""
    shared = False


# ================================================================================================
# Method: pure functions, to be copied
# ================================================================================================


def scalarize(values, preferences, kind, ideal=0.0, rho=.01, gamma=100.0, mu=.1, cosmos_sign=-1):
    """One number per solution, to be minimised.

    values f: (..., m); preferences p > 0: (..., m), broadcast against them; ideal z: (m,) or number
    kind: "ls", "tch", "mtch", "cosmos" as CoPSL has them; "stch" smooth Tchebycheff (Lin et al.
    2024) and "smtch" its form with weights 1/p, as mtch has them, normalised to sum 1
    rho: weight of the sum that keeps (m)tch strictly monotone; gamma, cosmos_sign: COSMOS's angle
    term; mu > 0: how smooth the maximum is, in units of f -> (...). ValueError: another kind.
    All objectives are minimised and should be of one size: divide by their range first.
    Fits: float32 and float64 (1 / p of a small p leaves float16), any device.
    """
    f, p = values - ideal, preferences
    # A weighted sum finds the point of the front whose tangent is normal to p: convex parts only.
    if kind == "ls":  # Eq. (E2a): Σ_j p_j f_j
        return (p * f).sum(-1)
    # Tchebycheff functions have their minimum where a ray meets the front, convex or not: for mtch
    # the ray through p (a large p_j allows a large f_j), for tch the one through 1 / p. ρ Σ f
    # pushes on along objectives that are not the largest.
    if kind == "tch":  # Eq. (E2b): max_j p_j f_j + ρ Σ_j f_j
        return (p * f).amax(-1) + rho * f.sum(-1)
    if kind == "mtch":  # Eq. (E2c): max_j f_j / p_j + ρ Σ_j f_j
        return (f / p).amax(-1) + rho * f.sum(-1)
    # COSMOS: a weighted sum that is also drawn towards the direction of p, so that different
    # preferences get different solutions.
    if kind == "cosmos":  # Eq. (E2d): Σ_j p_j f_j - γ cos(p, f)   DEVIATION 1
        return (p * f).sum(-1) + cosmos_sign * gamma * F.cosine_similarity(p, f, dim=-1)
    if kind not in ("stch", "smtch"):
        raise ValueError(f"kind {kind!r}: expected ls, tch, mtch, cosmos, stch or smtch")
    # Smooth Tchebycheff: μ log Σ_j exp(w_j f_j / μ) -> max_j w_j f_j as μ -> 0. Its gradient
    # reaches all objectives that are near the largest, not that one alone.
    weights = p if kind == "stch" else (1 / p) / (1 / p).sum(-1, keepdim=True)
    return mu * torch.logsumexp(weights * f / mu, dim=-1)


def dirichlet_preferences(steps, batch, n_obj, generator=None):
    """Preferences ~ Dirichlet(1, ..., 1) + 1e-4, as the paper. -> (steps, batch, m).

    Fits: drawn in torch's default dtype on the CPU, from a generator there; move them with .to().
    """
    # Exponential variables over their sum are uniform on the simplex. 1e-4 keeps 1 / p finite.
    e = -torch.rand(steps, batch, n_obj, generator=generator).clamp_min(1e-30).log()
    return e / e.sum(-1, keepdim=True) + 1e-4


def even_preferences(steps, batch, n_obj, generator=None, stretch=.05):
    """Like dirichlet_preferences, but each step's batch covers the simplex evenly (ours).

    30 random preferences leave gaps and clumps, and hardly ever an end of the front. These are a
    lattice, moved by a random shift a step. For m > 2 not even-handed: a cut that is clipped to 0
    or 1 makes the first or the last objective's share 0, seldom a middle one's.
    Fits: drawn in torch's default dtype on the CPU, from a generator there; move them with .to().
    """
    # 1. A preference of m numbers that sum to 1 is a stick cut in m - 1 places; cuts that are
    #    uniform on [0, 1] and sorted make preferences that are uniform on the simplex.
    # 2. So what is wanted is `batch` points that lie evenly in [0, 1]^(m-1). Kronecker's lattice
    #    does that for any number: point i is i · (1/g, 1/g², ...) modulo 1, where g is the golden
    #    ratio's relative in m - 1 dimensions, the root of g^m = g + 1 (m = 2: 1.618...).
    golden = 1.0
    for _ in range(60):  # fixed-point iteration of g = (1 + g)^(1/m)
        golden = (1 + golden) ** (1 / n_obj)
    slope = torch.tensor([golden ** -(j + 1) for j in range(n_obj - 1)])
    # 3. One random shift a step (modulo 1, which keeps the lattice even) makes all cuts equally
    #    likely over the steps.
    shift = torch.rand(steps, 1, n_obj - 1, generator=generator)
    cuts = (torch.arange(batch)[:, None] * slope + shift) % 1  # (steps, B, m - 1)
    # 4. Stretched by 5% over both ends and clipped: some cuts fall on 0 or 1 exactly, which are
    #    preferences for fewer than m objectives, the ends of the front.
    cuts = (cuts * (1 + 2 * stretch) - stretch).clamp(0, 1).sort(-1)[0]
    ends = torch.zeros(steps, batch, 1)
    return torch.cat([ends, cuts, ends + 1], -1).diff(dim=-1) + 1e-4  # (steps, B, m)


def update_range(ideal, nadir, values, keep=.9):
    """Running estimates of the best and worst values of a front, from a batch on its way there.

    ideal: the smallest value so far; nadir: moving average of a batch's largest. ideal, nadir:
    (..., 1, m) or None at first; values: (..., B, m) -> (ideal, nadir), detached.
    Fits: any floating dtype and device; keep the ranges in float32 or float64.
    """
    low, high = values.detach().aminmax(dim=-2, keepdim=True)
    if ideal is None:
        return low, high
    # The smallest value seen only ever comes nearer to the ideal. The largest is not kept: early
    # batches are far from the front, and their values would stay in it.
    return torch.minimum(ideal, low), keep * nadir + (1 - keep) * high


def gradnorm_weights(weights, losses, first_losses, norms, optimizer, alpha=1.75):
    """One GradNorm step: move the weights so that all problems train at one rate.

    weights: (S, K) or (K,) leaf tensor that `optimizer` steps, changed in place, sum K afterwards;
    losses, first_losses: alike, L_k now and at step 0, positive; norms: alike, ‖∇_W L_k‖ unweighted
    for a W that all problems share.
    Fits: float32 and float64, any device. Under DistributedDataParallel the norms are those of one
    process: average them over all first.
    """
    # A problem that has come less far than the others (r_k > 1) should pull harder: its weighted
    # gradient norm G_k is drawn to mean(G) · r_k^α. α says how strongly rates are made equal.
    G = weights.detach() * norms
    rates = losses / first_losses
    rates = rates / rates.mean(-1, keepdim=True)  # r_k: below 1 trains faster than the mean
    target = G.mean(-1, keepdim=True) * rates ** alpha
    # Eq. (E4): minimise Σ_k |G_k - mean(G) r_k^α| over w alone, the target held constant. Since
    # G_k = w_k · norm_k, its gradient needs no autograd: sign(G_k - target_k) · norm_k.
    weights.grad = torch.sign(G - target) * norms
    optimizer.step()
    with torch.no_grad():
        weights.clamp_(min=1e-3)  # DEVIATION 4
        # only the proportions are learned: the sum stays K, so the learning rate means the same
        weights *= weights.shape[-1] / weights.sum(-1, keepdim=True)


def clip_gradients(parameters, limit):
    """Scale each seed's gradient over all parameters (S, ...) to norm <= limit, in place.

    Fits: float32 and float64, any device.
    """
    # torch.nn.utils.clip_grad_norm_ would take one norm over all S networks.
    grads = [p.grad for p in parameters if p.grad is not None]
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
        # A user's problem is evaluated on the CPU in float64: objectives like 2e7 + x have no
        # digits to spare. They are float32 when they have become shares of a range (train_step).
        own = any(p.own for p in problems)
        self.exact = torch.float64 if own and torch.device(device).type != "mps" else dtype
        # Networks answer in the unit cube; lower + width · x is the point in the problem's bounds
        self.boxes = [(p.lower.to(*at), (p.upper - p.lower).to(*at)) for p in problems
                      for at in [("cpu", torch.float64) if p.own else (device, dtype)]]
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
        # Drawn before the first step, so that a resumed run need not know how far a generator was
        draw = even_preferences if self.recipe["even"] else dirichlet_preferences
        return torch.stack([draw(self.args.steps, self.args.batch, self.n_obj,
                                 common.torch_generator(s, "preferences")) for s in self.seeds],
                           1).to(self.device, self.dtype)

    def values(self, solutions):
        """K solutions (S, B, n_k) of the unit cubes -> K objectives (S, B, m), own ones float64."""
        return [p(low + width * x.to(low)) for p, (low, width), x in
                zip(self.problems, self.boxes, solutions, strict=True)]

    def evaluations(self):
        """How often training and its tests evaluate each problem."""
        args = self.args
        tests = (1 + -(-args.steps // args.eval_every)) * len(self.test)
        return len(args.method.split(",")) * args.seeds * (args.steps * args.batch + tests)


def test_preferences(n_obj, count, circle):
    """m = 2: `count` points of the segment, or of the quarter circle; else Das-Dennis. (N, m)."""
    if n_obj == 2:
        t = torch.linspace(0, 1, count or 100, dtype=torch.float64)
        p = torch.stack([t, 1 - t], -1)
        # The paper's networks are tested on preferences of length 1, but trained on sum 1.
        return F.normalize(p, dim=-1) if circle else p
    return data.das_dennis(n_obj, count or (105 if n_obj == 3 else 210))  # UNSPECIFIED 1


def train_step(world, net, optimizer, p, state):
    """One step of all seeds on preferences p (S, B, m) -> losses (S, K) before the step.

    state: what training remembers beside the network: "ideal", "nadir" (S, K, 1, m) of the tuned
    recipe; GradNorm's "weights" (S, K), their optimiser "weigher", and the "first" losses.
    """
    args, recipe, weights = world.args, world.recipe, state["weights"]
    # A preference goes through the network, which answers with a solution of every problem, and
    # each problem says what its solution is worth.
    h = net.read(p)  # (S, K, B, width)
    solutions = net.solve(h)
    f = world.values(solutions)  # K x (S, B, m)
    if recipe["normalise"]:
        f = [v / q.unit if q.own else v for v, q in zip(f, world.problems, strict=True)]
    f = torch.stack([v.to(world.device, world.exact) for v in f], 1)  # (S, K, B, m)
    if recipe["normalise"]:
        # Tuned: objectives of 1e4 and of 1e-2 in one Tchebycheff value mean that only the first is
        # looked at. As shares of the range between ideal and nadir all count alike.
        state["ideal"], state["nadir"] = update_range(state["ideal"], state["nadir"], f)
        f = (f - state["ideal"]) / (state["nadir"] - state["ideal"]).clamp_min(1e-12)
    f = f.to(world.dtype)
    sign = 1 if args.recipe == "official" else -1  # DEVIATION 1
    g = scalarize(f, p[:, None], recipe["loss"], 0.0, .01, args.gamma, args.mu, sign)  # (S, K, B)
    losses = g.mean(-1) if recipe["mean"] else g.sum(-1)  # (S, K)
    # Eq. (E3): Σ_k w_k Σ_b g(f_k(x_k(p_b)), p_b), with w = 1 unless GradNorm moves it. The sum over
    # the S seeds changes nothing: no seed's loss depends on another seed's parameters.
    loss = losses.sum()
    if weights is not None:
        # GradNorm: the weights in force are those that the step before left behind
        norms = net.shared_gradient_norms(p, h, losses)
        loss = (weights.detach() * losses).sum()
    if recipe["saturation"]:
        # DEVIATION 3: Adam's first large steps can drive a solution to the flat end of the sigmoid,
        # where it learns no more. The mean squared logit, weighed lightly, holds it back (within
        # 1e-6 of the end it has no gradient either, so it has to act before).
        logits = [torch.logit(x, 1e-6).square().mean((1, 2)).sum() for x in solutions]
        loss = loss + recipe["saturation"] * sum(logits)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if recipe["clip"]:
        clip_gradients(net.parameters(), recipe["clip"])
    optimizer.step()
    losses = losses.detach()
    if weights is not None:  # after the network's step, with the losses from before it
        state["first"] = losses if state["first"] is None else state["first"]
        gradnorm_weights(weights, losses, state["first"], norms, state["weigher"], args.alpha)
    return losses


@torch.no_grad()
def evaluate(world, net):
    """Hypervolumes (E5) of every seed -> seed: {"hv": K numbers, "hv_official": K, "fronts"}.

    fronts: k -> the objectives (N, m) of own problems. A problem that came without ideal or nadir
    has None: they are estimated, and its fronts measured, when training is done.
    """
    values = world.values(net(world.test.expand(len(world.seeds), -1, -1)))  # K x (S, N, m)
    found = {seed: {"hv": [], "hv_official": [], "fronts": {}} for seed in world.seeds}
    for k, (f, problem) in enumerate(zip(values, world.problems, strict=True)):
        common.check_finite(f, "an objective of the learned fronts")
        for s, seed in enumerate(world.seeds):
            measured = (None, None) if problem.estimated else volumes(problem, f[s])
            found[seed]["hv"].append(measured[0])
            found[seed]["hv_official"].append(measured[1])
            if problem.own:
                found[seed]["fronts"][k] = f[s].cpu().clone()
    return found


def volumes(problem, f):
    """Hypervolumes of a front (N, m): of (f - ideal) / (nadir - ideal), and of f / nadir.

    The second is that of the authors' code, whose nadirs differ from the suite's for some problems;
    None where a nadir is not above 0: divided by that, better is worse.
    """
    # The volume that a front dominates grows when its points come nearer to the true front and when
    # they spread along it: one number for both. Points beyond the corner count nothing, and 1.1
    # instead of 1 lets the ends of the front count something.
    corner = [1.1] * problem.n_obj

    def volume(low, high):
        # Eq. (E5): HV of (f - low) / (high - low) with reference (1.1, ..., 1.1)
        return common.hypervolume((f.cpu().double() - low) / (high - low), corner)

    above = bool((problem.hv_nadir > 0).all())
    return (volume(problem.ideal, problem.nadir),
            volume(0 * problem.nadir, problem.hv_nadir) if above else None)


def train(world, run, method, saved, save):
    """Train all seeds of one method -> (network, {"history", "parameters", "spent"}).

    history: {step: what evaluate found}; spent: CPU seconds, of earlier processes too. saved: what
    `save` got, or None. Evaluates every --eval-every steps and after the last.
    """
    args, recipe = world.args, world.recipe
    net, optimizer = world.network(method)
    state = {"ideal": None, "nadir": None, "weights": None, "first": None}
    trained = [(dict(net.named_parameters()), optimizer)]
    if method == "copsl-gradnorm":
        # One weight a problem, 1 at first. It is no parameter of the network: L_k's own gradient
        # would drive every weight to 0. Its Adam has settings like the network's.
        state["weights"] = torch.ones(len(world.seeds), len(world.problems), dtype=world.dtype,
                                      device=world.device, requires_grad=True)
        state["weigher"] = torch.optim.Adam([state["weights"]], recipe["lr"], recipe["betas"])
        trained.append(({"weights": state["weights"]}, state["weigher"]))
    history, start, spent = {}, 0, 0.0
    if saved is None:
        history[0] = run.gather(evaluate(world, net))
    else:
        start, history, spent = saved["step"], saved["history"], saved["spent"]
        state |= common.unpack_seeds(saved["seeds"], world.seeds, trained, world.device)
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
            known = {} if None in now else {"hv": sum(now) / len(now)}
            run.log(method=method, step=done, loss=losses.mean().item(), **known)
        if done % args.save_every == 0 or done == args.steps:
            # Seed by seed, so that a run may be continued by another number of processes.
            more = {name: state[name] for name in ("ideal", "nadir", "first")}
            save({"method": method, "step": done, "history": history,
                  "spent": spent + time.process_time() - began,
                  "seeds": run.gather(common.pack_seeds(world.seeds, trained, more))})
    return net, {"history": history, "parameters": net.num_parameters(),
                 "spent": spent + time.process_time() - began}


# ================================================================================================
# Command line
# ================================================================================================


def build_parser():
    """All flags; defaults are the paper's."""
    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    add = parser.group("problems")
    add("--problems", str, ["f"], "names such as f1 zdt3 dtlz2-3 re33, FILE.py:NAME, or a group: f "
        "(F1-F6, default), re (the paper's RE31-34, RE37); all with as many objectives", nargs="+")
    add("--eval-points", int, None, "test preferences (default 100; 105 for 3 objectives, at most "
        "210 for more)", low=2)
    add("--reference", int, None, "directions of the search for a front that has no formula, 1,000 "
        "evaluations each (default 1,000; of own problems as many as evaluations of training)",
        low=0)
    add = parser.group("method")
    add("--method", str, "psl,copsl", f"{', '.join(METHODS)}, several with commas, or all")
    add("--recipe", ["paper", "official", "tuned"], "paper",
        "official: COSMOS as the authors' code (DEVIATION 1); tuned: ours, same network (3)")
    add("--loss", LOSSES, None, "scalarisation (default mtch, the paper's; tuned: smtch)")
    add("--gamma", float, 100.0, "γ of COSMOS (paper %(default)s)", low=0)
    add("--mu", float, .1, "μ of stch and smtch, in units of the objectives (ours)", above=0)
    add("--alpha", float, 1.75, "α of GradNorm: how strongly rates are made equal (code)", low=0)
    add = parser.group("training")
    add("--seeds", int, 10, "independent networks, trained at once: --seed, --seed + 1, ...", low=1)
    add("--steps", int, 500, "steps (paper %(default)s)", low=1)
    add("--batch", int, 30, "preferences a step (paper %(default)s)", low=1)
    add("--lr", float, None, "learning rate of Adam (paper 1e-3; tuned 5e-3)", above=0)
    add("--width", int, 256, "units of each hidden layer (paper %(default)s)", low=1)
    add("--eval-every", int, 10, "steps between evaluations (authors' code 1)", low=1)
    add("--save-every", int, 100, "steps between checkpoints", low=1)
    return parser


def resolve(args):
    """Expand names."""
    args.method = ",".join(common.choose(args.method, METHODS))
    args.problems = data.problem_names(args.problems, GROUPS)
    args.threads = args.threads or 1
    return args


def load_problems(args):
    """The problems of --problems; UserError unless all have the same number of objectives."""
    problems = data.get_problems(args.problems, args.data_dir, args.seed)
    counts = {p.name: p.n_obj for p in problems}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{n} has {m}" for n, m in counts.items())
        raise common.UserError("CoPSL's shared layer reads one preference for all problems, so "
                               f"they must have the same number of objectives; {told}. "
                               "coaction.py takes any mix")
    return problems


def main(argv=None):
    """The command: every method of --method in turn, each resumable, then the report."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given, args = common.given(parser, args), resolve(args)
    problems = load_problems(args)
    with common.Run(args, "copsl") as run:
        seeds = run.share_seeds(args.seed, args.seeds)
        state = run.load() or {"done": {}, "trained": {}, "current": None}
        world = World(problems, seeds, args, run.device)
        data.tell_problems(run, problems, world.evaluations(), args.reference,
                           world.recipe["normalise"])
        if args.eval_points and len(world.test) != args.eval_points:
            run.warn(f"--eval-points {args.eval_points}: {len(world.test)} of {world.n_obj} "
                     "objectives are spread evenly")
        run.begin()
        loss = world.recipe["loss"]
        common.tell_idle(
            run, given, (loss != "cosmos", {"gamma"}, f"--loss {loss} has no angle term"),
            (loss not in ("stch", "smtch"), {"mu"}, f"--loss {loss} is not smooth"),
            ("copsl-gradnorm" not in args.method, {"alpha"}, "there is no GradNorm in --method"))
        for method in args.method.split(","):
            if method in state["done"]:
                continue

            def save(current):
                run.save({**state, "current": current},
                         f"{current['method']}, step {current['step']}")
            net, state["done"][method] = train(world, run, method, state["current"], save)
            state["current"] = None
            state["trained"][method] = run.gather(
                {s: {n: p[i] for n, p in net.named_parameters()} for i, s in enumerate(seeds)})
            run.save(state, method)
        if run.rank == 0:
            report(world, run, state)


def summarise(history, names):
    """{"hv" | "hv_official" | "initial_hv": {problem: one number per seed}, "curve": by step}.

    hv_official has the problems that have it, and is missing where none has.
    """
    first, last = history[min(history)], history[max(history)]

    def table(found, key):
        rows = {n: [found[s][key][k] for s in sorted(found)] for k, n in enumerate(names)}
        return {n: row for n, row in rows.items() if None not in row}

    curve = {step: [sum(found[s]["hv"]) / len(names) for s in sorted(found)]
             for step, found in history.items()}
    official = {"hv_official": table(last, "hv_official")}
    return {"hv": table(last, "hv"), **(official if official["hv_official"] else {}),
            "initial_hv": table(first, "hv"), "curve": curve}


def measure_late(world, state):
    """Fill in the hypervolumes of problems whose ideal and nadir are known only now."""
    for done in state["done"].values():
        for row in (r for found in done["history"].values() for r in found.values()):
            for k, f in row["fronts"].items():
                if world.problems[k].estimated:
                    row["hv"][k], row["hv_official"][k] = volumes(world.problems[k], f)


def learned_fronts(world, method, state, folder):
    """All seeds' objectives, K x (S, N, m). Of the first seed solutions-<method>-<problem>.csv: p,
    x, f a row."""
    net, _ = world.network(method)
    for name, p in net.named_parameters():
        p.data.copy_(torch.stack([state["trained"][method][s][name] for s in world.seeds]))
    history = state["done"][method]["history"]
    last = history[max(history)]
    with torch.no_grad():
        xs = net(world.test.expand(len(world.seeds), -1, -1))
    fronts = []
    for k, (problem, name) in enumerate(zip(world.problems, data.file_names(world.problems),
                                            strict=True)):
        low, width = world.boxes[k]
        x = low + width * xs[k].to(low)
        # a user's function may take its time, so its values are kept
        f = torch.stack([last[s]["fronts"][k] if problem.own else problem(x[i])
                         for i, s in enumerate(world.seeds)]).cpu()
        fronts.append(f)
        rows = torch.cat([world.test.cpu(), x[0].cpu(), f[0]], -1).double().numpy()
        header = [f"{name}{i + 1}" for name, n in
                  (("p", world.n_obj), ("x", problem.n_var), ("f", world.n_obj)) for i in range(n)]
        common.atomic_write(
            folder / f"solutions-{method}-{name}.csv",
            lambda path, rows=rows, header=header, digits=15 if problem.own else 9: np.savetxt(
                path, rows, f"%.{digits}g", ",", header=",".join(header), comments=""))
    return fronts


def report(world, run, state):
    """Tables, figure, solutions, result.json and the RESULT line."""
    args, problems, names = world.args, world.problems, [p.name for p in world.problems]
    own = data.settle(run, problems, state, world.evaluations(), args.reference)
    measure_late(world, state)
    results = {m: summarise(found["history"], names) for m, found in state["done"].items()}
    count = 1000 if args.reference is None else args.reference
    references = [own[k] if p.own else data.reference_front(
        p, 1000 if p.front else count, progress=run.progress) for k, p in enumerate(problems)]
    ceiling = [common.hypervolume((f - p.ideal) / (p.nadir - p.ideal), [1.1] * world.n_obj)
               if len(f) else None for f, p in zip(references, problems, strict=True)]
    for key, title in (("hv", "HV of (f - ideal) / (nadir - ideal)"),
                       ("hv_official", "HV of f / nadir, as the authors' code")):
        having = [p for p in problems if all(p.name in r.get(key, {}) for r in results.values())]
        front = [["reference front", *("-" if v is None else f"{v:.4f}" for v in ceiling)]]
        if having:
            run.table([title, *(p.name + " *" * bool(p.estimated) for p in having)],
                      [[METHODS[m], *(common.spread(r[key][p.name]) for p in having)]
                       for m, r in results.items()] + (front if key == "hv" else []))
            print()
    data.tell_ranges(problems)
    if len(having) < len(names):
        print(f"no f / nadir of {', '.join(p.name for p in problems if p not in having)}: a nadir "
              "there is not above 0")
    run.table(["", "parameters", "CPU-s, all seeds"], [
        [METHODS[m], found["parameters"], found["spent"]] for m, found in state["done"].items()])
    print(f"mean ± std over {args.seeds} seeds; CPU-s of this process, evaluation included\n")
    fronts = {m: learned_fronts(world, m, state, run.out_dir) for m in results}
    shown = "copsl" if "copsl" in results else list(results)[-1]
    means = [sum(v) / len(v) for v in results[shown]["hv"].values()]
    keys = data.file_names(problems)
    estimated = [key for key, p in zip(keys, problems, strict=True) if p.estimated]
    run.finish({"problems": names, "recipe": args.recipe, "loss": world.recipe["loss"],
                "seeds": args.seeds, "seed": args.seed, "ranges": data.ranges(problems),
                "reference_hv": ceiling, "results": results},
               lambda path: draw_figure(world, fronts, results, references, path),
               script="copsl", method=shown, recipe=args.recipe, loss=world.recipe["loss"],
               seeds=args.seeds, hv=sum(means) / len(means),
               **{f"hv_{n}": v for n, v in zip(keys, means, strict=True)},
               **({"estimated": ",".join(estimated)} if estimated else {}), out=run.out_dir)


def draw_figure(world, fronts, results, references, path):
    """Of each problem the first seed's fronts, and all seeds' distances to the reference front."""
    looks = {"psl": (common.BLUE, "^", "--"), "copsl-gradnorm": (common.GREEN, "x", ":"),
             "copsl": (common.ORANGE, "o", "-")}
    looks = {m: (METHODS[m], *look) for m, look in looks.items()}
    fronts = {m: fronts[m] for m in looks if m in fronts}  # others are compared with the last
    references = [data.reference_front(p, 10_000) if p.front and not p.own else r
                  for p, r in zip(world.problems, references, strict=True)]
    with common.figure(path, f"CoPSL, {world.args.recipe} recipe: how far the learned points "
                       "are from the front",
                       common.front_size(len(world.problems))[1]) as (drawing, _):
        common.front_panels(drawing, world.problems, [world.test] * len(world.problems), fronts,
                            references, {m: results[m]["hv"] for m in fronts}, looks)


if __name__ == "__main__":
    common.run_cli(main)
