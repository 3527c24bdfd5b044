"""The person at the keyboard: errors with their remedy, progress, command lines."""

import argparse
import difflib
import errno
import mmap
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

# What a person types for a program of ours: in a clone, or as `pip install` put it on the path.
INSTALLED = not (Path(__file__).resolve().parents[2] / "embed" / "extract.py").is_file()
PROGRAM = "echofocus" if INSTALLED else "python echofocus.py"
EXTRACT = "echofocus-extract" if INSTALLED else "python embed/extract.py"
THREAD_BYTES = 16 << 20  # a stack, and what it begins with


class UserError(Exception):
    """A mistake or missing input that the user can fix; the message says how."""


@dataclass
class Finding:
    """A fact about the user's input: 'ok', 'WARNING' (usable in part) or 'ERROR'."""

    level: str
    text: str
    remedy: str = ""


class Findings:
    """Receives what is noticed in config, labels, embeddings, videos and models.

    This one is for runs: it prints notes and warnings, and raises UserError for an error.
    """

    def ok(self, text):
        """Reported by `check` only."""

    def note(self, text):
        """A decision that the user should see, such as rows left out on purpose."""
        print(text)

    def warning(self, text, remedy=""):
        print(f"WARNING: {text}{'; ' if remedy else ''}{remedy}")

    def error(self, text, remedy=""):
        raise UserError(f"{text}{'; ' if remedy else ''}{remedy}")


RUN = Findings()  # the default reporter


class Collected(Findings):
    """Keeps all findings for `check`; the reader continues after an error with what is usable."""

    def __init__(self):
        self.findings = []

    def ok(self, text):
        self.findings.append(Finding("ok", text))

    note = ok

    def warning(self, text, remedy=""):
        self.findings.append(Finding("WARNING", text, remedy))

    def error(self, text, remedy=""):
        self.findings.append(Finding("ERROR", text, remedy))


# A name of ours -> what people type for it. A word that means two things stands twice, and both
# are offered.
MEANINGS = {
    "batch_number": "batchsize",
    "batch_size": "batchsize",
    "clip_dropout": "dropout",
    "clip_len": "clips frames",
    "config": "config_path",
    "dataset": "data datasets cohort",
    "device": "cuda gpu gpus",
    "dtype": "fp16 half",
    "embed_file": "output output_dir output_path",
    "embedding_path": "data data_path embeddings files folder input path",
    "encoder_depth": "depth layers num_layers",
    "epoch_early_stop": "patience early_stopping",
    "explain_method": "method",
    "explain_mode": "mode",
    "explain_n": "topk top_k",
    "explain_steps": "steps",
    "fold": "fold folds",
    "folds": "fold",
    "init_from": "pretrained finetune",
    "label_path": "data_path csv label labels path",
    "learning_rate": "rate",
    "model_name": "checkpoint checkpoint_path model model_path model_dir name resume",
    "n_clips": "clips num_clips",
    "n_folds": "folds cv",
    "out": "folder output output_dir output_path save",
    "pool_queries": "pooling",
    "precision": "amp bf16 fp16 half mixed_precision",
    "run_id": "name resume",
    "sample_limit": "limit n_samples",
    "settings": "options",
    "split": "splits",
    "subset": "fold folds",
    "task": "outcome recipe target tasks",
    "task_labels": "label labels outcome target targets",
    "tf_combine": "pooling",
    "transformer_type": "arch architecture kind",
    "type": "kind",
    "units": "unit",
    "valid_range": "ranges",
    "video_base_path": "video_path videos",
    "videos": "dicom files folder input video video_path visits",
    "weights": "pretrained encoder",
    "workers": "num_workers threads",
}


def nearest(name, valid):
    """'; did you mean X?' when some valid name means or looks like `name`, else ''.

    By meaning first, then by a part of the name (`rate`: learning_rate), then by letters.
    """
    word, names = plain_word(name), {plain_word(v): str(v) for v in valid}
    meant = [n for n in names if word in MEANINGS.get(n, "").split()]
    meant = meant or [n for n in names if len(word) > 2 and word in n.split("_")][:4]
    meant = meant or difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join(names[m] for m in meant)}?" if meant else ""


def plain_word(name):
    return str(name).strip().lstrip("-").lower().replace("-", "_")


def progress(iterable=None, **options):
    """A tqdm bar on standard error; into a log file it writes only now and then."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 20, **options)


def close_bars():
    """End the lines of bars that an error has left standing, so that its own line begins one."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.leave = True
        bar.close()


class Switch(argparse.Action):
    """`--redo`, `--no_redo`; with Parser also `--redo True` and `--redo False`."""

    def __init__(self, option_strings, dest, **kwargs):
        names = [*option_strings, *(f"--no_{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class Joined(argparse.Action):
    """`--model_name a b` is `--model_name a,b`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, ",".join(values))


class Parser(argparse.ArgumentParser):
    """argparse, with `--model-name` for `--model_name` and a hint for a misspelt option."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = [from_home(underscores(a)) for a in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self.hint(unknown[0], parsed)}")
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        switches = {o for o, a in self._option_string_actions.items() if isinstance(a, Switch)}
        args = without_truth(sys.argv[1:] if args is None else args, switches)
        return super().parse_known_args(args, namespace)

    def hint(self, argument, parsed):
        """What a misspelt option of the command in use may mean, or which command has it."""
        if not argument.startswith("--"):
            return ""
        argument = argument.split("=")[0]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                takers = [
                    k for k, p in action.choices.items() if argument in p._option_string_actions
                ]
                if takers:
                    return f"; it is an option of {', '.join(takers)}"
        return nearest(argument, [o for o in self.options_of(parsed) if not o.startswith("--no_")])

    def options_of(self, parsed):
        """All option strings of this parser and of the subcommand in use."""
        options = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(parsed, action.dest, None))
                options += list(chosen._option_string_actions) if chosen else []
        return options


def without_truth(args, switches):
    """`--redo True` -> `--redo`; `--redo False`, `--redo=False` -> `--no_redo`."""
    out = []
    for argument in args:
        name, equals, value = argument.partition("=")
        if not equals and out and out[-1] in switches:
            name, value = out[-1], argument
        if name in switches and value.lower() in ("true", "false"):
            if not equals:
                out.pop()
            out.append(name if value.lower() == "true" else f"--no_{name[2:]}")
        else:
            out.append(argument)
    return out


def underscores(argument):
    """`--model-name=x` -> `--model_name=x`; anything but a long option is left alone."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def from_home(argument):
    """`--out=~/x`, `~/x` in quotes: what a shell leaves -> the path in the home folder."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and value.startswith("~/"):
        return name + equals + os.path.expanduser(value)
    return os.path.expanduser(argument) if argument.startswith("~/") else argument


# What would steer a terminal, or turn letters round: an id of a label table may hold it.
STEERING = [*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x2028, 0x202F)]
STEERING = dict.fromkeys([*STEERING, *range(0x2066, 0x206A), *range(0xD800, 0xE000)], "?")


class Shown:
    """A text stream that shows what is printed and does nothing of what it says."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(text.translate(STEERING))

    def __getattr__(self, name):
        return getattr(self.stream, name)


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a quota or a limit on files
LONGEST_LINE = 2000  # characters of a line that says what is wrong


def run_main(main, program):
    """Call `main()` as a program: a UserError is one line and exit status 1, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal or log that has not every letter
            stream.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(Shown(sys.stdout)):
            main()
    except UserError as error:
        close_bars()
        text = "\n".join(clean_text(line, LONGEST_LINE) for line in str(error).split("\n"))
        print(f"{program}: error: {text}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a path that cannot be read or written: it names itself
        close_bars()
        text = clean_text(error, LONGEST_LINE)
        if error.errno in NO_ROOM:
            text += "; make room there, the same command goes on from here"
        print(f"{program}: error: {text}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        close_bars()
        print(
            f"{program}: error: the memory is full; take a smaller --batch_tokens or --batch_size, "
            "or a machine with more; the same command goes on from here",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        close_bars()
        print(f"{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


class Threads(ThreadPoolExecutor):
    """A pool of threads, if there is memory for them: Python waits for ever for a thread that finds
    none to begin in. Raises MemoryError."""

    def __init__(self, n, *more):
        try:
            mmap.mmap(-1, n * THREAD_BYTES).close()
        except OSError as error:
            raise MemoryError(f"none for {n} threads") from error
        super().__init__(n, *more)


def is_out_of_memory(error):
    """Whether Python, numpy or torch found no memory; torch and oneDNN say it in words alone."""
    words = ("allocate memory", "out of memory", "can't start new thread")
    text = str(error)
    found = any(word in text for word in words) or text.endswith("could not create a primitive")
    return isinstance(error, MemoryError) or found


def some(names, n=3):
    """The first few of some names, as text; they may be of others' files."""
    names = [clean_text(name) for name in names]
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def listed(reasons, n=9):
    """A dict of name to reason as text, a line each, the first few."""
    lines = [f"\n{name}: {reason}" for name, reason in list(reasons.items())[:n]]
    return "".join(lines) + "\n..." * (len(reasons) > n)


def duration(seconds):
    """Seconds in a unit that a person reads."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


def printable(value):
    """Text of a file from elsewhere, without what would steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def escaped(text):
    """Text without what would steer the terminal, told apart still: \\u202e for the character."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def clean_text(value, longest=200):
    """What is taken over from others' files: printable, and no longer than that."""
    text = printable(str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
