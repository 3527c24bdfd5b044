"""Resume a run: compare its recorded settings with the current ones, restore its state.

    check_resume(folder, recorded, current, remedy="use another --model_name")
    with restoring(path, "use another --model_name"):
        net.load_state_dict(saved["weights"])

Used by the training of models and of the encoder, by extraction and by explanation.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from echofocus_core.base.console import RUN, UserError

LONGEST = 60  # characters of a value in a message; longer ones (digests, tables) are not printed


@dataclass(frozen=True)
class Difference:
    """A setting, or another fact about a run, whose recorded value is not the current one."""

    name: str
    recorded: Any
    current: Any

    def __str__(self):
        values = [str(x) if str(x) else "none" for x in (self.recorded, self.current)]
        if max(map(len, values)) > LONGEST:
            return f"different {self.name}"
        return f"{self.name} was {values[0]} and is now {values[1]}"


def differences(recorded, current):
    """The Differences between two dicts (name -> value), in the order of `current`.

    Names that only one of them has are ignored.
    """
    return [
        Difference(name, recorded[name], value)
        for name, value in current.items()
        if name in recorded and recorded[name] != value
    ]


def check_resume(run, recorded, current, *, remedy, is_fixed=lambda name: True, listener=RUN):
    """Refuse to resume a run whose fixed settings have changed; report the other changes.

    run: the name in messages. recorded, current: name -> value. is_fixed: name -> whether a change
    is an error. remedy: what to do instead. The UserError names the first fixed setting that
    differs, both values and the remedy.
    """
    changes = differences(recorded, current)
    for change in changes:
        if is_fixed(change.name):
            raise UserError(f"{run} cannot be resumed: {change}; {remedy}")
    for change in changes:
        listener.note(f"changed on resume: {change}")


@contextmanager
def restoring(path, remedy):
    """Raise UserError if, in the block, a checkpoint does not have the expected content."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise UserError(f"{path} is damaged and cannot be resumed; {remedy}") from e
