"""coaction.py: networks against plain arrangements, what tasks know of each other, the command."""
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import coaction
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
    flat,
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

SCRIPT = "coaction.py"
N_OBJS, N_VARS = [2, 3, 2, 4], [5, 2, 7, 3]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seeds=2, tasks=range(4), width=16, **options):
    """A CoAction of float64 whose heads are large enough for outputs to differ."""
    net = coaction.CoAction([N_OBJS[k] for k in tasks], [N_VARS[k] for k in tasks], width,
                            generators=[seeded(s) for s in range(seeds)], **options).double()
    net.head.data *= 10
    return net


def preferences(seeds=2, batch=6, seed=0):
    return [coaction.dirichlet_preferences(seeds, batch, m, seeded(seed + k)).double()
            for k, m in enumerate(N_OBJS)]


# ------------------------------------------------------------------------------------------------
# CoAction: what goes in, what comes out, who sees whom
# ------------------------------------------------------------------------------------------------


def test_tasks_of_different_sizes_in_one_model():
    net, p = make(), preferences()
    x = net(p)
    assert [t.shape for t in x] == [(2, 6, n) for n in N_VARS]
    assert all(((t > 0) & (t < 1)).all() for t in x)
    spread = max((t[:, 0] - t[:, 1]).abs().max().item() for t in x)
    assert spread > .01 and not torch.equal(x[0][0], x[0][1])
    # one tensor serves all tasks where the numbers of objectives are equal
    same = coaction.CoAction([2, 2, 2], [3, 4, 5], 16)
    p = coaction.dirichlet_preferences(1, 5, 2)
    assert all(torch.equal(a, b) for a, b in zip(same(p), same([p] * 3), strict=True))


@pytest.mark.parametrize("attend", [True, False])
def test_permuting_tasks_permutes_the_answers(attend):
    order = [2, 0, 3, 1]
    net, p = make(attend=attend), preferences()
    other = make(tasks=order, attend=attend)
    state = net.state_dict()
    for name in ("task", "head", "head_bias"):
        state[name] = state[name][:, order]
    other.load_state_dict(state)
    found = other([p[k] for k in order])
    expected = net(p)
    for i, k in enumerate(order):
        torch.testing.assert_close(found[i], expected[k], rtol=0, atol=1e-12)


def test_asking_for_some_tasks_only():
    net, p = make(), preferences()
    full = net(p)
    for asked in ([0], [3], [2, 1]):
        for k, x in zip(asked, net(p, tasks=asked), strict=True):
            assert torch.equal(x, full[k])
        alone = net(p, tasks=asked, context=False)
        for k, x in zip(asked, alone, strict=True):
            assert x.shape == full[k].shape and (x - full[k]).abs().max() > 1e-3
    # alone, a task is what a model of this task only says
    small, state = make(tasks=[2]), net.state_dict()
    kept = {n: t for n, t in state.items() if not n.startswith("read.") or ".2." in n}
    kept |= {n: kept[n][:, [2]] for n in ("task", "head", "head_bias")}
    small.load_state_dict(kept)
    torch.testing.assert_close(net(p, [2], context=False)[0], small([p[2]])[0], rtol=0, atol=1e-12)
    blind = make(attend=False)
    full = blind(p)
    for k in range(4):
        x, = blind(p, tasks=[k], context=False)
        torch.testing.assert_close(x, full[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attend", [True, False])
def test_other_preferences_matter_with_attention_only(attend):
    net, p = make(attend=attend), preferences()
    q = [p[0], *preferences(seed=50)[1:]]
    before, after = net(p), net(q)
    change = (before[0] - after[0]).abs().amax((1, 2))
    assert (change > 1e-4).all() if attend else (change == 0).all()
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before[1:], after[1:], strict=True))
    # one preference never sees another of the batch, one seed never sees another seed
    x = net([t[:, 2:3] for t in p])
    for a, b in zip(x, before, strict=True):
        torch.testing.assert_close(a, b[:, 2:3], rtol=0, atol=1e-12)
    changed = [torch.cat([a[:1], b[1:]]) for a, b in zip(p, preferences(seed=9), strict=True)]
    for a, b in zip(net(changed), before, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-12)
        assert (a[1] - b[1]).abs().max() > 1e-4


def test_embedding_tells_tasks_apart():
    p = coaction.dirichlet_preferences(1, 5, 2, seeded()).double()
    for embed in (True, False):
        net = coaction.CoAction([2, 2], [3, 3], 16, generators=[seeded()], embed=embed).double()
        net.head.data[:] = 10 * net.head.data[:, :1]
        net.head_bias.data[:] = net.head_bias.data[:, :1]
        a, b = net(p)
        gap = (a - b).abs().max()  # two rows of the same products, which may round differently
        assert gap > 1e-3 if embed else gap < 1e-12
        sum(x.sum() for x in net(p)).backward()
        assert (net.task.grad is not None) is embed
    assert (net.task == 0).all()


# ------------------------------------------------------------------------------------------------
# Against plain arrangements
# ------------------------------------------------------------------------------------------------


def copy_linear(plain, layer, s):
    plain.weight.data, plain.bias.data = layer.weight[s].T.detach().clone(), \
        layer.bias[s, 0].detach().clone()


def plain_encoder(block, s, width, heads):
    """torch's own encoder layer with the weights of seed s."""
    plain = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0, activation="gelu",
                                       batch_first=True, norm_first=True, dtype=torch.float64)
    attention = plain.self_attn
    attention.in_proj_weight.data = block.qkv.weight[s].T.detach().clone()
    attention.in_proj_bias.data = block.qkv.bias[s, 0].detach().clone()
    for layer, ours in ((attention.out_proj, block.out), (plain.linear1, block.up),
                        (plain.linear2, block.down)):
        copy_linear(layer, ours, s)
    for layer, ours in ((plain.norm1, block.norm1), (plain.norm2, block.norm2)):
        layer.weight.data, layer.bias.data = (t[s, 0].detach().clone()
                                              for t in (ours.weight, ours.bias))
    return plain


def jitter(net):
    """Norms start at 1 and 0: move them, so that a test sees whether they are used."""
    for i, (name, p) in enumerate(net.named_parameters()):
        if "norm" in name:
            p.data += .2 * torch.randn(p.shape, generator=seeded(i)).to(p)
    return net


def test_block_equals_the_encoder_layer_of_torch():
    width, heads, K = 12, 3, 4
    block = jitter(coaction.TaskBlock(width, heads, [seeded(s) for s in range(2)]).double())
    h = torch.randn(2, 5 * K, width, generator=seeded(1), dtype=torch.float64)
    maps = []
    found = block(h, K, maps)
    for s in range(2):
        plain = plain_encoder(block, s, width, heads)
        expected = plain(h[s].view(5, K, width))
        torch.testing.assert_close(found[s].view(5, K, width), expected, rtol=0, atol=1e-12)
        normed = plain.norm1(h[s].view(5, K, width))
        weights = plain.self_attn(normed, normed, normed)[1]  # mean over heads
        torch.testing.assert_close(maps[0][s], weights.mean(0), rtol=0, atol=1e-12)
    assert torch.equal(block(h, K), found)


def test_block_without_attention_is_attention_to_oneself():
    block = jitter(coaction.TaskBlock(12, 3, [seeded()], attend=False).double())
    h = torch.randn(1, 20, 12, generator=seeded(1), dtype=torch.float64)
    plain = plain_encoder(block, 0, 12, 3)
    expected = plain(h[0].view(20, 1, 12))  # sequences of one token
    torch.testing.assert_close(block(h, 4)[0], expected[:, 0], rtol=0, atol=1e-12)


def test_coaction_equals_a_plain_transformer_one_seed_at_a_time():
    net, p = jitter(make(layers=2)), preferences()
    found = net(p)
    for s in range(2):
        tokens = []
        for k, m in enumerate(N_OBJS):
            embed = nn.Linear(m, 16, dtype=torch.float64)
            copy_linear(embed, net.read[str(m)], s)
            tokens.append(embed(p[k][s]) + net.task[s, k])
        h = torch.stack(tokens, 1)
        for block in net.blocks:
            h = plain_encoder(block, s, 16, 4)(h)
        for k, n in enumerate(N_VARS):
            logits = h[:, k] @ net.head[s, k, :, :n] + net.head_bias[s, k, 0, :n]
            torch.testing.assert_close(found[k][s], 1 / (1 + (-logits).exp()), rtol=0, atol=1e-12)


def test_attention_maps_sum_to_one_for_each_reader():
    net, maps = make(layers=3), []
    net(preferences(), maps=maps)
    assert [t.shape for t in maps] == [(2, 4, 4)] * 3
    for t in maps:
        torch.testing.assert_close(t.sum(-1), torch.ones(2, 4).double())
        assert (t > 0).all() and (t - .25).abs().max() > 1e-3


class PlainTowers(nn.Module):
    """One seed of Towers: nn.Linear layers in a loop over tasks."""

    def __init__(self, ours, s):
        super().__init__()

        def layer(w, b, fan_in, fan_out):
            made = nn.Linear(fan_in, fan_out, dtype=torch.float64)
            made.weight.data, made.bias.data = w[:fan_in, :fan_out].T.detach().clone(), \
                b[0, :fan_out].detach().clone()
            return made

        w, K = ours.width, len(ours.n_vars)
        first = 1 if ours.shared else K
        self.first = nn.ModuleList(layer(ours.w1[s, k], ours.b1[s, k], ours.n_objs[k], w)
                                   for k in range(first))
        self.second = nn.ModuleList(layer(ours.w2[s, k], ours.b2[s, k], w, w) for k in range(K))
        self.third = nn.ModuleList(layer(ours.w3[s, k], ours.b3[s, k], w, n)
                                   for k, n in enumerate(ours.n_vars))

    def forward(self, p):
        found = []
        for k in range(len(self.second)):
            h = torch.relu(self.first[k if len(self.first) > 1 else 0](p[k]))
            found.append(torch.sigmoid(self.third[k](torch.relu(self.second[k](h)))))
        return found


@pytest.mark.parametrize("shared", [True, False])
def test_towers_equal_linear_layers(shared):
    n_objs = [3] * 4 if shared else N_OBJS
    net = coaction.Towers(n_objs, N_VARS, 9, [seeded(s) for s in range(2)], shared).double()
    p = preferences()
    p = [p[1]] * 4 if shared else p
    found = net(p)
    for s in range(2):
        plain = PlainTowers(net, s)
        for x, expected in zip(found, plain([t[s] for t in p]), strict=True):
            torch.testing.assert_close(x[s], expected, rtol=0, atol=1e-12)
        assert net.num_parameters() == sum(t.numel() for t in plain.parameters())
    bounds = [1 / math.sqrt(m) for m in n_objs[:net.w1.shape[1]]]
    for k, bound in enumerate(bounds):
        assert .7 * bound < net.w1[:, k].abs().max() <= bound
    if shared:  # the peers are the networks of copsl.py
        assert net.num_parameters() == copsl.CoPSL(3, N_VARS, 9).num_parameters()


def test_number_of_parameters():
    net = make(width=16, layers=2)
    block = 4 * 16 + 17 * 48 + 17 * 16 + 17 * 32 + 33 * 16
    embed = sum((m + 1) * 16 for m in (2, 3, 4))
    assert net.num_parameters() == embed + 4 * 16 + 2 * block + sum(17 * n for n in N_VARS)
    assert make(width=16, layers=2, embed=False).num_parameters() == net.num_parameters() - 4 * 16
    assert make(width=16, layers=2, attend=False).num_parameters() == net.num_parameters()
    n_vars = [data.get_problem(f"f{i}").n_var for i in range(1, 7)]
    assert coaction.Towers([2] * 6, n_vars).num_parameters() == 404_772
    assert coaction.Towers([2] * 6, n_vars, shared=False).num_parameters() == 408_612


def test_losses_equal_their_formulas_and_those_of_copsl():
    f = torch.rand(50, 3, generator=seeded(1), dtype=torch.float64)
    p = coaction.dirichlet_preferences(1, 50, 3, seeded(2))[0].double()
    smooth, modified = coaction.smooth_tchebycheff(f, p, .2), coaction.modified_tchebycheff(f, p)
    for b in range(50):
        inverse = [1 / v for v in p[b].tolist()]
        w = [v / sum(inverse) for v in inverse]
        expected = .2 * math.log(sum(math.exp(a * v / .2)
                                     for a, v in zip(w, f[b].tolist(), strict=True)))
        assert smooth[b].item() == pytest.approx(expected, rel=1e-10)
        expected = max(a * v for a, v in zip(inverse, f[b].tolist(), strict=True))
        assert modified[b].item() == pytest.approx(expected + .01 * f[b].sum().item(), rel=1e-10)
    torch.testing.assert_close(coaction.smooth_tchebycheff(f, p), copsl.scalarize(f, p, "smtch"))


@pytest.mark.parametrize("m", [2, 3, 4])
def test_shared_pieces_are_those_of_copsl(m):
    """The scripts do not import each other; what they both have must stay the same."""
    for name in ("dirichlet_preferences", "even_preferences"):
        a, b = (getattr(script, name)(4, 10, m, seeded()) for script in (coaction, copsl))
        assert torch.equal(a, b)
    f = [torch.rand(2, 5, m, generator=seeded(s)) for s in range(3)]
    ours = theirs = (None, None)
    for values in f:
        ours, theirs = coaction.update_range(*ours, values), copsl.update_range(*theirs, values)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for grid in (None, 15):
        assert torch.equal(coaction.test_preferences(m, grid),
                           copsl.test_preferences(m, grid, False))


def test_clip_gradients_looks_at_each_seed_alone():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 1, 4)),
                  nn.Parameter(torch.zeros(2, 5))]
    for p in parameters[:2]:
        p.grad = torch.ones(p.shape)
        p.grad[1] *= .01
    coaction.clip_gradients(parameters, 1.0)  # the third has no gradient
    assert parameters[2].grad is None
    for p in parameters[:2]:
        torch.testing.assert_close(p.grad[0], torch.full_like(p.grad[0], 7 ** -.5))
        assert torch.equal(p.grad[1], torch.full_like(p.grad[1], .01))


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def world(*words, problems=("f1", "dtlz2-3", "zdt2"), seeds=(5, 6)):
    args = coaction.resolve(coaction.build_parser().parse_args(
        ["--problems", *problems, "--width", "8", "--heads", "2", "--layers", "1", "--tower-width",
         "8", "--steps", "15", "--batch", "6", "--eval-points", "15", "--eval-every", "15",
         *map(str, words)]))
    found = [data.get_problem(n) for n in args.problems]
    return coaction.World(found, list(seeds), args, torch.device("cpu"), torch.float64)


def train(w, method):
    return coaction.train(w, QuietRun(), method, None, lambda state: None)[0]


@pytest.mark.parametrize("recipe", ["tuned", "copsl"])
def test_training_of_towers_equals_a_plain_loop(recipe):
    w, tuned = world("--recipe", recipe), recipe == "tuned"
    net, drawn = train(w, "psl"), w.preferences()
    for s in range(2):
        plain, lr = PlainTowers(w.network("psl")[0], s), 5e-3 if tuned else 1e-3
        optimizer = torch.optim.Adam(plain.parameters(), lr, (.9, .95) if tuned else (.9, .999))
        ideal, nadir = [None] * 3, [None] * 3
        for step in range(15):
            if tuned:
                optimizer.param_groups[0]["lr"] = lr * .5 * (1 + math.cos(math.pi * step / 15))
            total, p = 0, [drawn[m][step, s] for m in w.n_objs]
            for k, (x, problem) in enumerate(zip(plain(p), w.problems, strict=True)):
                f = problem(problem.lower + x * (problem.upper - problem.lower))
                if not tuned:
                    total = total + ((f / p[k]).max(1)[0] + .01 * f.sum(1)).sum()
                    continue
                low, high = f.detach().min(0)[0], f.detach().max(0)[0]
                ideal[k] = low if step == 0 else torch.minimum(ideal[k], low)
                nadir[k] = high if step == 0 else .9 * nadir[k] + .1 * high
                inverse = 1 / p[k] / (1 / p[k]).sum(1, keepdim=True)
                g = .1 * (inverse * (f - ideal[k]) / (nadir[k] - ideal[k]) / .1).exp().sum(1).log()
                total = total + g.mean() + 2e-4 * torch.log(x / (1 - x)).square().mean()
            optimizer.zero_grad()
            total.backward()
            if tuned:
                nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
        expected = plain.state_dict()
        # Rounding of gradients is 1e-16, and Adam divides by 1e-8 at least: 15 · 5e-3 · 1e-8
        for name, t in PlainTowers(net, s).state_dict().items():
            torch.testing.assert_close(t, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", ["tuned", "copsl"])
@pytest.mark.parametrize("method", [m for m in coaction.METHODS if m != "copsl"])
def test_seeds_at_once_equal_seeds_one_by_one(method, recipe):
    w = world("--recipe", recipe)
    together, (fresh, _) = train(w, method), w.network(method)
    moved = 0
    # 15 steps of Adam on gradients that are 0 but for 1e-15 (see the test with two processes):
    # 15 · 5e-3 · 1e-15 / 1e-8 = 7.5e-9
    for s, seed in enumerate((5, 6)):
        alone = train(world("--recipe", recipe, seeds=(seed,)), method)
        for a, b, c in zip(together.parameters(), alone.parameters(), fresh.parameters(),
                           strict=True):
            torch.testing.assert_close(a[s], b[0], rtol=0, atol=1e-8)
            moved = max(moved, (a[s] - c[s]).abs().max().item())
    assert moved > .01
    if method != "psl":  # padding never changes
        for k, n in enumerate(together.n_vars):
            assert torch.equal(together.head[:, k, :, n:], fresh.head[:, k, :, n:])
            assert not torch.equal(together.head[:, k, :, :n], fresh.head[:, k, :, :n])
    if method == "no-embedding":
        assert (together.task == 0).all()


def test_evaluate_takes_each_task_at_its_own_preferences():
    """f1 has 15 test preferences as dtlz2-3 does, or other numbers of them: 100 beside 105."""
    for points in ([], ["--eval-points", 12]):
        w = world(*points, problems=("f1", "re33"))
        if not points:
            w.tests = [coaction.test_preferences(m, None).double() for m in (2, 3)]
        net, _ = w.network("psl")  # answers do not depend on other tasks' preferences
        found = coaction.evaluate(w, net)
        for s, seed in enumerate((5, 6)):
            plain = PlainTowers(net, s)
            for k, q in enumerate(w.problems):
                p = [torch.full_like(w.tests[j], .5) for j in range(2)]
                p[k] = coaction.test_preferences(q.n_obj, len(w.tests[k])).double()
                f = q(q.scale(plain(p)[k].detach()))
                f = (f - q.ideal) / (q.nadir - q.ideal)
                expected = {"hv": common.hypervolume(f, [1.1] * q.n_obj),
                            "range": common.angular_range(f), "sparsity": common.sparsity(f)}
                for key, value in expected.items():
                    assert found[seed][key][k] == pytest.approx(value, abs=1e-9)
        assert found[5]["hv"] != found[6]["hv"] and max(found[5]["hv"]) > 0


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------

MIXED = ["f1", "dtlz2-3", "zdt2"]


def arguments(*more, problems=MIXED):
    """A run of a second: tasks of two and three objectives, two seeds, 40 steps."""
    tasks = [] if "--suite" in more or "--problems" in more else ["--problems", *problems]
    return [*tasks, "--seeds", "2", "--steps", "40", "--batch", "8", "--width", "16", "--layers",
            "2", "--tower-width", "16", "--eval-every", "10", "--save-every", "10",
            "--eval-points", "15", *map(str, more)]


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """run_here("name", words...) runs the command inside this process, without its figure."""
    monkeypatch.setattr(coaction, "draw_figure", lambda *_: None)

    def run(name, *words):
        coaction.main(arguments(*words, "--out-dir", tmp_path / name))
        return tmp_path / name
    return run


LONG = ["--steps", 200, "--method", "psl,coaction"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run of two methods, 20 rows each, which others are compared with."""
    folder = tmp_path_factory.mktemp("coaction") / "out"
    out, err = finish(start(SCRIPT, arguments(*LONG, "--out-dir", folder)))
    return folder, out, err


def test_run_leaves_its_files_and_a_result_line(reference):
    folder, out, err = reference
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "result.json", "figure.png", "coaction.py"}
    assert (folder / "coaction.py").read_text() == (ROOT / "coaction.py").read_text()
    assert Image.open(folder / "figure.png").size[0] > 1000
    assert err == "problems: f1 dtlz2-3 zdt2 (built in)\n"
    found, line = result(folder), result_line(out)
    assert list(found["results"]) == ["coaction", "psl"] and found["problems"] == MIXED
    for method, key in (("coaction", "hv"), ("psl", "hv_psl")):
        r = found["results"][method]
        for name in MIXED:
            assert len(r["hv"][name]) == len(r["range"][name]) == len(r["sparsity"][name]) == 2
        mean = sum(map(sum, r["hv"].values())) / 6
        assert float(line[key]) == pytest.approx(mean, abs=6e-5)
        assert sum(map(sum, r["initial_hv"].values())) / 6 < mean < 1
    heat = torch.tensor(found["results"]["coaction"]["attention"])
    torch.testing.assert_close(heat.sum(1), torch.ones(3))
    assert "attention" not in found["results"]["psl"]
    hv = found["results"]["coaction"]["hv"]["dtlz2-3"]
    row = next(t for t in out.splitlines() if t.startswith("dtlz2-3"))
    assert f" {sum(hv) / 2:.4f} ±" in row
    assert [(r["method"], r["step"]) for r in log_rows(folder)] == \
        [(m, s) for m in ("coaction", "psl") for s in range(10, 201, 10)]
    assert json.loads((folder / "config.json").read_text())["settings"]["problems"] == MIXED


def test_same_command_gives_the_same_numbers_and_another_seed_others(run_here):
    a, b, c = (run_here(name, "--method", "all", "--seed", seed)
               for name, seed in (("a", 0), ("b", 0), ("c", 7)))
    assert_same_run(a, b)
    assert result(a)["results"] != result(c)["results"]
    assert list(result(a)["results"]) == [m for m in coaction.METHODS if m != "copsl"]


def test_killed_and_resumed_ends_with_the_same_numbers(reference, tmp_path):
    folder = tmp_path / "out"
    words = arguments(*LONG, "--out-dir", folder)
    kill(SCRIPT, words, folder, 25)  # in the second method
    coaction.main([*words, "--resume"])
    assert_same_run(folder, reference[0])


@pytest.mark.parametrize("words", [[], ["--recipe", "copsl"],
                                   ["--problems", "f1", "zdt2", "--method", "copsl,coaction,psl"]])
def test_run_that_dies_between_log_and_save_loses_nothing(run_here, monkeypatch, words):
    words = ["--method", "all", "--save-every", 15, "--eval-every", 4, *words]
    whole = run_here("whole", *words)
    for rows in (1, 6, 13, 9):  # before the first save; in each of three methods
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
    lines = [line for line in err.splitlines() if line]
    assert lines.pop(0).startswith("problems: ")
    assert lines.pop(0).startswith("note: copsl is left out: its shared layer")
    assert len(lines) == 1 and "--resume" in lines[0] and str(folder) in lines[0]
    assert "coaction, step" in lines[0]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["script"] == "coaction-problems"


def test_resume_after_the_end_prints_the_tables_again(reference, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(reference[0], folder)
    coaction.main(arguments(*LONG, "--out-dir", folder, "--resume"))
    out = capsys.readouterr().out
    assert out.splitlines()[:-1] == reference[1].splitlines()[:-1] and len(out.splitlines()) > 10
    assert result_line(out) | {"out": ""} == result_line(reference[1]) | {"out": ""}
    assert_same_run(folder, reference[0])


DOUBLE = "script.World = functools.partial(script.World, dtype=torch.float64)"


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Seeds do not see each other, but products of another number of seeds round otherwise.

    Adam divides a gradient by its own size: where it is 0 but for rounding (keys have a bias that
    softmax does not see), a step is lr · u / (u + 1e-8) with u the rounding of a gradient. In
    float32 u is near 1e-8, so that 20 steps differ by up to 20 · 5e-3: nothing to compare. In
    float64 u is below 1e-15 (a thousand rounding units at gradients of order .01), and 20 steps
    differ by less than 20 · 5e-3 · 1e-15 / 1e-8 = 1e-8. Attention and scores, to which hundreds of
    weights add up, differ by less than a hundred times that.
    """
    words = arguments("--seeds", 3, "--method", "psl,coaction", "--steps", 20)
    one, two = run_in_one_and_two_processes(in_float64(tmp_path, "coaction", DOUBLE), words,
                                            tmp_path)
    for method, r in result(two)["results"].items():
        expected = result(one)["results"][method]
        for key in ("hv", "range", "sparsity", "initial_hv"):
            for name in MIXED:
                assert r[key][name] == pytest.approx(expected[key][name], abs=1e-6)
        if method == "coaction":
            np.testing.assert_allclose(r["attention"], expected["attention"], rtol=0, atol=1e-6)
    a, b = trained(two), trained(one)
    assert a.keys() == b.keys() and {name.split("/")[2] for name in a} == {"0", "1", "2"}
    for name in a:
        assert a[name].dtype == torch.float64
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-8)


def test_more_processes_than_seeds_are_refused(tmp_path, monkeypatch, capsys):
    pretend_processes(monkeypatch, 3)
    assert exit_code(coaction.main, arguments("--out-dir", tmp_path / "out")) == 2
    assert capsys.readouterr().err == "error: 3 processes, but only --seeds 2 to share\n"


@pytest.mark.parametrize("flags, method", [
    (["--recipe", "copsl"], "coaction"), (["--recipe", "copsl"], "psl"),
    (["--lr", "1e-2"], "coaction"), (["--tower-lr", "1e-2"], "psl"), (["--mu", "0.5"], "coaction"),
    (["--heads", "8"], "coaction"), (["--batch", "9"], "psl"), (["--seed", "3"], "coaction")],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_options_change_what_is_trained(run_here, flags, method):
    a = run_here("a", "--method", method, "--steps", 10, *flags)
    b = run_here("b", "--method", method, "--steps", 10)
    assert result(a)["results"] != result(b)["results"]
    first, second = trained(a), trained(b)
    assert any(not torch.equal(first[k], second[k]) for k in first.keys() & second.keys()) \
        or first.keys() != second.keys()


def test_learning_rates_belong_to_their_methods(run_here):
    for flag, method in (("--tower-lr", "coaction"), ("--lr", "psl")):
        a = run_here(f"a{method}", "--method", method, "--steps", 3, flag, .1)
        b = run_here(f"b{method}", "--method", method, "--steps", 3)
        assert result(a)["results"] == result(b)["results"]


def test_all_methods_are_methods_of_their_own(run_here, capsys):
    folder = run_here("a", "--method", "all", "--problems", "f1", "zdt2")
    out = capsys.readouterr().out
    found = result(folder)["results"]
    assert list(found) == list(coaction.METHODS)
    assert all(label.strip() in out for label in coaction.METHODS.values())
    assert len({json.dumps(r["hv"]) for r in found.values()}) == 5
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert (flat(state["trained"]["no-embedding"])["/0/task"] == 0).all()
    assert found["no-embedding"]["parameters"] == found["coaction"]["parameters"] - 2 * 16
    line = result_line(out)
    assert line["method"] == "coaction"
    assert {"hv_copsl", "hv_psl", "hv_no_attention", "hv_no_embedding"} <= set(line)


def test_copsl_is_left_out_where_objectives_differ_in_number(run_here):
    folder = run_here("a", "--method", "copsl,psl", "--steps", 2)
    assert list(result(folder)["results"]) == ["psl"]


def test_mixed_objectives_with_figure_and_four_of_them(tmp_path, capsys):
    """Range is not defined for 4 objectives: "-" in the table, null in the file."""
    folder = tmp_path / "out"
    coaction.main(arguments("--problems", "f1", "dtlz2-4", "re33", "--method", "coaction",
                            "--steps", 5, "--out-dir", folder))
    found = result(folder)["results"]["coaction"]
    assert found["range"]["dtlz2-4"] == [None, None] and None not in found["range"]["re33"]
    assert Image.open(folder / "figure.png").size[0] > 1000
    rows = [t.split() for t in capsys.readouterr().out.splitlines() if t.startswith("dtlz2-4")]
    assert [r[1] == "-" for r in rows] == [False, True, False]


@pytest.mark.parametrize("tasks", [["dtlz2-3", "Open", "dtlz2-5"], ["f1"]])
def test_figure_has_the_fronts_that_were_measured(tmp_path, monkeypatch, capsys, tasks):
    path, folder = write_kinds(tmp_path / "mine.py"), tmp_path / "a"
    maps, draw = [], common.heat_map
    monkeypatch.setattr(common, "heat_map", lambda *a, **b: maps.append(a) or draw(*a, **b))
    given, hv = drawn_fronts(monkeypatch, coaction.main, arguments(
        "--problems", *(t.replace("Open", f"{path}:Open") for t in tasks), "--method", "all",
        "--steps", 10, "--out-dir", folder))
    problems, preferences, fronts, references, drawn, _ = given
    found = {m: r["hv"] for m, r in result(folder)["results"].items()}
    peers = ["psl", *["copsl"] * (len(tasks) == 1)]
    assert list(fronts) == ["no-embedding", "no-attention", *peers, "coaction"] and drawn == found
    for m in fronts:
        for name, numbers in found[m].items():
            assert hv[m][name] == pytest.approx(numbers, abs=1e-6)
    assert [f.shape for f in fronts["psl"]] == [(2, len(t), p.n_obj) for t, p in
                                                zip(preferences, problems, strict=True)]
    assert len(references[0]) > 5000 and len(maps) == (len(tasks) > 1)  # one task reads itself
    assert "could not be drawn" not in capsys.readouterr().err


@pytest.mark.parametrize("suite", sorted(coaction.SUITES))
def test_suites_name_problems_that_exist(suite):
    args = coaction.resolve(coaction.build_parser().parse_args(["--suite", suite]))
    assert len(args.problems) >= 5
    problems = data.get_problems(args.problems, args.data_dir)
    counts = {p.n_obj for p in problems}
    expected = {"f": {2}, "zdt": {2}, "re2": {2}, "re3": {3}, "re-mixed": {2, 3, 4},
                "mtmo": {2, 3}}[suite]
    assert [p.name for p in problems] == args.problems and counts == expected
    default = coaction.resolve(coaction.build_parser().parse_args([]))
    assert default.suite == "f"


def test_stand_in_matrices_are_told_and_shift_moves_optima(run_here, tmp_path, capsys):
    words = ["--problems", "cims2", "nihs2", "--method", "psl", "--steps", 2]
    a = run_here("a", *words, "--data-dir", tmp_path / "data")
    out, err = capsys.readouterr()
    said, *idle = err.splitlines(keepends=True)
    assert all(line.startswith("note: without effect: ") for line in idle)
    assert "stand in" not in out and said == (
        f"problems: cims2 nihs2 (built in); no cims2 in {tmp_path / 'data' / 'mtmo'}: random "
        "matrices stand in for the competition's, so numbers of these tasks compare with nobody "
        "else's\n")
    assert result(a)["stand_in_matrices"] == ["cims2"]
    b = run_here("b", *words, "--data-dir", tmp_path / "data", "--shift", .5)
    assert result(a)["results"] != result(b)["results"]
    (tmp_path / "data" / "mtmo").mkdir(parents=True)
    rows = "\n".join(" ".join(str(float(i == j)) for j in range(9)) for i in range(9))
    (tmp_path / "data" / "mtmo" / "cims2.txt").write_text(rows)
    capsys.readouterr()
    c = run_here("c", *words, "--data-dir", tmp_path / "data")
    assert "stand in" not in capsys.readouterr().err and result(c)["stand_in_matrices"] == []
    fresh = [result(folder)["results"]["psl"]["range"] for folder in (a, c)]
    assert fresh[0]["cims2"] != fresh[1]["cims2"]


def test_own_problem(run_here, tmp_path):
    spec = write_problem(tmp_path / "mine.py")
    folder = run_here("a", "--problems", spec, "dtlz2-3", "--method", "coaction", "--steps", 120)
    found = result(folder)["results"]["coaction"]
    assert list(found["hv"]) == ["Bend", "dtlz2-3"]
    assert all(.4 < v < .88 for v in found["hv"]["Bend"])
    assert max(found["initial_hv"]["Bend"]) < min(found["hv"]["Bend"])


def test_range_that_is_not_given_is_estimated_after_training(tmp_path, capsys):
    """Beside tasks of other numbers of objectives; the function is not called again to report."""
    path, folder = write_kinds(tmp_path / "mine.py"), tmp_path / "a"
    words = arguments("--problems", f"F1,{path}:Open", f"{path}:Known", "dtlz2-3", "--method",
                      "psl,coaction", "--steps", 100, "--tower-width", 64, "--out-dir", folder)
    coaction.main(words)
    out, err = capsys.readouterr()
    training = 2 * 2 * (100 * 8 + 11 * 15)  # methods, seeds; steps, batch; tests of 15 points
    assert 2 * training < calls(path) <= 4 * training + 2 * 48
    seen, found = calls(path), result(folder)
    coaction.main([*words, "--resume"])
    assert calls(path) - seen == 2 * 48 and result(folder) == found
    assert capsys.readouterr().out == out
    ranges = found["ranges"]["Open"]
    assert found["ranges"]["Known"]["estimated"] == [] and ranges["estimated"] == ["ideal", "nadir"]
    assert ranges["ideal"] == pytest.approx([0, 0], abs=.1)
    assert ranges["nadir"] == pytest.approx([1, 1], abs=.15)
    psl = found["results"]["psl"]
    for key, apart in (("hv", .1), ("range", .15), ("sparsity", .05)):
        for known, late in zip(psl[key]["Known"], psl[key]["Open"], strict=True):
            assert late == pytest.approx(known, abs=apart)
    assert all(0 <= v < 1.21 for v in (*psl["hv"]["Open"], *psl["initial_hv"]["Open"]))
    assert all("hv" not in row for row in log_rows(folder))
    assert Image.open(folder / "figure.png").size[0] > 1000
    assert [t.split()[:2] for t in out.splitlines() if t.startswith("Open")] == [["Open", "*"]] * 3
    assert "* Open: ideal and nadir estimated" in out and result_line(out)["estimated"] == "Open"
    lines = err.splitlines()
    assert [t.split(":")[0] for t in lines] == ["problems", "problem Open", "problem Known"]


def test_offsets_and_scales_do_not_change_training(run_here, tmp_path):
    path = write_kinds(tmp_path / "mine.py")
    plain, *others = (trained(run_here(k, "--problems", f"{path}:{k}", "--method", "coaction"))
                      for k in ("Open", "Far", "Below"))
    for other in others:
        for name, expected in plain.items():
            torch.testing.assert_close(other[name], expected, rtol=0, atol=2e-5)


def test_search_that_is_cut_short_goes_on_where_training_ended(run_here, tmp_path, monkeypatch):
    path, search = write_kinds(tmp_path / "mine.py"), data.reference_front
    words = ["--problems", f"{path}:Open", "--method", "psl", "--steps", 10]
    whole = result(run_here("whole", *words))

    def stopped(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "reference_front", stopped)
    with pytest.raises(SystemExit):
        run_here("a", *words)
    monkeypatch.setattr(data, "reference_front", search)
    monkeypatch.setattr(coaction, "train_step", stopped)
    assert result(run_here("a", *words, "--resume")) == whole


def test_note_on_objectives_as_they_are_and_on_points_that_do_not_fit(run_here, tmp_path, capsys):
    path = write_kinds(tmp_path / "mine.py")
    run_here("a", "--problems", f"{path}:Far", f"{path}:ball4", "--recipe", "copsl", "--method",
             "psl", "--steps", 2, "--eval-points", 40, "--reference", 0)
    notes = [t for t in capsys.readouterr().err.splitlines() if t.startswith("note: ")]
    assert notes[0].startswith("note: problem Far: objectives of ")
    assert notes[1] == "note: --eval-points 40: 35 of 4 objectives are spread evenly"


BAD = [
    (["--problems", "f1", "zdt9"], "FILE.py:NAME"),
    (["--problems", "nowhere.py:Truss"], "no file nowhere.py"),
    (["--problems", "mine.py:Truss"], "Truss"),
    (["--suite", "f", "--problems", "f1"], "give one of them"),
    (["--method", "fedavg"], "no-attention"),
    (["--method", "copsl"], "one number of objectives"),
    (["--width", "30"], "--width 30 is not a multiple of --heads 4"),
    (["--problems", "cims2", "--data-dir", "here"], "cims2.txt"),
    (["--device", "toaster"], "toaster"),
    (["--resume"], "no run"),
    (["--out-dir", "mine.py"], "is a file"),
    (["--lr", "1e30", "--method", "coaction"], "not finite"),
    (["--lr", "1e30", "--method", "coaction", "--steps", "1"], "not finite"),
    (["--tower-lr", "1e30", "--method", "psl"], "not finite"),
]
BAD_FLAGS = [["--steps", "0"], ["--batch", "0"], ["--seeds", "0"], ["--lr", "nan"], ["--lr", "0"],
             ["--tower-lr", "0"], ["--mu", "0"], ["--shift", "1"], ["--shift", "-1"],
             ["--eval-points", "3"], ["--width", "0"], ["--layers", "0"], ["--heads", "0"],
             ["--tower-width", "0"], ["--eval-every", "0"], ["--save-every", "0"], ["--seed", "x"],
             ["--recipe", "best"], ["--suite", "re9"], ["--nonsense"]]


@pytest.mark.parametrize("flags, words", BAD, ids=lambda v: " ".join(v)
                         if isinstance(v, list) else v)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    write_problem("mine.py")
    (tmp_path / "here" / "mtmo").mkdir(parents=True)
    (tmp_path / "here" / "mtmo" / "cims2.txt").write_text("1 2\n3 4\n")
    out = [] if flags[0] in ("--resume", "--out-dir") else ["--out-dir", "out"]
    code = exit_code(coaction.main, arguments(*flags, *out))
    assert code == (3 if "finite" in words else 2)
    *said, err = capsys.readouterr().err.strip().splitlines()
    assert words in err and err.startswith("error: ")
    said = [line for line in said if not line.startswith("note: without effect")]
    assert len(said) == (1 if "finite" in words else 0)  # a line about the problems
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flag_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        coaction.main(flags)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and flags[0] in err


def test_the_same_problem_in_capitals_is_the_same_problem(run_here):
    folder = run_here("a", "--problems", "F1", "f1", "zdt2", "--method", "psl", "--steps", 1)
    assert result(folder)["problems"] == ["f1", "zdt2"]


def test_results_are_not_overwritten(reference, capsys):
    folder = reference[0]
    before = (folder / "result.json").read_bytes()
    assert exit_code(coaction.main, arguments(*LONG, "--out-dir", folder)) == 2
    err = capsys.readouterr().err
    assert "--overwrite" in err and len(err.strip().splitlines()) == 1
    words = arguments(*LONG, "--out-dir", folder, "--resume", "--mu", "0.3")
    assert exit_code(coaction.main, words) == 2
    err = capsys.readouterr().err
    assert "mu=0.1" in err and "mu=0.3" in err
    assert (folder / "result.json").read_bytes() == before


def test_help_is_the_header_and_every_flag_has_a_text(capsys):
    with pytest.raises(SystemExit) as stop:
        coaction.main(["-h"])
    out, err = capsys.readouterr()
    assert stop.value.code == 0
    for words in ("The idea", "Paper map", "UNSPECIFIED 6", "--shift"):
        assert words in out
    assert err == "" and all(a.help for a in coaction.build_parser()._actions)
