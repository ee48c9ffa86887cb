"""What the tests of all scripts share: running a command, waiting for it, pasting its method."""
import ast
import builtins
import dis
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent


def start(script, words, cwd=None, launcher=(sys.executable,)):
    """`python script words...` as a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, words)], cwd=cwd or ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment)


def torchrun(processes=2, offset=0):
    """The launcher that spreads a run over processes; `offset` keeps ports of one test apart."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-port", str(29500 + (os.getpid() + 37 * offset) % 400)]


def finish(process, code=0):
    """Wait for it -> (stdout, stderr); it must end with `code` and never show a traceback."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def exit_code(main, words):
    """main(words) inside this process, as the command would run it -> its exit code."""
    with pytest.raises(SystemExit) as stop:
        common.run_cli(lambda: main([str(w) for w in words]))
    return stop.value.code


def result(folder):
    """The content of a finished run's result.json."""
    return json.loads((Path(folder) / "result.json").read_text())


def wait_for_rows(folder, n, process):
    """Until log.jsonl holds n rows (or the run has ended)."""
    end = time.time() + 120
    while time.time() < end and process.poll() is None:
        if (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text().count("\n") >= n:
            return
        time.sleep(.01)


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


def paste(script, **allowed):
    """Execute the method section of a script with nothing but `allowed` -> its names.

    Fails if the section reads any other global name or imports anything.
    """
    source = method_section(ROOT / script)
    assert foreign_names(source, set(allowed)) == set()
    nodes = ast.walk(ast.parse(source))
    assert not [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    pasted = dict(allowed)
    exec(compile(source, "pasted", "exec"), pasted)
    return pasted
