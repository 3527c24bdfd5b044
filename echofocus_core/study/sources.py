"""The studies a command is given: a dataset's clip embeddings, or a folder of videos."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from echofocus_core.base import checkpoints
from echofocus_core.base.console import EXTRACT, RUN, UserError, some
from echofocus_core.base.options import needs_videos
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.cohort import stored_names
from echofocus_core.study.config import Dataset, Task, input_options, read_config, resolve_settings
from echofocus_core.study.labels import other_unit, read_rows
from echofocus_core.study.loading import load_named, refuse_readings
from echofocus_core.study.models import released_task
from echofocus_core.study.splits import some_of
from echofocus_core.video import extract, panecho
from echofocus_core.video.store import MADE_WITH, VideosOf, open_store
from echofocus_core.video.studies import studies_of_dataset


def store_of(config, settings, name="", listener=RUN):
    """The clip embeddings of a dataset, that of the settings unless another is named."""
    path = config.datasets[name or settings.dataset].embedding_path
    store = open_store(path, listener, settings.max_videos_per_study)
    return of_level(store, config, settings, listener)


def of_level(store, config, settings, listener=RUN):
    """A store of what the task's labels are of: studies, or their videos."""
    task = config.tasks.get(settings.task)
    return VideosOf(store, listener) if task and task.level == "video" else store


def refuse_mixed(store, eids, allowed, findings):
    """An error where studies were made with different encoders or settings, or some do not say.

    With --allow_mixed it is a warning.
    """
    for name, studies in store.made_with(eids).items():
        if len(studies) < 2:
            continue
        kinds = sorted(studies.items(), key=lambda item: -len(item[1]))
        groups = [
            f"{str(kind)[:12] or 'not said'} ({len(e)} studies: {some(e)})" for kind, e in kinds
        ]
        text = f"the embeddings were made with different {name}: {some(groups)}"
        if allowed:
            findings.warning(text, "used all the same (--allow_mixed)")
        else:
            remedy = f"extract all with the same settings ({EXTRACT} --redo), or --allow_mixed"
            findings.error(text, remedy)


def warn_of_other_input(model, store, eids, listener=RUN, names=MADE_WITH):
    """Tell which studies' embeddings were made otherwise than those that the model was trained on:
    by another encoder, of other clips. Returns what was told: sentence -> studies."""
    name, trained, told = model.folder.name, model.record.input, {}
    encoder = model.record.encoder_sha256
    made = store.made_with(eids)
    for what in names:
        was = str((encoder if what == "weights_sha256" else getattr(trained, what)) or "")
        for given, studies in made[what].items() if was else ():
            if given in ("", was):
                continue
            which = f"{len(studies)} studies ({some(studies)}"
            if what == "weights_sha256":
                text = (
                    f"{name} was trained on embeddings of another encoder than those of {which}; "
                )
                text += f"weights {given[:12]}): its answers mean nothing there"
                remedy = f"extract them with the encoder weights of SHA-256 {was[:12]}"
            else:
                text = f"{name} was trained on embeddings of {what} {was}, those of {which}) are "
                text += f"of {given}: its answers may mean nothing there"
                remedy = "extract them with the settings of those it was trained on"
            listener.warning(text, remedy)
            told[text] = studies
    if not encoder:
        listener.ok(f"{name} does not say which encoder it goes with")
    elif not told:
        listener.ok("the model and the embeddings go with one encoder")
    return told


def start_with_model(command, typed, world=None):
    """What commands that use a model begin with: (settings, config, model, source).

    Videos are extracted by the processes of `world` together.
    """
    if typed.get("videos") and typed.get("dataset"):
        raise UserError("--videos and --dataset are two sources: give one")
    needed = not (typed.get("videos") or typed.get("embedding_path"))
    config = read_config(typed.get("config"), needed)
    task = typed.get("task", "")
    if task and not released_task(task):
        config.pick("task", task)
    names = typed.get("model_name", ""), typed.get("run_id", "")
    model = load_named(*names, config, task, pick_device(typed.get("device", "")))
    if command in ("evaluate", "explain"):
        refuse_readings(command, model)
    if model.task not in config.tasks and model.type != "readings":
        config.tasks[model.task] = task_of(model)
    if model.record.level == "video" and (command == "explain" or typed.get("page")):
        raise UserError(f"{model.folder.name} answers for single videos: there are none to choose")
    settings = resolve_settings(command, typed, config, model)
    model.net.to(pick_device(settings.device))  # which the config may say
    if settings.videos or is_of_videos(settings, config):
        source = extracted(typed, settings, config, model, world or World())
    else:
        refuse_video_options(typed)
        source = Source(settings.dataset, store_of(config, settings))
    if settings.label_path:
        config.datasets[source.name].label_path = Path(settings.label_path)
    return settings, config, model, source


def task_of(model, **more):
    """The Task that a model answers, as a config would have it."""
    o, record = model.outputs, model.record
    return Task(
        task_labels=o.labels, type=o.kinds, classes=o.classes, survival=record.survival,
        level=record.level, units=model.units, **more,
    )  # fmt: skip


def is_of_videos(settings, config):
    """Whether a run is given a dataset that has videos and no clip embeddings yet."""
    return not settings.embedding_path and config.datasets[settings.dataset].is_of_videos


@dataclass
class Source:
    """The studies that a command is given: a dataset's, or those of a folder of videos."""

    name: str  # in the names of what is written about them
    store: object
    wanted: list[str] | None = None  # of a folder of videos: its studies, also unusable ones
    studies: list = field(default_factory=list)  # the videos of each, where they are at hand

    @property
    def eids(self):
        """The studies that have embeddings."""
        return list(self.store.files)

    def unusable(self):
        """Study id -> why a study of a folder of videos has no embeddings."""
        absent = sorted(set(self.wanted or ()) - set(self.store.files))
        return dict.fromkeys(absent, "no usable video: see extract_log.csv")


CLIP_EMBEDDINGS = Path("clip_embeddings")


def extracted(typed, settings, config, model, world):
    """The Source of `--videos`, or of a dataset's: clip embeddings, extracted once for all models.

    They lie in a folder of their own for each source, encoder and way of sampling. The dataset of
    `--videos` is put into the config, under the name of that folder. Raises UserError.
    """
    warn_of_another_input(model, settings, typed)
    how, dataset = extract.settings_from(vars(settings)), config.datasets.get(settings.dataset)
    if settings.videos:
        videos = Path(settings.videos)
        named = [settings.group, settings.manifest, settings.study_id]
        studies = extract.find_studies(videos, *named)
        limit = 0 if settings.select != "all" else settings.sample_limit  # that are explained
        wanted = some_of([s.name for s in studies], limit)
        studies = [s for s in studies if s.name in wanted]
    else:
        videos, named = dataset.video_base_path, [dataset.video_subdir_format]
        print(f"{settings.dataset} has no clip embeddings yet; its videos in {videos} are read")
        studies = studies_of_dataset(videos, *named)
    made = extract.attributes_of(how, panecho.weights_digest(how.weights))
    made = {k: v for k, v in made.items() if k not in ("version", "weights")}
    place = json.dumps([str(videos.resolve()), named, made], sort_keys=True)
    key = hashlib.sha256(place.encode()).hexdigest()[:8]
    name = f"{videos.resolve().name}_{key}"
    folder = Path(settings.keep or CLIP_EMBEDDINGS) / name
    name = name if settings.videos else settings.dataset
    summary = extract.merge_summaries(world.gather(extract.extract(studies, folder, how)))
    summary.print()
    summary.refuse_nothing(videos)
    size = sum(file.stat().st_size for file in folder.glob("*.hdf5"))
    print(
        f"clip embeddings are kept in {folder} ({size / 1e6:.1f} MB), for other models too; delete "
        "that folder to clear them"
    )
    if settings.videos:
        config.datasets[name] = Dataset(embedding_path=folder)
        settings.dataset = name
    else:
        config.datasets[name] = dataset.model_copy(update={"embedding_path": folder})
    store, wanted = (
        open_store(folder, RUN, settings.max_videos_per_study),
        sorted(s.name for s in studies),
    )
    store.files = {eid: store.files[eid] for eid in wanted if eid in store.files}  # no older ones
    units = of_level(store, config, settings)
    if units is not store:
        wanted = [*units.files, *(eid for eid in wanted if eid not in store.files)]
    return Source(name, units, wanted, studies)


def warn_of_another_input(model, settings, typed):
    """Say before any video is read that a model was trained on videos extracted otherwise.

    Raises UserError for another encoder that nobody asked for.
    """
    trained, digest = model.record.encoder_sha256, ""
    if trained:
        try:
            digest = panecho.weights_digest(settings.weights)
        except checkpoints.WeightsError as error:
            raise UserError(
                f"{model.folder.name} was trained on embeddings of the encoder {trained[:12]}; "
                f"give its file with --weights ({error})"
            ) from error
    if digest != trained:
        text = f"{model.folder.name} was trained on embeddings of another encoder (weights "
        text += f"{trained[:12]}, {settings.weights} is {digest[:12]})"
        if "weights" not in typed:
            raise UserError(f"{text}; give its file with --weights")
        print(f"WARNING: {text}: its answers mean nothing here")
    for name, was in input_options(model.record.input).items():
        if getattr(settings, name) != was and name != "weights":
            now = getattr(settings, name)
            print(f"WARNING: --{name} {now}: {model.folder.name} was trained with {was}")


def adopt_kinds(config, name, model):
    """Read a task's labels as the model does. Raises UserError where they are others."""
    task, own = config.tasks[name], model.outputs
    for what, one, other in (
        ("labels", task.task_labels, own.labels),
        ("classes", task.classes, own.classes),
        ("survival", set(task.survival), set(own.of_kind("survival"))),
        ("level", task.level, model.record.level),
    ):
        if one != other:
            raise UserError(
                f"task {name} of {config.path} and {model.folder.name} differ in {what}"
            )
    for label in own.labels:
        if other_unit(label, task.units, model.units):
            raise UserError(
                f"task {name} of {config.path} has {label} in {task.units[label]}, "
                f"{model.folder.name} in {model.units[label]}: convert the labels, and say so"
            )
    task.type = own.kinds


def refuse_video_options(typed):
    """UserError for an option of videos, which would have no effect on clip embeddings."""
    for name in typed:
        if needs_videos(name):
            raise UserError(
                f"--{name} is for videos: it needs --videos, or a dataset that has videos and no "
                "embeddings yet"
            )


def labelled_ids(config, settings, store):
    """The study ids of the dataset's label table, where there is one that is about its studies."""
    task, dataset = config.tasks.get(settings.task), config.datasets[settings.dataset]
    path = dataset.label_path or (task.label_path if task else None)
    if path is None or not path.is_file():
        return []
    ids = read_rows(path, [], level=task.level if task else "study").index
    ids = list(ids.to_series().replace(stored_names(ids, store)))
    if dataset.label_path or set(ids) & set(store.files):
        return ids
    print(f"{path.name} names none of these studies: they count as unlabelled")
    return []


def source_studies(source, config, eids):
    """Study id -> the Study that its videos are, where they are at hand."""
    dataset = config.datasets[source.name]
    if not source.studies and dataset.video_base_path:
        source.studies = studies_of_dataset(
            dataset.video_base_path, dataset.video_subdir_format, eids
        )
    return {study.name: study for study in source.studies}
