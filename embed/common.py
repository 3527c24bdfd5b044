"""What every command needs: errors for the user, atomic files, digests, command lines."""

import argparse
import difflib
import hashlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake or a missing thing that the user can mend; the message says how."""


def nearest(name, valid):
    """'; did you mean X?' when some valid name is close to `name`, else ''."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@contextmanager
def atomic_path(path):
    """A temporary path to write; it becomes `path` when the block ends, and vanishes on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since writers choose a format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(iterable=None, **options):
    """A tqdm bar on standard error; into a log file it writes only now and then."""
    from tqdm import tqdm

    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 20, **options)


def pick_device(name=""):
    """`--device` as a torch.device; by default CUDA (torchrun's local rank says which), or CPU."""
    import torch

    if not name and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    # fp32 is fp32 on a GPU too: torch would run convolutions in TF32, with 10 bits of mantissa, and
    # embeddings would differ from a CPU's by a thousandth.
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} is not to be had here; cpu always is") from error
    return device


def sha256_file(path):
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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
