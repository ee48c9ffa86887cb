"""FedPuReL: equations against independent oracles, fast paths against the plain arrangement."""
import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from test_data import bert_tokenizer, small_clip

import common
import data
import fedpurel
from benchmarks import fedpurel_claims
from benchmarks import fedpurel_plain as plain
from tools import PATIENCE, ROOT, complaints, exit_code, faults, keep_figures, result, says_idle

KINDS = ["prompt", "lora", "adapter"]
CLASSES, CLIENT_SIZES, TEST_SIZES = 5, (10, 13, 3), (6, 5, 7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# ================================================================================================
# Equations
# ================================================================================================


def entropy_by_loop(p):
    return -sum(v * math.log(v) for v in p if v > 0)


def softmax_by_loop(row, tau):
    top = max(row)
    e = [math.exp((v - top) / tau) for v in row]
    return [v / sum(e) for v in e]


def test_entropy_is_the_sum_over_classes():
    p = randn(6, 7).softmax(-1)
    p[0] = torch.eye(7)[2]  # certain: 0 · log 0 = 0
    p[1] = 1 / 7
    expected = [entropy_by_loop(row) for row in p.tolist()]
    torch.testing.assert_close(fedpurel.entropy(p).tolist(), expected, rtol=0, atol=1e-12)
    assert fedpurel.entropy(p)[1].item() == pytest.approx(math.log(7))


def test_target_entropy_is_midway():
    z, f = 2 * randn(5, 4, seed=1), 3 * randn(5, 4, seed=2)
    by_hand = [[entropy_by_loop(softmax_by_loop(row, 1)) for row in a.tolist()] for a in (z, f)]
    expected = [(a + b) / 2 for a, b in zip(*by_hand, strict=True)]
    torch.testing.assert_close(fedpurel.target_entropy(z, f).tolist(), expected)


def reachable(rows=8, classes=10):
    """Logits, and target entropies that a temperature between 0.1 and 15 reaches."""
    logits = 3 * randn(rows, classes, seed=3)
    taus = torch.linspace(math.log(.1), math.log(15), rows).exp()
    target = [entropy_by_loop(softmax_by_loop(row, t.item()))
              for row, t in zip(logits.tolist(), taus, strict=True)]
    return logits, torch.tensor(target, dtype=torch.float64)


def test_temperature_equals_a_dense_grid_search_and_an_exact_bisection():
    logits, target = reachable()
    tau = fedpurel.alignment_temperature(logits, target).tolist()
    grid = torch.arange(.05, 20, 1e-3, dtype=torch.float64)
    for row, wanted, found in zip(logits, target.tolist(), tau, strict=True):
        on_grid = fedpurel.entropy((row / grid[:, None]).softmax(-1))
        assert found == pytest.approx(grid[(on_grid - wanted).abs().argmin()].item(), abs=1e-3)
        low, high = .05, 20.0
        for _ in range(100):
            middle = (low + high) / 2
            flat = entropy_by_loop(softmax_by_loop(row.tolist(), middle)) > wanted
            low, high = (low, middle) if flat else (middle, high)
        assert found == pytest.approx(low, abs=19.95 / 2 ** 21 + 1e-9)


def test_temperature_brings_the_entropy_to_the_target():
    logits, target = reachable()
    tau = fedpurel.alignment_temperature(logits, target)
    reached = fedpurel.entropy((logits / tau[:, None]).softmax(-1))
    assert (fedpurel.entropy(logits.softmax(-1)) - target).abs().min() > 1e-3
    torch.testing.assert_close(reached, target, rtol=0, atol=2e-4)


def test_temperature_of_an_unreachable_target_is_the_nearer_end():
    logits = randn(2, 6) * torch.tensor([[1.0], [100.0]])
    tau = fedpurel.alignment_temperature(logits, torch.tensor([-.1, 1.8]).double())
    torch.testing.assert_close(tau.tolist(), [.05, 20.0], rtol=0, atol=2e-5)


def test_temperature_does_not_depend_on_the_rest_of_the_batch():
    logits, target = reachable()
    alone = [fedpurel.alignment_temperature(a[None], t[None])
             for a, t in zip(logits, target, strict=True)]
    together = fedpurel.alignment_temperature(logits, target)
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)


def test_temperature_carries_no_gradient():
    logits, target = reachable()
    tau = fedpurel.alignment_temperature(logits.requires_grad_(), target.requires_grad_())
    assert not tau.requires_grad


@pytest.mark.parametrize("factor", [.3, 1.0, 4.0])
def test_tkl_sees_no_difference_in_confidence(factor):
    z = 2 * randn(6, 8)
    assert fedpurel.tkl_loss(z, factor * z).item() == pytest.approx(0, abs=1e-8)
    assert fedpurel.tkl_loss(z, factor * z.flip(-1)).item() > .1
    if factor != 1:
        assert fedpurel.kl_loss(z, factor * z).item() > .05


def test_tkl_equals_the_plain_one():
    z, f = 2 * randn(6, 8, seed=1), 3 * randn(6, 8, seed=2)
    assert fedpurel.tkl_loss(z, f).item() == pytest.approx(plain.plain_tkl(z, f).item(), abs=1e-12)


def test_tkl_gradient_goes_through_the_tuned_prediction_only():
    z, f = randn(3, 5, seed=1).requires_grad_(), 2 * randn(3, 5, seed=2)
    f.requires_grad_()
    grad_f, grad_z = torch.autograd.grad(fedpurel.tkl_loss(z, f), [f, z], allow_unused=True)
    assert grad_z is None
    target = fedpurel.target_entropy(z, f).detach()
    tau_z, tau_f = (fedpurel.alignment_temperature(a.detach(), target)[:, None] for a in (z, f))

    def frozen(moved):
        """TKL with H*, τ_z and τ_f as they were."""
        return F.kl_div((moved / tau_f).log_softmax(-1), (z / tau_z).softmax(-1),
                        reduction="batchmean").item()

    with torch.no_grad():
        for i in range(3):
            for c in range(5):
                step = torch.zeros(3, 5).double()
                step[i, c] = 1e-5
                slope = (frozen(f + step) - frozen(f - step)) / 2e-5
                assert grad_f[i, c].item() == pytest.approx(slope, abs=1e-8)


def test_kl_equals_torch_where_nothing_is_clamped():
    z, f = randn(4, 6, seed=1), randn(4, 6, seed=2).requires_grad_()
    expected = F.kl_div(f.log_softmax(-1), z.softmax(-1), reduction="batchmean")
    ours = fedpurel.kl_loss(z, f)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, f)[0] for loss in (ours, expected)))


def test_official_adapter_loss_by_hand():
    """Of 2 rows (½, ¼, ¼) against (¼, ¼, ½), and two that agree: ½ · (½ log 2 - ¼ log 2)."""
    z = torch.tensor([[.5, .25, .25], [.2, .3, .5]]).double().log().requires_grad_()
    f = torch.tensor([[.25, .25, .5], [.2, .3, .5]]).double().log() + torch.tensor([[3.0], [-7.0]])
    f.requires_grad_()
    loss = fedpurel.official_adapter_loss(z, f)
    assert loss.item() == pytest.approx(math.log(2) / 8, abs=1e-12)
    grad_f, grad_z = torch.autograd.grad(loss, [f, z], allow_unused=True)
    assert grad_z is None
    by_hand = torch.tensor([[-.125, 0, .125], [0, 0, 0]]).double()
    torch.testing.assert_close(grad_f, by_hand, rtol=0, atol=1e-12)


def test_official_adapter_loss_is_at_temperature_1():
    z = torch.tensor([[.5, .25, .25]]).double().log()  # twice as sure: (4, 1, 1) / 6
    value = fedpurel.official_adapter_loss(z, 2 * z).item()
    assert value == pytest.approx(.5 * math.log(.75) + .5 * math.log(1.5), abs=1e-12)
    assert fedpurel.tkl_loss(z, 2 * z).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_adapter_loss_has_a_gradient_where_the_clamp_has_none(dtype):
    z = torch.zeros(2, 2, dtype=dtype)
    f = torch.tensor([[0.0, 200.0], [0.0, 0.0]], dtype=dtype).requires_grad_()
    loss = fedpurel.official_adapter_loss(z, f)
    assert loss.item() == pytest.approx((100 - math.log(2)) / 2, rel=1e-6)
    assert torch.autograd.grad(loss, f)[0].tolist() == [[-.25, .25], [0, 0]]
    assert torch.autograd.grad(fedpurel.kl_loss(z, f), f)[0].abs().max() < 1e-6


@pytest.mark.parametrize("loss", [fedpurel.kl_loss, fedpurel.tkl_loss])
def test_huge_logits_stay_finite(loss):
    z = 1e4 * randn(4, 6, seed=1, dtype=torch.float32)
    f = (1e4 * randn(4, 6, seed=2, dtype=torch.float32)).requires_grad_()
    value = loss(z, f)
    assert value.isfinite() and 0 < value.item() <= -math.log(1e-12) + 1e-3
    assert torch.autograd.grad(value, f)[0].isfinite().all()


def test_purification_by_hand():
    align = torch.tensor([0.0, 2.0])
    same = torch.tensor([3.0, .5])
    assert fedpurel.purify_gradient(same, align).equal(same)
    right_angle = torch.tensor([3.0, 0.0])
    assert fedpurel.purify_gradient(right_angle, align).equal(right_angle)
    against = torch.tensor([3.0, -4.0])
    assert fedpurel.purify_gradient(against, align).tolist() == [3, 0]
    assert fedpurel.purify_gradient(against, align, .5).tolist() == [3, -2]
    assert fedpurel.purify_gradient(against, align, 0).equal(against)
    in_space = fedpurel.purify_gradient(torch.tensor([1.0, 0, -3]), torch.tensor([1.0, 1, 1]))
    torch.testing.assert_close(in_space, torch.tensor([1 + 2 / 3, 2 / 3, -3 + 2 / 3]))


def test_purified_gradient_is_orthogonal_in_conflict():
    align = randn(4, 5, seed=1)
    task = randn(4, 5, seed=2) - align
    assert (task * align).sum() < 0
    for strength in (0, .5, 1):
        purified = fedpurel.purify_gradient(task, align, strength)
        expected = (1 - strength) * (task * align).sum()
        torch.testing.assert_close((purified * align).sum(), expected, rtol=0, atol=1e-12)


def test_no_alignment_gradient_changes_nothing():
    task = randn(3, 2)
    assert fedpurel.purify_gradient(task, torch.zeros(3, 2).double()).equal(task)
    assert fedpurel.purify_gradient(torch.zeros(3, 2), torch.zeros(3, 2)).equal(torch.zeros(3, 2))
    task, tiny = torch.tensor([1.0, -2]), torch.tensor([-1e-30, 0])  # its square underflows to 0
    assert fedpurel.purify_gradient(task, tiny).equal(task)


def test_purification_is_per_tensor():
    """One tensor agrees, one conflicts: together they would be judged by the larger of the two."""
    task, align = [torch.tensor([5.0, 1]), torch.tensor([-1.0, 2])], [torch.tensor([1.0, 0])] * 2
    each = [fedpurel.purify_gradient(t, a) for t, a in zip(task, align, strict=True)]
    assert each[0].tolist() == [5, 1] and each[1].tolist() == [0, 2]
    joint = fedpurel.purify_gradient(torch.cat(task), torch.cat(align))
    assert joint.equal(torch.cat(task))


def test_a_small_purified_step_does_not_raise_the_alignment_loss():
    z = 2 * randn(8, 6, seed=2) + torch.arange(6)  # the first classes are the unlikely ones
    x = z + randn(8, 6, seed=1)
    weight, bias = .3 * torch.eye(6).double(), torch.zeros(6).double()
    f = x @ weight.requires_grad_() + bias.requires_grad_()
    target = fedpurel.target_entropy(z, f).detach()
    tau_z, tau_f = (fedpurel.alignment_temperature(a.detach(), target)[:, None] for a in (z, f))
    task = torch.autograd.grad(F.cross_entropy(f, z.argmin(-1)), [weight, bias], retain_graph=True)
    align = torch.autograd.grad(fedpurel.tkl_loss(z, f), [weight, bias])
    assert all((t * a).sum() < 0 for t, a in zip(task, align, strict=True))

    def rise(grads, lr=1e-7):
        """Of the alignment loss, temperatures held, after a step along -grads."""
        moved = x @ (weight - lr * grads[0]) + bias - lr * grads[1]
        after, before = (fedpurel.kl_loss(z / tau_z, a / tau_f) for a in (moved, f))
        return (after - before).item()

    purified = [fedpurel.purify_gradient(t, a) for t, a in zip(task, align, strict=True)]
    assert rise(task) > 1e-8
    assert abs(rise(purified)) < 1e-3 * rise(task)


def test_residual_loss_by_hand():
    l_G, l_P = torch.tensor([[2.0, 0, -1]]), torch.tensor([[-1.0, 1, 0]])
    labels = torch.tensor([1])
    fused = math.log(math.exp(1) + math.exp(1) + math.exp(-1)) - 1
    private = math.log(math.exp(-1) + math.exp(1) + math.exp(0)) - 1
    for lam in (0, .9, 1):
        value = fedpurel.residual_loss(l_G, l_P, labels, lam).item()
        assert value == pytest.approx((1 - lam) * fused + lam * private, rel=1e-5)


def test_residual_loss_trains_the_private_logits_only():
    l_G, l_P = randn(4, 3, seed=1).requires_grad_(), randn(4, 3, seed=2).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1])
    loss = fedpurel.residual_loss(l_G, l_P, labels, .7)
    grad_g, grad_p = torch.autograd.grad(loss, [l_G, l_P], allow_unused=True)
    hot = F.one_hot(labels, 3)
    expected = (.3 * ((l_G + l_P).softmax(-1) - hot) + .7 * (l_P.softmax(-1) - hot)) / 4
    assert grad_g is None
    torch.testing.assert_close(grad_p, expected.detach())


def test_fedavg_by_hand():
    states = [{"a": torch.tensor([1.0, 2]), "b": torch.tensor(0.0)},
              {"a": torch.tensor([5.0, -2]), "b": torch.tensor(4.0)}]
    mean = fedpurel.fedavg(states, [3, 1])
    assert mean["a"].tolist() == [2, 1] and mean["b"].item() == 1
    scaled = fedpurel.fedavg(states, [300, 100])
    assert all(scaled[n].equal(mean[n]) for n in mean)
    assert fedpurel.fedavg(states, [0, 7])["a"].tolist() == [5, -2]


def test_averaging_identical_clients_is_the_identity():
    state = {"a": randn(3, 4), "b": randn(2)}
    mean = fedpurel.fedavg([state] * 3, [10, 13, 3])
    assert mean.keys() == state.keys()
    for name in state:
        torch.testing.assert_close(mean[name], state[name], rtol=1e-14, atol=0)


# ================================================================================================
# Models
# ================================================================================================


def tiny_clip(dtype=torch.float64, quick_gelu=False, vocabulary=60, **text_options):
    """A random open_clip.CLIP with 77 tokens; every tensor moved, so that no bias is 0."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 77, "vocab_size": vocabulary, "width": 32, "heads": 2,
                  "layers": 3, **text_options},
        quick_gelu=quick_gelu)
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(.05 * torch.randn_like(p))
    return clip.to(dtype).requires_grad_(False).eval()


def tokens_of(names, n_ctx=4, vocabulary=60, length=77):
    """(C, length) ids of "start X ... X name end 0 ... 0"; a name is a list of ids."""
    rows = [[vocabulary - 2, *[1] * n_ctx, *name, vocabulary - 1] for name in names]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


NAMES = [[7], [8, 9, 10], [11, 12], [13], [7, 9, 14, 15, 16]]


def prompt_case(case, n_ctx, dtype):
    """A CLIP and its prompt tokens: plain, with other layers, with CLIP's own tokens."""
    if case == "tiny":
        return tiny_clip(dtype), tokens_of(NAMES, n_ctx)
    if case == "options":  # an nn.Linear projection with bias, layer scale
        return tiny_clip(dtype, proj_bias=True, ls_init_value=.5), tokens_of(NAMES, n_ctx)
    tokenizer = open_clip.get_tokenizer("ViT-B-16-quickgelu")
    names = ["apple", "aquarium fish", "lawn mower", "sweet pepper", "chimpanzee"]
    context = " ".join(["X"] * n_ctx)
    clip = tiny_clip(dtype, quick_gelu=True, vocabulary=49408)
    return clip, tokenizer([f"{context} {name}." for name in names])


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("n_ctx", [1, 4, 8])
@pytest.mark.parametrize("case", ["tiny", "options", "real tokens"])
def test_prompt_learner_equals_the_whole_text_tower(case, n_ctx, dtype, bound):
    clip, tokens = prompt_case(case, n_ctx, dtype)
    assert tokens.shape[1] == 77
    fast = fedpurel.PromptLearner(clip, tokens, n_ctx).to(dtype)
    slow = plain.PlainPrompt(clip, tokens, n_ctx)
    with torch.no_grad():
        slow.ctx.copy_(fast.ctx.normal_(std=.3, generator=generator(5)))
    ours, theirs = fast(), slow()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
    direction = randn(*ours.shape, seed=6, dtype=dtype)
    ours, theirs = (torch.autograd.grad((a * direction).sum(), m.ctx)[0]
                    for a, m in ((ours, fast), (theirs, slow)))
    assert theirs.abs().max() > .1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * theirs.abs().max().item())


def test_plain_prompt_with_word_embeddings_is_encode_text():
    """The oracle itself: with the embedding of X as context it is open_clip's own text tower."""
    clip, tokens = tiny_clip(), tokens_of(NAMES)
    prompt = plain.PlainPrompt(clip, tokens)
    with torch.no_grad():
        prompt.ctx.copy_(clip.token_embedding(torch.tensor([1] * 4)))
        torch.testing.assert_close(prompt(), clip.encode_text(tokens), rtol=0, atol=1e-12)


def attention(width=12, heads=3):
    torch.manual_seed(1)
    mha = nn.MultiheadAttention(width, heads, batch_first=True).double()
    nn.init.normal_(mha.in_proj_bias)
    nn.init.normal_(mha.out_proj.bias)
    return mha.requires_grad_(False).eval()


def self_attention(module, x):
    return module(x, x, x, need_weights=False)[0]


def test_new_lora_changes_nothing():
    mha, x = attention(), randn(2, 5, 12)
    lora = fedpurel.AttentionLoRA(mha, rank=4)
    torch.testing.assert_close(self_attention(lora.train(), x), self_attention(mha, x))


def test_lora_equals_attention_with_merged_weights():
    mha, x = attention(), randn(2, 5, 12)
    lora = fedpurel.AttentionLoRA(mha, rank=4, alpha=6).double().eval()
    with torch.no_grad():
        for i in range(3):
            lora.up[i].copy_(randn(12, 4, seed=10 + i))
    merged = copy.deepcopy(mha)
    with torch.no_grad():
        update = torch.cat([b @ a for a, b in zip(lora.down, lora.up, strict=True)])
        merged.in_proj_weight += 6 / math.sqrt(4) * update
    ours, theirs = self_attention(lora, x), self_attention(merged, x)
    assert (theirs - self_attention(mha, x)).abs().max() > .1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_lora_drops_out_in_training_mode_only():
    lora, x = fedpurel.AttentionLoRA(attention(), rank=4, dropout=.5).double(), randn(2, 5, 12)
    with torch.no_grad():
        for i in range(3):
            lora.up[i].copy_(randn(12, 4, seed=10 + i))
    torch.manual_seed(0)
    lora.train()
    assert not self_attention(lora, x).equal(self_attention(lora, x))
    lora.eval()
    assert self_attention(lora, x).equal(self_attention(lora, x))


def test_adapter_by_hand():
    adapter, x = fedpurel.FeatureAdapter(6).double(), randn(3, 6)
    w1, b1, w2, b2 = (p.detach() for p in adapter.parameters())
    scores = (x @ w1.T + b1).tanh() @ w2.T + b2
    gate = torch.tensor([softmax_by_loop(row, 1) for row in scores.tolist()], dtype=torch.float64)
    assert adapter(x).shape == (3, 6)
    torch.testing.assert_close(adapter(x).detach(), x * gate)


# ================================================================================================
# A small federation
# ================================================================================================


def pixels_of(image):
    """(3, H, W) float64 of a picture."""
    return torch.from_numpy(np.array(image)).double().permute(2, 0, 1) / 64 - 2


def random_pixels_of(image):
    return pixels_of(image) + torch.randn(3, 1, 1).double()


def make_world(kind, *options):
    """A float64 Federation of 3 clients, 5 classes and 44 pictures of noise, and a FedPuReL state.

    Batches of 4: the clients have 2 and 3 full batches, and one partial batch.
    """
    args = fedpurel.resolve(fedpurel.build_parser().parse_args(
        ["--peft", kind, "--batch", "4", "--lr", ".2", "--private-lr", ".2", "--rounds", "1",
         "--lora-dropout", "0", *options]))
    clip = tiny_clip()
    text = data.text_features(clip, tokens_of(NAMES, n_ctx=2))
    student = fedpurel.TunedCLIP(
        clip, kind, text, prompt_tokens=tokens_of(NAMES) if kind == "prompt" else None, n_ctx=4,
        rank=4, dropout=args.lora_dropout).double()
    n_train, n = sum(CLIENT_SIZES), sum(CLIENT_SIZES) + sum(TEST_SIZES)
    rng = np.random.default_rng(0)
    pool = data.ImagePool(data.Images(rng.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)),
                          pixels_of, random_pixels_of)
    with torch.no_grad():
        features = clip.encode_image(next(pool.batches([range(n)])))
    labels = torch.from_numpy(rng.permutation(np.arange(n) % CLASSES))
    order = torch.from_numpy(rng.permutation(n_train))
    clients = list(zip(order.split(CLIENT_SIZES), torch.arange(n_train, n).split(TEST_SIZES),
                       strict=True))
    inputs = data.FederatedImages(
        clip=clip, tokenizer=None, pool=pool, features=features, labels=labels, clients=clients,
        test=torch.arange(n_train, n), groups=data.frequency_groups([9, 8, 7, 6, 5], "thirds"),
        class_names=None, template=data.PHOTO)
    world = fedpurel.Federation(inputs, student, text, args)
    state = fedpurel.fresh_state(world, "fedpurel")
    for i, key in enumerate(("global", "base")):  # moved: LoRA starts at exactly the teacher
        state[key] = {n: t + .1 * randn(*t.shape, seed=20 + i) for n, t in state[key].items()}
    return world, state


def lora_blocks(world):
    return [block.attn for block in world.student.visual.transformer.resblocks]


def in_plain_order(world, params):
    """The tensors of a fast parameter dict as plain.trainable lists them."""
    missing = world.student.load_state_dict(params, strict=False)
    assert not missing.unexpected_keys
    if world.student.kind == "prompt":
        tensors = [world.student.part.ctx]
    elif world.student.kind == "adapter":
        tensors = list(world.student.part.parameters())
    else:
        tensors = [t for attn in lora_blocks(world) for i in range(3)
                   for t in (attn.down[i], attn.up[i])]
    return [t.detach().clone() for t in tensors]


def plain_model(world, params):
    """The plain model with the parameters of a fast one."""
    args, clip, text = world.args, world.clip, world.text
    if args.peft == "prompt":
        model = plain.PlainPromptModel(clip, tokens_of(NAMES))
    elif args.peft == "adapter":
        model = plain.PlainAdapterModel(clip, text)
    else:
        model = plain.PlainLoRAModel(clip, text, rank=4, dropout=0)
    tensors = in_plain_order(world, params)
    with torch.no_grad():
        for p, t in zip(plain.trainable(model), tensors, strict=True):
            p.copy_(t)
    return model


def plain_batches(world, client, *purpose):
    for _, indices, seeds in world.batches(client, *purpose):
        yield next(world.pool.batches([indices], seeds and [seeds])), world.labels[indices]


def purify_stacked(task, align, strength=1.0):
    """plain.purify_each where one tensor holds the three `down` of a block, one the three `up`."""
    task = list(task)
    for first in range(0, len(task), 6):
        for start in (first, first + 1):
            parts = slice(start, start + 5, 2)
            stacks = [torch.stack(tuple(grads[parts])) for grads in (task, align)]
            task[parts] = plain.purify_each(stacks[:1], stacks[1:], strength)[0]
    return task


def plain_stage_1(world, start, client, round_=0):
    args, model = world.args, plain_model(world, start)
    teacher = plain.PlainTeacher(world.clip, world.text)
    optimizer = torch.optim.SGD(plain.trainable(model), args.lr, .9, weight_decay=5e-4)
    stacked = args.peft == "lora" and isinstance(lora_blocks(world)[0].down, torch.Tensor)
    for pixels, labels in plain_batches(world, client, "shared", round_):
        plain.shared_step(model, teacher, pixels, labels, optimizer, args.strength,
                          purify_stacked if stacked else plain.purify_each)
    return model


def plain_stage_2(world, start, global_model, client, round_=0):
    model = plain_model(world, start)
    optimizer = torch.optim.SGD(plain.trainable(model), world.args.private_lr)
    for pixels, labels in plain_batches(world, client, "private", round_):
        plain.private_step(model, global_model, pixels, labels, optimizer, world.args.lam)
    return model


def assert_equal_parameters(world, params, model, bound=1e-10):
    for ours, theirs in zip(in_plain_order(world, params), plain.trainable(model), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=bound)


def moved(before, after):
    return max((after[n] - before[n]).abs().max().item() for n in before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_small_part_is_trainable(kind):
    clip = tiny_clip().requires_grad_(True).train()
    student = fedpurel.TunedCLIP(clip, kind, randn(CLASSES, 16), tokens_of(NAMES), rank=4)
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    if kind == "prompt":
        assert names == ["part.ctx"] and count == 4 * 32
    elif kind == "adapter":
        assert all(n.startswith("part.gate.") for n in names) and count == 2 * (16 * 16 + 16)
    else:
        assert all(".attn.down" in n or ".attn.up" in n for n in names)
        assert count == 2 * 3 * 2 * 4 * 32  # blocks, q k v, down and up, rank, width
    assert not any(module.training for module in student.modules())
    assert set(student.draw()) == set(names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_random_and_starts_lora_at_the_frozen_model(kind):
    world, _ = make_world(kind)
    first, second = world.student.draw(), world.student.draw()
    pixels = next(world.pool.batches([world.test]))
    inputs = pixels if kind == "lora" else world.features[world.test]
    logits = [torch.func.functional_call(world.student, draw, (inputs,))
              for draw in (first, second)]
    zero_shot = world.zero_shot_logits(world.features[world.test])
    assert moved(first, second) > 1e-3
    assert torch.allclose(*logits) == torch.allclose(logits[0], zero_shot) == (kind == "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_leaves_the_frozen_weights_alone(kind):
    world, _ = make_world(kind)
    student = world.student
    trainable = {n: p for n, p in student.named_parameters() if p.requires_grad}
    before, clip_before = (copy.deepcopy(m.state_dict()) for m in (student, world.clip))
    optimizer = torch.optim.SGD(trainable.values(), .5, weight_decay=.1)
    inputs, labels, _ = next(world.epoch(0, "shared", 0))
    F.cross_entropy(student(inputs), labels).backward()
    optimizer.step()
    changed = {n for n, t in student.state_dict().items() if not t.equal(before[n])}
    assert changed == set(trainable)
    assert all(t.equal(clip_before[n]) for n, t in world.clip.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_both_stages_change_only_what_they_return(kind):
    world, state = make_world(kind)
    before, start = copy.deepcopy(world.student.state_dict()), copy.deepcopy(state)
    shared, _ = fedpurel.tune_shared(world, state["global"], 0, "fedpurel", 0)
    private = fedpurel.tune_private(world, state["base"], shared, 0, 0)
    assert moved(state["global"], shared) > 1e-3 and moved(state["base"], private) > 1e-3
    assert all(t.equal(before[n]) for n, t in world.student.state_dict().items())
    assert moved(start["global"], state["global"]) == moved(start["base"], state["base"]) == 0


def test_lora_leaves_the_original_tower_alone():
    clip, pixels = tiny_clip(), randn(2, 3, 16, 16)
    before = clip.encode_image(pixels)
    student = fedpurel.TunedCLIP(clip, "lora", torch.eye(16).double()).double()
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(1)
    assert all(type(b.attn) is nn.MultiheadAttention for b in clip.visual.transformer.resblocks)
    assert clip.encode_image(pixels).equal(before)
    assert not torch.allclose(student.visual(pixels), before)


# ================================================================================================
# Fast against plain
# ================================================================================================


@pytest.mark.parametrize("client", [1, 2])
@pytest.mark.parametrize("options", [[], ["--augment"]])
@pytest.mark.parametrize("kind", KINDS)
def test_stage_1_equals_the_plain_arrangement(kind, options, client):
    world, state = make_world(kind, *options)
    fast, _ = fedpurel.tune_shared(world, state["global"], client, "fedpurel", 0)
    assert_equal_parameters(world, fast, plain_stage_1(world, state["global"], client))
    assert moved(state["global"], fast) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_compared_steps_meet_conflicts(kind):
    world, state = make_world(kind)
    purified, _ = fedpurel.tune_shared(world, state["global"], 1, "fedpurel", 0)
    world.args.strength = 0.0
    raw, _ = fedpurel.tune_shared(world, state["global"], 1, "fedpurel", 0)
    assert moved(purified, raw) > 1e-4


@pytest.mark.parametrize("options", [[], ["--augment"], ["--lam", "0.2"]])
@pytest.mark.parametrize("kind", KINDS)
def test_stage_2_equals_the_plain_arrangement(kind, options):
    world, state = make_world(kind, *options)
    fast = fedpurel.tune_private(world, state["base"], state["global"], 1, 0)
    slow = plain_stage_2(world, state["base"], plain_model(world, state["global"]), 1)
    # Rounding (1e-16) grows with every step of gradient descent on a curved loss; at this rate some
    # processors end at 1e-10 with LoRA, whose tensors grow fastest. A hundred times that is
    # allowed, still a hundred thousand times less than the epoch moves (below).
    assert_equal_parameters(world, fast, slow, 1e-8)
    assert moved(state["base"], fast) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_and_its_evaluation_equal_the_plain_arrangement(kind):
    world, start = make_world(kind)
    run = SimpleNamespace(share=list, gather=lambda part: part, log=lambda **row: None,
                          progress=lambda items, *_, **__: items, device="cpu")
    state = dict(start)
    history = fedpurel.train_method(world, run, "fedpurel", state, lambda state: None)

    models = [plain_stage_1(world, start["global"], k) for k in range(3)]
    weights = torch.tensor(CLIENT_SIZES).double() / sum(CLIENT_SIZES)
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for p, *own in zip(*map(plain.trainable, [mean, *models]), strict=True):
            p.copy_(sum(w * q for w, q in zip(weights, own, strict=True)))
    assert_equal_parameters(world, state["global"], mean)
    private = [plain_stage_2(world, start["base"], mean, k) for k in range(3)]
    for k in range(3):
        assert_equal_parameters(world, state["private"][k], private[k], 1e-8)  # as stage 2 above

    pixels = next(world.pool.batches([world.test]))
    guess = plain.predict_global(mean, pixels, batch=5)
    global_logits = world.logits(state["global"], world.test)
    assert global_logits.argmax(-1).equal(guess)
    truth = world.labels[world.test]
    assert history[-1]["gm"]["all"] == pytest.approx(100 * (guess == truth).double().mean().item())
    hits = []
    for k, (_, test) in enumerate(world.clients):
        mine = plain.predict_personal(private[k], mean, next(world.pool.batches([test])), batch=5)
        assert fedpurel.predict_personal(world, "fedpurel", state, k, global_logits).equal(mine)
        hits.append(100 * (mine == world.labels[test]).double().mean().item())
    assert history[-1]["pm"]["all"] == pytest.approx(sum(hits) / 3)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "logit-adjust"])
def test_the_other_methods_of_stage_1_by_hand(method):
    world, state = make_world("prompt", "--prox-mu", "0.5")
    fast, _ = fedpurel.tune_shared(world, state["global"], 1, method, 0)
    args, model = world.args, plain_model(world, state["global"])
    optimizer = torch.optim.SGD(plain.trainable(model), args.lr, .9, weight_decay=5e-4)
    start, counts = model.prompt.ctx.detach().clone(), torch.zeros(CLASSES).double()
    for train, _ in world.clients:
        for label in world.labels[train]:
            counts[label] += 1
    for pixels, labels in plain_batches(world, 1, "shared", 0):
        logits = model(pixels)
        if method == "logit-adjust":
            logits = logits + torch.log((counts + 1) / (counts + 1).sum())
        loss = F.cross_entropy(logits, labels)
        if method == "fedprox":
            loss = loss + .5 / 2 * (model.prompt.ctx - start).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bound = 1e-5 if method == "logit-adjust" else 1e-10  # its class prior is float32
    assert_equal_parameters(world, fast, model, bound)


def kl_by_hand(z, f):
    """The authors' for the adapter: Σ_c p_c (log p_c - log q_c), mean over the batch."""
    log_p, log_q = (a - a.logsumexp(-1, keepdim=True) for a in (z, f))
    return (log_p.exp() * (log_p - log_q)).sum() / len(z)


@pytest.mark.parametrize("kind, options, plain_kl", [
    ("adapter", ["--recipe", "official"], True), ("adapter", [], False),
    ("prompt", ["--recipe", "official"], False), ("lora", ["--recipe", "official"], False)])
def test_plain_kl_aligns_the_adapter_under_the_official_recipe_only(
        kind, options, plain_kl, monkeypatch):
    world, state = make_world(kind, *options)
    fast, _ = fedpurel.tune_shared(world, state["global"], 1, "fedpurel", 0)
    with_tkl = plain_stage_1(world, state["global"], 1)
    monkeypatch.setattr(plain, "plain_tkl", kl_by_hand)
    with_kl = plain_stage_1(world, state["global"], 1)
    right, wrong = (with_kl, with_tkl) if plain_kl else (with_tkl, with_kl)
    assert_equal_parameters(world, fast, right)
    with pytest.raises(AssertionError):
        assert_equal_parameters(world, fast, wrong, 1e-5)


OFFICIAL = ["--recipe", "official"]


@pytest.mark.parametrize("kind, options, method, used", [
    ("adapter", OFFICIAL, "fedpurel", True),
    ("adapter", [*OFFICIAL, "--align", "none"], "fedpurel", False),
    ("adapter", OFFICIAL, "fedavg", False), ("adapter", [], "fedpurel", False),
    ("adapter", ["--align", "kl"], "fedpurel", False), ("prompt", OFFICIAL, "fedpurel", False),
    ("lora", OFFICIAL, "fedpurel", False)])
def test_when_stage_1_calls_the_official_adapter_loss(kind, options, method, used, monkeypatch):
    world, state = make_world(kind, *options)
    calls, loss = [], fedpurel.official_adapter_loss
    monkeypatch.setattr(fedpurel, "official_adapter_loss",
                        lambda z, f: calls.append(len(z)) or loss(z, f))
    fedpurel.tune_shared(world, state["global"], 1, method, 0)
    assert calls == ([4, 4, 4] if used else [])


AUGMENTED = ["food101", "dtd", "aircraft", "pets", "dogs", "imagenet", "places"]
NOT_AUGMENTED = ["cifar10", "cifar100", "fashion-mnist", "shapes"]


@pytest.mark.parametrize("dataset, default", [
    *((f"{name}-lt", True) for name in AUGMENTED),
    *((f"{name}-lt", False) for name in NOT_AUGMENTED), ("folder:pets", False),
    ("folder:pets-lt", False)])
def test_which_data_sets_are_augmented(dataset, default):
    for flags, wanted in (([], default), (["--augment"], True), (["--no-augment"], False)):
        words = ["--dataset", dataset, *flags]
        assert fedpurel.resolve(fedpurel.build_parser().parse_args(words)).augment is wanted
    assert sorted([*AUGMENTED, *NOT_AUGMENTED]) == data.IMAGE_SETS


@pytest.mark.parametrize("options, augmented", [
    (["--dataset", "pets-lt"], True), (["--dataset", "cifar10-lt"], False),
    (["--dataset", "pets-lt", "--no-augment"], False),
    (["--dataset", "cifar10-lt", "--augment"], True)])
def test_both_stages_augment_or_neither_and_the_test_never(options, augmented, monkeypatch):
    world, state = make_world("lora", *options)
    seen, batches = [], world.pool.batches
    monkeypatch.setattr(world.pool, "batches", lambda lists, seeds=None: seen.append(
        seeds is not None) or batches(lists, seeds))
    shared, _ = fedpurel.tune_shared(world, state["global"], 0, "fedpurel", 0)
    assert seen == [augmented]
    seen.clear()
    fedpurel.tune_private(world, state["base"], shared, 0, 0)
    assert seen and set(seen) == {augmented}
    seen.clear()
    world.logits(shared, world.test)
    assert seen == [False]


@pytest.mark.parametrize("recipe", ["paper", "official"])
def test_order_of_clients_and_of_leaking_momentum(recipe, monkeypatch):
    """Sorted and without a leak, or in the order of the draw from client to client."""
    args = fedpurel.resolve(fedpurel.build_parser().parse_args(
        ["--recipe", recipe, "--rounds", "4", "--seed", "3"]))
    world = SimpleNamespace(args=args, clients=[(range(k + 1), None) for k in range(20)])
    calls = []

    def tune_shared(world, start, client, method, round_, momentum=None):
        calls.append((round_, client, momentum))
        return {"a": torch.tensor(float(client))}, {"of": (round_, client)}

    monkeypatch.setattr(fedpurel, "tune_shared", tune_shared)
    monkeypatch.setattr(fedpurel, "evaluate", lambda *_: {"gm": None, "pm": None})
    run = SimpleNamespace(share=list, gather=lambda part: part, log=lambda **row: None,
                          progress=lambda items, *_, **__: items, device="cpu")
    state = {"round": 0, "global": {"a": torch.tensor(0.0)}, "private": {}, "momentum": None,
             "history": []}
    fedpurel.train_method(world, run, "fedavg", state, lambda state: None)
    wanted, unsorted = [(0, k) for k in range(20)], False
    for round_ in (1, 2, 3):
        drawn = common.numpy_generator(3, "clients", round_).choice(20, 8, replace=False).tolist()
        unsorted |= drawn != sorted(drawn)
        wanted += [(round_, k) for k in (drawn if recipe == "official" else sorted(drawn))]
    assert unsorted and [call[:2] for call in calls] == wanted
    leaks = [None, *({"of": call} for call in wanted[:-1])]
    assert [call[2] for call in calls] == (leaks if recipe == "official" else [None] * len(calls))
    last = [k for _, k in wanted[-8:]]  # E5 weighs each client by its own k + 1 samples
    mean = sum((k + 1) * k for k in last) / sum(k + 1 for k in last)
    assert state["global"]["a"].item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("options", [[], ["--augment"]])
def test_dropout_is_for_the_tuned_model_only(options):
    """It is on where an epoch hands out a step; the frozen logits beside it never see it."""
    world, state = make_world("lora", *options)
    for attn in lora_blocks(world):
        attn.dropout = .5
    steps = list(zip(world.batches(1, "private", 3),
                     world.epoch(1, "private", 3, aggregate=state["global"]), strict=True))
    assert len(steps) == 3 and not any(attn.training for attn in lora_blocks(world))
    for (_, numbers, seeds), (inputs, labels, frozen) in steps:
        pixels = next(world.pool.batches([numbers], seeds and [seeds]))
        expected = plain_model(world, state["global"])(pixels)
        torch.testing.assert_close(frozen, expected, rtol=0, atol=1e-10)
        assert inputs.equal(pixels) and labels.equal(world.labels[numbers])
    for _ in world.epoch(1, "private", 3):
        assert all(attn.training for attn in lora_blocks(world))
    assert not any(attn.training for attn in lora_blocks(world))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [[], ["--augment"]])
def test_an_epoch_hands_out_zero_shot_logits_of_the_very_images(kind, options):
    world, _ = make_world(kind, *options)
    teacher = plain.PlainTeacher(world.clip, world.text)
    epoch = list(world.epoch(0, "shared", 1, teacher=True))
    batches = list(plain_batches(world, 0, "shared", 1))
    assert len(epoch) == len(batches) == 2
    for (inputs, labels, z), (pixels, expected) in zip(epoch, batches, strict=True):
        torch.testing.assert_close(z, teacher(pixels), rtol=0, atol=1e-10)
        read = pixels if kind == "lora" else world.clip.encode_image(pixels)
        torch.testing.assert_close(inputs, read, rtol=0, atol=1e-10)
        assert labels.equal(expected)
    assert all(frozen is None for _, _, frozen in world.epoch(0, "shared", 1))


def test_private_logits_are_computed_again_only_when_the_parameters_are_new(monkeypatch):
    world, state = make_world("prompt")
    calls, logits = [], world.logits
    monkeypatch.setattr(world, "logits", lambda *a: calls.append(1) or logits(*a))
    first = world.private_logits(0, state["base"])
    assert world.private_logits(0, state["base"]) is first and len(calls) == 1
    assert first.equal(logits(state["base"], world.clients[0][1]))
    assert not world.private_logits(0, state["global"]).equal(first) and len(calls) == 2


# ================================================================================================
# Loading
# ================================================================================================


def test_a_rule_for_the_groups_is_two_falling_numbers_or_thirds():
    assert data.group_rule("100,20") == (100, 20) and data.group_rule("thirds") == "thirds"
    for text in ("20,100", "5,5", "5", "9,5,1", "a,b", "-3,-9", "", "third"):
        with pytest.raises(common.UserError, match="HIGH,LOW"):
            data.group_rule(text)


def test_names_of_data_sets():
    assert data.image_set_name("cifar100-lt") == "cifar100"
    assert data.image_set_name("folder:pets-lt") == "folder:pets-lt"
    for name in ("cifar100", "pets-lt-lt", "-lt", "nothing-lt"):
        with pytest.raises(common.UserError, match="unknown"):
            data.image_set_name(name)


@pytest.mark.parametrize("order", ["dataset", "random"])
def test_a_long_tail_is_cut_out_of_the_training_part_only(order):
    labels = np.arange(50) % 5
    images = data.ImageSet("few", list("abcde"), data.PHOTO, data.Images(list(range(50))), labels,
                           data.Images(list(range(10))), np.arange(10) % 5)
    cut = data.long_tailed(images, 5, None, order, seed=1)
    counts = np.bincount(cut.train_labels, minlength=5).tolist()
    assert sorted(counts, reverse=True) == data.long_tail_counts(10, 5, 5)
    assert (counts == sorted(counts, reverse=True)) == (order == "dataset")
    assert (labels[cut.train.source] == cut.train_labels).all()  # each image kept its label
    assert cut.test is images.test and images.train_labels is labels
    kept = data.long_tailed(data.replace(images, long_tailed=True), 5, None, order, seed=1)
    assert len(kept.train) == 50


@pytest.mark.parametrize("words, said", [
    ("--strength .5 --lam .8", []), ("", []), ("--method fedavg --strength .5",
                                               ["--strength; --method fedavg"]),
    ("--recipe official --lam .5 --align kl", ["--lam; the official", "--align; the official"]),
    ("--recipe official --peft prompt --lam .5", []), ("--recipe official --align none", []),
    ("--n-ctx 8 --rank 4", ["--n-ctx; --peft adapter", "--rank; --peft adapter"]),
    ("--no-residual --lam .5", ["--lam; --no-residual"])])
def test_flags_that_change_nothing_are_said(words, said):
    assert says_idle(fedpurel.build_parser(), fedpurel.resolve, fedpurel.idle_flags, words.split(),
                     said)


# ================================================================================================
# Runs with any open_clip model
# ================================================================================================


def write_folder(root, *classes):
    """Six pictures of noise a class to train on and three to test on."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 6), ("test", 3)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return f"folder:{root}"


def run_with(tmp_path, model, *options, classes=("cat", "dog"), out="out"):
    pictures = tmp_path / "-".join(classes).replace("/", "")
    dataset = f"folder:{pictures}" if pictures.exists() else write_folder(pictures, *classes)
    words = ["--dataset", dataset, "--model", model, "--clients", "2", "--rounds", "1", "--beta",
             "9", "--imbalance", "1", "--batch", "4", "--threads", "1", "--data-dir",
             tmp_path / "data", "--out-dir", tmp_path / out, *options]
    return [str(w) for w in words]


COCA = {"custom_text": True,
        "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2,
                           "layers": 1, "mlp_ratio": 4, "dim_head": 8, "n_queries": 256,
                           "attn_pooler_heads": 2}}


def coca(folder):
    folder = small_clip(folder, weights=False, **{k: v for k, v in COCA.items()
                                                  if k != "multimodal_cfg"})[0]
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["multimodal_cfg"] = COCA["multimodal_cfg"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}")
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder, clip.eval()


def test_lora_in_coca_is_coca_until_it_learns(tmp_path):
    """Its tower gives its tokens as well, and its features are pooled by attention."""
    folder, clip = coca(tmp_path / "coca")
    data.check_towers(clip, "lora")
    pixels = randn(3, 3, 16, 16, dtype=torch.float32)
    text = F.normalize(randn(4, 16, dtype=torch.float32), dim=-1)
    student = fedpurel.TunedCLIP(clip, "lora", text)
    with torch.no_grad():
        wanted = clip.encode_image(pixels, normalize=True) @ text.T * clip.logit_scale.exp()
        torch.testing.assert_close(student(pixels), wanted)
    fedpurel.main(run_with(tmp_path, folder, "--peft", "lora"))
    found = result(tmp_path / "out")
    assert 0 <= found["results"]["fedpurel"]["gm"]["last"]["all"] <= 100


def test_features_of_coca_are_not_normalised(tmp_path):
    _, clip = coca(tmp_path / "coca")
    images = data.Images(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8))
    pool = data.ImagePool(images, data.pixel_transform(16, (.5,) * 3, (.5,) * 3))
    with torch.no_grad():
        wanted = clip.visual(next(pool.batches([range(3)])))[0]
    found = data.encode_once(clip, pool, torch.device("cpu"), tmp_path)
    torch.testing.assert_close(found, wanted)
    assert (found.norm(dim=-1) - 1).abs().min() > .01


def test_zero_shot_of_a_siglip_is_its_own(tmp_path):
    """Texts without a causal mask, another pooling, a tokenizer of its own, a bias of the logits:
    the oracle is open_clip's get_logits."""
    folder, _ = small_clip(
        tmp_path / "siglip", custom_text=True, init_logit_bias=-10.0,
        vision_cfg={"pool_type": "avg", "no_ln_pre": True},
        text_cfg={"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "vocab_size": 10,
                  "hf_tokenizer_name": "timm/unreachable"})
    bert_tokenizer(folder / "tokenizer")
    for path in (folder / "tokenizer").iterdir():
        path.rename(folder / path.name)
    fedpurel.main(run_with(tmp_path, folder, "--peft", "adapter", "--method", "zeroshot",
                           classes=("cafe", "cat", "photo")))
    backbone = data.open_clip_backbone(str(folder), None, 0, torch.device("cpu"), tmp_path)
    pictures = data.load_images(f"folder:{tmp_path / 'cafe-cat-photo'}", tmp_path)
    pixels = torch.stack([backbone.transform(image) for image in pictures.test])
    texts = backbone.tokenizer([data.PHOTO.format(n) for n in ("cafe", "cat", "photo")])
    with torch.no_grad():
        guess = backbone.clip.get_logits(pixels, texts)[0].argmax(-1).numpy()
    found = result(tmp_path / "out")["results"]["zeroshot"]["gm"]["last"]["all"]
    assert found == pytest.approx(100 * (guess == pictures.test_labels).mean())


@pytest.mark.parametrize("peft", KINDS)
def test_a_run_says_its_model_and_knows_it_again(peft, tmp_path, capsys):
    folder, state = small_clip(tmp_path / "clip", pixels={"mean": [.5] * 3, "std": [.25] * 3,
                                                          "resize_mode": "squash"})
    words = run_with(tmp_path, folder, "--peft", peft)
    fedpurel.main(words)
    line = (f"local-dir:{folder}, its weights, 16 pixels, mean .5, std .25, bicubic resize to a "
            "square")
    assert capsys.readouterr().err.splitlines().count(f"model: {line}") == 1
    assert result(tmp_path / "out")["sources"]["model"] == line
    state["logit_scale"] += 1
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    assert exit_code(fedpurel.main, [*words, "--resume"]) == 2
    assert "--resume: the model of this run were others" in capsys.readouterr().err


@pytest.mark.parametrize("options, classes, words", [
    (["--n-ctx", "17"], ("cat", "dog"), "'X X .* cat.'; shorten its name, or --n-ctx"),
    (["--n-ctx", "77"], ("cat", "dog"), "longer than the 20 tokens"),
    ([], ("cat", "dog " * 16), "the class 'dog dog .* longer than the 20 tokens"),
    ([], ("Cat", "bird", "cat"), r"the classes 'Cat' \(0\) and 'cat' \(2\) are one text"),
])
def test_class_texts_that_cannot_work_are_refused_before_images_are_read(
        options, classes, words, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("images were encoded first")
    monkeypatch.setattr(data, "encode_once", refuse)
    folder, _ = small_clip(tmp_path / "clip")
    flags = run_with(tmp_path, folder, "--peft", "prompt", *options, classes=classes)
    assert exit_code(fedpurel.main, flags) == 2
    err = complaints(capsys.readouterr().err)
    assert len(err) == 1 and re.search(words, err[0])


def test_names_that_a_published_set_has_twice_are_said(tmp_path, monkeypatch, capsys):
    """ImageNet has two classes "missile": refused in a folder, but part of what others report."""
    load = data.load_images

    def published(name, *rest):
        folder = load(f"folder:{tmp_path / 'cat-dog'}", *rest)
        return replace(folder, class_names=["missile", "missile"])
    write_folder(tmp_path / "cat-dog", "cat", "dog")
    monkeypatch.setattr(data, "load_images", published)
    words = run_with(tmp_path, small_clip(tmp_path / "clip")[0], "--peft", "adapter")
    words[words.index("--dataset") + 1] = "imagenet-lt"
    place = words.index("--imbalance")
    del words[place:place + 2]
    fedpurel.main([*words, "--no-augment"])
    assert ("note: one text to the tokenizer of --model: the classes 'missile' (0) and 'missile' "
            "(1)\n") in capsys.readouterr().err


# ================================================================================================
# The header and the benchmark
# ================================================================================================


def test_marks_of_the_header_stand_in_the_code_and_the_other_way_round():
    source = (ROOT / "fedpurel.py").read_text()
    header, code = source.split('"""', 2)[1:]
    for kind in ("DEVIATION", "UNSPECIFIED"):
        listed = re.findall(rf"^    {kind} (\d+) ", header, re.M)
        marked = re.findall(rf"#.*\b{kind} (\d+)", code)
        assert listed == [str(i + 1) for i in range(len(listed))] and len(listed) >= 5
        assert set(marked) == set(listed)
    mapped = re.findall(r"^    Eq\. (E\d)", header, re.M)
    assert set(re.findall(r"# Eq\. \((E\d)\)", code)) == set(mapped) == {
        f"E{i}" for i in range(1, 8)}


def test_the_benchmark_runs():
    done = subprocess.run(
        [sys.executable, "benchmarks/fedpurel_round.py", "--quick"], cwd=ROOT, capture_output=True,
        text=True, timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("RESULT ")
    ratios = {k: float(v) for k, v in (pair.split("=") for pair in last.split()[1:])}
    assert {"prompt_ratio", "augmented_ratio", "lora_ratio"} <= set(ratios)
    assert all(v > 0 for v in ratios.values())


def test_every_method_is_tuned_on_as_many_cells_and_keeps_its_best(capsys):
    """Rated by the mean All of its models over the seeds; what diverged once is no choice."""
    plan = fedpurel_claims.tuning_plan(fedpurel.METHODS, [.1, .2, .3, .4])
    cells = {m: [(c["lr"], c["private_lr"]) for _, method, c in plan if method == m]
             for m in fedpurel.METHODS}
    assert {m: len(set(c)) for m, c in cells.items()} == {m: 4 * (m != "zeroshot") for m in cells}
    assert cells["fedpurel"] == [(.1, .3), (.1, .4), (.2, .3), (.2, .4)]

    def run(**scores):  # name -> (global or None, personal)
        return {name: {part: value and {"mean10": {"all": value}}
                       for part, value in zip(("gm", "pm"), pair, strict=True)}
                for name, pair in scores.items()}
    runs = [run(**{"fedavg 0.1 0.1": (40, 50), "fedavg 0.2 0.2": (30, 58), "fedavg 1 1": (99, 99),
                   "local 0.1 0.1": (None, 3), "local 0.2 0.2": (None, 4)}),
            run(**{"fedavg 0.1 0.1": (41, 50), "fedavg 0.2 0.2": (30, 62),
                   "local 0.1 0.1": (None, 4), "local 0.2 0.2": (None, 2)})]
    assert fedpurel_claims.best_rates(runs) == {"fedavg": {"lr": .1, "private_lr": .1},
                                                "local": {"lr": .1, "private_lr": .1}}
    assert "| tuning | fedavg | local |" in capsys.readouterr().out


# ================================================================================================
# The figure
# ================================================================================================


def drawn(monkeypatch, tmp_path, results, counts, names):
    """The figure of `results` in a world of classes with so many images, and its panels."""
    figures = keep_figures(monkeypatch)
    args = SimpleNamespace(dataset="folder:animals", peft="lora", seed=3)
    world = SimpleNamespace(args=args, class_counts=torch.tensor(counts), class_names=names)
    fedpurel.draw_figure(world, results, tmp_path / "f.png")
    assert faults(figures[0]) == []
    return figures[0], figures[0].axes


def summary(accuracy, seed=0):
    """What summarise makes of a run with such class accuracies, as far as the figure reads it."""
    draw = np.random.default_rng(seed)
    part = {key: draw.uniform(10, 90) for key in ("all", "many", "med", "few")}
    return {"class_accuracy": accuracy, "gm": accuracy and {"mean10": part}, "pm": {"mean10": part}}


def test_figure_shows_what_tuning_changes_from_frequent_to_rare(monkeypatch, tmp_path):
    """A mean of each tenth of the classes, less zero-shot's; a class without test images is no 0;
    a method without a global model has bars for its personal ones only."""
    counts = np.random.default_rng(0).permutation(np.arange(1, 41))
    order = np.argsort(-counts)
    zero, tuned = (np.random.default_rng(s).random(40) for s in (1, 2))
    tuned[order[0]] = np.nan
    results = {"zeroshot": summary(zero.tolist()), "local": summary(None, 1), "fedpurel": summary(
        [None if np.isnan(a) else a for a in tuned], 2)}
    figure, (left, right) = drawn(monkeypatch, tmp_path, results, counts.tolist(),
                                  [f"class {c}" for c in range(40)])
    lines = [line.get_ydata() for line in left.lines]
    assert len(lines) == 2 and lines[0] == pytest.approx(np.zeros(10))
    by_hand = [100 * (np.nanmean(tuned[part]) - zero[part].mean())
               for part in order.reshape(10, 4)]
    assert lines[1] == pytest.approx(by_hand) and "above zero-shot" in left.get_ylabel()
    assert [t.get_text() for t in left.get_xticklabels()][::9] == ["40-37", "4-1"]
    heights = [[b.get_height() for b in bars] for bars in right.containers]
    for found, r, has in zip(heights, results.values(), (1, 0, 1), strict=True):
        part = list(r["pm"]["mean10"].values())
        assert found == pytest.approx([x * has for x in part] + part)
    told = [[f"{r[part]['mean10']['all']:.1f}" if r[part] else "-" for part in ("gm", "pm")]
            for r in results.values()]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        f"{name}: All {a} | {b}" for name, (a, b) in
        zip(("zero-shot CLIP", "Local", "FedPuReL"), told, strict=True)]


@pytest.mark.parametrize("classes, methods", [
    (2, ["fedpurel"]), (10, ["zeroshot", "fedavg"]), (20, ["fedprox", "logit-adjust"]),
    (101, ["local"]), (400, fedpurel.METHODS)])
def test_figure_of_any_classes_and_methods(monkeypatch, tmp_path, classes, methods):
    draw = np.random.default_rng(classes)
    results = {m: summary(None if m == "local" else draw.random(classes).tolist()) for m in methods}
    names = [f"{c} an animal of a kind" + " with a long name" * 6 for c in range(classes)]
    _, axes = drawn(monkeypatch, tmp_path, results, draw.integers(1, 2000, classes).tolist(), names)
    left = next((a for a in axes if "classes" in a.get_xlabel()), None)
    assert (left is None) == (methods == ["local"])  # nothing global to show
    assert all(a.get_position().height > .38 for a in axes)
    if not left:  # the bars of personal models alone
        assert len(axes[0].patches) == 4
    if left:
        drawn_here = {"zeroshot", "fedavg", "fedpurel"} & set(methods) or methods
        assert len(left.lines) == len(drawn_here)
        assert len(left.get_xticks()) == (classes if classes <= 20 else 10)
