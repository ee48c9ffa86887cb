"""What every run needs, and metrics. No method lives here: the five scripts only call it.

Run contract
    seeds       one `--seed`, one independent generator per purpose (`numpy_generator`,
                `torch_generator`, `seed_torch`). A generator is a pure function of (seed, purpose,
                round, client, ...): nothing has to be stored to resume, and work may move between
                processes.
    files       `Run` owns `--out-dir`: config.json, log.jsonl, checkpoint.pt, result.json, a figure
                and a copy of the script. Every file is written under a temporary name and renamed.
    resume      `Run.save` after each round, `Run.load` at the start: a run killed at any moment and
                resumed ends with the numbers of the uninterrupted one, bit for bit (CPU).
    processes   under torchrun, `Run.share` splits a list over the ranks and `Run.gather` merges the
                results in every rank. Only rank 0 writes and prints.
    sources     `Run.source` says on stderr what was read and what was left out; `--resume` refuses
                to go on when it has changed.
    errors      `UserError` becomes one line on stderr and exit code 2 (NaN: 3, Ctrl-C: 130).

Contents, each section to be read alone
    Errors · Command lines · Seeds · Files · One run · Networks side by side · Metrics · Figures

Typical use, at the bottom of a script:

    parser = common.Parser(__doc__)
    common.add_run_arguments(parser)
    add = parser.group("method")
    add("--rounds", int, 100, "rounds (paper 100)", low=1)
    ...
    if __name__ == "__main__":
        common.run_cli(main)
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Errors: one clear line instead of a traceback
# ------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend. `run_cli` prints it as one line and exits with `code`."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(str(message).split()))
        self.code = code


def run_cli(main, continues=False):
    """Call `main()`; turn what a user can cause into one line on stderr and an exit code.

    continues: the same command goes on where it was stopped; a Ctrl-C or a kill says so.
    """
    def stop(*_):
        raise UserError("stopped; what has finished is kept, and the same command goes on from "
                        "there", code=130)

    code = 0
    for caught in (signal.SIGINT, signal.SIGTERM) if continues else ():
        signal.signal(caught, stop)
    for stream in (sys.stdout, sys.stderr):  # a name that this terminal cannot show ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        code = error.code
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # outside a Run: nothing of ours was at risk
        code = 130
        print("interrupted before the run began; nothing to resume", file=sys.stderr)
    except torch.cuda.OutOfMemoryError:
        code = 2
        print("error: the GPU is out of memory; use a smaller model or batch, or --device cpu",
              file=sys.stderr)
    except OSError as error:  # disk full, no permission, a folder where a file should be
        code = 2
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def check_finite(value, what):
    """`value` (a number or tensor of any shape); UserError with code 3 if it is not finite."""
    if not torch.isfinite(torch.as_tensor(value)).all():
        raise UserError(f"{what} is not finite (NaN or infinity); try a smaller learning rate. "
                        "The last checkpoint is intact", code=3)
    return value


# ------------------------------------------------------------------------------------------------
# Command lines: what all scripts do alike with their flags
# ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that shows the whole header as its help and complains in one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def group(self, title):
        """A function that adds one flag to the group `title`: add(name, kind, default, text).

        kind: int or float, with bounds low=, high= or above= (exclusive); a list of choices; bool,
        which makes --x (default False) or the pair --x, --no-x (default None or True); or any other
        argparse type. The default is appended to the text if that does not name it.
        """
        group = self.add_argument_group(title)

        def add(name, kind, default, text, **more):
            if kind is bool:
                more["action"] = ("store_true" if default is False
                                  else argparse.BooleanOptionalAction)
            elif isinstance(kind, list):
                more["choices"] = kind
            else:
                bounds = {k: more.pop(k) for k in ("low", "high", "above") if k in more}
                more["type"] = number(kind, **bounds) if kind in (int, float) else kind
            if default is not None and default is not False and "default" not in text:
                text += " (default %(default)s)"
            group.add_argument(name, default=default, help=text, **more)
        return add

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} -h)\n")


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite int or float with low <= value <= high and value > above."""
    wanted = [f"{kind.__name__}"] + [f"{sign} {bound}" for sign, bound in
                                     ((">=", low), ("<=", high), (">", above)) if bound is not None]

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not abs(value) < float("inf") or (low is not None and value < low) \
                or (high is not None and value > high) or (above is not None and value <= above):
            raise argparse.ArgumentTypeError(f"expected {' '.join(wanted)}, got {text!r}")
        return value
    return parse


def choose(text, known, flag="--method"):
    """The names of a comma-separated flag, each once; "all" is all of `known`. -> list.

    UserError: a name that is not in `known` (the message lists what is).
    """
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"{flag} {name!r} is unknown; there are {', '.join(known)} and all")
    return list(dict.fromkeys(names))


def fill_in(args, preset):
    """Give the flags that nobody set (None) the values of a preset, dict name -> value."""
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def given(parser, args):
    """The names of the flags that a command sets to something else than their defaults."""
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}


def tell_idle(run, given, *reasons):
    """A note on each of the flags that a user has set and that change nothing in this run.

    given: as `given` returns them; reasons: (whether it holds, names of flags, why, in words).
    """
    for idle, flags, why in reasons:
        if idle and flags & given:
            names = ", ".join(f"--{f.replace('_', '-')}" for f in sorted(flags & given))
            run.warn(f"without effect: {names}; {why}")
            given = given - flags


# ------------------------------------------------------------------------------------------------
# Seeds
# ------------------------------------------------------------------------------------------------


def seed_for(seed, *purpose):
    """A 63-bit seed that depends on `seed` and every word of `purpose`, e.g. ("partition",)."""
    words = [w.item() if isinstance(w, np.generic) else w for w in purpose]
    digest = hashlib.blake2b(repr((int(seed), *words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed, *purpose):
    """An independent np.random.Generator for one purpose."""
    return np.random.default_rng(seed_for(seed, *purpose))


def torch_generator(seed, *purpose, device="cpu"):
    """An independent torch.Generator for one purpose."""
    return torch.Generator(device).manual_seed(seed_for(seed, *purpose))


def seed_torch(seed, *purpose):
    """Seed torch's global generators (dropout uses them) for one purpose."""
    torch.manual_seed(seed_for(seed, *purpose))


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def user_path(text):
    """A path as a user writes it: ~ is the home folder. UserError: an empty one."""
    if not str(text).strip():
        raise UserError("a path is empty; was a variable not set?")
    return Path(os.path.expanduser(text))


def printable(name):
    """A file name as text: bytes of it that are no UTF-8 are read as Windows' Latin-1."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return os.fsencode(name).decode("cp1252", "backslashreplace")


@contextlib.contextmanager
def hold_interrupts():
    """Let a Ctrl-C that arrives inside the block wait for its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending = []
    before = signal.signal(signal.SIGINT, lambda *caught: pending.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pending and before != signal.SIG_IGN:
            (before if callable(before) else signal.default_int_handler)(*pending[0])


def atomic_write(path, write):
    """Call write(temporary_path), then rename it to `path`: readers see a whole file or none.

    The temporary name keeps the suffix of `path`, so that savers which look at it (matplotlib)
    work.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with hold_interrupts():
        try:
            write(temporary)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def strict_json(value, **options):
    """`value` as JSON that every reader takes: NaN and infinity, which JSON lacks, become null."""
    def known(v):
        if isinstance(v, dict):
            return {k: known(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [known(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    return json.dumps(known(value), allow_nan=False, **options)


def write_json(path, value):
    """`value` as readable, strict JSON, atomically."""
    atomic_write(path, lambda p: p.write_text(strict_json(value, indent=2) + "\n"))


def load_tensors(path, expected):
    """torch.load of a file that torch.save wrote (no code is run); UserError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected {expected}") from None
    except Exception as error:  # torch raises many types here: a zip, pickle, runtime or key error
        kind = "truncated or damaged" if zipfile.is_zipfile(path) is False else "not readable"
        raise UserError(f"{path} is {kind} ({type(error).__name__}); expected {expected}") from None


def cached(path, make, what):
    """The tensors in `path`; without such a file, what make() returns, which is saved there."""
    path = Path(path)
    if path.exists():
        return load_tensors(path, f"{what}; delete it to make it again")
    value = make()
    atomic_write(path, lambda p: torch.save(value, p))
    return value


def cache_key(*parts):
    """A short hash of everything that made a cached file (settings, source text, other keys)."""
    return hashlib.sha256(repr(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def fingerprint(content):
    """A short hash of tensors, arrays, modules, text, numbers, and lists or dicts of these."""
    digest = hashlib.blake2b(digest_size=12)

    def add(value):
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray) and value.dtype != object:
            digest.update(repr((value.dtype.str, value.shape)).encode())
            digest.update(np.ascontiguousarray(value).view(np.uint8))
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, (list, tuple, np.ndarray)):
            digest.update(f"[{len(value)}]".encode())
            for v in value:
                add(v)
        else:
            digest.update(repr(value).encode(errors="surrogateescape") + b";")
    add(content)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------

# Settings that may differ between a run and its continuation: they do not change the numbers.
VOLATILE = {"resume", "overwrite", "out_dir", "data_dir", "device", "threads", "workers"}


def add_run_arguments(parser):
    """The flags that all five scripts share."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=number(int, low=0), default=0,
                       help="fixes data partition, client sampling, initial draws and training "
                            "noise, each with a generator of its own (default %(default)s)")
    group.add_argument("--device", default="auto",
                       help="auto, cpu, cuda, cuda:N or mps (default: a GPU if there is one)")
    group.add_argument("--threads", type=number(int, low=1), default=None,
                       help="CPU threads for torch (default: 1 for the small offline models, "
                            "which are slower with more; torch's own choice otherwise)")
    group.add_argument("--out-dir", type=user_path, default=None,
                       help="where results go (default: the next free runs/<script>-<dataset>-N)")
    group.add_argument("--data-dir", type=user_path, default=Path("data"),
                       help="data sets, weights and caches (default ./%(default)s)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --out-dir (without it: the newest one)")
    group.add_argument("--overwrite", action="store_true",
                       help="replace the results in --out-dir")
    return group


class Run:
    """One run of a script: its folder, log, checkpoint, processes and device.

    with Run(args, title) as run:          # title names the default folder: runs/<title>-N
        state = run.load() or fresh_state
        run.source("texts", "600 rows, 3 classes", texts.train)   # what was read, for people
        for round in run.progress(range(...)):
            ...
            run.log(round=..., loss=...)   # a row of log.jsonl and a line on the console
            run.save(state)                # tensors, numbers, strings, lists and dicts only
        run.finish(result, draw)           # result.json, the figure and the RESULT line

    resume_may_change: settings (names) that a continuation may change, e.g. {"rounds"}.
    """

    def __init__(self, args, title, resume_may_change=()):
        self.args, self.title = args, title
        self.settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        self.may_change = VOLATILE | set(resume_may_change)
        self.rows, self.saved_at, self.started = [], None, time.time()
        self.columns = None
        self.sources = {}  # what was read: its name -> (the line about it, its fingerprint)
        self.saved_sources = {}  # the same, of the run that is continued
        torch.set_flush_denormal(True)  # tiny models on a CPU drift into denormals, 10 times slower
        if args.threads:
            torch.set_num_threads(args.threads)
        self._join_processes()
        self.device = self._pick_device(args.device)
        self.out_dir = self._pick_folder()

    # -- processes ------------------------------------------------------------------------------

    def _join_processes(self):
        self.rank, self.world, self.group = 0, int(os.environ.get("WORLD_SIZE", 1)), None
        if self.world > 1:
            forever = datetime.timedelta(days=7)  # a rank may wait for a download or a pre-training
            dist.init_process_group(timeout=forever)
            self.rank = dist.get_rank()
            self.group = dist.new_group(backend="gloo", timeout=forever)  # for Python objects

    def share(self, items):
        """This process's part of a list."""
        return list(items)[self.rank::self.world]

    def share_seeds(self, first, count):
        """This process's part of `count` seeds from `first` on; UserError if there are too few."""
        if self.world > count:
            raise UserError(f"{self.world} processes, but only --seeds {count} to share")
        return self.share(range(first, first + count))

    def gather(self, part):
        """The union of all processes' dicts, the same in all of them. Tensors come on the CPU."""
        if self.world == 1:
            return part
        parts = [None] * self.world
        dist.all_gather_object(parts, to_device(part, "cpu"), group=self.group)
        return {key: value for p in parts for key, value in p.items()}

    @contextlib.contextmanager
    def rank_zero_first(self):
        """Rank 0 runs the block (and fills a cache), then the others do (and find it)."""
        if self.world > 1 and self.rank > 0:
            dist.barrier(group=self.group)
        yield
        if self.world > 1 and self.rank == 0:
            dist.barrier(group=self.group)

    def _pick_device(self, name):
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(
                f"--device {name} is not a device; use auto, cpu, cuda, cuda:N or mps") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise UserError("--device cuda, but torch sees no CUDA GPU here; use --device cpu")
            index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
            if index >= torch.cuda.device_count():
                raise UserError(f"there is no GPU {index}; torch sees {torch.cuda.device_count()}")
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        elif device.type == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps, but torch has no Metal support here; use --device cpu")
        elif device.type not in ("cpu", "mps"):
            raise UserError(f"--device {name} is not supported; use auto, cpu, cuda, cuda:N or mps")
        return device

    # -- the folder -----------------------------------------------------------------------------

    def _pick_folder(self):
        choice = [None]
        if self.rank == 0:
            choice[0] = self._prepare_folder()
        if self.world > 1:
            dist.broadcast_object_list(choice, src=0, group=self.group)
        return choice[0]

    def _prepare_folder(self):
        args = self.args
        folder = args.out_dir
        if args.resume and args.overwrite:
            raise UserError("--resume goes on with a run and --overwrite replaces it; give one")
        if folder is None:
            runs = Path("runs").iterdir() if Path("runs").is_dir() else []
            taken = {int(p.name.rpartition("-")[2]): p for p in runs
                     if re.fullmatch(re.escape(self.title) + r"-\d+", p.name)}
            if args.resume and not taken:
                raise UserError(f"--resume: there is no run in runs/{self.title}-N yet; "
                                "name one with --out-dir")
            newest = max(taken, default=0)
            folder = taken[newest] if args.resume else Path("runs") / f"{self.title}-{newest + 1}"
        if args.resume:
            if not (folder / "checkpoint.pt").exists() and not _is_run(folder):
                raise UserError(f"--resume: {folder} holds no run of this script")
            return folder
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out-dir {folder} is a file; name a folder")
        ours = ["checkpoint.pt", "result.json", "log.jsonl"]
        written = ["config.json", "figure.png", Path(sys.argv[0]).name]
        strange = [name for name in written if (folder / name).is_file()]
        if strange and not _is_run(folder):  # a model's config.json, say
            raise UserError(f"{folder} holds {' and '.join(strange)}, which no run wrote and this "
                            "one would write over; choose another --out-dir")
        if any((folder / name).exists() for name in ours):
            if not args.overwrite:
                raise UserError(f"{folder} holds results already; add --resume to continue, "
                                "--overwrite to replace them, or choose another --out-dir")
            for name in ours:
                (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None and self.world > 1:
            dist.barrier(group=self.group)
            dist.destroy_process_group()
        if kind is KeyboardInterrupt:
            if self.rank == 0:
                words = [w for w in sys.argv if w not in ("--resume", "--overwrite")]
                if "--out-dir" not in " ".join(words):
                    words += ["--out-dir", str(self.out_dir)]
                command = shlex.join(["python", *words, "--resume"])
                print(f"\ninterrupted; saved: {self.saved_at or 'nothing new'}. "
                      f"Continue with: {command}", file=sys.stderr)
            sys.exit(130)
        return False

    # -- checkpoint -----------------------------------------------------------------------------

    def begin(self):
        """Write config.json and a copy of the script; show the settings."""
        if self.rank:
            return
        script = Path(sys.argv[0])
        if not self.args.resume:
            self._write_config()
        if script.suffix == ".py" and script.exists():
            atomic_write(self.out_dir / script.name, functools.partial(shutil.copyfile, script))
        self.say(" ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None))
        self.say(f"results in {self.out_dir}")

    def _write_config(self):
        versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                    "numpy": np.__version__}
        write_json(self.out_dir / "config.json",
                   {"command": shlex.join(sys.argv), "settings": self.settings,
                    "versions": versions, "device": str(self.device), "processes": self.world})

    def save(self, state, at):
        """Checkpoint `state`; `at` says in words what is safe now ("round 3")."""
        if self.rank == 0:
            content = {"script": self.title, "settings": self._fixed(), "rows": self.rows,
                       "sources": {**self.saved_sources, **self.sources},
                       "state": to_device(state, "cpu")}
            atomic_write(self.out_dir / "checkpoint.pt", lambda p: torch.save(content, p))
        self.saved_at = at

    def load(self):
        """The state that `save` wrote; None if this run does not resume or had saved nothing."""
        path = self.out_dir / "checkpoint.pt"
        if not self.args.resume:
            return None
        if not path.exists():  # killed before the first save: start afresh, rows and settings too
            if self.rank == 0:
                (self.out_dir / "log.jsonl").unlink(missing_ok=True)
                self._write_config()
            return None
        content = load_tensors(path, "a checkpoint of this script")
        ours = isinstance(content, dict) and content.get("script") == self.title
        if not ours or "state" not in content:
            raise UserError(f"{path} is not a checkpoint of {self.title}; choose another --out-dir")
        saved, now = content["settings"], self._fixed()
        for key in sorted(set(saved) | set(now)):
            if saved.get(key) != now.get(key):
                raise UserError(
                    f"--resume: {path} was made with {key}={saved.get(key)}, this command "
                    f"says {key}={now.get(key)}; use the same settings or another --out-dir")
        self.rows, self.saved_sources = content["rows"], content.get("sources", {})
        if self.rank == 0:  # rows of a round that was logged but not saved are dropped
            lines = "".join(strict_json(row) + "\n" for row in self.rows)
            atomic_write(self.out_dir / "log.jsonl", lambda p: p.write_text(lines))
            self._write_config()  # settings that may change
        return content["state"]

    def _fixed(self):
        """The settings that a continuation must share, paths by their last part alone: what lies
        there is compared by `source`, and ./t.csv is t.csv."""
        def last(value):
            if isinstance(value, (list, tuple)):
                return [last(v) for v in value]
            if not isinstance(value, str):
                return value
            return re.sub(r"^((?:folder|csv):)?.*/", r"\1", value.rstrip("/"))
        return {k: last(v) for k, v in self.settings.items() if k not in self.may_change}

    def source(self, name, said, content=()):
        """Say on stderr what one source of input held: "texts: 600 rows, 3 classes".

        The line goes into result.json too. content: all that was read of it, as `fingerprint` takes
        it; UserError where a continued run had read something else. Call it after `load`, in every
        process.
        """
        known = fingerprint(content)
        before = self.saved_sources.get(name)
        if before is not None and before[1] != known:
            raise UserError(f"--resume: the {name} of this run were others: then {before[0]}; now "
                            f"{said}. Use another --out-dir for what is there now")
        self.sources[name] = [said, known]
        if self.rank == 0:
            tqdm.write(f"{name}: {said}", file=sys.stderr)

    def warn(self, text):
        """One line on stderr about something that still leaves the result what was asked for."""
        if self.rank == 0:
            tqdm.write(f"note: {text}", file=sys.stderr)

    # -- console --------------------------------------------------------------------------------

    def say(self, text):
        """A line for a person, on a terminal only: a file gets just the tables and RESULT."""
        if self.rank == 0 and sys.stdout.isatty():
            tqdm.write(text)

    def log(self, **row):
        """A row of log.jsonl and an aligned console line (a header whenever columns change)."""
        row["seconds"] = round(time.time() - self.started, 2)
        self.rows.append(row)
        if self.rank:
            return
        with open(self.out_dir / "log.jsonl", "a") as handle:
            handle.write(strict_json(row) + "\n")
        def width(key, value):  # the same in every row, so that rows stand under their header
            kind = 12 if isinstance(value, str) else 9 if isinstance(value, float) else 5
            return max(len(key), kind)

        if list(row) != self.columns:
            self.columns = list(row)
            self.say("  ".join(k.rjust(width(k, v)) for k, v in row.items()))
        self.say("  ".join((f"{v:.4f}" if isinstance(v, float) else str(v)).rjust(width(k, v))
                           for k, v in row.items()))

    def progress(self, items, what, **options):
        """tqdm over `items` on stderr: rank 0 only, and only on a terminal."""
        return tqdm(items, desc=what, leave=False, disable=True if self.rank else None,
                    dynamic_ncols=True, **options)

    def table(self, header, rows):
        """Print aligned columns (rank 0): the first to the left, the others to the right."""
        if self.rank == 0:
            print(format_table(header, rows), flush=True)

    def finish(self, result, draw=None, **line):
        """Write result.json, draw the figure and print `RESULT key=value ...` of `line`.

        draw: function(path) that writes the figure. The results are safe before it is called: if it
        fails, that costs a line on stderr and nothing else.
        """
        if self.rank:
            return
        sources = {**self.saved_sources, **self.sources}  # a suite reads only what is left of it
        sources = {name: said for name, (said, _) in sources.items()}
        write_json(self.out_dir / "result.json", {**result, "sources": sources})
        try:
            if draw:
                draw(self.out_dir / "figure.png")
        except Exception as error:  # a figure is made of whatever names users have
            self.warn(f"figure.png could not be drawn ({type(error).__name__}: "
                      f"{' '.join(str(error).split())[:200]}); all results are in result.json")
        print("RESULT " + " ".join(f"{k}={_short(v)}" for k, v in line.items()), flush=True)


def _is_run(folder):
    """Whether the config.json of a folder is one that `begin` wrote."""
    try:
        return "settings" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def _short(value):
    return f"{value:.4f}" if isinstance(value, float) else shlex.quote(str(value))


def to_device(value, device):
    """The tensors in nested dicts, lists and tuples, detached, on a device; tuples become lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(v, device) for v in value]
    return value


def format_table(header, rows):
    """Aligned plain-text table: numbers with two decimals, None as "-"."""
    def cell(value):
        return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    lines = [[str(h) for h in header]] + [[cell(v) for v in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(v.ljust(w) if i == 0 else v.rjust(w)
                               for i, (v, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                     for line in lines)


# ------------------------------------------------------------------------------------------------
# Networks side by side: S seeds as the leading dimension of every tensor
# ------------------------------------------------------------------------------------------------


def pack_seeds(seeds, trained, more):
    """All that training changes, taken apart by seed -> dict seed -> dict name -> tensor.

    So a checkpoint fits any number of processes. seeds: S names; trained: list of (dict name ->
    parameter (S, ...), its Adam optimiser), all at the same step; more: dict name -> tensor (S,
    ...) or None.
    """
    found, step = {k: t for k, t in more.items() if t is not None}, None
    for params, optimizer in trained:
        for name, p in params.items():
            found[name] = p
            for key, value in optimizer.state.get(p, {}).items():
                if key == "step":
                    step = value
                else:
                    found[f"{key} {name}"] = value
    return {seed: {"step": step.clone(), **{k: t[s].detach().clone() for k, t in found.items()}}
            for s, seed in enumerate(seeds)}


def unpack_seeds(packed, seeds, trained, device):
    """Put what pack_seeds returned back, for some of its seeds -> `more`, without its Nones."""
    found = {k: torch.stack([packed[s][k] for s in seeds]).to(device) for k in packed[seeds[0]]}
    step = found.pop("step")[0]
    for params, optimizer in trained:
        for name, p in params.items():
            p.data.copy_(found.pop(name))
            if p.requires_grad:
                moments = {k: found.pop(f"{k} {name}") for k in ("exp_avg", "exp_avg_sq")}
                fused = optimizer.defaults.get("fused")  # a fused Adam keeps its step on the device
                optimizer.state[p] = {"step": step.clone() if fused else step.cpu(), **moments}
    return found


def spread(numbers, digits=4):
    """Mean ± standard deviation of one number per seed, as text; "-" where one is missing."""
    if None in numbers:
        return "-"
    t = torch.tensor(numbers, dtype=torch.float64)
    return f"{t.mean():.{digits}f}" + (f" ±{t.std():.{digits}f}" if len(t) > 1 else "")


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------


def per_class_accuracy(predictions, labels, num_classes):
    """Accuracy of each class in [0, 1]; NaN for a class without samples.

    predictions, labels: (N,) integer tensors -> (num_classes,) float64 tensor.
    """
    total = torch.bincount(labels, minlength=num_classes).double()
    hits = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    return torch.where(total > 0, hits / total.clamp(min=1), torch.nan)


def macro_f1(predictions, labels, num_classes):
    """Mean F1 over the classes that occur in `labels`, in [0, 1]. Both (N,) int.

    A class that is only predicted costs its victims' recall, but has no F1 of its own: a client
    that holds 40 of 100 classes is rated by these 40.
    """
    hits = torch.bincount(labels[predictions == labels], minlength=num_classes).double()
    support = torch.bincount(torch.cat([labels, predictions]), minlength=num_classes)
    present = torch.bincount(labels, minlength=num_classes) > 0
    return (2 * hits[present] / support[present]).mean().item()


def balancedness(class_accuracy, sigma=0.1):
    """How equal the classes' accuracies are: 1 when all are equal, towards 1/C when not.

    Mean over class pairs (i, j) of exp(-(a_i - a_j)² / (2 σ²)); classes with NaN are left out.
    class_accuracy: (C,) in [0, 1]; sigma: the difference in accuracy that counts as large.
    Source: the form of Kang et al., "Exploring Balanced Feature Spaces", ICLR 2021.
    """
    a = torch.as_tensor(class_accuracy)
    a = a[~a.isnan()]
    return torch.exp(-((a[:, None] - a[None, :]) ** 2) / (2 * sigma ** 2)).mean().item()


def non_dominated(points):
    """Which points are not dominated by another, all objectives minimised.

    points: (N, m), finite -> (N,) bool tensor. Of equal points the first is kept. Source: moocore.
    """
    import moocore
    return torch.from_numpy(moocore.is_nondominated(_array(points)))


EXACT = 6  # objectives up to which a hypervolume is computed exactly: time grows with N^(m / 2)


def hypervolume(points, reference):
    """Volume that `points` dominate inside the box below `reference`; minimisation.

    points: (N, m), reference: (m,) -> float >= 0. Points beyond the reference add nothing. Exact up
    to 6 objectives; beyond, an integral over 2^16 evenly spread directions (the same each time),
    within about 0.3%. Source: Zitzler and Thiele 1998; computed by moocore.
    """
    import moocore
    f, corner = _array(points), _array(reference)
    if len(corner) <= EXACT:
        return float(moocore.hypervolume(f, ref=corner))
    f = f[(f < corner).all(1)]
    if not len(f):
        return 0.0
    box = (corner - f.min(0)).prod()  # which an integral might exceed by its error
    return min(float(moocore.hv_approx(f, ref=corner, nsamples=2 ** 16)), float(box))


def angular_range(points):
    """How wide a front is spread as seen from the ideal point, in radians: [0, π/2].

    points: (N, m), the ideal point at 0. m = 2: max θ - min θ, θ = atan2(f2, f1). m = 3: the
    smaller of the spans of arctan(√(f1² + f2²) / f3) and arctan(f2 / f1). NaN for other m. Source:
    Zhang et al., "Hypervolume Maximization: A Geometric View of Pareto Set Learning", NeurIPS 2023.
    """
    f = torch.from_numpy(_array(points))
    if f.shape[1] == 2:
        angles = [torch.atan2(f[:, 1], f[:, 0])]
    elif f.shape[1] == 3:
        angles = [torch.atan2(f[:, :2].norm(dim=1), f[:, 2]), torch.atan2(f[:, 1], f[:, 0])]
    else:
        return float("nan")
    return min((a.max() - a.min()).item() for a in angles)


def sparsity(points):
    """Mean squared gap between neighbours of a front, summed over objectives: >= 0, 0 is densest.

    1 / (N - 1) Σ_j Σ_i (S_j(i) - S_j(i + 1))² with S_j the sorted j-th objective of the
    non-dominated points; 0 for one point. points: (N, m). Source: Xu et al., "Prediction-Guided
    Multi-Objective RL", ICML 2020.
    """
    f = torch.from_numpy(_array(points))
    f = f[non_dominated(f)]
    if len(f) < 2:
        return 0.0
    return (f.sort(0)[0].diff(dim=0) ** 2).sum().item() / (len(f) - 1)


def distance_to_front(points, front):
    """How far points lie behind a front: 0 where they are as good as one of its points.

    min over the front's points r of ‖max(f - r, 0)‖, all objectives minimised. points: (..., m),
    front: (R, m), R > 0 -> (...). Source: d+ of Ishibuchi et al., "Modified Distance Calculation in
    Generational Distance and Inverted Generational Distance", EMO 2015.
    """
    rows = points.reshape(-1, points.shape[-1]).split(max(1, 10 ** 7 // front.numel()))
    return torch.cat([(f[:, None] - front).clamp_min(0).norm(dim=-1).amin(1)
                      for f in rows]).view(points.shape[:-1])


def _array(values):
    """A tensor on any device, an array or a list -> a float64 array, never through float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.ascontiguousarray(values, dtype=np.float64)


# ------------------------------------------------------------------------------------------------
# Figures: the panels they are made of. Okabe and Ito's colours, safe for the colour-blind
# ------------------------------------------------------------------------------------------------

GREY, ORANGE, AMBER, PINK, SKY, GREEN, BLUE = (
    "#777777", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#0072B2")


OTHER_SCRIPTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari",
                 "Noto Sans", "Arial Unicode MS", "Microsoft YaHei", "PingFang SC"]


@contextlib.contextmanager
def figure(path, title, size, **layout):
    """An empty matplotlib figure to draw on; saved to `path` when the block ends.

    size: inches (width, height); layout: of plt.subplots, if there are to be panels. -> (figure,
    axes), axes None without a layout.
    """
    import warnings

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    # Names are a user's: a $ in them is a dollar, and other scripts are drawn by what font there is
    installed = set(matplotlib.font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(f for f in OTHER_SCRIPTS if f in installed)]
    with plt.rc_context({"text.parse_math": False, "font.family": fonts}), \
            warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
        drawing, axes = plt.figure(figsize=size, layout="constrained"), None
        try:
            if layout:
                axes = drawing.subplots(**layout)
            yield drawing, axes
            log_ticks(drawing)
            drawing.suptitle(textwrap.fill(printable(title), int(11 * size[0])))
            atomic_write(path, lambda p: drawing.savefig(p, dpi=130))
        finally:
            plt.close(drawing)


def log_ticks(drawing):
    """Numbers on the log axes of a figure: matplotlib's own are formulas, and none are parsed."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):  # which ticks get a number is left to matplotlib
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""
    for axes in drawing.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(Plain())
                axis.set_minor_formatter(Plain(minor_thresholds=(1, .4)))


def heat_map(axis, values, title, rows=None, columns=None, bar=None, **options):
    """A matrix as colours. rows, columns: names of its lines; bar: label of a colour bar."""
    shown = axis.imshow(values, **{"cmap": "viridis", **options})
    axis.set_title(title)
    for names, ticks, turn in ((rows, axis.set_yticks, 0), (columns, axis.set_xticks, 90)):
        if names is not None:
            ticks(range(len(names)), names, fontsize=7, rotation=turn)
    if bar:
        axis.figure.colorbar(shown, ax=axis, label=bar, shrink=.8)
    return shown


def grouped_bars(axis, places, heights, colours):
    """Bars side by side at each of `places`. heights: dict label -> numbers or None; (...)."""
    width = .8 / max(len(heights), 3)
    for i, (label, values) in enumerate(heights.items()):
        shift = (i - (len(heights) - 1) / 2) * width * 1.05
        axis.bar(np.asarray(places) + shift, [v or 0 for v in values], width, label=label,
                 color=colours[label], hatch=("", "///", "...", "")[i % 4], edgecolor="white",
                 linewidth=0)  # hatches for who prints in grey
    axis.set_ylim(0, 1.08 * max(1, *(b.get_height() for b in axis.patches)))


def ranked_bars(axis, heights, colours, xlabel, spread=None):
    """One horizontal bar a label, its number beside it. heights: dict label -> number >= 0.

    spread: one number a bar, half the length of a line across its end; None: no such lines.
    """
    labels = [textwrap.fill(label, 24) for label in heights]
    bars = axis.barh(labels, list(heights.values()), xerr=spread, capsize=3,
                     color=[colours.get(label, "#999999") for label in heights])
    axis.bar_label(bars, fmt="%.1f", padding=3, zorder=4,
                   bbox={"fc": "white", "ec": "none", "pad": 1})
    longest = max(h + s for h, s in zip(heights.values(), spread or [0] * len(bars), strict=True))
    lie_down(axis, len(bars), xlabel, min(max(longest, 1) * 1.25, 118))


def lie_down(axis, bars, xlabel, end):
    """The frame of horizontal bars, the first at the top, a single one no thicker than a third."""
    middle, half = (bars - 1) / 2, max(bars, 3) / 2
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel=xlabel, xlim=(0, end), ylim=(middle + half, middle - half))


def whole_ticks(axis):
    """No ticks between whole numbers on an axis.xaxis or .yaxis."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def label_ends(axis, gap=.06):
    """The label of each line beside its last point, none on top of another, instead of a legend.

    gap: between two labels, as a share of the height.
    """
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    ends = [np.asarray(line.get_xydata())[-1] for line in lines]
    there = axis.transAxes.inverted().transform(axis.transData.transform(ends))[:, 1]  # 0 to 1
    order, steps = np.argsort(there, kind="stable"), gap * np.arange(len(lines))
    # upwards from the lowest, then down again what would stand above the panel
    places = np.maximum.accumulate(there[order] - steps) + steps
    places = np.minimum(places, 1 - steps[::-1])
    for i, place in zip(order, places, strict=True):
        axis.annotate(lines[i].get_label(), ends[i], (1.04, place), va="center", fontsize=9,
                      textcoords="axes fraction", color=lines[i].get_color(),
                      arrowprops={"arrowstyle": "-", "lw": .5, "color": lines[i].get_color()})
    axis.spines[["top", "right"]].set_visible(False)


def front_size(count):
    """Columns of front_panels for so many problems, and its size in inches: (width, height)."""
    columns = math.ceil(math.sqrt(.6 * count))
    return columns, (4.8 * columns, 2.4 * -(-count // columns) + 1.2)


def front_panels(parent, problems, preferences, fronts, references, hv, looks):
    """Of each problem the first seed's fronts, and how far all points are from the reference front.

    Objectives as shares of the range from ideal to nadir. More than 3 of them cannot be seen at
    once: in place of the fronts stands how far the reference is from the learned points.

    parent: a figure or subfigure; problems: K with name, n_obj, ideal, nadir, estimated, and front:
    None where the best points found stand for it; preferences: K tensors (N, m); fronts: dict
    method -> K tensors (S, N, m), the last method the one that others are compared with;
    references: K tensors (R, m); hv: dict method -> {problem: one hypervolume a seed}; looks: dict
    method -> (label, colour, marker, line style).
    """
    columns, _ = front_size(len(problems))
    grid = parent.add_gridspec(-(-len(problems) // columns), 2 * columns,
                               width_ratios=[2, 3] * columns)
    for k, p in enumerate(problems):
        cells = [grid[k // columns, 2 * (k % columns) + i] for i in range(2)]
        left = parent.add_subplot(cells[0], projection="3d" if p.n_obj == 3 else None)
        right = parent.add_subplot(cells[1])
        low, wide = p.ideal, p.nadir - p.ideal
        learned = {m: (f[k].cpu().double() - low) / wide for m, f in fronts.items()}  # (S, N, m)
        reference = (references[k] - low) / wide
        if p.front is None:
            reference = torch.cat([reference, *(f.flatten(0, 1) for f in learned.values())])
            reference = reference[non_dominated(reference)]
        # How far most of the reference's points are from the others: it tells nothing below that
        some = reference[::-(-len(reference) // 500)]
        apart = (some[:, None] - reference).clamp_min(0).norm(dim=-1).sort(1)[0][:, :2].amax(1)
        floor = max(1e-6, apart.quantile(.9).item())
        t = preferences[k].cpu().double()
        _draw_distances(right, {m: distance_to_front(f, reference) for m, f in learned.items()},
                        looks, floor, t[:, 0] / t.sum(1) if p.n_obj == 2 else None)
        right.set_xlabel("preference p₁" if p.n_obj == 2 else "share of the points, nearest first",
                         fontsize=7, labelpad=1)
        right.set_ylabel(f"distance to the {'front' if p.front else 'best found'}", fontsize=7)
        if p.n_obj <= 3:
            _draw_fronts(left, learned, reference, looks)
        else:
            gaps = {m: torch.stack([distance_to_front(-some, -one) for one in f])
                    for m, f in learned.items()}
            _draw_distances(left, gaps, looks, floor)
            left.set_xlabel("share of the front, nearest first", fontsize=7, labelpad=1)
            left.set_ylabel("distance to the points", fontsize=7)
        told = [*(f"{looks[m][0].split(',')[0]} {spread(hv[m][p.name])}" for m in fronts),
                *(f"{which} estimated" for which in p.estimated)]
        told = f"{p.name}: HV " + ", ".join(part.replace(" ", "\xa0") for part in told)
        # Above both panels. Its middle has to lie over one of them, or layout would set them apart
        right.set_title(textwrap.fill(printable(told), 64), fontsize=8, x=.01, pad=9)
    _front_legend(parent, problems, fronts, hv, looks, columns)


def _front_legend(parent, problems, fronts, hv, looks, columns):
    """Below all panels: each method's mean hypervolume, and how much larger the last one's is."""
    means = {m: np.mean(list(hv[m].values()), 0) for m in fronts}  # one number a seed
    labels = {m: f"{looks[m][0]}: HV {spread(means[m].tolist())}" for m in fronts}
    *others, main = fronts
    for m in others:  # seed by seed, which tells a tie from a difference
        more = means[main] - means[m]
        labels[m] += f"; {looks[main][0].split(',')[0]} {more.mean():+z.4f}" + (
            f" ±{more.std(ddof=1):.4f} in the same seeds" if len(more) > 1 else "")
    labels["front"] = "reference front" + " or best points found" * any(
        p.front is None for p in problems)
    labels["floor"] = "closer than its single points can tell"
    handles = {h.get_label(): h for a in parent.axes for h in a.get_legend_handles_labels()[0]}
    labels = {name: label for name, label in labels.items() if name in handles}
    seeds = len(fronts[main][0])
    notes = ["HV: hypervolume, larger is better" + ", mean of the problems" * (len(problems) > 1)]
    if seeds > 1:
        notes += [f"distances: median and middle half of {seeds} seeds",
                  *["fronts: the first seed"] * ("front" in labels)]
    parent.legend([handles[name] for name in labels],
                  [textwrap.fill(label, 80) for label in labels.values()],
                  loc="outside lower center", ncols=columns, frameon=False, fontsize=7,
                  title_fontsize=7, title=textwrap.fill("; ".join(notes), 85 * columns))


def _draw_distances(axes, distances, looks, floor, x=None):
    """The median over the seeds and their middle half, log scale. distances: dict method -> (S, N);
    floor > 0: less than that is not known; x: (N,), or None where there is no order: sorted."""
    for i, (method, d) in enumerate(distances.items()):
        _, colour, marker, line = looks[method]
        d = (d.sort(1)[0] if x is None else d).clamp_min(floor)
        low, middle, high = d.quantile(torch.tensor([.25, .5, .75]).to(d), 0)
        at = torch.linspace(0, 1, len(middle)) if x is None else x
        axes.fill_between(at, low, high, color=colour, alpha=.2, linewidth=0)
        axes.plot(at, middle, line, color=colour, marker=marker, markersize=4, linewidth=1.3,
                  markevery=(len(at) // 30 * i, max(1, len(at) // 10)), label=method)
    axes.axhspan(floor / 2, floor, color="#DDDDDD", label="floor")
    top = max(10 * floor, *(d.max().item() for d in distances.values()))
    axes.set(yscale="log", ylim=(floor / 2, 10. ** math.ceil(math.log10(top))))
    axes.tick_params(labelsize=6)


def _draw_fronts(axes, learned, reference, looks, limit=1.3):
    """The first seed's points (N, 2 or 3), but for those beyond the limit in some objective."""
    deep = reference.shape[1] == 3
    sets = [("#AAAAAA", ".", 1.5, reference)]
    for colour, marker, size, f in sets + [(*looks[m][1:3], 3, f[0]) for m, f in learned.items()]:
        axes.plot(*f[(f <= limit).all(1)].T, linestyle="", marker=marker, markersize=size,
                  color=colour, fillstyle="none", markeredgewidth=.6,
                  label="front" if f is reference else None)
    points = torch.cat([f[0] for f in learned.values()])
    if beyond := int((points > limit).any(1).sum()):
        axes.annotate(f"{beyond} of {len(points)} points beyond", (1, 1.01), fontsize=6,
                      xycoords="axes fraction", ha="right", va="bottom")
    axes.tick_params(labelsize=6, pad=-4 if deep else 2)
    axes.locator_params(nbins=3)
    axis_of = [axes.xaxis, axes.yaxis, *([axes.zaxis] if deep else [])]
    for j, (axis, pad) in enumerate(zip(axis_of, [-9, -9, -12] if deep else [1, 1], strict=True)):
        axis.set_label_text(f"f{'₁₂₃'[j]}", fontsize=7)
        axis.labelpad = pad
        axis.set_major_formatter(lambda v, _: f"{v:g}")
    if deep:
        axes.view_init(25, 40)
        axes.set_box_aspect(None, zoom=.85)
