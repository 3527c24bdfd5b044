"""Clip embeddings from echo videos, one HDF5 file a study.

    python embed/extract.py SOURCE --out DIR

SOURCE is a folder of study folders, or of the files of one study; below a study folder any depth
and any file names will do. Each study becomes DIR/<study>.hdf5:

    embeddings   (V videos, C clips, 768) float32
    videos       (V,) paths relative to the study folder
    clip_starts  (V, C) int64, the clip's start as drawn, in frames
    augmented    (K, V, C, 768) float32, with --augment K: randomly transformed copies
    skipped      (M, 2) path and reason of the files that gave no clips
    files        (F, 6) what is remembered of each file, see `store.FileRecord`
    attributes   how it was made: encoder, weights and their SHA-256, sampling, seed, version

and DIR/extract_log.csv gets a row a video.

The way of the data: studies.find_studies -> Run.jobs (what this worker takes on) -> decode (worker
processes) -> encode (batches of images across videos and studies) -> Run.collect -> write_study
(when a study's last video is through).
"""

import contextlib
import csv
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter, deque
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from echofocus_core import __version__
from echofocus_core.base.console import Parser, Threads, UserError, clean_text, progress, run_main
from echofocus_core.base.files import (
    atomic_path,
    clear_links,
    open_to_add,
    quoted,
    refuse_special,
    stamp_of,
    unquoted,
)
from echofocus_core.base.hdf5 import UNREADABLE
from echofocus_core.base.options import Settings as Options
from echofocus_core.base.options import add_options, validated
from echofocus_core.base.world import exact_convolutions, pick_device
from echofocus_core.video.decode import (
    NotNow,
    Sampling,
    SourceGone,
    VideoError,
    content_digest,
    read_clips,
)
from echofocus_core.video.panecho import (
    can_pack,
    clip_planes,
    load_panecho,
    normalise,
    warn_of_other_clips,
)
from echofocus_core.video.store import (
    FileRecord,
    empty_path,
    keep_encoder_seen,
    read_records,
    read_results,
    study_path,
    weights_seen,
    write_study,
)
from echofocus_core.video.studies import (
    Claims,
    find_studies,
    listed,
    own_first,
    shard_from,
    visible,
)

DECODE_SECONDS = 300  # a decoder that takes longer over one file is stopped
PUBLISHED_SAMPLING = "random starts; frames start-1..start+clip_len-2; BGR; area resize, crop"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAME_BYTES = "the same bytes as another file"
OTHER_STUDY = "the same bytes as a file of another study"
LISTED = 20  # skipped files named on screen; all of them are in the log


@dataclass
class Settings:
    """How to extract; the command line's options carry the same names."""

    weights: str = "panecho"
    sampling: Sampling = field(default_factory=Sampling)
    device: str = ""  # '' is CUDA when there is one
    precision: str = "fp32"
    image_batch: int = 0  # images; 0: see default_batch
    workers: int = 0  # see decoders
    shard: str = "auto"
    redo: bool = False


# ---------------------------------------------------------------------------------------- decode


class DecoderProcess:
    """`embed/video.py` in a process of its own, started when needed and again after a crash."""

    def __init__(self):
        self.process = None

    def __call__(self, *call):
        """Run (function, *arguments): (what it returns, or a VideoError; seconds it took)."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("decode.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process, timed_out = self.process, threading.Event()
        timer = threading.Timer(DECODE_SECONDS, lambda: (timed_out.set(), process.kill()))
        timer.start()
        try:
            pickle.dump(call, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.close()
            if timed_out.is_set():
                reason = f"decoder stopped: no result after {DECODE_SECONDS} s"
                return NotNow(reason), DECODE_SECONDS
            return NotNow("the decoder crashed on this file"), 0.0
        finally:
            timer.cancel()

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def decode(jobs, sampling, workers):
    """(study, video) jobs -> ((study, video), (list of Clips or a VideoError, seconds))."""
    calls = (((study, video), (read_clips, study.source(video), sampling)) for study, video in jobs)
    yield from in_processes(calls, workers)


def in_processes(calls, workers):
    """(job, call) pairs -> (job, reply of a DecoderProcess), in order, ahead of use.

    At most twice as many replies as workers are held.
    """
    idle = [DecoderProcess() for _ in range(workers)]

    def work(call):
        decoder = idle.pop()
        try:
            return decoder(*call)
        finally:
            idle.append(decoder)

    ahead = deque()
    with Threads(workers) as pool:
        try:
            for job, call in calls:
                ahead.append((job, pool.submit(work, call)))
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


class Pending:
    """A copy of a video whose images are on their way through the encoder."""

    def __init__(self, job, clips, device):
        frames = torch.from_numpy(clips.frames).to(device)  # (F, S, S, 3)
        self.job, self.clips = job, clips
        self.planes = frames.permute(0, 3, 1, 2).flatten(0, 1)  # (3 F, S, S)
        images, positions = distinct_images(clips.index)
        self.images = torch.from_numpy(images).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        self.taken = 0  # images sent to the encoder
        self.features = []  # their features, (n, 768) pieces in order

    def take(self, n):
        """The next images, `n` at most, normalised: float32 (n, 3, S, S)."""
        numbers = self.images[self.taken : self.taken + n]
        self.taken += len(numbers)
        # A plane keeps its own channel's constants, wherever it stands.
        return normalise(self.planes[numbers], numbers % 3)


class Encoder:
    """Fills batches with the images of successive videos and deals the features out again.

    Every batch but the last is full, whatever the length of the videos. The backbone is this
    encoder's from then on: for a CPU its weights are packed, at images of `size` for best, and
    for bf16 on a GPU they are cast once, LayerNorm's too, which autocast would compute in fp32.
    """

    def __init__(self, backbone, device, batch_size, precision, size):
        self.backbone, self.device, self.batch_size = backbone.to(device), device, batch_size
        kind, dtype = torch.device(device).type, PRECISIONS[precision]
        half = dtype == torch.bfloat16
        self.autocast = partial(torch.autocast, kind, torch.bfloat16, half)
        self.autocast_images = self.autocast
        if kind == "cpu" and can_pack(dtype):
            backbone.encoder.model.pack(dtype, size)
        elif kind == "cuda" and half:
            backbone.encoder.model.features.to(dtype)
            self.autocast_images = contextlib.nullcontext
        self.waiting, self.batch, self.room = deque(), [], batch_size

    @torch.inference_mode()
    def __call__(self, decoded):
        """(job, reply) -> (job, reply, embeddings): see `decode`; a list with (C, 768) float32
        for each Clips of the reply, empty when it is a VideoError."""
        for job, reply in decoded:
            if isinstance(reply[0], VideoError):
                yield job, reply, []
                continue
            for clips in reply[0]:
                self.put(Pending((job, reply), clips, self.device))
            yield from self.finished()
        if self.batch:
            self.run_batch()
        yield from self.finished()

    def put(self, pending):
        self.waiting.append(pending)
        while pending.taken < len(pending.images):
            images = pending.take(self.room)
            self.batch.append((pending, images))
            self.room -= len(images)
            if self.room == 0:
                self.run_batch()

    def run_batch(self):
        with self.autocast_images():
            features = self.backbone.encode_images(torch.cat([x for _, x in self.batch])).float()
        for pending, images in self.batch:
            part, features = features[: len(images)], features[len(images) :]
            pending.features.append(part)
        self.batch, self.room = [], self.batch_size

    def finished(self):
        """Videos all of whose copies are through, first come first served."""
        while self.waiting:
            (job, reply) = self.waiting[0].job
            copies = [self.waiting[k] for k in range(len(reply[0]))]
            if any(sum(map(len, p.features)) < len(p.images) for p in copies):
                return
            yield job, reply, [self.clip_embeddings(self.waiting.popleft()) for _ in copies]

    def clip_embeddings(self, pending):
        with self.autocast():
            clips = torch.cat(pending.features)[pending.positions]  # (C, L, 768)
            return self.backbone.encode_clips(clips).float().cpu().numpy()


# ------------------------------------------------------------------------------------------- run


@dataclass
class Summary:
    """What a run did."""

    written: list[str] = field(default_factory=list)  # study names
    finished: list[str] = field(default_factory=list)  # already there, left alone
    elsewhere: list[str] = field(default_factory=list)  # in the hands of other workers
    empty: list[str] = field(default_factory=list)  # no video gave clips
    undone: list[str] = field(default_factory=list)  # their files could not be reached
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # study, video, reason
    notes: Counter = field(default_factory=Counter)  # what was decided about files that were read
    shared: list[tuple[str, str]] = field(default_factory=list)  # studies with a file in common

    def print(self):
        """A few lines for a person: counts, then the skipped files with their reasons."""
        print(f"{len(self.written)} studies extracted, {len(self.finished)} already there")
        if self.elsewhere:
            print(f"{len(self.elsewhere)} studies left to other workers that hold them")
        if self.notes:
            kinds = ", ".join(f"{kind} {n}" for kind, n in self.notes.most_common())
            print(f"noted in extract_log.csv: {kinds}")
        if self.shared:
            pairs = listed([" and ".join(pair) for pair in self.shared])
            print(
                f"WARNING: {len(self.shared)} pairs of studies share the bytes of files: {pairs}; "
                "where these are of two patients, one may be in training and the other in the test"
            )
        if self.skipped:
            print(f"{len(self.skipped)} files skipped:")
            for study, video, reason in self.skipped[:LISTED]:
                print(f"  {study}/{video}: {reason}")
            if len(self.skipped) > LISTED:
                print(f"  and {len(self.skipped) - LISTED} more, in extract_log.csv")
            kinds = Counter(reason.split(":")[0] for _, _, reason in self.skipped)
            print("by reason: " + ", ".join(f"{k} {n}" for k, n in kinds.most_common()))
        if self.empty:
            print(f"{len(self.empty)} studies without a usable video: {listed(self.empty)}")
        if self.undone:
            print(f"{len(self.undone)} studies left for the next run: {listed(self.undone)}")

    def refuse_nothing(self, source, workers=1):
        """UserError for a run that wrote nothing and found nothing finished."""
        if self.written or self.finished or (self.elsewhere and workers > 1):
            return
        if self.elsewhere:
            raise UserError("another run holds every study of the folder; wait until it ends")
        raise UserError(f"no study in {source} has a usable video")


def together(summaries):
    """The Summary of workers that have all ended."""
    parts = {f.name: [x for s in summaries for x in getattr(s, f.name)] for f in fields(Summary)}
    done = {*parts["written"], *parts["finished"]}
    parts["finished"] = [x for x in parts["finished"] if x not in parts["written"]]
    parts["elsewhere"] = [x for x in parts["elsewhere"] if x not in done]
    parts["notes"] = sum((s.notes for s in summaries), Counter())
    return Summary(**{k: x if k == "notes" else list(dict.fromkeys(x)) for k, x in parts.items()})


class Log:
    """extract_log.csv: a row a video, whoever of the workers that share the folder wrote it last.

    A study's rows are appended when it has none yet; else the file is made anew without the old
    ones. Each worker reads on from where it last stood, so that it knows which studies have rows.
    """

    COLUMNS = ("study", "video", "frames", "seconds", "result", "reason")

    def __init__(self, out, claims):
        self.path, self.claims = out / "extract_log.csv", claims
        self.studies, self.file = set(), None  # studies with rows, in what was read of the file

    def put(self, study, rows):
        with self.claims.alone(self.path.name):
            torn = self.read_on()
            if torn or study in self.studies:
                self.rewrite(study, rows)
            else:
                self.append(rows)
            self.studies.add(study)

    def read_on(self):
        """Take in what others have added; whether the last line is one that broke off."""
        clear_links(self.path)
        there = self.path.stat() if self.path.exists() else None
        known = os.fstat(self.file.fileno()) if self.file else None
        if there and not (known and os.path.samestat(there, known)):  # new, or made anew
            # Held open, so that no later file gets its inode.
            self.studies, self.file = set(), open(self.path, "rb")  # noqa: SIM115
        added = self.file.read() if self.file else b""
        self.studies |= {row[0] for row in csv_rows(added) if row}
        return len(added) > 0 and not added.endswith(b"\n")

    def append(self, rows):
        with open_to_add(self.path) as f:
            header = [] if f.tell() else [self.COLUMNS]
            start = f.tell()
            try:
                f.write(csv_text([*header, *rows]).encode())
                f.flush()
            except OSError:
                os.truncate(self.path, start)
                raise

    def rewrite(self, study, rows):
        old = [row for row in csv_rows(self.path.read_bytes()) if len(row) == len(self.COLUMNS)]
        with atomic_path(self.path) as temporary:
            kept = [row for row in old if row[0] != study]
            temporary.write_text(csv_text([*kept, *rows]), encoding="utf-8", newline="")


def csv_text(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(quoted, row) for row in rows])
    return text.getvalue()


def csv_rows(data):
    """The rows that `csv_text` made, of bytes that may be damaged; no cell holds a line break."""
    rows = []
    for line in data.decode(errors="replace").split("\n"):
        with contextlib.suppress(csv.Error):
            rows += [[unquoted(cell) for cell in row] for row in csv.reader([line])]
    return rows


@dataclass
class StudyInWork:
    """A study whose videos are on their way; names are those of the outputs (`visible`)."""

    waiting: set[str]  # videos that have no result yet
    stamps: dict[str, str]  # of each video's file, when the study was begun
    before: dict[str, FileRecord]  # what was known of the study
    records: dict[str, FileRecord] = field(default_factory=dict)
    results: dict[str, tuple] = field(default_factory=dict)  # (starts, embeddings), with clips
    seconds: dict[str, float] = field(default_factory=dict)
    gone: bool = False  # a file could not be reached any more


class Run:
    """One worker's pass: which studies it takes on, and what becomes of them."""

    def __init__(self, out, attributes, redo, alone=True):
        self.out, self.attributes, self.redo = Path(out), attributes, redo
        self.claims, self.summary = Claims(self.out, alone), Summary()
        self.log = Log(self.out, self.claims)
        self.in_work = {}  # study name -> StudyInWork
        self.contents = {}  # digest of a file's bytes -> the first study that has it

    def jobs(self, studies, bar):
        """Yield the (study, video) pairs to do; studies that others hold are tried again last."""
        held = []
        for study in studies:
            if not self.claims.take(study.name):
                held.append(study)
            else:
                yield from self.begin(study, bar)
        for study in held:
            if not self.claims.take(study.name):
                self.summary.elsewhere.append(study.name)
                bar.update(len(study.videos))
            else:
                yield from self.begin(study, bar)

    def begin(self, study, bar):
        """Yield the study's videos that are new, or changed, or failed for what may have passed."""
        path, before = self.known(study)
        videos = {visible(video): video for video in study.videos}
        stamps = {name: stamp_of_source(study.source(v)) for name, v in videos.items()}
        kept = {
            name: before[name]
            for name, video in videos.items()
            if name in before and is_as_it_was(before[name], stamps[name], study.source(video))
        }
        reason = "the manifest's file is missing"
        missing = {visible(v): FileRecord(result="again", reason=reason) for v in study.missing}
        results = {}
        if self.redo or kept | missing != before or videos.keys() - kept.keys():
            try:
                results = read_results(path, [n for n, r in kept.items() if r.result == "ok"])
            except UNREADABLE:  # damaged since it was written
                kept = before = {}
        waiting = videos.keys() - kept.keys()
        self.in_work[study.name] = StudyInWork(waiting, stamps, before, kept | missing, results)
        bar.update(len(kept))
        if not waiting:
            self.finish(study)
        for name in sorted(waiting):
            yield study, videos[name]

    def known(self, study):
        """(The file that remembers a study, what it remembers); ({}) without such a file."""
        refuse_special(study_path(self.out, study))
        records = read_records(study_path(self.out, study), self.attributes, self.redo)
        if records is not None:
            return study_path(self.out, study), records
        records = (
            None if self.redo else read_records(empty_path(self.out, study), self.attributes, True)
        )
        return empty_path(self.out, study), records or {}

    def collect(self, study, video, reply, embeddings, seconds):
        """Take a video's Clips or VideoError; with the last one of a study, write it."""
        work, name = self.in_work[study.name], visible(video)
        stamp = work.stamps[name]
        if not isinstance(reply, VideoError) and stamp_of_source(study.source(video)) != stamp:
            reply = NotNow("it changed while it was read")
        if isinstance(reply, VideoError):
            result = "again" if isinstance(reply, NotNow) else "skipped"
            record = FileRecord(stamp, "", result, "", clean_text(reply))
            work.gone |= isinstance(reply, SourceGone)
        else:
            plain = reply[0]
            record = FileRecord(stamp, plain.content, "ok", str(plain.n_frames), plain.note)
            work.results[name] = plain.starts, np.stack(embeddings)
        work.records[name], work.seconds[name] = record, seconds
        work.waiting.remove(name)
        if not work.waiting:
            self.finish(study)

    def finish(self, study):
        work, summary = self.in_work.pop(study.name), self.summary
        note_copies(work.records)
        elsewhere = self.in_other_studies(study.name, work.records)
        for name, record in sorted(work.records.items()):
            if record.result != "ok":
                summary.skipped.append((study.name, name, record.reason))
            else:
                summary.notes.update(n.split(":")[0] for n in record.reason.split("; ") if n)
        usable = any(record.result == "ok" for record in work.records.values())
        if work.gone:
            summary.undone.append(study.name)
            if not study.folder.is_dir():
                raise UserError(
                    f"{study.folder} cannot be reached any more; what is finished stays, and the "
                    "same command goes on from here"
                )
        elif work.records == work.before:
            (summary.finished if usable else summary.empty).append(study.name)
        else:
            (summary.written if usable else summary.empty).append(study.name)
            self.write(study, work, usable, elsewhere)
        self.claims.give_back(study.name)

    def in_other_studies(self, study, records):
        """Name -> the study that has the same bytes, of those that this worker has come by."""
        found = {}
        for name, record in sorted(records.items()):
            if record.result == "ok" and record.content:
                first = self.contents.setdefault(record.content[:16], study)
                if first != study:
                    found[name] = first
        self.summary.shared += [(study, other) for other in dict.fromkeys(found.values())]
        return found

    def write(self, study, work, usable, elsewhere):
        """The study's file appears last: a run that dies before it makes the study, and its rows
        of the log, again."""
        also = {name: f"{OTHER_STUDY}: {other}" for name, other in elsewhere.items()}
        rows = [
            (study.name, name, r.frames, f"{work.seconds.get(name, 0):.3f}",
             "ok" if r.result == "ok" else "skipped",
             "; ".join(filter(None, (r.reason, also.get(name)))))
            for name, r in sorted(work.records.items())
        ]  # fmt: skip
        path, other = study_path(self.out, study), empty_path(self.out, study)
        if not usable:
            path, other = other, path
        try:
            with atomic_path(path) as temporary:
                write_study(temporary, work.results, self.attributes, work.records)
                self.log.put(study.name, rows)
            other.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error}; what is finished stays, and the same command goes "
                "on from here"
            ) from error


def stamp_of_source(source):
    """A digest of the size and time of a video's file or files; '' when one is not there.

    A digest, since the time of a file can be the date of an exam.
    """
    stamps = [stamp_of(path) for path in (source if isinstance(source, list) else [source])]
    if None in stamps:
        return ""
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def is_as_it_was(record, stamp, source):
    """Whether a file's remembered result still holds: by its size and time, else by its bytes."""
    if record.result == "again":
        return False
    if record.stamp in ("", stamp):
        return True
    try:
        return record.content != "" and content_digest(source) == record.content
    except VideoError:
        return False


def note_copies(records):
    """Note files of the very same bytes: their clips are the same ones, and count as often."""
    first = {}
    for name, record in sorted(records.items()):
        notes = [n for n in record.reason.split("; ") if n and not n.startswith(SAME_BYTES)]
        if record.result == "ok" and first.setdefault(record.content or name, name) != name:
            notes.append(f"{SAME_BYTES}: {first[record.content]}")
        if record.result == "ok":
            records[name] = replace(record, reason="; ".join(notes))


def decoders(asked):
    """How many decoder processes; 0 asked for: half the cores, 16 at most."""
    return asked or max(1, min(16, (os.cpu_count() or 1) // 2))


def default_batch(device, size):
    """Images a batch: many on a GPU; on a CPU so few that their activations stay in the cache."""
    return 256 if torch.device(device).type == "cuda" else min(32, max(1, 8 * 224**2 // size**2))


def attributes_of(settings, digest):
    """The HDF5 attributes that say how the embeddings were made."""
    sampling, weights = settings.sampling, Path(settings.weights).name
    return {
        "encoder": "PanEcho",
        "weights": "random: untrained, not for results" if weights == "random" else weights,
        "weights_sha256": digest,
        "precision": settings.precision,
        "clip_len": sampling.clip_len,
        "n_clips": sampling.n_clips,
        "size": sampling.size,
        "seed": sampling.seed,
        "starts": sampling.starts,
        "sampling": PUBLISHED_SAMPLING,
        "mask": sampling.mask,
        "augment": sampling.augment,
        "version": __version__,
    }


def extract(studies, out, settings):
    """Extract `studies` into the folder `out`; returns a Summary. Raises UserError.

    What is finished is left alone, so that a run which was stopped goes on where it was. Several
    workers may share `out`: each begins with its own share and then does what others left.
    """
    device = pick_device(settings.device)
    index, count = shard_from(settings.shard)
    loaded = load_panecho(settings.weights, settings.sampling.clip_len)
    if settings.weights == "random":
        print("RANDOM WEIGHTS: the encoder is untrained; good for trying things out, not results")
    attributes = attributes_of(settings, loaded.sha256) | {
        "weights_seen": weights_seen(loaded.seen)
    }
    run = Run(out, attributes, settings.redo, alone=count == 1)
    warn_of_other_clips(
        loaded.record, settings.weights, settings.sampling.size, settings.sampling.clip_len
    )
    if loaded.seen:
        keep_encoder_seen(out, loaded.sha256, loaded.seen)
    workers = decoders(settings.workers)
    size = settings.sampling.size
    batch = settings.image_batch or default_batch(device, size)
    encoder = Encoder(loaded.model.encoder, device, batch, settings.precision, size)
    total = sum(len(s.videos) for s in studies)
    label = f"extract {index}/{count}" if count > 1 else "extract"
    with (
        exact_convolutions(),
        progress(total=total, desc=label, unit="video", disable=not total) as bar,
    ):
        jobs = run.jobs(own_first(studies, index, count), bar)
        with contextlib.closing(decode(jobs, settings.sampling, workers)) as decoded:
            for (study, video), (reply, seconds), embeddings in encoder(decoded):
                bar.update()
                run.collect(study, video, reply, embeddings, seconds)
    return run.summary


def settings_from(typed):
    """Options (a dict, all of them) -> Settings."""
    sampling = Sampling(
        n_clips=typed["n_clips"],
        clip_len=typed["clip_len"],
        size=typed["size"],
        seed=typed["sampling_seed"],
        starts=typed["starts"],
        mask=typed["mask"],
        augment=typed["augment"],
    )
    names = ("weights", "device", "precision", "image_batch", "workers", "shard", "redo")
    return Settings(sampling=sampling, **{name: typed[name] for name in names})


def main(argv=None):
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="a folder of study folders, or of one study's files")
    parser.add_argument("--out", required=True, help="folder for the HDF5 files")
    add_options(parser, "extract")
    typed = vars(parser.parse_args(argv))
    source, out = typed.pop("source"), typed.pop("out")
    options = validated(Options, typed)
    how = options.group, options.manifest, options.study_id
    studies = find_studies(source, *how, leave_out=out)
    summary = extract(studies, out, settings_from(vars(options)))
    summary.print()
    print(f"embeddings in {out}")
    summary.refuse_nothing(source, shard_from(options.shard)[1])


def program():
    """What the command line runs, from the clone or installed."""
    run_main(main, Path(sys.argv[0]).name)
