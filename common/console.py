"""The person at the keyboard: errors with their remedy, progress, command lines."""

import argparse
import difflib
import os
import sys
from dataclasses import dataclass


class UserError(Exception):
    """A mistake or a missing thing that the user can mend; the message says how."""


@dataclass
class Finding:
    """What a reader found: 'ok', 'WARNING' (a run would work, less something) or 'ERROR'."""

    level: str
    text: str
    remedy: str = ""


class Findings:
    """Whom readers of config, labels, embeddings, videos and models tell what they find.

    This one listens during a run: an error ends it (UserError), a warning or note is printed.
    """

    def ok(self, text):
        """All is well; a run does not say so."""

    def note(self, text):
        """Something that was decided or left out, as it should be."""
        print(text)

    def warning(self, text, remedy=""):
        print(f"WARNING: {text}{'; ' if remedy else ''}{remedy}")

    def error(self, text, remedy=""):
        raise UserError(f"{text}{'; ' if remedy else ''}{remedy}")


class Collected(Findings):
    """Listens for `check`: keeps everything, so that the reader goes on with what can be used."""

    def __init__(self):
        self.findings = []

    def ok(self, text):
        self.findings.append(Finding("ok", text))

    note = ok

    def warning(self, text, remedy=""):
        self.findings.append(Finding("WARNING", text, remedy))

    def error(self, text, remedy=""):
        self.findings.append(Finding("ERROR", text, remedy))


def nearest(name, valid):
    """'; did you mean X?' when some valid name is close to `name`, else ''."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def progress(iterable=None, **options):
    """A tqdm bar on standard error; into a log file it writes only now and then."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 20, **options)


class Parser(argparse.ArgumentParser):
    """argparse, with `--model-name` for `--model_name` and a hint for a misspelt option."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):
        args = [underscores(a) for a in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            valid = [o for o in self.options_of(parsed) if o.startswith("--")]
            self.error(f"unknown argument {unknown[0]}{nearest(unknown[0], valid)}")
        return parsed

    def options_of(self, parsed):
        """All option strings of this parser and of the subcommand in use."""
        options = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(parsed, action.dest, None))
                options += list(chosen._option_string_actions) if chosen else []
        return options


def underscores(argument):
    """`--model-name=x` -> `--model_name=x`; anything but a long option is left alone."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def run_main(main, program):
    """Call `main()` as a program: a UserError is one line and exit status 1, no traceback."""
    try:
        main()
    except UserError as error:
        text = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(error))
        print(f"{program}: error: {text}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a path that cannot be read or written: it names itself
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def some(names, n=3):
    """The first few of some names, as text."""
    names = [str(name) for name in names]
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


def clean_text(value, longest=200):
    """What is taken over from others' files: printable, and no longer than that."""
    text = printable(str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
