"""Clip embeddings from echo videos, one HDF5 file a study.

    python embed/extract.py SOURCE --out DIR

SOURCE is a folder of study folders, or of the files of one study; below a study folder any depth
and any file names will do. Each study becomes DIR/<study>.hdf5:

    embeddings   (V videos, C clips, 768) float32
    videos       (V,) paths relative to the study folder
    clip_starts  (V, C) int64, the clip's start as drawn, in frames
    skipped      (K, 2) path and reason of the files that gave no clips
    attributes   how it was made: encoder, weights and their SHA-256, sampling, seed, version

The way of the data: find_studies -> decode (worker processes) -> encode (batches of images across
videos) -> write_study (when a study's last video is through).
"""

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch

if __name__ == "__main__":  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from embed import __version__
from embed.common import Parser, UserError, atomic_path, progress, run_main
from embed.panecho import MEAN, STD, clip_planes, load_panecho
from embed.video import Clips, Sampling, VideoError, find_videos

DECODE_SECONDS = 300  # a decoder that takes longer over one file is stopped
PUBLISHED_SAMPLING = "random starts; frames start-1..start+clip_len-2; BGR; area resize, crop"


@dataclass
class Study:
    """A study's video files, as POSIX paths relative to its folder."""

    name: str
    folder: Path
    videos: list[str]


@dataclass
class Summary:
    """What a run did."""

    written: list[str] = field(default_factory=list)  # study names
    finished: list[str] = field(default_factory=list)  # already there, left alone
    empty: list[str] = field(default_factory=list)  # no video gave clips
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # study, video, reason

    def print(self):
        """A few lines for a person: counts, then each skipped file with its reason."""
        print(f"{len(self.written)} studies extracted, {len(self.finished)} already there")
        if self.skipped:
            print(f"{len(self.skipped)} files skipped:")
            for study, video, reason in self.skipped:
                print(f"  {study}/{video}: {reason}")
            kinds = Counter(reason.split(":")[0] for _, _, reason in self.skipped)
            print("by reason: " + ", ".join(f"{k} {n}" for k, n in kinds.most_common()))
        if self.empty:
            print(f"{len(self.empty)} studies without a usable video: {', '.join(self.empty)}")


# ------------------------------------------------------------------------------------ the source


def find_studies(source):
    """The studies below `source`: its subfolders with videos, or itself if it has no such.

    Raises UserError when there is nothing, or when loose videos lie beside study folders.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a study's folder or a folder of them")
    folders = [p for p in sorted(source.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    studies = [Study(p.name, p, find_videos(p)) for p in folders]
    studies = [s for s in studies if s.videos]
    below = sum(len(s.videos) for s in studies)
    everything = find_videos(source)
    if not everything:
        raise UserError(f"no video or DICOM file in {source} or below it")
    if len(everything) == below:
        return studies
    if below:
        loose = next(v for v in everything if "/" not in v)
        raise UserError(
            f"{source} holds both study folders and loose videos ({loose}, ...); "
            "move the loose ones into a folder of their own study"
        )
    return [Study(source.resolve().name, source, everything)]


# ---------------------------------------------------------------------------------------- decode


class DecoderProcess:
    """`embed/video.py` in a process of its own, started when needed and again after a crash."""

    def __init__(self):
        self.process = None

    def __call__(self, path, key, sampling):
        """Clips of one video, or the VideoError that says why there are none."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("video.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process, timed_out = self.process, threading.Event()
        timer = threading.Timer(DECODE_SECONDS, lambda: (timed_out.set(), process.kill()))
        timer.start()
        try:
            pickle.dump((path, key, sampling), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            if timed_out.is_set():
                return VideoError(f"decoder stopped: no result after {DECODE_SECONDS} s")
            return VideoError("the decoder crashed on this file")
        finally:
            timer.cancel()

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def decode(jobs, sampling, workers):
    """(study, video) jobs -> ((study, video), Clips or VideoError), in order, decoded ahead.

    At most twice as many videos as workers are held.
    """
    idle = [DecoderProcess() for _ in range(workers)]

    def work(job):
        study, video = job
        decoder = idle.pop()
        try:
            return decoder(study.folder / video, f"{study.name}/{video}", sampling)
        finally:
            idle.append(decoder)

    ahead = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in jobs:
                ahead.append((job, pool.submit(work, job)))
                if len(ahead) >= 2 * workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        finally:
            for _, future in ahead:
                future.cancel()
            for decoder in idle:
                decoder.close()


# ---------------------------------------------------------------------------------------- encode


def distinct_images(index):
    """The different encoder images that a video's clips consist of.

    index: (C clips, L) frame numbers. Returns the images as plane numbers (N, 3), a plane being
    3 * frame + channel, and (C, L) positions in that list. Clips that start a multiple of three
    frames apart share images (see `panecho.clip_planes`), and each is encoded once.
    """
    channel, position = np.moveaxis(clip_planes(index.shape[1]), -1, 0)  # (L, 3) each
    planes = 3 * index[:, position] + channel  # (C, L, 3)
    images, inverse = np.unique(planes.reshape(-1, 3), axis=0, return_inverse=True)
    return images, inverse.reshape(index.shape)


def gather_images(planes, numbers):
    """planes uint8 (3 F, S, S), plane numbers (N, 3) -> normalised images float32 (N, 3, S, S)."""
    images = planes[numbers].float().div_(255)
    mean, std = (torch.tensor(v, device=planes.device) for v in (MEAN, STD))
    channel = numbers % 3  # a plane keeps its own channel's constants, wherever it stands
    images -= mean[channel][:, :, None, None]
    images /= std[channel][:, :, None, None]
    return images


class Pending:
    """A video whose images are on their way through the encoder."""

    def __init__(self, job, clips, device):
        frames = torch.from_numpy(clips.frames).to(device)  # (F, S, S, 3)
        self.job, self.starts = job, clips.starts
        self.planes = frames.permute(0, 3, 1, 2).flatten(0, 1)  # (3 F, S, S)
        images, positions = distinct_images(clips.index)
        self.images = torch.from_numpy(images).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self.taken = 0  # images sent to the encoder
        self.features = []  # their features, (n, 768) pieces in order

    def take(self, n):
        """The next images, `n` at most."""
        numbers = self.images[self.taken : self.taken + n]
        self.taken += len(numbers)
        return gather_images(self.planes, numbers)


@torch.inference_mode()
def encode(decoded, backbone, batch_size, device):
    """Decoded videos -> (job, (starts, embeddings (C, 768) float32)), or (job, VideoError).

    Images of successive videos fill the batches together, so that every batch but the last is
    full, whatever the length of the videos.
    """
    waiting, batch, room = deque(), [], batch_size  # batch: [(pending, images)]

    def run_batch():
        features = backbone.encode_images(torch.cat([images for _, images in batch]))
        for pending, images in batch:
            part, features = features[: len(images)], features[len(images) :]
            pending.features.append(part)
        batch.clear()

    def finished():
        while waiting and sum(map(len, waiting[0].features)) == len(waiting[0].images):
            pending = waiting.popleft()
            clips = torch.cat(pending.features)[pending.positions]  # (C, L, 768)
            embeddings = backbone.encode_clips(clips).float().cpu().numpy()
            yield pending.job, (pending.starts, embeddings)

    for job, clips in decoded:
        if not isinstance(clips, Clips):
            yield job, clips
            continue
        pending = Pending(job, clips, device)
        waiting.append(pending)
        while pending.taken < len(pending.images):
            images = pending.take(room)
            batch.append((pending, images))
            room -= len(images)
            if room == 0:
                run_batch()
                room = batch_size
        yield from finished()
    if batch:
        run_batch()
    yield from finished()


# ----------------------------------------------------------------------------------------- write


def study_path(out, study):
    return Path(out) / f"{study.name}.hdf5"


def write_study(path, videos, attributes):
    """videos: dict of path to (starts, embeddings) or VideoError. See the module's docstring."""
    made = {v: r for v, r in sorted(videos.items()) if not isinstance(r, VideoError)}
    skipped = [(v, str(r)) for v, r in sorted(videos.items()) if isinstance(r, VideoError)]
    text = h5py.string_dtype()
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as f:
        f["embeddings"] = np.stack([embeddings for _, embeddings in made.values()])
        f["clip_starts"] = np.stack([starts for starts, _ in made.values()])
        f.create_dataset("videos", data=list(made), dtype=text)
        f.create_dataset("skipped", (len(skipped), 2), data=skipped or None, dtype=text)
        f.attrs.update(attributes)


def check_finished(path, attributes):
    """Whether a study's file is there; UserError when it was made in another way."""
    if not path.exists():
        return False
    try:
        with h5py.File(path, "r") as f:
            found = dict(f.attrs)
    except OSError as error:
        raise UserError(f"{path} is not a readable HDF5 file; delete it to make it anew") from error
    for name, value in attributes.items():
        if name not in ("version", "weights") and found.get(name) != value:
            raise UserError(
                f"{path} was made with {name} = {found.get(name)}, not {value}; choose another "
                "--out, or delete the old files"
            )
    return True


# ------------------------------------------------------------------------------------------- run


@dataclass
class Settings:
    """How to extract; the command line's options carry the same names."""

    weights: str = "panecho"
    sampling: Sampling = field(default_factory=Sampling)
    device: str = ""  # '' is CUDA when there is one
    batch_size: int = 0  # images; 0: see default_batch
    workers: int = 0  # decoder processes; 0 is half the cores, 16 at most


def default_batch(device, size):
    """Images a batch: many on a GPU; on a CPU so few that their activations stay in the cache."""
    return 256 if device.startswith("cuda") else max(1, 8 * 224**2 // size**2)


def attributes_of(settings, digest):
    """The HDF5 attributes that say how the embeddings were made."""
    sampling, weights = settings.sampling, Path(settings.weights).name
    return {
        "encoder": "PanEcho",
        "weights": "random: untrained, not for results" if weights == "random" else weights,
        "weights_sha256": digest,
        "clip_len": sampling.clip_len,
        "n_clips": sampling.n_clips,
        "size": sampling.size,
        "seed": sampling.seed,
        "sampling": PUBLISHED_SAMPLING,
        "version": __version__,
    }


def extract(studies, out, settings):
    """Extract `studies` into the folder `out`; returns a Summary. Raises UserError.

    What is finished is left alone, so that a run which was stopped goes on where it was.
    """
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, digest = load_panecho(settings.weights, settings.sampling.clip_len)
    if settings.weights == "random":
        print("RANDOM WEIGHTS: the encoder is untrained; good for trying things out, not results")
    attributes, summary = attributes_of(settings, digest), Summary()
    todo = []
    for study in studies:
        if check_finished(study_path(out, study), attributes):
            summary.finished.append(study.name)
        else:
            todo.append(study)
    jobs = [(study, video) for study in todo for video in study.videos]
    workers = settings.workers or max(1, min(16, (os.cpu_count() or 1) // 2))
    batch_size = settings.batch_size or default_batch(device, settings.sampling.size)
    backbone = model.encoder.to(device)

    results = {}  # study name -> {video: result}
    stream = encode(decode(jobs, settings.sampling, workers), backbone, batch_size, device)
    with progress(total=len(jobs), desc="extract", unit="video", disable=not jobs) as bar:
        for (study, video), result in stream:
            bar.update()
            done = results.setdefault(study.name, {})
            done[video] = result
            if isinstance(result, VideoError):
                summary.skipped.append((study.name, video, str(result)))
            if len(done) == len(study.videos):
                finish_study(study, results.pop(study.name), out, attributes, summary)
    return summary


def finish_study(study, videos, out, attributes, summary):
    """All of a study's videos are through: write its file, or note that none was usable."""
    if all(isinstance(r, VideoError) for r in videos.values()):
        summary.empty.append(study.name)
    else:
        write_study(study_path(out, study), videos, attributes)
        summary.written.append(study.name)


def add_options(parser):
    """The options that make `settings_from` a Settings; `predict --videos` has them too."""
    s, d = Sampling(), Settings()
    group = parser.add_argument_group("extraction")
    option = group.add_argument
    option(
        "--weights",
        default=d.weights,
        metavar="FILE",
        help="PanEcho weights: a file, a URL, 'panecho' for the release (downloaded once into "
        "torch.hub's cache), or 'random' to try without",
    )
    option("--n_clips", type=int, default=s.n_clips, help="clips a video")
    option("--clip_len", type=int, default=s.clip_len, help="frames a clip")
    option("--size", type=int, default=s.size, help="pixels a side that the encoder sees")
    option("--sampling_seed", type=int, default=s.seed, help="seed of the random clip starts")
    option("--image_batch", type=int, default=d.batch_size, help="images a batch; 0: by device")
    option("--workers", type=int, default=d.workers, help="decoder processes; 0: by cores")


def settings_from(typed):
    """Parsed options (a dict) -> Settings; UserError for a number that makes no sense."""
    for name in ("n_clips", "clip_len", "size"):
        if typed[name] < 1:
            raise UserError(f"--{name} must be 1 or more, not {typed[name]}")
    sampling = Sampling(typed["n_clips"], typed["clip_len"], typed["size"], typed["sampling_seed"])
    return Settings(
        typed["weights"], sampling, typed.get("device", ""), typed["image_batch"], typed["workers"]
    )


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="a folder of study folders, or of one study's files")
    parser.add_argument("--out", required=True, help="folder for the HDF5 files")
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1; '': CUDA if there is one")
    add_options(parser)
    args = parser.parse_args(argv)
    summary = extract(find_studies(args.source), args.out, settings_from(vars(args)))
    summary.print()
    print(f"embeddings in {args.out}")
    if not summary.written and not summary.finished:
        raise UserError(f"no study in {args.source} has a usable video")


if __name__ == "__main__":
    run_main(main, "extract.py")
