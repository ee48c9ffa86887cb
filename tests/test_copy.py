"""README's "What to copy": each row pasted alone, each shim against its host, a worked example.

A row names a file, the names that are pasted together, what they import and which floating types
they fit. Here exactly these names are cut out of the file and run where nothing else is: another
name of the file, another library or a helper that the row forgot is a NameError.
"""
import ast
import builtins
import copy
import importlib
import math
import re
import types

import open_clip
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from test_fedpurel import randn, self_attention, tiny_clip, tokens_of
from test_pro_vpt import tiny_vit

import elsa
import fedpurel
import pro_vpt
from tools import ROOT, foreign_names, method_section

SCRIPTS = ["fedpurel.py", "copsl.py", "coaction.py", "pro_vpt.py", "elsa.py"]
IMPORTS = {"torch": torch, "nn": nn, "F": F, "math": math, "copy": copy}
HALF = [torch.bfloat16, torch.float16]
# Rounding of one number is 2⁻⁸ in bfloat16 and 2⁻¹¹ in float16; a handful of layers adds up a few
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# ================================================================================================
# Cutting rows out
# ================================================================================================


class Row:
    """A row of the table: what for, file, names, imports, dtypes."""

    def __init__(self, line):
        what, self.file, names, imports, fits = (c.strip() for c in line.strip("|\n").split("|"))
        self.names = re.findall(r"`(\w+)`", names)
        self.imports = [word for word in re.split(r",\s*", imports) if word]
        types_ = fits.split(";")[0]
        self.dtypes = [torch.float32, torch.float64, *(HALF if types_ == "any dtype" else [])]
        assert types_ in ("any dtype", "float32, float64"), what

    def __repr__(self):
        return self.names[0]


def read_rows():
    section = (ROOT / "README.md").read_text().split("## What to copy")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [Row(line) for line in lines[2:]]


ROWS = read_rows()


def cut(file, names):
    """The source of these functions, classes and constants of a file, and of nothing else."""
    source = (ROOT / file).read_text()
    found = {}
    for node in ast.parse(source).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if name in names:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            found[name] = "\n".join(source.splitlines()[first - 1:node.end_lineno])
    assert set(found) == set(names), set(names) - set(found)
    return "\n\n\n".join(found.values()) + "\n"


def paste(row, without=None):
    """Run a row in a module of its own, with the imports that it names -> its names."""
    def guarded(name, *arguments, **more):
        if name.partition(".")[0] not in row.imports:
            raise NameError(f"{row} imports {name}, which README does not say")
        return builtins.__import__(name, *arguments, **more)

    given = {name: IMPORTS[name] for name in row.imports if name in IMPORTS}
    pasted = {"__name__": "pasted", "__builtins__": {**vars(builtins), "__import__": guarded},
              **given}
    source = cut(row.file, [name for name in row.names if name != without])
    if without is None:
        assert foreign_names(source, set(given)) == set()
    exec(compile(source, f"{row.file} (pasted)", "exec"), pasted)
    return types.SimpleNamespace(**{n: v for n, v in pasted.items() if not n.startswith("__")})


def original(row):
    """The file itself, imported."""
    return importlib.import_module(row.file.removesuffix(".py").replace("/", "."))


def number(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """Normal draws that all floating types here can hold, so that only the computing differs."""
    return (scale * randn(*shape, seed=seed)).bfloat16().to(dtype)


# ================================================================================================
# How each row is called: USES[first name](pasted, dtype) -> tensors. Inputs have the docstring's
# shapes; MODULES[first name](pasted, dtype, seed) -> module, function(module) -> tensors.
# ================================================================================================


def use_tkl(p, dtype):
    z, f = number(6, 9, seed=1, dtype=dtype, scale=3), number(6, 9, seed=2, dtype=dtype, scale=5)
    loss = p.tkl_loss(z, f.requires_grad_())
    gradient, = torch.autograd.grad(loss, f)
    kl = p.kl_loss(z, f.detach())
    certain = torch.eye(9, dtype=dtype)[:2]  # where 0 · log 0 was NaN
    return loss.detach(), gradient, kl, p.entropy(certain), p.target_entropy(z, f.detach())


def use_purify(p, dtype):
    a = number(40, 5, seed=1, dtype=dtype, scale=1e-3)
    task = number(40, 5, dtype=dtype) - 900 * a
    found = p.purify_gradient(task, a)
    assert p.purify_gradient(8 * task, 2 * a).equal(8 * found)  # as under a GradScaler
    return found, p.purify_gradient(a, 0 * a)


def use_fedavg(p, dtype):
    states = [{"a": number(3, 4, seed=k, dtype=dtype, scale=1e-3)} for k in range(100)]
    found = p.fedavg(states, [1 + k % 7 for k in range(100)])
    counter = p.fedavg([{"n": torch.tensor(3)}, {"n": torch.tensor(5)}], [1, 1])["n"]
    assert counter.dtype == torch.int64 and counter == 4
    return found["a"],


def use_residual(p, dtype):
    l_P = number(6, 5, seed=2, dtype=dtype).requires_grad_()
    loss = p.residual_loss(number(6, 5, seed=1, dtype=dtype), l_P, torch.arange(6) % 5, .9)
    return loss.detach(), *torch.autograd.grad(loss, l_P)


def use_class_token(p, dtype):
    clip = tiny_clip(torch.float64).to(dtype)
    pixels = number(3, 3, 16, 16, seed=3, dtype=dtype)
    found = p.class_token_features(clip.visual, pixels)
    assert (found - clip.visual(pixels)).abs().max() <= 4 * ROUNDING[dtype] * found.abs().max()
    return found,


def use_scalarize(p, dtype):
    f, weight = number(4, 3, dtype=dtype).abs(), number(4, 3, seed=1, dtype=dtype).abs() + .125
    with pytest.raises(ValueError, match="expected ls, tch"):
        p.scalarize(f, weight, "pbi")
    return [p.scalarize(f, weight, kind) for kind in ("ls", "tch", "mtch", "cosmos", "stch",
                                                      "smtch")]


def use_gradnorm(p, dtype):
    found = []
    for shape in ((2, 3), (3,)):
        weights = torch.ones(shape, dtype=dtype, requires_grad=True)
        losses, norms = (number(*shape, seed=s, dtype=dtype).abs() + .5 for s in (1, 2))
        p.gradnorm_weights(weights, losses, 2 * losses.flip(-1), norms,
                           torch.optim.SGD([weights], .1))
        assert weights.sum(-1).sub(3).abs().max() < 1e-5
        found.append(weights.detach())
    assert found[0].std() > .01  # something was learned
    return found


def use_clip(p, dtype):
    weights = [nn.Parameter(torch.zeros(2, 3, dtype=dtype)) for _ in range(2)]
    for i, w in enumerate(weights):
        w.grad = number(2, 3, seed=i, dtype=dtype) * torch.tensor([[1e-2], [1.0]])
    before = [w.grad.clone() for w in weights]
    p.clip_gradients(weights, 1.0)
    norm = torch.cat([w.grad for w in weights], 1).norm(dim=1)
    assert weights[0].grad[0].equal(before[0][0]) and abs(norm[1] - 1) < 1e-5
    return [w.grad for w in weights]


def use_preferences(name):
    def use(p, dtype):
        found = getattr(p, name)(4, 30, 3, torch.Generator().manual_seed(0)).to(dtype)
        assert found.shape == (4, 30, 3) and found.min() > 0
        assert (found.sum(-1) - 1).abs().max() < 4e-4
        return found,
    return use


def use_range(p, dtype):
    f = number(2, 5, 3, dtype=dtype)
    ideal, nadir = p.update_range(None, None, f)
    low, high = p.update_range(ideal, nadir, 2 * f)
    assert low.equal(torch.minimum(ideal, (2 * f).amin(1, keepdim=True)))
    return low, high


def use_idleness(p, dtype):
    return p.idleness_scores(number(4, 8, dtype=dtype), number(4, 8, seed=1, dtype=dtype)),


def use_relocate(p, dtype):
    prompts, block = number(4, 8, dtype=dtype), torch.tensor([0, 0, 1, 2])
    p.relocate(prompts, block, 1, 2)
    assert block.tolist() == [0, 2, 1, 2]
    return prompts,


def moves(allocator, states, rewards):
    """What an allocator chooses, one state after the other."""
    generator, chosen = torch.Generator().manual_seed(0), []
    for state, reward in zip(states, rewards, strict=True):
        chosen.append(allocator.choose(state, generator))
        allocator.learn(reward)
    return torch.tensor(chosen, dtype=torch.float32)


def use_allocator(make, states, rewards):
    torch.manual_seed(0)
    first = make()
    begun, twin = moves(first, states, rewards), copy.deepcopy(first)
    torch.manual_seed(1)
    other = make()
    other.load_state_dict(first.state_dict())
    went_on = [moves(a, states, rewards) for a in (twin, copy.deepcopy(other), first)]
    assert went_on[0].equal(went_on[1]) and went_on[0].equal(went_on[2])
    assert len(begun.unique()) > 1
    return begun, went_on[0]


def use_ppo(p, dtype):
    block = torch.tensor([0, 0, 1, 1, 2, -1])
    states = [p.allocator_state(number(6, seed=s, dtype=dtype), block, 0, 3) for s in range(6)]
    assert all(s.shape == (9,) and s.dtype == torch.float32 for s in states)
    rewards = [p.reward(1.0, 1.0 - s, .1) for s in range(6)]
    assert rewards[2] == pytest.approx(1.9)
    return states[0], *use_allocator(lambda: p.PPOAllocator(3, updates=3), states, rewards)


def use_thompson(p, dtype):
    return use_allocator(lambda: p.ThompsonAllocator(3), [None] * 6, [1.0, -1.0, 0.0] * 2)


def use_link(p, dtype):
    """Two crossings; the codecs halve what crosses, so that each exchange shows."""
    link = p.Link({name: lambda x: (x / 2, x.numel() / 2) for name in p.EXCHANGES[:3]})
    x = number(2, 3, 8, dtype=dtype).requires_grad_()
    y = link.to_client(3 * link.to_edge(x))
    gradient, = torch.autograd.grad(y.sum(), x)
    assert y.equal(3 * x / 4) and gradient.eq(1.5).all()
    assert [link.sent[name] for name in p.EXCHANGES[:3]] == [24.0] * 3
    assert link.sent["gradients down"] == 48 * x.element_size()
    return y.detach(), gradient


def use_fingerprint(p, dtype):
    states = [number(9, 6, seed=k, dtype=dtype) for k in range(2)]
    basis = p.principal_directions(torch.cat(states), 3)
    prints = [p.gaussian_fingerprint(s, basis) for s in states]
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert prints[0][1].dtype == torch.float64
    distance = p.symmetric_kl(*prints)
    assert distance > 0 and p.symmetric_kl(prints[0], prints[0]).abs() < 1e-9
    return distance,


def use_trust(p, dtype):
    n, q, c = 5, 12, 3
    truth = torch.arange(q) % c
    sure = .75 * F.one_hot(truth, c).double() + .25 / c
    # The last client says something else, and a class that it never predicts has prior 0
    wrong = F.one_hot((truth + 1) % 2, c).double()
    scores = p.trust_scores((torch.ones(n, n) - torch.eye(n)).to(dtype),
                            torch.stack([sure] * (n - 1) + [wrong]).to(dtype))
    assert scores.isfinite().all() and scores[:-1].eq(1).all() and scores[-1] < .75
    return scores,


def distances(dtype):
    x = torch.tensor([0., 1, 10, 11, 12], dtype=torch.float64)
    return (x[:, None] - x).abs().to(dtype)


def use_clusters(p, dtype):
    found = p.cluster_clients(distances(dtype), 2)
    assert found[0] == found[1] != found[2] == found[3] == found[4]
    assert p.cluster_clients(distances(dtype)[:1, :1], 2) == [0]
    return torch.tensor(found),


def use_edges(p, dtype):
    latency = torch.tensor([[1., 9], [2, 9], [9, 1], [9, 2], [40, 60]], dtype=dtype)
    found = p.assign_edges([0, 0, 1, 1, 1], distances(dtype), latency, tau_max=50)
    assert found == [0, 0, 1, 1, 0]  # the last is too far from its cluster's edge
    return torch.tensor(found),


class Blocks:
    """The least that exact_idleness and block_usefulness ask of a model."""

    def __init__(self, dtype):
        self.block, self.values = torch.tensor([0, 0, 1]), number(3, 4, seed=5, dtype=dtype)

    @property
    def rows(self):
        return [torch.nonzero(self.block == b)[:, 0] for b in range(3)]

    def place(self, block):
        self.block = block.clone()

    def __call__(self, tokens):
        return tokens + self.values[self.block >= 0].sum(0)


def use_measured(p, dtype):
    model, tokens, labels = Blocks(dtype), number(6, 4, dtype=dtype), torch.arange(6) % 4
    scores = p.exact_idleness(model, tokens, labels)
    useful = p.block_usefulness(model, tokens, labels)
    without = F.cross_entropy(tokens + model.values[:2].sum(0), labels)
    assert abs(F.cross_entropy(model(tokens), labels) - without - scores[2]) < 1e-5
    assert abs(scores[2] + useful[1]) < 1e-5 and useful[2] == 0
    assert p.planned_moves([2, 2, 2, 2], torch.tensor([.5, .25, .25, 0.]), 8) == [(3, 0), (3, 0)]
    return scores, useful


def use_quantise(p, dtype):
    torch.manual_seed(0)
    x = torch.cat([number(500, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype)])
    x[0] = x[0] * 2 ** -10  # small, as gradients are: nothing of it may become 0 / 0
    found = p.quantise(x, 8)
    step = x.abs().amax(-1, keepdim=True).double() / 127
    assert ((found.double() - x.double()).abs() <= step * 1.0001 + x.abs().double() * 2 ** -8).all()
    assert found[-1].eq(0).all() and found.dtype == dtype
    assert ((found - x).double() / step.clamp(min=1e-30))[:-1].mean().abs() < .03  # unbiased
    with pytest.raises(ValueError, match="2 or more"):
        p.quantise(x, 1)
    return ()


def use_attacks(p, dtype):
    words, turn = number(30, 6, dtype=dtype), torch.linalg.qr(randn(6, 6, seed=1))[0].to(dtype)
    states = words @ turn
    inverter = p.fit_inverter(states, words, ridge=1e-9)
    assert p.invert(states, inverter, words)[:, 0].equal(torch.arange(30))
    found = p.procrustes(words, states, prior=1e-6)
    assert (found - turn).abs().max() < 1e-3
    return inverter, found


def prompt_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    tower = tiny_clip(torch.float64).to(dtype)
    module = p.PromptLearner(tower, tokens_of([[7], [8, 9, 10]], vocabulary=60))
    with torch.no_grad():
        module.ctx.copy_(number(4, 32, seed=seed, dtype=module.ctx.dtype))
    return module, lambda m: [m()]


def lora_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    module = p.AttentionLoRA(nn.MultiheadAttention(8, 2, batch_first=True).to(dtype), rank=2)
    with torch.no_grad():
        for i in range(3):
            module.up[i].copy_(number(8, 2, seed=10 * seed + i))
            module.down[i].copy_(number(2, 8, seed=100 + 10 * seed + i))
        module.attention.in_proj_weight.copy_(number(24, 8, seed=30 + seed, scale=.3))
        module.attention.out_proj.weight.copy_(number(8, 8, seed=31 + seed, scale=.3))
    x = number(2, 5, 8, seed=7)
    return module.eval(), lambda m: [self_attention(m, x.to(m.attention.in_proj_weight))]


def like(module):
    return next(iter([*module.parameters(), *(b for b in module.buffers() if
                                              b.is_floating_point())]))


def adapter_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    module, x = p.FeatureAdapter(8).to(dtype), number(3, 8, seed=7)
    with torch.no_grad():
        for i, w in enumerate(module.parameters()):
            w.copy_(number(*w.shape, seed=i + 10 * seed))
    return module, lambda m: [m(x.to(like(m)))]


def tuned_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    clip = tiny_clip(torch.float64).to(dtype)
    module = p.TunedCLIP(clip, "lora", number(4, 16, dtype=dtype), rank=2)
    drawn = module.draw()
    with torch.no_grad():
        for i, (name, t) in enumerate(drawn.items()):
            module.get_parameter(name).copy_(number(*t.shape, seed=i + seed, scale=.1))
    for kind in ("prompt", "adapter"):
        other = p.TunedCLIP(clip, kind, number(2, 16, dtype=dtype), tokens_of([[7], [8, 9]]))
        assert other(number(3, 16, dtype=dtype)).shape == (3, 2)
    return module, lambda m: [m(number(3, 3, 16, 16, seed=3).to(like(m)))]


def copsl_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    assert issubclass(p.PSL, p.CoPSL)
    module, x = p.CoPSL(2, [3, 5], width=16).to(dtype), number(1, 4, 2, seed=7).abs()
    with torch.no_grad():
        for i, w in enumerate(module.parameters()):
            w.copy_(number(*w.shape, seed=i + 10 * seed, scale=.3))

    def call(m):
        h = m.read(x.to(like(m)))
        solutions = m.solve(h)
        if h.requires_grad:
            losses = torch.stack([s.square().sum((1, 2)) for s in solutions], 1)  # (S, K)
            return [*solutions, m.shared_gradient_norms(x.to(like(m)), h, losses)]
        return solutions
    return module, call


def coaction_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    module = p.CoAction([2, 3], [3, 5], width=16, layers=2, heads=2).to(dtype)
    with torch.no_grad():
        for i, w in enumerate(module.parameters()):
            w.copy_(number(*w.shape, seed=i + 100 * seed, scale=.3))
    with pytest.raises(ValueError, match="not a multiple of heads"):
        p.CoAction([2, 3], [3, 5], width=18, heads=4)
    x = [number(1, 4, m, seed=7).abs() for m in (2, 3)]
    return module, lambda m: m([t.to(like(m)) for t in x])


def prompted_of(p, dtype, seed=0):
    torch.manual_seed(seed)
    counts = [1, 2, 3] if seed == 0 else [2, 2, 2]
    module = p.PromptedViT(tiny_vit(seed=seed).to(torch.bfloat16).to(dtype), 4, counts)
    with torch.no_grad():
        module.prompts.copy_(number(6, 32, seed=8 + seed))
        module.head.weight.copy_(number(4, 32, seed=9 + seed, scale=.2))
    pixels = number(2, 3, 16, 16, seed=7)
    return module, lambda m: [m(pixels), m(m.embed(pixels))]


def split_of(p, dtype, seed=0):
    from test_elsa import bert, texts
    encoder, (ids, mask, _) = bert(dtype, layers=2, lora=False).encoder, texts(True)
    torch.manual_seed(seed)
    module = p.SplitEncoder(encoder, 3).to(dtype).eval()
    with torch.no_grad():
        for i, w in enumerate(module.head.parameters()):
            w.copy_(number(*w.shape, seed=i + 10 * seed))
    return module, lambda m: [m(ids, mask, (1, 2))]


def sketch_of(recovery):
    def make(p, dtype, seed=0):
        g = torch.Generator().manual_seed(seed)
        module, x = p.CountSketch(12, .5, 3, recovery, g).to(dtype), number(5, 12, seed=7)

        def call(m):
            received, size = m(x.to(m.matrix))
            assert size == 5 * 6 * m.matrix.element_size()
            return [received, m.encode(x.to(m.matrix))]
        return module, call
    return make


def rotation_of(p, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(randn(12, 4, seed=seed))[0].bfloat16()
    turn = p.SubspaceRotation.random_turn(4, g).bfloat16()
    module = p.SubspaceRotation(basis.to(dtype), turn.to(dtype))
    return module, lambda m: [m.rotate(number(5, 12, seed=7).to(m.basis)),
                              m.unrotate(number(5, 12, seed=7).to(m.basis))]


def projection_of(p, dtype, seed=0):
    basis = torch.linalg.qr(randn(12, 4, seed=seed))[0].bfloat16()

    def call(m):
        received, size = m(number(5, 12, seed=7).to(m.basis))
        assert size == 5 * 4 * m.basis.element_size()
        return [received]
    return p.Projection(basis.to(dtype)), call


USES = {
    "tkl_loss": use_tkl, "purify_gradient": use_purify, "fedavg": use_fedavg,
    "residual_loss": use_residual, "class_token_features": use_class_token,
    "scalarize": use_scalarize, "gradnorm_weights": use_gradnorm, "clip_gradients": use_clip,
    "even_preferences": use_preferences("even_preferences"),
    "dirichlet_preferences": use_preferences("dirichlet_preferences"), "update_range": use_range,
    "idleness_scores": use_idleness, "relocate": use_relocate,
    "PPOAllocator": use_ppo, "ThompsonAllocator": use_thompson, "Link": use_link,
    "gaussian_fingerprint": use_fingerprint, "trust_scores": use_trust,
    "cluster_clients": use_clusters, "assign_edges": use_edges, "exact_idleness": use_measured,
    "quantise": use_quantise, "fit_inverter": use_attacks}
MODULES = {
    "PromptLearner": [prompt_of], "AttentionLoRA": [lora_of], "FeatureAdapter": [adapter_of],
    "TunedCLIP": [tuned_of], "CoPSL": [copsl_of], "CoAction": [coaction_of],
    "PromptedViT": [prompted_of], "SplitEncoder": [split_of],
    "CountSketch": [sketch_of(r) for r in ("median", "mean", "lsq")],
    "SubspaceRotation": [rotation_of], "Projection": [projection_of]}


# Rows whose docstrings promise one type whatever goes in
FIXED = {"gaussian_fingerprint": torch.float64, "trust_scores": torch.float64,
         "PPOAllocator": torch.float32, "ThompsonAllocator": torch.float32,
         "exact_idleness": torch.float32, "cluster_clients": torch.int64,
         "assign_edges": torch.int64}


def use(row, pasted, dtype):
    """Call everything of a row -> tensors."""
    if row.names[0] in USES:
        return USES[row.names[0]](pasted, dtype)
    found = []
    for make in MODULES[row.names[0]]:
        module, call = make(pasted, dtype)
        found += call(module)
    return [t.detach() for t in found]


def assert_near(found, wanted, bound):
    """No number is farther off than `bound` times the largest of its tensor."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.isfinite().all()
        assert (a.double() - b.double()).abs().max() <= bound * max(b.abs().max().item(), 1e-3)


def test_every_row_has_a_use_and_no_name_stands_in_two_files():
    assert {r.names[0] for r in ROWS} == USES.keys() | MODULES.keys()
    assert not USES.keys() & MODULES.keys() and len(ROWS) == len(USES) + len(MODULES)
    files = {}
    for row in ROWS:
        for name in row.names:
            assert files.setdefault(name, row.file) == row.file


@pytest.mark.parametrize("row, dtype", [(r, t) for r in ROWS for t in r.dtypes], ids=str)
def test_a_row_runs_alone(row, dtype):
    """As the file's own to the bit, in the type that went in, near what float64 says."""
    pasted = paste(row)
    found = use(row, pasted, dtype)
    own = use(row, original(row), dtype)
    assert len(found) == len(own) and all(a.equal(b) for a, b in zip(found, own, strict=True))
    exact = use(row, pasted, torch.float64)
    assert_near(found, exact, ROUNDING[dtype])
    assert {t.dtype for t in found} <= {dtype, FIXED.get(row.names[0], dtype)}


LEFT_OUT = [(r, name) for r in ROWS for name in r.names if len(r.names) > 1]


@pytest.mark.parametrize("row, name", LEFT_OUT, ids=str)
def test_a_row_without_one_of_its_names_fails(row, name):
    with pytest.raises((NameError, AttributeError), match=name):
        use(row, paste(row, without=name), torch.float32)


def test_a_row_without_one_of_its_imports_fails():
    for row in ROWS:
        for word in row.imports:
            less = copy.copy(row)
            less.imports = [w for w in row.imports if w != word]
            with pytest.raises((NameError, AssertionError)):
                use(less, paste(less), torch.float32)


MAKERS = [(r, m) for r in ROWS for m in MODULES.get(r.names[0], [])]


@pytest.mark.parametrize("row, make", MAKERS, ids=[str(r) for r, _ in MAKERS])
def test_a_module_is_copied_saved_and_moved(row, make):
    pasted = paste(row)
    module, call = make(pasted, torch.float32)
    found = [t.detach() for t in call(module)]
    # after a forward and a backward pass, with the graph still there
    twin = copy.deepcopy(module)
    assert all(a.equal(b) for a, b in zip(found, call(twin), strict=True))
    other, call_other = make(pasted, torch.float32, seed=1)
    before = call_other(other)
    assert not all(a.equal(b) for a, b in zip(found, before, strict=True))
    other.load_state_dict(module.state_dict())
    assert all(a.equal(b) for a, b in zip(found, call(other), strict=True))
    for dtype in row.dtypes:
        moved = copy.deepcopy(module).to(dtype)
        assert {t.dtype for t in [*moved.parameters(), *moved.buffers()]
                if t.is_floating_point()} == {dtype}
        again = call(moved)
        assert all(t.dtype == dtype for t in again)
        assert_near(again, found, 4 * max(ROUNDING[dtype], ROUNDING[torch.float32]))
    there = copy.deepcopy(module).to("meta")
    assert all(t.is_meta for t in [*there.parameters(), *there.buffers()])


DANGLING = re.compile(r"finding \d|DEVIATION|UNSPECIFIED|--\w|README|RESULTS|benchmarks|beyond/"
                      r"|\(?\bE\d[a-d]?\b|see (Cost|Results|the header)|official recipe")


def docstrings(source):
    """Name -> docstring of every function, class and method."""
    return {node.name: ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_is_pasted_says_what_it_fits_and_points_at_nothing_else(row):
    said = docstrings(cut(row.file, row.names))
    assert "\nFits: " in said[row.names[0]] or " Fits: " in said[row.names[0]]
    assert not [text for text in said.values() if DANGLING.search(text)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_docstring_of_a_method_section_points_out_of_it(script):
    said = docstrings(method_section(ROOT / script))
    assert len(said) > 10 and not [text for text in said.values() if DANGLING.search(text)]


def test_foreign_names_are_found():
    source = ("K = 2\ndef f(x):\n    return [torch.exp(x) + common.y + K for _ in range(2)]\n"
              "class A:\n    def g(self, args):\n        return f(args.z) + LIMIT\n")
    assert foreign_names(source, {"torch"}) == {"common", "LIMIT"}
    assert foreign_names("def f():\n    import data\n    return data", set()) == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_whole_method_section_can_be_pasted(script):
    """Under torch's imports; three functions of ELSA import the slow libraries that they need."""
    source = method_section(ROOT / script)
    assert foreign_names(source, set(IMPORTS)) == set()
    found = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.module.partition(".")[0] for n in found} == (
        {"scipy", "transformers"} if script == "elsa.py" else set())
    assert all(n.col_offset > 0 for n in found)
    exec(compile(source, "pasted", "exec"), dict(IMPORTS))


# ================================================================================================
# What went wrong when pieces were pasted
# ================================================================================================


def lora_and_merged(batch_first=True, bias=True, dtype=torch.float64):
    """AttentionLoRA with updates that matter, and the nn.MultiheadAttention it amounts to."""
    torch.manual_seed(1)
    own = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias, dtype=dtype).eval()
    for i, w in enumerate(own.parameters()):
        nn.init.normal_(w, std=.5, generator=torch.Generator().manual_seed(i))
    merged, lora = copy.deepcopy(own), fedpurel.AttentionLoRA(own, rank=4, alpha=6).eval()
    with torch.no_grad():
        for i in range(3):
            lora.up[i].copy_(randn(12, 4, seed=10 + i))
        update = torch.cat([b @ a for a, b in zip(lora.down, lora.up, strict=True)])
        merged.in_proj_weight += (6 / math.sqrt(4) * update).to(dtype)
    return lora, merged


N, M = 5, 7
BOOL = torch.ones(N, M, dtype=torch.bool).triu(1)  # True where nobody may look
PADDED = torch.tensor([[False] * M, [False] * (M - 2) + [True] * 2])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masks", [
    {}, {"attn_mask": BOOL}, {"attn_mask": randn(N, M, seed=5)}, {"key_padding_mask": PADDED},
    {"key_padding_mask": randn(2, M, seed=6)}, {"attn_mask": randn(2 * 3, N, M, seed=5)},
    {"attn_mask": BOOL.repeat(6, 1, 1), "key_padding_mask": PADDED},
    {"attn_mask": BOOL, "is_causal": True}], ids=lambda m: "-".join(m) or "none")
def test_lora_takes_the_arguments_of_multihead_attention(masks, bias, batch_first):
    lora, merged = lora_and_merged(batch_first, bias)
    x = [randn(2, n, 12, seed=i) for i, n in enumerate((N, M, M))]
    x = x if batch_first else [t.transpose(0, 1) for t in x]
    ours, none = lora(*x, need_weights=False, **masks)
    theirs = merged(*x, need_weights=False, **masks)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert none is None
    if masks:
        assert (ours - lora(*x)[0]).abs().max() > .01


def test_lora_by_itself_is_causal_where_no_mask_says_how():
    lora, merged = lora_and_merged()
    x = randn(2, N, 12)
    torch.testing.assert_close(
        lora(x, is_causal=True)[0], merged(x, x, x, attn_mask=BOOL[:, :N], need_weights=False)[0])


def test_lora_freezes_what_it_wraps_and_refuses_what_it_cannot_do():
    lora, _ = lora_and_merged()
    assert {n for n, p in lora.named_parameters() if p.requires_grad} == {
        f"{part}.{i}" for part in ("down", "up") for i in range(3)}
    with pytest.raises(ValueError, match="need_weights=False"):
        lora(randn(2, N, 12), need_weights=True)
    with pytest.raises(ValueError, match="3 dimensions"):
        lora(randn(N, 12))
    for options in ({"kdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="without bias_k and add_zero_attn"):
            fedpurel.AttentionLoRA(nn.MultiheadAttention(12, 3, **options))
    with pytest.raises(ValueError, match=r"expected an nn\.MultiheadAttention"):
        fedpurel.AttentionLoRA(nn.Linear(3, 3))


@pytest.mark.parametrize("dtype", HALF)
def test_lora_on_half_precision_trains_in_float32(dtype):
    """A and B keep the digits that small steps change; the attention stays what it was."""
    (lora, merged), x = lora_and_merged(dtype=dtype), randn(2, N, 12).to(dtype)
    assert {p.dtype for p in [*lora.down, *lora.up]} == {torch.float32}
    found = lora(x)[0]
    assert found.dtype == dtype
    assert_near([found], [merged(x, x, x)[0]], ROUNDING[dtype])
    found.float().sum().backward()
    assert lora.down[0].grad.dtype == torch.float32 and lora.down[0].grad.abs().max() > 0


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_lora_inside_torchs_own_encoder_layer(training, batch_first):
    """In eval mode that layer has a fused path, which reads the weights past forward."""
    lora, merged = lora_and_merged(batch_first)
    layer = nn.TransformerEncoderLayer(12, 3, 16, dropout=0, batch_first=batch_first,
                                       dtype=torch.float64).train(training)
    x, theirs = randn(2, 4, 12), copy.deepcopy(layer)
    layer.self_attn, theirs.self_attn = lora, merged
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)(x),
                                   nn.TransformerEncoder(theirs, 2, enable_nested_tensor=False)(x),
                                   rtol=0, atol=1e-10)


def words_as_context(learner, tower, tokens):
    """Give the learner the embedding of its words X: then it is the tower on `tokens`."""
    with torch.no_grad():
        learner.ctx.copy_(tower.token_embedding(tokens[0, 1:1 + len(learner.ctx)]))
        return learner()


TOKENS = tokens_of([[7], [8, 9, 10], [11, 12]])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16", "pure_bf16"])
def test_prompt_learner_on_a_tower_in_half_precision(precision):
    """open_clip's fp16 and bf16: blocks in half precision under float32 embeddings and norms."""
    dtype = torch.float16 if precision.endswith("fp16") else torch.bfloat16
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        16, {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        {"context_length": 77, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3},
        cast_dtype=None if precision.startswith("pure") else dtype).eval()
    if precision.startswith("pure"):
        clip.to(dtype)
    else:
        open_clip.convert_weights_to_lp(clip, dtype)
        assert clip.token_embedding.weight.dtype == torch.float32
    learner = fedpurel.PromptLearner(clip, TOKENS)
    assert learner.ctx.dtype == torch.float32  # what is trained
    found, wanted = words_as_context(learner, clip, TOKENS), clip.encode_text(TOKENS)
    assert found.dtype == wanted.dtype == dtype
    assert_near([found], [wanted], ROUNDING[dtype])
    learner().float().square().sum().backward()
    assert learner.ctx.grad.isfinite().all() and learner.ctx.grad.abs().max() > 0


def test_prompt_learner_reads_a_text_where_its_tower_does():
    """pool_type eos: at the first end of text, here not the largest id."""
    clip = tiny_clip(pool_type="eos", eos_id=40)
    tokens = torch.where(TOKENS == 59, 40, TOKENS)
    torch.testing.assert_close(words_as_context(fedpurel.PromptLearner(clip, tokens), clip, tokens),
                               clip.encode_text(tokens), rtol=0, atol=1e-12)


def test_prompt_learner_on_the_text_tower_of_a_custom_clip():
    torch.manual_seed(0)
    clip = open_clip.CustomTextCLIP(
        16, {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        {"context_length": 77, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}).eval()
    learner = fedpurel.PromptLearner(clip.text, TOKENS)
    torch.testing.assert_close(words_as_context(learner, clip.text, TOKENS),
                               clip.encode_text(TOKENS), rtol=0, atol=1e-5)
    assert [n for n, p in learner.named_parameters() if p.requires_grad] == ["ctx"]


def coca():
    return open_clip.transformer.TextTransformer(
        context_length=20, vocab_size=60, width=32, heads=2, layers=1, embed_cls=True, pad_id=0)


@pytest.mark.parametrize("tower, tokens, n_ctx, words", [
    (lambda: tiny_clip(no_causal_mask=True), TOKENS, 4, "not causal"),
    (lambda: tiny_clip(pool_type="last"), TOKENS, 4, "not read at its end of text, but at 'last'"),
    (coca, TOKENS[:, :20], 4, "class token of its own"),
    (lambda: tiny_clip(qk_norm=True, block_type="custom"), TOKENS, 4, "MultiheadAttention"),
    (lambda: transformers.CLIPTextModel(clip_config().text_config), TOKENS, 4, "open_clip"),
    (tiny_clip, F.pad(TOKENS, (0, 3)), 4, "positions for 80 tokens"),
    (tiny_clip, TOKENS, 5, "begin alike"),  # 4 words X: a name would be overwritten
    (lambda: tiny_clip(), TOKENS[:1, :6], 7, "begin alike"),
], ids=["bidirectional", "last", "class token", "other blocks", "transformers", "too long",
        "too few words", "no end"])
def test_prompt_learner_refuses_what_it_would_get_wrong(tower, tokens, n_ctx, words):
    with pytest.raises(ValueError, match=words):
        fedpurel.PromptLearner(tower(), tokens, n_ctx)


def prompted(counts=(1, 2, 3), seed=0):
    torch.manual_seed(seed)
    return pro_vpt.PromptedViT(tiny_vit().double(), 4, list(counts))


PIXELS = randn(2, 3, 16, 16, seed=4)


def test_a_state_dict_knows_where_the_prompts_stand():
    model, other = prompted(), prompted((2, 2, 2), seed=1)
    other.load_state_dict(model.state_dict())
    assert other.counts() == [1, 2, 3] and other(PIXELS).equal(model(PIXELS))
    with pytest.raises(RuntimeError, match="size mismatch for prompts"):
        prompted((2, 2, 3)).load_state_dict(model.state_dict())
    older = {n: t for n, t in model.state_dict().items() if n != "block"}
    with pytest.raises(RuntimeError, match=r'Missing key.*"block"'):
        other.load_state_dict(older)
    assigned = prompted((2, 2, 2), seed=1)
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert assigned(PIXELS).equal(model(PIXELS))


def test_a_relocated_prompt_has_moved():
    model, placed = prompted(), prompted()
    before, twin = model(PIXELS), copy.deepcopy(model)
    pro_vpt.relocate(model.prompts, model.block, 0, 2)
    assert model.counts() == [0, 2, 4] and not model(PIXELS).equal(before)
    pro_vpt.relocate(placed.prompts, placed.block, 0, 2)
    placed.place(placed.block)
    assert model(PIXELS).equal(placed(PIXELS))
    assert twin(PIXELS).equal(before) and twin.counts() == [1, 2, 3]  # a copy stays where it was
    pro_vpt.relocate(twin.prompts, twin.block, 0, 2)
    assert twin(PIXELS).equal(model(PIXELS))
    model.block[:] = -1
    assert model.counts() == [0, 0, 0]
    there = torch.func.functional_call(model, {"block": placed.block}, (PIXELS,))
    assert there.equal(placed(PIXELS)) and model.counts() == [0, 0, 0]


def test_pixels_and_tokens_are_told_apart():
    model = prompted()
    assert model(PIXELS).equal(model(model.embed(PIXELS)))
    assert model(PIXELS.float()).equal(model(PIXELS.float().double()))  # cast as the host does


@pytest.mark.parametrize("model, words", [
    ("BeitModel", r"lambda_1 of a block"), ("IJepaModel", "cls_token"),
    ("Dinov2Model", "expected a transformers.ViTModel")])
def test_prompted_vit_refuses_other_towers(model, words):
    kind = getattr(transformers, model)
    config = kind.config_class(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=64, image_size=16, patch_size=8)
    with pytest.raises(ValueError, match=words):
        pro_vpt.PromptedViT(kind(config), 4, [2])


@pytest.mark.parametrize("model", ["DeiTModel", "ViTMSNModel"])
def test_prompted_vit_fits_the_vits_that_it_names(model):
    kind = getattr(transformers, model)
    torch.manual_seed(0)
    vit = kind(kind.config_class(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 intermediate_size=64, image_size=16, patch_size=8)).double().eval()
    ours = pro_vpt.PromptedViT(vit, 4, [0, 0])
    own = vit(pixel_values=PIXELS).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.features(ours.embed(PIXELS)), own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_both_scripts_average_alike(dtype):
    assert use_fedavg(elsa, dtype)[0].equal(use_fedavg(fedpurel, dtype)[0])


def test_a_rotation_in_float32_turns_half_precision_back():
    turn = elsa.SubspaceRotation.random_turn(4, torch.Generator().manual_seed(0))
    rotation = elsa.SubspaceRotation(torch.linalg.qr(randn(12, 4).float())[0], turn)
    for dtype in HALF:
        h = number(5, 12, seed=7, dtype=dtype)
        assert_near([rotation.unrotate(rotation.rotate(h))], [h], ROUNDING[dtype])


def test_a_sketch_says_what_is_wrong():
    with pytest.raises(ValueError, match="recovery 'mode': expected median, mean or lsq"):
        elsa.CountSketch(12, .5, 3, "mode")
    with pytest.raises(ValueError, match="no bucket"):
        elsa.CountSketch(12, .1, 3)


# ================================================================================================
# Shims: README's own code
# ================================================================================================


def shims():
    """The names that README's code blocks under "Shims" define."""
    section = (ROOT / "README.md").read_text().split("### Shims")[1].split("\n## ")[0]
    given = {"__name__": "shims"}
    for block in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(compile(block, "README.md", "exec"), given)
    return types.SimpleNamespace(**{n: v for n, v in given.items() if not n.startswith("__")})


def clip_config():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    return transformers.CLIPConfig(
        text_config={**small, "vocab_size": 60, "eos_token_id": 59, "bos_token_id": 58},
        vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16)


def shaken(model, seed=0):
    """Every tensor moved by a fifth of a normal draw, so that no bias and no scale is trivial."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.2 * torch.randn(p.shape, generator=g))
    return model.eval()


def test_prompt_learner_on_a_clip_of_transformers():
    torch.manual_seed(0)
    model = shaken(transformers.CLIPModel(clip_config()))
    host = shims().clip_names(model)
    learner = fedpurel.PromptLearner(host, TOKENS)
    with torch.no_grad():
        wanted = model.get_text_features(input_ids=TOKENS)
        wanted = getattr(wanted, "pooler_output", wanted)
    torch.testing.assert_close(words_as_context(learner, host, TOKENS), wanted, rtol=0, atol=1e-5)
    assert wanted.abs().max() > .1


@pytest.mark.parametrize("swiglu", [False, True])
def test_prompted_vit_on_dinov2(swiglu):
    torch.manual_seed(0)
    host = shaken(transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        use_swiglu_ffn=swiglu)))
    compare_vit(lambda x: host(pixel_values=x).last_hidden_state[:, 0],
                shims().dinov2_names(host), host.encoder.layer, host.layernorm)


@pytest.mark.parametrize("options", [{}, {"init_values": .5}, {"reg_tokens": 2},
                                     {"no_embed_class": True, "pre_norm": True},
                                     {"qkv_bias": False}], ids=str)
def test_prompted_vit_on_timm(options):
    torch.manual_seed(0)
    host = shaken(timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        global_pool="token", **options))
    compare_vit(lambda x: host.forward_features(x)[:, 0], shims().timm_names(host), host.blocks,
                host.norm)


def compare_vit(features, shim, blocks, norm):
    """Without prompts the host's own features; with prompts its own blocks on longer sequences."""
    with torch.no_grad():
        bare = pro_vpt.PromptedViT(shim, 4, [0, 0])
        wanted = features(PIXELS.float())
        torch.testing.assert_close(bare.features(bare.embed(PIXELS)), wanted, rtol=0, atol=1e-5)
        model = pro_vpt.PromptedViT(shim, 4, [1, 2])
        model.prompts.normal_(std=1.0)
        x = model.embed(PIXELS)
        for block, rows in zip(blocks, model.rows, strict=True):
            length, p = x.shape[1], model.prompts[rows].expand(len(x), -1, -1)
            x = block(torch.cat([x, p], 1))[:, :length]
        prompted = model.features(model.embed(PIXELS))
    torch.testing.assert_close(prompted, norm(x)[:, 0], rtol=0, atol=1e-5)
    assert (prompted - wanted).abs().max() > .01
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "prompts", "head.weight", "head.bias"]


def test_a_prompted_vit_under_transformers_trainer(tmp_path):
    """Two steps of SGD by the Trainer are two steps by hand."""
    ours, theirs = (prompted().float() for _ in range(2))
    pixels, labels = randn(4, 3, 16, 16, dtype=torch.float32), torch.arange(4)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=.1,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    model = shims().ForTrainer(theirs)
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train()
    assert not theirs.vit.training
    optimizer = torch.optim.SGD(ours.trainable().values(), .1)
    start = ours.prompts.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(ours(pixels), labels).backward()
        optimizer.step()
    for name, p in ours.trainable().items():
        torch.testing.assert_close(theirs.get_parameter(name), p, rtol=0, atol=1e-6)
    assert (ours.prompts - start).abs().max() > 1e-4
    found = trainer.predict(rows)
    torch.testing.assert_close(torch.tensor(found.predictions), ours(pixels).detach(), rtol=0,
                               atol=1e-5)
    assert set(model(pixels[:1])) == {"logits"}


# ================================================================================================
# A worked example: Flower
#
# flwr brings 30 packages, so its two interfaces are spoken by hand: a client has the methods of
# flwr.client.NumPyClient, the strategy those of flwr.server.strategy.Strategy, with lists of numpy
# arrays where Flower wraps them in Parameters. All that learns or decides is pasted from rows.
# ================================================================================================


def pasted(*names):
    """Rows of the table by their first names, each pasted by itself -> all their names."""
    found = {}
    for row in ROWS:
        if row.names[0] in names:
            found |= vars(paste(row))
    return types.SimpleNamespace(**found)


OURS = pasted("purify_gradient", "tkl_loss", "fedavg", "gaussian_fingerprint", "trust_scores",
              "cluster_clients", "assign_edges")
CLASSES, WIDTH = 4, 12
# An image feature has two halves. The zero-shot weights read the first, in which there is much
# noise. The second tells the classes well, but in the two domains it means different ones.
NOISE = torch.tensor([1.5] * 6 + [.2] * 6)
ZERO_SHOT = F.pad(randn(CLASSES, 6, seed=1), (0, 6))
SIGNS = F.pad(2 * randn(CLASSES, 6, seed=2), (6, 0))
DOMAINS = {"near": ZERO_SHOT + SIGNS, "turned": ZERO_SHOT + SIGNS[[1, 0, 3, 2]]}
PROBES = SIGNS.repeat_interleave(6, 0) + .2 * randn(24, WIDTH, seed=3)


class ToyClient:
    """A NumPyClient: a linear classifier tuned from zero-shot weights, purified at every step."""

    def __init__(self, domain, sizes, seed, poisoned=False):
        self.y = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(sizes))
        self.x = DOMAINS[domain][self.y] + NOISE * randn(len(self.y), WIDTH, seed=seed)
        if poisoned:
            self.y = (self.y + 1 + torch.arange(len(self.y)) % 3) % CLASSES
        self.weight, self.against = torch.zeros(CLASSES, WIDTH, dtype=torch.float64), []

    def get_parameters(self, config):
        return [self.weight.numpy()]

    def fit(self, parameters, config):
        weight = torch.tensor(parameters[0]).requires_grad_()
        z = self.x @ ZERO_SHOT.T
        for _ in range(config["steps"]):
            f = self.x @ (ZERO_SHOT + weight).T
            g_task, = torch.autograd.grad(F.cross_entropy(f, self.y), weight, retain_graph=True)
            g_align, = torch.autograd.grad(OURS.tkl_loss(z, f), weight)
            step = OURS.purify_gradient(g_task, g_align)
            self.against.append(((g_task * g_align).sum().item(), (step * g_align).sum().item()))
            weight = (weight - config["lr"] * step).detach().requires_grad_()
        self.weight = weight.detach()
        # Flower's metrics are numbers and bytes
        probes = (PROBES @ (ZERO_SHOT + self.weight).T).softmax(-1)
        return self.get_parameters({}), len(self.y), {"probes": probes.numpy().tobytes()}

    def evaluate(self, parameters, config):
        logits = self.x @ (ZERO_SHOT + torch.tensor(parameters[0])).T
        accuracy = (logits.argmax(-1) == self.y).double().mean().item()
        return F.cross_entropy(logits, self.y).item(), len(self.y), {"accuracy": accuracy}


class GroupedFedAvg:
    """A Strategy: after the first round clients are filtered by trust and given to edges, and from
    then on every edge averages its own."""

    def __init__(self, latency):
        self.latency, self.edge, self.weights, self.trust = latency, {}, {}, None

    def initialize_parameters(self, client_manager):
        return [torch.zeros(CLASSES, WIDTH, dtype=torch.float64).numpy()]

    def configure_fit(self, server_round, parameters, client_manager):
        config = {"steps": 30, "lr": .5}
        clients = client_manager if server_round == 1 else {k: client_manager[k] for k in self.edge}
        return [(k, self.weights.get(self.edge.get(k), parameters), config) for k in clients]

    def aggregate_fit(self, server_round, results, failures):
        states = {k: {"weight": torch.tensor(arrays[0])} for k, (arrays, _, _) in results}
        sizes = {k: n for k, (_, n, _) in results}
        if server_round == 1:
            self._group({k: metrics["probes"] for k, (_, _, metrics) in results})
        for e in set(self.edge.values()):
            members = [k for k in states if self.edge.get(k) == e]
            mean = OURS.fedavg([states[k] for k in members], [sizes[k] for k in members])
            self.weights[e] = [mean["weight"].numpy()]
        members = [k for k in states if k in self.edge]
        cloud = OURS.fedavg([states[k] for k in members], [sizes[k] for k in members])
        return [cloud["weight"].numpy()], {"edges": len(set(self.edge.values()))}

    def _group(self, sent):
        names = list(sent)
        said = torch.stack([torch.frombuffer(bytearray(sent[k]), dtype=torch.float64)
                            .view(-1, CLASSES) for k in names])  # (N, Q, C)
        pooled = said.flatten(0, 1)
        basis = OURS.principal_directions(pooled - pooled.mean(0), CLASSES - 1)
        prints = [OURS.gaussian_fingerprint(s, basis) for s in said]
        distance = torch.stack([torch.stack([OURS.symmetric_kl(a, b) for b in prints])
                                for a in prints])
        distance = ((distance + distance.T) / 2).fill_diagonal_(0)
        self.trust = OURS.trust_scores(distance, said, neighbours=2)
        keep = [i for i, t in enumerate(self.trust) if t >= .6 * self.trust.median()]
        distance, latency = distance[keep][:, keep], self.latency[keep]
        labels = OURS.cluster_clients(distance, 2)
        edges = OURS.assign_edges(labels, distance, latency)
        self.edge = {names[i]: e for i, e in zip(keep, edges, strict=True)}


def test_a_flower_federation_from_pasted_pieces():
    sizes = [[30, 20, 20, 15], [15, 30, 25, 20], [20, 15, 30, 25]]
    clients = {f"{domain} {i}": ToyClient(domain, s, 10 * d + i) for d, domain in
               enumerate(DOMAINS, 1) for i, s in enumerate(sizes)}
    clients["poisoned"] = ToyClient("near", sizes[0], 30, poisoned=True)
    strategy = GroupedFedAvg(torch.tensor([[1., 50]] * 3 + [[60, 2]] * 3 + [[1, 1]]))
    parameters = strategy.initialize_parameters(clients)
    for server_round in (1, 2):
        asked = strategy.configure_fit(server_round, parameters, clients)
        results = [(k, clients[k].fit(arrays, config)) for k, arrays, config in asked]
        parameters, metrics = strategy.aggregate_fit(server_round, results, [])
    # the liar is left out, and the domains went to their own, nearer edges
    assert strategy.trust.argmin() == 6 and "poisoned" not in strategy.edge
    assert strategy.edge == {f"{d} {i}": e for e, d in enumerate(DOMAINS) for i in range(3)}
    assert metrics == {"edges": 2} and len(results) == 6
    # an edge is the mean of its clients by their images, the cloud that of all
    for e, domain in enumerate(DOMAINS):
        sent = {k: arrays[0] for k, (arrays, _, _) in results if k.startswith(domain)}
        n = [len(clients[k].y) for k in sent]
        wanted = sum(w * t for w, t in zip(n, sent.values(), strict=True)) / sum(n)
        torch.testing.assert_close(torch.tensor(strategy.weights[e][0]), torch.tensor(wanted))
    # no step went against the zero-shot opinion, though labels asked for it
    steps = [s for c in clients.values() for s in c.against]
    assert min(task for task, _ in steps) < -1e-3 and min(step for _, step in steps) > -1e-12
    # and every client is served better by its own edge than by the average of all
    for name, e in strategy.edge.items():
        own, of_all = (clients[name].evaluate(w, {}) for w in (strategy.weights[e], parameters))
        assert own[0] < of_all[0] and own[2]["accuracy"] > .9
