"""Where the frames of a DICOM file lie, counted in the file, and how each becomes an image.

header, file at its pixels -> frames_of: NativeFrames or CodedFrames
.sample(i): components for `pixels.choose_reading`; .bgr(i, reading): uint8 (H, W, 3) BGR
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from echofocus_core.video import colour as pixels
from echofocus_core.video.errors import FRAMES, VideoError, check_budget

BIG_ENDIAN = "1.2.840.10008.1.2.2"
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN)
NATIVE_PIECES = "1.2.840.10008.1.2.1.98"  # uncompressed, each frame a fragment
RLE = "1.2.840.10008.1.2.5"
FRAGMENTS = 40 * FRAMES  # pieces of compressed frames, at most
UNDEFINED = 0xFFFFFFFF
OVERLAY_BITS = tuple(0x60000102 + (i << 17) for i in range(16))  # OverlayBitPosition


def number(header, name):
    """An element's value as an int, None when it is absent or no whole number."""
    try:
        return int(header[name].value)
    except Exception:  # pydicom converts values only now
        return None


def text(header, name):
    """A text element's value for comparison with known ones, '' when it is absent."""
    try:
        return str(header[name].value or "").strip(" \0")
    except Exception:
        return ""


@dataclass(frozen=True)
class Claims:
    """What a header claims of its pixels, all of it possible."""

    frames: int | None
    rows: int
    columns: int
    samples: int
    allocated: int  # bits of a component
    stored: int
    overlays: tuple  # bits of a component that hold an overlay
    planar: bool
    photometric: str

    @classmethod
    def of(cls, header):
        rows, columns = number(header, "Rows"), number(header, "Columns")
        photometric = text(header, "PhotometricInterpretation").upper()
        if not rows or not columns or not photometric:
            raise VideoError("DICOM without image data, or cut short")
        check_budget(1, rows, columns)
        if photometric not in pixels.DECLARED:
            raise VideoError("photometric interpretation of an unknown value")
        if number(header, "PixelRepresentation"):
            raise VideoError("signed pixel values: not an ultrasound image")
        allocated = number(header, "BitsAllocated") or 8
        if allocated not in (8, 16, 32):
            raise VideoError("pixels that are not of 8, 16 or 32 bits")
        return cls(
            frames=number(header, "NumberOfFrames"),
            rows=rows,
            columns=columns,
            samples=max(1, number(header, "SamplesPerPixel") or 1),
            allocated=allocated,
            stored=number(header, "BitsStored") or allocated,
            overlays=tuple(
                bit for tag in OVERLAY_BITS if 0 < (bit := number(header, tag) or 0) < 32
            ),
            planar=number(header, "PlanarConfiguration") == 1,
            photometric=photometric,
        )


# ------------------------------------------------------------------------------- finding the pixels


def pixel_element(file, header):
    """(where the pixel data start in the file, their length or UNDEFINED, VR or '')."""
    syntax = header.file_meta.TransferSyntaxUID
    order = "big" if syntax == BIG_ENDIAN else "little"
    head = file.read(12)
    tag = [int.from_bytes(head[i : i + 2], order) for i in (0, 2)]
    if tag[0] == 0x7FE0 and tag[1] in (8, 9):
        raise VideoError("floating-point pixels: not an ultrasound image")
    if len(head) < 12 or tag != [0x7FE0, 0x0010]:
        raise VideoError("truncated: the pixel data are missing")
    if head[4:6] in (b"OB", b"OW", b"UN", b"OT"):
        return file.tell(), int.from_bytes(head[8:12], order), head[4:6].decode()
    return file.tell() - 4, int.from_bytes(head[4:8], order), ""  # without VR


def size_of(file):
    """Bytes of an open file, which stays where it is."""
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(here)
    return size


def fragments(file, start, length):
    """(start, length) of the items of encapsulated pixel data less the offset table, which may be
    wrong; and whether they have an end mark. VideoError when an item breaks off.
    """
    size, end = size_of(file), start + length if length != UNDEFINED else None
    found, at = [], start
    while end is None or at < end:
        file.seek(at)
        head = file.read(8)
        tag, length = head[:4], int.from_bytes(head[4:], "little")
        if tag == b"\xfe\xff\xdd\xe0" or not head:
            return found[1:], bool(head)
        if tag != b"\xfe\xff\0\xe0" or len(head) < 8 or length == UNDEFINED:
            raise VideoError("truncated: the pixel data break off")
        if at + 8 + length > size:
            raise VideoError("truncated: the pixel data break off")
        found.append((at + 8, length))
        at += 8 + length
        if len(found) > FRAGMENTS:
            raise VideoError(f"more than {FRAGMENTS:,} pieces of pixel data")
    return found[1:], True


def frames_of(file, header, notes):
    """The frames that are in the file: NativeFrames or CodedFrames. VideoError."""
    claims, syntax = Claims.of(header), header.file_meta.TransferSyntaxUID
    start, length, vr = pixel_element(file, header)
    file.seek(start)
    coded = length == UNDEFINED or (syntax not in NATIVE and file.read(4) == b"\xfe\xff\0\xe0")
    if not coded:
        if syntax not in NATIVE:
            notes.append("uncompressed, though the header says otherwise")
        return native_frames(file, claims, (start, length), syntax == BIG_ENDIAN, vr, notes)
    pieces, ended = fragments(file, start, length)
    if syntax == NATIVE_PIECES:
        check_components(claims.samples)
        layout = layouts(claims, False)[0]
        spans = [[(start, layout.size)] for start, length in pieces if length >= layout.size]
        frames = NativeFrames(file, claims, spans, layout)
    else:
        frames = CodedFrames(file, claims, frame_spans(file, pieces, claims.frames))
        if syntax in NATIVE:
            notes.append("compressed, though the header says otherwise")
    if not ended and len(frames) < (claims.frames or 0):
        raise VideoError(f"truncated: the pixel data break off after {len(frames)} frames")
    return counted(frames, notes)


def check_components(n):
    if n not in (1, 3):
        raise VideoError(f"pixels of {n} components")


def counted(frames, notes):
    """The frames, if there are any; a note when the header says another number."""
    if not len(frames):
        raise VideoError("no frame in the pixel data")
    check_budget(len(frames))
    if len(frames) != (frames.claims.frames or 1):
        notes.append(f"NumberOfFrames is wrong: {len(frames)} frames in the pixel data")
    return frames


def frame_spans(file, pieces, declared):
    """Fragments put together to frames: a list of (start, length) each.

    A frame starts where a fragment has the mark of a start. Each fragment is one where they have
    no such marks (RLE), and where their number is that declared and few lack the mark: damage.
    """
    marked = []
    for start, length in pieces:
        file.seek(start)
        if length:
            marked.append(((start, length), file.read(12).startswith(pixels.STARTS)))
    share = np.mean([starts for _, starts in marked]) if marked else 0
    each = share == 0 or (len(marked) == declared and share > 0.5)
    spans = []
    for piece, starts in marked:
        if starts or each or not spans:
            spans.append([])
        spans[-1].append(piece)
    return spans


def layouts(claims, big_endian):
    """The Layouts that a native frame may have, the declared one first."""
    c = claims
    plain = pixels.Layout(c.rows, c.columns, c.samples, c.allocated // 8, big_endian, c.planar)
    halved = replace(plain, samples=3, halved=True, planar=False)
    others = [replace(plain, samples=n, bytes=b) for n, b in ((3, 1), (1, 1), (1, 2))]
    if c.allocated == 8 and c.samples == 3 and c.columns % 2 == 0:
        others.insert(0, halved)
    if c.photometric == "YBR_FULL_422" and halved in others:
        return [halved, plain, *others[1:]]
    return [plain, *others]


def native_frames(file, claims, element, big_endian, vr, notes):
    """The frames of uncompressed pixel data (start, length of the element).

    In the declared layout, if the declared number of such frames fills the data. Else a wrong
    layout or a wrong number may be declared: the pixels decide between the declared layout, if
    whole frames of it fill the data, and those of which the declared number does. VideoError when
    the data end amid a frame that should be there.
    """
    start, length = element
    if start + length > size_of(file):
        raise VideoError("truncated: the pixel data break off")

    def frames_as(layout):
        n = min(length // layout.size, FRAMES + 1)
        spans = [[(start + i * layout.size, layout.size)] for i in range(n)]
        return NativeFrames(file, claims, spans, layout, big_endian and vr == "OW")

    possible = layouts(claims, big_endian)
    declared = claims.frames or 1
    exact = [o for o in possible if 0 <= length - o.size * declared <= 1]
    if possible[0] in exact:
        exact = exact[:1]
    else:  # of the label YBR_FULL_422 either layout is usual
        usual = possible[: 2 if claims.photometric == "YBR_FULL_422" else 1]
        exact = [o for o in usual if o not in exact and 0 <= length % o.size <= 1 < length] + exact
    fitting = [frames_as(o) for o in exact or possible[:1]]
    frames = min(fitting, key=NativeFrames.unevenness) if len(fitting) > 1 else fitting[0]
    layout = frames.layout
    check_components(layout.samples)
    if layout.size != possible[0].size:
        notes.append("frames of another size than the header says")
    n, left = divmod(length, layout.size)
    if n < declared and left > 1:
        raise VideoError(f"truncated: the pixel data end within frame {n + 1}")
    return counted(frames, notes)


# ----------------------------------------------------------------------------------- reading frames


class Frames:
    """The frames of an open file; a context, in which C libraries can be heard."""

    def __init__(self, file, claims, spans):
        self.file, self.claims, self.spans = file, claims, spans

    def __len__(self):
        return len(self.spans)

    def check_decoder(self):
        """VideoError when no decoder for the first frame is installed."""

    def arrange(self, numbers, notes):
        """Find the order of components, where it is the header's alone, from frames `numbers`."""

    def __enter__(self):
        self.listener = pixels.Listener()
        return self

    def __exit__(self, *_):
        self.listener.close()

    def stored(self, i):
        """The bytes of frame i."""
        pieces = []
        for start, length in self.spans[i]:
            self.file.seek(start)
            pieces.append(self.file.read(length))
        return b"".join(pieces)

    def sample(self, i):
        """Components (H, W) or (H, W, 3) of frame i, of which colours can be judged."""
        return self.components(i)

    def check(self, i):
        """VideoError when frame i does not decode, as `bgr` has it."""

    def bgr(self, i, reading):
        """Frame i, uint8 (H, W, 3) BGR. VideoError when it does not decode."""
        return reading.bgr(self.components(i))


class NativeFrames(Frames):
    """Uncompressed."""

    def __init__(self, file, claims, spans, layout, swap_words=False):
        super().__init__(file, claims, spans)
        self.layout = layout
        self.swap_words = swap_words and layout.bytes == 1  # big-endian words of two pixels

    def arrange(self, numbers, notes):
        layout = self.layout
        other = replace(layout, planar=not layout.planar)
        if layout.samples != 3 or layout.halved or min(layout.rows, layout.columns) < 32:
            return  # one way only, or too small to tell
        declared, turned = 0.0, 0.0
        for i in numbers:
            data = self.uncoded(i)
            declared += pixels.roughness(layout.components(data))
            turned += pixels.roughness(other.components(data))
        if turned < pixels.SMOOTHER * declared:
            self.layout = other
            how = "one after the other" if other.planar else "pixel by pixel"
            notes.append(f"colours stored {how}, the header says otherwise")

    def unevenness(self):
        """Roughness of a few images, in whichever order of their components or bytes is smoother,
        as a share of their contrast: comparable between layouts.

        Colour planes are as smooth as grey frames, so the header decides between these.
        """
        orders = [self.layout]
        if self.layout.samples == 3 and not self.layout.halved:
            orders.append(replace(self.layout, planar=not self.layout.planar))
        if self.layout.bytes > 1:
            orders.append(replace(self.layout, big_endian=not self.layout.big_endian))
        few, shares = [self.uncoded(i) for i in telling(self)], []
        for order in orders:
            rough = contrast = 0.0
            for data in few:
                image = order.components(data)
                contrast += float(image.var(dtype=np.float32))
                rough += pixels.roughness(image) if min(image.shape[:2]) > 1 else 0.0
            if order.planar and order.samples == 3:
                rough *= 0.5 if self.claims.planar else 2
            shares.append(rough / contrast if contrast else np.inf)
        return min(shares)

    def components(self, i):
        return self.layout.components(self.uncoded(i))

    def uncoded(self, i):
        """The bytes of frame i in their right order."""
        if not self.swap_words:
            return self.stored(i)
        ((start, length),) = self.spans[i]
        origin = self.spans[0][0][0]
        odd = (start - origin) % 2
        self.file.seek(start - odd)
        words = self.file.read(length + odd + (length + odd) % 2)
        swapped = np.frombuffer(words, "u2").byteswap().tobytes()
        return swapped[odd : odd + length]


class CodedFrames(Frames):
    """Compressed, each frame in the way that its own marks say."""

    size = None  # (rows, columns) of the first frame that was read

    def stream(self, data):
        """The Stream of a frame. VideoError when it is of another size than the first."""
        claims, stream = self.claims, pixels.stream_of(data)
        if stream is None and pixels.is_rle(data):
            c = claims
            stream = pixels.Stream("RLE", c.rows, c.columns, c.samples, c.allocated)
        if stream is None:
            raise pixels.Broken("it is compressed in a way that is not known")
        check_components(stream.samples)
        check_budget(1, stream.rows, stream.columns)
        self.size = self.size or (stream.rows, stream.columns)
        if self.size != (stream.rows, stream.columns) or not stream.rows * stream.columns:
            raise VideoError("frames of several sizes")
        return stream

    def check_decoder(self):
        with self.reason(0):
            stream = self.stream(self.stored(0))
            if not stream.opencv:
                pixels.decoder_of(stream)

    @contextmanager
    def reason(self, i):
        """Errors in the block become a VideoError that names frame i, and quotes no one else."""
        where = f"frame {i + 1} of {len(self)} does not decode"
        try:
            yield
        except VideoError:
            raise
        except pixels.Broken as error:
            raise VideoError(f"{where}: {error}") from error
        except Exception as error:  # decoders raise many kinds
            raise VideoError(where) from error

    def components(self, i, small=False):
        with self.reason(i):
            data = self.stored(i)
            stream = self.stream(data)
            if not stream.opencv:
                return pixels.decode_coded(data, stream, self.claims.stored)
            frame = pixels.decode_jpeg(data, stream, 0, self.listener, small)
            return frame[:, :, 0] if stream.samples == 1 else frame[:, :, ::-1]

    def sample(self, i):
        return self.components(i, small=True)

    def check(self, i):
        self.components(i, small=True)

    def bgr(self, i, reading):
        if reading.colour == "YBR":
            with self.reason(i):
                data = self.stored(i)
                stream = self.stream(data)
                if stream.kind == "JPEG":  # its decoder makes the colours on the way
                    return pixels.decode_jpeg(data, stream, 1, self.listener)
        return super().bgr(i, reading)


def palette_of(header, claims):
    """As `pixels.read_palette`; None where the pixels need none. VideoError."""
    if claims.photometric != "PALETTE COLOR":
        return None
    try:
        return pixels.read_palette(header, header.file_meta.TransferSyntaxUID == BIG_ENDIAN)
    except Exception as error:  # numpy and pydicom raise many kinds on malformed palettes
        raise VideoError("unreadable palette") from error


def choose_reading(frames, header, notes):
    """The `pixels.Reading` of all frames, from a few of them. VideoError."""
    claims, n, palette = frames.claims, len(frames), palette_of(header, frames.claims)
    numbers = telling(frames)
    frames.arrange(numbers, notes)
    samples = [frames.sample(i) for i in numbers]
    if isinstance(frames, CodedFrames) and frames.size != (claims.rows, claims.columns):
        notes.append("frames of another size than the header says")

    reading = pixels.choose_reading(
        claims.photometric, samples, claims.stored, claims.overlays, palette,
        lambda: (frames.components(i) for i in range(n)), notes,
    )  # fmt: skip
    if all(reading.bgr(frames.sample(i)).max() < pixels.BLACK for i in [*numbers, *range(n)]):
        raise VideoError("no image: all is black")
    return reading


def telling(frames):
    """Numbers of a few frames to judge the file by: the first, middle and last one, and where these
    are blank the first that is not."""
    n = len(frames)
    few = sorted({0, n // 2, n - 1})
    return sorted({*few, next((i for i in [*few, *range(n)] if shows(frames.sample(i))), 0)})


def shows(components):
    """Whether a frame has more than one grey level or colour."""
    return (
        int(np.ptp(components.reshape(components.shape[0] * components.shape[1], -1), 0).max())
        >= pixels.BLACK
    )
