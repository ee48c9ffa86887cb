"""beyond/pro_vpt_adaptive.py: measured scores against oracles, the control, the command."""
import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pro_vpt import (
    assert_equal_runs,
    continue_from_every_epoch,
    lists_of,
    make_batch,
    plain_copy,
    prompts_are_kept,
    real_words,
    save_vit,
    tiny_vit,
    write_vtab,
)
from test_pro_vpt import make_model as make_papers_model
from test_pro_vpt import make_training as make_papers_training

import pro_vpt
from benchmarks import pro_vpt_plain as plain
from beyond import pro_vpt_adaptive as beyond
from tools import ROOT, exit_code, finish, kill, result, says_idle, start

SCRIPT = "beyond/pro_vpt_adaptive.py"


def make_model(counts=(2, 3, 0)):
    vit = tiny_vit(layers=len(counts)).double()
    torch.manual_seed(1)
    return beyond.GatedViT(vit, 4, list(counts))


def make_training(*options, parts=beyond.PARTS, **more):
    return make_papers_training("--score-images", "16", *options, read=beyond.read_arguments,
                                parts=parts, **more)


# ================================================================================================
# Scores
# ================================================================================================


def test_post_ln_score_is_the_first_order_change_of_the_key_and_value():
    model, (pixels, labels) = make_model(), make_batch()
    tokens = model.embed(pixels)
    model.gates = torch.ones(5, 1, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(model(tokens), labels)
    (gradient,) = torch.autograd.grad(loss, [model.gates])
    scores = pro_vpt.idleness_scores(model.gates.detach(), gradient)
    h = 1e-4
    for k in range(5):
        values = []
        for sign in (1, -1):
            model.gates = torch.ones(5, 1, dtype=torch.float64)
            model.gates[k] += sign * h
            values.append(F.cross_entropy(model(tokens), labels))
        torch.testing.assert_close((values[0] - values[1]) / (2 * h), scores[k], rtol=1e-5,
                                   atol=1e-10)
    assert scores.abs().min() > 1e-6  # no factor ε in it
    model.gates = None  # without gates it is the paper's model
    assert model(tokens).equal(make_papers_model()(tokens))


def test_exact_idleness_is_what_a_model_without_the_prompt_says():
    model, (pixels, labels) = make_model(), make_batch()
    scores = beyond.exact_idleness(model, model.embed(pixels), labels)
    whole = F.cross_entropy(plain_copy(model)(pixels), labels).item()
    for k in range(5):
        less = plain_copy(model)
        block = model.block[k].item()
        del less.blocks[block][model.rows[block].tolist().index(k)]
        assert scores[k].item() == pytest.approx(
            whole - F.cross_entropy(less(pixels), labels).item(), abs=1e-6)
    assert model.counts() == [2, 3, 0]
    useful = beyond.block_usefulness(model, model.embed(pixels), labels)
    for b in range(3):
        less = plain_copy(model)
        less.blocks[b] = []
        assert useful[b].item() == pytest.approx(
            F.cross_entropy(less(pixels), labels).item() - whole, abs=1e-6)
    assert model.counts() == [2, 3, 0] and useful[2] == 0


def test_the_norm_score_takes_the_shortest_prompt_and_the_loss_of_a_pass():
    training, paper = make_training("--idleness", "norm"), make_papers_training()
    scores, loss = beyond.norm_pass(training)
    lengths = training.model.prompts.square().sum(1)
    assert scores.argmax() == lengths.argmin()
    torch.testing.assert_close(scores, -lengths.sqrt(), check_dtype=False)
    assert loss == pro_vpt.score_pass(paper)[1]


def test_the_size_of_the_score_takes_the_prompt_nearest_to_nothing():
    training, paper = make_training("--idleness", "size"), make_papers_training()
    scores, loss = beyond.size_pass(training)
    plain, same = pro_vpt.score_pass(paper)
    assert scores.argmax() == plain.abs().argmin() and loss == same and (plain > 0).any()
    assert torch.equal(scores, -plain.abs())


def test_running_scores_are_those_of_the_gradients_while_training():
    training = make_training("--scores", "running", "--lr", "1e-12")  # nothing moves: a pass
    lists, peer = lists_of(training, "train"), plain_copy(training.model)
    part = training.task.train
    scores, losses = plain.score_pass(peer, [(part.pixels[i], part.labels[i]) for i in lists])
    pro_vpt.train_epoch(training)
    found, loss = beyond.running_scores(training)
    np.testing.assert_allclose(found, [scores[id(p)] for p in peer.prompts()], rtol=1e-4)
    assert loss == pytest.approx(sum(x * n for x, n in losses) / 22, rel=1e-9)
    training.epoch += 1  # the sums of one epoch do not go on in the next
    pro_vpt.train_epoch(training)
    assert len(training.memory["running"]["losses"]) == len(lists)


# ================================================================================================
# Moves
# ================================================================================================


def test_planned_moves():
    share = torch.tensor([.5, .25, .25, 0.])
    moves = beyond.planned_moves([2, 2, 2, 2], share, 8)
    assert moves == [(3, 0), (3, 0)]
    assert beyond.planned_moves([2, 2, 2, 2], share, 1) == [(3, 0)]
    assert beyond.planned_moves([4, 2, 2, 0], share, 8) == []
    assert beyond.planned_moves([2, 2], torch.tensor([.6, .4]), 8) == []  # off by .4 prompts


@pytest.mark.parametrize("reset", [True, False])
def test_a_move_is_scaled_and_may_forget_its_momentum(reset):
    training = make_training("--move-scale", ".5", *(["--reset-momentum"] if reset else []))
    pro_vpt.train_epoch(training)
    model, block = training.model, training.model.block.clone()
    momentum = training.optimizer.state[model.prompts]["momentum_buffer"]
    before, kept = model.prompts.detach().clone(), momentum.clone()
    beyond.move(training, model.prompts, block, 1, 2)
    assert block[1] == 2 and model.prompts[1].equal(.5 * before[1])
    assert momentum[1].eq(0).all() == reset and momentum[[0, 2]].equal(kept[[0, 2]])
    beyond.move(training, model.prompts, block, 8, 2)  # into its own block: nothing
    assert momentum[8].equal(kept[8]) and model.prompts[8].equal(before[8])


@pytest.mark.parametrize("method, scores", [
    ("random-relocation", "pass"), ("prune-only", "pass"), ("prune-only", "running"),
    ("pro-vpt", "running"), ("adaptive", "pass")])
def test_prompts_are_kept_and_pruning_has_a_floor(method, scores):
    prompts_are_kept(make_training("--epochs", "14", "--scores", scores, method=method, counts=1))


def test_adaptation_moves_towards_a_block_that_matters():
    training = make_training(method="adaptive", counts=4)
    training.epoch = 1
    model = training.model
    pro_vpt.train_epoch(training)
    tokens, labels = beyond.sample(training, "usefulness", 16)
    useful = beyond.block_usefulness(model, tokens, labels).clamp(min=0)
    before, momentum = model.counts(), training.optimizer.state[model.prompts]["momentum_buffer"]
    beyond.adaptation(training)
    wanted = 12 * useful / useful.sum()
    distance = [(torch.tensor(c) - wanted).abs().sum().item() for c in (before, model.counts())]
    assert distance[1] < distance[0]
    (_, k, _), *_ = training.moves
    assert momentum[k].eq(0).all() and model.prompts[k].abs().max() <= model.bound


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_control_is_an_argument_and_moves_where_it_says(block):
    """What benchmarks/pro_vpt_claims.py passes: blocks that nobody measured."""
    useful = torch.zeros(3)
    useful[block] = 1
    control = functools.partial(beyond.adaptation, usefulness=lambda *_: useful)
    relocations = {**beyond.PARTS["relocations"], "adaptive": control}
    training = make_training("--epochs", "14", method="adaptive", counts=4,
                             parts={**beyond.PARTS, "relocations": relocations})
    found = pro_vpt.train(training, lambda now: None)
    assert {target for _, _, target in found["moves"]} == {block}
    assert found["counts"][-1][block] == 12
    measured = pro_vpt.train(make_training("--epochs", "14", method="adaptive", counts=4),
                             lambda now: None)
    assert measured["moves"] and measured["counts"] != found["counts"]


@pytest.mark.parametrize("method, options", [
    ("pro-vpt", ["--scores", "running"]), ("pro-vpt", ["--dropout", ".1", "--idleness", "exact"]),
    ("pro-vpt", ["--idleness", "post-ln"]), ("adaptive", ["--epochs", "8"])])
def test_a_checkpoint_holds_what_a_relocation_remembers(method, options, tmp_path):
    states = continue_from_every_epoch(lambda: make_training(*options, method=method), tmp_path)
    name = "share" if method == "adaptive" else "running" if "running" in options else "pending"
    assert any(name in state["memory"] for state in states)


@pytest.mark.parametrize("options", [
    ["--idleness", "norm"], ["--idleness", "size"], ["--idleness", "post-ln"],
    ["--idleness", "exact"], ["--allocator", "greedy"], ["--allocator", "random"],
    ["--relocate-every", "3"], ["--move-scale", "1"], ["--reset-momentum"],
    ["--scores", "running"]], ids=" ".join)
def test_options_change_the_run(options):
    papers, plain_run, other = (pro_vpt.train(training, lambda now: None) for training in (
        make_papers_training("--epochs", "14"), make_training("--epochs", "14"),
        make_training("--epochs", "14", *options)))
    assert plain_run == papers  # without a flag of ours: the paper's loop, bit for bit
    assert (plain_run["losses"], plain_run["moves"]) != (other["losses"], other["moves"])
    assert len(other["moves"]) > 0
    if options == ["--relocate-every", "3"]:
        assert {m[0] for m in other["moves"]} <= {1, 4, 7, 10, 13}


# ================================================================================================
# The small world and the command
# ================================================================================================


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A data folder whose tiny ViT (seed 3) is pre-trained by the first test that needs it."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("words, said", [
    ("--idleness exact --score-images 9 --relocate-every 2 --move-scale 1", []),
    ("--method adaptive --idleness norm --relocate-every 2 --reset-momentum --score-images 9",
     ["--idleness; scores", "--relocate-every; moves", "--reset-momentum; moves"]),
    ("--method random-relocation --move-scale .1 --scores running --score-images 9",
     ["--scores; scores", "--score-images; "])])
def test_flags_that_change_nothing_are_said(words, said):
    assert says_idle(beyond.build_parser(), beyond.settle, beyond.idle_flags, words.split(), said)


def test_the_default_compares_adaptive_which_recovers_what_was_planted(cache, tmp_path, capsys):
    words = ["--data-dir", cache, "--seed", "3", "--truth", "0,0,0,12,60,0", "--epochs", "12",
             "--out-dir", tmp_path / "out"]  # 12 epochs are enough for it
    beyond.main(list(map(str, words)))
    found, truth = result(tmp_path / "out")["results"], [0, 0, 0, 12, 60, 0]
    assert list(found) == [f"planted/{m}/test/3" for m in (
        "vpt-deep", "planted", "random-relocation", "pro-vpt", "adaptive")]
    ours = found["planted/adaptive/test/3"]
    assert pro_vpt.correlation(ours["counts"][-1], truth) > .7
    epochs = [m[0] for m in ours["moves"]]
    assert epochs[0] >= 1 and max(epochs) < 6  # early, none late
    out = capsys.readouterr().out
    assert re.search(r"^adaptive \(ours\) .*0\.\d\d$", out, re.M)
    assert "RESULT script=pro_vpt_adaptive" in out and "method=adaptive" in out


def test_the_command_leaves_both_scripts_and_resumes(tmp_path):
    write_vtab(tmp_path, ["kitti"])
    words = real_words(tmp_path, save_vit(tmp_path / "vit"), "--dataset", "vtab-kitti", "--method",
                       "pro-vpt,adaptive", "--epochs", "40", "--threads", "1", "--scores",
                       "running")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, err = finish(start(SCRIPT, [*words, "--out-dir", whole]))
    said = result(whole)["sources"]
    assert set(said) == {"pictures", "model"}
    assert err == "".join(f"{name}: {line}\n" for name, line in said.items())
    assert {p.name for p in whole.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "result.json", "figure.png", "pro_vpt.py",
        "pro_vpt_adaptive.py"}
    assert (whole / "pro_vpt.py").read_text() == (ROOT / "pro_vpt.py").read_text()
    assert (whole / "pro_vpt_adaptive.py").read_text() == (ROOT / SCRIPT).read_text()
    for rows in (9, 55):  # in the first, then in the second method
        kill(SCRIPT, [*words, "--out-dir", killed], killed, rows)
    beyond.main([str(w) for w in [*words, "--out-dir", killed, "--resume"]])
    assert_equal_runs(killed, whole)


def test_its_default_folder_and_its_checkpoints_are_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_vtab(tmp_path, ["kitti"])
    words = [str(w) for w in real_words(tmp_path, save_vit(tmp_path / "vit"), "--dataset",
                                        "vtab-kitti", "--method", "linear")]
    beyond.main(words)
    assert (tmp_path / "runs" / "pro_vpt_adaptive-vtab-kitti-1" / "result.json").exists()
    code = exit_code(pro_vpt.main, [*words, "--resume", "--out-dir",
                                    "runs/pro_vpt_adaptive-vtab-kitti-1"])
    assert code == 2 and "not a checkpoint of pro_vpt-vtab-kitti" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--scores", "running", "--idleness", "norm"], "taylor"),
    (["--method", "vpt"], "adaptive"), (["--idleness", "best"], "--idleness"),
    (["--relocate-every", "0"], "--relocate-every")], ids=lambda v: " ".join(v)
    if isinstance(v, list) else "")
def test_bad_input_is_one_line(flags, words, capsys):
    assert exit_code(beyond.main, flags) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and words in err


def test_help_is_the_header_and_every_flag_has_a_text(capsys):
    assert exit_code(beyond.main, ["-h"]) == 0
    out = capsys.readouterr().out
    for words in ("The idea", "What it adds", "--method adaptive", "--search", "--score-images"):
        assert words in out
    assert all(a.help for a in beyond.build_parser()._actions)
    papers = {a.dest for a in pro_vpt.build_parser()._actions}
    assert papers < {a.dest for a in beyond.build_parser()._actions}


def test_the_papers_script_knows_nothing_of_this():
    source = (ROOT / "pro_vpt.py").read_text().replace(pro_vpt.__doc__, "")
    for name in ("adaptive", "running", "greedy", "exact_", "gates", "relocate_every"):
        assert name not in re.sub(r"#.*", "", source)
