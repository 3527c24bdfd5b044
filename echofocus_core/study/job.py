"""What a command works on, resolved once from options as typed, the config and a checkpoint."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import RUN, Collected, UserError
from echofocus_core.base.options import (
    ALL_FOLDS,
    OPTIONS,
    Settings,
    needs_videos,
    options_of,
    validate_as,
)
from echofocus_core.base.tables import read_table
from echofocus_core.base.world import World, pick_device
from echofocus_core.study.config import Dataset, Task, read_config
from echofocus_core.study.labels import label_file
from echofocus_core.study.loading import find_model, load_model, load_named, released_task
from echofocus_core.study.models import LoadedModel
from echofocus_core.study.network import Aggregator, Readings
from echofocus_core.study.sources import (
    CLIP_EMBEDDINGS,
    Source,
    open_source,
    refuse_other_embeddings,
)
from echofocus_core.video.encoders import is_file, is_panecho, weights_digest


@dataclass(frozen=True)
class Job:
    """What a command works on. Nothing changes it: `but` and `with_source` return another one."""

    settings: Settings
    task: Task | None = None  # None for PanEcho, and if a table of predictions has the truths
    dataset: Dataset | None = None
    model: LoadedModel | None = None  # that answers; for `train` that it starts from
    source: Source | None = None  # the studies, once they are extracted or opened
    world: World = field(default_factory=World)
    datasets: dict = field(default_factory=dict)  # embed --datasets: name -> Dataset
    others: dict = field(default_factory=dict)  # --compare: name -> its Job; None for a table

    def but(self, **options):
        """The same job with other values of some options."""
        return replace(self, settings=self.settings.model_copy(update=options))

    @property
    def reads_videos(self):
        """Whether videos must be extracted first: those of --videos, or of the dataset."""
        s = self.settings
        return bool(s.videos or (not s.embedding_path and self.dataset.is_of_videos))

    def with_source(self, limited=False):
        """The same job with its studies open; videos are extracted first.

        limited: apply --sample_limit to the whole dataset, not to a fold.
        """
        source, dataset = open_source(self, limited)
        if self.model and not self.reads_videos and not self.settings.embedding_path:
            refuse_other_embeddings(self.model, source)
        return replace(self.but(dataset=source.name), dataset=dataset, source=source)


# Each of these makes the Job of a command from its name, the typed options and the processes. The
# library gives a Config and a LoadedModel; the commands read them.


def dataset_job(command, typed, world):
    """The Job of a command on a dataset without a model."""
    config = read_config(typed.get("config"), needed=not typed.get("embedding_path"))
    name, dataset, _ = pick_dataset(command, typed, config)
    return Job(Settings(**typed).model_copy(update={"dataset": name}), dataset=dataset)


def evaluation_job(command, typed, world, config=None, model=None):
    """The Job of `evaluate`. With --predictions it has no model.

    It has no task either if the table of predictions has the truths, as tables by `evaluate` do.
    """
    if not typed.get("predictions"):
        return model_job(command, typed, world, config, model)
    refuse_video_options(typed, "is for videos, not for --predictions")
    for name in ("model_name", "run_id", "subset", "folds", "target", "videos", "keep"):
        if typed.get(name) and (name, typed[name]) != ("subset", "all"):
            where = " (thresholds are its columns <label>_threshold)" * (name == "target")
            raise UserError(f"--predictions is a table of answers: leave out --{name}{where}")
    models = [name for name in typed.get("compare", ()) if not is_table(name)]
    config = config or read_config(typed.get("config"), needed=False)
    settings, path = validate_as(Settings, typed), Path(typed["predictions"])
    asked = {"subset": "test", "target": ""}  # for models to compare with
    if not (models or settings.task or settings.label_path) and holds_truths(path):
        return Job(settings, others=dict.fromkeys(settings.compare)).but(**asked)
    if not config.tasks:
        raise UserError(
            f"{path} needs a config that names a label table, or columns PID and <label>_Correct "
            "and comparison with tables only"
        )
    settings, dataset = resolve_settings("evaluate", typed, config)
    job = Job(settings, config.tasks[settings.task], dataset).but(**asked)
    return replace(job, others=compared_models(job, config))


def model_job(command, typed, world, config=None, model=None):
    """The Job of a command with a trained model."""
    if typed.get("datasets"):
        typed = typed | {"dataset": typed["datasets"][0]}
    videos, task = typed.get("videos"), typed.get("task", "")
    if videos and typed.get("dataset"):
        option = "--datasets" if typed.get("datasets") else "--dataset"
        raise UserError(f"--videos and {option} are two sources: give only one")
    needed = not (videos or typed.get("embedding_path"))
    instead = ", or give a folder of videos with --videos" * (command != "evaluate")
    config = config or read_config(typed.get("config"), needed, instead)
    if task and not released_task(task):
        config.pick("task", task)
    if model is None:
        names = typed.get("model_name", ""), typed.get("run_id", "")
        model = load_named(*names, config.tasks, task, pick_device(typed.get("device", "")))
    refuse_model(command, typed, model)
    settings, dataset = resolve_settings(command, typed, config, model)
    by_attention = command == "explain" and settings.explain_method == "attention"
    if by_attention and not model.net.has_attention:
        raise UserError(f"{model.folder.name} has no attention: use another --explain_method")
    model.net.to(pick_device(settings.device))  # which the config may name
    task = config.tasks.get(settings.task) or task_of(model)
    datasets = {name: config.datasets[config.pick("dataset", name)] for name in settings.datasets}
    datasets[settings.dataset] = dataset
    job = Job(settings, task, dataset, model, world=world, datasets=datasets)
    if job.reads_videos:
        labels = label_file(task, dataset).path if command == "evaluate" else None
        if command == "evaluate" and not (labels and labels.exists()):
            raise UserError(
                f"no label table {labels or ''}".strip() + ": give it with --label_path"
            )
        check_encoder(model, settings, asked=bool({"encoder", "weights"} & set(typed)))
    else:
        reason = "needs --videos, or a dataset that has videos and no embeddings yet"
        refuse_video_options(typed, f"is for videos: it {reason}")
    others = compared_models(job, config) if command == "evaluate" else {}
    return replace(job, others=others)


def videos_job(model, folder, settings, asked):
    """The Job of a folder of videos without a config. asked: see `check_encoder`."""
    check_encoder(model, settings, asked)
    dataset = Dataset(embedding_path=settings.keep or CLIP_EMBEDDINGS)
    return Job(settings, task_of(model), dataset, model).but(videos=str(folder))


def holds_truths(path):
    """Whether a table of predictions has columns of truths and patients."""
    columns = read_table(path, Collected(), "table of predictions").columns
    truths = any(name.endswith("_Correct") for name in columns)
    return truths and not {"PID", "pid"}.isdisjoint(columns)


def is_table(name):
    """Whether an entry of --compare is a table of predictions."""
    return Path(name).suffix.lower() in (".csv", ".tsv", ".txt", ".xlsx")


def compared_models(job, config):
    """--compare: name -> the Job of that model, None for a table of predictions."""
    others = {}
    for name in job.settings.compare:
        if not name:
            raise UserError("--compare has an empty name")
        others[name] = None
        if not is_table(name):
            device = pick_device(job.settings.device)
            model = load_named(name, "", config.tasks, device=device)
            refuse_model("evaluate --compare", {}, model)
            keys = ("label_path", "columns", "events") if job.task else ()
            how_to_read = {key: getattr(job.task, key) for key in keys}
            task = config.tasks.get(model.task) or task_of(model, **how_to_read)
            others[name] = replace(job.but(task=model.task), model=model, task=task, others={})
    return others


def training_job(command, typed, world, config=None):
    """The Job of `train`."""
    config = config or read_config(typed.get("config"))
    config.pick("task", typed.get("task"))
    settings, dataset = resolve_settings(command, typed, config)
    if not settings.end_to_end:
        refuse_video_options(typed, "is for training with --end_to_end", ["videos"])
    check_settings(settings)
    model, changes = None, {}
    if settings.end_to_end and not settings.batch_size:
        changes["batch_size"] = 1  # the images of a study are large
    if settings.init_from:
        folder = find_model(settings.init_from)
        is_released = bool(releases.registry_entry(folder))
        task = "" if is_released else settings.task  # the registry has the task of released models
        model = load_model(folder, config.tasks, task)
        if not isinstance(model.net, Aggregator):
            raise UserError(f"{settings.init_from} is not a study-level model to start from")
        changes |= {n: v for n, v in model.net.architecture.items() if n not in typed}
        if settings.end_to_end and model.encoder_file and "weights" not in typed:
            changes["weights"] = str(model.encoder_file)
            print(f"starting from the encoder of {folder.name} too")
    settings = settings.model_copy(update=changes)
    refuse_other_architecture(settings, model)
    return Job(settings, config.tasks[settings.task], dataset, model, world=world)


def task_of(model, **more):
    """The Task of a model without one in the config; None for PanEcho's readings."""
    outputs, record = model.outputs, model.record
    if model.type == "readings":
        return None
    return Task(
        task_labels=outputs.labels, type=outputs.kinds, classes=outputs.classes,
        survival=record.survival, level=record.level, units=model.units, **more,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- precedence

RECIPES = {  # how the published models were trained
    "chd": {"encoder_depth": 1, "learning_rate": 1e-4, "batch_number": 128, "epoch_lim": 30},
    "measure": {"encoder_depth": 5, "learning_rate": 1e-5, "batch_number": 32, "epoch_lim": 12},
    "fyler": {"transformer_type": "multiquery", "encoder_depth": 10, "learning_rate": 1e-4}
    | {"batch_number": 512, "clip_dropout": 0.5, "epoch_lim": 20, "epoch_early_stop": 10},
}


def resolve_settings(command, typed, config, model=None):
    """(Settings, Dataset) of a command; prints each value that was not typed and its origin.

    Precedence: typed options, dataset in the config, task in the config, for videos the input that
    the model was trained on, published recipe of the task, defaults. model: LoadedModel or None.
    """
    task = typed.get("task") or (model.task if model else config.pick("task", ""))
    name, dataset, origin = pick_dataset(command, typed, config, model)
    layers = [("typed", typed)]
    for kind, entries, entry in (
        ("dataset", config.datasets, name),
        ("task", config.tasks, task),
    ):
        if entry in entries:
            options = entries[entry].settings.model_dump(exclude_unset=True)
            layers.append((f"the config's {kind} {entry}", options))
    if model and (typed.get("videos") or command == "extract" or dataset.is_of_videos):
        trained = input_options(model.record.input).items()
        other = not is_panecho(model.record.input.encoder or "")
        trained = {n: v for n, v in trained if other or v != OPTIONS[n].default}
        if model.encoder_file:
            trained["weights"] = str(model.encoder_file)
        layers.append((f"as {model.folder.name} was trained", trained))
    layers += [
        (f"the published {task} recipe", RECIPES.get(task, {})),
        ("the model's" if model else "the config's first", {"task": task}),
        (origin, {"dataset": name}),
        ("the task's name", {} if model else {"model_name": task}),
    ]
    values, taken = {"config": str(config.path)}, [f"config = {config.path.name}"]
    for option in options_of(command):
        for source, layer in layers:
            if layer.get(option) not in (None, ""):
                values[option] = layer[option]
                if source != "typed":
                    taken.append(f"{option} = {layer[option]} ({source})")
                break
    if command != "extract" or len(taken) > 1:
        print("using " + "; ".join(taken))
    return validate_as(Settings, values), dataset


def pick_dataset(command, typed, config, model=None):
    """(name, Dataset, origin of the name): --videos, typed paths, the config's or the model's."""
    name, folder, more = typed.get("dataset", ""), typed.get("embedding_path"), {}
    if typed.get("label_path"):
        more["label_path"] = Path(typed["label_path"])
    if typed.get("path_pattern"):
        more["path_pattern"] = typed["path_pattern"]
    if typed.get("videos") and command != "train":
        folder = typed.get("keep") or CLIP_EMBEDDINGS  # a folder in it, once they are extracted
        name = Path(typed["videos"]).resolve().name
        return name, Dataset(embedding_path=folder, **more), "the folder of --videos"
    trained_on, origin = model.record.dataset if model else "", "typed"
    if folder:
        name, origin = name or Path(folder).resolve().name, "the folder of --embedding_path"
        more["embedding_path"] = Path(folder)
    elif name or trained_on not in config.datasets:
        name, origin = config.pick("dataset", name), "the config's first"
        if trained_on and name != trained_on:
            origin += f"; the model's {trained_on} is not in it"
    else:
        name, origin = trained_on, "the model's"
    dataset = config.datasets.get(name) or Dataset(embedding_path=folder or "none")
    return name, dataset.model_copy(update=more), origin


def input_options(model_input):
    """The recorded options of extraction of the videos that a model was trained on."""
    values = model_input.model_dump(exclude_none=True)
    names = "size", "clip_len", "n_clips", "mask"
    if not (is_panecho(values.get("encoder", "")) or is_file(values["encoder"])):
        names = "encoder", *names  # never a file, which would run
    options = {n: values[n] for n in names if n in values}
    random = str(values.get("weights", "")).startswith("random")
    return options | ({"weights": "random"} if random else {})


# -------------------------------------------------------------------------- conflicting options


def refuse_video_options(typed, reason, names=()):
    """UserError for a typed option of videos, or one of `names`, that would have no effect."""
    for name in typed:
        if name in names or needs_videos(name):
            raise UserError(f"--{name} {reason}")


def refuse_model(command, typed, model):
    """UserError for a model that a command cannot use."""
    name = model.folder.name
    if command not in ("predict", "embed") and isinstance(model.net, Readings):
        raise UserError(f"{command} needs a study-level model; {name} has only PanEcho's outputs")
    if model.record.level == "video" and (command == "explain" or typed.get("page")):
        raise UserError(
            f"{name} predicts single videos, so there are no contributions of videos to explain"
        )


def check_settings(settings):
    """UserError for conflicting options of training, before any work is done."""
    n, fold, column = settings.n_folds, settings.fold, settings.split_column
    no_package = settings.tensorboard and not find_spec("tensorboard")
    every = fold == ALL_FOLDS
    for wrong, text in (
        (n and not (n >= 3 and (0 <= fold < n or every)),
         f"--n_folds must be 3 or more and --fold below it or all, not {n} and {fold}"),
        (no_package, '--tensorboard needs its package: pip install "tensorboard"'),
        (every and not n, "--fold all is for cross-validation: add --n_folds 5"),
        (every and settings.grid,
         "--grid and --fold all cannot be combined: search first, then cross-validate"),
        (every and settings.end_to_end,
         "--fold all reads clip embeddings: train end to end a fold at a time"),
        (settings.freeze not in ("", "aggregator") and not settings.end_to_end,
         f"--freeze {settings.freeze} is for --end_to_end"),
        (settings.freeze and not settings.end_to_end and not settings.init_from,
         "--freeze aggregator keeps a model's weights: name the model with --init_from"),
        (settings.stratify and column,
         "--stratify and split_column both decide the folds: leave one out"),
        (n and column,
         f"--n_folds and split_column ({column}) both decide the folds: leave one out"),
    ):  # fmt: skip
        if wrong:
            raise UserError(text)


def refuse_other_architecture(settings, model):
    """UserError for options that do not fit the model to start from."""
    for name, value in model.net.architecture.items() if model else ():
        if (other := getattr(settings, name)) != value:
            raise UserError(f"--init_from has {name} = {value}, not {other}")


def check_encoder(model, settings, asked):
    """Warn, before any video is read, if a model was trained on videos extracted differently.

    asked: whether the user chose the encoder by --encoder or --weights; else another one is a
    UserError.
    """
    name, trained, digest = model.folder.name, model.record.encoder_sha256, ""
    if encoders := list(model.record.encoders):
        raise UserError(
            f"{name} reads the clip embeddings of {' and '.join(encoders)}: extract the videos "
            "with each encoder, and name both folders as embedding_path of a dataset"
        )
    encoder = model.record.input.encoder or "panecho"
    if not asked and encoder != settings.encoder and is_file(encoder):
        raise UserError(
            f"{name} was trained on embeddings of {encoder}; name that file with --encoder, which "
            "will run it"
        )
    if trained:
        try:
            digest = weights_digest(settings.encoder, settings.weights)
        except checkpoints.WeightsError as error:
            raise UserError(
                f"{name} was trained on embeddings of the encoder {trained[:12]}; give its file "
                f"with --weights ({error})"
            ) from error
    if digest != trained:
        text = f"{name} was trained on embeddings of another encoder (weights {trained[:12]}, "
        used = settings.weights if is_panecho(settings.encoder) else settings.encoder
        text += f"{used} is {digest[:12]})"
        if not asked:
            raise UserError(f"{text}; give its file with --weights")
        RUN.warning(f"{text}: its answers are meaningless here")
    for option, was in input_options(model.record.input).items():
        if (now := getattr(settings, option)) != was and option != "weights":
            RUN.warning(f"--{option} {now}: {name} was trained with {was}")
