"""Areas dicom, video and manifests: one run of extraction over many odd files and healthy ones."""

import copy
import csv
import io
import os
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import h5py

from tests.faults.mutations import ESCAPE, KINDS, NAMES, TEXTS, damaged
from tests.faults.worker import ROOT, Case, one_line, run

FIXTURES = ROOT / "tests" / "fixtures"
TOGETHER = 20  # hostile files in one run
HOW = ["--weights", "random", "--size", "32", "--n_clips", "1", "--clip_len", "2", "--workers", "1"]
HOW += ["--device", "cpu"]
UID = "1.2.840.99999.1000000"


@cache
def encoder():
    from echofocus_core.video import extract

    return extract.load_panecho("random", 2)


@cache
def base(area=""):
    """Healthy numbers; the encoder of random weights is drawn once a process, not once a run."""
    from echofocus_core.video import extract

    model, digest = encoder()
    extract.load_panecho = lambda *_: (copy.deepcopy(model), digest)
    folder = Path(os.environ["FAULTS_BASE"], f"images-{os.getpid()}")
    if not folder.exists():
        healthy(folder / "source")
        result = run(folder / "source", "--out", folder / "out", *HOW, main=extract.main)
        assert result.status == 0, result
    return embeddings(folder / "out")


def healthy(source):
    """Two studies that nothing is done to: a DICOM cine and a video."""
    for name in ("well_dicom", "well_video"):
        (source / name).mkdir(parents=True)
    (source / "well_dicom" / "a").write_bytes(cine("jpeg_ybr_labelled_rgb.dcm", 1))
    (source / "well_video" / "a.mp4").write_bytes((FIXTURES / "videos" / "h264.mp4").read_bytes())


def embeddings(out):
    """Study -> array, of the healthy studies."""
    found = {}
    for path in Path(out).glob("well_*.hdf5"):
        with h5py.File(path) as f:
            found[path.stem] = f["embeddings"][:]
    return found


@cache
def template(name):
    import pydicom

    ds = pydicom.dcmread(FIXTURES / "dicom" / name)
    ds.StudyInstanceUID, ds.PatientID = UID, "P1000000"
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def cine(name, number):
    """A DICOM file of the fixtures, as a study and patient of its own."""
    digits = str(2_000_000 + number).encode()
    data = template(name).replace(UID.encode(), UID.encode()[:-7] + digits)
    return data.replace(b"P1000000", b"P" + digits)


# ---------------------------------------------------------------------------------------- faults

TAGS = {
    "NumberOfFrames": [b"1000000", b"-1", b"0", b"", b"6.5", b"1e9", b"9" * 40, b"abc"],
    "Rows": [0, 1, 65535], "Columns": [0, 1, 65535], "SamplesPerPixel": [0, 2, 4, 65535],
    "BitsAllocated": [0, 1, 12, 16, 64, 65535], "BitsStored": [0, 1, 16, 65535],
    "PlanarConfiguration": [1, 7], "PixelRepresentation": [1, 9],
    "PhotometricInterpretation": None, "Modality": None, "SOPClassUID": None,
    "StudyInstanceUID": None, "SeriesInstanceUID": None, "PatientID": None, "PatientName": None,
    "InstanceNumber": [b"1", b"-5", b"x", b"1" * 30], "TransferSyntaxUID": None,
    "SpecificCharacterSet": None, "StudyDate": None,
}  # fmt: skip
SYNTAXES = ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.102",
            "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2",
            "1.2.840.10008.1.2.4.100", "1.2.3"]  # fmt: skip


def odd_tag(data, rng):
    """One element's value as no writer would write it, the file otherwise whole."""
    import pydicom
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    name = str(rng.choice(list(TAGS)))
    choices = TAGS[name] or [t.encode(errors="surrogatepass") for t in TEXTS]
    if name == "TransferSyntaxUID":
        ds.file_meta.TransferSyntaxUID = str(rng.choice(SYNTAXES))
        value = b""
    else:
        value = choices[int(rng.integers(len(choices)))]
        if isinstance(value, int):
            value = value.to_bytes(2, "little")
        tag = Tag(name)
        vr = pydicom.datadict.dictionary_VR(tag)
        value = value[:65000] + b" " * (len(value[:65000]) % 2)
        ds._dict[tag] = RawDataElement(tag, vr, len(value), value, 0, False, True)
    buffer = io.BytesIO()
    try:
        ds.save_as(buffer)
    except Exception:  # pydicom does not write every nonsense
        return data[:300] + value + data[300:]
    return buffer.getvalue()


def header(elements, syntax="1.2.840.10008.1.2.1"):
    """A DICOM of these elements alone."""
    syntax = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = b"\x02\0\x10\0UI" + len(syntax).to_bytes(2, "little") + syntax
    return bytes(128) + b"DICM" + meta + elements


def deflated(elements):
    zipped = zlib.compressobj(9, zlib.DEFLATED, -15)
    return header(zipped.compress(elements) + zipped.flush(), "1.2.840.10008.1.2.1.99")


ITEM, REGIONS = b"\xfe\xff\0\xe0\0\0\0\0", b"\x18\0\x11\x60SQ\0\0"
ENDLESS = REGIONS + b"\xff\xff\xff\xff" + ITEM * 200_000
IMAGE = (  # what is looked at before the regions are
    b"\x08\0\x60\0CS\x02\0US" + REGIONS + (8 * 100_000).to_bytes(4, "little") + ITEM * 100_000
)
HEADER_BOMBS = {
    "elements": lambda: header(b"\x08\0\x60\0CS\x02\0US" * 200_000),
    "items": lambda: header(ENDLESS),
    "items of a length": lambda: header(IMAGE),
    "deflated items": lambda: deflated(ENDLESS),
    "large elements": lambda: header((b"\x08\0\x60\0UT\0\0\0\0\x0f\0" + bytes(983_040)) * 80),
}


def shifted(data, rng):
    """A header moved by a few bytes, so that text stands where numbers were."""
    at = int(rng.integers(132, min(len(data), 1200)))
    return data[:at] + data[at + int(rng.integers(1, 9)) :]


def sources(kind):
    folder, pattern = ("dicom", "*.dcm") if kind == "dicom" else ("videos", "*.*")
    return sorted(p.name for p in (FIXTURES / folder).glob(pattern))


def hostile(source, kind, number, rng):
    """Put a hostile file into a study's folder of its own; returns the fault's name."""
    names = sources(kind)
    name = names[int(rng.integers(len(names)))]
    if kind == "dicom":
        data, suffix = cine(name, 10 + number), str(rng.choice([".dcm", "", ".ima", ".avi"]))
    else:
        data = (FIXTURES / "videos" / name).read_bytes()
        suffix = Path(str(rng.choice([name, "a.avi", "a.mp4", "a.dcm"]))).suffix
    folder = source / f"odd{number:02}"
    draw = rng.random()
    if draw < 0.08:
        folder.mkdir()
        fault = KINDS[int(rng.integers(len(KINDS)))]
        fault(folder / f"a{suffix}")
        return fault.__name__
    if draw < 0.16:
        odd = NAMES[int(rng.integers(len(NAMES)))]
        if rng.random() < 0.5 and not odd.startswith("."):
            folder = source / odd if not (source / odd).exists() else folder
            odd = "a"
        folder.mkdir(exist_ok=True)
        (folder / f"{odd}{suffix}").write_bytes(data)
        return "name"
    if kind == "video" and draw < 0.2:
        other = source.parent / "secret.ts"
        other.write_bytes((FIXTURES / "videos" / "h264.ts").read_bytes())
        folder.mkdir()
        listed = (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other.resolve()}\n#EXT-X-ENDLIST\n"
        )
        (folder / "list.m3u8").write_text(listed)
        (folder / f"a{suffix}").write_text("ffconcat version 1.0\nfile list.m3u8\n")
        return "playlist"
    if kind == "dicom" and draw < 0.2:
        fault = list(HEADER_BOMBS)[int(rng.integers(len(HEADER_BOMBS)))]
        folder.mkdir()
        (folder / f"a{suffix}").write_bytes(HEADER_BOMBS[fault]())
        return f"endless: {fault}"
    if kind == "dicom" and draw < 0.45:
        change = odd_tag if draw < 0.35 else shifted
        fault, data = change.__name__, change(data, rng)
    else:
        fault, data = damaged(data, rng)
        if draw > 0.93:
            fault, data = damaged(data, rng)
    folder.mkdir()
    (folder / f"a{suffix}").write_bytes(data)
    return fault


def extraction(rng, here, base, kind):
    from echofocus_core.video import extract

    source, faults = here / "source", Counter()
    healthy(source)
    for number in range(TOGETHER):
        faults[hostile(source, kind, number, rng)] += 1
    result = run("source", "--out", "out", *HOW, main=extract.main)
    complaint = one_line(result) or judge(result, source, base)
    if not complaint:  # and the next run finds it all done
        again = run("source", "--out", "out", *HOW, main=extract.main)
        complaint = one_line(again) or (
            "0 studies extracted" not in again.out and again.said[-500:]
        )
    return Case(kind, complaint or "", TOGETHER, dict(faults))


def judge(result, source, base):
    if result.status:
        return f"the run ended: {result.err[-500:]}"
    found = embeddings("out")
    if found.keys() != base.keys() or any((found[k] != base[k]).any() for k in base):
        return f"healthy studies differ: {sorted(found)}"
    rows = list(csv.reader(io.StringIO(Path("out/extract_log.csv").read_text())))
    known = {name.lstrip("'") for row in rows for name in (row[0], row[1].split("/")[0])}
    unsaid = "no videos" not in result.out and "left out" not in result.out
    for folder in source.iterdir():
        lost = folder.name.startswith("odd") and folder.name not in known
        if lost and unsaid and folder.name not in result.out:
            return f"nothing is said of {folder.name}"
        if (folder / "list.m3u8").exists() and Path("out", f"{folder.name}.hdf5").exists():
            return f"{folder.name} has the video of another folder"
    if str(source) in result.said:
        return "an absolute path on the screen"
    return ""


def dicom(rng, here, base):
    return extraction(rng, here, base, "dicom")


def video(rng, here, base):
    return extraction(rng, here, base, "video")


# -------------------------------------------------------------------------------------- manifests

CELLS = ["", " ", "../secret.mp4", "/etc/passwd", "well_video", "well_video/../../x", "a\nb",
         "=1+1", ESCAPE,
         "x" * 5000, ".", "nul\0", "well_video//a.mp4", "\u202e", "CON", "a:b", "%00",
         '"', "'", "a;b", "N/A", "well_video/a.mp4/", "-", "\ud800"]  # fmt: skip


def manifests(rng, here, base):
    """A list of videos with odd cells or bytes: refused in a line, or read; nothing outside."""
    from echofocus_core.video import extract

    source = here / "source"
    healthy(source)
    (here / "secret.mp4").write_bytes((FIXTURES / "videos" / "h264.mp4").read_bytes())
    rows = [["study", "path"], ["well_dicom", "well_dicom/a"], ["well_video", "well_video/a.mp4"]]
    fault, listed = "cell", [list(row) for row in rows]
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 3))):
            value = CELLS[int(rng.integers(len(CELLS)))]
            if rng.random() < 0.5:
                rows.append(["more", value][:: int(rng.choice([1, -1]))])
            else:
                row = rows[int(rng.integers(len(rows)))]
                row[int(rng.integers(2))] = value
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    data = text.getvalue().encode(errors="surrogatepass")
    if len(rows) == 3 and rng.random() < 0.9:
        fault, data = damaged(data, rng)
    Path("list.csv").write_bytes(data)
    result = run("source", "--out", "out", "--manifest", "list.csv", *HOW, main=extract.main)
    complaint = one_line(result, "list.csv", "source", "study", "studies", "--manifest")
    found = embeddings("out") if os.path.isdir("out") else {}
    for name, array in found.items():
        if fault == "cell" and any(row[0] == name and row not in listed for row in rows):
            continue  # another video under that name
        if name in base and array.shape == base[name].shape and (array != base[name]).any():
            complaint = complaint or f"{name} has other numbers"
    if os.path.isdir("out") and any(
        "secret" in p.read_text(errors="replace") for p in Path("out").glob("*.csv")
    ):
        complaint = complaint or "a file outside of the source was read"
    return Case(fault, complaint)
