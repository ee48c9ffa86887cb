"""copsl.py: equations and networks against plain arrangements, and the command."""
import copy
import csv
import json
import math
import shutil
import signal

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import copsl
import data
from tools import (
    ROOT,
    PowerCut,
    QuietRun,
    assert_same_run,
    calls,
    cut_power,
    drawn_fronts,
    exit_code,
    finish,
    in_float64,
    kill,
    log_rows,
    pretend_processes,
    result,
    result_line,
    run_in_one_and_two_processes,
    start,
    trained,
    wait_for_rows,
    write_kinds,
    write_problem,
)

SCRIPT = "copsl.py"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, low=0.0):
    return low + torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------
# Scalarisations
# ------------------------------------------------------------------------------------------------


def by_hand(f, p, kind, ideal, rho, gamma, mu, sign):
    """The scalarisation of one solution, from the formulas of the papers; lists of numbers."""
    f = [a - b for a, b in zip(f, ideal, strict=True)]
    pairs = list(zip(p, f, strict=True))
    weighted = sum(a * b for a, b in pairs)
    if kind == "ls":
        return weighted
    if kind == "tch":
        return max(a * b for a, b in pairs) + rho * sum(f)
    if kind == "mtch":
        return max(b / a for a, b in pairs) + rho * sum(f)
    if kind == "cosmos":
        return weighted + sign * gamma * weighted / math.hypot(*p) / math.hypot(*f)
    inverse = sum(1 / a for a in p)
    w = p if kind == "stch" else [1 / a / inverse for a in p]
    return mu * math.log(sum(math.exp(a * b / mu) for a, b in zip(w, f, strict=True)))


@pytest.mark.parametrize("kind", copsl.LOSSES)
@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scalarize_equals_the_formula_one_solution_at_a_time(kind, m, sign):
    values, p = draw(2, 3, 4, m, seed=1), draw(2, 1, 4, m, seed=2, low=.1)
    ideal, options = draw(m, seed=3) - 1, {"rho": .03, "gamma": 7.0, "mu": .2}
    found = copsl.scalarize(values, p, kind, ideal, **options, cosmos_sign=sign)
    assert found.shape == (2, 3, 4)
    for s in range(2):
        for k in range(3):
            for b in range(4):
                expected = by_hand(values[s, k, b].tolist(), p[s, 0, b].tolist(), kind,
                                   ideal.tolist(), .03, 7.0, .2, sign)
                assert found[s, k, b].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", copsl.LOSSES)
def test_scalarize_without_options_is_that_of_the_papers(kind):
    values, p = [.3, 1.4], [.8, .3]
    given = (torch.tensor(v, dtype=torch.float64) for v in (values, p))
    found = copsl.scalarize(*given, kind)
    assert found.item() == pytest.approx(by_hand(values, p, kind, [0, 0], .01, 100.0, .1, -1),
                                         rel=1e-12)


def test_smooth_maxima_become_the_maximum():
    values, p = draw(50, 3, seed=4), draw(50, 3, seed=5, low=.1)
    inverse = 1 / p / (1 / p).sum(-1, keepdim=True)
    for kind, w in (("stch", p), ("smtch", inverse)):
        exact = (w * values).amax(-1)
        gaps = [(copsl.scalarize(values, p, kind, mu=mu) - exact).abs().max().item()
                for mu in (1e-1, 1e-3, 1e-6)]
        assert gaps[0] > gaps[1] > gaps[2] and gaps[2] <= 1e-6 * math.log(3) + 1e-15
    # ... and smtch orders solutions as the maximum of mtch does, for each preference
    scaled = copsl.scalarize(values, p, "smtch", mu=1e-9) * (1 / p).sum(-1)
    torch.testing.assert_close(scaled, copsl.scalarize(values, p, "mtch", rho=0), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------
# Preferences, ranges, gradients
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 4])
def test_dirichlet_preferences_are_uniform_on_the_simplex(m):
    p = copsl.dirichlet_preferences(400, 100, m, seeded())
    assert p.shape == (400, 100, m) and (p >= 1e-4).all()
    torch.testing.assert_close(p.sum(-1), torch.full((400, 100), 1 + m * 1e-4), rtol=0, atol=1e-6)
    p = p.flatten(0, 1).double() - 1e-4
    covariance = p.T.cov()
    expected = (torch.eye(m) * m - 1).double() / (m * m * (m + 1))
    assert (p.mean(0) - 1 / m).abs().max() < .005
    assert (covariance - expected).abs().max() < .002
    for t in (.1, .3, .7):  # the whole distribution of one coordinate: P(p > t) = (1 - t)^(m - 1)
        assert ((p > t).double().mean(0) - (1 - t) ** (m - 1)).abs().max() < .01
    again = copsl.dirichlet_preferences(400, 100, m, seeded()).flatten(0, 1)
    assert torch.equal(again.double() - 1e-4, p)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_even_preferences_cover_the_simplex_and_its_corners(m):
    p = copsl.even_preferences(2000, 30, m, seeded())
    assert p.shape == (2000, 30, m) and (p >= 1e-4 - 1e-7).all()
    torch.testing.assert_close(p.sum(-1), torch.full((2000, 30), 1 + m * 1e-4), rtol=0, atol=1e-6)
    assert (p.mean((0, 1)) - 1 / m).abs().max() < .04
    assert ((p > 1 + 1e-4 - 1e-6).sum((0, 1)) >= 1).all()  # the corners
    assert ((p < 1.01e-4).double().mean((0, 1)) > .003).all()  # the edges
    assert len(torch.unique(p[:, 0, 0])) > 1000  # each step has a shift of its own
    assert torch.equal(copsl.even_preferences(2000, 30, m, seeded()), p)
    # without the stretch it is uniform: the same moments as the Dirichlet distribution
    p = copsl.even_preferences(1000, 30, m, seeded(), 0).flatten(0, 1).double()
    assert (p.mean(0) - 1 / m).abs().max() < .005
    expected = (torch.eye(m) * m - 1).double() / (m * m * (m + 1))
    assert (p.T.cov() - expected).abs().max() < .004


def test_even_preferences_of_two_objectives_lie_evenly():
    def discrepancy(p):  # largest distance between the ranks of t and uniform ones, mean of steps
        t = p[..., 0].sort(-1)[0]
        return (t - (torch.arange(30) + .5) / 30).abs().amax(-1).mean().item()

    even = copsl.even_preferences(200, 30, 2, seeded())
    random = copsl.dirichlet_preferences(200, 30, 2, seeded())
    assert discrepancy(even) < .07 < .1 < discrepancy(random)
    # the lattice: neighbours differ by the golden ratio, modulo 1
    p = copsl.even_preferences(5, 30, 2, seeded(), stretch=0).double() - 1e-4
    gap = p[..., 0].diff(dim=-1) % 1
    torch.testing.assert_close(gap, torch.full_like(gap, (math.sqrt(5) - 1) / 2), rtol=0, atol=1e-5)
    # 5% of the segment's length beyond each end are clipped to the end
    p = copsl.even_preferences(500, 30, 2, seeded())
    assert (p[..., 0] < 1.01e-4).double().mean().item() == pytest.approx(.05 / 1.1, abs=.005)


@pytest.mark.parametrize("m", [3, 4])
def test_even_preferences_are_more_even_than_random_ones(m):
    def spread(p):  # of the number of preferences with p_j > 1/m, from step to step
        return (p > 1 / m).double().mean(1).std(0)

    even = copsl.even_preferences(500, 30, m, seeded())
    random = copsl.dirichlet_preferences(500, 30, m, seeded())
    assert (spread(even) < .75 * spread(random)).all()


def test_update_range_keeps_the_minimum_and_averages_the_maximum():
    batches = [draw(2, 3, 5, 2, seed=s) for s in range(4)]
    ideal = nadir = None
    best = [[[math.inf] * 2 for _ in range(3)] for _ in range(2)]
    worst = {}
    for step, f in enumerate(batches):
        ideal, nadir = copsl.update_range(ideal, nadir, f.requires_grad_())
        assert ideal.shape == nadir.shape == (2, 3, 1, 2)
        assert not ideal.requires_grad and not nadir.requires_grad
        for s in range(2):
            for k in range(3):
                for j in range(2):
                    column = [f[s, k, b, j].item() for b in range(5)]
                    best[s][k][j] = min(best[s][k][j], *column)
                    old = worst.get((s, k, j), max(column))
                    worst[s, k, j] = .9 * old + .1 * max(column) if step else max(column)
                    assert ideal[s, k, 0, j].item() == best[s][k][j]
                    assert nadir[s, k, 0, j].item() == pytest.approx(worst[s, k, j], rel=1e-12)
    assert (nadir < torch.stack(batches).amax((0, 3))[:, :, None]).all()  # it forgets


def test_clip_gradients_looks_at_each_seed_alone():
    parameters = [nn.Parameter(torch.zeros(3, 1, 4, 5)), nn.Parameter(torch.zeros(3, 2, 1, 5))]
    for i, p in enumerate(parameters):
        p.grad = torch.randn(p.shape, generator=seeded(i))
        p.grad[0] *= 100
        p.grad[1] *= .01
    before = [p.grad.clone() for p in parameters]
    copsl.clip_gradients(parameters, 1.5)
    norms = [math.sqrt(sum(p.grad[s].square().sum().item() for p in parameters)) for s in range(3)]
    assert norms[0] == pytest.approx(1.5, rel=1e-5) and norms[2] == pytest.approx(1.5, rel=1e-5)
    for old, p in zip(before, parameters, strict=True):
        assert torch.equal(p.grad[1], old[1])
        direction = F.cosine_similarity(p.grad[0].flatten(), old[0].flatten(), 0)
        assert direction.item() == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------------------------------------
# GradNorm
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, .5, 1.75])
def test_gradnorm_gradient_equals_autograd_on_the_l1_loss(alpha):
    S, K = 3, 4
    weights = draw(S, K, seed=1, low=.5).requires_grad_()
    losses, first, norms = (draw(S, K, seed=s, low=.2) for s in (2, 3, 4))
    G = weights * norms
    rates = losses / first
    rates = rates / rates.mean(1, keepdim=True)
    target = (G.mean(1, keepdim=True) * rates ** alpha).detach()
    expected, = torch.autograd.grad((G - target).abs().sum(), weights)
    start_, seen = weights.detach().clone(), []
    plain = torch.optim.SGD([weights], .05)
    plain.register_step_pre_hook(lambda *_: seen.append(weights.grad.clone()))
    copsl.gradnorm_weights(weights, losses, first, norms, plain, alpha)
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=0)
    moved = (start_ - .05 * expected).clamp(min=1e-3)
    torch.testing.assert_close(weights.detach(), K * moved / moved.sum(1, keepdim=True),
                               rtol=1e-12, atol=0)
    assert weights.requires_grad and (expected < 0).any() and (expected > 0).any()


def test_gradnorm_weights_stay_positive_and_sum_to_k():
    weights = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    steep = torch.optim.SGD([weights], 10.0)
    for step in range(5):
        copsl.gradnorm_weights(weights, *(draw(2, 3, seed=3 * step + i, low=.2) for i in range(3)),
                               steep)
        assert (weights > 0).all()
        torch.testing.assert_close(weights.detach().sum(1), torch.full((2,), 3.0).double())


def test_gradnorm_slows_the_problem_that_is_ahead():
    weights = torch.ones(1, 2, requires_grad=True)
    one = torch.ones(1, 2)
    for _ in range(5):
        copsl.gradnorm_weights(weights, torch.tensor([[.1, 1.0]]), one, one,
                               torch.optim.SGD([weights], .1))
    assert weights[0, 0] < .7 < 1.3 < weights[0, 1]


@pytest.mark.parametrize("n_vars", [[3, 1, 5], [4]])
def test_shared_gradient_norms_equal_separate_backward_passes(n_vars):
    generators = [seeded(s) for s in range(2)]
    net = copsl.CoPSL(3, n_vars, 11, generators).double()
    p = draw(2, 7, 3, seed=1, low=.1)
    scale = draw(2, len(n_vars), seed=2, low=.3)
    h = net.read(p)
    losses = torch.stack([(x - .3).square().sum((1, 2)) for x in net.solve(h)], 1) * scale
    found = net.shared_gradient_norms(p, h, losses)
    for s in range(2):
        for k in range(len(n_vars)):
            grad, = torch.autograd.grad(losses[s, k], net.weights[0], retain_graph=True)
            expected = grad[s].norm().item()
            assert expected > 1e-3
            assert found[s, k].item() == pytest.approx(expected, rel=1e-10)
    losses.sum().backward()  # the graph is kept for the caller
    copy.deepcopy(net)  # nothing of a forward pass stays in the module


def test_an_unknown_scalarisation_is_refused():
    with pytest.raises(ValueError, match="expected ls, tch"):
        copsl.scalarize(torch.ones(2), torch.ones(2), "mtche")


# ------------------------------------------------------------------------------------------------
# Networks and training against a plain arrangement
# ------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """One seed: a list of nn.Linear per problem; CoPSL's problems have the first one in common."""

    def __init__(self, stacked, s):
        super().__init__()
        K, shared = len(stacked.n_vars), stacked.shared

        def layer(level, k, fan_out):
            w, b = stacked.weights[level][s, k], stacked.biases[level][s, k]
            made = nn.Linear(len(w), fan_out).to(w.dtype)
            made.weight.data, made.bias.data = (w[:, :fan_out].T.detach().clone(),
                                                b[0, :fan_out].detach().clone())
            return made

        w = stacked.width
        self.first = nn.ModuleList(layer(0, k, w) for k in range(1 if shared else K))
        self.second = nn.ModuleList(layer(1, k, w) for k in range(K))
        self.third = nn.ModuleList(layer(2, k, n) for k, n in enumerate(stacked.n_vars))

    def forward(self, p):
        found = []
        for k in range(len(self.second)):
            h = torch.relu(self.first[k if len(self.first) > 1 else 0](p))
            found.append(torch.sigmoid(self.third[k](torch.relu(self.second[k](h)))))
        return found


def world(*words, problems=("f1", "zdt2", "re21"), seeds=(5, 6), dtype=torch.float64):
    args = copsl.resolve(copsl.build_parser().parse_args(
        ["--problems", *problems, "--width", "12", "--steps", "20", "--batch", "6",
         "--eval-points", "8", "--eval-every", "20", *map(str, words)]))
    found = [data.get_problem(n) for n in args.problems]
    return copsl.World(found, list(seeds), args, torch.device("cpu"), dtype)


def train(w, method):
    return copsl.train(w, QuietRun(), method, None, lambda state: None)[0]


def plain_training(w, method, s):
    """Train seed s of a method the plain way: a loop over problems, gradients by autograd."""
    net, K, tuned = Plain(w.network(method)[0], s), len(w.problems), w.args.recipe == "tuned"
    lr = 5e-3 if tuned else 1e-3
    optimizer = torch.optim.Adam(net.parameters(), lr, (.9, .95) if tuned else (.9, .999))
    weights = torch.ones(K, dtype=torch.float64, requires_grad=True)
    weigher = torch.optim.Adam([weights], lr, (.9, .95) if tuned else (.9, .999))
    ideal, nadir, first = [None] * K, [None] * K, None
    drawn = w.preferences()
    for step in range(20):
        if tuned:
            optimizer.param_groups[0]["lr"] = lr * .5 * (1 + math.cos(math.pi * step / 20))
        p, losses, logits = drawn[step, s], [], []
        for k, (x, problem) in enumerate(zip(net(p), w.problems, strict=True)):
            f = problem(problem.lower + x * (problem.upper - problem.lower))
            if tuned:
                low, high = f.detach().min(0)[0], f.detach().max(0)[0]
                ideal[k] = low if step == 0 else torch.minimum(ideal[k], low)
                nadir[k] = high if step == 0 else .9 * nadir[k] + .1 * high
                f = (f - ideal[k]) / (nadir[k] - ideal[k])
            if tuned:
                v = 1 / p / (1 / p).sum(1, keepdim=True)
                g = .1 * torch.log((v[:, 0] * f[:, 0] / .1).exp() + (v[:, 1] * f[:, 1] / .1).exp())
            else:
                g = torch.maximum(f[:, 0] / p[:, 0], f[:, 1] / p[:, 1]) \
                    + .01 * (f[:, 0] + f[:, 1])
            losses.append(g.mean() if tuned else g.sum())
            logits.append(torch.log(x / (1 - x)).square().mean())
        total = sum(losses)
        now = torch.stack([v.detach() for v in losses])
        if method == "copsl-gradnorm":
            norms = torch.stack([torch.autograd.grad(v, net.first[0].weight, retain_graph=True)[0]
                                 .norm() for v in losses])
            total = sum(a * v for a, v in zip(weights.detach(), losses, strict=True))
        optimizer.zero_grad()
        (total + 2e-4 * sum(logits) if tuned else total).backward()
        if tuned:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if method == "copsl-gradnorm":
            first = now if first is None else first
            G, rates = weights * norms, now / first
            target = (G.mean() * (rates / rates.mean()) ** 1.75).detach()
            weights.grad, = torch.autograd.grad((G - target).abs().sum(), weights)
            weigher.step()
            weights.data *= K / weights.data.sum()
    return net


@pytest.mark.parametrize("recipe", ["paper", "tuned"])
@pytest.mark.parametrize("method", list(copsl.METHODS))
def test_forward_and_training_equal_a_loop_over_linear_layers(method, recipe):
    w = world("--recipe", recipe)
    assert len({p.n_var for p in w.problems}) == 3
    fresh, _ = w.network(method)
    p = draw(2, 9, 2, seed=1)
    for s in range(2):
        for x, expected in zip(fresh(p), Plain(fresh, s)(p[s]), strict=True):
            torch.testing.assert_close(x[s], expected, rtol=0, atol=1e-12)
    net = train(w, method)
    moved = max((a - b).abs().max().item() for a, b in
                zip(net.parameters(), fresh.parameters(), strict=True))
    assert moved > .01
    for s in range(2):
        expected = plain_training(w, method, s).state_dict()
        found = Plain(net, s).state_dict()
        # Rounding of gradients is 1e-16, and Adam divides by 1e-8 at least: 20 · 5e-3 · 1e-8
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
    for k, n in enumerate(net.n_vars):  # padding never changes
        for after, before in ((net.weights[2], fresh.weights[2]), (net.biases[2], fresh.biases[2])):
            assert torch.equal(after[:, k, :, n:], before[:, k, :, n:])
            assert not torch.equal(after[:, k, :, :n], before[:, k, :, :n])


@pytest.mark.parametrize("recipe", ["paper", "tuned"])
@pytest.mark.parametrize("method", list(copsl.METHODS))
def test_seeds_at_once_equal_seeds_one_by_one(method, recipe):
    together = train(world("--recipe", recipe, seeds=(5, 6, 9)), method)
    for s, seed in enumerate((5, 6, 9)):
        alone = train(world("--recipe", recipe, seeds=(seed,)), method)
        # At most 20 · 5e-3 · 1e-16 / 1e-8, as above, and only where a gradient is 0: 4e-15 in fact
        for a, b in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a[s], b[0], rtol=0, atol=1e-10)


def test_number_of_parameters():
    problems = [data.get_problem(f"f{i}") for i in range(1, 7)]
    n_vars = [p.n_var for p in problems]
    assert copsl.CoPSL(2, n_vars).num_parameters() == 404_772
    assert copsl.PSL(2, n_vars).num_parameters() == 408_612
    for kind in (copsl.CoPSL, copsl.PSL):
        net = kind(3, [2, 7, 4], 9, [seeded(s) for s in range(2)])
        assert net.num_parameters() == sum(p.numel() for p in Plain(net, 1).parameters())


def test_initial_draw_is_that_of_linear_layers():
    net = copsl.CoPSL(4, [3, 8], 50, [seeded(s) for s in range(3)])
    for level, fan_in in enumerate((4, 50, 50)):
        for group in (net.weights[level], net.biases[level]):
            assert .9 / math.sqrt(fan_in) < group.abs().max() <= 1 / math.sqrt(fan_in)
            assert not torch.equal(group[0], group[1])
        w = net.weights[level]
        assert w.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=.1)


def test_evaluate_normalises_both_ways():
    """RE34: the authors' code neither subtracts the ideal point nor divides by its nadir."""
    w = world(problems=("re34", "re37"))
    net, _ = w.network("copsl")
    net.biases[2].data.uniform_(-3, 3, generator=seeded())
    found = copsl.evaluate(w, net)
    assert list(found) == [5, 6]
    x = net(w.test.expand(2, -1, -1))
    for s, seed in enumerate((5, 6)):
        for k, q in enumerate(w.problems):
            f = q(q.scale(x[k][s].detach()))
            one = common.hypervolume((f - q.ideal) / (q.nadir - q.ideal), [1.1] * 3)
            other = common.hypervolume(f / q.hv_nadir, [1.1] * 3)
            assert found[seed]["hv"][k] == pytest.approx(one, abs=1e-9)
            assert found[seed]["hv_official"][k] == pytest.approx(other, abs=1e-9)
            assert max(one, other) > 0 and one != pytest.approx(other, abs=1e-3)


def test_test_preferences():
    p = copsl.test_preferences(2, None, True)
    assert p.shape == (100, 2)
    torch.testing.assert_close(p.norm(dim=1), torch.ones(100).double())
    t = torch.linspace(0, 1, 100, dtype=torch.float64)
    torch.testing.assert_close(p[:, 0] / p.sum(1), t, rtol=0, atol=1e-12)
    p = copsl.test_preferences(2, 7, False)
    expected = torch.tensor([[i / 6, 1 - i / 6] for i in range(7)], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)
    p = copsl.test_preferences(3, None, True)
    assert p.shape == (105, 3)
    torch.testing.assert_close(p.sum(1), torch.ones(105).double())
    assert len(copsl.test_preferences(4, None, True)) <= 210


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def arguments(*more):
    """A run of a second: two problems, two seeds, 40 steps."""
    return ["--problems", "f1", "f2", "--seeds", "2", "--steps", "40", "--batch", "8", "--width",
            "16", "--eval-every", "10", "--save-every", "10", *map(str, more)]


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """run_here("name", words...) runs the command inside this process, without its figure."""
    monkeypatch.setattr(copsl, "draw_figure", lambda *_: None)

    def run(name, *words):
        copsl.main(arguments(*words, "--out-dir", tmp_path / name))
        return tmp_path / name
    return run


LONG = ["--steps", 200, "--method", "copsl-gradnorm,psl", "--recipe", "tuned"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of two methods, 20 rows each, which others are compared with."""
    folder = tmp_path_factory.mktemp("copsl") / "out"
    out, err = finish(start(SCRIPT, arguments(*LONG, "--out-dir", folder)))
    return folder, out, err


def test_run_leaves_its_files_and_a_result_line(reference):
    folder, out, err = reference
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "result.json", "figure.png", "copsl.py",
        *(f"solutions-{m}-{n}.csv" for m in ("copsl-gradnorm", "psl") for n in ("f1", "f2"))}
    assert (folder / "copsl.py").read_text() == (ROOT / "copsl.py").read_text()
    assert Image.open(folder / "figure.png").size[0] > 1000
    assert err == "problems: f1 f2 (built in)\n"
    found, line = result(folder), result_line(out)
    assert list(found["results"]) == ["copsl-gradnorm", "psl"] and line["method"] == "psl"
    hv = found["results"]["psl"]["hv"]
    assert [len(hv[n]) for n in ("f1", "f2")] == [2, 2]
    assert float(line["hv_f1"]) == pytest.approx(sum(hv["f1"]) / 2, abs=6e-5)
    assert float(line["hv"]) == pytest.approx(sum(hv["f1"] + hv["f2"]) / 4, abs=6e-5)
    for method, r in found["results"].items():
        assert list(r["curve"]) == [str(s) for s in range(0, 201, 10)]
        for n in ("f1", "f2"):
            assert max(r["initial_hv"][n]) < min(r["hv"][n]) < max(r["hv"][n]) < .88
        assert r["curve"]["200"] == pytest.approx([(r["hv"]["f1"][s] + r["hv"]["f2"][s]) / 2
                                                   for s in range(2)])
        shown = sum(r["hv"]["f1"]) / 2
        row = next(t for t in out.splitlines() if t.startswith(copsl.METHODS[method]))
        assert f"{shown:.4f} ±" in row
    assert found["ranges"] == {n: {"ideal": [0, 0], "nadir": [1, 1], "estimated": []}
                               for n in ("f1", "f2")}
    assert found["reference_hv"] == pytest.approx([.8762] * 2, abs=1e-3)
    rows = log_rows(folder)
    assert [(r["method"], r["step"]) for r in rows] == \
        [(m, s) for m in ("copsl-gradnorm", "psl") for s in range(10, 201, 10)]
    assert json.loads((folder / "config.json").read_text())["settings"]["steps"] == 200


def test_solutions_hold_the_first_seed_and_evaluate_to_their_objectives(reference):
    found = result(reference[0])["results"]
    for method in found:
        for name in ("f1", "f2"):
            problem = data.get_problem(name)
            with open(reference[0] / f"solutions-{method}-{name}.csv", newline="") as handle:
                header, *rows = csv.reader(handle)
            n = problem.n_var
            assert header == ["p1", "p2", *(f"x{i}" for i in range(1, n + 1)), "f1", "f2"]
            table = torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64)
            assert len(table) == 100
            p, x, f = table.split([2, n, 2], 1)
            torch.testing.assert_close(p, copsl.test_preferences(2, None, False), rtol=0, atol=1e-7)
            assert ((x >= problem.lower) & (x <= problem.upper)).all()
            torch.testing.assert_close(problem(x), f, rtol=1e-4, atol=1e-5)
            hv = common.hypervolume((f - problem.ideal) / (problem.nadir - problem.ideal),
                                    [1.1, 1.1])
            assert hv == pytest.approx(found[method]["hv"][name][0], abs=1e-5)


def test_solutions_are_in_the_bounds_of_the_problem(run_here):
    folder = run_here("a", "--problems", "zdt4", "vlmop2", "--method", "copsl", "--steps", 1)
    for name in ("zdt4", "vlmop2"):
        problem = data.get_problem(name)
        with open(folder / f"solutions-copsl-{name}.csv", newline="") as handle:
            rows = [[float(v) for v in row] for row in list(csv.reader(handle))[1:]]
        table = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(problem(table[:, 2:-2]), table[:, -2:], rtol=1e-4, atol=1e-4)


def test_same_command_gives_the_same_numbers_and_another_seed_others(run_here):
    for name, seed in (("a", 0), ("b", 0), ("c", 7)):
        run_here(name, "--method", "all", "--seed", seed)
    a, b, c = (run_here("a", "--method", "all", "--seed", 0, "--resume").parent / n for n in "abc")
    assert_same_run(a, b)
    assert result(a)["results"] != result(c)["results"]
    assert (a / "solutions-psl-f2.csv").read_bytes() == (b / "solutions-psl-f2.csv").read_bytes()
    assert [list(t) for t in (result(a)["results"], result(c)["results"])] == \
        [list(copsl.METHODS)] * 2


def test_killed_and_resumed_ends_with_the_same_numbers(reference, tmp_path):
    folder = tmp_path / "out"
    words = arguments(*LONG, "--out-dir", folder)
    kill(SCRIPT, words, folder, 25)  # in the second method
    copsl.main([*words, "--resume"])
    assert_same_run(folder, reference[0])


@pytest.mark.parametrize("words", [["--recipe", "paper"], ["--recipe", "tuned"],
                                   ["--recipe", "paper", "--loss", "cosmos"]])
def test_run_that_dies_between_log_and_save_loses_nothing(run_here, monkeypatch, words):
    words = ["--method", "all", "--save-every", 15, "--eval-every", 4, *words]
    whole = run_here("whole", *words)
    for rows in (1, 6, 13, 9):  # before the first save; in each of the three methods
        with monkeypatch.context() as patch:
            cut_power(patch, rows)
            with pytest.raises(PowerCut):
                run_here("cut", *words, *([] if rows == 1 else ["--resume"]))
    assert_same_run(run_here("cut", *words, "--resume"), whole)


def test_ctrl_c_says_how_to_go_on(tmp_path):
    folder = tmp_path / "out"
    process = start(SCRIPT, arguments("--steps", 20000, "--out-dir", folder))
    wait_for_rows(folder, 3, process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    said, *lines = [line for line in err.splitlines() if line]
    assert said.startswith("problems: ")
    assert len(lines) == 1 and "--resume" in lines[0] and str(folder) in lines[0]
    assert "psl, step" in lines[0]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["script"] == "copsl"


def test_resume_after_the_end_prints_the_tables_again(reference, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(reference[0], folder)
    copsl.main(arguments(*LONG, "--out-dir", folder, "--resume"))
    out = capsys.readouterr().out
    assert out.splitlines()[:-1] == reference[1].splitlines()[:-1] and len(out.splitlines()) > 10
    assert result_line(out) | {"out": ""} == result_line(reference[1]) | {"out": ""}
    assert_same_run(folder, reference[0])


DOUBLE = "script.World = functools.partial(script.World, dtype=torch.float64)"


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Seeds do not see each other, but products of another number of seeds round otherwise.

    Adam divides a gradient by its own size, or by 1e-8 where it is smaller, so that its rounding u
    becomes lr · u / 1e-8 a step at most: in float32 (u near 1e-8) whole steps, in float64 (u below
    1e-15) 40 · 5e-3 · 1e-7 = 2e-8. Scores, to which hundreds of weights add up: 2e-6.
    """
    words = arguments("--seeds", 3, "--method", "copsl-gradnorm,psl", "--recipe", "tuned")
    one, two = run_in_one_and_two_processes(in_float64(tmp_path, "copsl", DOUBLE), words, tmp_path)
    for method, r in result(two)["results"].items():
        expected = result(one)["results"][method]
        for key in ("hv", "hv_official", "initial_hv"):
            for name in ("f1", "f2"):
                assert r[key][name] == pytest.approx(expected[key][name], abs=2e-6)
    a, b = trained(two), trained(one)
    assert a.keys() == b.keys() and len(a) == 2 * 3 * 6
    for name in a:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-8)


def test_more_processes_than_seeds_are_refused(tmp_path, monkeypatch, capsys):
    pretend_processes(monkeypatch, 3)
    assert exit_code(copsl.main, arguments("--out-dir", tmp_path / "out")) == 2
    assert capsys.readouterr().err == "error: 3 processes, but only --seeds 2 to share\n"


def weights_of(folder, method="copsl"):
    return [t for name, t in sorted(trained(folder).items()) if name.startswith(f"/{method}/")]


@pytest.mark.parametrize("flags, method", [
    *((["--loss", kind], "copsl") for kind in copsl.LOSSES if kind != "mtch"),
    (["--loss", "stch", "--mu", "1"], "copsl"), (["--loss", "smtch", "--mu", "1"], "copsl"),
    (["--loss", "cosmos", "--gamma", "2"], "copsl"),
    (["--loss", "cosmos", "--recipe", "official"], "copsl"), (["--recipe", "tuned"], "copsl"),
    (["--recipe", "tuned", "--loss", "mtch"], "copsl"), (["--recipe", "tuned", "--lr", "1e-3"],
                                                         "copsl"),
    (["--lr", "3e-3"], "copsl"), (["--batch", "9"], "copsl"), (["--seed", "3"], "copsl"),
    (["--alpha", "0.1"], "copsl-gradnorm")], ids=lambda v: " ".join(v) if isinstance(v, list) else
                         v)
def test_options_change_what_is_trained(run_here, flags, method):
    a = run_here("a", "--method", method, "--lr", "1e-2", *flags)
    b = run_here("b", "--method", method, "--lr", "1e-2", *flags[:-2])
    first, second = weights_of(a, method), weights_of(b, method)
    assert len(first) == 2 * 6
    assert any(not torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert result(a)["results"] != result(b)["results"]
    assert all(0 <= v < .88 for t in result(a)["results"][method]["hv"].values() for v in t)


def test_official_recipe_differs_from_the_paper_in_cosmos_only(run_here):
    """DEVIATION 1."""
    a, b = (run_here(recipe, "--recipe", recipe, "--method", "all")
            for recipe in ("paper", "official"))
    assert result(a)["results"] == result(b)["results"]
    assert result(a)["recipe"] == "paper" and result(b)["recipe"] == "official"


def test_gradnorm_and_psl_are_methods_of_their_own(run_here, capsys):
    folder = run_here("a", "--method", "all", "--lr", "1e-2")
    out = capsys.readouterr().out
    assert all(label in out for label in copsl.METHODS.values())
    curves = [json.dumps(r["curve"]["40"]) for r in result(folder)["results"].values()]
    assert len(set(curves)) == 3
    assert result_line(out)["method"] == "copsl"
    parameters = [row.split()[-2] for row in out.splitlines()[-6:-2] if row[:1] in "CP"]
    count = [copsl.CoPSL(2, [6, 6], 16), copsl.PSL(2, [6, 6], 16)]
    assert parameters == [str(count[i].num_parameters()) for i in (0, 0, 1)]


def test_tuned_recipe_beats_the_paper_recipe_on_f1_and_f2(run_here):
    words = ["--method", "copsl", "--width", 64, "--steps", 200, "--batch", 16]
    paper, tuned = (result(run_here(r, *words, "--recipe", r))["results"]["copsl"]["hv"]
                    for r in ("paper", "tuned"))
    for name in ("f1", "f2"):
        assert min(tuned[name]) > max(paper[name]) > .3


def test_three_objectives_and_groups(tmp_path, capsys):
    folder = tmp_path / "out"
    copsl.main(arguments("--problems", "DTLZ2-3,dtlz1-3", "--method", "copsl", "--steps", 3,
                         "--out-dir", folder))
    assert result(folder)["problems"] == ["dtlz2-3", "dtlz1-3"]
    assert Image.open(folder / "figure.png").size[0] > 1000
    assert (folder / "solutions-copsl-dtlz2-3.csv").read_text().count("\n") == 106
    assert "hv_dtlz2-3" in result_line(capsys.readouterr().out)
    named = copsl.resolve(copsl.build_parser().parse_args(["--problems", "RE", "re37", "re36"]))
    assert [p.name for p in copsl.load_problems(named)] == \
        ["re31", "re32", "re33", "re34", "re37", "re36"]
    assert copsl.resolve(copsl.build_parser().parse_args([])).problems == \
        [f"f{i}" for i in range(1, 7)]


def test_own_problem(run_here, tmp_path):
    spec = write_problem(tmp_path / "mine.py")
    folder = run_here("a", "--problems", spec, "f1", "--method", "copsl", "--steps", 150,
                      "--recipe", "tuned")
    hv = result(folder)["results"]["copsl"]["hv"]
    assert list(hv) == ["Bend", "f1"] and all(.4 < v < .88 for v in hv["Bend"])
    assert (folder / "solutions-copsl-Bend.csv").read_text().startswith("p1,p2,x1,x2,x3,f1,f2\n")


def test_figure_has_the_fronts_that_were_measured(tmp_path, monkeypatch, capsys):
    path, folder = write_kinds(tmp_path / "mine.py"), tmp_path / "a"
    given, hv = drawn_fronts(monkeypatch, copsl.main, arguments(
        "--problems", f"f1,{path}:Open", "--method", "copsl,psl,copsl-gradnorm", "--recipe",
        "tuned", "--out-dir", folder))
    _, preferences, fronts, references, drawn, _ = given
    found = {m: r["hv"] for m, r in result(folder)["results"].items()}
    assert list(fronts) == ["psl", "copsl-gradnorm", "copsl"] and drawn == found
    for m in fronts:
        for name, numbers in found[m].items():
            assert hv[m][name] == pytest.approx(numbers, abs=1e-6)
    assert [len(r) > 5000 for r in references] == [True, False]  # a formula costs nothing
    with open(folder / "solutions-psl-Open.csv", newline="") as handle:
        rows = torch.tensor([[float(v) for v in row] for row in list(csv.reader(handle))[1:]])
    torch.testing.assert_close(rows[:, :2], preferences[1])
    torch.testing.assert_close(rows[:, -2:], fronts["psl"][1][0].float())
    assert "could not be drawn" not in capsys.readouterr().err


def own_run(run_here, name, *words, steps=150):
    return run_here(name, "--method", "copsl", "--recipe", "tuned", "--steps", steps, "--width", 64,
                    *words)


def test_range_that_is_not_given_is_estimated_after_training(run_here, tmp_path, capsys):
    path = write_kinds(tmp_path / "mine.py")
    folder = own_run(run_here, "a", "--problems", f"{path}:Known,{path}:Open")
    out, err = capsys.readouterr()
    found = result(folder)
    r, ranges = found["results"]["copsl"], found["ranges"]
    assert ranges["Known"] == {"ideal": [0, 0], "nadir": [1, 1], "estimated": []}
    assert ranges["Open"]["estimated"] == ["ideal", "nadir"]
    assert ranges["Open"]["ideal"] == pytest.approx([0, 0], abs=.05)
    assert ranges["Open"]["nadir"] == pytest.approx([1, 1], abs=.1)
    for known, late in zip(r["hv"]["Known"], r["hv"]["Open"], strict=True):
        assert late == pytest.approx(known, abs=.05) and known > .8
    with open(folder / "solutions-copsl-Open.csv", newline="") as handle:
        rows = [[float(v) for v in row] for row in list(csv.reader(handle))[1:]]
    f = torch.tensor(rows, dtype=torch.float64)[:, -2:]
    low, high = (torch.tensor(ranges["Open"][k], dtype=torch.float64) for k in ("ideal", "nadir"))
    hv = common.hypervolume((f - low) / (high - low), [1.1, 1.1])
    assert hv == pytest.approx(r["hv"]["Open"][0], abs=1e-12)
    assert found["reference_hv"][1] >= max(r["hv"]["Open"]) - 1e-12
    assert all(0 <= v < 1.21 for row in r["curve"].values() for v in row)
    assert all("hv" not in row for row in log_rows(folder))
    header = next(t for t in out.splitlines() if t.startswith("HV of (f - ideal)"))
    assert header.split()[-3:] == ["Known", "Open", "*"]
    assert "* Open: ideal and nadir estimated from what this run found, " in out
    assert result_line(out)["estimated"] == "Open"
    lines = err.splitlines()
    assert [t.split(":")[0] for t in lines] == ["problem Known", "problem Open"]
    assert "to be estimated" in lines[1] and "to be estimated" not in lines[0]
    assert found["sources"]["problem Open"] == lines[1].split(": ", 1)[1]


@pytest.mark.parametrize("kind", ["Far", "Below"])
def test_offsets_and_scales_do_not_change_training(run_here, tmp_path, kind):
    path = write_kinds(tmp_path / "mine.py")
    plain, other = (own_run(run_here, k, "--problems", f"{path}:{k}") for k in ("Open", kind))
    a, b = trained(plain), trained(other)
    for name in a:
        # Values are 2e7 + ... or -3 + 1e-9 · ... in float64: 1e-7 of a range. Adam on top: 2e-6
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5)
    plain, other = result(plain), result(other)
    for u, v in zip(plain["results"]["copsl"]["hv"]["Open"],
                    other["results"]["copsl"]["hv"][kind], strict=True):
        assert u == pytest.approx(v, abs=1e-4) and u > .8
    shift, scale = {"Far": ([2e7, -3], [1e9, 1e-9]), "Below": ([-2, -2], [1, 1])}[kind]
    for key in ("ideal", "nadir"):
        back = [(v - a) / t for v, a, t in zip(other["ranges"][kind][key], shift, scale,
                                               strict=True)]
        assert back == pytest.approx(plain["ranges"]["Open"][key], abs=1e-4)


def test_negative_objectives_have_no_second_table(tmp_path, capsys):
    path, folder = write_kinds(tmp_path / "mine.py"), tmp_path / "a"
    copsl.main(arguments("--problems", "f1", f"{path}:Below", "--method", "copsl", "--steps", 20,
                         "--recipe", "tuned", "--out-dir", folder))
    out = capsys.readouterr().out
    found = result(folder)["results"]["copsl"]
    assert list(found["hv"]) == ["f1", "Below"] and list(found["hv_official"]) == ["f1"]
    assert "no f / nadir of Below: a nadir there is not above 0" in out
    assert Image.open(folder / "figure.png").size[0] > 1000
    copsl.main(arguments("--problems", f"{path}:Below", "--method", "copsl", "--steps", 2,
                         "--out-dir", folder, "--overwrite"))
    out, err = capsys.readouterr()
    assert "hv_official" not in result(folder)["results"]["copsl"] and "HV of f / nadir" not in out
    assert "note: problem Below: objectives of " in err and "--recipe tuned normalises" in err
    assert "Infinity" not in (folder / "result.json").read_text()


def test_an_own_function_is_called_no_more_than_twice_as_often_as_in_training(
        run_here, tmp_path, monkeypatch):
    path = write_kinds(tmp_path / "mine.py")
    words = ["a", "--problems", f"{path}:Open", "--eval-every", 20]
    folder = own_run(run_here, *words, steps=100)
    training = 2 * (100 * 8 + 6 * 100)  # seeds, steps, batch; tests
    seen = calls(path)
    assert 1.9 * training < seen <= 2 * training
    own_run(run_here, *words, "--resume", steps=100)
    assert calls(path) - seen == 32 + 16  # is it the same function still?
    again = result(folder)
    more = own_run(run_here, "b", *words[1:], "--reference", 5, steps=100)
    assert calls(path) - seen == 2 * 48 + training + 5 * 1001
    assert {**again, "sources": 0, "reference_hv": 0}.keys() == result(more).keys()
    none = own_run(run_here, "c", *words[1:], "--reference", 0, steps=100)
    assert result(none)["reference_hv"][0] >= max(result(none)["results"]["copsl"]["hv"]["Open"])
    Path = type(tmp_path)
    Path(path).write_text(Path(path).read_text().replace("- 0.5", "- 0.4"))
    with pytest.raises(common.UserError, match="the problem Open of this run were others"):
        own_run(run_here, *words, "--resume", steps=100)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("two\nlines")])
def test_search_that_ends_early_loses_nothing(run_here, tmp_path, monkeypatch, capsys, stop):
    path, search = write_kinds(tmp_path / "mine.py"), data.reference_front
    whole = result(own_run(run_here, "whole", "--problems", f"{path}:Open", steps=20))

    def stopped(*_):
        raise stop
    monkeypatch.setattr(data, "reference_front", stopped)
    if stop is KeyboardInterrupt:
        with pytest.raises(SystemExit) as end:
            own_run(run_here, "a", "--problems", f"{path}:Open", steps=20)
        assert end.value.code == 130 and not (tmp_path / "a" / "result.json").exists()
        monkeypatch.setattr(data, "reference_front", search)
        monkeypatch.setattr(copsl, "train_step", stopped)
        own_run(run_here, "a", "--problems", f"{path}:Open", "--resume", steps=20)
        assert result(tmp_path / "a") == whole
    else:
        own_run(run_here, "a", "--problems", f"{path}:Open", steps=20)
        assert "ended early (RuntimeError: two lines)" in capsys.readouterr().err
        assert torch.load(tmp_path / "a" / "checkpoint.pt")["state"].get("reference", {}) == {}
        found = result(tmp_path / "a")
        assert found["reference_hv"][0] >= max(found["results"]["copsl"]["hv"]["Open"])


def test_objectives_that_agree_are_told(run_here, tmp_path, capsys):
    path = write_kinds(tmp_path / "mine.py")
    found = result(own_run(run_here, "a", "--problems", f"{path}:Agree", steps=20))
    assert "do not conflict" in capsys.readouterr().err
    assert all(0 < v <= 1.21 for v in found["results"]["copsl"]["hv"]["Agree"])
    low, high = found["ranges"]["Agree"]["ideal"], found["ranges"]["Agree"]["nadir"]
    assert low[1] == pytest.approx(2 * low[0] + 1) and all(a < b for a, b in
                                                           zip(low, high, strict=True))


@pytest.mark.parametrize("m", [3, 6, 7, 10])
def test_any_number_of_objectives_ends_with_a_figure(tmp_path, capsys, m):
    path = write_kinds(tmp_path / "mine.py")
    copsl.main(arguments("--problems", f"{path}:ball{m}", "--recipe", "tuned", "--method", "copsl",
                         "--steps", 4, "--eval-every", 4, "--eval-points", 60,
                         "--out-dir", tmp_path / "a"))
    hv = result(tmp_path / "a")["results"]["copsl"]["hv"][f"ball{m}"]
    assert len(hv) == 2 and all(0 <= v <= 1.1 ** m for v in hv)
    assert Image.open(tmp_path / "a" / "figure.png").size[0] > 400
    err = capsys.readouterr().err
    count = len(data.das_dennis(m, 60))
    assert (f"--eval-points 60: {count} of {m} objectives are spread evenly" in err) == (count < 60)
    assert ("65,536 directions" in err) == (m > 6)


def test_names_that_are_given_twice_or_alike(run_here, tmp_path, capsys):
    for folder in ("v1", "v2"):
        (tmp_path / folder).mkdir()
        write_kinds(tmp_path / folder / "mine.py")
    words = [f"{tmp_path / v / 'mine.py'}:Open" for v in ("v1", "v2", "v1")]
    folder = own_run(run_here, "a", "--problems", ",".join(words), "F1", "f1", steps=2)
    out, err = capsys.readouterr()
    found = result(folder)
    assert found["problems"] == [words[0], words[1], "f1"]
    assert err.splitlines()[-1] == f"note: --problems names {words[0]}, f1 more than once; it is " \
                                   "used once"
    assert len(list(folder.glob("solutions-copsl-*v?-mine-py-Open.csv"))) == 2
    assert {k for k in result_line(out) if k.endswith(("-Open", "f1"))} == \
        {*(f"hv_{w.replace('/', '-').replace('.', '-').replace(':', '-')}" for w in words), "hv_f1"}


BAD = [
    (["--problems", "f1", "zdt9"], "FILE.py:NAME"),
    (["--problems", "f1", "re33"], "coaction.py takes any mix"),
    (["--problems", "f1", "re33", "re42"], "re42 has 4"),
    (["--problems", "nowhere.py:Truss"], "no file nowhere.py"),
    (["--problems", "mine.py:Truss"], "Truss"),
    (["--method", "fedavg"], "copsl-gradnorm"),
    (["--method", "copsl,,psl"], "unknown"),
    (["--device", "toaster"], "toaster"),
    (["--resume"], "no run"),
    (["--out-dir", "mine.py"], "is a file"),
    (["--lr", "1e30"], "not finite"),
    (["--lr", "1e30", "--steps", "1"], "not finite"),
    (["--lr", "1e30", "--recipe", "tuned"], "not finite"),
]
BAD_FLAGS = [["--steps", "0"], ["--batch", "0"], ["--seeds", "0"], ["--lr", "nan"], ["--lr", "0"],
             ["--mu", "0"], ["--gamma", "-1"], ["--alpha", "-1"], ["--eval-points", "1"],
             ["--width", "0"], ["--eval-every", "0"], ["--save-every", "0"], ["--seed", "x"],
             ["--recipe", "best"], ["--loss", "mse"], ["--nonsense"]]


@pytest.mark.parametrize("flags, words", BAD, ids=lambda v: " ".join(v)
                         if isinstance(v, list) else v)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    write_problem("mine.py")
    out = [] if flags[0] in ("--resume", "--out-dir") else ["--out-dir", "out"]
    code = exit_code(copsl.main, arguments(*flags, *out))
    assert code == (3 if "finite" in words else 2)
    *said, err = capsys.readouterr().err.strip().splitlines()
    assert words in err and err.startswith("error: ")
    assert len(said) == (1 if "finite" in words else 0)  # a line about the problems
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flag_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        copsl.main(flags)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and flags[0] in err


def test_results_are_not_overwritten(reference, capsys):
    folder = reference[0]
    before = (folder / "result.json").read_bytes()
    assert exit_code(copsl.main, arguments(*LONG, "--out-dir", folder)) == 2
    err = capsys.readouterr().err
    assert "--overwrite" in err and len(err.strip().splitlines()) == 1
    words = arguments(*LONG, "--out-dir", folder, "--resume", "--mu", "0.3")
    assert exit_code(copsl.main, words) == 2
    err = capsys.readouterr().err
    assert "mu=0.1" in err and "mu=0.3" in err
    assert (folder / "result.json").read_bytes() == before


def test_help_is_the_header_and_every_flag_has_a_text(capsys):
    with pytest.raises(SystemExit) as stop:
        copsl.main(["-h"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    for words in ("The idea", "Paper map", "DEVIATION 1", "UNSPECIFIED 1", "--save-every"):
        assert words in out
    assert err == "" and all(a.help for a in copsl.build_parser()._actions)


def test_the_speed_benchmark_runs(capsys):
    from benchmarks import copsl_speed
    copsl_speed.main(["--quick"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    ratios = [float(pair.split("=")[1]) for pair in last.split()[1:]]
    assert len(ratios) >= 5 and all(v > 0 for v in ratios)
