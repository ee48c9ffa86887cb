"""ELSA: formulas against independent oracles, split against unsplit, the command, bad input."""
import copy
import csv
import io
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import BertConfig, BertModel, BertTokenizer

import common
import data
import elsa
from tools import (
    PATIENCE,
    ROOT,
    exit_code,
    faults,
    finish,
    keep_figures,
    kill,
    result,
    says_idle,
    start,
    torchrun,
    wait_for_rows,
)

SCRIPT = "elsa.py"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# ================================================================================================
# Steps 2 to 6: fingerprints, trust, clusters, edges
# ================================================================================================


def test_fingerprint_is_the_mean_and_the_covariance_over_q():
    states, basis = randn(9, 5), torch.linalg.qr(randn(5, 3, seed=1))[0]
    mu, sigma = elsa.gaussian_fingerprint(states, basis, ridge=.05)
    z = (states @ basis).numpy()
    plain = np.cov(z, rowvar=False, ddof=0)  # divided by Q
    np.testing.assert_allclose(mu, z.mean(0))
    np.testing.assert_allclose(sigma, plain + .05 * np.trace(plain) / 3 * np.eye(3))


def test_fingerprint_of_identical_states_is_still_invertible():
    _, sigma = elsa.gaussian_fingerprint(torch.ones(4, 6), torch.eye(6)[:, :2])
    assert torch.linalg.eigvalsh(sigma).min() > 0


def gaussian(seed, k=4):
    a = randn(k, k, seed=seed)
    return randn(k, seed=seed + 50), a @ a.T + .3 * torch.eye(k)


def test_symmetric_kl_equals_torch_distributions():
    p, q = gaussian(1), gaussian(2)
    first, second = (torch.distributions.MultivariateNormal(*g) for g in (p, q))
    kl = torch.distributions.kl_divergence
    expected = (kl(first, second) + kl(second, first)) / 2
    torch.testing.assert_close(elsa.symmetric_kl(p, q), expected)
    torch.testing.assert_close(elsa.symmetric_kl(q, p), expected)
    assert elsa.symmetric_kl(p, p).abs() < 1e-10 and expected > 1


def test_trust_is_agreement_with_the_confident_neighbours_on_what_one_knows():
    # Clients 0-2 are near each other, 3 is far. Four probes, three classes.
    distance = torch.tensor([[0., 1, 1, 9], [1, 0, 1, 9], [1, 1, 0, 9], [9, 9, 9, 0]]).double()
    sure, unsure, third, second = [.9, .05, .05], [.4, .3, .3], [.1, .1, .8], [.2, .7, .1]
    p = torch.tensor([[sure, sure, third, second], [unsure, sure, third, second],
                      [third, sure, third, second],
                      [[.1, .85, .05], [.1, .8, .1], [.3, .4, .3], [.6, .3, .1]]]).double()
    trust = elsa.trust_scores(distance, p, neighbours=2)
    prior, lift = np.zeros((4, 3)), np.zeros((4, 4, 3))
    for k in range(4):  # by hand: over the client's own prior, then to one
        for c in range(3):
            prior[k, c] = sum(p[k, probe, c] for probe in range(4)) / 4
        for probe in range(4):
            lift[k, probe] = [p[k, probe, c] / prior[k, c] for c in range(3)]
            lift[k, probe] /= lift[k, probe].sum()
    for k in range(4):
        near = sorted((j for j in range(4) if j != k), key=lambda j: (distance[k, j], j))[:2]
        good = total = 0
        for probe in range(4):
            votes = sum(lift[j, probe].max() * lift[j, probe] for j in near)
            weight = prior[k, votes.argmax()]
            total += weight
            good += weight * (votes.argmax() == lift[k, probe].argmax())
        assert trust[k].item() == pytest.approx(good / total)
    assert trust[3] < .5 < .7 < trust.max() and len(set(trust.tolist())) > 2
    assert elsa.trust_scores(distance[:1, :1], p[:1]).shape == (1,)


def test_trust_sees_through_label_skew_but_not_through_flipped_labels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    likelihood = np.exp(3 * np.eye(3)[truth] + rng.normal(size=(300, 3)))
    priors = np.array([[.98, .01, .01], [.01, .98, .01], [.01, .01, .98], [.34, .33, .33]])
    flipped = likelihood[:, ::-1] * priors[3]
    p = torch.tensor(np.concatenate([likelihood * priors[:, None], flipped[None]]))
    p = p / p.sum(-1, keepdim=True)
    plain = (p.argmax(-1) == p[3].argmax(-1)).double().mean(-1)
    trust = elsa.trust_scores(torch.ones(5, 5).double(), p, neighbours=4)
    floor = .6 * trust.median()
    assert plain[:3].max() < .6 * plain.max()  # who holds nearly one class would fall to the floor
    assert trust[:4].min() > 1.2 * floor and trust[4] < .8 * floor


def agglomerate(distance, clusters):
    """Average linkage by hand: merge the two groups with the least mean distance."""
    groups = [[k] for k in range(len(distance))]
    while len(groups) > clusters:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = min(pairs, key=lambda ij: np.mean([distance[a, b] for a in groups[ij[0]]
                                                  for b in groups[ij[1]]]))
        groups[j] += groups.pop(i)
    return {frozenset(g) for g in groups}


@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 9])
def test_clusters_equal_average_linkage_by_hand(clusters):
    points = randn(7, 2, seed=3)
    distance = torch.cdist(points, points)
    labels = elsa.cluster_clients(distance, clusters)
    found = {frozenset(k for k in range(7) if labels[k] == c) for c in set(labels)}
    assert found == agglomerate(distance.numpy(), min(clusters, 7))
    assert elsa.cluster_clients(distance[:1, :1], clusters) == [0]


def test_clusters_go_to_the_edges_with_the_least_total_latency():
    latency = torch.tensor([[1., 5, 9], [1, 5, 9], [2, 1, 9], [2, 1, 9], [1, 2, 8]])
    labels, distance = [0, 0, 1, 1, 2], torch.zeros(5, 5)
    edges = elsa.assign_edges(labels, distance, latency)
    assert edges == [0, 0, 1, 1, 2]  # cluster 2 would be quicker at 0, but that one is taken
    many = elsa.assign_edges([0, 1, 2, 3, 4], distance, latency[:, :2])
    assert sorted(many.count(e) for e in (0, 1)) == [2, 3]  # more clusters than edges


def test_who_is_too_far_moves_by_behaviour_or_by_latency():
    latency = torch.tensor([[1., 90, 90], [1, 90, 90], [50, 5, 2], [9, 1, 9], [9, 9, 1]])
    distance = torch.full((5, 5), 10.).double()
    distance[2, 3] = distance[3, 2] = 1.0  # client 2 behaves like edge 1's client
    labels = [0, 0, 0, 1, 2]
    assert elsa.assign_edges(labels, distance, latency)[2] == 0
    assert elsa.assign_edges(labels, distance, latency, tau_max=20, lam=1.0)[2] == 1
    assert elsa.assign_edges(labels, distance, latency, tau_max=20, lam=0.0)[2] == 2
    assert elsa.assign_edges(labels, distance, latency, tau_max=1.5, lam=0.0)[2] == 0  # nowhere


def test_capacity_moves_the_slowest():
    latency = torch.tensor([[1., 3], [2, 3], [3, 3], [4, 3], [9, 1]])
    edges = elsa.assign_edges([0, 0, 0, 0, 1], torch.ones(5, 5), latency, capacity=3)
    assert edges == [0, 0, 0, 1, 1]


def test_cuts_follow_memory_and_speed():
    def cut(memory, deadline):
        return elsa.choose_cut(6, 100, 10, memory, 1.0, deadline)
    assert cut(1e9, 1e9) == (3, 4)  # five blocks on the client, one stays with the edge
    assert cut(145, 1e9) == (2, 4)
    assert cut(1e9, 2.9) == (1, 5)
    assert cut(0, 0) == (1, 6)  # too small for one block: it gets one all the same


def test_fedavg_is_the_weighted_mean():
    states = [{"a": randn(2, 3, seed=s), "b": randn(4, seed=s + 9)} for s in range(3)]
    found = elsa.fedavg(states, [1, 2, 5])
    for name in "ab":
        stacked = np.stack([s[name].numpy() for s in states])
        np.testing.assert_allclose(found[name], np.average(stacked, axis=0, weights=[1, 2, 5]))
    same = elsa.fedavg([states[0], states[0]], [3, 5])
    torch.testing.assert_close(same, states[0])


# ================================================================================================
# Steps 8 and 9: rotation, sketch, rounding, bytes
# ================================================================================================


def rotation(width=12, rank=4, seed=0):
    basis = torch.linalg.qr(randn(width, rank, seed=seed))[0]
    return elsa.SubspaceRotation(basis, elsa.SubspaceRotation.random_turn(rank, generator(seed)))


def test_w_is_orthogonal_turns_the_subspace_and_leaves_the_rest():
    r = rotation()
    basis, turn = r.basis.double(), r.turn.double()
    w = r.rotate(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(w, torch.eye(12) - basis @ basis.T + basis @ turn @ basis.T,
                               check_dtype=False)
    torch.testing.assert_close(w @ w.T, torch.eye(12).double(), atol=1e-6, rtol=0)
    outside = torch.linalg.qr(basis, mode="complete")[0][:, 4:]
    torch.testing.assert_close(r.rotate(outside.T), outside.T)
    h = randn(3, 5, 12)
    torch.testing.assert_close(r.unrotate(r.rotate(h)), h, atol=1e-6, rtol=0)
    assert (r.rotate(h) - h).norm() > 1


def test_random_turns_are_orthogonal_and_uniform():
    turns = torch.stack([elsa.SubspaceRotation.random_turn(3, generator(s)) for s in range(800)])
    torch.testing.assert_close(turns @ turns.mT, torch.eye(3).expand(800, 3, 3), atol=1e-5, rtol=0)
    # Over the orthogonal group every entry has mean 0 and variance 1/3; without the signs of
    # diag R the diagonal would have a mean far from 0.
    assert turns.mean(0).abs().max() < 4 / math.sqrt(3 * 800)
    torch.testing.assert_close(turns.var(0), torch.full((3, 3), 1 / 3), atol=.06, rtol=0)


def sketch_by_loop(sketch, x):
    k, w = sketch.rows, sketch.matrix.shape[1] // sketch.rows
    y = [0.0] * (k * w)
    for r in range(k):
        for i, value in enumerate(x.tolist()):
            y[int(sketch.bucket[r, i])] += float(sketch.sign[r, i]) * value
    return y


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("recovery", ["median", "mean", "lsq"])
def test_sketch_equals_loops_over_rows_and_coordinates(rows, recovery):
    s = elsa.CountSketch(20, .8, rows, recovery, generator(1))
    x = randn(20, seed=2)
    y = s.encode(x)
    assert len(y) == rows * int(.8 * 20 / rows)
    torch.testing.assert_close(y.tolist(), sketch_by_loop(s, x))
    found = s.decode(y)
    if recovery == "lsq":  # the least-norm x̂ with that sketch
        expected = np.linalg.lstsq(s.matrix.T.double().numpy(), y.numpy(), rcond=1e-6)[0]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    else:
        estimates = [[float(s.sign[r, i]) * float(y[s.bucket[r, i]]) for r in range(rows)]
                     for i in range(20)]
        by = np.median if recovery == "median" else np.mean
        torch.testing.assert_close(found.tolist(), [float(by(e)) for e in estimates])


def test_every_bucket_of_a_row_gets_its_share():
    s = elsa.CountSketch(24, .5, 2, generator=generator())
    counts = torch.stack([torch.bincount(b, minlength=12) for b in s.bucket])
    assert counts[0, :6].tolist() == [4] * 6 and counts[1, 6:].tolist() == [4] * 6


def test_sketch_is_linear():
    s = elsa.CountSketch(30, .5, 3, generator=generator())
    a, b = randn(2, 30), randn(2, 30, seed=1)
    torch.testing.assert_close(s.encode(2 * a - b), 2 * s.encode(a) - s.encode(b))


@pytest.mark.parametrize("rows, recovery", [(1, "median"), (2, "median"), (3, "mean")])
def test_sketch_is_unbiased_with_the_known_variance(rows, recovery):
    x, g, found = randn(16, seed=5), generator(3), []
    for _ in range(3000):
        s = elsa.CountSketch(16, .5, rows, recovery, g)
        found.append(s.decode(s.encode(x)))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - x).abs() < 4.5 * error + 1e-9).all()
    if rows == 1:
        relative = ((found - x) ** 2).sum(1).mean() / (x ** 2).sum()
        assert relative.item() == pytest.approx(16 / 8 - 1, rel=.05)  # D / w - 1


@pytest.mark.parametrize("recovery", ["median", "mean", "lsq"])
def test_sketch_with_one_row_and_no_compression_loses_nothing(recovery):
    s, x = elsa.CountSketch(18, 1.0, 1, recovery, generator()), randn(4, 18)
    torch.testing.assert_close(s.decode(s.encode(x)), x, atol=1e-6, rtol=0)


def test_dense_states_break_the_median_and_lsq_never_exceeds_zeros():
    """Relative error of standard normal vectors at ρ = 1/2: why beyond/elsa_channels.py is."""
    x = randn(200, 96, dtype=torch.float32)
    error = {r: ((s.decode(s.encode(x)) - x).norm() / x.norm()).item() for r in ("median", "lsq")
             for s in [elsa.CountSketch(96, .5, 3, r, generator())]}
    assert error["median"] > 1.2 and .6 < error["lsq"] < .8


def sent_as_it_is(x):
    return x, 4 * x.numel()


def test_adapter_updates_go_through_the_channel_alone():
    start = {"a": randn(3, 4), "b": randn(5, seed=1)}
    end = {n: t + randn(*t.shape, seed=2) for n, t in start.items()}
    same, size = elsa.send_update(start, end, sent_as_it_is, 6)
    torch.testing.assert_close(same, end)
    assert size == 4 * 18  # 17 numbers in vectors of 6, by this codec's count
    exact, size = elsa.send_update(
        start, end, elsa.CountSketch(6, 1.0, 1, "median", generator()), 6)
    torch.testing.assert_close(exact, end, atol=1e-6, rtol=0)
    assert size == 8 * 18  # float64
    half, size = elsa.send_update(start, end, elsa.CountSketch(6, .5, 1, "lsq", generator()), 6)
    assert size == 8 * 9 and list(half) == list(start)
    assert (half["a"] - end["a"]).abs().max() > .1  # lossy: the starts come through, not the ends


def make_codecs(channels=elsa.CHANNELS, setup=None, **flags):
    base = {"channel": "sketch", "ratio": .5, "sketch_rows": 1, "recovery": "lsq", "bits": 32,
            "sketch": "activations", "seed": 0}
    world = SimpleNamespace(args=SimpleNamespace(**{**base, **flags}), channels=channels, width=D,
                            device="cpu")
    return elsa.make_codecs(world, setup or {}, (1, 2))


B, T, D = 5, 7, 24


def bytes_of_a_step(codecs, mode):
    """What one step of B texts of T tokens puts on the link, by exchange."""
    turn = None if mode == "none" else rotation(D, 4)
    link = elsa.Link(codecs, turn, mode)
    x = randn(B, T, D, dtype=torch.float32).requires_grad_()
    link.to_client(2 * link.to_edge(x)).sum().backward()
    return link.sent


@pytest.mark.parametrize("flags, vector", [
    ({"channel": "none"}, 4 * D), ({}, 4 * D * .5), ({"ratio": .25, "sketch_rows": 3}, 4 * 6),
    ({"sketch": "adapters"}, 4 * D), ({"sketch": "both"}, 4 * D * .5), ({"sketch": "none"}, 4 * D)])
@pytest.mark.parametrize("mode", ["none", "link", "edge"])
def test_bytes_equal_the_formula_for_every_exchange(flags, vector, mode):
    """4 · B · T · D · 4 bytes · ρ a step: states and gradients, up and down."""
    codecs, updates = make_codecs(**flags)
    assert bytes_of_a_step(codecs, mode) == dict.fromkeys(elsa.EXCHANGES, B * T * vector)
    assert (updates is not None) == (flags.get("sketch") in ("adapters", "both"))


def test_each_exchange_has_its_own_codec_and_gradients_are_coded_once():
    codecs = {n: elsa.CountSketch(D, .5, 1, "lsq", generator(i))
              for i, n in enumerate(elsa.EXCHANGES)}
    link = elsa.Link(codecs)
    x, weight = randn(B, T, D).requires_grad_(), randn(B, T, D, seed=3)
    y = link.to_client(link.to_edge(x))

    def through(t, name):
        return codecs[name](t)[0]
    torch.testing.assert_close(y, through(through(x, "activations up"), "activations down"))
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, through(through(weight, "gradients up"), "gradients down"))


@pytest.mark.parametrize("mode", ["link", "edge"])
def test_gradients_through_a_rotated_link_are_the_chain_rule(mode):
    turn, middle = rotation(D, 6), randn(D, D, seed=4)
    w = turn.rotate(torch.eye(D, dtype=torch.float64))
    link, x = elsa.Link({}, turn, mode), randn(B, T, D).requires_grad_()
    y = link.to_client(link.to_edge(x) @ middle)
    inner = w @ middle @ w.T if mode == "edge" else w @ w.T @ middle @ w @ w.T
    torch.testing.assert_close(y, x @ inner)
    weight = randn(B, T, D, seed=7)
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ inner.T)
    if mode == "link":
        torch.testing.assert_close(y, x @ middle, atol=1e-5, rtol=1e-5)  # nothing is lost


# ================================================================================================
# Step 7: split = unsplit
# ================================================================================================


def bert(dtype=torch.float32, dropout=0.0, layers=4, lora=True):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=D, num_hidden_layers=layers,
                        num_attention_heads=4, intermediate_size=48, max_position_embeddings=16,
                        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    encoder = BertModel(config, add_pooling_layer=False)
    if lora:
        encoder = peft.inject_adapter_in_model(
            peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query", "value"]), encoder)
        for name, p in encoder.named_parameters():
            if "lora_B" in name:  # zero at first: let it matter
                nn.init.normal_(p, std=.1)
    model = elsa.SplitEncoder(encoder, 3, dropout)
    return model.requires_grad_(True).to(dtype)


def texts(padding):
    ids = torch.randint(1, 50, (6, 11), generator=generator(1))
    mask = torch.ones_like(ids)
    if padding:
        for row, length in enumerate((11, 4, 7, 2, 11, 9)):
            mask[row, length:], ids[row, length:] = 0, 0
    return ids, mask, torch.randint(3, (6,), generator=generator(2))


def gradients(model, logits, labels):
    model.zero_grad()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return [loss.detach(), logits.detach(), *(p.grad.clone() for p in model.parameters()
                                              if p.grad is not None)]


def unsplit(model, ids, mask):
    """The encoder as its library calls it, then the head."""
    states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return model.head(model.dropout(states[:, 0]))


CUTS = [(p, q) for p in range(5) for q in range(p, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("dropout", [0.0, .2])
def test_split_equals_unsplit_bit_for_bit(dtype, padding, dropout):
    """Loss, logits and the gradient of every tensor, at every cut; with dropout from equal
    generators."""
    model, (ids, mask, labels) = bert(dtype, dropout).train(), texts(padding)
    torch.manual_seed(5)
    whole = gradients(model, unsplit(model, ids, mask), labels)
    assert len(whole) > 60
    for cut in CUTS:
        torch.manual_seed(5)
        split = gradients(model, model(ids, mask, cut, elsa.Link()), labels)
        assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True)), cut


@pytest.mark.parametrize("cut", CUTS)
def test_three_machines_that_exchange_tensors_get_the_same_gradients(cut):
    """Parts with graphs of their own: only states and their gradients cross, by value."""
    model, (ids, mask, labels) = bert().train(), texts(True)
    whole = gradients(model, unsplit(model, ids, mask), labels)
    model.zero_grad()
    p, q = cut
    first, bias = model.part1(ids, mask, p)  # client
    up = first.detach().clone().requires_grad_()
    second = model.blocks(up, bias, p, q)  # edge
    down = second.detach().clone().requires_grad_()
    logits = model.part3(down, bias, q)  # client again
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    if p < q:
        second.backward(down.grad.clone())
        first.backward(up.grad.clone())
    else:
        first.backward(down.grad.clone())
    found = [loss.detach(), logits.detach(), *(t.grad for t in model.parameters()
                                               if t.grad is not None)]
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


SIZE = {"vocab_size": 50, "hidden_size": D, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 16}
TWO_HEADS = {**SIZE, "num_key_value_heads": 2}
ENCODERS = {  # name -> (class, settings)
    "RoBERTa": ("Roberta", {**SIZE, "pad_token_id": 0}),
    "ELECTRA": ("Electra", {**SIZE, "embedding_size": 12}),
    "DistilBERT": ("DistilBert", {"vocab_size": 50, "dim": D, "n_layers": 4, "n_heads": 4,
                                  "hidden_dim": 48, "max_position_embeddings": 16})}
DECODERS = {
    "Llama": ("Llama", TWO_HEADS),
    "Qwen2": ("Qwen2", TWO_HEADS),
    "Qwen2, window in two blocks": ("Qwen2", {**TWO_HEADS, "use_sliding_window": True,
                                              "sliding_window": 3, "max_window_layers": 2}),
    "Qwen3": ("Qwen3", {**TWO_HEADS, "head_dim": 8}),
    "Mistral": ("Mistral", {**TWO_HEADS, "sliding_window": None}),
    "Mistral, window": ("Mistral", {**TWO_HEADS, "sliding_window": 3}),
    "GPT-2": ("GPT2", {"vocab_size": 50, "n_embd": D, "n_layer": 4, "n_head": 4, "n_positions": 16})
}


def language_model(name, dtype=torch.float32, attention="sdpa", lora=True, dropout=0.0):
    """A model of random weights, by its name in ENCODERS or DECODERS."""
    kind, settings = {**ENCODERS, **DECODERS}[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation=attention)
    for key in data.DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, dropout)
    encoder = transformers.AutoModel.from_config(config).to(dtype)
    for p in encoder.parameters():  # norms of one and biases of zero would hide mistakes
        nn.init.normal_(p, float(p.dim() == 1) * .5, .3)
    if getattr(encoder, "pooler", None):
        encoder.pooler = None
    model = elsa.SplitEncoder(encoder, 3, dropout)
    if lora:
        elsa.put_lora(model, 3, 6.)
        for key, p in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=.1)
    return model.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_every_architecture_split_equals_unsplit_bit_for_bit(name, dtype):
    """Against the library's own forward, LoRA in, with padding and dropout, at every cut."""
    model = language_model(name, dtype, dropout=.1).train()
    ids, mask, labels = texts(True)
    if dtype == torch.bfloat16:  # frozen weights in bfloat16, what is trained in float32
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n or n[:5] == "head."} \
            == {torch.float32} != {p.dtype for p in model.parameters()}
    else:
        model.to(dtype)

    def run(logits):
        torch.manual_seed(5)
        return gradients(model, logits(), labels)

    model.encoder.config.use_cache = False  # it copies keys and values, which GPT-2 may round by

    def whole():
        states = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        read = states[torch.arange(6), mask.sum(1) - 1] if name in DECODERS else states[:, 0]
        return model.head(model.dropout(read.to(model.head.weight.dtype)))
    expected = run(whole)
    assert len(expected) > 30 and all(t.isfinite().all() for t in expected)
    for cut in CUTS:
        link = elsa.Link()
        found = run(lambda cut=cut, link=link: model(ids, mask, cut, link))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), cut
        each = 6 * 11 * D * torch.finfo(dtype).bits / 8  # two bytes a number in bfloat16
        assert link.sent == dict.fromkeys(elsa.EXCHANGES, each)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_classify_as_transformers_own_classifier_does(name, dtype, attention):
    """ForSequenceClassification: logits, loss, and the gradient of every tensor, at every cut."""
    if "window" in name and attention == "eager" and dtype == torch.float64:
        pytest.skip("the library's own is NaN where a padded token's whole window is padding")
    model = language_model(name, dtype, attention, lora=False).to(dtype)
    ids, mask, labels = texts(True)
    config = model.encoder.config
    config.num_labels, config.pad_token_id = 3, 0
    theirs = getattr(transformers, f"{DECODERS[name][0]}ForSequenceClassification")(config)
    setattr(theirs, theirs.base_model_prefix, model.encoder)
    theirs.score = model.head
    assert model.head.bias is None
    out = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    expected = gradients(model, out.logits, labels)
    torch.testing.assert_close(out.loss, expected[0])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for cut in CUTS:
        found = gradients(model, model(ids, mask, cut, elsa.Link()), labels)
        torch.testing.assert_close(found, expected, **tolerance)


def test_lora_reaches_the_projections_of_the_table():
    """GPT-2's one matrix of query, key and value, which lies transposed, and Llama's two."""
    gpt2, llama = language_model("GPT-2"), language_model("Llama")
    weights = {n: p.shape for n, p in gpt2.named_parameters() if "lora_" in n}
    assert len(weights) == 2 * 4 and all("c_attn" in n for n in weights)
    assert {tuple(s) for s in weights.values()} == {(3, D), (3 * D, 3)}
    layer = gpt2.stack()[0].attn.c_attn
    x = randn(2, D, dtype=torch.float32)
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    plain = x @ layer.base_layer.weight + layer.base_layer.bias
    torch.testing.assert_close(layer(x), plain + 2 * x @ a.T @ b.T)  # α / r = 6 / 3
    named = {n.split(".")[4] for n, p in llama.named_parameters() if "lora_" in n}
    assert named == {"q_proj", "v_proj"}


def test_pefts_own_wrapper_is_taken_off():
    """get_peft_model instead of inject_adapter_in_model: the same states, LoRA stays inside."""
    model = language_model("Llama", lora=False)
    ids, mask, _ = texts(True)
    wrapped = peft.get_peft_model(model.encoder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    split = elsa.SplitEncoder(wrapped, 3)
    split.head = model.head
    assert sum("lora_" in n for n, _ in split.named_parameters()) == 8
    torch.testing.assert_close(split(ids, mask, (1, 3)), unsplit_decoder(wrapped, model, ids, mask))


def unsplit_decoder(encoder, model, ids, mask):
    states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return model.head(states[torch.arange(len(ids)), mask.sum(1) - 1])


def test_what_cannot_be_cut_is_refused_with_what_can():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1,
                                   num_heads=2)
    with pytest.raises(ValueError, match=r"is a T5Model; .*BERT-type.*Qwen3, Mistral.*GPT-2"):
        elsa.SplitEncoder(transformers.T5Model(config), 2)


def test_link_mode_is_lossless_and_edge_mode_is_not():
    model, (ids, mask, _) = bert(torch.float64).eval(), texts(True)
    plain = model(ids, mask, (1, 3))
    turn = rotation(D, 8)
    link = model(ids, mask, (1, 3), elsa.Link({}, turn, "link"))
    edge = model(ids, mask, (1, 3), elsa.Link({}, turn, "edge"))
    torch.testing.assert_close(link, plain, atol=1e-5, rtol=0)
    assert (edge - plain).abs().max() > 1e-3


# ================================================================================================
# Data
# ================================================================================================

TREC_LINES = "DESC:manner How did serfdom develop ?\nLOC:city Where is M\xfcnchen ?\n" \
             "NUM:dist How far is it ?\n"


def write_trec(root, train=TREC_LINES * 8):
    (root / "trec").mkdir(parents=True)
    for name, text in (("train_5500.label", train), ("TREC_10.label", TREC_LINES)):
        (root / "trec" / name).write_bytes(text.encode("latin-1"))


def test_trec_is_read_as_latin_1_with_coarse_labels(tmp_path):
    write_trec(tmp_path)
    found = data.load_texts("trec", tmp_path)
    assert found.test == ["How did serfdom develop ?", "Where is München ?", "How far is it ?"]
    assert [found.class_names[c] for c in found.test_labels] == ["DESC", "LOC", "NUM"]
    assert len(found.train) == 24 and found.probes == []


def test_ag_news_joins_title_and_description(tmp_path):
    root = tmp_path / "ag-news" / "ag_news_csv"
    root.mkdir(parents=True)
    rows = '"3","Wall St. Bears","Short-sellers, ""seeing"" green."\n"1","A","B"\n'
    for name in ("train", "test"):
        (root / f"{name}.csv").write_text(rows)
    found = data.load_texts("ag-news", tmp_path)
    assert found.train == ['Wall St. Bears Short-sellers, "seeing" green.', "A B"]
    assert found.train_labels.tolist() == [2, 0]


@pytest.mark.parametrize("header", ["", "sentence\tlabel\n"])
def test_sst2_with_and_without_header(tmp_path, header):
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text(header + "a fine film\t1\ndull\t0\n")
    found = data.load_texts("sst2", tmp_path)
    assert found.train == ["a fine film", "dull"] and found.test_labels.tolist() == [1, 0]


ROWS = [(c, f"{c} text, number {i}") for i in range(5) for c in ("egg", "ham", "spam")]


def table(rows=ROWS, sep=",", head=None, end="\n"):
    """Rows as a spreadsheet writes them."""
    lines = io.StringIO()
    csv.writer(lines, delimiter=sep, lineterminator=end).writerows([head] * bool(head) + rows)
    return lines.getvalue()


def turned(rows=ROWS):
    return [row[::-1] for row in rows]


def numbered(rows=ROWS):
    return [(i, text, label) for i, (label, text) in enumerate(rows)]


def read_csv(folder, content, file="t.csv", **flags):
    """The TextSet of a csv of this content (text: UTF-8)."""
    path = folder / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.load_texts(f"csv:{path}", folder, 0, **flags)


def pairs(found):
    """All (label, text) of a set without probes, sorted."""
    return sorted((found.class_names[c], text) for part, labels in (
        (found.train, found.train_labels), (found.test, found.test_labels))
        for text, c in zip(part, labels, strict=True))


ODD = {"label_column": "gold", "text_column": "Words"}
STRAY = [(a, f'"{b}" he said' if i % 2 else f'{b} "') for i, (a, b) in enumerate(ROWS)]
LINES = [(a, f'{b}\n\nyes, "and"\r\negg\nmore') for a, b in ROWS]  # legitimate line breaks
JSON = [{"id": i, "text": b, "label": a} for i, (a, b) in enumerate(ROWS)]
# what is written, flags, the rows that it means, what is said of it
READABLE = {
    "no header": (table(), {}, ROWS, "15 rows of t.csv (comma, utf-8, no header)"),
    "header": (table(head=("Label", "Text")), {}, ROWS, "header Label,Text)"),
    "text first": (table(turned(), head=("review", "sentiment")), {}, ROWS, "label = sentiment"),
    "text first, no header": (table(turned()), {"label_column": "2"}, ROWS, "label = column 2"),
    "an index": (table(numbered(), head=("", "sentence", "category")), {}, ROWS,
                 "label = category, text = sentence"),
    "columns by name": (table(numbered(), head=("id", "words", "Gold")), ODD, ROWS, "label = Gold"),
    "columns by number": (table(numbered()), {"label_column": "3", "text_column": "2"}, ROWS,
                          "no header, label = column 3"),
    "one column named": (table(head=("gold", "words")), {"label_column": "gold"}, ROWS,
                         "header gold,words"),
    "empty columns": (table([(*r, "", "") for r in ROWS], head=("label", "text", "", "")), {}, ROWS,
                      "label = label"),
    "a class called text": (table([("text", b) if a == "egg" else (a, b) for a, b in ROWS]), {},
                            [("text", b) if a == "egg" else (a, b) for a, b in ROWS], "no header"),
    "header twice": (table(head=("label", "text")) + table(turned(turned()), head=("label", "text"))
                     .replace("number", "item"), {},
                     ROWS + [(a, b.replace("number", "item")) for a, b in ROWS],
                     "copies of the header left out: 1"),
    "semicolon": (table(sep=";", head=("label", "text")), {}, ROWS, "(semicolon, utf-8, header"),
    "a first line that tells": ("sep=;\r\n" + table(sep=";", head=("label", "text")), {}, ROWS,
                               "(semicolon, utf-8, header label,text)"),
    "semicolons in texts": (table([(a, f"x{i}; y{i}") for i, (a, _) in enumerate(ROWS)]), {},
                            [(a, f"x{i}; y{i}") for i, (a, _) in enumerate(ROWS)], "(comma, utf"),
    "tab": (table(sep="\t"), {}, ROWS, "(tab, utf-8"),
    "quotes in a tsv": ("".join(f"{a}\t{b}\n" for a, b in STRAY), {}, STRAY,
                        "quotes are part of texts"),
    "quotes in a csv": (table(STRAY), {}, STRAY, "(comma, utf-8, no header)"),
    "spaces before quotes": ("".join(f'{a}, "{b}"\n' for a, b in ROWS), {}, ROWS, "(comma"),
    "lines in texts": (table(LINES), {}, LINES, "15 rows"),
    "windows, blank lines": (table(end="\r\n\r\n"), {}, ROWS, "15 rows"),
    "old mac": (table(end="\r"), {}, ROWS, "15 rows"),
    "only separators": (table() + ",\n,\n", {}, ROWS, "15 rows"),
    "byte order mark": (table(head=("label", "text")).encode("utf-8-sig"), {}, ROWS,
                        "utf-8, header label"),
    "utf-16": (table().encode("utf-16"), {}, ROWS, "(comma, utf-16"),
    "utf-16, big end first": (b"\xfe\xff" + table().encode("utf-16-be"), {}, ROWS, "utf-16"),
    "latin-1, named": (table([("caf\xe9", "a"), ("caf\xe8", "b")] * 2).encode("latin-1"),
                       {"encoding": "latin-1"}, [("caf\xe9", "a"), ("caf\xe8", "b")] * 2,
                       "(comma, latin-1, no"),
    "utf-8, called cp1252": (table([("a", "\xe4"), ("b", "c")] * 2), {"encoding": "cp1252"},
                             [("a", "\xc3\xa4"), ("b", "c")] * 2, "though it is valid utf-8"),
    "a mark beats a name": (table(ROWS).encode("utf-8-sig"), {"encoding": "cp1252"}, ROWS, "utf-8"),
    "a long text": (table([("a", "x" * 300_000), ("b", "y")] * 2), {},
                    [("a", "x" * 300_000), ("b", "y")] * 2, "4 rows"),
    "spaces around labels": (table([(f" {a} ", b) for a, b in ROWS[:6]] + ROWS[6:]), {}, ROWS,
                             "with and without spaces around them taken together"),
    "forms of labels": (table([("1", "a"), ("1.0", "b"), ("Egg", "c"), ("egg", "d")] * 2), {},
                        [("1", "a"), ("1.0", "b"), ("Egg", "c"), ("egg", "d")] * 2,
                        "kept apart: '1' and '1.0'; 'Egg' and 'egg'"),
    "unicode forms": (table([("caf\xe9", "a"), ("cafe\u0301", "b")] * 2), {},
                      [("caf\xe9", "a"), ("cafe\u0301", "b")] * 2, "in form only are kept apart"),
    "two labels of a text": (table([*ROWS, ("ham", ROWS[0][1])]), {}, [*ROWS, ("ham", ROWS[0][1])],
                             "more than one label: 1, such as 'egg text, number 0'"),
    "lost characters": (table([*ROWS, ("ham", "a\ufffdb")]), {}, [*ROWS, ("ham", "a\ufffdb")],
                        "U+FFFD, a character that was lost before: 1"),
    "json lines": ("\n".join(map(json.dumps, JSON)), {}, ROWS, "(JSON lines, utf-8"),
    "numbers in json": ("\n".join(json.dumps({"text": "a b", "label": i % 2}) for i in range(4)),
                        {}, [("0", "a b"), ("0", "a b"), ("1", "a b"), ("1", "a b")], "JSON")}
FILES = {"quotes in a tsv": "t.tsv", "json lines": "t.jsonl", "numbers in json": "t.jsonl"}


@pytest.mark.parametrize("case", READABLE)
def test_csv_is_read_as_it_is_meant(tmp_path, case):
    content, flags, rows, words = READABLE[case]
    found = read_csv(tmp_path, content, FILES.get(case, "t.csv"), **flags)
    assert pairs(found) == sorted(rows) and words in found.said
    assert found.class_names == sorted({label for label, _ in rows})


def swallowed():
    """Line 3 opens a quote that line 9 happens to close."""
    lines = table([(a, b.replace(",", "")) for a, b in ROWS]).splitlines()
    lines[2] = lines[2].replace(",", ',"')
    return "\n".join([*lines[:8], lines[8] + '"', *lines[9:]])


# what is written, flags, what the message must say
REFUSED = {
    "a header of other words": (table(head=("Klasse", "Kommentar")), {},
                                "row 1, 'Klasse,Kommentar', looks like a header.* --label-column "
                                "'Klasse' --text-column 'Kommentar'"),
    "a header and numbers": (table(numbered(), head=("id", "words", "gold")),
                             {"label_column": "3", "text_column": "2"}, "looks like a header"),
    "text first": (table(turned()), {}, "column 2 has 3; if those are labels, add --label-colum"),
    "three columns": (table(numbered()), {}, "3 columns, row 1 is 0,.*--label-column and --text-c"),
    "two text columns": (table(numbered(), head=("title", "text", "body")), {}, "name the two"),
    "no such column": (table(numbered(), head=("id", "words", "gold")),
                       {"label_column": "class", "text_column": "words"},
                       "--label-column class: row 1 of .* is id,words,gold.*1 to 3"),
    "no such number": (table(), {"label_column": "3"}, "--label-column 3: row 1 .* from 1 to 2"),
    "one column for both": (table(), {"label_column": "1", "text_column": "1"}, "name the two"),
    "two separators": ("a,x;y\nb,z;u\na,v;y\n", {}, "at every comma and at every semicolon"),
    "no separator": ("some words\nothers\n", {}, "comma, semicolon or tab.*found 'some words'"),
    "a comma in a text": (table() + "egg,one, two\nham\n", {},
                          "2 of 17 rows do not have 2 fields: row 16 has 3, row 17 has 1; a text "
                          "that holds ',' must stand in quotes"),
    "a quote swallows rows": (swallowed(), {}, "row 3: a quote has gone astray.* with 6 lines that "
                              "look like rows, such as 'egg,egg text number 1'"),
    "a quote never closed": (table() + 'egg,"one\nham,two\n', {}, "row 16: a quote that opens"),
    "more after a quote": (table() + 'egg,"one" two\n', {}, "row 16: a quote that opens here"),
    "a label of two lines": (table([*ROWS, ("egg\nham", "x"), ("egg\nham", "y")]), {},
                             "row 16: its label has several lines"),
    "latin-1": (table([*ROWS, ("egg", "\xe4")]).encode("latin-1"), {}, "row 16 holds the byte "
                "0xe4, which is not utf-8; name .*--encoding, such as cp1252"),
    "latin-1 with a mark": (b"\xef\xbb\xbf" + table([*ROWS, ("egg", "\xe4")]).encode("latin-1"), {},
                            "row 16 holds the byte 0xe4"),
    "not cp1252": (b"a,b\na,\x81\n", {"encoding": "cp1252"}, "row 2 holds the byte 0x81"),
    "an unknown encoding": (table(), {"encoding": "latin-99"}, "--encoding latin-99 is unknown"),
    "no text encoding": (table(), {"encoding": "rot13"}, "--encoding rot13 is unknown"),
    "utf-16 without a mark": (table().encode("utf-16-le"), {}, "row 1 holds a NUL.*utf-16-le"),
    "a NUL": (table() + "egg,a\0b\n", {}, "row 16 holds a NUL byte"),
    "a spreadsheet": (b"PK\3\4\x14\0\6\0\xff\xfe", {}, "NUL byte: it is no text file"),
    "no texts": (table() + "egg,\n,one\nham, \n", {}, r"text or a label \(3\): 16, 17, 18;"),
    "many without": ("".join(f"a,\nb,{i}\n" for i in range(12)), {},
                     r"label \(12\): 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...;"),
    "classes of one row": (table([*ROWS, ("rye", "x"), ("fig", "y")]), {},
                           r"classes of one row \(2\): 'rye' \(row 16\), 'fig' \(row 17\)"),
    "one class": ("a,b\na,c\n", {}, "has 1 classes"), "empty": ("", {}, "it is empty"),
    "a header alone": ("label,text\n", {}, "holds a header and no rows"),
    "no object": ('{"text": "a", "label": 1}\n[1]\n', {}, "row 2: expected a JSON object"),
    "half a character in json": ('{"text": "\\ud83d", "label": 1}\n', {}, "row 1: expected a JSON"),
    "broken json": ('{"text": "a",\n', {}, "row 1: expected a JSON object"),
    "lists in json": ('{"text": ["a"], "label": 1}\n{"text": "b", "label": null}\n', {},
                      r"rows without a text or a label \(2\): 1, 2;")}


@pytest.mark.parametrize("case", REFUSED)
def test_csv_that_is_damaged_or_ambiguous_is_named(tmp_path, case):
    content, flags, words = REFUSED[case]
    file = "t.jsonl" if "json" in case or "object" in case else "t.csv"
    with pytest.raises(common.UserError, match=words) as error:
        read_csv(tmp_path, content, file, **flags)
    assert file in str(error.value) or "--encoding" in words


def test_csv_test_is_a_drawn_fifth_of_every_class(tmp_path):
    """Also of a file in a pattern of five, which every fifth row would cut to pieces."""
    rows = [("ham" if i < 50 else "spam", f"kind {i % 5}, number {i}") for i in range(100)]
    rows += [("egg", "one"), ("egg", "two")]
    content = table(rows)
    found = read_csv(tmp_path, content)
    assert found.class_names == ["egg", "ham", "spam"]
    assert np.bincount(found.train_labels).tolist() == [1, 40, 40]
    assert np.bincount(found.test_labels).tolist() == [1, 10, 10]
    assert pairs(found) == sorted(rows) and "test: a drawn fifth, 21" in found.said
    assert len({text[:6] for text in found.test if text.startswith("kind")}) == 5
    assert read_csv(tmp_path, content).test == found.test
    path = tmp_path / "t.csv"
    assert data.load_texts(f"csv:{path}", tmp_path, 1).test != found.test


def test_csv_with_a_test_file_of_its_own(tmp_path):
    other = tmp_path / "test.csv"
    rows = [*numbered(ROWS[:2]), (9, "new", "egg")]
    flags = {"test_file": other, "label_column": "gold", "text_column": "words"}
    head = ("id", "words", "gold")
    other.write_text(table(rows, sep=";", head=head))
    found = read_csv(tmp_path, table([*numbered(), (3, "x", "rye")], head=head), **flags)
    assert found.test == [ROWS[0][1], ROWS[1][1], "new"] and len(found.train) == 16
    assert [found.class_names[c] for c in found.test_labels] == ["egg", "ham", "egg"]
    assert "test: 3 rows of test.csv (semicolon, utf-8, header id,words,gold" in found.said
    assert "no test text of rye, spam" in found.said
    assert "test texts that stand in the training part too: 2" in found.said
    for content, words in ((table([*rows, (1, "y", "rice")], head=head), r"'rice' \(row 5\)"),
                           (table(rows, head=("id", "words", "label")), "id,words,label")):
        other.write_text(content)
        with pytest.raises(common.UserError, match=f"test.csv.*{words}|{words}.*test.csv|{words}"):
            read_csv(tmp_path, table(numbered(), head=head), **flags)
    # a test file without a header is read by the columns of the training file
    other.write_text(table(turned(ROWS[:3])))
    found = read_csv(tmp_path, table(turned(), head=("text", "label")), test_file=other)
    assert found.test == [text for _, text in ROWS[:3]]
    with pytest.raises(common.UserError, match=r"--test-file .*gone.csv: there is no such file"):
        read_csv(tmp_path, table(), test_file=tmp_path / "gone.csv")


def test_csv_paths_are_read_as_a_user_writes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Mine.csv").write_text(table())
    assert len(data.load_texts("csv:~/Mine.csv", tmp_path).train) == 12
    assert data.load_texts("csv:./Mine.csv", tmp_path).said == \
        data.load_texts("csv:Mine.csv", tmp_path).said
    (tmp_path / "folder").mkdir()
    for name, words in (("csv:mine.csv", "no such file; did you mean Mine.csv"),
                        ("csv:folder", "this is a folder; name a file"),
                        ("csv:.", "a folder; name a file; did you mean Mine.csv"),
                        ("Mine.csv", "Did you mean csv:Mine.csv"), ("TREC", "Did you mean trec"),
                        ("ag_news", "Did you mean ag-news"), ("CSV:x", "Did you mean csv:x"),
                        ("folder", "Did you mean csv:folder/FILE"), ("imdb", "and csv:PATH$")):
        with pytest.raises(common.UserError, match=words):
            data.load_texts(name, tmp_path)


def test_more_than_ten_classes_are_told_in_short(tmp_path):
    rows = [(f"c{i:02}", f"text {i}, {j}") for i in range(14) for j in range(3 + (i != 9))]
    assert "14 classes (c00 4, c01 4, c02 4, c03 4, c04 4, ..., rarest: c09 3)" in \
        read_csv(tmp_path, table(rows)).said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig", "utf-16"])
def test_probes_are_the_lines_of_a_file_each_once(tmp_path, encoding):
    path = tmp_path / "probes.txt"
    path.write_bytes("one\r\n\r\n two \rthr\x85ee\none\nf\xf6ur\n".encode(encoding))
    found = read_csv(tmp_path, table(), probes=path,
                     encoding=None if encoding.startswith("utf") else encoding)
    assert found.probes == ["one", "two", "thr\x85ee", "f\xf6ur"]
    assert "4 probes of probes.txt (" in found.said and "repeated lines left out: 1" in found.said
    assert len(found.train) == 12  # none of its own set apart
    path.write_bytes(b"one\ntwo\n\xe4\nfour\nfive\n")
    with pytest.raises(common.UserError, match=r"probes.txt, row 3 holds the byte 0xe4"):
        read_csv(tmp_path, table(), probes=path)


def test_probes_set_apart_leave_a_text_of_every_class(tmp_path):
    rows = [("many", f"text {i}") for i in range(60)] + [("few", "one"), ("few", "two")]
    for seed in range(8):
        (tmp_path / "t.csv").write_text(table(rows))
        found = data.load_texts(f"csv:{tmp_path / 't.csv'}", tmp_path, seed, None, 96)
        assert len(found.probes) == 12 and len(found.train) == 37
        assert (np.bincount(found.train_labels) > 0).all()
        assert "12 training texts set apart as probes (of 96 wanted: a quar" in found.said


def test_downloads_unpack_and_missing_ones_say_what_to_put_where(tmp_path, monkeypatch):
    def fetch(url, path):
        if url.endswith("SST-2.zip"):
            with zipfile.ZipFile(path, "w") as content:
                for name in ("train.tsv", "dev.tsv"):
                    content.writestr(f"SST-2/{name}", "sentence\tlabel\ngood\t1\nbad\t0\n")
                content.writestr("../outside", "x")
        elif url.endswith(".tgz"):
            with tarfile.open(path, "w:gz") as tar:
                for name in ("train.csv", "test.csv"):
                    raw = b'"1","a","b"\n"2","c","d"\n'
                    info = tarfile.TarInfo(f"ag_news_csv/{name}")
                    info.size = len(raw)
                    tar.addfile(info, io.BytesIO(raw))
        else:
            raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert data.load_texts("sst2", tmp_path).train == ["good", "bad"]
    assert not (tmp_path.parent / "outside").exists() and not (tmp_path / "outside").exists()
    assert data.load_texts("ag-news", tmp_path).test == ["a b", "c d"]
    with pytest.raises(common.UserError, match=r"train_5500.label and TREC_10.label into .*trec"):
        data.load_texts("trec", tmp_path)
    with pytest.raises(common.UserError, match="there are trec"):
        data.load_texts("imdb", tmp_path)


@pytest.mark.parametrize("name, file, text, words", [
    ("trec", "train_5500.label", "no label here\n", "line 1"),
    ("trec", "train_5500.label", "", "0 texts"),
    ("sst2", "train.tsv", "fine\t1\nodd line\n", "line 2")])
def test_damaged_text_files_are_named(tmp_path, name, file, text, words):
    (tmp_path / name).mkdir()
    for other in data.TEXT_FILES[name][1]:
        (tmp_path / name / other).write_text("DESC:x a ?\n" if name == "trec" else "a\t1\n")
    (tmp_path / name / file).write_text(text)
    with pytest.raises(common.UserError, match=words) as error:
        data.load_texts(name, tmp_path)
    assert file in str(error.value)


def test_known_sets_in_other_encodings_and_line_ends(tmp_path):
    """As an editor may have saved them: the same texts."""
    write_trec(tmp_path)
    plain = data.load_texts("trec", tmp_path)
    for encoding, end in (("utf-8", "\n"), ("utf-8-sig", "\r\n"), ("latin-1", "\r\n")):
        for name, text in (("train_5500.label", TREC_LINES * 8), ("TREC_10.label", TREC_LINES)):
            (tmp_path / "trec" / name).write_bytes(text.replace("\n", end).encode(encoding))
        again = data.load_texts("trec", tmp_path)
        assert (again.train, again.test, again.said) == (plain.train, plain.test, plain.said)
    assert "TREC_10.label holds no text of ABBR, ENTY, HUM" in plain.said
    assert "6 classes (ABBR 0, DESC 8, " in plain.said and "training part too: 3" in plain.said
    for name, files, raw in (
            ("sst2", ("train.tsv", "dev.tsv"), "sentence\tlabel\r\nfine\t1\r\n\r\ndull\t0\r\n"),
            ("ag-news", ("ag_news_csv/train.csv", "ag_news_csv/test.csv"),
             '"2","fi","ne"\r\n\r\n"1","du","ll"\r\n')):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(raw.encode("utf-8-sig"))
        found = data.load_texts(name, tmp_path)
        assert [t.replace(" ", "") for t in found.train] == ["fine", "dull"]
        assert found.train_labels.tolist() == [1, 0]


def test_clients_fit_the_set_where_their_number_is_left_open(tmp_path):
    world = data.topics(3)
    for a, b in zip(data.text_clients(world, None, 3.0)[0], data.text_clients(world, 12, 3.0)[0],
                    strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    tiny = read_csv(tmp_path, table())  # 12 training and 3 test texts
    clients, domain = data.text_clients(tiny, None, .5)
    assert len(clients) == 1 and domain == [0]
    assert [len(part) for part in clients[0]] == [12, 3]
    more = read_csv(tmp_path, table(ROWS * 4))  # 48 and 12
    clients, _ = data.text_clients(more, None, .5)
    assert len(clients) == 6 and all(len(a) and len(b) for a, b in clients)
    with pytest.raises(common.UserError, match=r"all 12 clients .* or a larger --alpha"):
        data.text_clients(tiny, 12, .5)


def test_topics_contradict_each_other_between_domains_only_where_they_should():
    hard, easy = data.topics(3), data.topics(3, same=True)
    assert hard.train == easy.train and len(hard.train) == 2400 and len(set(hard.probes)) > 80
    topic = {w: t for t, words in enumerate(data.TOPIC_WORDS) for w in words}
    domain = {w: d for d, words in enumerate(data.DOMAIN_WORDS) for w in words}
    for found, shift in ((hard, 1), (easy, 0)):
        for text, label, group in list(zip(found.train, found.train_labels, found.train_groups,
                                           strict=True))[::50]:
            said = [topic[w] for w in text.split() if w in topic]
            assert len(said) == 3 and len(set(said)) == 1
            assert {domain[w] for w in text.split() if w in domain} == {group}
            assert label == (said[0] + shift * group) % 5
    assert not set(hard.test) & set(hard.probes)
    assert data.topics(4).train != hard.train


def test_tiny_bert_learns_words_and_is_cached(tmp_path):
    config = data.TinyBertConfig(width=16, layers=1, heads=2, sentences=300, steps=40)
    model, encode = data.tiny_bert(0, tmp_path, config)
    again, _ = data.tiny_bert(0, tmp_path, config)
    assert len(list(tmp_path.glob("tiny-bert-*.pt"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(),
                                                 strict=True))
    ids, mask = encode(["the storm", "old ship and rain"])
    assert mask.sum(1).tolist() == [4, 6] and (ids[:, 0] == ids[0, 0]).all()


def test_poison_takes_turns_over_domains_and_spoils_training_labels_only():
    labels, domain = torch.arange(60) % 3, [0, 1] * 3
    clients = [(torch.arange(8 * k, 8 * k + 8), torch.tensor([50 + k])) for k in range(6)]
    told, poisoned = data.poison_labels(labels, 3, clients, domain, "label-flip:2,random:2", 4)
    assert sorted(poisoned.values()) == ["label-flip"] * 2 + ["random"] * 2
    for kind in ("label-flip", "random"):
        assert {domain[k] for k, name in poisoned.items() if name == kind} == {0, 1}
    for k, (mine, test) in enumerate(clients):
        assert torch.equal(told[test], labels[test])
        if poisoned.get(k) == "label-flip":
            assert torch.equal(told[mine], 2 - labels[mine])
        else:
            assert torch.equal(told[mine], labels[mine]) == (k not in poisoned)


def test_small_world_shows_domains_and_liars(tmp_path):
    """The conditions of the small world: [CLS] holds topic and domain, the fingerprints group by
    domain, and who lies about labels is told from who does not."""
    args = elsa.resolve(elsa.build_parser().parse_args(
        ["--seed", "5", "--data-dir", str(tmp_path), "--out-dir", str(tmp_path / "out")]))
    with common.Run(args, "small") as run:
        world = elsa.build_federation(args, run)
        setup = elsa.set_up(world, run)
    _, labels, yielded = elsa.place_clients(world, "elsa", setup)
    assert not yielded and sorted(world.poisoned.values()) == ["label-flip"] * 2 + ["random"]
    assert {k for k in range(12) if labels[k] is None} == set(world.poisoned)
    pairs = {(world.domain[k], labels[k]) for k in world.honest}
    assert len(pairs) == 3 and len({c for _, c in pairs}) == 3
    assert min(setup["trust"][k] for k in world.honest) > \
        max(setup["trust"][k] for k in world.poisoned)


# ================================================================================================
# The command
# ================================================================================================


def write_small(root):
    """A csv of four classes and a random 3-block BERT with its tokenizer, as directories."""
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "lmn"]  # 15 of each class
    rng = np.random.default_rng(0)
    with open(root / "texts.csv", "w", newline="") as handle:
        for i in range(160):
            mine = rng.choice(15, 4) + 15 * (i % 4)
            csv.writer(handle).writerow([f"kind {i % 4}", " ".join(words[j] for j in mine)])
    (root / "model").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "model")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=3,
                         num_attention_heads=2, intermediate_size=32, max_position_embeddings=16)
              ).save_pretrained(root / "model")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("elsa"))


def arguments(small, *more):
    """A run that takes about a second: four classes, five clients, two edges."""
    given = {"--dataset": f"csv:{small / 'texts.csv'}", "--model": small / "model", "--clients": 5,
             "--edges": 2, "--alpha": 3, "--batch": 8, "--rounds": 2, "--num-probes": 16,
             "--fingerprint-rank": 4, "--warmup-steps": 3, "--ssop-rank": 4, "--threads": 1,
             "--lr": .01, "--data-dir": small / "data"}
    more = [str(w) for w in more]
    for key in list(given):
        if key in more:
            del given[key]
    return [*(str(w) for pair in given.items() for w in pair), *more]


def without_sources(err, *others):
    """What a run put on stderr beside the lines about what it read."""
    return "\n".join(line for line in err.strip().splitlines()
                     if not line.startswith(("texts: ", "encoder: ", *others)))


def trained(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    return [t for m in state["trained"].values() for e in [*m["edges"], m["cloud"]]
            for t in e.values()]


def assert_equal_runs(first, second):
    """The same result and, bit for bit, the same adapters."""
    assert result(first) == result(second)
    a, b = trained(first), trained(second)
    assert len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


LONG = ["--rounds", 12, "--method", "fedavg,elsa"]


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    out, err = finish(start(SCRIPT, arguments(small, *LONG, "--out-dir", folder)))
    return folder, out, err


def test_run_leaves_its_files_and_a_result_line(reference):
    folder, out, err = reference
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "result.json", "figure.png", "elsa.py"}
    assert without_sources(err) == "" and err.splitlines()[0] == (
        "texts: 160 rows of texts.csv (comma, utf-8, no header), 4 classes (kind 0 40, kind 1 40, "
        "kind 2 40, kind 3 40), test: a drawn fifth, 32; 16 training texts set apart as probes; "
        "5 clients of 17 to 29 training texts")
    assert err.splitlines()[1].startswith("encoder: BertModel of ")
    assert re.fullmatch(r"RESULT( \w+=\S+)+", out.strip().splitlines()[-1])
    found = result(folder)
    assert found["sources"]["texts"] == err.splitlines()[0].removeprefix("texts: ")
    assert [h["round"] for h in found["results"]["elsa"]["history"]] == list(range(1, 13))
    for table in ("links of ELSA", "before the first round", "by edge"):
        assert table in out
    assert not {"curve", "privacy", "seconds"} & set(found)  # these are of beyond/


def test_bytes_of_a_run_are_those_of_its_texts(small, tmp_path):
    """Each link by the formula, from lengths counted here."""
    words = arguments(small, "--method", "elsa", "--channel", "none", "--rounds", 1, "--no-trust",
                      "--cloud-every", 1, "--out-dir", tmp_path / "out")
    elsa.main(words)
    whole = result(tmp_path / "out")
    found = whole["results"]["elsa"]["bytes"]
    assert whole["once"] == {"probe states up": 5 * 16 * 16 * 4,
                             "probe predictions up": 5 * 16 * 4 * 4,
                             "rotations up": 5 * (16 * 4 + 4 * 4) * 4}
    args = elsa.resolve(elsa.build_parser().parse_args(words))
    args.out_dir = tmp_path / "other"
    with common.Run(args, "x") as run:
        world = elsa.build_federation(args, run)
    tokens = 0
    for k in range(5):
        for here in world.batches(k, "round", 0):
            longest = max(len(world.texts.train[i].split()) + 2 for i in here)
            tokens += len(here) * longest
    assert {n: found[n] for n in elsa.EXCHANGES} == dict.fromkeys(elsa.EXCHANGES, tokens * 16 * 4)
    block = 2 * 2 * 8 * 16  # q and v, A and B, rank, width
    head = 4 * 16 + 4
    mine = 2 * block + head  # part 2, the block in the middle, stays at the edge
    assert found["adapters up"] == found["adapters down"] == 5 * mine * 4
    assert found["edge-cloud"] == 2 * 2 * (3 * block + head) * 4
    elsa.main([*words[:-1], str(tmp_path / "b"), "--sketch", "both", "--channel", "sketch"])
    coded = result(tmp_path / "b")["results"]["elsa"]["bytes"]
    assert coded["gradients up"] == tokens * 6 * 4  # half of 16 in three rows: two sums each
    assert coded["adapters up"] == 5 * math.ceil(mine / 16) * 6 * 4


def test_same_command_gives_the_same_numbers_and_another_seed_others(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert exit_code(elsa.main, arguments(small, "--dropout", .1, "--seed", seed, "--out-dir",
                                              tmp_path / name)) == 0
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert result(tmp_path / "a")["distance"] != result(tmp_path / "c")["distance"]


def test_killed_at_any_moment_and_resumed_ends_with_the_same_numbers(small, reference, tmp_path):
    folder = tmp_path / "out"
    words = arguments(small, *LONG, "--out-dir", folder)
    for rows in (5, 16):  # in FedAvg, then in ELSA
        kill(SCRIPT, words, folder, rows)
    finish(start(SCRIPT, [*words, "--resume"]))
    assert_equal_runs(folder, reference[0])


def test_ctrl_c_says_how_to_go_on(small, tmp_path):
    folder = tmp_path / "out"
    process = start(SCRIPT, arguments(small, "--rounds", 400, "--out-dir", folder))
    wait_for_rows(folder, 2, process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=130)
    err = without_sources(err)
    assert len(err.strip().splitlines()) == 1 and "--resume" in err and str(folder) in err


def test_two_processes_give_the_numbers_of_one(small, tmp_path):
    """Bit for bit: whichever process has a client trains it alone, with one thread, on the same
    batches; what the processes exchange is added up in the order of the clients."""
    words = arguments(small, "--method", "elsa,local", "--split", "auto")
    assert exit_code(elsa.main, [*words, "--out-dir", tmp_path / "one"]) == 0
    out, _ = finish(start(SCRIPT, [*words, "--out-dir", tmp_path / "two"], launcher=torchrun()))
    assert out.count("RESULT") == 1
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


def test_all_methods_run_and_differ(small, tmp_path, capsys):
    elsa.main(arguments(small, "--method", "all", "--out-dir", tmp_path / "out"))
    found = result(tmp_path / "out")["results"]
    assert list(found) == elsa.METHODS
    assert found["fedavg"]["bytes"]["activations up"] == 0 < found["elsa"]["bytes"]["gradients up"]
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["state"]["trained"]
    heads = {tuple(m["cloud"]["head.bias"].tolist()) for m in state.values()}
    assert len(heads) == len(elsa.METHODS)
    table = capsys.readouterr().out
    assert all(label in table for label in elsa.LABELS.values())


PLAIN = ["--channel", "none", "--ssop", "none"]


@pytest.mark.parametrize("flags", [
    ["--ssop", "edge"], ["--no-trust", "--no-cluster"], ["--channel", "sketch"],
    ["--channel", "sketch", "--recovery", "lsq"], ["--sketch", "both"],
    ["--poison", "label-flip:1,random:1"], ["--split", "0,3"], ["--cloud-mix", "0"],
    ["--local-epochs", "2"]], ids=" ".join)
def test_options_change_the_run(small, tmp_path, flags, plain_heads):
    elsa.main(arguments(small, "--out-dir", tmp_path / "a", *PLAIN, *flags))  # the last one counts
    a = trained(tmp_path / "a")
    if flags == ["--split", "0,3"] or flags == ["--sketch", "both"]:
        # Without a lossy channel a cut changes what crosses, not what is computed.
        assert all(torch.equal(x, y) for x, y in zip(a, plain_heads, strict=True))
    else:
        assert len(a) != len(plain_heads) or any(
            not torch.equal(x, y) for x, y in zip(a, plain_heads, strict=True))


@pytest.fixture(scope="module")
def plain_heads(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "out"
    elsa.main(arguments(small, "--out-dir", folder, *PLAIN))
    return trained(folder)


def test_flat_split_training_without_channel_is_fedavg(small, tmp_path):
    """A whole federation, not a step: the same adapters bit for bit."""
    elsa.main(arguments(small, "--method", "fedavg,split-flat", "--channel", "none", "--ssop",
                        "none", "--dropout", .1, "--out-dir", tmp_path / "out"))
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["state"]["trained"]
    a, b = state["fedavg"]["cloud"], state["split-flat"]["cloud"]
    assert len(a) > 10 and all(torch.equal(a[n], b[n]) for n in a)


def test_edges_that_follow_the_cloud_every_round_are_fedavg(small, tmp_path, monkeypatch):
    """Means of means by samples are the mean: who keeps everybody and mixes fully is flat. Not so
    when the cloud comes every other round.

    In float64, where the means differ by 1e-16 and gradients after them by 1e-15. AdamW divides by
    1e-8 at least, so that 3 rounds of 4 steps differ by less than 12 · .01 · 1e-15 / 1e-8 = 1.2e-8.
    """
    federation = elsa.Federation
    monkeypatch.setattr(elsa, "Federation", lambda args, run, texts, model, *rest: federation(
        args, run, texts, model.double(), *rest))
    words = ["--method", "fedavg,elsa", "--channel", "none", "--ssop", "none", "--no-trust"]
    for every, same in ((1, True), (2, False)):
        out = tmp_path / str(every)
        elsa.main(arguments(small, *words, "--rounds", 3, "--cloud-every", every, "--out-dir", out))
        found = torch.load(out / "checkpoint.pt", weights_only=True)["state"]["trained"]
        flat, edges = found["fedavg"]["cloud"], found["elsa"]["cloud"]
        gap = max((flat[n] - edges[n]).abs().max().item() for n in flat)
        assert all(t.dtype == torch.float64 for t in flat.values())
        assert len(found["elsa"]["edges"]) == 2 and (gap < 2e-8 if same else gap > 1e-3), gap


# ------------------------------------------------------------------------------------------------
# Fallbacks and bad input
# ------------------------------------------------------------------------------------------------


def test_nobody_trusted_means_all_take_part_and_the_report_says_so(small, tmp_path, capsys):
    elsa.main(arguments(small, "--trust-factor", 9, "--rounds", 1, "--out-dir", tmp_path / "out"))
    assert "the filter was left out" in capsys.readouterr().out
    assert sum(len(g) for g in result(tmp_path / "out")["groups"].values()) == 5


def test_fewer_clients_than_edges_leaves_edges_out(small, tmp_path):
    elsa.main(arguments(small, "--clients", 2, "--edges", 4, "--rounds", 1, "--no-trust",
                        "--out-dir", tmp_path / "out"))
    assert sorted(k for g in result(tmp_path / "out")["groups"].values() for k in g) == [0, 1]


def test_one_client_is_a_federation_too(small, tmp_path):
    elsa.main(arguments(small, "--clients", 1, "--edges", 1, "--rounds", 1, "--out-dir",
                        tmp_path / "out"))
    assert list(result(tmp_path / "out")["groups"].values()) == [[0]]


@pytest.mark.parametrize("method", elsa.METHODS)
def test_every_method_runs_alone_also_with_more_edges_than_clients(small, tmp_path, capsys, method):
    elsa.main(arguments(small, "--method", method, "--clients", 3, "--edges", 4, "--no-trust",
                        "--rounds", 1, "--cloud-every", 1, "--out-dir", tmp_path / "out"))
    said, found = capsys.readouterr(), result(tmp_path / "out")
    last, sent = found["results"][method]["history"][-1], found["results"][method]["bytes"]
    assert last["megabytes"] == sum(sent.values()) / 1e6
    assert ("links of" in said.out) == (method not in ("local", "central"))
    if method in ("local", "central"):
        assert not any(sent.values()) and not any(found["once"].values())
    else:
        assert sent["adapters down"] > 0 and (sent["gradients up"] > 0) == (method in elsa.SPLIT)
        assert (sent["edge-cloud"] > 0) == (method in ("elsa", "hier-random"))
        assert (found["once"]["probe states up"] > 0) == (method == "elsa")
        assert (found["once"]["rotations up"] > 0) == (method in elsa.SPLIT)
    if method == "local":  # nobody averages: there is no cloud, and there are no edges
        assert last["cloud"] is None and last["edges"] == [] and "by edge" not in said.out
    else:
        assert len(last["edges"]) == len(found["groups"]) <= 3 and last["cloud"] is not None
    idle = "1 of 4 edges take no part in ELSA: its 3 trusted clients form 3 clusters"
    assert (idle in said.err) == (method == "elsa")


def test_part_2_stays_at_the_edge_untouched_by_what_the_way_up_loses(small, tmp_path):
    args = elsa.resolve(elsa.build_parser().parse_args(arguments(small, "--out-dir", tmp_path)))
    with common.Run(args, "x") as run:
        world = elsa.build_federation(args, run)
    parts = {n for n in world.start if ".layer.1." in n}
    assert len(parts) == 4 and elsa.at_the_edge(world.model, (1, 2)) == parts
    assert elsa.at_the_edge(world.model, (2, 2)) == set()
    assert len(elsa.at_the_edge(world.model, (0, 3))) == len(world.start) - 2  # but the head

    def nothing(x):
        return torch.zeros_like(x), 7
    for link, stays in ((elsa.Link(), parts), (None, set())):  # split; a client with the whole
        true = elsa.client_round(world, world.start, 0, link, (1, 2), None, 0)
        lost = elsa.client_round(world, world.start, 0, link, (1, 2), nothing, 0)
        assert list(lost["adapters"]) == list(world.start) and lost["sent"]["adapters up"] == 7
        for n, t in lost["adapters"].items():
            assert torch.equal(t, true["adapters"][n] if n in stays else world.start[n])
            assert n not in stays or not torch.equal(t, world.start[n])
        numbers = sum(t.numel() for n, t in world.start.items() if n not in stays)
        assert true["sent"]["adapters up"] == true["sent"]["adapters down"] == 4 * numbers


def test_an_edge_without_honest_clients_serves_nobody(small, tmp_path, monkeypatch):
    args = elsa.resolve(elsa.build_parser().parse_args(arguments(small, "--out-dir", tmp_path)))
    with common.Run(args, "x") as run:
        world = elsa.build_federation(args, run)
        world.poisoned = {0: "random"}
        cuts = dict.fromkeys(range(5), (1, 2))
        found = elsa.evaluate(world, run, [[0], [1, 2, 3, 4]], {"edges": [world.start] * 2,
                              "cloud": world.start}, dict.fromkeys(range(5)), cuts)
    assert found["edges"] == [None, found["served"]] and found["served"] == found["cloud"]


# Flags -> those of them that change nothing, and why
IDLE = [
    (["--channel", "none", "--sketch-rows", "2", "--ratio", ".3", "--sketch", "both"],
     "--ratio, --sketch, --sketch-rows; --channel none"),
    (["--sketch", "none", "--channel", "sketch", "--recovery", "lsq"],
     "--channel, --recovery; --sketch none"),
    (["--ssop", "none", "--ssop-rank", "4"], "--ssop-rank; --ssop none"),
    (["--method", "local", "--poison", "random:1", "--batch", "8"], "--poison; --method local"),
    (["--method", "fedavg", "--split", "1,2", "--ssop", "edge"], "--split, --ssop; --method f"),
    (["--method", "fedavg,central", "--edges", "2", "--capacity", "3"],
     "--capacity; --method fedavg,central groups", "--edges; --method fedavg,central has one"),
    (["--method", "hier-random", "--edges", "2", "--no-trust"], "--no-trust; --method hier-random"),
    (["--no-trust", "--trust-factor", ".5", "--neighbours", "2"],
     "--neighbours, --trust-factor; --no-trust"),
    (["--no-cluster", "--capacity", "4", "--tau-max", "30"], "--capacity, --tau-max; --no-cluster"),
    (["--edge-lambda", ".2"], "--edge-lambda; nobody has to move"),
    (["--edge-lambda", ".2", "--tau-max", "30"],),
    (["--rounds", "3", "--cloud-every", "4", "--cloud-mix", "1"],
     "--cloud-every, --cloud-mix; the cloud's first turn would be round 4, there are 3"),
    (["--max-length", "32", "--num-probes", "12"], "--max-length; --model tiny",
     "--num-probes; topics"),
    (["--probes", "p.txt", "--num-probes", "12"], "--num-probes; --probes"),
    (["--channel=none", "--ratio=.25"], "--ratio; --channel none"),
    (["--edges", "2", "--cloud-every", "1", "--ssop-rank", "8", "--sketch", "both"],)]


@pytest.mark.parametrize("case", IDLE, ids=lambda case: " ".join(case[0]))
def test_flags_that_change_nothing_are_said(case):
    flags, *lines = case
    assert says_idle(elsa.build_parser(), elsa.resolve, elsa.idle_flags, flags, lines)


def test_what_the_placement_cannot_keep_is_said_or_refused(small, tmp_path):
    """Clients 0-2 behave alike and so do 3 and 4; latencies by hand."""
    distance = torch.ones(5, 5) * 9
    distance[:3, :3] = distance[3:, 3:] = 1
    distance.fill_diagonal_(0)
    latency = torch.tensor([[10., 20], [10, 20], [30, 40], [20, 10], [20, 10]]).double()
    said = []

    def check(*flags, rank=4):
        said.clear()
        args = elsa.resolve(elsa.build_parser().parse_args(
            ["--edges", "2", "--no-trust", "--ssop-rank", "4", *flags]))
        world = SimpleNamespace(args=args, clients=[0] * 5, width=16, probe_ids=range(9),
                                network={"latency": latency})
        elsa.check_placement(world, SimpleNamespace(warn=said.append), {
            "bases": [torch.zeros(16, rank)] + [torch.zeros(16, 4)] * 4, "distance": distance})
        return said
    assert check() == [] == check("--capacity", "3", "--tau-max", "30")
    assert check("--tau-max", "15") == [
        "--tau-max 15: 1 of 5 clients stay at an edge farther than that; their nearest edges are "
        "30.0 to 30.0 ms away"]
    with pytest.raises(common.UserError, match="--capacity 2: 2 edges take 4 clients, but 5 are"):
        check("--capacity", "2")
    assert check("--capacity", "2", "--method", "fedavg") == []
    assert check("--fingerprint-rank", "20") == [
        "--fingerprint-rank 20: the states span 16 directions, all of which are kept"]
    assert check("--neighbours", "7") == [
        "--neighbours 7: a client has 4 others, who are all asked"]
    assert check(rank=3) == ["--ssop-rank 4: the texts of 1 clients have fewer tokens, client 0's "
                             "turn 3 directions"]
    assert check("--ssop", "none", rank=3) == []


def test_a_small_csv_runs_as_it_is_and_resumes_on_its_own_texts_only(
        small, tmp_path, monkeypatch, capsys):
    """30 rows, no number of clients, a name with signs; then other texts under the same name."""
    monkeypatch.chdir(tmp_path)
    words = (small / "vocab.txt").read_text().split()[5:]
    rows = [(f"${c}$", f"{words[c]} {words[-c]} {words[i]}") for i in range(10) for c in (1, 2, 3)]
    Path("a $x$ [b]*.csv").write_text(table(rows, head=("label", "text")))
    given = ["--dataset", "csv:a $x$ [b]*.csv", "--model", str(small / "model"), "--rounds", "1",
             "--warmup-steps", "2", "--data-dir", "data"]
    assert exit_code(elsa.main, given) == 0
    err = capsys.readouterr().err.splitlines()
    assert "note: --ssop-rank is 16 here: the states have no more dimensions" in err
    assert err[0].startswith(
        "texts: 30 rows of a $x$ [b]*.csv (comma, utf-8, header label,text), 3 classes ($1$ 10, "
        "$2$ 10, $3$ 10), test: a drawn fifth, 6; 6 training texts set apart as probes (of 96 "
        "wanted: a quarter at most); 2 clients of 6 to 12 training texts (12 were too many for so "
        "few texts), 1 of them with one class only")
    out, = Path("runs").iterdir()
    before = result(out)
    assert len(before["trust"]) == 2 and (out / "figure.png").stat().st_size > 10_000
    again = ["--dataset", "csv:./a $x$ [b]*.csv", *given[2:], "--resume", "--out-dir", str(out)]
    assert exit_code(elsa.main, again) == 0
    assert result(out) == {**before, "dataset": "csv:./a $x$ [b]*.csv"}
    Path("a $x$ [b]*.csv").write_text(table([*rows[:-1], (rows[-1][0], "another")],
                                            head=("label", "text")))
    capsys.readouterr()
    assert exit_code(elsa.main, again) == 2
    assert "the texts of this run were others" in capsys.readouterr().err
    assert result(out) == {**before, "dataset": "csv:./a $x$ [b]*.csv"}


BAD = [
    (["--dataset", "imdb"], "unknown"), (["--dataset", "csv:/nowhere.csv"], "no such file"),
    (["--dataset", "texts.csv"], "Did you mean csv:texts.csv?"),
    (["--dataset", "topics", "--model", "tiny", "--test-file", "x.csv"], "--test-file is of csv"),
    (["--dataset", "topics", "--model", "tiny", "--encoding", "latin-1"], "--encoding is of csv"),
    (["--capacity", "1", "--rounds", "1", "--no-trust"], "--capacity 1: 2 edges take 2 clients"),
    (["--dataset", "trec"], "train_5500.label"), (["--model", "/nowhere/at/all"], "/nowhere"),
    (["--model", "tiny"], "topics"), (["--method", "fedsgd"], "split-flat"),
    (["--poison", "flip:2"], "label-flip:N"), (["--poison", "random:5"], "no honest"),
    (["--split", "2,1"], "0 <= P <= Q <= 3"), (["--split", "half"], "P,Q or auto"),
    (["--ssop-rank", "17"], "16 dimensions"), (["--ratio", "0.01"], "no bucket"),
    (["--probes", "/no.txt"], "/no.txt"),
    (["--lr", "1e30"], "not finite"), (["--device", "toaster"], "toaster"),
    (["--resume"], "no run"),
]
BAD_FLAGS = [["--rounds", "0"], ["--alpha", "-1"], ["--ratio", "2"],
             ["--seed", "x"], ["--nonsense"], ["--ssop", "all"], ["--lr", "nan"],
             ["--edge-lambda", "2"]]


@pytest.mark.parametrize("flags, words", BAD, ids=lambda v: " ".join(v)
                         if isinstance(v, list) else v)
def test_bad_input_is_one_line(small, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)

    def no_network(*_):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    out = [] if "--resume" in flags else ["--out-dir", "out"]
    code = exit_code(elsa.main, arguments(small, *out, *flags))
    assert code == (3 if "finite" in words else 2)
    err = without_sources(capsys.readouterr().err, "note: ")
    assert len(err.splitlines()) == 1 and words in err and err.startswith("error: ")
    assert not Path("out/result.json").exists()


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=" ".join)
def test_bad_flag_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        elsa.main(flags)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and flags[0] in err


@pytest.mark.parametrize("content, words", [
    ("one line\n", "1;"), ("", "0;"), ("\n\n", "0;")])
def test_too_few_probes_are_refused(small, tmp_path, capsys, content, words):
    (tmp_path / "probes.txt").write_text(content)
    code = exit_code(elsa.main, arguments(small, "--probes", tmp_path / "probes.txt", "--out-dir",
                                          tmp_path / "out"))
    err = without_sources(capsys.readouterr().err, "note: ")
    assert code == 2 and len(err.splitlines()) == 1 and f"lines with text: {words}" in err
    good = tmp_path / "good.txt"
    good.write_text("\n".join(f"bal del {w}" for w in ("fil", "gom", "bun", "dam", "fel")))
    elsa.main(arguments(small, "--probes", good, "--rounds", 1, "--out-dir", tmp_path / "good"))
    assert len(result(tmp_path / "good")["trust"]) == 5


def decoder_folder(small, root, kind="Llama", **settings):
    """A random decoder of three blocks with the tokenizer of the small BERT."""
    folder = root / kind
    shutil.copytree(small / "model", folder)
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2} if kind == "GPT2" else \
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 32}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=70, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, **sizes,
        **settings)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_decoder_runs_through_every_method(small, tmp_path, capsys, kind):
    """Fingerprints, trust, channel, bytes: half of them where states are bfloat16."""
    folder = decoder_folder(small, tmp_path, kind)
    found = {}
    for dtype in ("float32", "bfloat16"):
        words = arguments(small, "--model", folder, "--method", "all", "--dtype", dtype,
                          "--out-dir", tmp_path / dtype)
        assert exit_code(elsa.main, words) == 0
        line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("encoder: "))
        assert re.fullmatch(rf"encoder: {kind}Model of \S+, 3 blocks, width 16,(?: bfloat16,)? "
                            r"0 weights missing; split = unsplit on one batch", line)
        assert ("bfloat16" in line.partition("width")[2]) == (dtype == "bfloat16")
        found[dtype] = result(tmp_path / dtype)
        assert all(t.dtype == torch.float32 for t in trained(tmp_path / dtype))
    full, half = (found[d]["results"]["elsa"]["bytes"] for d in ("float32", "bfloat16"))
    assert {n: half[n] / full[n] for n in full} == {
        **dict.fromkeys(elsa.EXCHANGES, .5), "adapters up": 1, "adapters down": 1, "edge-cloud": 1}
    once = {d: found[d]["once"] for d in found}
    assert 2 * once["bfloat16"]["probe states up"] == once["float32"]["probe states up"]
    assert np.array(found["bfloat16"]["distance"]).max() > 0


def test_a_run_does_not_go_on_with_another_encoder(small, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(small / "model", folder)
    words = arguments(small, "--model", folder, "--rounds", 1, "--out-dir", tmp_path / "out")
    elsa.main(words)
    assert result(tmp_path / "out")["sources"]["encoder"].startswith("BertModel of ")
    weights = BertModel.from_pretrained(folder)
    with torch.no_grad():
        weights.encoder.layer[2].output.dense.bias[0] += .1
    weights.save_pretrained(folder)
    capsys.readouterr()
    assert exit_code(elsa.main, [*words, "--resume"]) == 2
    assert "the encoder of this run were others" in capsys.readouterr().err


def test_another_architecture_is_refused(small, tmp_path, capsys):
    folder = tmp_path / "t5"
    shutil.copytree(small / "model", folder)
    transformers.T5Model(transformers.T5Config(vocab_size=70, d_model=8, d_kv=4, d_ff=8,
                                               num_layers=1, num_heads=2)).save_pretrained(folder)
    capsys.readouterr()
    code = exit_code(elsa.main, arguments(small, "--model", folder, "--out-dir", tmp_path / "out"))
    err = capsys.readouterr().err
    assert code == 2 and "T5Model" in err and "BERT-type" in err and "network" not in err


def test_results_are_not_overwritten(reference, small, capsys):
    folder = reference[0]
    before = (folder / "result.json").read_bytes()
    assert exit_code(elsa.main, arguments(small, *LONG, "--out-dir", folder)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert exit_code(elsa.main, arguments(small, *LONG, "--out-dir", folder, "--resume", "--alpha",
                                          2)) == 2
    assert "alpha=2.0" in capsys.readouterr().err
    assert (folder / "result.json").read_bytes() == before


def test_help_is_the_header_and_every_flag_has_a_text():
    out, _ = finish(start(SCRIPT, ["-h"]))
    for words in ("The idea", "Paper map", "UNSPECIFIED 1", "UNSPECIFIED 9", "--trust-factor"):
        assert words in out
    assert all(a.help for a in elsa.build_parser()._actions)


def test_marks_in_the_code_are_those_of_the_header():
    header, code = elsa.__doc__, (ROOT / SCRIPT).read_text().partition("\n# Setup\n")[2]
    for kind in ("DEVIATION", "UNSPECIFIED"):
        listed, used = (set(re.findall(rf"{kind} (\d+)", text)) for text in (header, code))
        assert listed == used and (kind == "DEVIATION" or len(used) == 10)


def test_step_benchmark_runs():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "elsa_step.py", "--quick"],
                          capture_output=True, text=True, timeout=PATIENCE, check=True)
    line = dict(p.split("=") for p in done.stdout.strip().splitlines()[-1].split()[1:])
    assert float(line["split_ratio"]) > 0 and float(line["sketch_ratio"]) > 0


def test_models_of_one_state_are_independent(small):
    """Loading adapters copies: training one client does not change another's start."""
    model = bert()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("head."))
    start_state = elsa.adapters(model)
    kept = copy.deepcopy(start_state)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(start_state[n], kept[n]) for n in kept)
    elsa.load_adapters(model, start_state)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("layers, cut", [(1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (12, (1, 11))])
def test_every_number_of_blocks_has_a_default_cut(layers, cut):
    world = SimpleNamespace(args=SimpleNamespace(split=None), model=SimpleNamespace(layers=layers))
    assert elsa.pick_cut(world, 0) == cut


# ------------------------------------------------------------------------------------------------
# The figure
# ------------------------------------------------------------------------------------------------


def picture(tmp_path, monkeypatch, methods, clients=6, rounds=4, poisoned=None, lost=(), **flags):
    """draw_figure of made results: two edges, odd and even clients, less those that are lost."""
    figures = keep_figures(monkeypatch)
    args = elsa.resolve(elsa.build_parser().parse_args(["--method", ",".join(methods)]))
    vars(args).update(flags)
    groups = {e: [k for k in range(e, clients, 2) if k not in lost] for e in range(2)}
    groups = {e: g for e, g in groups.items() if g}
    generator = np.random.default_rng(0)
    distance = generator.uniform(2, 30, (clients, clients))
    distance = (distance + distance.T) * (1 - np.eye(clients))
    sent = {name: 1e6 * rounds * (i + 1) for i, name in enumerate(
        [*elsa.EXCHANGES, "adapters up", "adapters down", "edge-cloud"])}
    results = {}
    for m in methods:
        several = m == "elsa"
        results[m] = {"bytes": {k: (size if m in elsa.SPLIT or "adapters" in k else 0.0)
                                * (m not in elsa.ALONE) for k, size in sent.items()},
                      "history": [{"round": r, "served": 50.0 + r, "megabytes": 1.0,
                                   "cloud": None if m == "local" else 40.0 + r,
                                   "edges": [60.0, None] if several else []}
                                  for r in range(1, rounds + 1)]}
    found = {"dataset": "topics", "groups": groups, "results": results, "clusters": None,
             "distance": distance.tolist(),
             "trust": [.2 if k in lost else .9 + .01 * k for k in range(clients)]}
    world = SimpleNamespace(args=args, poisoned=poisoned or {})
    elsa.draw_figure(world, found, tmp_path / "figure.png")
    drawing, = figures
    assert faults(drawing) == []
    return drawing, {axes.get_title(): axes for axes in drawing.axes}


ACCURACY, TRUST, APART, SENT = (
    "Accuracy on clients' own tests", "Whom ELSA trusts", "How differently they behave",
    "What crosses the network")


def test_the_figure_shows_who_is_served_whom_trust_drops_and_what_it_costs(tmp_path, monkeypatch):
    drawing, panels = picture(tmp_path, monkeypatch, ["fedavg", "elsa"], lost=[2, 3],
                              poisoned={2: "label-flip", 4: "random"})
    first, trust, apart, sent = list(panels)[:4]
    assert (first, trust, apart, sent) == (ACCURACY.replace("on", "on honest", 1), TRUST, APART,
                                           SENT)
    lines = {line.get_label(): line.get_ydata() for line in panels[first].lines}
    assert [list(lines[name]) for name in ("FedAvg, unsplit", "ELSA: edges", "ELSA: cloud")] == [
        [51, 52, 53, 54], [51, 52, 53, 54], [41, 42, 43, 44]]
    assert [t.get_text() for t in panels[trust].get_yticklabels()] == [
        "0", "4, random", "1", "5", "2, label-flip", "3"]
    bars = panels[trust].patches
    assert [b.get_width() for b in bars] == pytest.approx([.9, .94, .91, .95, .2, .2])
    assert len({b.get_facecolor() for b in bars[:4]}) == 1 != len({b.get_facecolor() for b in bars})
    # the floor of place_clients: torch's median, the lower of the two in the middle
    assert panels[trust].lines[0].get_xdata()[0] == pytest.approx(.6 * .9)
    assert [t.get_text() for t in panels[apart].get_yticklabels()] == [
        "edge 0", "edge 1", "distrusted"]
    image = panels[apart].images[0].get_array()
    assert np.ma.getmaskarray(image).diagonal().all() and image.count() == 30
    assert [t.get_text() for t in panels[sent].texts] == ["11", "28"]  # 5 + 6; 1 + ... + 7
    widths = {c.get_label(): [b.get_width() for b in c] for c in panels[sent].containers}
    assert widths == {"states": [0, 3], "gradients": [0, 7], "adapters": [11, 11],
                      "edge-cloud": [0, 7]}
    assert "6 clients, channel sketch" in drawing._suptitle.get_text()


@pytest.mark.parametrize("methods, panels", [
    (["elsa"], [ACCURACY, TRUST, APART, SENT]), (["fedavg"], [ACCURACY, SENT]),
    (["local"], [ACCURACY]), (elsa.METHODS, [ACCURACY, TRUST, APART, SENT])])
@pytest.mark.parametrize("rounds", [1, 30])
def test_only_what_a_run_has_gets_a_panel(methods, panels, rounds, tmp_path, monkeypatch):
    _, found = picture(tmp_path, monkeypatch, methods, rounds=rounds)
    assert [name for name in found if name] == panels
    markers = [line.get_marker() for line in found[ACCURACY].lines
               if line.get_marker() != "None" and line.get_linestyle() == "-"]
    assert len(set(markers)) == len(methods)  # told apart without colours


@pytest.mark.parametrize("clients", [1, 2, 40, 150])
def test_any_number_of_clients_is_drawn(clients, tmp_path, monkeypatch):
    _, found = picture(tmp_path, monkeypatch, ["fedavg", "elsa"], clients=clients, no_trust=True)
    assert (TRUST in found) == (clients > 1)
    if clients > 1:
        assert len(found[TRUST].patches) == clients and found[TRUST].get_xlabel() == "trust"
