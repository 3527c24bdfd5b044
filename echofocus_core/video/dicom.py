"""Read DICOM: headers, frames, and the files that form one cine.

    file -> DicomFile: header and pixel data -> open_frames: check the kind, find the frames
         -> choose_rule -> uint8 (H, W, 3) BGR, one after the other
    headers of a study -> read_header_facts -> group_stills: single frames that form a cine

Messages contain only numbers and names of standard values (transfer syntax, modality, ...) of a
header. pydicom's messages quote other values, so they are neither shown nor passed on.
"""

import hashlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from echofocus_core.video import codecs, colour
from echofocus_core.video.containers import iter_container
from echofocus_core.video.errors import VideoError, check_budget, open_file

# pydicom's warnings and log messages quote the header.
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module="pydicom")

BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN, DEFLATED)
RLE, JPEG = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4"
LOSSLESS = (*NATIVE, RLE, *(f"{JPEG}.{n}" for n in (57, 70, 80, 90, 92, 201, 202)))
VIDEO = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.10[0-8](\.1)?")  # MPEG-2, H.264, HEVC
M_MODE, SPECTRAL = 2, 3  # RegionSpatialFormat (C.8.5.5.1.1); 1 is 2-D, colour Doppler too
ITEM_END = b"\xfe\xff\xdd\xe0"  # the end of the sequence of fragments

# The start of a file without a preamble: an element (0002,00xx) or (0008,00xx), then its VR, or its
# length if that is small.
BARE_DICOM = re.compile(
    rb"[\x02\x08]\0[\x00-\x1f]\0(AE|CS|DA|LO|OB|SH|TM|UI|UL|[\x00-\xff][\0-\x02]\0\0)"
    rb"|\0\x08\0[\x00-\x1f](AE|CS|DA|LO|SH|TM|UI|UL)",  # big-endian
    re.DOTALL,
)


def is_dicom(path):
    """Whether a file starts with DICOM's preamble of 128 bytes and 'DICM', or with a first element.

    Old exports have no preamble and start with an element of group 0002 or 0008.
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
    "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "SequenceOfUltrasoundRegions", 0x30011001,
    "FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate",
    *(f"{segmented}{name}PaletteColorLookupTableData" for name in ("Red", "Green", "Blue")
      for segmented in ("", "Segmented")),
    *(f"{name}PaletteColorLookupTableDescriptor" for name in ("Red", "Green", "Blue")),
)  # fmt: skip
FACTS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "InstanceNumber",
         "NumberOfFrames", "Rows", "Columns", "PatientID", "PatientName",
         "LossyImageCompression")  # fmt: skip


class DicomFile:
    """An open DICOM file, with or without a preamble: its header and pixel data.

    header: a pydicom Dataset of the given tags only. A file without a transfer syntax is read as
    uncompressed, the standard's default. Raises VideoError if the header is malformed. Use it as a
    context manager, which closes the file.
    """

    def __init__(self, path, tags=TAGS):
        self.file = open_file(path)
        try:
            self.header = read_header(self.file, tags, stop_before_pixels=True)
            self.syntax = self.header.file_meta.TransferSyntaxUID
            self.pixels_at = self.file.tell()
        except Exception as error:  # pydicom raises many kinds on malformed headers
            self.file.close()
            if isinstance(error, OSError) and error.errno:  # from the operating system
                raise
            raise VideoError("unreadable DICOM header") from error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def pixel_data(self):
        """(file, position of the pixel data in it, their length or None for fragments, whether they
        are 16-bit words)."""
        if self.syntax == DEFLATED:
            self.file.seek(0)
            try:
                data = read_header(self.file, ["PixelData"]).PixelData
            except Exception as error:
                raise VideoError("truncated: the pixel data are missing") from error
            return io.BytesIO(data), 0, len(data), False
        self.file.seek(self.pixels_at)
        order = "big" if self.syntax == BIG_ENDIAN else "little"
        head = self.file.read(12)
        tag = [int.from_bytes(head[i : i + 2], order) for i in (0, 2)]
        if len(head) < 12 or tag != [0x7FE0, 0x0010]:
            raise VideoError("truncated: the pixel data are missing")
        vr, start, length = head[4:6], self.pixels_at + 12, head[8:12]
        # Some programs write the pixel data without VR into a file with VR.
        if self.header.original_encoding[0] or not (vr.isalpha() and vr.isupper()):
            vr, start, length = b"", start - 4, head[4:8]
        length = int.from_bytes(length, order)
        if length == 0xFFFFFFFF:
            return self.file, start, None, False
        if start + length > self.file.seek(0, os.SEEK_END) + 1:  # the padding byte may be missing
            raise VideoError("truncated: the pixel data are incomplete")
        return self.file, start, length, vr == b"OW"

    def fragments(self):
        """The fragments of compressed pixel data, without the offset table, which may be wrong."""
        from pydicom.encaps import generate_fragments

        file, start, _, _ = self.pixel_data()
        file.seek(start)
        try:
            fragments = list(generate_fragments(file))[1:]
        except ValueError:
            fragments = []
        file.seek(max(start, file.tell() - 4))
        if not fragments or file.read(4) != ITEM_END:
            raise VideoError("truncated: the pixel data are incomplete")
        return fragments


def read_header(file, tags, **options):
    """The pydicom Dataset of these tags, with a transfer syntax."""
    import pydicom

    header = pydicom.dcmread(file, force=True, specific_tags=list(tags), **options)
    if not re.fullmatch(r"[0-9.]+", text(header.file_meta, "TransferSyntaxUID")):
        implicit, little = header.original_encoding
        syntax = NATIVE[0] if implicit else NATIVE[1] if little else BIG_ENDIAN
        header.file_meta.TransferSyntaxUID = syntax
    return header


def element(header, name, convert, default):
    """An element's converted value; the default if it is absent or malformed."""
    try:
        return convert(header[name].value)
    except Exception:  # pydicom parses a value when it is read
        return default


def number(header, name):
    """An element's value as an int; None if it is absent or not a whole number."""
    return element(header, name, int, None)


def text(header, name):
    """A text element's value, for comparison only, never for output; '' if it is absent."""
    return element(header, name, lambda value: str(value or "").strip(" \0"), "")


def regions(header):
    """The datasets of SequenceOfUltrasoundRegions; [] if it is absent or malformed."""
    return element(header, "SequenceOfUltrasoundRegions", list, [])


# ----------------------------------------------------------------------------- headers for grouping


@dataclass(frozen=True)
class HeaderFacts:
    """Header values by which files are grouped; '' or 0 if absent or unreadable."""

    study_uid: str = ""  # '' if invalid; in outputs only if the user asks for it
    series_uid: str = ""
    sop_uid: str = ""
    instance_number: int | None = None
    n_frames: int = 0  # as declared; 1 if the header does not declare it
    rows: int = 0
    columns: int = 0
    patient: str = field(default="", repr=False)  # PatientID; compared but never shown
    patient_name: str = field(default="", repr=False)  # compared but never shown
    lossy: bool = False  # compressed with loss, now or earlier
    bad_uid: bool = False  # it has an invalid StudyInstanceUID


def read_header_facts(path):
    """The HeaderFacts of a file; with empty values if it is not a readable DICOM file."""
    if not is_dicom(path):
        return HeaderFacts()
    try:
        with DicomFile(path, FACTS) as dicom:
            header = dicom.header
    except (VideoError, OSError):
        return HeaderFacts()
    rows, columns = number(header, "Rows"), number(header, "Columns")
    declared = number(header, "NumberOfFrames")
    study, series, sop = (short_text(header, name) for name in FACTS[:3])
    lossless = dicom.syntax in LOSSLESS and text(header, "LossyImageCompression") != "01"
    return HeaderFacts(
        study if is_uid(study) else "",
        series,
        sop if is_uid(sop) else "",
        instance_number=number(header, "InstanceNumber"),
        n_frames=(1 if declared is None else declared) if rows else 0,
        rows=rows or 0,
        columns=columns or 0,
        patient=short_text(header, "PatientID"),
        patient_name=text(header, "PatientName"),
        lossy=not lossless,
        bad_uid=bool(study) and not is_uid(study),
    )


def is_uid(text):
    """Whether a text is a valid UID other than 0."""
    return text != "0" and bool(re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))*", text, re.ASCII))


def short_text(header, name):
    """A text element's value; its SHA-256 if it has over 64 or unprintable characters."""
    value = text(header, name)
    if len(value) <= 64 and value.isprintable():
        return value
    return hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()


def short_digest(text):
    """Eight hex digits of the SHA-256 of a text that must not be in outputs."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def group_stills(facts):
    """Cines that were stored as series of single-frame files: {name: list of files}.

    facts: {POSIX path relative to the study's folder: HeaderFacts}. A cine consists of all files of
    one study and one SeriesInstanceUID, if there are two or more and each is a single frame of the
    same size with a different InstanceNumber; the list is sorted by that number. Its name is
    `<their folder>/series-<digest of the UID>`. `VideoFile` reads such a list as one video, and
    refuses images that are not consecutive frames, since stills can form a series too.
    """
    series = {}
    for path, file in facts.items():
        if file.series_uid and file.n_frames:
            series.setdefault((file.study_uid, file.series_uid), {})[path] = file
    cines = {}
    for (_, series_uid), files in series.items():
        copies = {file.sop_uid or path: path for path, file in sorted(files.items(), reverse=True)}
        files = {path: files[path] for path in copies.values()}  # each image once
        numbers = {file.instance_number for file in files.values()}
        same_size = len({(file.rows, file.columns) for file in files.values()}) == 1
        single = all(file.n_frames == 1 for file in files.values())
        if len(files) > 1 and same_size and single and len(numbers - {None}) == len(files):
            folder = os.path.commonpath([PurePosixPath(p).parent for p in files])
            name = str(PurePosixPath(folder) / f"series-{short_digest(series_uid)}")
            cines[name] = sorted(files, key=lambda p: files[p].instance_number)
    return cines


# ------------------------------------------------------------------------------------ kind of image

US = {f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("3", "3.1", "6", "6.1")}  # 3, 6: retired
SECONDARY_CAPTURE = {f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("7", "7.1", "7.2", "7.3", "7.4")}
# Modalities other than 2-D echo. Messages show no other value, since the tag can hold any text.
OTHER_MODALITIES = {
    "AR", "BI", "BMD", "CR", "CT", "DG", "DOC", "DX", "ECG", "EPS", "ES", "FID", "GM", "HC", "HD",
    "IO", "IVOCT", "IVUS", "KER", "KO", "LS", "MG", "MR", "NM", "OCT", "OP", "OPT", "PR", "PT",
    "PX", "REG", "RF", "RG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTSTRUCT", "SEG", "SM", "SR", "TG",
    "XA", "XC",
}  # fmt: skip


def check_kind(header, notes):
    """VideoError if the header is not that of a 2-D echo; a note if it does not say so clearly.

    The SOP class must be ultrasound or secondary capture, and the modality ultrasound. Values that
    the standard does not define are ignored.
    """
    from pydicom.uid import UID_dictionary

    sop_class, modality = text(header, "SOPClassUID"), text(header, "Modality").upper()
    if not sop_class:
        sop_class = text(header.file_meta, "MediaStorageSOPClassUID")
    if sop_class in UID_dictionary and sop_class not in US | SECONDARY_CAPTURE:
        name = UID_dictionary[sop_class][0].removesuffix(" Storage")
        raise VideoError(f"not an ultrasound cine: {name}")
    if modality in OTHER_MODALITIES:
        raise VideoError(f"not an ultrasound cine: {modality}")
    if sop_class in SECONDARY_CAPTURE:
        notes.append("secondary capture")
    elif sop_class not in US and modality != "US":
        notes.append("the header does not say that it is ultrasound")
    if 0x30011001 in header:  # one vendor's Cartesian export: slices of volumes
        raise VideoError("not an ultrasound cine: 3-D ultrasound volumes")
    formats = {number(r, "RegionSpatialFormat") for r in regions(header)}
    if M_MODE in formats:
        raise VideoError("M-mode, not a cine")
    if SPECTRAL in formats:
        raise VideoError("spectral Doppler, not a cine")


def frame_rates(header):
    """Frames per second from each of the four tags; some may be 0 or None."""
    times = [
        element(header, "FrameTime", float, 0),
        element(header, "FrameTimeVector", lambda values: np.mean(values[1:], dtype=float), 0),
    ]
    rates = [1000 / t for t in times if t > 0]
    return [*rates, number(header, "CineRate"), number(header, "RecommendedDisplayFrameRate")]


def region_boxes(header):
    """The 2-D ultrasound regions as (x0, y0, x1, y1), in shares of the image's width and height.

    Empty if the header has none, or if one is not inside the image (some exports shrink the image
    and do not change the tags).
    """
    width, height, boxes = number(header, "Columns"), number(header, "Rows"), []
    names = [f"RegionLocation{n}" for n in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
    for region in regions(header):
        x0, y0, x1, y1 = corners = [number(region, name) for name in names]
        if number(region, "RegionSpatialFormat") != 1 or None in corners:
            continue
        if not (0 <= x0 < x1 < width and 0 <= y0 < y1 < height):
            return []
        boxes.append((x0 / width, y0 / height, (x1 + 1) / width, (y1 + 1) / height))
    return boxes


# ------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class PixelHeader:
    """The pixel format that a header declares, checked for impossible values."""

    frames: int
    rows: int
    columns: int
    samples: int
    allocated: int  # bits of a component
    stored: int
    planar: bool
    photometric: str

    @classmethod
    def of(cls, header):
        """Read it from a header. Raises VideoError for values that no ultrasound image has."""
        rows, columns = number(header, "Rows"), number(header, "Columns")
        photometric = text(header, "PhotometricInterpretation").upper()
        if not rows or not columns or not photometric:
            raise VideoError("truncated, or DICOM without an image")
        check_budget(1, rows, columns)
        if photometric not in colour.DECLARED:
            raise VideoError("unknown photometric interpretation")
        if number(header, "PixelRepresentation"):
            raise VideoError("signed pixel values: not an ultrasound image")
        allocated = number(header, "BitsAllocated") or 8
        stored = number(header, "BitsStored") or allocated
        high = number(header, "HighBit")
        samples = number(header, "SamplesPerPixel") or 1
        if allocated not in (8, 16) or samples not in (1, 3):
            raise VideoError(f"pixels of {samples} components of {allocated} bits")
        if allocated > 8 and (not 8 <= stored <= allocated or high not in (None, stored - 1)):
            raise VideoError(f"BitsStored {stored} and HighBit {high} of {allocated} bits")
        planar = number(header, "PlanarConfiguration") == 1
        frames = number(header, "NumberOfFrames") or 1
        return cls(frames, rows, columns, samples, allocated, stored, planar, photometric)


@dataclass(frozen=True)
class Frames:
    """The frames of a cine, each read and decoded on demand."""

    header: PixelHeader
    layout: colour.Layout | None  # of uncompressed frames; compressed ones declare their own
    n: int
    stored: Callable  # a frame's number -> its bytes
    palette: tuple | None = None  # see `colour.read_palette`

    def __len__(self):
        return self.n

    def format_of(self, data):
        """The FrameFormat of a compressed frame. VideoError unless it has the declared size."""
        h, form = self.header, codecs.read_format(data)
        if form.kind == "RLE":
            bits = h.stored if h.allocated > 8 else 8
            return replace(form, rows=h.rows, columns=h.columns, samples=h.samples, bits=bits)
        check_budget(1, form.rows, form.columns)
        if (form.rows, form.columns) != (h.rows, h.columns):
            raise VideoError(
                f"the header is wrong: it declares {h.rows} x {h.columns} pixels, a frame has "
                f"{form.rows} x {form.columns}"
            )
        if form.samples not in (1, 3):
            raise VideoError(f"pixels of {form.samples} components")
        return form

    def check_decoder(self):
        """VideoError if no decoder for the first frame is installed."""
        if self.layout is None:
            with self.named_errors(0):
                form = self.format_of(self.stored(0))
                if not form.opencv:
                    codecs.find_decoder(form)

    def check_layout(self, samples):
        """VideoError if frames are not in the declared layout. samples: {number: components}."""
        h, layout, frames = self.header, self.layout, [self.stored(i) for i in samples]
        if layout is None:
            if not codecs.is_rle(frames[0]):
                return  # other formats declare their layout themselves
            frames = [frame.tobytes() for frame in samples.values()]
            dtype = "u1" if samples[0].itemsize == 1 else "<u2"
            layout = colour.Layout(h.rows, h.columns, h.samples, dtype)
        layout.check(frames)

    @contextmanager
    def named_errors(self, i):
        """Convert errors in the block to a VideoError that names frame i and quotes nothing."""
        place = f"frame {i + 1} of {len(self)} does not decode"
        try:
            yield
        except VideoError:
            raise
        except codecs.FrameError as error:
            raise VideoError(f"{place}: {error}") from error
        except Exception as error:  # decoders raise many kinds
            raise VideoError(place) from error

    def components(self, i, small=False):
        """Components (H, W) or (H, W, 3) of frame i; small: fewer pixels, where that is faster."""
        with self.named_errors(i):
            data = self.stored(i)
            if self.layout:
                return self.layout.components(data)
            form = self.format_of(data)
            if not form.opencv:
                return codecs.decode_other(data, form)
            frame = codecs.decode_jpeg(data, form, 0, small)
            return frame[:, :, 0] if form.samples == 1 else frame[:, :, ::-1]

    def check(self, i):
        """VideoError if frame i is compressed and does not decode."""
        if self.layout is None:
            self.components(i, small=True)

    def bgr(self, i, rule):
        """Frame i, uint8 (H, W, 3) BGR. VideoError if it does not decode."""
        if rule.colour == "YBR" and self.layout is None:
            with self.named_errors(i):
                form = self.format_of(data := self.stored(i))
                if form.kind == "JPEG":  # its decoder also converts the colours
                    return codecs.decode_jpeg(data, form, 1)
        return rule.bgr(self.components(i))


def native_frames(dicom, header):
    """The uncompressed Frames of a DicomFile. VideoError if they do not fill the pixel data."""
    h, big = header, dicom.syntax == BIG_ENDIAN
    file, start, length, words = dicom.pixel_data()
    dtype = "u1" if h.allocated == 8 else ">u2" if big else "<u2"
    layouts = [colour.Layout(h.rows, h.columns, h.samples, dtype, h.planar)]
    if h.photometric == "YBR_FULL_422" and (h.samples, dtype, h.columns % 2) == (3, "u1", 0):
        layouts.append(replace(layouts[0], planar=False, halved=True))  # both are common
    fitting = [x for x in layouts if 0 <= length - x.size * h.frames <= 1]  # 1: padding
    if not fitting:
        raise VideoError(
            f"the header is wrong: {h.frames} frames of {h.rows} x {h.columns} pixels have "
            f"{layouts[0].size * h.frames:,} bytes, the pixel data {length:,}"
        )
    layout = fitting[0]
    swapped = big and words and dtype == "u1"  # each word holds two pixels
    if swapped and layout.size % 2:
        raise VideoError("frames of odd size in big-endian words")

    def stored(i):
        file.seek(start + i * layout.size)
        data = file.read(layout.size)
        return np.frombuffer(data, "u2").byteswap().tobytes() if swapped else data

    return Frames(header, layout, h.frames, stored)


def coded_frames(dicom, header, notes):
    """The compressed Frames of a DicomFile."""
    frames = join_fragments(dicom.fragments(), header.frames)
    n = len(frames)
    if 1 < n < header.frames:
        raise VideoError(f"truncated: {n} of {header.frames} frames in the pixel data")
    if n > header.frames:
        notes.append(f"NumberOfFrames is wrong: {n} frames in the pixel data")
    return Frames(header, None, n, frames.__getitem__)


def join_fragments(fragments, declared):
    """The bytes of each frame: one fragment if there are as many as declared frames, else all
    fragments from one with a start marker to the next such."""
    if len(fragments) == declared:
        return fragments
    frames = []
    for fragment in fragments:
        if codecs.is_start(fragment) or not frames:
            frames.append([])
        frames[-1].append(fragment)
    return [b"".join(parts) for parts in frames]


def open_frames(dicom, notes, single=False):
    """The Frames of a DicomFile; None if the pixel data are a video stream.

    single: the file is one frame of a series. Raises VideoError for stills and for everything but
    2-D echo, as far as this can be detected before a frame is decoded.
    """
    check_kind(dicom.header, notes)
    if VIDEO.fullmatch(dicom.syntax):
        return None
    header = PixelHeader.of(dicom.header)
    if dicom.pixel_data()[2] is None:
        frames = coded_frames(dicom, header, notes)
    elif dicom.syntax in NATIVE:
        frames = native_frames(dicom, header)
    else:
        raise VideoError("the header is wrong: it declares compression, the pixel data have none")
    check_budget(len(frames))
    if len(frames) == 1 and not single:
        more = ", though the header declares more frames" if header.frames > 1 else ""
        raise VideoError(f"still image{more}")
    frames.check_decoder()
    if header.photometric == "PALETTE COLOR":
        frames = replace(frames, palette=colour.read_palette(dicom.header))
    return frames


def choose_rule(frames, notes):
    """The ColourRule for all frames, chosen from a few of them. Raises VideoError."""
    header, few = frames.header, representative_frames(frames)
    frames.check_layout(few)
    samples = list(few.values())
    rule = colour.choose_rule(header.photometric, samples, header.stored, frames.palette, notes)
    if frames.layout and frames.layout.halved and rule.colour != "YBR":
        raise VideoError("the header is wrong: RGB pixels with the size of 4:2:2 pixels")
    rest = (frames.components(i, small=True) for i in range(len(frames)))
    if all(rule.bgr(sample).max() < colour.BLACK for sample in chain(samples, rest)):
        raise VideoError("no image: all frames are black")
    return rule


def representative_frames(frames):
    """{number: components} of the few frames that decide how the file is read: the first, middle
    and last one, and if these are blank, the first that is not."""
    n = len(frames)
    few = {i: frames.components(i, small=True) for i in sorted({0, n // 2, n - 1})}
    if any(map(has_contrast, few.values())):
        return few
    for i in range(n):
        image = frames.components(i, small=True)
        if has_contrast(image):
            return few | {i: image}
    return few


def has_contrast(components):
    """Whether a frame has more than one grey level or colour."""
    pixels = components.reshape(components.shape[0] * components.shape[1], -1)
    return int(np.ptp(pixels, 0).max()) >= colour.BLACK


# ------------------------------------------------------------------------------------------- a cine


def iter_dicom(dicom, notes, needed=None):
    """Decode the cine of a DicomFile front to back: yields uint8 (H, W, 3) BGR.

    notes, needed: see `VideoFile.frames`. Raises VideoError for everything but 2-D echo, for stills
    and damaged files, and if a decoder is missing.
    """
    frames = open_frames(dicom, notes)
    if frames is None:
        yield from iter_stream(dicom, notes)
        return
    rule, n = choose_rule(frames, notes), len(frames)
    used = set(needed(n) if needed else range(n))
    for i in range(n):
        yield frames.bgr(i, rule) if i in used else frames.check(i)


def iter_stream(dicom, notes):
    """Decode pixel data that are a video stream: yields uint8 (H, W, 3) BGR.

    The stream is copied to a file, if possible without a name: the system deletes such a file when
    this process ends for any reason.
    """
    nameless = Path("/proc/self/fd").is_dir()
    with (tempfile.TemporaryFile if nameless else tempfile.NamedTemporaryFile)() as stream:
        stream.writelines(dicom.fragments())
        stream.flush()
        path = Path(f"/proc/self/fd/{stream.fileno()}" if nameless else stream.name)
        n, container_notes = 0, []
        for frame in iter_container(path, container_notes):
            n += 1
            yield frame
    if n != number(dicom.header, "NumberOfFrames"):
        notes.append(f"NumberOfFrames is wrong: {n} frames decode")


def read_single_frame(path, notes):
    """(Frames, the frame's bytes) of a file of a series. Raises VideoError unless it has one."""
    with DicomFile(path) as dicom:
        frames = open_frames(dicom, notes, single=True)
        if frames is None or len(frames) > 1:
            raise VideoError("several frames in a file of a series")
        return frames, frames.stored(0)


def iter_series(paths, notes):
    """Decode single-frame files (see `group_stills`) as one cine: yields uint8 (H, W, 3) BGR.

    Raises VideoError if their formats differ, or if they are not consecutive frames, such as
    several stills of one series.
    """
    first, _ = read_single_frame(paths[0], notes)

    def stored(i):
        frames, data = read_single_frame(paths[i], [])
        formats = {
            (f.header, f.layout, f.palette and (f.palette[0], f.palette[1].tobytes()))
            for f in (first, frames)
        }
        if len(formats) > 1:
            raise VideoError("a series of images in different formats")
        return data

    frames, small = replace(first, n=len(paths), stored=stored), []
    rule = choose_rule(frames, notes)
    for i in range(len(frames)):
        frame = frames.bgr(i, rule)
        small.append(block_means(frame))
        yield frame
    if not is_one_cine(np.stack(small)):
        raise VideoError(f"still images of one series: {len(small)}, not consecutive frames")
    notes.append(f"single frames of one series: {len(small)}")


def block_means(frame):
    """uint8 (H, W, 3) -> float (256,): the brightness of 16 x 16 blocks."""
    import cv2

    blocks = cv2.resize(frame.max(2), (16, 16), interpolation=cv2.INTER_AREA)
    return blocks.reshape(-1).astype(float)


def is_one_cine(images):
    """Whether images (n, blocks) are consecutive frames: each is similar to the one before.

    Measured on cines: successive differences from the mean image correlate at 0.5 or more, or the
    images are nearly equal. On stills of one machine and view: 0.03 at most, and the images
    correlate at less than 0.92.
    """
    differences = images - images.mean(0)
    power = (differences**2).mean()
    continuity = (differences[1:] * differences[:-1]).mean() / power if power else 1.0
    similarity = np.median([np.corrcoef(a, b)[0, 1] for a, b in pairwise(images)])
    return continuity > 0.3 or similarity > 0.95
