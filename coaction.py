"""CoAction: Pareto sets of many tasks at once, by a Transformer over tasks

Chen, Liang, Huang, Shang, Liu and Gu, "CoAction: Cross-task Correlation-aware Pareto Set Learning",
ICIC 2026, arXiv 2605.01712 (v2). No code of the authors is known, and of the paper only abstract
and introduction could be read: what is theirs is said below, everything else is UNSPECIFIED.

The idea
    Several multi-objective tasks are solved by one network that maps preferences to solutions. Each
    task is a token: its preference plus a learned embedding of the task. A Transformer encoder lets
    the tokens attend to each other, so that related tasks can share what they learned.

Run
    python coaction.py                                    F1-F6 beside PSL and CoPSL: 1 minute
    python coaction.py --suite re-mixed                   2, 3 and 4 objectives in one network
    python coaction.py --suite mtmo --method all          the nine CEC 2017 pairs, all ablations
    python coaction.py --problems f1 re33 mine.py:Truss   any list, your own included

Paper map (of the paper's abstract; the numbering is ours)
    Eq. E1  task tokens             CoAction.forward: A p_k + e_k
    Eq. E2  attention over tasks    TaskBlock.forward
    Eq. E3  solutions               CoAction.forward: one head per task
    Eq. E4  training                train_step
    Eq. E5  HV, Range, Sparsity     evaluate, common.hypervolume, angular_range, sparsity

Symbols
    p_k       preferences[k]   (S, B, m_k)      on the simplex (+ 1e-4 in training)
    e_k       CoAction.task    (S, K, d)        all K of them: what tells the tasks apart
    h_k       h                (S, B · K, d)    all tokens: for each preference, K in a row
    x_k       solutions[k]     (S, B, n_k)      in the unit cube; boxes bring them to bounds
    f_k       values           (S, B, m_k)      objectives, all minimised
    d, L      width, layers    --width 64, --layers 3
    K, S, B   tasks, seeds, preferences a step (--seeds 5, --batch 30)

Cost
    A sequence is only K tokens long, so that time goes into starting small operations: all seeds
    train at once as a leading dimension. benchmarks/coaction_claims.py compares it with CoPSL.

Results
    Mean HV over 10 seeds, every method by the tuned recipe, CoAction / PSL: F1-F6 .8705 / .8676,
    re3 1.0919 / 1.0836, re-mixed .8251 / .8216, mtmo .331 / .246, re2 1.0065 / 1.0074. Attention
    pays on re3 (+.006) and mtmo (+.013); put beside copies of itself, a task attends to them less
    than to others. With the optima of mtmo moved away from where networks start (--shift .5) mtmo
    has .156 / .158. Spreads, wins, ties and losses by task, what does not hold:
    benchmarks/RESULTS.md.

Where we depart (the marks can be searched for)
    From the paper: several tasks at once; one embedding vector a task; a Transformer encoder whose
    self-attention captures dependencies between tasks; Hypervolume, Range and Sparsity.
    UNSPECIFIED 1 how preferences enter: one linear map per number of objectives, shared by tasks,
                  added to the task's embedding, which is drawn N(0, 1). One token a task.
    UNSPECIFIED 2 the encoder: pre-norm, 3 layers, width 64, 4 heads, feed-forward twice as wide, no
                  positions, no dropout, no norm at its end. Found by a search on tuning seeds; the
                  last two of these choices matter most, see benchmarks/RESULTS.md.
    UNSPECIFIED 3 the heads: one linear layer and a sigmoid per task, drawn a tenth as large as
                  nn.Linear does, so that solutions start near the middle of their box.
    UNSPECIFIED 4 all of training: --recipe tuned is that of copsl.py; --recipe copsl is what the
                  CoPSL paper does in training (its test preferences lie on a quarter circle, ours
                  on the simplex).
    UNSPECIFIED 5 the variants of Range and Sparsity: those of common.py.
    UNSPECIFIED 6 whose preference is whose: tasks with equally many objectives share each draw in
                  training and each preference of the test; the others have their own, in the test
                  in order, over and over.

References
    PSL: Lin et al., NeurIPS 2022. CoPSL: Shang et al., IJCNN 2024. Smooth Tchebycheff: Lin et al.,
    ICML 2024. MTMO: Yuan et al., CEC 2017. Transformer: Vaswani et al., NeurIPS 2017.
"""
# ================================================================================================
# Setup
# ================================================================================================
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data

METHODS = {"coaction": "CoAction", "no-attention": "  no attention",
           "no-embedding": "  no task embedding", "copsl": "CoPSL", "psl": "PSL, one by one"}
SUITES = {
    "f": ["f1", "f2", "f3", "f4", "f5", "f6"],
    "zdt": ["zdt1", "zdt2", "zdt3", "zdt4", "zdt6"],
    "re2": ["re21", "re22", "re23", "re24", "re25"],
    "re3": ["re31", "re32", "re33", "re34", "re35", "re36", "re37"],
    "re-mixed": ["re21", "re24", "re33", "re34", "re37", "re41", "re42"],
    "mtmo": sorted(data.MTMO),
}

# ================================================================================================
# Model: a Transformer over tasks, S independent networks ("seeds") at once
# ================================================================================================

# Read everything with S = 1 first: then these are nn.Linear, nn.LayerNorm and a pre-norm encoder
# block as in any Transformer. The leading axis S lets the seeds of an experiment train side by
# side, since a sequence of K tasks is far too short to keep a processor busy.


def draw_uniform(generators, *shape, bound):
    """A parameter (S, *shape) drawn from U(-bound, bound), one generator per seed."""
    draws = [torch.rand(*shape, generator=g) for g in generators]
    return nn.Parameter((2 * torch.stack(draws) - 1) * bound)


class SeedLinear(nn.Module):
    """S linear layers side by side: x (S, N, in) -> (S, N, out). Initialised as nn.Linear."""

    def __init__(self, fan_in, fan_out, generators):
        super().__init__()
        self.weight = draw_uniform(generators, fan_in, fan_out, bound=1 / math.sqrt(fan_in))
        self.bias = draw_uniform(generators, 1, fan_out, bound=1 / math.sqrt(fan_in))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # x W + b for each seed


class SeedLayerNorm(nn.Module):
    """S layer norms side by side: (S, N, d) -> (S, N, d)."""

    def __init__(self, width, generators):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(generators), 1, width))
        self.bias = nn.Parameter(torch.zeros(len(generators), 1, width))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class TaskBlock(nn.Module):
    """A pre-norm encoder block over K task tokens. attend=False: each sees only itself."""

    def __init__(self, width, heads, generators, attend=True):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = (SeedLayerNorm(width, generators) for _ in range(2))
        self.qkv, self.out = (SeedLinear(width, 3 * width, generators),
                              SeedLinear(width, width, generators))
        self.up, self.down = (SeedLinear(width, 2 * width, generators),
                              SeedLinear(2 * width, width, generators))

    def forward(self, h, tasks, maps=None):
        """h: (S, B · K, d), K = tasks tokens a preference -> the same shape.

        maps: a list that gets the attention weights (S, K, K), mean over preferences and heads.
        """
        S, _, d = h.shape
        # All linear layers treat tokens one by one, so preferences and tasks share an axis there.
        # Attention is the one place where they part: the K tokens of one preference are a sequence
        # of their own and do not see the tokens of the other B - 1 preferences.
        qkv = self.qkv(self.norm1(h)).view(S, -1, tasks, 3, self.heads, d // self.heads)
        q, k, v = (qkv[:, :, :, i].transpose(2, 3).flatten(0, 1) for i in range(3))
        # each (S · B, heads, K, d / heads): S · B sequences of K tokens
        # Eq. (E2): softmax(q kᵀ / √d_head) v over the tasks. A token that sees only itself would
        # have the weight 1 there, so without attention the values pass as they are.
        mixed = F.scaled_dot_product_attention(q, k, v) if self.attend else v
        if maps is not None:  # the same weights, which the fused kernel does not hand out
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # (S · B, heads, K, K)
            maps.append(weights.unflatten(0, (S, -1)).mean((1, 2)))
        h = h + self.out(mixed.transpose(1, 2).reshape(S, -1, d))  # (S, B · K, d)
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class CoAction(nn.Module):
    """K tasks, which may differ in objectives and variables, as K tokens of an encoder.

    n_objs: [m_1 ... m_K]; n_vars: [n_1 ... n_K]; width: a multiple of heads (ValueError otherwise);
    generators: one torch.Generator per seed for the initial draw (default: torch's own, one seed);
    attend, embed: False for the ablations.
    Fits: any tasks whose objectives torch can differentiate, any floating dtype and device; train
    it in float32 or float64. Solutions lie in the unit cube: scale them to your bounds.
    """

    def __init__(self, n_objs, n_vars, width=64, layers=3, heads=4, generators=(None,),
                 attend=True, embed=True):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.n_objs, self.n_vars = list(n_objs), list(n_vars)
        self.width, tasks = width, len(self.n_vars)
        # How a preference becomes a token is shared by all tasks with as many objectives
        # (UNSPECIFIED 1): up to the heads, what sets tasks apart is their embedding alone.
        self.read = nn.ModuleDict({str(m): SeedLinear(m, width, generators)
                                   for m in sorted(set(self.n_objs))})
        # From the abstract: an embedding vector per task, and a Transformer encoder over tasks.
        # Without embeddings, tasks with as many objectives are the same token: attention then has
        # nothing to tell apart, and only the heads differ.
        scale = 1.0 if embed else 0.0
        draws = [torch.randn(tasks, width, generator=g) for g in generators]
        self.task = nn.Parameter(scale * torch.stack(draws), requires_grad=embed)  # (S, K, d)
        self.blocks = nn.ModuleList(TaskBlock(width, heads, generators, attend)  # UNSPECIFIED 2
                                    for _ in range(layers))
        # UNSPECIFIED 3. Small heads start all solutions near the middle of the box, whatever the
        # preference; training then moves apart what has to be. Padded to the largest n_k, so that
        # all heads are one product; forward cuts the padding off, and no gradient reaches it.
        bound = .1 / math.sqrt(width)
        self.head = draw_uniform(generators, tasks, width, max(self.n_vars), bound=bound)
        self.head_bias = draw_uniform(generators, tasks, 1, max(self.n_vars), bound=bound)

    def forward(self, preferences, tasks=None, context=True, maps=None):
        """preferences: list of K tensors (S, B, m_k), or one if all m are equal -> list of x_k.

        tasks: indices of the tasks to answer (default all). The others are still in the sequence
        unless context=False. x_k: (S, B, n_k) in the unit cube. maps: see TaskBlock.
        """
        if torch.is_tensor(preferences):
            preferences = [preferences] * len(self.n_vars)
        # `asked` are the tasks whose solutions are wanted, `present` the tokens of the sequence. A
        # user who needs one task gets the answer that was trained for with the others present;
        # alone (context=False) it is cheaper, but the network has never seen a task alone.
        every = list(range(len(self.n_vars)))
        asked = every if tasks is None else list(tasks)
        present = every if context else asked
        # Eq. (E1): h_k = A_{m_k} p_k + e_k, A with a bias
        tokens = [self.read[str(self.n_objs[k])](preferences[k]) + self.task[:, k, None]
                  for k in present]  # each (S, B, d)
        h = torch.stack(tokens, 2).flatten(1, 2)  # (S, B · K, d)
        for block in self.blocks:
            h = block(h, len(present), maps)
        h = h.unflatten(1, (-1, len(present))).transpose(1, 2)  # (S, K, B, d)
        # Eq. (E3): x_k = sigmoid(W_k h_k + b_k), a point of task k's unit cube
        x = torch.sigmoid(h @ self.head[:, present] + self.head_bias[:, present])
        return [x[:, present.index(k), :, :self.n_vars[k]] for k in asked]

    def num_parameters(self):
        """Trainable parameters of one seed's network, padding not counted."""
        total = sum(p[0].numel() for p in self.parameters() if p.requires_grad)
        wide = len(self.n_vars) * max(self.n_vars) - sum(self.n_vars)
        return total - wide * (self.width + 1)


class Towers(nn.Module):
    """The networks compared with, m_k - 256 - 256 - n_k: CoPSL (`shared` first layer) or PSL."""

    def __init__(self, n_objs, n_vars, width=256, generators=(None,), shared=True):
        super().__init__()
        self.n_objs, self.n_vars, self.width, self.shared = n_objs, n_vars, width, shared
        # K networks of different shapes as one tensor a layer (S, K, in, out), padded to the most
        # objectives and the most variables: preferences get zeros in front of padded weights, and
        # padded solutions are cut off. Each is drawn for its own number of inputs, as nn.Linear.
        tasks, wide = len(n_vars), max(n_objs)
        first = 1 if shared else tasks
        bound = torch.tensor(n_objs[:first]).rsqrt().view(-1, 1, 1)
        self.w1 = draw_uniform(generators, first, wide, width, bound=bound)
        self.b1 = draw_uniform(generators, first, 1, width, bound=bound)
        self.w2, self.w3 = (draw_uniform(generators, tasks, width, out, bound=1 / math.sqrt(width))
                            for out in (width, max(n_vars)))
        self.b2, self.b3 = (draw_uniform(generators, tasks, 1, out, bound=1 / math.sqrt(width))
                            for out in (width, max(n_vars)))

    def forward(self, preferences):
        """List of K preferences (S, B, m_k) -> list of K solutions (S, B, n_k)."""
        wide = max(self.n_objs)
        p = torch.stack([F.pad(q, (0, wide - q.shape[-1])) for q in preferences], 1)  # (S, K, B, m)
        # A shared first layer reads one preference for all tasks, so there they must be the same.
        h = F.relu((p[:, :1] if self.shared else p) @ self.w1 + self.b1)  # (S, 1 or K, B, width)
        h = F.relu(h.expand(-1, len(self.n_vars), -1, -1) @ self.w2 + self.b2)
        x = torch.sigmoid(h @ self.w3 + self.b3)  # (S, K, B, max n)
        return [x[:, k, :, :n] for k, n in enumerate(self.n_vars)]

    def num_parameters(self):
        """Parameters of one seed's network, padding not counted."""
        w, first = self.width, self.n_objs[:1] if self.shared else self.n_objs
        return sum((m + 1) * w for m in first) + sum((w + 1) * (w + n) for n in self.n_vars)


# ================================================================================================
# Method: pure functions, to be copied
# ================================================================================================


def smooth_tchebycheff(values, preferences, mu=.1):
    """μ log Σ_j exp(w_j f_j / μ), w = (1/p) / Σ (1/p): smooth form of max_j f_j / p_j.

    values: (..., m), normalised; preferences: (..., m) > 0; mu: how smooth -> (...).
    """
    # The minimum of max_j f_j / p_j is where the ray through p meets the front, convex or not: a
    # large p_j allows a large f_j. (Dividing all weights by their sum moves no minimum.) Smoothed,
    # the gradient reaches every objective that is near the largest.
    weights = (1 / preferences) / (1 / preferences).sum(-1, keepdim=True)
    return mu * torch.logsumexp(weights * values / mu, dim=-1)


def modified_tchebycheff(values, preferences, rho=.01):
    """max_j f_j / p_j + ρ Σ_j f_j, as CoPSL has it. (..., m) twice -> (...)."""
    return (values / preferences).amax(-1) + rho * values.sum(-1)


def dirichlet_preferences(steps, batch, n_obj, generator=None):
    """Preferences ~ Dirichlet(1, ..., 1) + 1e-4. -> (steps, batch, m), on the CPU."""
    # Exponential variables over their sum are uniform on the simplex. 1e-4 keeps 1 / p finite.
    e = -torch.rand(steps, batch, n_obj, generator=generator).clamp_min(1e-30).log()
    return e / e.sum(-1, keepdim=True) + 1e-4


def even_preferences(steps, batch, n_obj, generator=None, stretch=.05):
    """Like dirichlet_preferences, but each step's batch covers the simplex evenly.

    A lattice, moved by a random shift a step. For m > 2 not even-handed: a cut that is clipped to 0
    or 1 makes the first or the last objective's share 0, seldom a middle one's.
    """
    # 1. A preference of m numbers that sum to 1 is a stick cut in m - 1 places; cuts that are
    #    uniform on [0, 1] and sorted make preferences that are uniform on the simplex.
    # 2. `batch` points that lie evenly in [0, 1]^(m-1): Kronecker's lattice, where point i is
    #    i · (1/g, 1/g², ...) modulo 1, and g is the root of g^m = g + 1 (m = 2: the golden ratio).
    golden = 1.0
    for _ in range(60):  # fixed-point iteration of g = (1 + g)^(1/m)
        golden = (1 + golden) ** (1 / n_obj)
    slope = torch.tensor([golden ** -(j + 1) for j in range(n_obj - 1)])
    # 3. One random shift a step, modulo 1: over the steps all cuts are equally likely.
    shift = torch.rand(steps, 1, n_obj - 1, generator=generator)
    cuts = (torch.arange(batch)[:, None] * slope + shift) % 1  # (steps, B, m - 1)
    # 4. Stretched over both ends and clipped: some cuts fall on 0 or 1, the ends of the front.
    cuts = (cuts * (1 + 2 * stretch) - stretch).clamp(0, 1).sort(-1)[0]
    ends = torch.zeros(steps, batch, 1)
    return torch.cat([ends, cuts, ends + 1], -1).diff(dim=-1) + 1e-4  # (steps, B, m)


def update_range(ideal, nadir, values, keep=.9):
    """Running estimates of the best and worst values of a front, from a batch on its way there.

    ideal: the smallest value so far; nadir: moving average of a batch's largest. ideal, nadir:
    (S, 1, m) or None at first; values: (S, B, m) -> (ideal, nadir), detached.
    """
    low, high = values.detach().aminmax(dim=-2, keepdim=True)
    if ideal is None:
        return low, high
    # The largest value is not kept: early batches are far from the front and would stay in it.
    return torch.minimum(ideal, low), keep * nadir + (1 - keep) * high


def clip_gradients(parameters, limit):
    """Scale each seed's gradient, over all parameters (S, ...), to a norm of at most `limit`."""
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
    """The fixed part of a run: the tasks, this process's seeds, the preferences to test on."""

    def __init__(self, problems, seeds, args, device, dtype=torch.float32):
        self.problems, self.seeds, self.args = problems, seeds, args
        self.device, self.dtype, self.tuned = device, dtype, args.recipe == "tuned"
        self.n_objs, self.n_vars = [p.n_obj for p in problems], [p.n_var for p in problems]
        # A user's task is evaluated on the CPU in float64: objectives like 2e7 + x have no digits
        # to spare. They are float32 when they have become shares of a range (train_step).
        self.exact = torch.float64 if torch.device(device).type != "mps" else dtype
        # Networks answer in the unit cube; lower + width · x brings a solution to its task's bounds
        self.boxes = [(p.lower.to(*at), (p.upper - p.lower).to(*at)) for p in problems
                      for at in [("cpu", torch.float64) if p.own else (device, dtype)]]
        grids = {m: test_preferences(m, args.eval_points).to(device, dtype)
                 for m in set(self.n_objs)}
        self.tests = [grids[m] for m in self.n_objs]  # K x (N_k, m_k)

    def network(self, method):
        """A freshly drawn network, and its optimiser."""
        args, peer = self.args, method in ("copsl", "psl")
        generators = [common.torch_generator(s, "init") for s in self.seeds]
        if peer:
            net = Towers(self.n_objs, self.n_vars, args.tower_width, generators, method == "copsl")
        else:
            net = CoAction(self.n_objs, self.n_vars, args.width, args.layers, args.heads,
                           generators, attend=method != "no-attention",
                           embed=method != "no-embedding")
        net = net.to(self.device, self.dtype)
        # UNSPECIFIED 4: all methods get the same recipe; each its own learning rate
        lr = (args.tower_lr if peer else args.lr) if self.tuned else 1e-3
        betas = (.9, .95) if self.tuned else (.9, .999)
        return net, torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr, betas,
                                     fused=True)

    def preferences(self):
        """All training preferences, a pure function of the seeds: m -> (steps, S, B, m)."""
        # Drawn before the first step, so that a resumed run need not know how far a generator was
        draw = even_preferences if self.tuned else dirichlet_preferences
        return {m: torch.stack([draw(self.args.steps, self.args.batch, m,
                                     common.torch_generator(s, "preferences", m))
                                for s in self.seeds], 1).to(self.device, self.dtype)
                for m in sorted(set(self.n_objs))}

    def values(self, solutions):
        """K solutions (S, B, n_k) of the unit cubes -> K objectives (S, B, m_k), float64 if own."""
        return [p(low + width * x.to(low)) for p, (low, width), x in
                zip(self.problems, self.boxes, solutions, strict=True)]

    def evaluations(self, methods):
        """How often training and its tests evaluate each task, for so many methods."""
        args = self.args
        tests = (1 + -(-args.steps // args.eval_every)) * min(map(len, self.tests))
        return methods * args.seeds * (args.steps * args.batch + tests)

    def test_batch(self):
        """K x (S, N, m_k): each task's test preferences, over and over to the longest list's N."""
        # UNSPECIFIED 6: tasks with as many objectives are asked the same; another number of
        # objectives has another number of test preferences, and the shorter list starts again.
        rows = torch.arange(max(map(len, self.tests)), device=self.device)
        return [t[rows % len(t)].expand(len(self.seeds), -1, -1) for t in self.tests]

    @torch.no_grad()
    def fronts(self, net, known=()):
        """K x (S, N_k, m_k) objectives at each task's own test preferences; None for `known` k."""
        found = []
        for k, x in enumerate(net(self.test_batch())):
            p, (low, width), count = self.problems[k], self.boxes[k], len(self.tests[k])
            x = x[:, :count] if p.own else x
            found.append(None if k in known else p(low + width * x.to(low))[:, :count])
        return found


def test_preferences(n_obj, count):
    """m = 2: `count` points of the segment (default 100); else Das-Dennis (m = 3: 105). (N, m)."""
    if n_obj == 2:
        t = torch.linspace(0, 1, count or 100, dtype=torch.float64)
        return torch.stack([t, 1 - t], -1)
    return data.das_dennis(n_obj, count or (105 if n_obj == 3 else 210))


def train_step(world, net, optimizer, p, ranges):
    """One step of all seeds; p: list of K preferences (S, B, m_k) -> loss (S,) before the step."""
    solutions = net(p)  # K x (S, B, n_k)
    losses = []
    for k, (f, problem) in enumerate(zip(world.values(solutions), world.problems, strict=True)):
        if problem.own:
            f = (f / problem.unit if world.tuned else f).to(world.device, world.exact)
        if world.tuned:  # UNSPECIFIED 4
            # Objectives as shares of the range between ideal and nadir, both estimated on the way:
            # kilograms and millimetres then count alike, and so do the tasks in the sum below.
            ranges[k] = ideal, nadir = update_range(*ranges[k], f)
            f = ((f - ideal) / (nadir - ideal).clamp_min(1e-12)).to(world.dtype)
            losses.append(smooth_tchebycheff(f, p[k], world.args.mu).mean(-1))
        else:
            losses.append(modified_tchebycheff(f.to(world.dtype), p[k]).sum(-1))
    # Eq. (E4): Σ_k mean_b g(f_k(x_k(p_b)), p_b); with --recipe copsl the sum over b
    loss = torch.stack(losses, -1).sum(-1)  # (S,)
    total = loss.sum()  # no seed's loss depends on another seed's parameters
    if world.tuned:
        # The mean squared logit, weighed lightly, keeps solutions off the flat ends of the sigmoid,
        # where nothing is learned any more. (Beyond 1e-6 of an end it has no gradient either: it
        # has to act before.)
        total = total + 2e-4 * sum(torch.logit(x, 1e-6).square().mean((1, 2)).sum()
                                   for x in solutions)
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    if world.tuned:
        clip_gradients(net.parameters(), 1.0)  # one norm over all tasks, for PSL's networks too
    optimizer.step()
    return loss.detach()


MEASURES = ("hv", "range", "sparsity")


@torch.no_grad()
def evaluate(world, net):
    """E5 for every seed -> seed: {"hv", "range", "sparsity": K numbers each, "fronts"}.

    fronts: k -> the objectives (N, m) of own tasks. A task that came without ideal or nadir has
    None: they are estimated, and its fronts measured, when training is done.
    """
    found = {s: {**{key: [] for key in MEASURES}, "fronts": {}} for s in world.seeds}
    for k, (problem, f) in enumerate(zip(world.problems, world.fronts(net), strict=True)):
        for s, seed in enumerate(world.seeds):
            common.check_finite(f[s], f"{problem.name}: an objective of the learned front")
            measured = [None] * 3 if problem.estimated else measure(problem, f[s])
            for key, value in zip(MEASURES, measured, strict=True):
                found[seed][key].append(value)
            if problem.own:
                found[seed]["fronts"][k] = f[s].cpu().clone()
    return found


def measure(problem, f):
    """MEASURES of a front (N, m), all on (f - ideal) / (nadir - ideal). UNSPECIFIED 5.

    Hypervolume with reference 1.1, Range in radians (NaN for m > 3), Sparsity (smaller is denser).
    """
    # On the scale of each task's own front, or tasks in tons would outweigh tasks in millimetres
    f = (f.cpu().double() - problem.ideal) / (problem.nadir - problem.ideal)
    # Eq. (E5): the three measures of the abstract. Hypervolume: how good; Range: how far the front
    # reaches; Sparsity: how large the gaps in it are.
    return (common.hypervolume(f, [1.1] * problem.n_obj), common.angular_range(f),
            common.sparsity(f))


def measure_late(world, state):
    """Measure the fronts of tasks whose ideal and nadir are known only now."""
    for done in state["done"].values():
        for row in (r for found in done["history"].values() for r in found.values()):
            for k, f in row["fronts"].items():
                if world.problems[k].estimated:
                    for key, value in zip(MEASURES, measure(world.problems[k], f), strict=True):
                        row[key][k] = value


@torch.no_grad()
def attention_map(world, net):
    """Who looks at whom: mean attention weights over layers, heads, preferences -> seed: (K, K)."""
    # What E2 weighs, averaged over all that one cannot look at: a row says how much a task's token
    # takes from each of the others (and from itself). C4 of RESULTS.md says what it is not.
    maps = []
    net(world.test_batch(), maps=maps)
    mean = torch.stack(maps).mean(0)  # (S, K, K): row k reads, column j is read
    return {seed: mean[s].cpu() for s, seed in enumerate(world.seeds)}


def train(world, run, method, saved, save):
    """Train all seeds of one method -> (network, history: step -> dict of evaluate, CPU-s)."""
    args = world.args
    net, optimizer = world.network(method)
    trained = [(dict(net.named_parameters()), optimizer)]
    peak, ranges = optimizer.param_groups[0]["lr"], [(None, None)] * len(world.problems)
    start, spent = 0, 0.0
    if saved is None:
        history = {0: run.gather(evaluate(world, net))}
    else:
        start, history, spent = saved["step"], saved["history"], saved["spent"]
        found = common.unpack_seeds(saved["seeds"], world.seeds, trained, world.device)
        ranges = [(found.get(f"ideal {k}"), found.get(f"nadir {k}")) for k in range(len(ranges))]
    preferences, began = world.preferences(), time.process_time()
    for step in run.progress(range(start, args.steps), METHODS[method].strip(), initial=start,
                             total=args.steps):
        if world.tuned:
            optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / args.steps)) / 2
        # UNSPECIFIED 6: tasks with as many objectives get the same preferences in a step. Their
        # tokens then ask the same question of different tasks, which is what could be shared.
        p = [preferences[m][step] for m in world.n_objs]
        loss = train_step(world, net, optimizer, p, ranges)
        done = step + 1
        if done % args.eval_every == 0 or done == args.steps:
            common.check_finite(loss, f"{method}: the loss after step {done}")
            history[done] = run.gather(evaluate(world, net))
            now = [v for found in history[done].values() for v in found["hv"]]
            known = {} if None in now else {"hv": sum(now) / len(now)}
            run.log(method=method, step=done, loss=loss.mean().item(), **known)
        if done % args.save_every == 0 or done == args.steps:
            # Seed by seed, so that a run may be continued by another number of processes.
            more = {f"{which} {k}": t for k, pair in enumerate(ranges)
                    for which, t in zip(("ideal", "nadir"), pair, strict=True)}
            save({"method": method, "step": done, "history": history,
                  "spent": spent + time.process_time() - began,
                  "seeds": run.gather(common.pack_seeds(world.seeds, trained, more))})
    return net, history, spent + time.process_time() - began


# ================================================================================================
# Command line
# ================================================================================================


def build_parser():
    """All flags."""
    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    add = parser.group("tasks")
    add("--suite", sorted(SUITES), None, "f: F1-F6 (default); zdt; re2, re3: real-world problems "
        "with 2, 3 objectives; re-mixed: 2, 3 and 4 together; mtmo: the nine CEC 2017 pairs")
    add("--problems", str, None, "instead of a suite: names such as f1 zdt3 re41 cihs1, suites, or "
        "FILE.py:NAME", nargs="+", metavar="NAME")
    add("--shift", float, 0.0, "move the optima of mtmo tasks by up to this fraction of half the "
        "width (default 0: several lie in the middle, where a network starts)", low=0, high=.9)
    add("--eval-points", int, None, "test preferences (default 100; 105 for 3 objectives, at most "
        "210 for more)", low=4)
    add("--reference", int, None, "directions of the search for a front that has no formula, 1,000 "
        "evaluations each (default 400; of own tasks as many as evaluations of training)", low=0)
    add = parser.group("method")
    add("--method", str, "psl,copsl,coaction", f"{', '.join(METHODS)}, several with commas, or all;"
        " copsl is left out where objectives differ in number")
    add("--recipe", ["tuned", "copsl"], "tuned", "UNSPECIFIED 4. tuned: even preferences, smooth "
        "Tchebycheff of normalised objectives, decay; copsl: mtch, learning rate 1e-3, as CoPSL")
    add("--width", int, 64, "d, a multiple of --heads", low=1)
    add("--layers", int, 3, "encoder layers", low=1)
    add("--heads", int, 4, "attention heads", low=1)
    add("--tower-width", int, 256, "hidden units of PSL and CoPSL (their papers 256)", low=1)
    add("--mu", float, .1, "μ of the smooth Tchebycheff loss, normalised objectives", above=0)
    add = parser.group("training")
    add("--seeds", int, 5, "independent networks, trained at once: --seed, --seed + 1, ...", low=1)
    add("--steps", int, 500, "steps, as CoPSL", low=1)
    add("--batch", int, 30, "preferences a step, as CoPSL", low=1)
    add("--lr", float, 5e-3, "learning rate of CoAction, tuned recipe", above=0)
    add("--tower-lr", float, 5e-3, "learning rate of PSL and CoPSL, tuned recipe", above=0)
    add("--eval-every", int, 25, "steps between evaluations", low=1)
    add("--save-every", int, 100, "steps between checkpoints", low=1)
    return parser


def resolve(args):
    """Expand names; refuse what does not go together."""
    chosen = common.choose(args.method, METHODS)
    args.method = ",".join(m for m in METHODS if m in chosen)
    if args.suite and args.problems:
        raise common.UserError("--suite and --problems both name the tasks; give one of them")
    if args.width % args.heads:
        raise common.UserError(f"--width {args.width} is not a multiple of --heads {args.heads}")
    if args.problems is None:
        args.suite = args.suite or "f"
        args.problems = SUITES[args.suite]
    args.problems = data.problem_names(args.problems, SUITES)
    args.threads = args.threads or 1
    return args


def methods_that_can(methods, problems):
    """Those that these problems allow; UserError if none does."""
    if len({p.n_obj for p in problems}) > 1 and "copsl" in methods:
        methods.remove("copsl")  # it cannot: one shared layer reads one kind of preference
        if not methods:
            raise common.UserError("--method copsl needs tasks with one number of objectives")
    return methods


def main(argv=None):
    """The command: every method of --method in turn, each resumable, then the report."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given, args = common.given(parser, args), resolve(args)
    problems = data.get_problems(args.problems, args.data_dir, args.seed, args.shift)
    methods = methods_that_can(args.method.split(","), problems)
    with common.Run(args, f"coaction-{args.suite or 'problems'}") as run:
        seeds = run.share_seeds(args.seed, args.seeds)
        state = run.load() or {"done": {}, "trained": {}, "current": None}
        world = World(problems, seeds, args, run.device)
        data.tell_problems(run, problems, world.evaluations(len(methods)), args.reference,
                           world.tuned)
        if args.eval_points:
            for m, test in {p.n_obj: t for p, t in zip(problems, world.tests, strict=True)}.items():
                if len(test) != args.eval_points:
                    run.warn(f"--eval-points {args.eval_points}: {len(test)} of {m} objectives are "
                             "spread evenly")
        run.begin()
        if len(methods) < len(args.method.split(",")):
            run.warn("copsl is left out: its shared layer reads one preference for all tasks, and "
                     "these differ in their numbers of objectives")
        common.tell_idle(
            run, given, (args.recipe == "copsl", {"lr", "tower_lr", "mu"},
                         "--recipe copsl has CoPSL's own rate and loss"),
            (not set(methods) & {"psl", "copsl"}, {"tower_lr", "tower_width"},
             f"--method {args.method} has no towers"),
            (set(methods) <= {"psl", "copsl"}, {"lr", "width", "layers", "heads"},
             f"--method {args.method} has no Transformer"),
            (not set(args.problems) & set(data.MTMO), {"shift"}, "no task is of mtmo"))
        for method in methods:
            if method in state["done"]:
                continue

            def save(current):
                run.save({**state, "current": current},
                         f"{current['method']}, step {current['step']}")
            net, history, spent = train(world, run, method, state["current"], save)
            maps = attention_map(world, net) if method == "coaction" else {}
            state["done"][method] = {"history": history, "spent": spent,
                                     "parameters": net.num_parameters(), "maps": run.gather(maps)}
            state["trained"][method] = run.gather(
                {s: {n: p[i] for n, p in net.named_parameters()} for i, s in enumerate(seeds)})
            state["current"] = None
            run.save(state, method)
        if run.rank == 0:
            report(world, run, state)


def summarise(found, names):
    """Of one method: {"hv", "range", "sparsity", "initial_hv": {task: one number per seed}}."""
    history = found["history"]
    first, last = history[min(history)], history[max(history)]

    def table(rows, key):
        return {n: [None if math.isnan(rows[s][key][k]) else rows[s][key][k] for s in sorted(rows)]
                for k, n in enumerate(names)}

    result = {key: table(last, key) for key in MEASURES}
    result |= {"initial_hv": table(first, "hv"), "parameters": found["parameters"]}
    if found["maps"]:
        maps = [found["maps"][s] for s in sorted(found["maps"])]  # in one order on any processes
        result["attention"] = torch.stack(maps).mean(0).tolist()
    return result


def report(world, run, state):
    """Tables, figure, result.json and the RESULT line."""
    problems, args = world.problems, world.args
    names = [p.name for p in problems]
    own = data.settle(run, problems, state, world.evaluations(len(state["done"])), args.reference)
    measure_late(world, state)
    results = {m: summarise(found, names) for m, found in state["done"].items()}
    for key, title in (("hv", "Hypervolume"), ("range", "Range (radians)"),
                       ("sparsity", "Sparsity (smaller is denser)")):
        run.table([title, *(METHODS[m] for m in results)],
                  [[p.name + " *" * bool(p.estimated),
                    *(common.spread(r[key][p.name]) for r in results.values())] for p in problems])
        print()
    data.tell_ranges(problems)
    means, fresh = ({m: sum(map(sum, r[key].values())) / len(names) / args.seeds
                     for m, r in results.items()} for key in ("hv", "initial_hv"))
    run.table(["", "mean HV", "before training", "parameters", "CPU-s, all seeds"],
              [[METHODS[m], f"{means[m]:.4f}", f"{fresh[m]:.4f}", r["parameters"],
                state["done"][m]["spent"]] for m, r in results.items()])
    print(f"mean ± std over {args.seeds} seeds; all of (f - ideal) / (nadir - ideal); CPU-s of "
          "this process, evaluation included")
    shown = "coaction" if "coaction" in results else list(results)[-1]
    estimated = [key for key, p in zip(data.file_names(problems), problems, strict=True)
                 if p.estimated]
    run.finish({"problems": names, "recipe": args.recipe, "seed": args.seed, "seeds": args.seeds,
                "stand_in_matrices": sorted(p.name for p in problems if p.stand_in),
                "ranges": data.ranges(problems), "results": results},
               lambda path: draw_figure(world, run, state, results, own, path),
               script="coaction", suite=args.suite or "own", method=shown, recipe=args.recipe,
               seeds=args.seeds, hv=means[shown],
               **{f"hv_{m.replace('-', '_')}": v for m, v in means.items() if m != shown},
               **({"estimated": ",".join(estimated)} if estimated else {}), out=run.out_dir)


def draw_figure(world, run, state, results, own, path):
    """Left: of each task the first seed's fronts, and all seeds' distances to the reference front.
    Right: mean attention between tasks."""
    looks = {"no-embedding": (common.PINK, "s", "-."), "no-attention": (common.GREEN, "+", "-."),
             "psl": (common.AMBER, "^", ":"), "copsl": (common.ORANGE, "x", "--"),
             "coaction": (common.BLUE, "o", "-")}
    looks = {m: (METHODS[m].strip(), *look) for m, look in looks.items() if m in results}
    problems, fronts = world.problems, {}
    for method in looks:  # the others are compared with the last
        net, _ = world.network(method)
        for name, p in net.named_parameters():
            p.data.copy_(torch.stack([state["trained"][method][s][name] for s in world.seeds]))
        history = state["done"][method]["history"]
        last = history[max(history)]
        kept = last[world.seeds[0]]["fronts"]  # own tasks are not evaluated again
        fronts[method] = [
            torch.stack([last[s]["fronts"][k] for s in world.seeds]) if k in kept else f
            for k, f in enumerate(world.fronts(net, kept))]
    count = 400 if world.args.reference is None else world.args.reference
    references = [own[k] if k in own else data.reference_front(
        p, 10_000 if p.front else count, progress=run.progress) for k, p in enumerate(problems)]
    names = [p.name for p in problems]
    heat = results.get("coaction", {}).get("attention") if len(names) > 1 else None
    _, (wide, tall) = common.front_size(len(names))
    with common.figure(path, f"CoAction, {world.args.recipe} recipe: how far the learned points "
                       "are from the front",
                       (wide + (4.8 if heat else 0), tall)) as (drawing, _):
        parts = drawing.subfigures(1, 2, width_ratios=(wide, 4.8)) if heat else [drawing]
        common.front_panels(parts[0], problems, world.tests, fronts, references,
                            {m: results[m]["hv"] for m in looks}, looks)
        if heat:
            axes = parts[1].add_subplot()
            shown = common.heat_map(axes, heat, "", names, names, cmap="cividis", vmin=0)
            axes.set_title("attention between tasks, mean over seeds", fontsize=8)
            axes.set(xlabel="is read", ylabel="reads")
            parts[1].colorbar(shown, ax=axes, location="bottom", shrink=.8,
                              label=f"weight (uniform: {1 / len(names):.2f})")


if __name__ == "__main__":
    common.run_cli(main)
