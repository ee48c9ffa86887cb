"""What the tests of all scripts share: running a command, waiting, cutting out its method."""
import ast
import builtins
import contextlib
import dis
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import types
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

import common

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds: only a run that hangs takes that long, beside however many others


def start(script, words, cwd=None, launcher=(sys.executable,)):
    """`python script words...` as a process of its own, with one thread."""
    def hear_ctrl_c():  # a shell starts its background jobs deaf to it, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, words)], cwd=cwd or ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment, preexec_fn=hear_ctrl_c)


def torchrun(processes=2):
    """The launcher that spreads a run over processes, on a port that the system picks."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(processes)]


def in_float64(folder, script, change):
    """A file that runs `script` after `change`, lines of Python that make it compute in float64.

    For comparisons of runs whose additions come in another order, or in batches of another size:
    rounding is then too small for training to make anything of it.
    """
    path = Path(folder) / f"{script}.py"
    path.write_text("\n".join([
        "import functools, importlib, sys", f"sys.path.insert(0, {str(ROOT)!r})",
        "import torch", "import common, data",
        f"spec = importlib.util.spec_from_file_location('paper', {str(ROOT / script)!r} + '.py')",
        "script = importlib.util.module_from_spec(spec)", "spec.loader.exec_module(script)",
        textwrap.dedent(change).strip(), "common.run_cli(script.main)", ""]))
    return path


def run_in_one_and_two_processes(script, words, folder):
    """-> the two --out-dir, which end with one RESULT line each."""
    out = []
    for name, launcher in (("one", (sys.executable,)), ("two", torchrun())):
        out.append(Path(folder) / name)
        text, _ = finish(start(script, [*words, "--out-dir", out[-1]], launcher=launcher))
        assert text.count("RESULT") == 1
    return out


def finish(process, code=0):
    """Wait for it -> (stdout, stderr); it must end with `code` and never show a traceback."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def exit_code(main, words):
    """main(words) inside this process, as the command would run it -> its exit code."""
    with pytest.raises(SystemExit) as stop:
        common.run_cli(lambda: main([str(w) for w in words]))
    return stop.value.code


def says_idle(parser, settle, idle_flags, words, said):
    """Do the notes on flags without effect begin with `said`, one each, for a command's words?"""
    args, found = parser.parse_args(words), []
    given = common.given(parser, args)
    reasons = idle_flags(settle(args))
    assert all(names <= set(vars(args)) for _, names, _ in reasons)
    common.tell_idle(types.SimpleNamespace(warn=found.append), given, *reasons)
    return len(found) == len(said) and all(
        a.startswith(f"without effect: {b}") for a, b in zip(found, said, strict=True))


def complaints(err):
    """The lines of stderr that do not say what was read ("pictures: ..", "texts: ..", ...)."""
    return [line for line in err.splitlines()
            if line and not re.match(
                r"(pictures|model|texts|encoder|problems?)\b[^:]*: ", line)]


def result(folder):
    """The content of a finished run's result.json."""
    return json.loads((Path(folder) / "result.json").read_text())


def wait_for_rows(folder, n, process):
    """Until log.jsonl holds n rows (or the run has ended)."""
    end = time.time() + PATIENCE
    while time.time() < end and process.poll() is None:
        if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= n:
            return
        time.sleep(.01)


def kill(script, words, folder, rows, tries=5):
    """Start a run, or go on with it, and kill it as soon as its log holds so many rows.

    Where this process was held up for so long that the run ended first, it is tried again from
    where it stood.
    """
    kept = Path(tempfile.mkdtemp()) / "kept"
    if folder.exists():
        shutil.copytree(folder, kept)
    for _ in range(tries):
        process = start(script, [*words, "--resume"] if folder.exists() else words)
        wait_for_rows(folder, rows, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != 0:
            break
        shutil.rmtree(folder)
        if kept.exists():
            shutil.copytree(kept, folder)
    shutil.rmtree(kept.parent)
    assert process.returncode == -signal.SIGKILL and not (folder / "result.json").exists()


def result_line(out):
    """The last line of a finished run's output, RESULT key=value ... -> dict of texts."""
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(r"RESULT( [\w-]+=\S+)+", last), last
    return dict(pair.split("=", 1) for pair in last.split()[1:])


def log_rows(folder):
    """The rows of log.jsonl, without the clock."""
    rows = [json.loads(row) for row in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def flat(value, path=""):
    """Nested dicts and lists of tensors -> {path: tensor}."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: t for key, inner in items for name, t in flat(inner, f"{path}/{key}").items()}


def trained(folder):
    """All trained tensors in a finished run's checkpoint: path -> tensor."""
    checkpoint = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    return flat(checkpoint["state"]["trained"])


def assert_same_run(first, second):
    """The same result.json, the same log and, bit for bit, the same trained tensors."""
    assert result(first) == result(second)
    assert log_rows(first) == log_rows(second)
    a, b = trained(first), trained(second)
    assert a.keys() == b.keys() and len(a) > 0
    assert all(torch.equal(a[k], b[k]) for k in a)


class PowerCut(Exception):
    """What cut_power raises."""


def cut_power(monkeypatch, rows):
    """From now on a run dies right after its `rows`-th row of the log, with nothing saved of it."""
    log, left = common.Run.log, [rows]

    def dying(self, **row):
        log(self, **row)
        left[0] -= 1
        if left[0] == 0:
            raise PowerCut

    monkeypatch.setattr(common.Run, "log", dying)


def pretend_processes(monkeypatch, world):
    """Runs in this process believe that they are rank 0 of `world` processes."""
    def join(self):
        self.rank, self.world, self.group = 0, world, None

    monkeypatch.setattr(common.Run, "_join_processes", join)
    monkeypatch.setattr(common.dist, "broadcast_object_list", lambda *_, **__: None)


class QuietRun:
    """Stands in for common.Run where a test calls a script's train() itself."""

    def progress(self, items, what, **options):
        return items

    def gather(self, part):
        return part

    def log(self, **row):
        pass


OWN_PROBLEM = """
import torch

class Bend:
    lower, upper, n_obj = [0.0, -1.0, 0.0], [2.0, 1.0, 4.0], 2
    ideal, nadir = [0.0, 0.0], [1.0, 1.0]

    def __call__(self, x):
        away = (x[:, 1:] - 0.5).square().sum(-1)
        return torch.stack([x[:, 0] / 2 + away, (1 - x[:, 0] / 2) ** 2 + away], -1)

    def front(self, count):
        t = torch.linspace(0, 1, count, dtype=torch.float64)
        return torch.stack([t, (1 - t) ** 2], -1)
"""


OWN_KINDS = OWN_PROBLEM.replace("    ideal, nadir = [0.0, 0.0], [1.0, 1.0]\n", """
    add, times = torch.zeros(2), torch.ones(2)
""").split("    def front")[0].replace("class Bend:", "class Open:").replace(
    "        return torch.stack(", """        with open(__file__ + ".calls", "a") as calls:
            calls.write(f"{len(x)}\\n")
        return self.add + self.times * torch.stack(""") + """
class Far(Open):
    add, times = torch.tensor([2e7, -3]).double(), torch.tensor([1e9, 1e-9]).double()

class Below(Open):
    add = torch.tensor([-2, -2])

class Known(Open):
    ideal, nadir = [0, 0], [1, 1]

class Agree(Open):
    def __call__(self, x):
        f = super().__call__(x)
        return torch.stack([f[:, 0], 2 * f[:, 0] + 1], -1)

def ball(m):  # DTLZ2's
    def f(x):
        angle, rest = x[:, :m - 1] * torch.pi / 2, 1 + (x[:, m - 1:] - .5).square().sum(1, True)
        one = torch.ones_like(rest)
        return rest * torch.cat([one, angle.cos().cumprod(1)], 1).flip(1) * torch.cat(
            [one, angle.sin().flip(1)], 1)
    f.lower, f.upper, f.n_obj = [0] * (m + 1), [1] * (m + 1), m
    return f

for m in range(2, 11):
    globals()[f"ball{m}"] = ball(m)
"""


def drawn_fronts(monkeypatch, main, words):
    """What a run hands to common.front_panels; the hypervolumes of these fronts as method ->
    {problem: one a seed}."""
    kept, draw = [], common.front_panels

    def keep(parent, *given):
        kept.append(given)
        draw(parent, *given)
    monkeypatch.setattr(common, "front_panels", keep)
    main(words)
    (problems, _, fronts, *_), = kept
    return kept[0], {m: {p.name: [common.hypervolume(
        (one.cpu().double() - p.ideal) / (p.nadir - p.ideal), [1.1] * p.n_obj) for one in f]
        for p, f in zip(problems, found, strict=True)} for m, found in fronts.items()}


def write_kinds(path):
    """A user's file: Open is Bend without ideal and nadir, Known has them, Far and Below lie
    elsewhere, Agree has no conflict; ball2 ... ball10. How often Open was called: `calls`."""
    Path(path).write_text(OWN_KINDS)
    return str(path)


def calls(path):
    """Evaluations of a file of write_kinds so far."""
    return sum(map(int, Path(f"{path}.calls").read_text().split()))


def write_problem(path):
    """A user's file with a problem of two objectives and three variables -> its name for a run."""
    Path(path).write_text(OWN_PROBLEM)
    return f"{path}:Bend"


def method_section(path):
    """The source between the banner "# Model" (or "# Method") and "# Train and evaluate"."""
    lines = Path(path).read_text().splitlines(keepends=True)
    banners = [i for i, line in enumerate(lines) if line.startswith("# ====")]
    titles = {lines[i + 1][2:].strip(): i for i in banners[::2]}
    first = next(i for title, i in titles.items() if title.startswith(("Model", "Method")))
    last = next(i for title, i in titles.items() if title.startswith("Train and evaluate"))
    assert first < last
    return "".join(lines[first:last])


def foreign_names(source, allowed):
    """Global names that a section reads though it neither defines them nor may rely on them."""
    def read_by(code):
        names = {i.argval for i in dis.get_instructions(code)
                 if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        return names.union(*(read_by(c) for c in code.co_consts if isinstance(c, types.CodeType)))

    defined = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {n.id for target in node.targets for n in ast.walk(target)
                        if isinstance(n, ast.Name)}
    defined |= {"__name__", "__module__", "__qualname__"}  # every class body reads or sets these
    read = read_by(compile(source, "section", "exec"))
    return read - defined - set(dir(builtins)) - allowed


def keep_figures(monkeypatch):
    """A list that every figure of common.figure joins as it is saved."""
    kept, figure = [], common.figure

    @contextlib.contextmanager
    def keeping(*words, **options):
        with figure(*words, **options) as (drawing, axes):
            yield drawing, axes
        kept.append(drawing)
    monkeypatch.setattr(common, "figure", keeping)
    return kept


def tick_labels(axis):
    """The texts at an axis that can be seen."""
    low, high = sorted(axis.get_view_interval())
    ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
    return [t for tick in ticks if low - 1e-9 <= tick.get_loc() <= high + 1e-9
            for t in (tick.label1, tick.label2) if t.get_visible() and t.get_text()]


def faults(drawing):
    """What a stranger would stumble over in a figure: a list, empty if there is nothing."""
    drawing.draw_without_rendering()
    words, found = [drawing._suptitle], []
    for axes in drawing.axes:
        ticks = [tick_labels(axes.xaxis), tick_labels(axes.yaxis)]
        words += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *ticks[0], *ticks[1]]
        found += [t.get_text() for t in (*ticks[0], *ticks[1]) if "$" in t.get_text()]
        if axes.get_xlabel().split(" (")[0] in ("edge round", "epoch"):
            found += [t.get_text() for t in ticks[0] if not float(t.get_text()).is_integer()]
        if not (axes.lines or axes.patches or axes.images or axes.collections):
            found.append(f"empty: {axes.get_title()}")
        if axes.get_legend():
            box = axes.get_legend().get_window_extent()
            found += [f"legend on: {line.get_label()}" for line in axes.lines
                      if line.get_path().transformed(line.get_transform())
                      .intersects_bbox(box, filled=False)]
    # of an annotation the text alone, without its line
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in words if t.get_text()]
    found += [f"outside: {text}" for text, box in boxes
              if not drawing.bbox.x0 <= box.x0 <= box.x1 <= drawing.bbox.x1]
    return found + [f"{a} on {b}" for i, (a, one) in enumerate(boxes) for b, other in boxes[:i]
                    if min(one.x1, other.x1) - max(one.x0, other.x0) > 1
                    and min(one.y1, other.y1) - max(one.y0, other.y0) > 1]
