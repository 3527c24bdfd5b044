"""Extraction against the published method, in one run: python benchmarks/extract.py

The published method decodes a video once per clip (16 seeks of 16 frames) and encodes its 16 clips
as one batch of 256 images in fp32. Ours decodes once and encodes each distinct image once.
Phantoms, weights and clip starts are the same; the embeddings are compared too. The bound is the
FLOPs of the distinct images at the machine's rate of matrix products (the faster of torch's two
libraries).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, matmul_rate, peak_memory, timed
from echofocus_core.base.options import Settings
from echofocus_core.video import decode as video
from echofocus_core.video import extract, panecho, phantom
from echofocus_core.video.encoders import open_encoder
from echofocus_core.video.encoders.trained import distinct_images
from echofocus_core.video.studies import find_studies

SAMPLING = video.Sampling()


def write_dicom(path, frames):
    """Write BGR frames uint8 (n, H, W, 3) as a multi-frame ultrasound DICOM: JPEG, YBR_FULL_422."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, generate_uid

    n, H, W, _ = frames.shape
    ds, meta = Dataset(), FileMetaDataset()
    ds.SOPClassUID = meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.3.1"
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = generate_uid(), generate_uid()
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.Modality, ds.PatientID = "US", "phantom"
    ds.NumberOfFrames, ds.Rows, ds.Columns, ds.SamplesPerPixel = n, H, W, 3
    ds.PhotometricInterpretation = "YBR_FULL_422"
    ds.PlanarConfiguration = ds.PixelRepresentation = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    options = (cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422)  # fmt: skip
    ds.PixelData = encapsulate(
        [cv2.imencode(".jpg", frame, options)[1].tobytes() for frame in frames]
    )
    ds["PixelData"].VR = "OB"
    ds.file_meta = meta
    ds.save_as(path, enforce_file_format=True)


def published_decode(path, starts):
    """The published reader: for each clip, open, seek to start - 1, read 16 frames, transform."""
    mean, std = (np.array(v, np.float32) for v in (panecho.MEAN, panecho.STD))
    clips = []
    for start in starts:
        capture = cv2.VideoCapture(str(path))
        n = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.set(cv2.CAP_PROP_POS_FRAMES, max(int(start) - 1, 0))
        frames = [capture.read()[1] for _ in range(min(16, n))]
        capture.release()
        frames += [frames[-1]] * (16 - len(frames))
        frames = [cv2.resize(f, (256, 256), interpolation=cv2.INTER_AREA) for f in frames]
        clip = np.stack(frames).astype(np.float32)[:, 16:240, 16:240] / 255
        clips.append(((clip - mean) / std).transpose(3, 0, 1, 2))
    return torch.from_numpy(np.ascontiguousarray(np.stack(clips)))  # (16, 3, 16, 224, 224)


@torch.inference_mode()
def published_encode(clips, backbone, device):
    """Encode one batch of 256 images, each layer over the whole batch."""
    pieces, panecho.CACHED_NUMBERS = panecho.CACHED_NUMBERS, 10**12
    try:
        return backbone(clips.to(device)).cpu().numpy()
    finally:
        panecho.CACHED_NUMBERS = pieces


def encode_ours(clips, encoder):
    return next(iter(encoder([(None, ([clips], 0.0))])))[2][0]


def image_flops(backbone):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        backbone.encode_images(torch.zeros(1, 3, 224, 224))
    return counter.get_total_flops()


def make_videos(folder, n_frames):
    """Write one phantom as MJPG AVI, as mp4 if this OpenCV can, and as JPEG DICOM."""
    frames = phantom.phantom_cine("A4C", frames=n_frames, size=(600, 800), seed=n_frames)
    phantom.write_video(folder / f"{n_frames}.avi", frames)
    phantom.write_video(folder / f"{n_frames}.mp4", frames, fourcc="mp4v")
    write_dicom(folder / f"{n_frames}.dcm", frames)
    return [p for p in sorted(folder.glob(f"{n_frames}.*")) if p.stat().st_size > 1000]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, nargs="+", default=[40, 80, 150])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--run", type=int, default=0, help="videos of a complete run; 0: no run")
    parser.add_argument("--workers", type=int, default=0, help="decoders of the run; 0: default")
    args = parser.parse_args()
    device = args.device
    backbone = panecho.load_panecho("random").model.encoder
    flops = image_flops(backbone)
    backbone.to(device)
    batch = extract.default_batch(device, 224)
    rate = {
        "fp32": matmul_rate(device, torch.float32),
        "bf16": matmul_rate(device, torch.bfloat16),
    }
    encoders = {
        precision: extract.Batches(open_encoder("panecho", "random"), device, batch, precision)
        for precision in extract.PRECISIONS
        if rate[precision] > rate["fp32"] / 10
    }
    print(describe(device))
    print(
        f"matmul {rate['fp32'] / 1e9:.0f} GFLOP/s fp32, {rate['bf16'] / 1e9:.0f} bf16; an image "
        f"{flops / 1e9:.2f} GFLOP; batches of {batch}"
    )
    if "bf16" not in encoders:
        print("bf16 is emulated on this machine and not measured")
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for n in args.frames:
            paths = make_videos(Path(folder), n)
            measure_decode(paths, n, device, rows, ratios)
            avi = next(p for p in paths if p.suffix == ".avi")
            measure_encode(avi, n, backbone, encoders, device, args.repeats, rows, ratios)
            for precision in encoders:
                row = next(r for r in rows if r["what"] == f"encode {precision}" and r["n"] == n)
                row["bound"] = row["images"] * flops / rate[precision]
                row["over bound"] = row["seconds"] / row["bound"]
                ratios[f"over_bound_{precision}_{n}"] = row["over bound"]
            if args.run:
                measure_run(Path(folder), n, args, rows, ratios)
    for row in rows:
        numbers = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{k} {v}" for k, v in numbers.items()))
    print("ratios " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    if args.json:
        record = {"machine": describe(device), "matmul_flops": rate, "rows": rows, "ratios": ratios}
        Path(args.json).write_text(json.dumps(record, indent=2))


def measure_run(folder, n, args, rows, ratios):
    """Time a complete extraction of many AVIs with all decoders, against the single process of the
    published method, estimated from its seconds per video."""
    published = (
        1 / next(r for r in rows if r["what"] == "encode published" and r["n"] == n)["videos/s"]
    )
    source = folder / f"run{n}" / "study"
    source.mkdir(parents=True)
    for i in range(4):
        frames = phantom.phantom_cine("A4C", frames=n, size=(600, 800), seed=i)
        phantom.write_video(source / f"{i}.avi", frames)
    for i in range(4, args.run):
        (source / f"{i}.avi").write_bytes((source / f"{i % 4}.avi").read_bytes())
    studies = find_studies(source.parent)
    for precision in extract.PRECISIONS:
        settings = Settings(
            weights="random", device=args.device, precision=precision, workers=args.workers
        )
        out = folder / f"out_{n}_{precision}"
        seconds = timed(lambda s=settings, o=out: extract.extract(studies, o, s), args.device)
        row = {"what": f"run {precision}", "n": n, "seconds": seconds}
        rows.append(row | {"videos/s": args.run / seconds, "published": published * args.run})
        ratios[f"run_{precision}_{n}"] = published * args.run / seconds


def measure_decode(paths, n, device, rows, ratios):
    """Time decoding and transforms for each container; DICOM has no published reader."""
    for path in paths:
        ours = timed(lambda p=path: video.read_clips(p, SAMPLING), "cpu", 3)
        row = {"what": f"decode {path.suffix}", "n": n, "seconds": ours, "frames/s": n / ours}
        if path.suffix != ".dcm":
            starts = video.read_clips(path, SAMPLING)[0].starts
            row["published"] = timed(lambda p=path, s=starts: published_decode(p, s), "cpu")
            key = f"decode_{n}" if path.suffix == ".avi" else f"decode_{path.suffix[1:]}_{n}"
            row["ratio"] = ratios[key] = row["published"] / ours
        rows.append(row)


def measure_encode(path, n, backbone, encoders, device, repeats, rows, ratios):
    """Time encoding, and decoding plus encoding, against the published method. Ours runs first, so
    that its peak memory does not include the published method."""
    clips = video.read_clips(path, SAMPLING)[0]
    images = len(distinct_images(clips.index)[0])
    decode = next(r for r in rows if r["what"] == "decode .avi" and r["n"] == n)
    embeddings, taken = {}, []
    for precision, encoder in encoders.items():
        embeddings[precision] = encode_ours(clips, encoder)
        seconds = timed(lambda e=encoder: encode_ours(clips, e), device, repeats)
        row = {"what": f"encode {precision}", "n": n, "images": images, "seconds": seconds}
        row |= {"videos/s": 1 / (seconds + decode["seconds"]), "frames/s": n / seconds}
        taken.append(row | {"peak GB": peak_memory(device) / 1e9})
    whole = published_decode(path, clips.starts)
    expected = published_encode(whole, backbone, device)
    published = timed(lambda: published_encode(whole, backbone, device), device, repeats)
    row = {"what": "encode published", "n": n, "images": 256, "seconds": published}
    row |= {"videos/s": 1 / (published + decode["published"]), "peak GB": peak_memory(device) / 1e9}
    rows += [*taken, row]
    scale = np.abs(expected).max()
    for precision, row in zip(encoders, taken, strict=True):
        row["error"] = float(np.abs(embeddings[precision] - expected).max() / scale)
        total = row["seconds"] + decode["seconds"]
        ratios[f"{precision}_{n}"] = (published + decode["published"]) / total


if __name__ == "__main__":
    main()
