"""Deterministic inputs and weights, recorded numbers and small input files for the tests."""

import base64
import json
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pydicom
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from echofocus_core.study.network import StudyModel

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
N_VIDEOS = (1, 2, 7, 23, 48, 90)
BLANK = base64.b64decode(  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def blank(monkeypatch):
    """Make figures blank until the end of the test."""
    from matplotlib.figure import Figure

    def save(self, file, **options):
        if hasattr(file, "write"):
            file.write(BLANK)
        else:
            Path(file).write_bytes(BLANK)

    monkeypatch.setattr(Figure, "savefig", save)


def normal(seed, *shape):
    """Standard normal numbers, float32: the inputs of the recorded outputs."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rule_weights(shapes):
    """{name: shape} of a state dict -> {name: tensor}, the weights of the recorded outputs."""
    state = {}
    for name, shape in shapes.items():
        r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        w = (r * 0.03).astype(np.float32)
        plus_one = name.endswith(("norm1.weight", "norm2.weight"))
        state[name] = torch.from_numpy(w + np.float32(1) if plus_one else w)
    return state


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def recorded(name):
    path = FIXTURES / name
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


def study(i):
    return torch.from_numpy(normal(100 + i, N_VIDEOS[i], 16, 768))


def by_rule(**kwargs):
    net = StudyModel(**kwargs).eval().requires_grad_(False)
    net.load_state_dict(rule_weights({k: v.shape for k, v in net.state_dict().items()}))
    return net


def published_model(folder, n_outputs, scaling=None, numpy_1=False, kind="standard"):
    """Write a model folder like the published ones, with numpy objects in the checkpoint."""
    net = StudyModel(n_outputs, kind)
    if scaling:
        scaling = {k: dict(v) if isinstance(v, dict) else v for k, v in scaling.items()}
        for entry in (x for x in scaling.values() if isinstance(x, dict)):
            entry |= {k: np.float64(x) for k, x in entry.items() if isinstance(x, float)}
    saved = {
        "model_state_dict": rule_weights({k: v.shape for k, v in net.state_dict().items()}),
        "perf_log": [[1, np.float64(0.5), np.float64(0.6), 1e-4, 12.5]],
        "optimizer_state_dict": {},
        "scheduler_state_dict": {},
        "input_norm_dict": scaling,
        "numpy_random_state": np.random.RandomState(0).get_state(),
        "torch_random_state": torch.get_rng_state(),
        "cuda_random_state": None,
    }
    folder.mkdir(parents=True)
    torch.save(saved, folder / "best_checkpoint.pt")
    if numpy_1:  # where the module has another name
        path, old = folder / "best_checkpoint.pt", folder / "old.pt"
        with zipfile.ZipFile(path) as a, zipfile.ZipFile(old, "w") as b:
            for item in a.infolist():
                b.writestr(item, a.read(item).replace(b"cnumpy._core", b"cnumpy.core"))
        old.replace(path)


def edit_config(**changes):
    config = json.loads(Path("config.json").read_text())
    config["task"]["defect"].update(changes)
    Path("config.json").write_text(json.dumps(config))


def moving_square(n=20, height=60, width=80):
    """uint8 (n, H, W, 3) BGR: a bright, coloured square that moves."""
    frames = np.full((n, height, width, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 2 * i : 2 * i + 20] = (200, 120, 60)
    return frames


def write_dicom(path, pixels, photometric, **tags):
    """Write an uncompressed cine of exactly these stored pixels; returns the dataset."""
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape[:3]
    ds.SamplesPerPixel = pixels.shape[3] if pixels.ndim == 4 else 1
    if ds.SamplesPerPixel == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.PixelRepresentation = 0
    ds.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.HighBit = tags.get("HighBit", ds.BitsStored - 1)
    ds.save_as(path, enforce_file_format=True)
    return ds


def write_cine(path, frames, fps=30, regions=None):
    """Write BGR frames (n, H, W, 3) as an uncompressed ultrasound cine with its frame rate.

    regions: 2-D regions as (x0, y0, x1, y1), inclusive pixels; None is the whole image.
    """
    boxes, (height, width) = [], frames.shape[1:3]
    for x0, y0, x1, y1 in regions or [(0, 0, width - 1, height - 1)]:
        box = pydicom.Dataset()
        box.RegionLocationMinX0, box.RegionLocationMinY0 = x0, y0
        box.RegionLocationMaxX1, box.RegionLocationMaxY1 = x1, y1
        box.RegionSpatialFormat = box.RegionDataType = 1  # 2-D tissue
        boxes.append(box)
    rates = {"FrameTime": f"{1000 / fps:.6g}", "CineRate": round(fps)}
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.ascontiguousarray(frames[..., ::-1])
    return write_dicom(path, pixels, "RGB", SequenceOfUltrasoundRegions=boxes, **rates)


def copy_example(path, name="ybr_color", study="1.2.9"):
    """Copy a sample file of pydicom to `path`: ybr_color is a real cine, rgb_color a still."""
    ds = pydicom.dcmread(pydicom.examples.get_path(name))
    ds.StudyInstanceUID, ds.PatientID = study, "P"
    ds.save_as(path)


def write_embeddings(folder, eid, embeddings, layout="ours"):
    """Write a study's HDF5 file in our layout, or the published one, where groups form a path."""
    folder.mkdir(parents=True, exist_ok=True)
    videos = [f"v{i:02}.avi" for i in range(len(embeddings))]
    if layout == "ours":
        with h5py.File(folder / f"{eid}.hdf5", "w") as f:
            f["embeddings"] = embeddings
            f.create_dataset("videos", data=videos, dtype=h5py.string_dtype())
        return
    with h5py.File(folder / f"{eid}_trim_embed.hdf5", "w") as f:
        for video, array in zip(videos, embeddings, strict=True):
            f[f"lab-share/site/{eid}_trim/{video}/emb"] = array
