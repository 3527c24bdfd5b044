"""Resume a run: compare its recorded settings with the present ones, restore its state.

    check_resume(folder, recorded, present, remedy="use another --model_name")
    with restoring(path, "use another --model_name"):
        net.load_state_dict(saved["weights"])

Training of models and of the encoder, extraction and explanation all resume by these rules.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from echofocus_core.base.console import RUN, UserError

LONGEST = 60  # characters of a value in a message; longer ones (digests, tables) are not printed


@dataclass(frozen=True)
class Difference:
    """A setting, or another fact of a run, whose recorded value is not the present one."""

    name: str
    recorded: Any
    present: Any

    def __str__(self):
        values = [str(x) if str(x) else "none" for x in (self.recorded, self.present)]
        if max(map(len, values)) > LONGEST:
            return f"different {self.name}"
        return f"{self.name} was {values[0]} and is now {values[1]}"


def differences(recorded, present):
    """The Differences of two dicts (name -> value), in the order of `present`.

    Names that only one of them has are ignored: that value is not available.
    """
    return [
        Difference(name, recorded[name], value)
        for name, value in present.items()
        if name in recorded and recorded[name] != value
    ]


def check_resume(run, recorded, present, *, remedy, is_fixed=lambda name: True, listener=RUN):
    """Refuse to resume a run whose fixed settings have changed; report the other changes.

    run: what is resumed, for the message. recorded, present: name -> value. is_fixed: name ->
    whether it must not change. remedy: what to do instead. Raises UserError, which names the first
    fixed setting that differs, both values and the remedy.
    """
    changes = differences(recorded, present)
    for change in changes:
        if is_fixed(change.name):
            raise UserError(f"{run} cannot be resumed: {change}; {remedy}")
    for change in changes:
        listener.note(f"changed on resume: {change}")


@contextmanager
def restoring(path, remedy):
    """Report a checkpoint whose content does not have the expected form as one UserError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise UserError(f"{path} is damaged and cannot be resumed; {remedy}") from e
