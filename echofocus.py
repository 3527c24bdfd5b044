"""EchoFocus: one answer per echocardiography study from all of its videos.

    python echofocus.py demo                                  # the whole path on phantoms
    python echofocus.py download EchoFocus_CHD                # a released model; --list names them
    python echofocus.py inspect  EchoFocus_CHD                # what a model is and where it is from
    python echofocus.py train    --task chd                   # learn a task from a label table
    python echofocus.py evaluate --model_name chd             # metrics and figures on the test fold
    python echofocus.py predict  --model_name chd --videos F  # DICOM in, probabilities out
    python echofocus.py embed    --dataset outside            # one 768-vector a study
    python echofocus.py explain                               # the videos that drove an answer
    python echofocus.py check                                 # what a long run would trip over

What is left out has a default, and the tool prints which it took. Files: a config (JSON: tasks and
datasets), a label table (CSV: pid, eid, one column a label), a folder of clip embeddings (HDF5, one
file a study, from embed/extract.py or the published scripts), a model folder below trained_models/.

The file is in the order in which data flows: embedding store and batches -> checkpoints -> the loop
-> training -> evaluate, predict, embed, explain, check -> command line. What comes before (config,
label table, folds) and the network are in common/, what a person looks at is drawn by report/.
Axis letters: S studies, V videos, C clips, N tokens (all clips of a batch), D features, T labels.
"""

import json
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core import EMBED_DIM as D
from echofocus_core import __version__
from echofocus_core.base import checkpoints, releases
from echofocus_core.base.console import PROGRAM, Collected, Parser, UserError, run_main, some
from echofocus_core.base.files import (
    atomic_path,
    begins,
    lock,
    open_journal,
    output_path,
    packed_path,
    sha256_file,
    write_table,
)
from echofocus_core.base.options import (
    Settings,
    add_options,
    checked_options,
    options_of,
    validated,
)
from echofocus_core.base.world import from_environment, join_world, pick_device
from echofocus_core.encoder.preview import preview_cohort
from echofocus_core.report.demo import cmd_demo
from echofocus_core.report.inspect import describe_encoder, model_facts, print_description
from echofocus_core.report.maps import make_map, map_rows
from echofocus_core.study.answers import (
    answer_studies,
    compared,
    embed_source,
    explain,
    is_embedded,
    journal_path,
    predict_page,
    work_of,
)
from echofocus_core.study.attribution import clip_baseline, explain_study
from echofocus_core.study.check import (
    check_choice,
    check_data,
    check_model,
    check_room,
    check_section,
    end_check,
)
from echofocus_core.study.cohort import stored_names
from echofocus_core.study.config import (
    MODELS,
    Config,
    input_options,
    pick_dataset,
    read_config,
    resolve_settings,
)
from echofocus_core.study.evaluation import group_columns
from echofocus_core.study.explanations import video_rows
from echofocus_core.study.input_check import report_warnings
from echofocus_core.study.loading import (
    as_one,
    check_download,
    find_model_file,
    is_encoder,
    label_columns,
    load_named,
    origin_of,
)
from echofocus_core.study.loop import WINDOW, report_unreadable, run_studies
from echofocus_core.study.predictions import refuse_other_tables, report_left_out
from echofocus_core.study.sources import (
    Source,
    extracted,
    labelled_ids,
    refuse_video_options,
    start_with_model,
    store_of,
    warn_of_other_input,
)
from echofocus_core.study.splits import some_of
from echofocus_core.study.train_command import search, train_model
from echofocus_core.video import panecho
from echofocus_core.video.preview import preview_extraction
from echofocus_core.video.store import MADE_WITH, StudyClips, open_folder, open_store, write_pack


def cmd_pack(typed):
    """One HDF5 file of a dataset's embeddings, <embedding_path>.packed.h5 (`PackedEmbeddings`)."""
    config = read_config(typed.get("config"), needed=not typed.get("embedding_path"))
    name, _ = pick_dataset(typed, config)
    folder = config.datasets[name].embedding_path
    source, path = open_folder(folder), packed_path(folder)
    try:
        with lock(path, timeout=0):
            unreadable = write_pack(source, path, np.dtype(Settings(**typed).dtype))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path}: {error}; an older pack stays as it is, the same command begins "
            "anew"
        ) from error
    report_unreadable(unreadable)
    packed = len(source.files) - len(unreadable)
    print(f"packed {name}: {packed} studies, {path.stat().st_size / 1e9:.2f} GB in {path.name}")


def cmd_download(typed):
    """Put a released model, or one from a URL, zip, folder or .pt file, into ./trained_models.

    It is refused when it cannot be read safely, and its SHA-256 is recorded and checked ever after.
    """
    settings = Settings(**typed)
    if settings.list_ or not settings.source:
        print_released()
        return
    if settings.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", settings.sha256):
        raise UserError(f"--sha256 takes 64 hexadecimal digits, not {settings.sha256}")
    folder, record, others = releases.install(
        settings.source, MODELS, settings.model_name, settings.sha256, check_download
    )
    if others:
        print(f"left out, no part of a model: {', '.join(others[:10])}")
    if record["sha256"]:
        known = "as it should be" if record["sha256_was_known"] else "not known before: recorded"
        print(f"SHA-256 {record['sha256']} ({known})")
    for key in ("licence", "citation"):
        if key in record:
            print(f"{key}: {record[key]}")
    print(f"the model is {folder}; {PROGRAM} inspect {folder.name} says what it holds")


def print_released():
    """The registry, one model a line, and what each asks of its users."""
    for name, entry in releases.registry().items():
        there = "downloaded" if (MODELS / name / entry["file"]).is_file() else "not here"
        print(f"{name:18} {there:11} {entry['about']}; {entry['licence']}; {entry['citation']}")
    print(f"get one: {PROGRAM} download NAME (research use only, under its licence)")


def cmd_inspect(typed):
    """Print what a model folder or .pt file holds: architecture, labels, history, origin."""
    settings = Settings(**typed)
    if settings.json_:
        described = begins(r'\{\s+"name": .*\s+"file": ')
        output_path(settings.json_, "--json", "description by inspect", described)
    path = find_model_file(settings.source or settings.model_name)
    releases.check_source(path)
    if is_encoder(checkpoints.load_safely(path)):
        facts = describe_encoder(panecho.load_panecho(path).model)
    else:
        facts = model_facts(path, read_config(settings.config, needed=False))
    facts = {"name": path.parent.resolve().name, "file": path.name} | facts
    facts |= {"sha256": sha256_file(path), "source": origin_of(path.parent)}
    files = sorted(path.parent.iterdir()) if path.name in releases.CHECKPOINTS else [path]
    facts["files"] = {p.name: p.stat().st_size for p in files if p.is_file()}
    print_description(facts)
    if settings.json_:
        with atomic_path(settings.json_) as temporary:
            temporary.write_text(json.dumps(facts, indent=2, default=str) + "\n")
        print(f"wrote {settings.json_}")


def cmd_train(typed):
    """Learn a task: best and last checkpoints, split, history and curves in the model's folder."""
    with join_world(pick_device(typed.get("device", "")), "share each optimiser step") as world:
        if typed.get("grid"):
            search(typed, world)
        else:
            folds = train_model(typed, world)
            if folds:
                from echofocus_core.report.evaluation import evaluate_folds

                evaluate_folds(*folds)


def cmd_evaluate(typed):
    """Metrics with intervals, tables, figures and a page: of a model's fold, or of predictions."""
    from echofocus_core.report import evaluation

    if typed.get("predictions"):
        refuse_video_options(typed)
        return evaluation.evaluate_file(typed, compared)
    settings, config, model, source = start_with_model("evaluate", typed)
    timed = model.outputs.of_kind("survival")
    if timed and (settings.per, settings.pool) == ("patient", "mean"):
        raise UserError(f"{timed[0]}: times are not pooled: --pool first or last")
    columns = {
        column: (cells.rename(stored_names(cells.index, source.store)), edges)
        for column, (cells, edges) in group_columns(settings.by, config, settings).items()
    }
    for fold in dict.fromkeys(settings.folds or [settings.subset]):
        own = settings.model_copy(update={"subset": fold})
        evaluation.evaluate_fold(own, config, model, source.store, columns)


def cmd_predict(typed):
    """One row a study: eid, n_videos, n_clips, then a column a label. No labels needed."""
    if typed.get("out"):
        refuse_other_tables(typed)
    settings, config, model, source = start_with_model("predict", typed)
    store = source.store
    labelled = () if source.wanted else labelled_ids(config, settings, store)
    absent = source.unusable() | dict.fromkeys(
        sorted(set(labelled) - set(store.files)), "no embeddings"
    )
    path = Path(settings.out or model.folder / f"predictions_{source.name}.csv")
    eids = some_of(source.eids, settings.sample_limit)
    warn_of_other_input(model, store, eids, names=MADE_WITH[:1])
    work = work_of(model, store, eids, settings)
    with open_journal(journal_path(path), work, f"windows of {WINDOW} studies") as journal:
        table, reasons, warnings = answer_studies(model, store, eids, settings, journal)
        left_out = absent | reasons
        report_left_out(left_out, path)
        if not len(table):
            raise UserError("no study could be read")
        write_table(table, path)
        journal.delete()
    if settings.page:
        predict_page(path, model, source, config, settings, table, left_out)
    shown = table.head(10).dropna(axis=1, how="all").drop(columns="warning")
    print(shown.to_string(index=False, float_format="{:.4g}".format, max_cols=12))
    report_warnings(warnings, model.folder.name)
    print(f"wrote {len(table)} studies to {path}")


def cmd_embed(typed):
    """Embeddings of the model as an HDF5 file, one 768-vector a study or a video; and their map."""
    if len(typed.get("datasets", ())) > 1 and typed.get("embed_file"):
        raise UserError("--embed_file is one file: leave it out with several --datasets")
    if typed.get("map") and typed.get("level") == "video":
        raise UserError("--map shows studies: leave out --level video")
    if typed.get("datasets"):
        typed = typed | {"dataset": typed["datasets"][0]}
    if typed.get("datasets") and typed.get("videos"):
        raise UserError("--videos and --datasets are two sources: give one")
    if typed.get("embed_file"):
        output_path(typed["embed_file"], "--embed_file", "file of study embeddings", is_embedded)
    settings, config, model, source = start_with_model("embed", typed)
    if not settings.pool_queries:
        if settings.map or getattr(model.net, "kind", "") != "multiquery":
            raise UserError("--no_pool_queries is for multiquery models, and for no map")
        model.net.pool_queries = False
    datasets = [config.pick("dataset", name) for name in settings.datasets or [source.name]]
    rows = map_rows(config, settings, datasets) if settings.map else None  # first: it may refuse
    files = {}
    for name in dict.fromkeys(datasets):
        if name != source.name:
            source = Source(name, store_of(config, settings, name))
        files[name] = embed_source(source, model, settings)
        if rows and rows[name] is not None:
            own = stored_names(rows[name].index, source.store, Collected())
            rows[name] = rows[name].rename(index=own)
    if settings.map:
        make_map(files, rows, model, settings)


def cmd_explain(typed):
    """The contribution of every video to every answer, and the published table of the top n."""
    device = pick_device(typed.get("device", ""))
    with join_world(device, "share the studies") as world, ExitStack() as held:
        explain(typed, world, held)


def load(model_name, task="", device=""):
    """A model for the functions below, by its name in ./trained_models or a path: LoadedModel.

    task: of the config, where a published checkpoint does not say which labels it has; device:
    as --device. Raises UserError.
    """
    config = read_config("", needed=False)
    return load_named(str(model_name), "", config, task, pick_device(device))


def predict(model, source, **options):
    """One row a study with the model's answers: DataFrame, see `prediction_table`.

    source: see `studies_of`. options: those of `predict`, e.g. precision="bf16". The studies
    without an answer are in `.attrs["left_out"]`, a dict of study to reason. Raises UserError.
    """
    settings, store, eids = studies_of(model, source, options)
    table, left_out, _ = answer_studies(model, store, eids, settings)
    table.attrs["left_out"] = left_out
    return table


def study_embeddings(model, source, **options):
    """One 768-vector a study: DataFrame (S, 768) by study id; otherwise as `predict`."""
    settings, store, eids = studies_of(model, source, options)
    unreadable = {}
    found = run_studies(model.net, store, eids, settings, unreadable=unreadable)
    table = pd.DataFrame(found.embeddings, index=pd.Index(found.eids, name="eid"))
    table.attrs["left_out"] = unreadable
    return table


def attribute(model, study, labels=None, **options):
    """What each video of a study counted for in each answer: DataFrame, see `video_rows`.

    study: (V videos, C clips, 768) clip embeddings, or StudyClips; labels: names, default all;
    options: those of `explain`, e.g. explain_method="leave_one_out". Raises UserError.
    """
    settings, model = validated(Settings, options), as_one(model)
    bag = study if isinstance(study, StudyClips) else bag_of("study", study)
    columns = label_columns(model, labels)
    unit = explain_study(model, "study", bag, columns, settings, clip_baseline(model, settings))
    return video_rows(model, unit, settings).drop(columns="eid")


def studies_of(model, source, options):
    """(Settings, store, study ids) of what a user has: a dict of study id to clip embeddings
    (V videos, C clips, 768), a folder of embedding files or of videos, or a store.

    Videos are extracted as `--videos` does, into ./clip_embeddings; options may hold its options.
    """
    settings = validated(Settings, input_options(model.record.input) | options)
    if isinstance(source, dict):
        store = Arrays(source)
    elif not isinstance(source, str | os.PathLike):
        store = source
    elif any(Path(source).glob("*.hdf5")) or any(Path(source).glob("*.h5")):
        store = open_store(Path(source), most_videos=settings.max_videos_per_study)
    else:
        settings.videos = str(source)
        source = extracted(options, settings, Config(), model)
        return settings, source.store, source.eids
    eids = some_of(store.files, settings.sample_limit)
    if hasattr(store, "made_with"):
        warn_of_other_input(model, store, eids)
    return settings, store, eids


class Arrays:
    """Clip embeddings in memory as a store: dict of study id to (V videos, C clips, 768)."""

    def __init__(self, arrays):
        self.files = {str(eid): bag_of(eid, array) for eid, array in arrays.items()}

    def read(self, eid, rng=None):
        return self.files[eid]

    def size(self, eid):
        V, C, _ = self.files[eid].embeddings.shape
        return V * C


def bag_of(eid, array):
    """StudyClips of an array (V, C, 768); its videos are numbered. Raises UserError."""
    array = np.asarray(array, np.float32)
    if array.ndim != 3 or array.shape[2] != D or not array.size or not np.isfinite(array).all():
        raise UserError(
            f"study {eid}: expected finite clip embeddings (videos, clips, {D}), got {array.shape}"
        )
    return StudyClips(array, [f"video {v}" for v in range(len(array))])


def cmd_check(typed):
    """What a long run would trip over, each with its remedy, and how long it would take.

    Has no rule of its own: it calls what reads the config, labels, embeddings and models in a run,
    and listens. Goes on after an error with whatever can still be checked, and writes no file.
    """
    levels, videos = Counter(), typed.get("videos")
    section = partial(check_section, levels)
    config = model = settings = None
    if typed.get("cohort"):  # for embed/train.py, which needs nothing of the rest
        with section("cohort", "mend the tables, or name the folder with --data_dir") as listener:
            size = preview_cohort(typed, listener)
            check_room("decoded videos", Path(), size, listener.error, listener)
        return end_check(levels)
    with section("config", "mend the config; config-example.json shows one") as listener:
        config = read_config(typed.get("config"), needed=not videos)
        names = some(config.tasks, 9), some(config.datasets, 9)
        listener.ok(f"{config.path}: tasks {names[0]}; datasets {names[1]}")
    if config:
        with section("model", "name another --model_name, or train it anew") as listener:
            model = check_model(typed, config, listener)
        with section("choice", "mend the option or the config") as listener:
            settings = check_choice(typed, config, model, listener)
    if settings:
        check_data(settings, config, model, section)
    with section("videos", "see --videos") as listener:
        if videos:
            typed = {name: typed[name] for name in typed if name in options_of("extract")}
            options = resolve_settings("extract", typed, config or Config(), model)
            trained_on = model.record.encoder_sha256 if model else ""
            size = preview_extraction(vars(options) | {"videos": videos}, trained_on, listener)
            check_room("clip embeddings of --videos", MODELS, size, listener.error, listener)
        else:
            listener.ok("none looked at; --videos names a folder")
    end_check(levels)


COMMANDS = {
    "train": cmd_train,
    "evaluate": cmd_evaluate,
    "predict": cmd_predict,
    "embed": cmd_embed,
    "explain": cmd_explain,
    "check": cmd_check,
    "pack": cmd_pack,
    "download": cmd_download,
    "inspect": cmd_inspect,
    "demo": cmd_demo,
}


def build_parser():
    parser = Parser(prog="echofocus.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, function in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        sub = commands.add_parser(command, help=summary, description=summary)
        add_options(sub, command)
    return parser


def main(argv=None):
    typed = vars(build_parser().parse_args(argv))
    command = typed.pop("command")
    typed = checked_options(typed)
    if command not in ("train", "explain") and from_environment("WORLD_SIZE", 1, least=1) > 1:
        raise UserError(f"{command} runs in one process: leave out torchrun")
    COMMANDS[command](typed)


def program():
    """What the command line runs, from the clone or installed."""
    run_main(main, Path(sys.argv[0]).name)


if __name__ == "__main__":
    program()
