"""common.py: seeds, files, the run contract, processes and metrics."""
import argparse
import copy
import itertools
import json
import math
import pickle
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import common
from common import UserError
from tools import faults, finish, keep_figures, start, tick_labels, torchrun

REPOSITORY = Path(common.__file__).parent


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(title=..., setting=...) -> Run in an empty current folder, as one CPU process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["toy.py"])

    def make(title="toy", may_change=(), **changes):
        settings = {"seed": 0, "device": "cpu", "threads": None, "out_dir": None,
                    "data_dir": Path("data"), "resume": False, "overwrite": False, "lr": .1,
                    "rounds": 3, "mode": None}
        return common.Run(argparse.Namespace(**{**settings, **changes}), title, may_change)
    yield make
    torch.set_flush_denormal(False)


@pytest.fixture
def ctrl_c():
    """ctrl_c() sends this process a Ctrl-C; Python's own handler is in place before and after.

    To this thread, as raise_signal does: it has arrived when ctrl_c() returns, which os.kill does
    not promise where other threads could take it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- seeds ---------------------------------------------------------------------------------------


def test_seed_depends_on_the_seed_and_on_every_word():
    purposes = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", "1"),
                ("a", 1, 2)]
    seeds = {common.seed_for(s, *purpose) for s in (0, 1) for purpose in purposes}
    assert len(seeds) == 2 * len(purposes)
    assert all(0 <= s < 2 ** 63 for s in seeds)


def test_seed_is_the_same_on_every_machine():
    """Other values here would change the numbers of every run."""
    assert common.seed_for(0, "partition") == 1161386621292317679
    assert common.seed_for(7, "batches", 3, "x") == 1870581353164433119


def test_numpy_integers_are_the_same_words_as_python_ones():
    """A client number may come out of an array."""
    assert common.seed_for(np.int64(0), "batches", np.int64(3)) == common.seed_for(0, "batches", 3)


def test_generators_repeat_and_do_not_influence_each_other():
    a = common.numpy_generator(0, "partition")
    b = common.numpy_generator(0, "clients")
    first = a.random(5)
    b.random(100)
    np.random.random(3)
    again = common.numpy_generator(0, "partition")
    assert np.array_equal(again.random(5), first)
    assert np.array_equal(a.random(5), again.random(5))
    assert not np.array_equal(common.numpy_generator(0, "clients").random(5), first)


def test_torch_generators_repeat_and_leave_the_global_one_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draws = [torch.rand(4, generator=common.torch_generator(s, p)) for s, p in
             ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_torch_sets_the_global_generator():
    draws = []
    for purpose in (("dropout", 0), ("dropout", 0), ("dropout", 1)):
        common.seed_torch(0, *purpose)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bounds, text, value", [
    (int, {}, "5", 5), (int, {}, "-5", -5), (int, {"low": 0}, "0", 0), (int, {"high": 3}, "3", 3),
    (int, {"low": 0}, "1" + "0" * 30, 10 ** 30), (float, {}, "1e-3", .001), (float, {}, "2", 2.0),
    (float, {"above": 0}, "1e-300", 1e-300), (float, {"low": 0, "high": 1}, "1", 1.0)])
def test_number_accepts(kind, bounds, text, value):
    parsed = common.number(kind, **bounds)(text)
    assert parsed == value and type(parsed) is kind


@pytest.mark.parametrize("kind, bounds, text, words", [
    (int, {}, "five", "int"), (int, {}, "1.5", "int"), (int, {}, "", "int"),
    (int, {}, "nan", "int"), (int, {"low": 0}, "-1", "int >= 0"),
    (int, {"high": 3}, "4", "int <= 3"),
    (float, {"above": 0}, "0", "float > 0"), (float, {"above": 0}, "-1", "float > 0"),
    (float, {"low": 0, "high": 1}, "1.01", "float >= 0 <= 1"), (float, {}, "nan", "float"),
    (float, {}, "inf", "float"), (float, {"low": 0}, "1e999", "float >= 0"),
    (float, {}, "1,5", "float")])
def test_number_refuses(kind, bounds, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        common.number(kind, **bounds)(text)
    assert str(caught.value) == f"expected {words}, got {text!r}"


def parser():
    parser = common.Parser("a\n    header")
    parser.prog = "toy.py"
    common.add_run_arguments(parser)
    parser.add_argument("--peft", choices=["prompt", "lora"])
    return parser


@pytest.mark.parametrize("words, expected", [
    (["--seed", "-1"], "--seed: expected int >= 0"), (["--seed"], "--seed"),
    (["--threads", "0"], "--threads: expected int >= 1"), (["--nonsense"], "--nonsense"),
    (["--see", "1"], "--see"), (["--peft", "pizza"], "'pizza'"), (["two\nlines"], "two"),
    (["--peft", "a\nb"], "--peft")])
def test_parser_complains_in_one_line_with_code_2(words, expected, capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(words)
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    assert said.err.startswith("toy.py: error: ") and said.err.count("\n") == 1
    assert expected in said.err and "toy.py -h" in said.err


def test_run_arguments_have_their_defaults_and_help_shows_the_header(capsys):
    args = parser().parse_args([])
    assert (args.seed, args.device, args.threads, args.out_dir) == (0, "auto", None, None)
    assert (args.data_dir, args.resume, args.overwrite) == (Path("data"), False, False)
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["-h"])
    assert caught.value.code == 0 and "a\n    header" in capsys.readouterr().out


# -- errors --------------------------------------------------------------------------------------


def fail(error):
    raise error


@pytest.mark.parametrize("error, code, line", [
    (UserError("no such\n   file"), 2, "error: no such file"),
    (UserError("not finite", code=3), 3, "error: not finite"),
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
    (PermissionError(13, "Denied", "a\nb"), 2, "error: [Errno 13] Denied: 'a\\nb'"),
    (torch.cuda.OutOfMemoryError("CUDA\nout of memory"), 2, "error: the GPU is out of memory"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_run_cli_turns_what_a_user_can_cause_into_one_line(error, code, line, capsys):
    with pytest.raises(SystemExit) as caught:
        common.run_cli(lambda: fail(error))
    said = capsys.readouterr()
    assert caught.value.code == code and said.out == ""
    assert said.err.startswith(line) and said.err.count("\n") == 1


def test_run_cli_ends_with_0_and_does_not_hide_our_own_mistakes():
    with pytest.raises(SystemExit) as caught:
        common.run_cli(lambda: None)
    assert caught.value.code == 0
    with pytest.raises(ZeroDivisionError):
        common.run_cli(lambda: 1 / 0)


@pytest.mark.parametrize("caught", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_goes_on_says_so_when_it_is_stopped(caught, make_run, tmp_path, capsys):
    def main():
        with make_run():  # its own words would name a folder that is of no use
            common.atomic_write(tmp_path / "row", lambda p: (
                caught == signal.SIGTERM or signal.raise_signal(caught), p.write_text("whole")))
            signal.raise_signal(caught)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            common.run_cli(main, continues=True)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert ended.value.code == 130 and (tmp_path / "row").read_text() == "whole"
    assert capsys.readouterr().err == (
        "error: stopped; what has finished is kept, and the same command goes on from there\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor([1., math.nan]),
                                   torch.tensor([[-math.inf, 0.]])])
def test_check_finite_refuses_with_code_3(value):
    with pytest.raises(UserError, match="the loss of round 3 is not finite") as caught:
        common.check_finite(value, "the loss of round 3")
    assert caught.value.code == 3


@pytest.mark.parametrize("value", [0, 1.5, torch.tensor([1., -2.]), torch.tensor(3)])
def test_check_finite_hands_back_what_is_finite(value):
    assert common.check_finite(value, "x") is value


# -- files ---------------------------------------------------------------------------------------


def test_atomic_write_makes_folders_keeps_the_suffix_and_leaves_no_temporary(tmp_path):
    path, seen = tmp_path / "a" / "b" / "figure.png", []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("new")
    common.atomic_write(path, write)
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]
    assert seen[0].suffix == ".png" and seen[0].parent == path.parent and seen[0] != path


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the ne")
        raise RuntimeError("disk full")
    for target in (path, tmp_path / "other.json"):
        with pytest.raises(RuntimeError, match="disk full"):
            common.atomic_write(target, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_waits_for_the_end_of_the_block(ctrl_c):
    done = []
    with pytest.raises(KeyboardInterrupt), common.hold_interrupts():
        ctrl_c()
        done.append("after the signal")
    assert done == ["after the signal"]


def test_ctrl_c_after_the_block_is_not_held(ctrl_c):
    with common.hold_interrupts():
        pass
    with pytest.raises(ValueError, match="own"), common.hold_interrupts():
        raise ValueError("own")
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_ctrl_c_during_a_write_leaves_a_complete_file(tmp_path, ctrl_c):
    def write(temporary):
        ctrl_c()
        temporary.write_text("complete")
    with pytest.raises(KeyboardInterrupt):
        common.atomic_write(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "complete" and len(list(tmp_path.iterdir())) == 1


def test_files_can_be_written_from_other_threads(tmp_path):
    thread = threading.Thread(target=common.write_json, args=(tmp_path / "x.json", {"a": 1}))
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


class RunsCode:
    """A pickle of this creates the file `mark` where it is loaded carelessly."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("damage", ["missing", "truncated", "random", "empty", "folder",
                                    "code in zip", "code in pickle"])
def test_load_tensors_refuses_what_torch_did_not_save(damage, tmp_path):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    torch.save({"a": torch.arange(1000)}, path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "code in zip":
        torch.save({"a": RunsCode(mark)}, path)
    elif damage != "missing":
        path.write_bytes({"truncated": whole[:len(whole) // 2], "empty": b"",
                          "random": np.random.default_rng(0).bytes(3000),
                          "code in pickle": pickle.dumps(RunsCode(mark), 2)}[damage])
    with pytest.raises(UserError) as caught:
        common.load_tensors(path, "a toy")
    message = str(caught.value)
    assert str(path) in message and message.endswith("expected a toy") and "\n" not in message
    what = {"missing": "does not exist", "code in zip": "is not readable"}
    assert what.get(damage, "is truncated or damaged") in message
    assert not mark.exists()


def test_load_tensors_reads_what_torch_saved(tmp_path):
    torch.save({"a": torch.arange(3), "b": [1, 2.5, None, "x"]}, tmp_path / "x.pt")
    content = common.load_tensors(tmp_path / "x.pt", "a toy")
    assert torch.equal(content["a"], torch.arange(3)) and content["b"] == [1, 2.5, None, "x"]


def test_cached_makes_once(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"a": torch.ones(2)}
    path = tmp_path / "deep" / "x.pt"
    for _ in range(3):
        assert torch.equal(common.cached(path, make, "a toy")["a"], torch.ones(2))
    assert calls == [1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="a toy; delete it to make it again"):
        common.cached(path, make, "a toy")
    assert calls == [1]


def test_cached_keeps_nothing_when_making_fails(tmp_path):
    with pytest.raises(RuntimeError):
        common.cached(tmp_path / "x.pt", lambda: fail(RuntimeError("interrupted")), "a toy")
    assert list(tmp_path.iterdir()) == []


def test_cache_key_depends_on_every_part():
    parts = [(1, "a"), (1, "b"), ("1", "a"), (1,), ((1, "a"),)]
    assert len({common.cache_key(*p) for p in parts}) == len(parts)
    assert common.cache_key(1, "a") == common.cache_key(1, "a")


# -- the folder of a run -------------------------------------------------------------------------


def test_default_folders_are_numbered(make_run):
    assert make_run().out_dir == Path("runs/toy-1")
    assert make_run().out_dir == Path("runs/toy-2")
    for name in ("toy-10", "toy-x", "toy-lt-40", "other-50", "toy-11-old"):
        Path("runs", name).mkdir()
    assert make_run().out_dir == Path("runs/toy-11")
    assert make_run(title="toy-lt").out_dir == Path("runs/toy-lt-41")


def test_resume_without_a_folder_takes_the_newest(make_run):
    with pytest.raises(UserError, match=r"no run in runs/toy-N yet"):
        make_run(resume=True)
    for _ in range(10):
        make_run().begin()
    assert make_run(resume=True).out_dir == Path("runs/toy-10")


@pytest.mark.parametrize("name", ["checkpoint.pt", "result.json", "log.jsonl"])
def test_folder_with_results_is_not_overwritten_unasked(name, make_run):
    folder = Path("out")
    folder.mkdir()
    (folder / name).write_text("precious")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out holds results already; add --resume .* --overwrite"):
        make_run(out_dir=folder)
    assert (folder / name).read_text() == "precious"
    make_run(out_dir=folder, overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_folder_without_results_is_used(make_run):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert make_run(out_dir=Path("out")).out_dir == Path("out")
    assert Path("out/notes.txt").read_text() == "mine"


def test_file_as_out_dir_is_refused(make_run):
    Path("out").write_text("precious")
    with pytest.raises(UserError, match="--out-dir out is a file; name a folder"):
        make_run(out_dir=Path("out"), overwrite=True)
    with pytest.raises(UserError, match="--resume: out holds no run"):
        make_run(out_dir=Path("out"), resume=True)
    assert Path("out").read_text() == "precious"


def test_resume_of_a_folder_without_a_run_is_refused(make_run):
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(UserError, match=f"--resume: {folder} holds no run"):
            make_run(out_dir=Path(folder), resume=True)
    assert not Path("nowhere").exists()


def test_begin_writes_the_settings_and_a_copy_of_the_script(make_run, monkeypatch):
    Path("toy.py").write_text("print('toy')\n")
    monkeypatch.setattr(sys, "argv", ["toy.py", "--lr", "0.5", "two words"])
    run = make_run(lr=.5, place=Path("a/b"))
    run.begin()
    config = json.loads((run.out_dir / "config.json").read_text())
    assert config["command"] == "toy.py --lr 0.5 'two words'" and config["device"] == "cpu"
    assert config["settings"]["lr"] == .5 and config["settings"]["data_dir"] == "data"
    assert config["settings"]["mode"] is None and config["settings"]["place"] == "a/b"
    assert config["versions"]["torch"] == torch.__version__ and config["processes"] == 1
    assert (run.out_dir / "toy.py").read_text() == "print('toy')\n"


# -- checkpoints ---------------------------------------------------------------------------------

STATE = {"round": 2, "loss": 1 / 3, "name": "fedavg", "none": None, "done": {"a": [1, 2.5]},
         "weights": {3: {"w": torch.tensor([1 / 3, -0.0, 1e-40])}, 4: {}},
         "list": [torch.arange(4), True]}


def saved_run(make_run, **changes):
    """A run of two rounds, saved after the second."""
    run = make_run(out_dir=Path("out"), **changes)
    run.begin()
    for i in (1, 2):
        run.log(round=i, loss=.5 / i)
    run.save(STATE, "round 2")
    return run


def test_save_and_load_give_back_the_same(make_run):
    assert saved_run(make_run).saved_at == "round 2"
    state = make_run(out_dir=Path("out"), resume=True).load()
    for key in ("round", "loss", "name", "none", "done"):
        assert state[key] == STATE[key] and type(state[key]) is type(STATE[key])
    bits = [w["weights"][3]["w"].view(torch.int32) for w in (state, STATE)]
    assert torch.equal(*bits) and state["weights"][4] == {}
    assert torch.equal(state["list"][0], torch.arange(4)) and state["list"][1] is True


def test_saved_tensors_are_cut_from_the_graph(make_run):
    run = make_run(out_dir=Path("out"))
    weight = torch.ones(2, requires_grad=True)
    run.save({"w": weight * 2}, "round 1")
    loaded = make_run(out_dir=Path("out"), resume=True).load()["w"]
    assert torch.equal(loaded, torch.tensor([2., 2.])) and not loaded.requires_grad


def test_nothing_is_loaded_without_resume_or_before_the_first_save(make_run):
    run = make_run(out_dir=Path("out"))
    run.begin()
    assert run.load() is None
    assert make_run(out_dir=Path("out"), resume=True).load() is None


@pytest.mark.parametrize("key, value", [("lr", .2), ("seed", 1), ("mode", "x"), ("rounds", 5)])
def test_resume_with_another_setting_is_refused(key, value, make_run):
    saved_run(make_run)
    before = Path("out/checkpoint.pt").read_bytes()
    old = {"lr": .1, "seed": 0, "mode": None, "rounds": 3}[key]
    with pytest.raises(UserError) as caught:
        make_run(out_dir=Path("out"), resume=True, **{key: value}).load()
    message = str(caught.value)
    assert f"made with {key}={old}" in message and f"says {key}={value}" in message
    assert "out/checkpoint.pt" in message and Path("out/checkpoint.pt").read_bytes() == before


def test_resume_with_a_setting_more_or_less_is_refused(make_run):
    saved_run(make_run)
    with pytest.raises(UserError, match="extra=None, this command says extra=7"):
        make_run(out_dir=Path("out"), resume=True, extra=7).load()


def test_settings_that_do_not_matter_may_change(make_run):
    saved_run(make_run)
    run = make_run(out_dir=Path("out"), resume=True, data_dir=Path("elsewhere"), device="auto",
                   threads=torch.get_num_threads())
    assert run.load()["round"] == 2
    assert Path("out/checkpoint.pt").exists()


def test_named_settings_may_change(make_run):
    saved_run(make_run, may_change=["rounds"])
    assert make_run(out_dir=Path("out"), resume=True, may_change=["rounds"], rounds=9).load()


def test_checkpoint_of_another_script_is_refused(make_run):
    saved_run(make_run)
    with pytest.raises(UserError, match=r"out/checkpoint.pt is not a checkpoint of other; choose"):
        make_run(title="other", out_dir=Path("out"), resume=True).load()


@pytest.mark.parametrize("content", [[1, 2], {"script": "toy"}, torch.ones(2)])
def test_foreign_tensors_are_refused(content, make_run):
    saved_run(make_run)
    torch.save(content, "out/checkpoint.pt")
    with pytest.raises(UserError, match="is not a checkpoint of toy"):
        make_run(out_dir=Path("out"), resume=True).load()


def test_truncated_checkpoint_is_refused_and_kept(make_run):
    saved_run(make_run)
    half = Path("out/checkpoint.pt").read_bytes()[:700]
    Path("out/checkpoint.pt").write_bytes(half)
    log = Path("out/log.jsonl").read_text()
    with pytest.raises(UserError, match=r"out/checkpoint.pt is truncated or damaged"):
        make_run(out_dir=Path("out"), resume=True).load()
    assert Path("out/checkpoint.pt").read_bytes() == half
    assert Path("out/log.jsonl").read_text() == log


def test_log_is_cut_back_to_what_was_saved(make_run):
    run = saved_run(make_run)
    run.log(round=3, loss=.1)  # logged, then killed before the save
    with open("out/log.jsonl", "a") as handle:
        handle.write('{"round": 4, "lo')  # killed while writing
    again = make_run(out_dir=Path("out"), resume=True)
    again.load()
    assert [r["round"] for r in lines_of(Path("out/log.jsonl"))] == [1, 2]
    again.log(round=3, loss=.25)
    assert [(r["round"], r["loss"]) for r in lines_of(Path("out/log.jsonl"))] == [
        (1, .5), (2, .25), (3, .25)]
    again.save(STATE, "round 3")
    third = make_run(out_dir=Path("out"), resume=True)
    third.load()
    assert [r["round"] for r in third.rows] == [1, 2, 3]


def test_log_of_a_run_killed_before_its_first_save_starts_again(make_run):
    run = make_run(out_dir=Path("out"))
    run.begin()
    run.log(round=1, loss=.5)  # then killed
    again = make_run(out_dir=Path("out"), resume=True)
    again.begin()
    assert again.load() is None
    again.log(round=1, loss=.5)
    assert [r["round"] for r in lines_of(Path("out/log.jsonl"))] == [1]


@pytest.mark.parametrize("saved, key, value", [(True, "rounds", 9), (False, "lr", .2)])
def test_config_states_the_settings_that_made_the_results(saved, key, value, make_run):
    """After a continuation that was allowed to change them, and after one that started afresh."""
    run = make_run(out_dir=Path("out"), may_change=["rounds"])
    run.begin()
    if saved:
        run.save(STATE, "round 2")
    again = make_run(out_dir=Path("out"), may_change=["rounds"], resume=True, **{key: value})
    again.begin()
    again.load()
    again.finish({"score": 1.0})
    assert json.loads(Path("out/config.json").read_text())["settings"][key] == value


def test_resume_that_is_refused_leaves_the_config(make_run):
    saved_run(make_run)
    before = Path("out/config.json").read_text()
    again = make_run(out_dir=Path("out"), resume=True, lr=.7)
    again.begin()
    with pytest.raises(UserError):
        again.load()
    assert Path("out/config.json").read_text() == before


# -- console -------------------------------------------------------------------------------------


def test_finish_writes_the_result_and_prints_one_line(make_run, capsys):
    run = make_run(out_dir=Path("out"))
    run.begin()
    run.log(round=1, loss=.5)
    run.finish({"results": [1, None, .123456789]}, script="toy", acc=.123456789, n=3, few=None)
    assert json.loads(Path("out/result.json").read_text()) == {
        "results": [1, None, .123456789], "sources": {}}
    assert capsys.readouterr().out == "RESULT script=toy acc=0.1235 n=3 few=None\n"


def test_table_is_printed_and_progress_is_silent_without_a_terminal(make_run, capsys):
    run = make_run()
    run.table(["", "x"], [["a", 1.0]])
    assert list(run.progress(range(3), "steps")) == [0, 1, 2]
    said = capsys.readouterr()
    assert said.out == "      x\na  1.00\n" and said.err == ""


def test_terminal_shows_settings_and_aligned_rows(make_run, capsys, monkeypatch):
    run = make_run(out_dir=Path("out"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run.begin()
    for i in (9, 10):
        run.log(round=i, loss=.5)
    lines = capsys.readouterr().out.splitlines()
    assert "lr=0.1" in lines[0] and "mode" not in lines[0] and lines[1] == "results in out"
    assert lines[2].split() == ["round", "loss", "seconds"] and len(lines) == 5
    assert lines[3].split()[:2] == ["9", "0.5000"] and lines[4].split()[:2] == ["10", "0.5000"]
    ends = [[line.index(word) + len(word) for word in line.split()] for line in lines[2:4]]
    assert ends[0] == ends[1]


def test_ctrl_c_in_a_run_says_how_to_continue(make_run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy.py", "--lr", "1", "--overwrite"])
    with pytest.raises(SystemExit) as caught, make_run() as run:
        run.save({}, "round 2")
        raise KeyboardInterrupt
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert "saved: round 2" in said and "python toy.py --lr 1 --out-dir runs/toy-1 --resume" in said
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out-dir=my runs"])
    with pytest.raises(SystemExit), make_run(out_dir=Path("my runs")):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "saved: nothing new" in said and "python toy.py '--out-dir=my runs' --resume" in said


def test_errors_pass_through_a_run(make_run):
    with pytest.raises(UserError, match="mine"), make_run():
        raise UserError("mine")


# -- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, message", [
    ("cuda", "torch sees no CUDA GPU here; use --device cpu"), ("cuda:3", "torch sees no CUDA GPU"),
    ("banana", "--device banana is not a device; use auto, cpu"), ("", "is not a device"),
    ("mps", "no Metal support"), ("meta", "--device meta is not supported")])
def test_bad_devices_are_refused_before_anything_is_written(device, message, make_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        make_run(device=device)
    assert not Path("runs").exists()


def test_gpu_that_is_not_there_is_refused(make_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there is no GPU 7; torch sees 2"):
        make_run(device="cuda:7")


def test_auto_takes_the_cpu_without_a_gpu(make_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_run(device="auto").device == torch.device("cpu")


# -- several processes ---------------------------------------------------------------------------

RANKS = """
import argparse, json, sys, time
from pathlib import Path
import torch
import common

args = argparse.Namespace(seed=0, device="cpu", threads=1, out_dir=None, data_dir=Path("data"),
                          resume=False, overwrite=False)
with common.Run(args, "toy") as run:
    run.begin()
    mine = run.share(range(5))
    merged = run.gather({k: {"w": torch.full((2,), float(k), requires_grad=True)} for k in mine})
    order = Path("order")
    with run.rank_zero_first():
        seen = order.exists()
        if run.rank == 0:
            time.sleep(.5)  # a rank that did not wait would be here by now
            order.touch()
    run.log(rank=run.rank)
    run.save({"a": 1}, "round 1")
    run.table(["rank"], [[run.rank]])
    run.finish({"rank": run.rank}, rank=run.rank)
    Path(f"rank{run.rank}.json").write_text(json.dumps({
        "world": run.world, "mine": mine, "keys": sorted(merged), "seen": seen,
        "sums": [merged[k]["w"].sum().item() for k in sorted(merged)],
        "empty": run.gather({}), "few": run.share([7]), "out": str(run.out_dir),
        "grad": any(m["w"].requires_grad for m in merged.values())}))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes of one gloo group saw, their folder, and what both together printed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        said, _ = finish(start(folder / "ranks.py", [], cwd=folder, launcher=torchrun()))
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)], folder, said


def test_shares_are_disjoint_and_complete(two_ranks):
    (first, second), _, _ = two_ranks
    assert first["world"] == second["world"] == 2
    assert first["mine"] == [0, 2, 4] and second["mine"] == [1, 3]
    assert [first["few"], second["few"]] == [[7], []]


def test_gather_gives_every_rank_the_union(two_ranks):
    for seen in two_ranks[0]:
        assert seen["keys"] == [0, 1, 2, 3, 4] and seen["sums"] == [0., 2., 4., 6., 8.]
        assert seen["empty"] == {} and not seen["grad"]


def test_rank_zero_goes_first(two_ranks):
    assert [seen["seen"] for seen in two_ranks[0]] == [False, True]


def test_only_rank_zero_writes_and_prints(two_ranks):
    seen, folder, said = two_ranks
    assert [s["out"] for s in seen] == ["runs/toy-1"] * 2
    assert [p.name for p in (folder / "runs").iterdir()] == ["toy-1"]
    out = folder / "runs" / "toy-1"
    assert json.loads((out / "result.json").read_text()) == {"rank": 0, "sources": {}}
    assert [row["rank"] for row in lines_of(out / "log.jsonl")] == [0]
    assert json.loads((out / "config.json").read_text())["processes"] == 2
    assert said == "rank\n0\nRESULT rank=0\n"  # of rank 0; nothing of rank 1


def test_one_process_has_everything(make_run):
    run = make_run()
    part = {1: torch.ones(2)}
    assert run.share(range(3)) == [0, 1, 2] and run.gather(part) is part
    with run.rank_zero_first():
        assert run.rank == 0 and run.world == 1


# -- metrics -------------------------------------------------------------------------------------


def predictions(seed, classes=6, n=200):
    """Random labels and guesses over classes 0..classes-2: the last one is absent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (n,), generator=generator)
    right = torch.rand(n, generator=generator) < .6
    return torch.where(right, labels, torch.randint(classes - 1, (n,), generator=generator)), labels


@pytest.mark.parametrize("seed", range(3))
def test_per_class_accuracy_equals_counting(seed):
    guess, truth = predictions(seed)
    accuracy = common.per_class_accuracy(guess, truth, 6)
    assert accuracy.dtype == torch.float64 and accuracy.shape == (6,)
    for c in range(5):
        own = [g == t for g, t in zip(guess.tolist(), truth.tolist(), strict=True) if t == c]
        assert accuracy[c].item() == pytest.approx(sum(own) / len(own))
    assert accuracy[5].isnan()


def test_per_class_accuracy_counts_classes_never_hit():
    accuracy = common.per_class_accuracy(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1]), 4)
    assert accuracy[:2].tolist() == [0., .5] and accuracy[2:].isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_equals_counting(seed):
    guess, truth = (x.tolist() for x in predictions(seed, n=30))
    scores = []
    for c in sorted(set(truth)):
        hits = sum(g == t == c for g, t in zip(guess, truth, strict=True))
        precision = hits / guess.count(c) if c in guess else 0
        recall = hits / truth.count(c) if c in truth else 0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    f1 = common.macro_f1(torch.tensor(guess), torch.tensor(truth), 6)
    assert f1 == pytest.approx(sum(scores) / len(scores))


def test_macro_f1_of_known_cases():
    truth = torch.tensor([0, 0, 1, 2])
    assert common.macro_f1(truth, truth, 9) == 1.0
    assert common.macro_f1(torch.tensor([3, 3, 3, 3]), truth, 9) == 0.0
    assert common.macro_f1(torch.tensor([0, 0, 0, 0]), truth, 9) == pytest.approx((2 / 3) / 3)


def test_macro_f1_of_a_client_counts_only_the_classes_it_holds():
    """40 of 100 classes, 10 samples each, 2 of them lost to classes that the client has not."""
    truth = torch.arange(40).repeat_interleave(10)
    guess = torch.where(torch.arange(400) % 10 < 2, 40 + truth, truth)
    # each class: precision 1, recall .8; over all 80 classes named by anybody it would be half
    assert common.macro_f1(guess, truth, 100) == pytest.approx(2 * .8 / 1.8)


@pytest.mark.parametrize("sigma", [.05, .1, 1.0])
def test_balancedness_equals_the_double_loop(sigma):
    a = [.9, .1, .5, .55, math.nan, .5]
    kept = [x for x in a if not math.isnan(x)]
    pairs = [math.exp(-(x - y) ** 2 / (2 * sigma ** 2)) for x, y in itertools.product(kept, kept)]
    wanted = sum(pairs) / len(pairs)
    assert common.balancedness(torch.tensor(a, dtype=torch.float64), sigma) == pytest.approx(wanted)


def test_balancedness_lies_between_one_over_c_and_one():
    assert common.balancedness(torch.full((7,), .3)) == 1.0
    assert common.balancedness([0., 1.], sigma=.01) == pytest.approx(1 / 2)
    near, far = common.balancedness([.5, .52]), common.balancedness([.4, .8])
    assert 1 / 2 < far < near < 1


def test_format_table_aligns_and_shows_missing_numbers():
    header, rows = ["", "All", "Few"], [["zero-shot", 64.5, None], ["ours", 7.0, 12]]
    assert common.format_table(header, rows).split("\n") == [
        "             All  Few",
        "zero-shot  64.50    -",
        "ours        7.00   12"]


def test_format_table_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="zip"):
        common.format_table(["a", "b"], [[1, 2, 3]])


# -- metrics of fronts ---------------------------------------------------------------------------


def random_front(seed, n, m, kind=torch.float64):
    """n points in [0, 1.3]^m on a grid of 40 steps, so that ties and duplicates occur."""
    steps = np.random.default_rng([seed, n, m]).integers(0, 40, (n, m))
    return torch.from_numpy(steps / 30).to(kind)


@pytest.mark.parametrize("n, m", [(1, 2), (60, 2), (60, 3), (60, 4), (200, 2)])
def test_non_dominated_equals_the_definition(n, m):
    points = random_front(0, n, m)
    points = torch.cat([points, points[: n // 2]])  # duplicates
    rows, expected = points.tolist(), []
    for i, a in enumerate(rows):
        beaten = any(all(v <= w for v, w in zip(b, a, strict=True)) and b != a for b in rows)
        expected.append(not beaten and a not in rows[:i])
    found = common.non_dominated(points)
    assert found.dtype == torch.bool and found.tolist() == expected


def test_non_dominated_of_known_cases():
    points = [[1, 2], [2, 1], [2, 2], [1, 2], [0, 3], [1, 3], [3, 0.5]]
    assert common.non_dominated(torch.tensor(points)).tolist() == [
        True, True, False, False, True, False, True]
    front = torch.tensor([[0., 1.], [1., 0.]], requires_grad=True)
    assert common.non_dominated(front).tolist() == [True, True]


@pytest.mark.parametrize("seed, n", [(0, 1), (1, 2), (2, 12), (3, 80)])
def test_hypervolume_in_two_dimensions_equals_the_sweep(seed, n):
    points, reference = random_front(seed, n, 2), (1.1, .9)
    area, lowest = 0.0, reference[1]
    for f1, f2 in sorted(points.tolist()):  # from left to right, each adds a rectangle
        if f1 < reference[0] and f2 < lowest:
            area += (reference[0] - f1) * (lowest - f2)
            lowest = f2
    assert common.hypervolume(points, reference) == pytest.approx(area, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("m, n", [(3, 1), (3, 2), (3, 9), (4, 8)])
def test_hypervolume_equals_inclusion_and_exclusion(m, n):
    """|∪ boxes| = Σ over subsets of (-1)^(size + 1) |∩|, and the ∩ of boxes is a box."""
    points, reference = random_front(4, n, m), [1.1, 1.2, .9, 1][:m]
    points[0] *= .6  # this one lies inside the box
    volume = 0.0
    for size in range(1, n + 1):
        for subset in itertools.combinations(points.tolist(), size):
            corner = [max(column) for column in zip(*subset, strict=True)]
            box = math.prod(max(0, r - c) for r, c in zip(reference, corner, strict=True))
            volume -= (-1) ** size * box
    assert volume > 0
    assert common.hypervolume(points, torch.tensor(reference)) == pytest.approx(volume, rel=1e-6)
    assert common.hypervolume(points, reference) == pytest.approx(volume, rel=1e-12)


@pytest.mark.parametrize("m", [6, 7, 8, 9, 10])
def test_hypervolume_of_many_objectives_is_close_and_never_above_its_box(m):
    rng = np.random.default_rng(m)
    points = rng.uniform(.2, 1, (12, m))
    points[0], points[1, 0] = .3, 5  # the second is beyond the reference
    volume = 0.0
    inside = np.delete(points, 1, 0)
    for size in range(1, len(inside) + 1):
        for some in itertools.combinations(inside, size):
            volume -= (-1) ** size * np.prod(1.1 - np.max(some, 0))
    assert common.hypervolume(points, [1.1] * m) == pytest.approx(
        volume, rel=1e-9 if m == 6 else 5e-3)
    assert common.hypervolume(np.zeros((1, m)), [1.1] * m) <= 1.1 ** m + 1e-12
    assert common.hypervolume(np.full((2, m), 2), [1.1] * m) == 0


def test_hypervolume_of_known_fronts():
    assert common.hypervolume([[.5, .5]], [1, 1]) == .25
    assert common.hypervolume([[0, .5], [.5, 0]], [1, 1]) == .75
    assert common.hypervolume([[0, 0, 0]], [1.1, 1.1, 1.1]) == pytest.approx(1.331)
    assert common.hypervolume([[-1, 0]], [1, 1]) == 2  # below the ideal point counts
    assert isinstance(common.hypervolume(torch.zeros(1, 2), [1, 1]), float)
    learned = torch.tensor([[0., .5]], dtype=torch.float32, requires_grad=True)
    assert common.hypervolume(learned, [1, 1]) == .5


def test_hypervolume_ignores_what_adds_nothing():
    front = [[0, .5], [.5, 0]]
    for extra in ([.6, .6], [0, .5], [2, -3], [-3, 2], [1, -1], [5, 5], [.5, .5]):
        assert common.hypervolume([*front, extra], [1, 1]) == .75, extra
    for points in ([[1, 0]], [[2, 2]], [[0, 1], [1, 0]], [[-9, 3], [3, -9]]):
        assert common.hypervolume(points, [1, 1]) == 0, points


def test_angular_range_of_hand_made_fronts():
    a = math.radians
    for degrees in ([10, 80], [80, 30, 10], [30]):
        front = torch.tensor([[r * math.cos(a(d)), r * math.sin(a(d))]
                              for r, d in zip((.5, 3, 1), degrees, strict=False)])
        wanted = a(max(degrees) - min(degrees))
        assert common.angular_range(front) == pytest.approx(wanted, abs=1e-6)
    assert common.angular_range([[1, 0], [1, 1], [0, 1]]) == pytest.approx(math.pi / 2)


def test_angular_range_in_three_dimensions_is_the_smaller_span():
    def point(theta, phi, r=1.0):
        theta, phi = math.radians(theta), math.radians(phi)
        return [r * math.sin(theta) * math.cos(phi), r * math.sin(theta) * math.sin(phi),
                r * math.cos(theta)]
    narrow_up = [point(40, 10), point(60, 80, 3), point(50, 30, .2)]  # θ spans 20, φ spans 70
    narrow_round = [point(10, 35), point(85, 45, 2), point(50, 40)]  # θ spans 75, φ spans 10
    assert common.angular_range(narrow_up) == pytest.approx(math.radians(20))
    assert common.angular_range(torch.tensor(narrow_round, dtype=torch.float64)) == pytest.approx(
        math.radians(10))
    assert common.angular_range([[1, 0, 0], [0, 1, 0], [0, 0, 1]]) == pytest.approx(math.pi / 2)


@pytest.mark.parametrize("m", [1, 4, 5])
def test_angular_range_is_not_defined_for_other_numbers_of_objectives(m):
    assert math.isnan(common.angular_range(torch.rand(5, m)))


def test_sparsity_of_hand_made_fronts():
    # neighbours in f1: 1, 2 and in f2: 3, 1; (1 + 4 + 9 + 1) / 2
    front = [[0., 4.], [1., 1.], [3., 0.]]
    assert common.sparsity(front) == pytest.approx(7.5)
    assert common.sparsity([front[2], front[0], front[1]]) == pytest.approx(7.5)
    assert common.sparsity([*front, [3., 3.], [1., 1.], [9., 9.]]) == pytest.approx(7.5)
    # sorted columns 0 1 2, 0 1 3, 0 2 4: (1 + 1 + 1 + 4 + 4 + 4) / 2
    assert common.sparsity([[0., 3., 4.], [2., 0., 2.], [1., 1., 0.]]) == pytest.approx(7.5)
    assert common.sparsity([[0., 1.], [1., 0.]]) == 2
    even = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert common.sparsity(torch.stack([even, 1 - even], 1)) == pytest.approx(2 * .01)
    assert common.sparsity([[3., 4.]]) == 0
    assert common.sparsity([[3., 4.], [3., 4.], [5., 5.]]) == 0


# ================================================================================================
# Flags one a line, names, presets
# ================================================================================================


def flags(*words):
    parser = common.Parser("a script")
    add = parser.group("method")
    add("--rate", float, .5, "of learning", above=0, high=1)
    add("--kind", ["a", "b"], None, "which one (default: by the data)")
    add("--quiet", bool, False, "say nothing")
    add("--crop", bool, None, "default: by the data")
    add("--names", str, ["x"], "several", nargs="+")
    add("--workers", int, 0, "processes", low=0)
    return parser.parse_args(list(words)), parser


def test_flags_have_their_defaults_kinds_and_help():
    args, parser = flags()
    assert vars(args) == {"rate": .5, "kind": None, "quiet": False, "crop": None, "names": ["x"],
                          "workers": 0}
    args, _ = flags("--rate", "1", "--kind", "b", "--quiet", "--no-crop", "--names", "y", "z")
    assert vars(args) == {"rate": 1.0, "kind": "b", "quiet": True, "crop": False,
                          "names": ["y", "z"], "workers": 0}
    text = parser.format_help()
    assert "of learning (default 0.5)" in text and "processes (default 0)" in text
    assert text.count("(default: by the data)") == 1


@pytest.mark.parametrize("words", [["--rate", "0"], ["--rate", "1.5"], ["--kind", "c"],
                                   ["--quiet", "1"], ["--names"]], ids=" ".join)
def test_flags_refuse_what_they_do_not_take(words, capsys):
    with pytest.raises(SystemExit) as stop:
        flags(*words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_choose_lists_names_once_and_refuses_unknown_ones():
    assert common.choose("b,a,b", ["a", "b", "c"]) == ["b", "a"]
    assert common.choose("all", {"a": 1, "b": 2}) == ["a", "b"]
    with pytest.raises(UserError, match="--method 'd' is unknown; there are a, b and all"):
        common.choose("a,d", ["a", "b"])


def test_fill_in_leaves_what_was_said():
    args = argparse.Namespace(lr=0, rounds=None, method=None)
    common.fill_in(args, {"lr": 1, "rounds": 5})
    assert (args.lr, args.rounds, args.method) == (0, 5, None)


# ================================================================================================
# Networks side by side
# ================================================================================================


def test_packed_seeds_go_on_alone_as_they_would_have_together():
    """Two seeds trained together, taken apart after 3 steps: seed 7 alone ends where it would."""
    def fresh(seeds):
        p = {"w": torch.stack([torch.full((2,), float(s)) for s in seeds]).double()}
        p["w"].requires_grad_()
        return p, torch.optim.Adam(p.values(), .1, fused=True)

    def steps(p, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            (p["w"] ** 2).sum().backward()
            optimizer.step()

    together, optimizer = fresh((5, 7))
    steps(together, optimizer, 3)
    low = torch.tensor([[1.], [2.]])
    packed = common.pack_seeds((5, 7), [(together, optimizer)], {"low": low, "none": None})
    steps(together, optimizer, 4)
    alone, other = fresh((7,))
    more = common.unpack_seeds(packed, (7,), [(alone, other)], "cpu")
    assert more.keys() == {"low"} and more["low"].tolist() == [[2.]]
    steps(alone, other, 4)
    torch.testing.assert_close(alone["w"][0], together["w"][1], rtol=0, atol=1e-14)


def test_spread_of_seeds():
    assert common.spread([1., 3.]) == "2.0000 ±1.4142" and common.spread([2.], 1) == "2.0"
    assert common.spread([1., None]) == "-"


# -- What was read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [
    torch.ones(3), torch.zeros(4), torch.zeros(3, dtype=torch.float64), np.zeros(3), [0, 0, 0],
    {"a": torch.zeros(3)}, torch.nn.Linear(3, 1, bias=False), "a", "caf\udce9", None, 0, [[]]])
def test_fingerprint_tells_contents_apart(other):
    assert common.fingerprint(other) == common.fingerprint(copy.deepcopy(other))
    assert common.fingerprint(other) != common.fingerprint(torch.zeros(3))
    assert common.fingerprint([other, 1]) != common.fingerprint([1, other])


def test_fingerprint_of_lists_knows_where_one_ends():
    assert common.fingerprint([["a"], "b"]) != common.fingerprint([["a", "b"]])
    assert common.fingerprint(["a", "b"]) != common.fingerprint(["ab"])
    assert common.fingerprint(torch.tensor([1, 2], dtype=torch.bfloat16)) != common.fingerprint(
        torch.tensor([1, 3], dtype=torch.bfloat16))


def test_sources_are_said_and_kept(make_run, capsys):
    run = make_run()
    run.source("texts", "4 rows, 2 classes", ["a", "b"])
    run.warn("nothing to worry about")
    out, err = capsys.readouterr()
    assert out == "" and err == "texts: 4 rows, 2 classes\nnote: nothing to worry about\n"
    run.finish({"x": 1}, script="s")
    assert json.loads((run.out_dir / "result.json").read_text()) == {
        "x": 1, "sources": {"texts": "4 rows, 2 classes"}}


def test_resume_refuses_a_source_that_changed(make_run):
    run = make_run()
    run.source("texts", "2 rows", ["a", "b"])
    run.save({}, "round 1")
    again = make_run(resume=True, out_dir=run.out_dir)
    again.load()
    again.source("texts", "2 rows", ["a", "b"])
    again.source("pictures", "none were read before", [])
    again.save({}, "round 2")
    third = make_run(resume=True, out_dir=run.out_dir)  # a suite reads only what is left of it
    third.load()
    third.finish({}, script="s")
    assert json.loads((run.out_dir / "result.json").read_text())["sources"] == {
        "texts": "2 rows", "pictures": "none were read before"}
    with pytest.raises(UserError, match="texts of this run were others: then 2 rows; now 3 rows"):
        again.source("texts", "3 rows", ["a", "b", "c"])


@pytest.mark.parametrize("then, now, same", [
    ("csv:t.csv", "csv:./t.csv", True), ("folder:pets", "folder:/home/me/pets/", True),
    ("folder:pets", "folder:cats", False), ("csv:pets", "folder:pets", False),
    ("pets", "./pets", True), ("fixed:1,2", "fixed:1,3", False), ("cifar10-lt", "pets", False)])
def test_resume_takes_another_path_to_the_same_name(then, now, same, make_run):
    run = make_run(dataset=then)
    run.save({"x": 1}, "round 1")
    again = make_run(dataset=now, resume=True, out_dir=run.out_dir)
    if same:
        assert again.load() == {"x": 1}
    else:
        with pytest.raises(UserError, match="dataset"):
            again.load()


def test_runs_of_names_with_glob_characters_are_numbered(make_run):
    folders = []
    for _ in range(3):
        run = make_run(title="set[1]*")
        run.begin()
        folders.append(run.out_dir.name)
    assert folders == ["set[1]*-1", "set[1]*-2", "set[1]*-3"]


def test_json_has_no_nan():
    text = common.strict_json({"a": [float("nan"), float("inf"), 1.5], "b": (1, "NaN")})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": [1, "NaN"]} and "Infinity" not in text


def test_results_are_there_before_the_figure_and_survive_it(make_run, capsys):
    run = make_run()

    def draw(path):
        assert json.loads((run.out_dir / "result.json").read_text())["x"] == 1
        raise ValueError("no such\ncolour")
    run.finish({"x": 1}, draw, x=1)
    out, err = capsys.readouterr()
    assert out == "RESULT x=1\n"
    assert err == ("note: figure.png could not be drawn (ValueError: no such colour); all results "
                   "are in result.json\n")


@pytest.mark.parametrize("name, text", [
    ("caf\udce9", "café"), ("café", "café"), ("a\udc81", "a\\x81"), ("\udce7\udc8b\udc97", "ç‹—")])
def test_undecodable_names_become_text(name, text):
    assert common.printable(name) == text


@pytest.mark.parametrize("name", ["$5_&_$10%", "$\\frac_$", "狗 كلب", "caf\udce9", "a\x00b"])
def test_any_name_can_be_drawn(name, tmp_path, recwarn):
    with common.figure(tmp_path / "f.png", name, (3, 2), ncols=2) as (_, (left, right)):
        name = common.printable(name)
        common.ranked_bars(left, {name: 1.0}, {}, name)
        right.plot([1, 2], label=name)
        right.legend()
    assert (tmp_path / "f.png").stat().st_size > 1000 and not recwarn.list


@pytest.mark.parametrize("ends", [
    [50], [100] * 7, [0] * 7, [100, 99, 50, 50, 50, 1, 0], [20, 80], [33, 33, 34]])
def test_labels_stand_at_their_lines_and_apart(ends, tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    with common.figure(tmp_path / "f.png", "ends", (5, 4), ncols=1) as (_, axis):
        for i, end in enumerate(ends):
            axis.plot([1, 2], [50, end], label=f"line {i}")
        axis.plot([1, 2], [3, 3])  # no name, no label
        axis.set_ylim(0, 100)
        common.label_ends(axis)
    assert faults(figures[0]) == []
    places = {t.get_text(): t.xyann[1] for t in axis.texts}
    places = [places[f"line {i}"] for i in range(len(places))]
    assert len(places) == len(ends)
    assert all(p < q for e, p in zip(ends, places, strict=True)
               for f, q in zip(ends, places, strict=True) if e < f)
    assert min(places) > -1e-9 and max(places) <= 1
    if ends == [20, 80]:  # where there is room, exactly there
        assert [t.xyann[1] for t in axis.texts] == pytest.approx([.2, .8])


@pytest.mark.parametrize("values, said", [
    ([.01, .1, 10], {"0.01", "0.1", "1", "10"}), ([3, 7, 30], {"4", "10", "20"}),
    ([2e-7, 1e-3], {"1e-06", "0.0001"})])
def test_log_axes_have_numbers_not_formulas(values, said, tmp_path, monkeypatch):
    figures = keep_figures(monkeypatch)
    with common.figure(tmp_path / "f.png", "log", (6, 4), ncols=2) as (drawing, (left, right)):
        left.plot([1, 2, 3][:len(values)], values)
        left.set_yscale("log")
        image = common.heat_map(right, np.array([values]), "colours", norm="log")
        bar = drawing.colorbar(image, ax=right)
    assert faults(figures[0]) == []
    for axes in (left, bar.ax):
        assert said <= {t.get_text() for t in tick_labels(axes.yaxis)}


def test_bars_hold_their_numbers_and_their_spread(tmp_path, monkeypatch):
    heights = {"a name of more than two dozen letters": 20.0, "b": 1.0}
    figures = keep_figures(monkeypatch)
    with common.figure(tmp_path / "f.png", "bars", (5, 3), ncols=2) as (_, (left, right)):
        common.ranked_bars(left, heights, {"b": "red"}, "accuracy", spread=[15.0, 0.5])
        common.ranked_bars(right, {"b": 100.0}, {}, "accuracy")
    assert faults(figures[0]) == []
    assert [b.get_width() for b in left.patches] == [20, 1]
    assert [t.get_text() for t in left.texts] == ["20.0", "1.0"]
    for text, end in zip(left.texts, (35, 1.5), strict=True):  # behind the lines of the spread
        assert text.get_window_extent().x0 > left.transData.transform((end, 0))[0]
    assert left.get_xlim()[1] > 35
    first, second = (b.get_window_extent() for b in left.patches)
    assert first.y0 > second.y1 and "\n" in left.get_yticklabels()[0].get_text()
    alone = right.patches[0].get_window_extent()
    assert right.bbox.y0 < alone.y0 and alone.height < right.bbox.height / 3


def test_distance_to_front():
    """On a dense straight front that of a point from a line; 0 where it is as good as a point."""
    t = torch.linspace(0, 1, 6001, dtype=torch.float64)
    line = torch.stack([t, 1 - t], 1)
    points = torch.rand(3, 700, 2, generator=torch.Generator().manual_seed(0)).double()
    found = common.distance_to_front(points, line)  # (3, 700); more than one block of rows
    expected = (points.sum(-1) - 1).clamp_min(0) / math.sqrt(2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    corner = common.distance_to_front(torch.tensor([[4., 5, 1], [0, 3, 9]]), torch.ones(1, 3))
    assert corner.tolist() == pytest.approx([5, math.sqrt(68)])


def drawn_fronts(path, which=(0, 1, 2, 3), methods="ab"):
    """The figure of problems of 2, 3, 2 and 5 objectives, which have plane fronts.

    Method a lies .4 behind the plane in seed 0 and .8 in seed 1, b in it; but of the third problem
    no front is known, and b lies .5 before the points that are given for it.
    """
    problems, preferences, references, fronts = [], [], [], {"a": [], "b": []}
    for k, m in enumerate((2, 3, 2, 5)):
        low, wide = torch.full((m,), -7.).double(), 10. ** torch.arange(m).double()
        problems.append(argparse.Namespace(
            name=f"p{k}", n_obj=m, ideal=low, nadir=low + wide, front=None if k == 2 else print,
            estimated=["ideal", "nadir"] if k == 2 else []))
        drawn = torch.rand(30, m, generator=torch.Generator().manual_seed(k)).double()
        plane = drawn / drawn.sum(1, keepdim=True)
        plane = plane[plane[:, 0].argsort()]
        preferences.append(3 * plane)  # of any length
        references.append(low + wide * plane)
        for method, shifts in (("a", (.4, .8)), ("b", (-.5 * (k == 2),) * 2)):
            fronts[method].append(low + wide * torch.stack([plane + s / m ** .5 for s in shifts]))
    hv = {"a": {p.name: [.5, .8] for p in problems}, "b": {p.name: [.6, .6] for p in problems}}
    looks = {"a": ("A, apart", common.BLUE, "x", "--"), "b": ("B", common.ORANGE, "o", "-")}

    def part(values):
        return [values[k] for k in which]
    with common.figure(path, "fronts", common.front_size(len(which))[1]) as (drawing, _):
        common.front_panels(drawing, part(problems), part(preferences), {
            m: part(fronts[m]) for m in methods}, part(references), {m: hv[m] for m in methods},
            looks)
    drawing.canvas.draw()
    return drawing, [p[:, 0] / 3 for p in preferences]


def test_panels_show_distances_to_the_front(tmp_path, recwarn):
    drawing, firsts = drawn_fronts(tmp_path / "f.png")
    pairs = list(zip(drawing.axes[::2], drawing.axes[1::2], strict=True))
    assert len(pairs) == 4 and not recwarn.list
    for k, (left, right) in enumerate(pairs):
        ordered, known = k in (0, 2), k != 2
        assert right.get_xlabel() == ("preference p₁" if ordered else
                                      "share of the points, nearest first")
        assert right.get_ylabel() == f"distance to the {'front' if known else 'best found'}"
        for axes in (left, right) if k == 3 else (right,):  # 5 objectives: to the front and from it
            a, b = ({line.get_label(): line for line in axes.lines}[m] for m in "ab")
            assert axes.get_yscale() == "log"
            assert a.get_xdata() == pytest.approx(firsts[k] if ordered else np.linspace(0, 1, 30))
            # Σ (f - r) / √m is the same for all points r of the plane, and d+ is no less
            far = .6 if known else 1.1
            assert a.get_ydata() == pytest.approx(far)  # median of two seeds
            band = axes.collections[0].get_paths()[0].vertices[:, 1]
            assert (band.min(), band.max()) == pytest.approx((far - .1, far + .1))
            assert b.get_ydata() == pytest.approx(2 * axes.get_ylim()[0])  # nearer than can be told
            ticks = [t.get_text() for t in axes.get_yticklabels()]
            assert "1" in ticks and not any("$" in t for t in ticks)
        if k != 3:  # the fronts of the first seed, behind them the reference
            assert len(left.lines) == 3 and left.lines[0].get_label() == "front"
    x, y = pairs[0][0].lines[1].get_data()
    assert x == pytest.approx(firsts[0] + .4 / 2 ** .5) and x + y == pytest.approx(1 + .4 * 2 ** .5)
    assert pairs[2][1].get_title() == ("p2: HV A\xa00.6500\xa0±0.2121, B\xa00.6000\xa0±0.0000, "
                                       "ideal\xa0estimated,\nnadir\xa0estimated")
    assert [t.get_text() for t in drawing.legends[0].get_texts()] == [
        "A, apart: HV 0.6500 ±0.2121; B -0.0500 ±0.2121 in the same seeds",
        "B: HV 0.6000 ±0.0000", "reference front or best points found",
        "closer than its single points can tell"]
    assert drawing.legends[0].get_title().get_text() == (
        "HV: hypervolume, larger is better, mean of the problems; distances: median and middle "
        "half of 2 seeds; fronts: the first seed")


@pytest.mark.parametrize("which, methods", [
    ((0,), "a"), ((1,), "ab"), ((3,), "b"), ((2, 3), "ab"), ((0, 1, 2, 3) * 3, "ab")])
def test_panels_legend_and_titles_do_not_cover_each_other(which, methods, tmp_path):
    drawing, _ = drawn_fronts(tmp_path / "f.png", which, methods)
    boxes = [axes.get_window_extent() for axes in drawing.axes]
    boxes += [axes.title.get_window_extent() for axes in drawing.axes if axes.get_title()]
    boxes += [drawing.legends[0].get_window_extent(), drawing._suptitle.get_window_extent()]
    assert len(boxes) == 3 * len(which) + 2
    for one, other in itertools.combinations(boxes, 2):
        assert not one.padded(-1).overlaps(other.padded(-1))
    assert all(drawing.bbox.count_contains(box.corners()) == 4 for box in boxes)
    assert all(axes.lines for axes in drawing.axes)


@pytest.mark.parametrize("name", ["config.json", "figure.png", "toy.py"])
@pytest.mark.parametrize("how", [{}, {"overwrite": True}])
def test_files_that_no_run_wrote_are_not_written_over(name, how, make_run):
    Path("model").mkdir()
    Path("model", name).write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=f"model holds {name}, which no run wrote"):
        make_run(out_dir=Path("model"), **how)
    with pytest.raises(UserError, match="holds no run"):
        make_run(out_dir=Path("model"), resume=True)
    assert Path("model", name).read_text() == '{"model_type": "vit"}'


def test_resume_and_overwrite_contradict_each_other(make_run):
    run = make_run()
    run.begin()
    with pytest.raises(UserError, match="give one"):
        make_run(out_dir=run.out_dir, resume=True, overwrite=True)


def test_paths_are_what_a_user_means(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert common.user_path("~/out") == Path("/home/me/out")
    parser = common.Parser("x")
    common.add_run_arguments(parser)
    assert parser.parse_args(["--out-dir=~/o"]).out_dir == Path("/home/me/o")
    with pytest.raises(UserError, match="a path is empty"):
        parser.parse_args(["--out-dir", ""])
