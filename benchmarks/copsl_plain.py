"""CoPSL in the plain arrangement: one seed at a time, loops over towers and over variables.

This is how the authors' code (github.com/ckshang/CoPSL) and the PSL-MOBO problems it is built on
arrange the work. It is the peer of benchmarks/copsl_speed.py (copsl.py must be faster and give the
same losses), and it shares no code with copsl.py and data.py.

    network    nn.Linear modules, a Python loop over the K towers
    problems   F1-F6 with a Python loop over the variables
    step       a loop over problems, backward with retain_graph, Adam of one tensor after another
    GradNorm   K further backward passes, one for the gradient norm of each problem
    test       every step: 100 preferences through the network, the hypervolume of every problem
               (by moocore, as copsl.py: faster than the authors' pymoo)
"""
import math

import moocore
import numpy as np
import torch
import torch.nn as nn

# ================================================================================================
# Problems
# ================================================================================================


class PlainProblem:
    """F1-F6, x in [0, 1]: f1 = x1 (1 + mean y_odd), f2 = g (1 - √(x1 / g)), g = 1 + mean y_even.

    term(x1, xj, j, n): the y of variable j = 2 ... n. evaluate: x (B, n) -> (B, 2).
    """
    n_obj, nadir = 2, torch.ones(2)

    def __init__(self, n_var=6):
        self.n_var = n_var

    def evaluate(self, x):
        n = x.shape[1]
        sum_odd = sum_even = count_odd = count_even = 0.0
        for j in range(2, n + 1):
            y = self.term(x[:, 0], x[:, j - 1], j, n)
            if j % 2 == 0:
                sum_even = sum_even + y
                count_even = count_even + 1.0
            else:
                sum_odd = sum_odd + y
                count_odd = count_odd + 1.0
        f1 = (1 + 1 / count_odd * sum_odd) * x[:, 0]
        return torch.stack([f1, self.second(x[:, 0], 1 / count_even * sum_even)]).T

    def second(self, x1, mean_even):
        return (1 + mean_even) * (1.0 - torch.sqrt(x1 / (1.0 + mean_even)))


class F1(PlainProblem):
    def term(self, x1, xj, j, n):
        y = xj - torch.pow(2 * x1 - 1, 2)
        return y * y


class F2(PlainProblem):
    def term(self, x1, xj, j, n):
        theta = 1.0 + 3.0 * (j - 2) / (n - 2)
        y = xj - torch.pow(x1, .5 * theta)
        return y * y


class F3(PlainProblem):
    def term(self, x1, xj, j, n):
        y = xj - .5 * (torch.sin(4 * math.pi * x1 + j * math.pi / n) + 1)
        return y * y

    def second(self, x1, mean_even):  # nothing is divided by 1 + mean_even under this root
        return (1 + mean_even) * (1.0 - torch.sqrt(x1))


class F4(PlainProblem):
    def term(self, x1, xj, j, n):
        xj, angle = 2 * xj - 1, 4 * math.pi * x1 + j * math.pi / n
        y = xj - .8 * x1 * (torch.sin(angle) if j % 2 == 0 else torch.cos(angle))
        return y * y


class F5(PlainProblem):
    def term(self, x1, xj, j, n):
        xj, angle = 2 * xj - 1, 4 * math.pi * x1 + j * math.pi / n
        y = xj - .8 * x1 * (torch.sin(angle) if j % 2 == 0 else torch.cos(angle / 3))
        return y * y


class F6(PlainProblem):
    def term(self, x1, xj, j, n):
        xj, angle = 2 * xj - 1, 6 * math.pi * x1 + j * math.pi / n
        radius = .3 * x1 * x1 * torch.cos(12 * math.pi * x1 + 4 * j * math.pi / n) + .6 * x1
        if j % 2 == 0:
            y = xj - radius * torch.sin(angle)
            return (y * y) * (y * y)
        y = xj - radius * torch.cos(angle)
        return y * y


PROBLEMS = [F1, F2, F3, F4, F5, F6]

# ================================================================================================
# Network and steps
# ================================================================================================


class PlainCoPSL(nn.Module):
    """One shared layer, K towers: preferences (B, m) -> list of K solutions (B, n)."""

    def __init__(self, n_obj, n_vars, width=256):
        super().__init__()
        self.shared = nn.Linear(n_obj, width)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n), nn.Sigmoid())
            for n in n_vars)
        self.weights = nn.Parameter(torch.ones(len(n_vars)))  # GradNorm's, unused without it

    def forward(self, preferences):
        h = torch.relu(self.shared(preferences))
        return [tower(h) for tower in self.towers]


def plain_preferences(rng, batch, n_obj):
    """(B, m) Dirichlet(1, ..., 1) + 1e-4."""
    return torch.tensor(rng.dirichlet(np.ones(n_obj), batch)).float() + .0001


def plain_losses(net, problems, preferences):
    """The modified Tchebycheff loss, summed over the batch, of every problem: list of K scalars."""
    losses = []
    for x, problem in zip(net(preferences), problems, strict=True):
        value = problem.evaluate(x)
        worst = torch.max(1 / preferences * value, dim=1)[0]
        losses.append(torch.sum(worst + .01 * torch.sum(value, dim=1)))
    return losses


def plain_optimizer(net, lr=1e-3):
    return torch.optim.Adam([p for n, p in net.named_parameters() if n != "weights"], lr=lr,
                            foreach=False, fused=False)


def plain_step(net, problems, preferences, optimizer):
    """One step of CoPSL -> the losses (K,) before it."""
    losses = plain_losses(net, problems, preferences)
    optimizer.zero_grad()
    sum(losses).backward(retain_graph=True)
    optimizer.step()
    return torch.stack(losses).detach()


def plain_gradnorm_step(net, problems, preferences, optimizer, weigher, first, alpha=1.75):
    """One step with GradNorm -> the losses (K,); first: those of step 0, or None at step 0.

    weigher: an optimiser of net.weights.
    """
    losses = torch.stack(plain_losses(net, problems, preferences))
    first = losses.detach() if first is None else first
    optimizer.zero_grad()
    (net.weights.detach() * losses).sum().backward(retain_graph=True)
    norms = []
    for k, loss in enumerate(losses):
        gradient = torch.autograd.grad(loss, net.shared.weight, retain_graph=True)[0]
        norms.append(torch.norm(net.weights[k] * gradient))
    norms = torch.stack(norms)
    rates = losses.detach() / first
    target = norms.detach().mean() * (rates / rates.mean()) ** alpha
    weigher.zero_grad()
    net.weights.grad = torch.autograd.grad((norms - target).abs().sum(), net.weights)[0]
    optimizer.step()
    weigher.step()
    net.weights.data *= len(losses) / net.weights.data.sum()
    return losses.detach()


@torch.no_grad()
def plain_evaluate(net, problems):
    """Hypervolume of f / nadir for 100 preferences on the quarter circle: list of K numbers."""
    t = np.linspace(0, 1, 100)
    p = np.stack([t, 1 - t], 1)
    p = torch.tensor(p / np.linalg.norm(p, axis=1, keepdims=True)).float() + .0001
    return [moocore.hypervolume((problem.evaluate(x) / problem.nadir).numpy().astype(float),
                                ref=[1.1, 1.1])
            for x, problem in zip(net(p), problems, strict=True)]


def plain_train(seed, steps, gradnorm=False, evaluate=False, batch=30):
    """Train on F1-F6 -> (network, list of hypervolumes of every step)."""
    torch.manual_seed(seed)
    rng, problems = np.random.default_rng(seed), [p() for p in PROBLEMS]
    net = PlainCoPSL(2, [p.n_var for p in problems])
    optimizer, weigher = plain_optimizer(net), torch.optim.Adam([net.weights], 1e-3, foreach=False)
    first, history = None, []
    for _ in range(steps):
        preferences = plain_preferences(rng, batch, 2)
        if gradnorm:
            losses = plain_gradnorm_step(net, problems, preferences, optimizer, weigher, first)
            first = losses if first is None else first
        else:
            plain_step(net, problems, preferences, optimizer)
        if evaluate:
            history.append(plain_evaluate(net, problems))
    return net, history
