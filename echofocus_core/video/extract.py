"""Clip embeddings from echo videos, one HDF5 file per study.

    python embed/extract.py SOURCE --out DIR

SOURCE is a folder of study folders, or of the files of one study. A study folder may have
subfolders of any depth, and any file names. Each study becomes DIR/<study>.hdf5:

    embeddings   (V videos, C clips, 768) float32
    videos       (V,) paths relative to the study folder
    clip_starts  (V, C) int64, the clip's start as drawn, in frames
    augmented    (K, V, C, 768) float32, with --augment K: randomly transformed copies
    skipped      (M, 2) path and reason of the files that gave no clips
    files        (F, 7) a row for each file, see `store.FileRecord`
    attributes   encoder, weights and their SHA-256, sampling, seed, version

DIR/extract_log.csv, written when the run ends, has a row for each video.

Data flow: studies.find_studies -> Run.begin (videos without a result) -> decode (worker processes)
-> Batches (of images or clips, across videos and studies) -> Run.collect -> write_study (when the
study's last video is finished).
"""

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from echofocus_core import __version__
from echofocus_core.base.console import (
    EXTRACT,
    PROGRAM,
    RUN,
    Parser,
    UserError,
    clean_text,
    count_of,
    print_next,
    progress,
    reason_lines,
    run_main,
    some,
)
from echofocus_core.base.files import atomic_path, lock, stamp_of, write_table
from echofocus_core.base.hdf5 import UNREADABLE
from echofocus_core.base.log import message_log
from echofocus_core.base.options import Settings, add_options, validate_as
from echofocus_core.base.parallel import map_ahead
from echofocus_core.base.resume import check_resume, differences
from echofocus_core.base.world import exact_convolutions, pick_device
from echofocus_core.video import panecho, store
from echofocus_core.video.decode import (
    TOO_MUCH,
    NotNow,
    Sampling,
    SourceGone,
    VideoError,
    content_digest,
    read_clips,
)
from echofocus_core.video.encoders import open_encoder
from echofocus_core.video.perturb import read_perturbations
from echofocus_core.video.studies import find_studies, shard_from, visible
from echofocus_core.video.views import classify_views

EXAMPLE = "videos/site --out embeddings/site --mask sector"  # of --help
DECODE_SECONDS = 300  # a decoder that takes longer over one file is stopped
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOT_COMPARED = ("version", "weights", "weights_seen")  # attributes that change no number
# Kinds of notes on videos.
ALMOST, COPY = "almost the same as another video", "the same frames as in another study"
NOTES = {  # kind -> warning on the videos with such a note, remedy
    COPY: ("files have the same frames as one of another study",
           "if they are of two patients, one may be in training and the other in the test"),
    ALMOST: ("videos have almost the same embeddings as another of their study",
             "they may be one loop that was exported twice"),
    TOO_MUCH: ("videos lose more than a tenth of their moving pixels by --mask sector",
               "look at some of them"),
}  # fmt: skip
# The states of a study after a run.
EXTRACTED, FINISHED = "extracted", "already there"
EMPTY, UNDONE = "without a usable video", "left for the next run"
LISTED = 20  # skipped files named on screen; all of them are in the log
LOG_COLUMNS = ("study", "video", "frames", "seconds", "encode_seconds", "result", "reason")


# ---------------------------------------------------------------------------------------- decode


class DecoderProcess:
    """`video/decode.py` in a separate process, started when needed and restarted after a crash."""

    def __init__(self):
        self.process = None

    def __call__(self, *call):
        """Run (function, *arguments): (its result or a VideoError, seconds)."""
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
    yield from map_in_processes(calls, workers)


def map_in_processes(calls, workers):
    """(job, call) pairs -> (job, reply of a DecoderProcess), in order, computed ahead of use.

    workers: see `n_decoders`. At most twice as many replies as workers are held.
    """
    workers = n_decoders(workers)
    idle = [DecoderProcess() for _ in range(workers)]

    def work(item):
        job, call = item
        decoder = idle.pop()
        try:
            return job, decoder(*call)
        finally:
            idle.append(decoder)

    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from map_ahead(pool, work, calls, 2 * workers)
    finally:
        for decoder in idle:
            decoder.close()


# ---------------------------------------------------------------------------------------- encode


class Pending:
    """A video that is being encoded: its clips, and those of its transformed copies."""

    def __init__(self, job, reply, encoder, device):
        self.job, self.reply = job, reply
        frames = torch.from_numpy(np.concatenate([clips.frames for clips in reply[0]])).to(device)
        first = np.cumsum([0] + [len(clips.frames) for clips in reply[0]])
        index = [clips.index + first[k] * (clips.index >= 0) for k, clips in enumerate(reply[0])]
        self.pieces = encoder.pieces(frames, np.concatenate(index))
        self.taken = 0  # pieces sent to the encoder
        self.features = []  # theirs, (n, width) tensors in order
        self.shares = []  # (share of a batch, its Stopwatch) of each of `features`

    def take(self, n):
        """The next pieces, at most `n`, normalised: float32 (n, ...)."""
        pieces = self.pieces[self.taken : self.taken + n]
        self.taken += len(pieces)
        return pieces

    @property
    def is_encoded(self):
        return sum(map(len, self.features)) == len(self.pieces)

    def encode_seconds(self):
        return sum(share * watch.seconds() for share, watch in self.shares)


class Stopwatch:
    """The seconds of a `with` block, on a GPU measured there without waiting for it."""

    def __init__(self, device):
        self.gpu = torch.device(device).type == "cuda"

    def now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.start = self.now()
        return self

    def __exit__(self, *_):
        self.end = self.now()

    def seconds(self):
        """Once the results of the block have been read."""
        return self.start.elapsed_time(self.end) / 1000 if self.gpu else self.end - self.start


class Batches:
    """Fill batches with the pieces of successive videos; return the embeddings video by video.

    Every batch but the last is full, whatever the length of the videos. The ClipEncoder is modified
    (see `ClipEncoder.prepare`). batch_size: in pieces, such as images of PanEcho or whole clips.
    """

    def __init__(self, encoder, device, batch_size, precision):
        self.encoder, self.device, self.batch_size = encoder, device, batch_size
        kind, dtype = torch.device(device).type, PRECISIONS[precision]
        self.autocast = partial(torch.autocast, kind, torch.bfloat16, dtype == torch.bfloat16)
        encoder.prepare(device, dtype)
        self.waiting, self.batch, self.free = deque(), [], batch_size

    @torch.inference_mode()
    def __call__(self, decoded):
        """(job, reply) -> (job, reply, embeddings, seconds of encoding): see `decode`; embeddings
        are float32 (copies, C, width), or None when the reply is a VideoError."""
        for job, reply in decoded:
            if isinstance(reply[0], VideoError):
                yield job, reply, None, 0.0
                continue
            self.put(Pending(job, reply, self.encoder, self.device))
            yield from self.pop_finished()
        if self.batch:
            self.run_batch()
        yield from self.pop_finished()

    def put(self, pending):
        self.waiting.append(pending)
        while pending.taken < len(pending.pieces):
            pieces = pending.take(self.free)
            self.batch.append((pending, pieces))
            self.free -= len(pieces)
            if self.free == 0:
                self.run_batch()

    def run_batch(self):
        images = torch.cat([x for _, x in self.batch])
        with Stopwatch(self.device) as watch, self.autocast():
            features = self.encoder.encode(images)
            if not isinstance(features, torch.Tensor):
                kind = type(features).__name__
                raise UserError(f"{self.encoder.name}: encode returns {kind}, not a torch.Tensor")
            features = features.float()
        for pending, pieces in self.batch:
            part, features = features[: len(pieces)], features[len(pieces) :]
            pending.features.append(part)
            pending.shares.append((len(pieces) / len(images), watch))
        self.batch, self.free = [], self.batch_size

    def pop_finished(self):
        """Videos all of whose pieces are encoded, in the order of arrival."""
        while self.waiting and self.waiting[0].is_encoded:
            video = self.waiting.popleft()
            with self.autocast():
                embeddings = video.pieces.join(torch.cat(video.features)).float().cpu().numpy()
            if embeddings.shape[1:] != (width := self.encoder.width,):
                raise UserError(f"{self.encoder.name} returns {embeddings.shape}, not (n, {width})")
            if not np.isfinite(embeddings).all():
                raise UserError(f"{self.encoder.name} returns NaN or infinity: check its weights")
            copies = np.stack(np.split(embeddings, len(video.reply[0])))
            yield video.job, video.reply, copies, video.encode_seconds()


# ------------------------------------------------------------------------------------------- run

USUAL = (  # reasons for skipping files that every export contains next to cines
    "still image", "M-mode", "spectral Doppler", "not an ultrasound", "DICOM without image",
    "a repeat",
)  # fmt: skip


@dataclass
class Summary:
    """The outcome of a run."""

    studies: dict[str, str] = field(default_factory=dict)  # name -> state, such as EXTRACTED
    rows: list[tuple] = field(default_factory=list)  # of the log: LOG_COLUMNS of each video

    def print(self):
        """Print counts, then the skipped files with their reasons."""
        states, notes, skipped = Counter(self.studies.values()), Counter(), {}
        for study, video, *_, result, reason in self.rows:
            if result == "skipped":
                skipped[f"{study}/{video}"] = reason
            else:
                notes.update(note.split(":")[0] for note in reason.split("; ") if note)
        n = count_of(states[EXTRACTED], "studies")
        print(f"{n} {EXTRACTED}, {states[FINISHED]} {FINISHED}")
        if notes:
            kinds = ", ".join(f"{kind} {n}" for kind, n in notes.most_common())
            print(f"notes in extract_log.csv: {kinds}")
        for kind, (text, remedy) in NOTES.items():
            if n := notes[kind]:
                RUN.warning(f"{n} {text}", f"{remedy}; see '{kind}' in extract_log.csv")
        if skipped:
            lines = reason_lines(skipped, LISTED)
            usual = all(reason.startswith(USUAL) for reason in skipped.values())
            report = print if usual else RUN.warning
            report(f"{count_of(len(skipped), 'files')} skipped, see extract_log.csv:{lines}")
            kinds = Counter(reason.split(":")[0] for reason in skipped.values())
            print("by reason: " + ", ".join(f"{k} {n}" for k, n in kinds.most_common()))
        for state in (EMPTY, UNDONE):
            if names := [name for name in self.studies if self.studies[name] == state]:
                RUN.warning(f"{count_of(len(names), 'studies')} {state}: {some(names, LISTED)}")

    def refuse_nothing(self, source):
        """UserError if a run has no usable study."""
        if not {EXTRACTED, FINISHED} & set(self.studies.values()):
            raise UserError(f"no study in {source} has a usable video")


def merge_summaries(summaries):
    """The Summary of all processes."""
    total = Summary()
    for summary in summaries:
        total.studies |= summary.studies
        total.rows += summary.rows
    return total


@dataclass
class StudyProgress:
    """A study whose videos are being read. Videos have their names in the outputs (`visible`)."""

    waiting: set[str]  # videos without a result
    stamps: dict[str, str]  # of each video's file, when the study was started
    before: dict[str, store.FileRecord]  # from an earlier run
    records: dict[str, store.FileRecord]
    results: dict[str, tuple]  # (starts, embeddings), of videos with clips
    seconds: dict[str, tuple] = field(default_factory=dict)  # to decode and to encode a video
    gone: bool = False  # a file can no longer be reached


class Run:
    """One pass over studies: chooses the videos to read and writes the results.

    attributes: of the HDF5 files.
    """

    def __init__(self, out, attributes, redo):
        self.out, self.attributes, self.redo = Path(out), attributes, redo
        self.summary = Summary()
        self.in_progress = {}  # study name -> StudyProgress
        self.first_of = {}  # start of a digest of frames -> the first study/video that has it

    def begin(self, study, bar):
        """Yield a study's videos that are new, changed, or failed for a temporary reason."""
        path, details = self.previous(study)
        before, starts = details.files, details.starts
        videos = {visible(video): video for video in study.videos}
        stamps = {name: stamp_of_source(study.source(v)) for name, v in videos.items()}
        kept = {
            name: before[name]
            for name, video in videos.items()
            if name in before and is_unchanged(before[name], stamps[name], study.source(video))
        }
        left_out = {
            visible(v): store.FileRecord(result="again", reason=why)
            for v, why in study.left_out.items()
        }
        results = {}
        if self.redo or kept | left_out != before or videos.keys() - kept.keys():
            # The first file with the frames of a repeat may have changed: read the repeats again.
            kept = {name: record for name, record in kept.items() if record.result != "repeat"}
            try:
                copies = store.load_copies(path) if starts else None  # (1 + K, V, C, 768)
                results = {
                    video: (starts[video], copies[:, i])
                    for i, video in enumerate(starts) if video in kept
                }  # fmt: skip
            except UNREADABLE:  # damaged since it was written
                kept = before = {}
        waiting = videos.keys() - kept.keys()
        self.in_progress[study.name] = StudyProgress(
            waiting, stamps, before, kept | left_out, results
        )
        bar.update(len(kept))
        if not waiting:
            self.finish(study)
        for name in sorted(waiting):
            yield study, videos[name]

    def previous(self, study):
        """(path, StudyDetails) of an earlier run's file of a study; empty without a usable one.

        Raises UserError where the file was made with other settings and there is no --redo.
        """
        main, empty = store.study_path(self.out, study), store.empty_path(self.out, study)
        present = {k: v for k, v in self.attributes.items() if k not in NOT_COMPARED}
        for path in [main] if self.redo else [main, empty]:
            try:
                details = store.load_details(path)
            except UNREADABLE:  # missing or damaged
                continue
            if path == main and not self.redo:
                remedy = "use another folder for the embeddings, or --redo to replace such files"
                check_resume(path, details.attributes, present, remedy=remedy)
            if not differences(details.attributes, present):
                return path, details
        return main, store.StudyDetails()

    def collect(self, study, video, reply, embeddings, seconds):
        """Take a video's Clips or VideoError; with the last one of a study, write the study."""
        work, name = self.in_progress[study.name], visible(video)
        stamp = work.stamps[name]
        if not isinstance(reply, VideoError) and stamp_of_source(study.source(video)) != stamp:
            reply = NotNow("it changed while it was read")
        if isinstance(reply, VideoError):
            result = "again" if isinstance(reply, NotNow) else "skipped"
            record = store.FileRecord(stamp, "", result, "", clean_text(reply))
            work.gone |= isinstance(reply, SourceGone)
        else:
            plain = reply[0]
            facts = str(plain.n_frames), plain.note, plain.pixels
            record = store.FileRecord(stamp, plain.content, "ok", *facts)
            work.results[name] = plain.starts, embeddings
        work.records[name], work.seconds[name] = record, seconds
        work.waiting.remove(name)
        if not work.waiting:
            self.finish(study)

    def finish(self, study):
        """Write a study whose videos all have a result, and add it to the summary."""
        work = self.in_progress.pop(study.name)
        if work.results:
            compare_videos(work.records, work.results)
        usable = any(record.result == "ok" for record in work.records.values())
        state = (FINISHED if work.records == work.before else EXTRACTED) if usable else EMPTY
        self.summary.studies[study.name] = UNDONE if work.gone else state
        if work.gone and not study.folder.is_dir():
            raise UserError(
                f"{study.folder} can no longer be reached; finished studies are kept, run the same "
                "command again to resume"
            )
        if not work.gone and work.records != work.before:
            path, other = store.study_path(self.out, study), store.empty_path(self.out, study)
            if not usable:
                path, other = other, path
            named = {"names_patient": study.names_patient} if study.names_patient else {}
            with atomic_path(path) as temporary:
                store.write_study(temporary, work.results, self.attributes | named, work.records)
            other.unlink(missing_ok=True)
        for name, record in sorted(work.records.items()):
            file, result, reason = f"{study.name}/{name}", "skipped", record.reason
            if record.result == "ok":
                result, first = "ok", self.first_of.setdefault(record.pixels[:16], file)
                if first != file:
                    reason = "; ".join(filter(None, [reason, f"{COPY}: {first}"]))
            seconds = [f"{x:.3f}" for x in work.seconds.get(name, ())] or ["", ""]
            row = study.name, name, record.frames, *seconds, result, reason
            self.summary.rows.append(row)


def compare_videos(records, results):
    """Keep one of a study's videos with the same frames, and note those that are almost the same.

    Changes the FileRecords and results of a StudyProgress; the order of reading has no effect.
    """
    first_of, names = {}, sorted(results, key=lambda name: (name.count("/"), name))
    for name in names:
        notes = records[name].reason.partition(f"{ALMOST}:")[0].removesuffix("; ")
        records[name] = replace(records[name], reason=notes)
        first = first_of.setdefault(records[name].pixels, name)
        if first != name:
            reason = f"a repeat: the same frames as {first}"
            records[name] = replace(records[name], result="repeat", content="", reason=reason)
            del results[name]
    names = [name for name in names if name in results]
    embeddings = np.stack([results[name][1][0] for name in names])
    for i, j in store.almost_the_same(embeddings):
        notes = filter(None, [records[names[j]].reason, f"{ALMOST}: {names[i]}"])
        records[names[j]] = replace(records[names[j]], reason="; ".join(notes))


def stamp_of_source(source):
    """A digest of the size and time of a video's file or files; '' when one is missing.

    The time itself is not recorded, since it can be the date of an exam.
    """
    stamps = [stamp_of(path) for path in (source if isinstance(source, list) else [source])]
    if None in stamps:
        return ""
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def is_unchanged(record, stamp, source):
    """Whether a file's earlier result is still valid: by its size and time, else by its bytes."""
    if record.result == "again":
        return False
    if record.stamp == stamp:
        return True
    try:
        return record.content != "" and content_digest(source) == record.content
    except VideoError:
        return False


def n_decoders(workers):
    """The number of decoder processes; by default (0), half the cores, at most 16."""
    return workers or max(1, min(16, (os.cpu_count() or 1) // 2))


def default_batch(device, size):
    """Images per batch: many on a GPU; on a CPU few, so that activations stay in the cache."""
    return 256 if torch.device(device).type == "cuda" else min(32, max(1, 8 * 224**2 // size**2))


def encoder_of(settings):
    """The ClipEncoder of the options (`options.Settings`)."""
    return open_encoder(settings.encoder, settings.weights, settings.clip_len, settings.size)


def sampling_of(settings, encoder):
    """The Sampling of the options (`options.Settings`) for a ClipEncoder."""
    names = ("n_clips", "clip_len", "size", "starts", "mask", "augment")
    chosen = {name: getattr(settings, name) for name in names}
    changes = read_perturbations(settings.perturb)
    chosen["perturb"] = " ".join(f"{kind}={strength:g}" for kind, strength in changes.items())
    sampling = Sampling(seed=settings.sampling_seed, **chosen)
    return encoder.sampling(sampling, settings.model_fields_set)


def attributes_of(settings, encoder):
    """HDF5 attributes with the settings of embeddings by a ClipEncoder."""
    weights, sampling = Path(encoder.weights).name, sampling_of(settings, encoder)
    attributes = {
        "encoder": encoder.name,
        "weights": "random: untrained, not for results" if weights == "random" else weights,
        "weights_sha256": encoder.digest(),
        "precision": settings.precision,
        **{k: v for k, v in vars(sampling).items() if k not in ("pixels", "stride", "padding")},
        "sampling": encoder.sampling_text(sampling),
        "version": __version__,
    }
    if not sampling.perturb:
        del attributes["perturb"]
    if sampling.pixels:  # clips without random starts
        del attributes["starts"], attributes["augment"]
        attributes |= {"stride": sampling.stride}
        attributes |= {"licence": encoder.licence, "citation": encoder.citation}
    return attributes


def shard_name(index, count):
    """The end of the names of a shard's tables."""
    return f"_{index}of{count}" if count > 1 else ""


def extract(studies, out, settings, encoder=None):
    """Extract this shard's part of `studies` into the folder `out`; returns a Summary.

    settings: the options (`options.Settings`). encoder: the ClipEncoder that they name, if it is
    loaded already.
    Studies that are complete are kept, so that a stopped run resumes. Raises UserError, also when
    another process extracts the same shard into the folder.
    """
    index, count = shard_from(settings.shard)
    studies = studies[index::count]
    name = shard_name(index, count)
    with lock(Path(out) / f".extract{name}", timeout=0):
        encoder = encoder or encoder_of(settings)
        attributes = prepare_encoder(encoder, out, settings)
        run = Run(out, attributes, settings.redo)
        n_videos = sum(len(study.videos) for study in studies)
        label = f"extract {index}/{count}" if count > 1 else "extract"
        bar = progress(total=n_videos, desc=label, unit="video", disable=not n_videos)
        with exact_convolutions(), bar:
            jobs = chain.from_iterable(run.begin(study, bar) for study in studies)
            decoded = decode(jobs, sampling_of(settings, encoder), settings.workers)
            batches = batches_of(encoder, settings)
            with contextlib.closing(decoded):
                for (study, video), (reply, seconds), embeddings, encoding in batches(decoded):
                    bar.update()
                    run.collect(study, video, reply, embeddings, (seconds, encoding))
        write_log(run.summary.rows, Path(out) / f"extract_log{name}.csv")
    return run.summary


def write_log(rows, path):
    """Write the log; videos that were not read again keep the seconds of the log at `path`."""
    log = pd.DataFrame(rows, columns=LOG_COLUMNS)
    keys, seconds = ["study", "video"], ["seconds", "encode_seconds"]
    with contextlib.suppress(OSError, ValueError, KeyError):  # no log, or an older or edited one
        before = pd.read_csv(path, dtype=str, keep_default_na=False)
        before = before.drop_duplicates(keys).set_index(keys)[seconds]
        before = before.reindex(pd.MultiIndex.from_frame(log[keys])).fillna("").to_numpy()
        log[seconds] = log[seconds].where(log[seconds] != "", before)
    write_table(log, path)


def extraction_seconds(folder):
    """Mean seconds of decoding and encoding a study, from the logs in a folder of embeddings;
    None without them."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        logs = [pd.read_csv(path) for path in Path(folder).glob("extract_log*.csv")]
        log = pd.concat(logs)[["study", "seconds", "encode_seconds"]].dropna()
        if len(log):
            return float(log[["seconds", "encode_seconds"]].sum(axis=None) / log["study"].nunique())
    return None


def prepare_encoder(encoder, out, settings):
    """Warn about an encoder and write its training patients; the attributes of the HDF5 files."""
    attributes = attributes_of(settings, encoder)
    if settings.weights == "random":
        print("RANDOM WEIGHTS: the encoder is untrained; for trials only, not for results")
    panecho.warn_of_other_clips(encoder.record, encoder.weights, settings.size, settings.clip_len)
    if encoder.seen:
        store.write_encoder_seen(out, {encoder.sha256: encoder.seen})
    return attributes | {"weights_seen": "listed" if encoder.seen else "elsewhere"}


def batches_of(encoder, settings):
    """The Batches of a ClipEncoder on the device of the options."""
    device, size = pick_device(settings.device), sampling_of(settings, encoder).size
    images = settings.image_batch or default_batch(device, size)
    return Batches(encoder, device, max(1, images // encoder.images_of_piece()), settings.precision)


def main(argv=None):
    parser = Parser("SOURCE --out FOLDER", EXTRACT, __doc__.split("\n\n")[0], EXAMPLE)
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder of study folders, or of one study's files"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the HDF5 files")
    add_options(parser, "extract")
    typed = vars(parser.parse_args(argv))
    source, out = typed.pop("source"), typed.pop("out")
    options = validate_as(Settings, typed)
    with message_log(options):
        extract_source(source, out, options)


def extract_source(source, out, options):
    """Extract a folder of videos, and classify their views if --views is given."""
    grouping = options.group, options.manifest, options.study_id
    studies = find_studies(source, *grouping, leave_out=out)
    summary = extract(studies, out, options)
    summary.print()
    print(f"embeddings in {out}")
    index, count = shard_from(options.shard)
    if options.views:
        path = Path(out) / f"views{shard_name(index, count)}.csv"
        classify_views(studies[index::count], path, out, options, map_in_processes)
    if count == 1:
        summary.refuse_nothing(source)
    print_next(f"{PROGRAM} {'check' if Path('config.json').is_file() else 'init'}")


def program():
    """Run the command line, from a clone or installed."""
    run_main(main, Path(sys.argv[0]).name)
