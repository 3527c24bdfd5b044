"""The studies that a command works on: a dataset's clip embeddings, or a folder of videos."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echofocus_core.base.console import EXTRACT, RUN, UserError, count_of, some
from echofocus_core.study.folds import sample_ids, stored_names
from echofocus_core.study.labels import label_file, read_rows
from echofocus_core.video import extract
from echofocus_core.video.joined import open_stores
from echofocus_core.video.single_videos import VideosOf
from echofocus_core.video.store import MADE_WITH, open_store
from echofocus_core.video.studies import studies_of_dataset

CLIP_EMBEDDINGS = Path("clip_embeddings")  # of --videos, unless --keep names another folder


@dataclass(frozen=True)
class Source:
    """The studies of a dataset, or of a folder of videos, with their clip embeddings."""

    name: str  # in the names of output files
    store: object
    requested: tuple[str, ...] = ()  # ids of a folder of videos, also those that are unusable
    studies: tuple = ()  # the videos of each, where they are available

    @property
    def eids(self):
        """The studies that have embeddings."""
        return list(self.store.files)

    def unusable(self):
        """Study id -> why a study of a folder of videos has no embeddings."""
        absent = sorted(set(self.requested) - set(self.store.files))
        return dict.fromkeys(absent, "no usable video: see extract_log.csv")


def open_source(job, limited=False):
    """(Source, Dataset) of a Job; videos are extracted once, for all models. limited: see
    `Job.with_source`. Raises UserError."""
    if job.reads_videos:
        return extract_videos(job, limited)
    store = open_embeddings(job.dataset, job.task, job.settings)
    return Source(job.settings.dataset, store), job.dataset


def open_embeddings(dataset, task, settings, listener=RUN):
    """The store of a dataset's clip embeddings, by study, or by video if the labels are."""
    store = open_stores(dataset.embedding_paths, listener, settings.max_videos_per_study)
    return of_level(store, task, listener)


def of_level(store, task, listener=RUN):
    if not task or task.level != "video":
        return store
    if len(store.parts) > 1:
        raise UserError("labels of single videos need a dataset with one embedding_path")
    return VideosOf(store, listener)


def extract_videos(job, limited=False):
    """(Source, Dataset) of videos, extracted by the processes of the job together.

    Each source, encoder and way of sampling has its own folder.
    """
    settings, dataset = job.settings, job.dataset
    if settings.videos:
        videos = Path(settings.videos)
        grouping = [settings.group, settings.manifest, settings.study_id]
        studies = extract.find_studies(videos, *grouping)
        limited = limited or settings.select == "all"  # else the limit is on explanations
    else:
        videos, grouping = dataset.video_base_path, [dataset.video_subdir_format]
        print(f"{settings.dataset} has no clip embeddings yet; reading its videos in {videos}")
        studies = studies_of_dataset(videos, *grouping)
    names = sample_ids([s.name for s in studies], settings.sample_limit if limited else 0)
    studies = [s for s in studies if s.name in set(names)]
    encoder = extract.encoder_of(settings)
    folder = folder_of(videos, grouping, settings, encoder)
    summaries = job.world.gather(extract.extract(studies, folder, settings, encoder))
    summary = extract.merge_summaries(summaries)
    summary.print()
    summary.refuse_nothing(videos)
    size = sum(file.stat().st_size for file in folder.glob("*.hdf5")) / 1e6
    print(
        f"clip embeddings are kept in {folder} ({size:.1f} MB), for other models too; delete that "
        "folder to free the space"
    )
    store = open_store(folder, RUN, settings.max_videos_per_study)
    names = sorted(s.name for s in studies)  # the folder may have others
    store.files = {eid: store.files[eid] for eid in names if eid in store.files}
    requested, units = names, of_level(store, job.task)
    if units is not store:
        requested = [*units.files, *(eid for eid in names if eid not in store.files)]
    name = folder.name if settings.videos else settings.dataset
    source = Source(name, units, tuple(requested), tuple(studies))
    return source, dataset.model_copy(update={"embedding_path": folder})


def folder_of(videos, grouping, settings, encoder):
    """The folder of clip embeddings for some videos: <name>_<digest of source and sampling>."""
    attributes = extract.attributes_of(settings, encoder)
    attributes = {k: v for k, v in attributes.items() if k not in ("version", "weights")}
    key = json.dumps([str(videos.resolve()), grouping, attributes], sort_keys=True)
    key = hashlib.sha256(key.encode()).hexdigest()[:8]
    return Path(settings.keep or CLIP_EMBEDDINGS) / f"{videos.resolve().name}_{key}"


def embeddings_name(store):
    """The name of the folder or file of a store's embeddings."""
    return "+".join(part.folder.name for part in store.parts.values())


def refuse_other_embeddings(model, source):
    """UserError for the dataset of a model's training with embeddings of another name and without
    the digest of the model's encoder."""
    record, store = model.record, source.store
    trained, now = record.embeddings, embeddings_name(store)
    if source.name != record.dataset or trained in ("", now):
        return
    digests = set(store.made_with(source.eids)["weights_sha256"])
    if not record.encoder_sha256 or digests != {record.encoder_sha256}:
        raise UserError(
            f"{model.folder.name} was trained on the clip embeddings in {trained}; the dataset "
            f"{source.name} has those in {now}. Give the folder with --dataset {source.name} "
            f"--embedding_path .../{trained}"
        )


def refuse_mixed(store, eids, allowed, findings):
    """Report an error if embeddings were made with different encoders or settings, or some have no
    record; with --allow_mixed a warning."""
    facts = [
        (f"the embeddings{f' of {encoder}' if encoder else ''}", name, studies)
        for encoder, part in store.parts.items()
        for name, studies in part.made_with([eid for eid in eids if eid in part.files]).items()
    ]
    for which, name, studies in facts:
        if len(studies) < 2:
            continue
        kinds = sorted(studies.items(), key=lambda item: -len(item[1]))
        groups = [
            f"{str(kind)[:12] or 'not recorded'} ({count_of(len(e), 'studies')}: {some(e)})"
            for kind, e in kinds
        ]
        text = f"{which} were made with different {name}: {some(groups)}"
        if allowed:
            findings.warning(text, "they are used (--allow_mixed)")
        else:
            remedy = f"extract all with the same settings ({EXTRACT} --redo), or --allow_mixed"
            findings.error(text, remedy)


def warn_of_other_input(model, store, eids, listener=RUN, names=MADE_WITH):
    """Warn about studies embedded with another encoder or other clips than the model's training
    data. Returns {warning: study ids}. UserError if it reads other encoders together."""
    refuse_other_encoders(model, store, eids)
    name, warnings, recorded = model.folder.name, {}, []
    for part, reference in zip(store.parts.values(), model.record.inputs.values(), strict=True):
        trained = reference.model_dump()
        trained["weights_sha256"] = model.record.encoder_sha256 or trained["weights_sha256"]
        recorded.append(trained["weights_sha256"])
        made_with = part.made_with([eid for eid in eids if eid in part.files])
        for what in names:
            before = str(trained[what] or "")
            for value, studies in made_with[what].items():
                if not before or value in ("", before):
                    continue
                fact, n = ("the encoder weights", 12) if what == "weights_sha256" else (what, None)
                text = (
                    f"{name} was trained on embeddings of {fact} {before[:n]}, but "
                    f"{count_of(len(studies), 'studies have')} {value[:n]} ({some(studies)}): its "
                    "answers may mean nothing there"
                )
                listener.warning(text, "extract them with the settings of its training")
                warnings[text] = studies
    if not all(recorded):
        listener.ok(f"{name} does not record its encoder")
    elif not warnings:
        listener.ok("the model and the embeddings use the same encoder")
    return warnings


def refuse_other_width(model, store, eids):
    """UserError if no study has clip embeddings as wide as those that the model was trained on."""
    widths = {header.width for _, header in store.readable_headers(eids)}
    if widths and model.record.width not in widths:
        raise UserError(
            f"{model.folder.name} was trained on clip embeddings with {model.record.width} "
            f"features; {embeddings_name(store)} has {some(sorted(widths))}: give "
            "the embeddings of the model's encoder (--embedding_path)"
        )


def refuse_other_encoders(model, store, eids):
    """UserError if a model reads the embeddings of other encoders together than a dataset has."""
    trained, now = model.record.encoders, store.parts
    if len(trained) < 2 and len(now) < 2:
        refuse_other_width(model, store, eids)
        return
    trained = dict(zip(trained or [""], np.ravel(model.record.width), strict=True))
    now = dict(zip(now, np.ravel(store.width(eids)), strict=True))
    swapped = set(trained) == set(now) and list(trained) != list(now)
    if swapped or list(trained.values()) != list(now.values()):
        one, other = (
            " and ".join(f"{name or 'one encoder'} ({width} features)" for name, width in x.items())
            for x in (trained, now)
        )
        raise UserError(
            f"{model.folder.name} was trained on clip embeddings of {one}; the dataset has {other}:"
            " its embedding_path must name the same encoders in the same order"
        )


def labelled_ids(job):
    """The study ids of the dataset's label table; none if it has no table or other studies."""
    task, dataset, store = job.task, job.dataset, job.source.store
    file = label_file(task, dataset)
    if file.path is None or not file.path.is_file():
        return []
    ids = read_rows(file, []).index
    ids = list(ids.to_series().replace(stored_names(ids, store)))
    if dataset.label_path or set(ids) & set(store.files):
        return ids
    print(f"{file.path.name} names none of these studies: they count as unlabelled")
    return []


def source_studies(job, eids):
    """Study id -> the Study of its videos, where they are available."""
    studies, dataset = job.source.studies, job.dataset
    if not studies and dataset.video_base_path:
        studies = studies_of_dataset(dataset.video_base_path, dataset.video_subdir_format, eids)
    return {study.name: study for study in studies}
