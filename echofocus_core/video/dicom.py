"""DICOM in: what a header says, what is in the file, and which files are one cine.

    file -> open_dicom: (header, file) -> check_kind: an echo? -> frames_of: where the frames lie
         -> choose_reading -> iter_dicom: uint8 (H, W, 3) BGR, one after the other
    headers of a study -> read_header_facts -> group_stills: single frames that make a cine

A header is a claim that someone's software made. Nothing of it but numbers that were counted and
names of known values (transfer syntax, modality, ...) leaves this file: pydicom's messages quote
what stands in tags, so they are neither shown nor passed on.
"""

import hashlib
import io
import logging
import math
import os
import re
import tempfile
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from echofocus_core.video.containers import iter_container
from echofocus_core.video.errors import VideoError, open_file
from echofocus_core.video.frames import (
    BIG_ENDIAN,
    NATIVE,
    OVERLAY_BITS,
    Frames,
    choose_reading,
    fragments,
    frames_of,
    number,
    palette_of,
    pixel_element,
    text,
)

# pydicom warns of odd values by quoting them, on standard error and in its log.
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module="pydicom")

DEFLATED = "1.2.840.10008.1.2.1.99"
VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.10[0-8](\.1)?")  # MPEG-2, H.264, HEVC
HEADER_BYTES = 64 << 20  # of all that are read
HEADER_READS = 300_000  # two an element
REGION_BYTES = 1 << 16  # of the sequence of regions, 300 each
INFLATED_BYTES = 1 << 30  # of a deflated file, at most
INFLATION = 100  # times its size and HEADER_BYTES, at most: cines have noise
M_MODE, SPECTRAL = 2, 3  # RegionSpatialFormat (C.8.5.5.1.1); 1 is 2-D, colour Doppler too

# Without the 128 bytes before it: a first element (0002,00xx) or (0008,00xx), then its VR, or (two
# bytes of) a small length and two zeros.
BARE_DICOM = re.compile(
    rb"[\x02\x08]\0[\x00-\x1f]\0(AE|CS|DA|LO|OB|SH|TM|UI|UL|[\x00-\xff][\0-\x02]\0\0)"
    rb"|\0\x08\0[\x00-\x1f](AE|CS|DA|LO|SH|TM|UI|UL)",  # big-endian
    re.DOTALL,
)


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


# ------------------------------------------------------------------------------------- header, file

TAGS = (
    "SOPClassUID", "Modality", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "SequenceOfUltrasoundRegions", 0x30011001, *OVERLAY_BITS,
    *(f"{segmented}{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")
      for segmented in ("", "Segmented")),
    "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
)  # fmt: skip


class Bounded:
    """A file whose header is read in bounded memory and time, whatever it claims."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.reads = self.size = 0
        self.fault = ""  # kept: pydicom makes an error of its own of some that it meets

    def read(self, size=-1):
        self.reads += 1
        self.size += size
        if not 0 <= size <= HEADER_BYTES:
            self.fault = "an element of the header is too large"
        elif self.reads > HEADER_READS or self.size > HEADER_BYTES:
            self.fault = "a header of too many elements"
        if self.fault:
            raise VideoError(self.fault)
        return self.file.read(size)


@contextmanager
def open_dicom(path, tags=TAGS, pixels=True):
    """(header of these tags alone, the file at its pixels). VideoError when it is malformed.

    Files without the DICOM start and deflated files (inflated in memory) too; without `pixels` the
    file may end before them. Without a transfer syntax the header's is uncompressed, the standard's
    default.
    """
    import pydicom

    bounded = None
    with open_file(path) as file:
        try:
            file = inflated(file, pixels) or file
            bounded = Bounded(file)
            header = pydicom.dcmread(
                bounded, force=True, stop_before_pixels=True, specific_tags=list(tags)
            )
            syntax = text(header.file_meta, "TransferSyntaxUID")
            if not re.fullmatch(r"[0-9.]+", syntax):
                implicit, little = header.original_encoding
                syntax = NATIVE[0] if implicit else NATIVE[1] if little else BIG_ENDIAN
            header.file_meta.TransferSyntaxUID = syntax
        except VideoError:
            raise
        except Exception as error:  # pydicom raises many kinds on malformed headers
            if isinstance(error, OSError) and error.errno:  # the system's
                raise
            raise VideoError((bounded and bounded.fault) or "unreadable DICOM header") from error
        yield header, file


def inflated(file, pixels):
    """A deflated file's content as an uncompressed one in memory; None for another, rewound.

    Without `pixels` as much of it as a header may take."""
    from pydicom.filereader import read_dataset

    beyond_meta = lambda tag, *_: tag >> 16 != 2  # noqa: E731
    part_10 = file.read(132)[128:] == b"DICM"
    meta = read_dataset(Bounded(file), False, True, stop_when=beyond_meta) if part_10 else {}
    start = file.tell()
    if text(meta, "TransferSyntaxUID") != DEFLATED:
        file.seek(0)
        return None
    size = os.fstat(file.fileno()).st_size
    if size > INFLATED_BYTES:
        raise VideoError("a deflated file that is too large")
    most = min(INFLATED_BYTES, HEADER_BYTES + INFLATION * size) if pixels else HEADER_BYTES
    file.seek(start)
    zipped = zlib.decompressobj(-zlib.MAX_WBITS)
    data = zipped.decompress(file.read(most), most)
    if pixels and zipped.unconsumed_tail:
        raise VideoError("a deflated file that is too large")
    if pixels and not zipped.eof:
        raise VideoError("truncated: the deflated data break off")
    plain = b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
    return io.BytesIO(bytes(128) + b"DICM" + plain + data)


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
    patient: str = field(default="", repr=False)  # PatientID: to compare, never to show


def read_header_facts(path):
    """The HeaderFacts of any file; all empty when it is no DICOM, or none that can be read."""
    if not is_dicom(path):
        return HeaderFacts()
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "InstanceNumber",
             "NumberOfFrames", "Rows", "Columns", "PatientID")  # fmt: skip
    try:
        with open_dicom(path, names, pixels=False) as (header, _):
            pass
    except (VideoError, OSError):
        return HeaderFacts()
    rows, columns = number(header, "Rows"), number(header, "Columns")
    declared = number(header, "NumberOfFrames")
    return HeaderFacts(
        *(uid(header, name) for name in names[:3]),
        instance=number(header, "InstanceNumber"),
        n_frames=(1 if declared is None else declared) if rows else 0,
        rows=rows or 0,
        columns=columns or 0,
        patient=uid(header, "PatientID"),
    )


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


# ----------------------------------------------------------------------------- is it an echo at all

US = {f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("3", "3.1", "6", "6.1")}  # 3, 6: retired
SECONDARY_CAPTURE = {f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("7", "7.1", "7.2", "7.3", "7.4")}
OTHER_MODALITIES = {
    "AR": "autorefraction", "BI": "biomagnetic imaging", "BMD": "bone densitometry",
    "CR": "computed radiography", "CT": "computed tomography", "DG": "diaphanography",
    "DOC": "document", "DX": "digital radiography", "ECG": "electrocardiography",
    "EPS": "cardiac electrophysiology", "ES": "endoscopy", "FID": "fiducials",
    "GM": "general microscopy", "HC": "hard copy", "HD": "haemodynamic waveform",
    "IO": "intra-oral radiography", "IVOCT": "intravascular optical coherence tomography",
    "IVUS": "intravascular ultrasound", "KER": "keratometry", "KO": "key object selection",
    "LS": "laser surface scan", "MG": "mammography", "MR": "magnetic resonance",
    "NM": "nuclear medicine", "OCT": "optical coherence tomography",
    "OP": "ophthalmic photography",
    "OPT": "ophthalmic tomography", "PR": "presentation state",
    "PT": "positron emission tomography",
    "PX": "panoramic X-ray", "REG": "registration", "RF": "radio fluoroscopy",
    "RG": "radiographic imaging", "RTDOSE": "radiotherapy dose", "RTIMAGE": "radiotherapy image",
    "RTPLAN": "radiotherapy plan", "RTSTRUCT": "radiotherapy structures", "SEG": "segmentation",
    "SM": "slide microscopy", "SR": "structured report", "TG": "thermography",
    "XA": "X-ray angiography", "XC": "external-camera photography",
}  # fmt: skip


def check_kind(header, notes):
    """VideoError when the header is of something else than a 2-D echo; notes when it does not say.

    SOP class and modality must both be ultrasound, or a secondary capture of it, where they are
    values that are known.
    """
    from pydicom.uid import UID_dictionary

    sop_class, modality = text(header, "SOPClassUID"), text(header, "Modality").upper()
    if not sop_class:
        sop_class = text(header.file_meta, "MediaStorageSOPClassUID")
    if sop_class in UID_dictionary and sop_class not in US | SECONDARY_CAPTURE:
        name = UID_dictionary[sop_class][0].removesuffix(" Storage")
        raise VideoError(f"not an ultrasound cine: {name}")
    if modality in OTHER_MODALITIES:
        raise VideoError(f"not an ultrasound cine: {OTHER_MODALITIES[modality]}")
    if sop_class in SECONDARY_CAPTURE:
        notes.append("secondary capture")
    elif sop_class not in US and modality != "US":
        notes.append("the header does not say that it is ultrasound")
    if 0x30011001 in header:  # the Cartesian export of one maker: slices of volumes
        raise VideoError("not an ultrasound cine: 3-D ultrasound volumes")
    formats = {number(r, "RegionSpatialFormat") for r in regions(header)}
    if M_MODE in formats:
        raise VideoError("M-mode, not a cine")
    if SPECTRAL in formats:
        raise VideoError("spectral Doppler, not a cine")


def dicom_rates(header):
    """Frames a second as each of the four tags has it, 0 or None where it has none."""
    try:
        times = np.atleast_1d(np.asarray(header["FrameTime"].value, float))
    except Exception:  # absent, or text that is no number
        times = np.zeros(1)
    try:
        vector = np.asarray(header["FrameTimeVector"].value, float)
    except Exception:
        vector = np.zeros(1)
    milliseconds = [float(times[0]), float(vector[1:].mean()) if vector.size > 1 else 0.0]
    rates = [1000 / t if math.isfinite(t) and t > 0 else 0 for t in milliseconds]
    return [*rates, number(header, "CineRate"), number(header, "RecommendedDisplayFrameRate")]


def regions(header):
    """The datasets of SequenceOfUltrasoundRegions, [] when there are none that can be read."""
    try:
        raw = header.get_item("SequenceOfUltrasoundRegions")
        if len(raw.value) > REGION_BYTES:  # bytes as yet, or a sequence that was counted in reading
            raise VideoError("a header of too many elements")
        return list(header["SequenceOfUltrasoundRegions"].value)
    except VideoError:
        raise
    except Exception:
        return []


# ------------------------------------------------------------------------------------------- a cine


def iter_dicom(header, file, notes, needed=None):
    """Decode a DICOM cine (see `open_dicom`) front to back: yields uint8 (H, W, 3) BGR.

    notes, needed: see `VideoFile.frames`. Raises VideoError for what is no 2-D echo, a still,
    damaged, or needs a decoder.
    """
    frames = check_cine(header, file, notes)
    if frames is None:
        yield from iter_stream(file, header, notes)
        return
    with frames:
        reading, n = choose_reading(frames, header, notes), len(frames)
        made = set(needed(n) if needed else range(n))
        for i in range(n):
            yield frames.bgr(i, reading) if i in made else frames.check(i)


def check_cine(header, file, notes, single=False):
    """The Frames of a cine, None when they are one video stream. VideoError, as `iter_dicom`, for
    what shows before a frame is decoded. single: it is one frame of a series."""
    check_kind(header, notes)
    if VIDEO.fullmatch(header.file_meta.TransferSyntaxUID):
        return None
    frames = frames_of(file, header, notes)
    if len(frames) == 1 and not single:
        more = (frames.claims.frames or 1) > 1
        raise VideoError("still image, though the header says more" if more else "still image")
    frames.check_decoder()
    return frames


def iter_stream(file, header, notes):
    """A video file that is the pixel data: copied for the reader of such to a file without a name,
    which the system deletes with this process, however that ends."""
    start, length, _ = pixel_element(file, header)
    nameless = Path("/proc/self/fd").is_dir()
    with (tempfile.TemporaryFile if nameless else tempfile.NamedTemporaryFile)() as stream:
        for at, size in fragments(file, start, length)[0]:
            file.seek(at)
            stream.write(file.read(size))
        stream.flush()
        path, n = Path(f"/proc/self/fd/{stream.fileno()}" if nameless else stream.name), 0
        found = []
        for frame in iter_container(path, found):
            n += 1
            yield frame
    if n != number(header, "NumberOfFrames"):
        notes.append(f"NumberOfFrames is wrong: {n} frames decode")
    notes.extend(note for note in found if note.startswith("damaged"))


class SeriesFrames(Frames):
    """The single frames of a series, each in a file of its own."""

    def __init__(self, paths, notes):
        super().__init__(None, None, paths)
        self.notes, self.traits = notes, None

    @contextmanager
    def opened(self, i, notes=None):
        """(header, Frames of the one frame) of file i."""
        with open_dicom(self.spans[i]) as (header, file):
            check_kind(header, [] if notes is None else notes)
            frames = frames_of(file, header, [])
            self.claims = self.claims or frames.claims
            traits = traits_of(header, frames.claims)
            self.traits = self.traits or traits
            if len(frames) > 1 or traits != self.traits:
                raise VideoError("a series of unlike images")
            frames.listener = self.listener
            yield header, frames

    def components(self, i):
        with self.opened(i) as (_, frames):
            return frames.components(0)

    def sample(self, i):
        with self.opened(i) as (_, frames):
            return frames.sample(0)

    def bgr(self, i, reading):
        with self.opened(i) as (_, frames):
            return frames.bgr(0, reading)


def traits_of(header, claims):
    """What images must have in common to be read in one way."""
    palette = palette_of(header, claims)
    if palette:
        first, table, bits = palette
        palette = first, hashlib.sha256(table.tobytes()).digest(), bits
    shape = (claims.rows, claims.columns, claims.samples, claims.photometric)
    return (*shape, claims.allocated, claims.stored, palette)


def iter_series(paths, notes):
    """The single frames of a series (see `group_stills`), in that order, as one cine.

    VideoError when they do not follow one another, as stills of one series do not.
    """
    small = []
    with SeriesFrames(paths, notes) as frames:
        with frames.opened(0, notes) as (header, _):
            reading = choose_reading(frames, header, notes)
        for i in range(len(frames)):
            frame = frames.bgr(i, reading)
            small.append(in_blocks(frame))
            yield frame
    if not follow_on(np.stack(small)):
        raise VideoError(f"still images of one series: {len(small)} that do not follow one another")
    notes.append(f"single frames of one series: {len(small)}")


def in_blocks(frame):
    """uint8 (H, W, 3) -> float (256,): the brightness of 16 x 16 blocks."""
    import cv2

    blocks = cv2.resize(frame.max(2), (16, 16), interpolation=cv2.INTER_AREA)
    return blocks.reshape(-1).astype(float)


def follow_on(images):
    """Whether images (n, blocks) are of one cine: what changes goes on from each to the next.

    Measured on cines: a correlation of changes of 0.5 and more, or images that are nearly equal;
    on stills of one machine and view: 0.03 at most, and images less alike than 0.92.
    """
    changes = images - images.mean(0)
    power = (changes**2).mean()
    going_on = (changes[1:] * changes[:-1]).mean() / power if power else 1.0
    equal = np.median([np.corrcoef(a, b)[0, 1] for a, b in pairwise(images)])
    return going_on > 0.3 or equal > 0.95
