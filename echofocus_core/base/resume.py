"""Resume a run: compare its recorded settings with the current ones, restore its state."""

from contextlib import contextmanager

from echofocus_core.base.console import RUN, UserError

LONGEST = 60  # characters of a value in a message; longer ones (digests, tables) are not printed


def differences(recorded, current):
    """Setting or other fact of a run -> how its recorded value differs from the current one.

    Names that only one of the two dicts has are ignored.
    """
    changes = {}
    for name, value in current.items():
        if name in recorded and recorded[name] != value:
            before, now = str(recorded[name]) or "none", str(value) or "none"
            long = max(len(before), len(now)) > LONGEST
            changes[name] = f"different {name}" if long else f"{name} was {before} and is now {now}"
    return changes


def check_resume(run, recorded, current, *, remedy, is_fixed=lambda name: True):
    """Refuse to resume a run whose fixed settings have changed; report the other changes.

    run: the name in messages. recorded, current: name -> value. is_fixed: name -> whether a change
    is an error. remedy: what to do instead. The UserError names the first fixed setting that
    differs, both values and the remedy.
    """
    changes = differences(recorded, current)
    for name, change in changes.items():
        if is_fixed(name):
            raise UserError(f"{run} cannot be resumed: {change}; {remedy}")
    for change in changes.values():
        RUN.note(f"changed on resume: {change}")


@contextmanager
def restoring(path, remedy):
    """Raise UserError if, in the block, a checkpoint does not have the expected content."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise UserError(f"{path} is damaged and cannot be resumed; {remedy}") from e
