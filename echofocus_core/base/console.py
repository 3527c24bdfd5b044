"""Command lines and messages: errors with remedies, progress, argument parsing."""

import argparse
import difflib
import errno
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What a user types to run this program: in a clone, or after `pip install`.
INSTALLED = not (Path(__file__).resolve().parents[2] / "embed" / "extract.py").is_file()
PROGRAM = "echofocus" if INSTALLED else "python echofocus.py"
EXTRACT = "echofocus-extract" if INSTALLED else "python embed/extract.py"
TRAIN_ENCODER = "echofocus-train-encoder" if INSTALLED else "python embed/train.py"
EXPORT = "echofocus-export" if INSTALLED else "python embed/end_to_end.py"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LONGEST_LINE = 2000  # characters of an error message


class UserError(Exception):
    """A mistake or missing input; the message says what the user can do."""

    status = 1  # of the program


class UsageError(UserError):
    """An option with a value that it cannot have."""

    status = 2


@dataclass
class Finding:
    """A result of checking the user's input: 'ok', 'WARNING' (partly usable) or 'ERROR'."""

    level: str
    text: str
    remedy: str = ""


class Findings:
    """Reports findings about config, labels, embeddings, videos and models in a run.

    It prints notes and warnings, and raises UserError for an error.
    """

    verbosity = 0  # -1: only warnings and errors; 1: also checks that passed
    folder = ""  # a temporary one, with its last /, which is not printed

    def __init__(self):
        self.notes = set()  # printed notes: a command prints each once

    def ok(self, text):
        """A check that passed; only `check` and --verbose report it."""
        if self.verbosity > 0:
            print(text.replace(self.folder, ""))

    def note(self, text):
        """A decision that the user should see, such as rows left out on purpose."""
        if text not in self.notes:
            self.notes.add(text)
            print(text.replace(self.folder, ""))

    def warning(self, text, remedy=""):
        text = f"WARNING: {text}{'; ' if remedy else ''}{remedy}"
        print(text.replace(self.folder, ""))

    def error(self, text, remedy=""):
        raise UserError(f"{text}{'; ' if remedy else ''}{remedy}")


RUN = Findings()  # the default reporter


class Collected(Findings):
    """Keeps all findings for `check`; after an error the reader continues with the usable data."""

    def __init__(self):
        self.findings = []

    def ok(self, text):
        self.findings.append(Finding("ok", text))

    note = ok

    def warning(self, text, remedy=""):
        self.findings.append(Finding("WARNING", text, remedy))

    def error(self, text, remedy=""):
        self.findings.append(Finding("ERROR", text, remedy))


def progress(iterable=None, **options):
    """A tqdm bar on standard error, which disappears when done; few updates in a log file."""
    from tqdm import tqdm

    options = {"leave": False} | options
    options["disable"] = options.get("disable", False) or RUN.verbosity < 0
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 20, **options)


def print_next(line):
    """End a run with the command line that usually follows."""
    print(f"next: {line}")


# ---------------------------------------------------------------------------------- command lines


class Switch(argparse.Action):
    """`--redo`, `--no_redo`; with Parser also `--redo True` and `--redo False`.

    on: the default; --help shows only the form that changes it.
    """

    def __init__(self, option_strings, dest, on=False, **kwargs):
        negative = [f"--no_{name[2:]}" for name in option_strings]
        self.shown = negative if on else option_strings
        super().__init__([*option_strings, *negative], dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class Joined(argparse.Action):
    """`--model_name a b` is `--model_name a,b`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, ",".join(values))


class Help(argparse.Action):
    """`--help` shows the common options, `--help_all` every option."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string != "--help_all" and (hidden := parser.hide_groups()):
            parser.epilog = f"{hidden} more options: --help_all"
        parser.print_help()
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the name of an option's value once, and `NAME ...` for several values."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=26, **kwargs)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{', '.join(getattr(action, 'shown', action.option_strings))} {value}".rstrip()

    def _format_args(self, action, default_metavar):
        text = super()._format_args(action, default_metavar)
        return text.replace(f" [{action.metavar} ...]", " ...")


class Parser(argparse.ArgumentParser):
    """argparse, with `--model-name` for `--model_name` and a hint for a misspelt option."""

    def __init__(self, arguments="", program=PROGRAM, description="", example=None, **kwargs):
        """arguments: those without a name, for the usage; program: what the user types; example:
        the rest of a line."""
        text = textwrap.fill(description, 78)
        if example is not None:
            text += f"\n\nexample: {program} {example}".rstrip()
        usage = " ".join(f"{program} {arguments} [options]".split())
        kwargs = {"usage": usage} | kwargs | {"add_help": False, "allow_abbrev": False}
        super().__init__(description=text, formatter_class=HelpFormatter, **kwargs)
        self._positionals.title, self._optionals.title = "arguments", "common options"
        self.add_argument(
            "-h", "--help", "--help_all", action=Help, nargs=0, default=argparse.SUPPRESS,
            help="show this help; with --help_all every option",
        )  # fmt: skip

    def hide_groups(self):
        """Remove all groups but the common options; returns the number of options in them."""
        hidden = self._action_groups[2:]
        del self._action_groups[2:]
        return sum(len(group._group_actions) for group in hidden)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
            with suppress(ImportError):
                import argcomplete

                argcomplete.autocomplete(self)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            typed = {plain_arguments([word], set())[0]: word for word in args}
            word = typed.get(unknown[0], unknown[0])
            self.error(f"unknown argument {word}{self.hint(unknown[0], parsed)}")
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        switches = {o for o, a in self._option_string_actions.items() if isinstance(a, Switch)}
        return super().parse_known_args(plain_arguments(args, switches), namespace)

    def error(self, message):
        choice = re.fullmatch(
            r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message
        )
        if choice:
            names = [name.strip(" '") for name in choice[3].split(",")]
            message = f"{choice[1]} {choice[2]} is not one of {', '.join(names)}"
            message += nearest(choice[2], names)
        stop(self.prog, message, UsageError.status)

    def hint(self, argument, parsed):
        """The option that a misspelt one or a folder may mean, or the commands that have it."""
        name, options = argument.split("=")[0], list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                commands = action.choices.items()
                takers = [k for k, p in commands if name in p._option_string_actions]
                if takers:
                    return f"; it is an option of {', '.join(takers)}"
                options += action.choices[getattr(parsed, action.dest)]._option_string_actions
        if argument.startswith("--"):
            return nearest(name, [x for x in options if not x.startswith("--no_")])
        folder, is_embedded = Path(argument), any(Path(argument).glob("*.hdf5"))
        option = "--embedding_path" if is_embedded else "--videos"
        return f"; for this folder type {option} {argument}" * (
            option in options and folder.is_dir()
        )


def nearest(name, valid):
    """'; did you mean X?' if a valid name is similar to `name`, else ''."""
    names = {plain_word(v): str(v) for v in valid}
    close = difflib.get_close_matches(plain_word(name), names, n=1, cutoff=0.5)
    return f"; did you mean {names[close[0]]}?" if close else ""


def plain_word(name):
    return str(name).strip().lstrip("-").lower().replace("-", "_")


def plain_arguments(args, switches):
    """The usual spelling of options.

    `--model-name=x` -> `--model_name=x`; for switches `--redo True` -> `--redo` and `--redo False`,
    `--redo=False` -> `--no_redo`.
    """
    plain = []
    for argument in args:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            argument = name + equals + value
        if not equals and plain and plain[-1] in switches:
            name, value = plain[-1], argument
        if name in switches and value.lower() in ("true", "false"):
            if not equals:
                plain.pop()
            argument = name if value.lower() == "true" else f"--no_{name[2:]}"
        plain.append(argument)
    return plain


def run_main(main, program):
    """Call `main()` as a program: a UserError is printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # for terminals that cannot encode some letters
            stream.reconfigure(errors="backslashreplace")
    RUN.notes.clear()
    try:
        main()
    except UserError as error:
        stop(program, str(error), error.status)
    except BrokenPipeError:  # such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # its message contains the path
        remedy = "; free disk space, then run the same command again to resume"
        stop(program, f"{error}{remedy if error.errno in DISK_FULL else ''}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "lower --batch_tokens or --batch_size, or use a machine with more memory"
        stop(program, f"out of memory; {remedy}; then run the same command again to resume")
    except KeyboardInterrupt:
        print(f"{program}: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def stop(program, text, status=1):
    print(f"{program}: error: {text[:LONGEST_LINE]}", file=sys.stderr)
    sys.exit(status)


def is_out_of_memory(error):
    """Whether Python, numpy or torch ran out of memory; torch reports it only as text."""
    words = ("allocate memory", "out of memory", "can't start new thread")
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or any(word in text for word in words)
        or text.endswith("could not create a primitive")  # oneDNN
    )


# ------------------------------------------------------------------------------------------- text


SINGULAR = {"are": "is", "have": "has", "studies": "study", "patients": "patient"}
SINGULAR |= {"videos": "video", "rows": "row", "cells": "cell", "values": "value"}
SINGULAR |= {"errors": "error", "warnings": "warning", "files": "file", "epochs": "epoch"}
SINGULAR |= {"numbers": "a number", "look": "looks"}


def count_of(n, words):
    """(2, 'studies are') -> '2 studies are'; (1, 'studies are') -> '1 study is'."""
    return f"{n} {' '.join(SINGULAR.get(x, x) for x in words.split()) if n == 1 else words}"


def some(names, n=3):
    """The first `n` names, as text."""
    names = [clean_text(name) for name in names]
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def reason_lines(reasons, n=9):
    """The first `n` entries of a dict {name: reason} as text, one line each."""
    lines = [f"\n{name}: {reason}" for name, reason in list(reasons.items())[:n]]
    return "".join(lines) + "\n..." * (len(reasons) > n)


def duration(seconds):
    """Seconds as text, in a suitable unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} s"


def printable(value):
    """Text without control characters."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def clean_text(value, longest=200):
    """Text from an untrusted file: printable, and at most `longest` characters."""
    text = printable(str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
