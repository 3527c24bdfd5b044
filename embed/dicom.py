"""DICOM in: what a header says, and which files are one cine.

    file -> is_dicom -> open_dicom: (header, file at its pixels)
    headers of a study -> read_header_facts -> group_stills: single frames that make a cine

A header is a claim that someone's software made. Nothing of it but numbers that were counted and
names of known values (transfer syntax, modality, ...) leaves this file: pydicom's messages quote
what stands in tags, so they are neither shown nor passed on.
"""

import hashlib
import logging
import os
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import PurePosixPath

# pydicom warns of odd values by quoting them, on standard error and in its log.
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module="pydicom")

HEADER_BYTES = 64 << 20  # no one element before the pixels is larger

# Without the 128 bytes before it: a first element (0002,00xx) or (0008,00xx), then its VR, or (two
# bytes of) a small length and two zeros.
BARE_DICOM = re.compile(
    rb"[\x02\x08]\0[\x00-\x1f]\0(AE|CS|DA|LO|OB|SH|TM|UI|UL|[\x00-\xff][\0-\x02]\0\0)", re.DOTALL
)


class VideoError(ValueError):
    """Why a file gives no clips: a short reason for the list that the user sees."""


class NotNow(VideoError):
    """A reason that may pass, such as a decoder that is not installed: tried again another time."""


class SourceGone(NotNow):
    """A file that was there cannot be reached any more, as when a mount vanishes: not its fault."""


def open_file(path):
    """Open a regular file for reading. OSError; VideoError for a pipe, device or folder.

    Opening a pipe without a writer would wait for one, and a device has no end.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise VideoError("not a regular file")
    return os.fdopen(file, "rb")


def is_dicom(path):
    """Whether the file starts as DICOM Part 10 does (128 bytes, then 'DICM'), or is one without.

    Old exports leave that start out and begin with their first element, of group 0002 or 0008.
    """
    try:
        with open_file(path) as f:
            head = f.read(132)
    except (OSError, VideoError):
        return False
    return head[128:] == b"DICM" or bool(BARE_DICOM.match(head))


# --------------------------------------------------------------------------------- whose file it is


@dataclass(frozen=True)
class HeaderFacts:
    """What grouping needs of a header; '' or 0 where it is absent or cannot be read."""

    study_uid: str = ""  # as in the file: not for outputs, unless the user asks for it
    series_uid: str = ""
    sop_uid: str = ""
    instance: int | None = None  # InstanceNumber
    n_frames: int = 0  # as declared; 1 where the header does not say
    rows: int = 0
    columns: int = 0
    patient: str = ""  # a digest of the PatientID: to compare, never to show


def read_header_facts(path):
    """The HeaderFacts of any file; all empty when it is no DICOM, or none that can be read."""
    if not is_dicom(path):
        return HeaderFacts()
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "InstanceNumber",
             "NumberOfFrames", "Rows", "Columns", "PatientID")  # fmt: skip
    try:
        with open_file(path) as f:
            import pydicom

            header = pydicom.dcmread(f, force=True, stop_before_pixels=True, specific_tags=names)
    except Exception:  # pydicom raises many kinds on malformed headers
        return HeaderFacts()
    rows, columns = number(header, "Rows"), number(header, "Columns")
    declared = number(header, "NumberOfFrames")
    return HeaderFacts(
        *(uid(header, name) for name in names[:3]),
        instance=number(header, "InstanceNumber"),
        n_frames=(1 if declared is None else declared) if rows else 0,
        rows=rows or 0,
        columns=columns or 0,
        patient=short_digest(patient) if (patient := uid(header, "PatientID")) else "",
    )


def number(header, name):
    """An element's value as an int, None when it is absent or no whole number."""
    try:
        return int(header[name].value)
    except Exception:  # pydicom converts values only now
        return None


def uid(header, name):
    """An element's value as a text of 64 characters at most (its digest if longer, or odd)."""
    try:
        text = str(header[name].value or "").strip(" \0")
    except Exception:
        return ""
    if len(text) <= 64 and text.isprintable():
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def short_digest(text):
    """Eight hex digits that stand for a text which outputs must not hold."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def group_stills(facts):
    """Cines that were stored as single-frame series: dict of name to the list of their files.

    facts: dict of POSIX path (relative to whatever the names shall be) to HeaderFacts. A cine is
    all files of one study and one SeriesInstanceUID, if there are two or more, each a single frame
    of the same size with an InstanceNumber of its own; the files come in the order of those. Its
    name is `<their folder>/series-<digest of the UID>`. `iter_frames` reads such a list as one
    video, and refuses one whose images do not follow one another: stills have series too.
    """
    series = {}
    for path, file in facts.items():
        if file.series_uid and file.n_frames:
            series.setdefault((file.study_uid, file.series_uid), {})[path] = file
    cines = {}
    for (_, series_uid), files in series.items():
        copies = {file.sop_uid or path: path for path, file in sorted(files.items(), reverse=True)}
        files = {path: files[path] for path in copies.values()}  # each image once
        numbers = {file.instance for file in files.values()}
        alike = len({(file.rows, file.columns) for file in files.values()}) == 1
        single = all(file.n_frames == 1 for file in files.values())
        if len(files) > 1 and alike and single and len(numbers - {None}) == len(files):
            folder = os.path.commonpath([PurePosixPath(p).parent for p in files])
            name = str(PurePosixPath(folder) / f"series-{short_digest(series_uid)}")
            cines[name] = sorted(files, key=lambda p: files[p].instance)
    return cines
