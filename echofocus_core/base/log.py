"""What a run prints, on the screen and in a file: `--quiet`, `--verbose` and `--log`."""

import io
import json
import logging
import os
import sys
from contextlib import ExitStack, contextmanager, redirect_stdout

from echofocus_core.base.console import RUN
from echofocus_core.base.files import begins, output_path

LOG = logging.getLogger("echofocus")
LOG.propagate = False
PLAIN = "%(asctime)s %(levelname)s %(message)s"
TIME, LEVEL = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "(INFO|WARNING|ERROR)"
BEGINS = rf'{TIME} {LEVEL} |{{"time": "{TIME}", "level": "{LEVEL}"'  # how a log file begins


class JsonLines(logging.Formatter):
    """A JSON object per message: time, level, message, and of an error the traceback."""

    def format(self, record):
        entry = {"time": self.formatTime(record), "level": record.levelname}
        entry["message"] = record.getMessage()
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class Prints(io.TextIOBase):
    """A stream on which each print is a message of the log."""

    text = ""

    def write(self, text):
        self.text += text
        if self.text.endswith("\n") and (message := self.text.strip("\n")):
            word = message.split(maxsplit=1)[0].removesuffix(":") if message.split() else ""
            LOG.log(
                getattr(logging, word) if word in ("WARNING", "ERROR") else logging.INFO, message
            )
            self.text = ""
        return len(text)


@contextmanager
def message_log(options):
    """In the block, print and log as the MessageOptions say. Errors are logged and raised again."""
    if not (options.quiet or options.verbose or options.log):
        yield
        return
    screen = logging.StreamHandler(sys.stdout)
    screen.setLevel(logging.WARNING if options.quiet else logging.INFO)
    screen.addFilter(lambda record: options.verbose or not hasattr(record, "raised"))
    screen.setFormatter(logging.Formatter("%(asctime)s %(message)s" if options.verbose else None))
    handlers = [screen]
    if options.log and os.environ.get("RANK", "0") == "0":  # one of the processes of torchrun
        path = output_path(options.log, "log of a run", begins(BEGINS))
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
        as_json = path.suffix == ".jsonl"
        handlers[-1].setFormatter(JsonLines() if as_json else logging.Formatter(PLAIN))
    RUN.verbosity = options.verbose - options.quiet
    LOG.setLevel(logging.INFO)
    with ExitStack() as stack:
        stack.callback(setattr, RUN, "verbosity", 0)
        for handler in handlers:
            LOG.addHandler(handler)
            stack.callback(handler.close)
            stack.callback(LOG.removeHandler, handler)
        try:
            with redirect_stdout(Prints()):
                yield
        except Exception as error:
            LOG.error(str(error), exc_info=options.verbose, extra={"raised": True})
            raise
