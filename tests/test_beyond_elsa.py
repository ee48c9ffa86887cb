"""Beside ELSA: other channels, the attacks, simulated times, and the seam they hang on."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_elsa import (
    PLAIN,
    B,
    D,
    T,
    arguments,
    assert_equal_runs,
    bytes_of_a_step,
    decoder_folder,
    generator,
    make_codecs,
    randn,
    trained,
    without_sources,
    write_small,
)
from torch.utils.flop_counter import FlopCounterMode

import common
import elsa
from beyond import elsa_attacks, elsa_channels, elsa_plan
from tools import ROOT, exit_code, faults, finish, keep_figures, kill, result, start, torchrun

SCRIPTS = {"elsa_channels": elsa_channels, "elsa_attacks": elsa_attacks, "elsa_plan": elsa_plan}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("beyond"))


def federation(words, name, seam=elsa_channels.SEAM):
    """What a run of elsa.py with these channels works on -> world, run."""
    seam = {**seam, "flags": [elsa_channels.add_bits]}
    args = elsa.resolve(elsa.build_parser(elsa.__doc__, seam["channels"], seam["flags"]).parse_args(
        words), seam["small"], seam["settle"])
    with common.Run(args, name) as run:
        return elsa.build_federation(args, run, seam["channels"]), run


# ------------------------------------------------------------------------------------------------
# Channels
# ------------------------------------------------------------------------------------------------


def test_projection_keeps_its_subspace_and_drops_the_rest():
    x = randn(50, 3) @ randn(3, 10, seed=1)  # rank 3
    p = elsa_channels.Projection(elsa.principal_directions(x, 3))
    assert p.encode(x).shape == (50, 3)
    torch.testing.assert_close(p.decode(p.encode(x)), x)
    full = np.linalg.svd(x.numpy())[2][:2]
    less = elsa_channels.Projection(elsa.principal_directions(x, 2))
    np.testing.assert_allclose(less.decode(less.encode(x)), x.numpy() @ full.T @ full, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_unbiased_within_a_step_and_has_the_levels(bits):
    torch.manual_seed(0)
    x = randn(1, 40)
    found = torch.cat([elsa_channels.quantise(x, bits) for _ in range(4000)])
    step = x.abs().max() / (2 ** (bits - 1) - 1)
    assert (found - x).abs().max() <= step * 1.0001
    assert len(found.unique()) <= 2 ** bits - 1
    levels = found / step
    torch.testing.assert_close(levels, levels.round(), atol=1e-6, rtol=0)
    assert (found.mean(0) - x[0]).abs().max() < 5 * step / (4 * 4000) ** .5
    assert torch.equal(elsa_channels.quantise(torch.zeros(2, 3), bits), torch.zeros(2, 3))


def test_adapter_updates_in_bits():
    start = {"a": randn(3, 4), "b": randn(5, seed=1)}
    end = {n: t + randn(*t.shape, seed=2) for n, t in start.items()}
    same, size = elsa.send_update(start, end, elsa_channels.Codec(), 6)
    torch.testing.assert_close(same, end)
    assert size == 8 * 18  # 17 numbers in vectors of 6, as they are: float64
    lossy, size = elsa.send_update(start, end, elsa_channels.Codec(bits=8), 6)
    assert size == 18 + 4 * 3 and list(lossy) == list(start)
    assert 0 < (lossy["a"] - end["a"]).abs().max() < .1


def codecs_of(**flags):
    directions = {n: torch.linalg.qr(randn(D, D, seed=i, dtype=torch.float32))[0]
                  for i, n in enumerate(elsa.EXCHANGES)}
    setup = {"directions": {"(1, 2)": directions}}
    return make_codecs(elsa_channels.CHANNELS, setup, **flags)[0]


@pytest.mark.parametrize("flags, vector", [
    ({"channel": "none"}, 4 * D), ({}, 4 * D * .5),
    ({"channel": "lowrank", "ratio": .25}, 4 * D * .25), ({"bits": 8}, D * .5 + 4),
    ({"channel": "lowrank", "ratio": .25, "bits": 8}, D * .25 + 4),
    ({"channel": "quant", "bits": 8}, D + 4), ({"channel": "quant", "bits": 4}, D / 2 + 4),
    ({"channel": "quant", "bits": 2}, D / 4 + 4), ({"sketch": "adapters", "bits": 8}, 4 * D)])
@pytest.mark.parametrize("mode", ["none", "link", "edge"])
def test_bytes_equal_the_formula_for_every_exchange(flags, vector, mode):
    """Bits / 8 a number, four bytes for the scale of a vector."""
    sent = bytes_of_a_step(codecs_of(**flags), mode)
    assert sent == dict.fromkeys(elsa.EXCHANGES, B * T * vector)


def test_each_exchange_is_projected_on_its_own_directions():
    codecs = codecs_of(channel="lowrank", ratio=.25)
    link = elsa.Link(codecs)
    x, weight = randn(B, T, D).requires_grad_(), randn(B, T, D, seed=3)
    y = link.to_client(link.to_edge(x))

    def project(t, name):
        u = codecs[name].reduce.basis.double()
        return t @ u @ u.T
    torch.testing.assert_close(y, project(project(x, "activations up"), "activations down"))
    (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, project(project(weight, "gradients up"), "gradients down"))


def test_low_rank_directions_are_those_of_each_clients_cut(small, tmp_path):
    """Other tensors cross at other cuts, which --split auto gives to other clients."""
    world, run = federation(arguments(small, "--channel", "lowrank", "--out-dir", tmp_path / "out"),
                            "cuts")
    world.cuts[0], world.cuts[3] = (2, 2), (1, 3)
    setup = elsa.set_up(world, run)
    links, cuts, _ = elsa.open_links(world, "elsa", [list(range(5))], setup)
    assert len(set(world.cuts)) > 1 and setup["directions"].keys() == {str(c) for c in world.cuts}
    for k, cut in enumerate(world.cuts):
        basis = links[k].codecs["activations down"].reduce.basis
        mine = setup["directions"][str(cut)]["activations down"][:, :8]
        assert cuts[k] == cut and torch.equal(basis, mine)
    first, second = (setup["directions"][str(c)] for c in sorted(set(world.cuts))[:2])
    assert not torch.allclose(first["activations down"], second["activations down"])


@pytest.mark.parametrize("flags", [["--channel", "lowrank"], ["--channel", "quant"],
                                   ["--channel", "sketch", "--bits", "4"]], ids=" ".join)
def test_channels_change_the_run(small, tmp_path, flags):
    for name, more in (("a", flags), ("b", [])):
        elsa_channels.main(arguments(small, "--no-curve", *PLAIN, *more, "--out-dir",
                                     tmp_path / name))
    a, b = (trained(tmp_path / name) for name in "ab")
    assert any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_bits_it_is_the_papers_script(small, tmp_path):
    """The control of the seam: the same sketch, the same run."""
    words = arguments(small, "--method", "elsa", "--sketch", "both")
    elsa.main([*words, "--out-dir", str(tmp_path / "paper")])
    elsa_channels.main([*words, "--no-curve", "--out-dir", str(tmp_path / "beyond")])
    assert_equal_runs(tmp_path / "beyond", tmp_path / "paper")


# ------------------------------------------------------------------------------------------------
# Attacks
# ------------------------------------------------------------------------------------------------


def test_procrustes_finds_the_rotation_and_stays_near_the_identity_without_evidence():
    w = torch.linalg.qr(randn(8, 8))[0]
    known = randn(40, 8, seed=1)
    torch.testing.assert_close(elsa_attacks.procrustes(known, known @ w, prior=1e-9), w)
    few = elsa_attacks.procrustes(known[:2], known[:2])
    torch.testing.assert_close(few, torch.eye(8).double(), atol=1e-6, rtol=0)


def test_inverter_reads_words_that_are_linear_in_the_states():
    table, mix = randn(30, 6), randn(6, 10, seed=1)
    words = torch.randint(30, (200,), generator=generator())
    states = table[words] @ mix + .3
    inverter = elsa_attacks.fit_inverter(states, table[words], ridge=1e-9)
    assert torch.equal(elsa_attacks.invert(states, inverter, table)[:, 0], words)
    shuffled = elsa_attacks.invert(states[:, torch.randperm(10, generator=generator())], inverter,
                                   table)
    assert (shuffled[:, 0] == words).float().mean() < .5


def test_what_the_observer_reads_in_the_small_world(tmp_path):
    """In the clear, under SS-OP, and when a channel stands between."""
    world, run = federation(["--seed", "5", "--data-dir", str(tmp_path), "--out-dir",
                             str(tmp_path / "out")], "small")
    setup, report = elsa.set_up(world, run), elsa_attacks.privacy_report
    plain = report(world, setup, world.start)
    assert [row[0] for row in plain] == ["in the clear", "under SS-OP", "complement", "Procrustes"]
    assert plain[0][1] > 95 and plain[3][1] > 95 and plain[1][1] < 80
    assert report(world, setup, world.start, elsa_channels.Codec()) == plain
    sketch = elsa.CountSketch(world.width, .25, generator=torch.Generator().manual_seed(0))
    through = report(world, setup, world.start, elsa_channels.Codec(sketch))
    rounded = report(world, setup, world.start, elsa_channels.Codec(None, 8))
    assert 10 < through[0][1] < plain[0][1] - 5 and through[3][1] > through[1][1] + 10
    assert max(abs(a[1] - b[1]) for a, b in zip(plain, rounded, strict=True)) < 10


# ------------------------------------------------------------------------------------------------
# Times
# ------------------------------------------------------------------------------------------------


def test_seconds_of_a_round_by_hand():
    """Two edges, three clients; cut (1, 3) of 4 blocks, steps of 2 MFLOPs a block."""
    network = {"latency": torch.tensor([[10., 20], [10, 20], [10, 20]]),
               "flops": torch.tensor([1e6, 2e6, 4e6]), "bandwidth": torch.tensor([1e6, 1e6, 5e5])}
    parameters = [torch.zeros(250, 1000)]  # 4 · 250,000 bytes, and as many FLOPs a token
    block = SimpleNamespace(parameters=lambda: parameters)
    world = SimpleNamespace(
        network=network, cuts=[(1, 3)] * 3, clients=[(torch.zeros(7), None)] * 3, first_test=2,
        lengths=torch.tensor([1, 3]), args=SimpleNamespace(batch=1, local_epochs=2),
        model=SimpleNamespace(layers=4, stack=lambda: [block], parameters=lambda: parameters))
    found = elsa_plan.round_seconds(world, {0: [0, 1], 1: [2]}, [{"megabytes": 3.0}])
    steps, flops = 7 * 2, 2e6  # two tokens a step
    by_hand = [steps * (2 * flops / network["flops"][k].item() + 2 * flops * n / 500e9
                        + 4 * ms / 1e3) + 1e6 / network["bandwidth"][k].item()
               for k, n, ms in ((0, 2, 10), (1, 2, 10), (2, 1, 20))]
    assert found == pytest.approx(max(by_hand)) and max(by_hand) == by_hand[0]


# ------------------------------------------------------------------------------------------------
# Plans
# ------------------------------------------------------------------------------------------------


def plan_flags(*words):
    args = elsa.build_parser(elsa_plan.__doc__, elsa_channels.CHANNELS, [
        elsa_channels.add_bits, elsa_plan.add_plan]).parse_args([str(w) for w in words])
    common.fill_in(args, elsa.REAL)
    elsa_channels.settle(args)
    return args


@pytest.mark.parametrize("name, millions", [("Qwen2.5-0.5B", 494.033), ("Llama-3.2-1B", 1235.814)])
def test_the_configurations_that_stand_in_the_plan_are_those_of_their_makers(name, millions):
    model = elsa_plan.meta_split(name, plan_flags())
    frozen = [p for p in model.encoder.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channel", [
    ["none"], ["sketch", "--ratio", ".5"], ["sketch", "--ratio", ".5", "--bits", "8"], ["quant"],
    ["lowrank", "--ratio", ".25"], ["sketch", "--sketch", "both"]], ids=" ".join)
def test_a_plan_is_what_a_real_model_carries_and_sends(small, tmp_path, dtype, channel):
    """Parameters, memory and adapters counted on a model with weights; bytes from its own link;
    FLOPs from torch's own counter."""
    from transformers import AutoModel
    folder = decoder_folder(small, tmp_path, "GPT2" if channel == ["quant"] else "Llama")
    args = plan_flags(folder, "--channel", *channel, "--batch", 3, "--max-length", 7, "--rank", 2,
                      "--dtype", dtype, "--seed", 4)
    cut = (1, 2)
    plan = elsa_plan.price(elsa_plan.meta_split(str(folder), args), cut, args)
    model = elsa.SplitEncoder(AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)), 2)
    elsa.put_lora(model, 2, 4.0)
    at_edge = {id(p) for p in model.stack()[1].parameters()}
    mine = [p for p in model.parameters() if id(p) not in at_edge]
    weights = sum(p.numel() * p.element_size() for p in mine)
    tuned = sum(p.numel() for p in mine if p.requires_grad)
    assert plan["parameters"] == sum(p.numel() for p in mine)
    assert plan[dtype] == weights + 12 * tuned  # its gradient and two moments
    whole = [elsa_plan.price(model, (0, 3), args), elsa_plan.price(model, (3, 3), args)]
    assert whole[1]["edge FLOPs"] == 0 < whole[0]["edge FLOPs"] == whole[1]["client FLOPs"]
    # a step over a real link
    anywhere = {n: torch.eye(16) for n in elsa.EXCHANGES}
    world = SimpleNamespace(args=args, width=16, device="cpu", channels=elsa_channels.CHANNELS)
    codecs, updates = elsa.make_codecs(world, {"directions": {str(cut): anywhere}}, cut)
    link, ids = elsa.Link(codecs), torch.randint(4, 60, (3, 7), generator=generator())
    model(ids, torch.ones_like(ids), cut, link).sum().backward()
    sent = link.sent
    assert plan["step up"] == sent["activations up"] + sent["gradients up"]
    assert plan["step down"] == sent["activations down"] + sent["gradients down"] > 0
    adapters = {n: p.detach() for n, p in model.named_parameters()
                if p.requires_grad and id(p) not in at_edge}
    up = 4 * tuned if updates is None else elsa.send_update(adapters, adapters, updates, 16)[1]
    assert plan["adapters"] == 4 * tuned + up
    # the edge's block, there and back
    x, beside = model.part1(ids, torch.ones_like(ids), 1)
    x = x.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model.blocks(x, beside, 1, 2).sum().backward()
    assert plan["edge FLOPs"] == pytest.approx(counter.get_total_flops(), rel=.05)
    assert plan["client FLOPs"] == 2 * plan["edge FLOPs"]


def test_a_plan_is_a_table_a_figure_and_a_line(small, tmp_path, capsys, monkeypatch):
    words = ["--ssop-rank", 4, "--channel", "none", "--out-dir"]
    folder = decoder_folder(small, tmp_path)
    capsys.readouterr()
    for config in (folder, folder / "config.json"):
        name = tmp_path / f"plan-{config.name}"
        elsa_plan.main([str(w) for w in (config, *words, name)])
        out, err = capsys.readouterr()
        assert "GFLOP client" in out and re.search(r"\nRESULT script=elsa-plan config=\S+", out)
        assert re.fullmatch(rf"encoder: LlamaModel of {config}, 3 blocks, width 16, 0.0 M "
                            r"parameters; no weights needed\n", err)
        found = result(name)
        assert found["cuts"] == [[1, 3], [1, 2]] and (name / "figure.png").exists()
        memory = [r["bfloat16"] for r in found["rows"]]
        assert memory == sorted(memory) and len(set(memory)) == 2
    figures = keep_figures(monkeypatch)
    elsa_plan.main([str(w) for w in (folder, "--split", "0,2", *words, tmp_path / "one")])
    assert result(tmp_path / "one")["cuts"] == [[0, 2]] and faults(figures[0]) == []
    assert exit_code(elsa_plan.main, [folder, "--split", "2,5", *words, tmp_path / "two"]) == 2
    assert "0 <= P <= Q <= 3" in capsys.readouterr().err
    assert exit_code(elsa_plan.main, ["/nowhere/at/all"]) == 2
    assert "/nowhere" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------

ROUNDS = ["--rounds", 12, "--method", "fedavg,elsa"]


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    out, err = finish(start("beyond/elsa_channels.py", arguments(
        small, *ROUNDS, "--channel", "lowrank", "--bits", 8, "--out-dir", folder)))
    return folder, out, err


def test_a_run_leaves_its_files_both_scripts_and_the_curve(reference):
    folder, out, err = reference
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "result.json", "figure.png", "curve.png",
        "elsa.py", "elsa_channels.py"}
    for path in ("elsa.py", "beyond/elsa_channels.py"):
        assert (folder / path.rpartition("/")[2]).read_text() == (ROOT / path).read_text()
    assert without_sources(err) == ""
    assert re.fullmatch(r"RESULT( \w+=\S+)+", out.strip().splitlines()[-1])
    assert "read through a channel" in out
    curve = {r[0]: r[1:] for r in result(folder)["curve"]}
    assert curve["none"][:2] == [1.0, 0.0] and curve["quant, 8 bits"][0] == 1 / 4 + 4 / 64
    assert 0 < curve["quant, 8 bits"][1] < .02 < curve["quant, 2 bits"][1]


def test_killed_and_resumed_ends_with_the_same_numbers(small, reference, tmp_path):
    folder = tmp_path / "out"
    words = arguments(small, *ROUNDS, "--channel", "lowrank", "--bits", 8, "--out-dir", folder)
    kill("beyond/elsa_channels.py", words, folder, 16)  # in ELSA
    finish(start("beyond/elsa_channels.py", [*words, "--resume"]))
    assert_equal_runs(folder, reference[0])


def test_two_processes_give_the_numbers_of_one(small, tmp_path):
    words = arguments(small, "--method", "elsa,local", "--channel", "lowrank", "--bits", 8,
                      "--split", "auto")
    assert exit_code(elsa_channels.main, [*words, "--out-dir", tmp_path / "one"]) == 0
    out, _ = finish(start("beyond/elsa_channels.py", [*words, "--out-dir", tmp_path / "two"],
                          launcher=torchrun()))
    assert out.count("RESULT") == 1
    assert_equal_runs(tmp_path / "two", tmp_path / "one")


def test_the_others_add_their_table_and_change_nothing_else(small, tmp_path):
    words = arguments(small, "--method", "fedavg,elsa", "--channel", "quant")
    channels = tmp_path / "elsa_channels"
    elsa_channels.main([*words, "--no-curve", "--out-dir", str(channels)])
    plain = result(channels)
    for name, key, table in (("elsa_attacks", "privacy", "words recovered"),
                             ("elsa_plan", "seconds", "seconds of a round")):
        folder = tmp_path / name
        out, _ = finish(start(f"beyond/{name}.py", [*words, "--out-dir", folder]))
        found = result(folder)
        assert table in out and found.pop(key) and found == plain
        assert all(torch.equal(a, b) for a, b in zip(trained(folder), trained(channels),
                                                     strict=True))
        assert {p.name for p in folder.glob("*.py")} == {"elsa.py", "elsa_channels.py",
                                                         f"{name}.py"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_is_attacked_compressed_and_timed_too(small, tmp_path, capsys, dtype):
    """Its tokenizer frames texts as BERT's does, or not at all: then every token is a word."""
    folder = decoder_folder(small, tmp_path)
    words = arguments(small, "--model", folder, "--dtype", dtype, "--channel", "lowrank")
    for script in SCRIPTS.values():
        script.main([*words, "--out-dir", str(tmp_path / script.__name__)])
    curve = {r[0]: r[1:] for r in result(tmp_path / elsa_channels.__name__)["curve"]}
    number = {"float32": 4, "bfloat16": 2}[dtype]
    assert curve["quant, 8 bits"][0] == (1 + 4 / 16) / number and curve["lowrank"][0] <= 1
    assert result(tmp_path / elsa_plan.__name__)["seconds"]["ELSA"] > 0
    framed = result(tmp_path / elsa_attacks.__name__)["privacy"]
    tokens = json.loads((folder / "tokenizer.json").read_text())
    tokens["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    elsa_attacks.main([*words, "--out-dir", str(tmp_path / "bare")])
    bare = result(tmp_path / "bare")["privacy"]
    assert framed[0][0] == bare[0][0] == "in the clear"
    assert framed[0][1] > 60 and bare[0][1] > 60  # of 60 words


def test_stochastic_rounding_follows_the_seed(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        elsa_channels.main(arguments(small, "--channel", "quant", "--dropout", .1, "--seed", seed,
                                     "--no-curve", "--out-dir", tmp_path / name))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert result(tmp_path / "a")["results"] != result(tmp_path / "c")["results"]


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_run_without_elsa_has_nothing_to_report(small, tmp_path, script):
    script.main(arguments(small, "--method", "fedavg", "--rounds", 1, "--out-dir", tmp_path / "a"))
    assert not {"curve", "privacy", "seconds"} & set(result(tmp_path / "a"))


def test_the_curve_is_read_without_colours(tmp_path, monkeypatch):
    figures, names = keep_figures(monkeypatch), ["none"]
    names += [f"sketch, {r}" for r in ("median",) * 3 + ("lsq",) * 2] + ["lowrank"] * 3
    names += ["lowrank, 8 bits", "quant, 8 bits", "quant, 4 bits", "quant, 2 bits"]
    rows = [[name, 1 / (i + 1), .1, 20.0 * (i % 6)] for i, name in enumerate(names)]
    world = SimpleNamespace(args=SimpleNamespace(seed=0))
    elsa_channels.draw_curve(world, {"dataset": "topics", "curve": rows}, tmp_path / "figure.png")
    assert (tmp_path / "curve.png").exists() and faults(figures[0]) == []
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert len({line.get_marker() for line in lines.values()}) == len(lines) == 6
    # from few bytes to many, whatever the order of the rows
    assert lines["sketch, median"].get_xdata() == pytest.approx([1 / 4, 1 / 3, 1 / 2])
    assert sum(len(line.get_xdata()) for line in lines.values()) == len(rows)


def test_results_are_safe_before_the_curve_is_drawn(small, tmp_path, monkeypatch, capsys):
    def draw(*_):
        raise RuntimeError("no ink")
    monkeypatch.setattr(elsa_channels, "draw_curve", draw)
    elsa_channels.main(arguments(small, "--rounds", 1, "--out-dir", tmp_path / "out"))
    said = capsys.readouterr()
    assert "no ink" in said.err and said.out.splitlines()[-1].startswith("RESULT ")
    assert len(result(tmp_path / "out")["curve"]) == len(elsa_channels.CURVE)
    assert (tmp_path / "out" / "figure.png").exists()


@pytest.mark.parametrize("flags, reason", [
    (["--channel", "lowrank", "--sketch", "both"], "directions of states"),
    (["--channel", "none", "--bits", "4"], "--bits 4: --channel none sends everything")])
def test_channels_that_cannot_be_are_refused_at_the_door(small, tmp_path, capsys, flags, reason):
    words = arguments(small, *flags, "--out-dir", tmp_path / "out")
    assert exit_code(elsa_channels.main, words) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and reason in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--bits", "3"], ["--channel", "zip"]], ids=" ".join)
def test_bad_flag_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        elsa_channels.main(flags)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and flags[0] in err


def test_each_has_a_folder_of_its_own(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(small / "texts.csv", "mine.csv")
    elsa_plan.main(arguments(small, "--dataset", "csv:mine.csv", "--rounds", 1))
    assert (tmp_path / "runs" / "elsa-plan-mine-1" / "result.json").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_with_all_flags(script):
    out, _ = finish(start(f"beyond/{script}.py", ["-h"]))
    for words in ("The idea", "Run", "What it adds", "Results", "--trust-factor", "lowrank",
                  "--bits"):
        assert words in out
    assert ("DEVIATION 1" in out) == (script == "elsa_channels")
