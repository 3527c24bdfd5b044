# PYTHON_ARGCOMPLETE_OK
"""EchoFocus: one answer per echocardiography study from all of its videos.

    python echofocus.py demo                                  # all steps on phantoms
    python echofocus.py init                                  # a config for the files here
    python echofocus.py download EchoFocus_CHD                # a released model; --list names them
    python echofocus.py inspect  EchoFocus_CHD                # architecture, labels and origin
    python echofocus.py train    --task chd                   # learn a task from a label table
    python echofocus.py evaluate --model_name chd             # metrics and figures on the test fold
    python echofocus.py predict  --model_name chd --videos F  # DICOM in, probabilities out
    python echofocus.py embed    --dataset outside            # one vector per study
    python echofocus.py explain                               # the videos behind each answer
    python echofocus.py check                                 # problems of a long run

Options that are not given have defaults, which the tool prints. Files: a config (JSON: tasks and
datasets), a label table (CSV: pid, eid, one column per label), a folder of clip embeddings (HDF5,
one file per study, from embed/extract.py or the published scripts), a model folder below
trained_models/.

`main` resolves options, config and checkpoint into one `Job` and calls the command with it. The
commands come first, then the functions of `import echofocus`, then the command line. Functions
import what they use, so that --help and a misspelt option need neither torch nor pandas.
Axis letters: S studies, V videos, C clips, N tokens (all clips of a batch), D features, T labels.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echofocus_core import __version__
from echofocus_core.base.console import (
    PROGRAM,
    RUN,
    Collected,
    Parser,
    UserError,
    count_of,
    print_next,
    run_main,
)
from echofocus_core.base.options import (
    ALL_FOLDS,
    Settings,
    add_options,
    needs_videos,
    options_of,
    validate_as,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

    from echofocus_core.study.models import LoadedModel

    Model = LoadedModel | str | os.PathLike
    Source = str | os.PathLike | list[str] | ArrayLike | dict[str, Any] | None
    Labels = pd.DataFrame | str | os.PathLike | None
    Task = str | list[str] | dict[str, Any]

__all__ = ["UserError", "compare", "embed", "evaluate", "explain", "load", "predict", "train"]


def cmd_train(job):
    """Train a model, and write its checkpoints, split, history and curves into its folder."""
    from echofocus_core.report.evaluation import evaluate_folds
    from echofocus_core.study.train_command import search, train_model

    if job.settings.grid:
        search(job)
    elif folds := train_model(job):
        evaluate_folds(*folds)


def cmd_compare(job):
    """Train encoders and aggregators on the same folds, and report their differences."""
    from echofocus_core.report.comparison import compare_models

    compare_models(job)


def cmd_evaluate(job):
    """Write metrics with intervals, tables, figures and a page, for a fold or for predictions."""
    from echofocus_core.report.evaluation import evaluation_reports

    for report in evaluation_reports(job):
        print("\n".join(report.write()))


def cmd_predict(job):
    """Write one row per study: eid, n_videos, n_clips, one column per label. Needs no labels."""
    from echofocus_core.base.files import write_table
    from echofocus_core.study import predictions
    from echofocus_core.study.folds import sample_ids
    from echofocus_core.study.input_check import report_warnings
    from echofocus_core.study.sources import labelled_ids, warn_of_other_input
    from echofocus_core.video.store import MADE_WITH

    if job.settings.out:
        predictions.refuse_other_tables(job.settings)
    job = job.with_source(limited=True)
    model, source, settings = job.model, job.source, job.settings
    labelled = () if source.requested else labelled_ids(job)
    absent = dict.fromkeys(sorted(set(labelled) - set(source.eids)), "no embeddings")
    part = f".sample_limit-{settings.sample_limit}" * bool(settings.sample_limit)
    path = Path(settings.out or model.folder / f"predictions_{settings.dataset}{part}.csv")
    eids = sample_ids(source.eids, settings.sample_limit)
    warn_of_other_input(model, source.store, eids, names=MADE_WITH[:1])
    table, reasons, warnings = predictions.answer_studies(model, source.store, eids, settings)
    left_out = dict(sorted((source.unusable() | absent | reasons).items()))
    predictions.report_left_out(left_out, path)
    if not len(table):
        raise UserError("no study could be read")
    write_table(table, path)
    if settings.page:
        predict_page(job, predictions.page_folder(path), table, left_out)
    print_answers(table.head(10), model.outputs.names)
    report_warnings(warnings, model.folder.name)
    print(f"wrote {count_of(len(table), 'studies')} to {path}")


def print_answers(table, names):
    """Print a table of predictions without the ranges of the outputs `names`; a study is a column
    if there are more columns than studies."""
    ends = "_low", "_high", "_sd", "_threshold"
    hidden = ["warning", *(name + end for name in names for end in ends)]
    table = table.drop(columns=hidden, errors="ignore").dropna(axis=1, how="all").set_index("eid")
    upright = len(table) < min(6, len(table.columns))
    shown = table.T if upright else table.reset_index()
    print(shown.to_string(index=upright, float_format="{:.4g}".format, max_cols=12))


def predict_page(job, folder, table, left_out):
    """Write the page of predictions, with the contribution of each video to each answer."""
    from echofocus_core.report.page import make_page
    from echofocus_core.study.attribution import PAGE_METHOD
    from echofocus_core.study.explanations import explain_studies, label_columns
    from echofocus_core.study.network import Readings

    job, explanations = job.but(explain_method=PAGE_METHOD), []
    if not isinstance(job.model.net, Readings):  # readings have nothing to attribute
        explanations = explain_studies(job, list(table["eid"]), label_columns(job.model))
    make_page(job, folder, table, left_out, explanations)


def cmd_embed(job):
    """Write the model's embeddings (HDF5), one vector per study or video; --map plots them."""
    from echofocus_core.base.files import output_path
    from echofocus_core.report.maps import make_map, map_rows
    from echofocus_core.study.embeddings import check_options, embed_source, is_embedded
    from echofocus_core.study.folds import stored_names

    settings = job.settings
    if len(settings.datasets) > 1 and settings.embed_file:
        raise UserError("--embed_file is one file: leave it out with several --datasets")
    if settings.embed_file:
        output_path(settings.embed_file, "file of study embeddings", is_embedded)
    check_options(job)
    tables = map_rows(job) if settings.map else {}  # first: it may refuse
    files, rows = {}, {}
    for dataset_name, dataset in job.datasets.items():
        one = replace(job.but(dataset=dataset_name), dataset=dataset).with_source(limited=True)
        name, table = one.settings.dataset, tables.get(dataset_name)
        files[name], rows[name] = embed_source(one), table
        if table is not None:
            names = stored_names(table.index, one.source.store, Collected())
            rows[name] = table.rename(index=names)
    if settings.map:
        make_map(files, rows, job.model, settings)


def cmd_explain(job):
    """Write the contribution of every video to every answer, and the published top-n table."""
    from echofocus_core.base.files import open_journal
    from echofocus_core.study import explanations as ex
    from echofocus_core.study.attribution import PAGE_METHOD
    from echofocus_core.study.explanation_tables import explanation_names
    from echofocus_core.study.faithfulness import read_views
    from echofocus_core.study.sources import warn_of_other_input

    if job.settings.page and "explain_method" not in job.settings.model_fields_set:
        job = job.but(explain_method=PAGE_METHOD)
    job = job.with_source()
    model, settings, store, world = job.model, job.settings, job.source.store, job.world
    columns = ex.label_columns(model, settings.explain_tasks)
    eids, truths, patients = ex.explained_studies(job)
    warnings = warn_of_other_input(model, store, eids)
    eids = ex.select_studies(job, eids, truths, columns)
    views = job.dataset.views  # read first: that may refuse
    views = read_views(views, RUN, store, eids) if views else {}
    names = explanation_names(model, settings, columns, eids)
    path = model.folder / f".{names['videos']}.journal"
    header = ex.journal_header(job, eids, columns, truths)
    with nullcontext() if world.rank else open_journal(path, header) as journal:
        first = world.gather(journal.n if journal else 0)[0]
        for explanation in ex.explain_studies(job, eids, columns, truths, first):
            if journal:
                journal.add(explanation)
        if journal:
            write_explained(job, eids, journal, truths, patients, names, warnings, views)
            journal.delete()


def write_explained(job, eids, explanations, truths, patients, names, warnings, views):
    """Write all files of `explain`. names: of `explanation_names`; warnings: text -> studies."""
    from echofocus_core.report.page import make_page
    from echofocus_core.study.explanation_tables import write_explanations
    from echofocus_core.study.explanations import normalised
    from echofocus_core.study.faithfulness import write_curves, write_views
    from echofocus_core.study.predictions import answer_studies

    model, settings, store = job.model, job.settings, job.source.store
    videos = write_explanations(job, explanations, truths, names, warnings)
    base = model.folder / names["videos"].removesuffix(".csv")
    if views:
        write_views(videos, views, patients, base)
        print(f"wrote {base}.views.csv, .png and .pdf")
    if settings.curves:
        targets = dict(zip(truths.index, normalised(model, truths), strict=True))
        areas = write_curves(model, store, explanations, targets, patients, settings, base)
        print(areas.to_string(index=False, float_format="{:.3g}".format))
        print(f"wrote {base}.curves.csv, .curve_areas.csv, .png and .pdf")
    if settings.page:
        table, reasons, _ = answer_studies(model, store, eids, settings)
        left_out = job.source.unusable() | reasons
        make_page(job, base, table, left_out, explanations, truths)


def cmd_check(settings):
    """Report the problems of a long run before it starts, with remedies, and estimate its time.

    It reads config, labels, embeddings and models with the functions of a run and collects their
    reports. After an error it checks what it still can. It writes no file.
    """
    from echofocus_core.encoder.preview import preview_cohort
    from echofocus_core.study.check import check_run

    typed = settings.model_dump(exclude_unset=True)
    check_run(typed, preview_cohort)
    if not settings.cohort:
        typed.pop("sample_limit", None)  # here it limits what is read
        print_next(command_line("predict" if settings.videos else "train", typed))


def cmd_pack(job):
    """Pack a dataset's embeddings into one file, <embedding_path>.packed.h5, for faster reading."""
    import numpy as np

    from echofocus_core.base.files import lock, packed_path
    from echofocus_core.study.loop import report_unreadable
    from echofocus_core.video.store import open_folder, write_pack

    for folder in job.dataset.embedding_paths:
        source, path = open_folder(folder), packed_path(folder)
        try:
            with lock(path, timeout=0):
                unreadable = write_pack(source, path, np.dtype(job.settings.dtype))
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {path}: {error}; an older pack is unchanged") from error
        report_unreadable(unreadable)
        n, size = len(source.files) - len(unreadable), path.stat().st_size / 1e9
        print(
            f"packed {job.settings.dataset}: {count_of(n, 'studies')}, {size:.2f} GB in {path.name}"
        )


def cmd_download(settings):
    """Install a released model, or one from a URL, zip, folder or .pt file, in ./trained_models.

    A file that cannot be read safely is refused. The SHA-256 is recorded and checked at each use.
    """
    from echofocus_core.base import releases
    from echofocus_core.study.config import MODELS
    from echofocus_core.study.loading import check_download

    if settings.list_ or not settings.source:
        for name, entry in releases.registry().items():
            status = "downloaded" if (MODELS / name / entry["file"]).is_file() else "-"
            texts = "; ".join(entry[key] for key in ("description", "licence", "citation"))
            print(f"{name:18} {status:11} {texts}")
        print(f"get one: {PROGRAM} download NAME (research use only, under its licence)")
        return
    folder, record, others = releases.install(
        settings.source, MODELS, settings.model_name, settings.sha256, check_download
    )
    if others:
        print(f"ignored files, which are not part of a model: {', '.join(others[:10])}")
    if record["sha256"]:
        print(f"SHA-256 {record['sha256']}")
        if not record["sha256_was_known"]:
            RUN.warning(
                "this digest was not verified, so a file that was changed before the download is "
                "not detected; later changes are",
                "get the digest from the authors, and compare it",
            )
    for key in ("licence", "citation"):
        if key in record:
            print(f"{key}: {record[key]}")
    print(f"the model is {folder}; {PROGRAM} inspect {folder.name} describes it")
    print_next(f"{PROGRAM} predict --model_name {folder.name} --videos FOLDER")


def cmd_inspect(settings):
    """Describe a model folder or .pt file: architecture, labels, history, origin."""
    from echofocus_core.base.files import atomic_path, begins, output_path
    from echofocus_core.report.inspect import describe_file, print_description
    from echofocus_core.study.config import read_config

    if settings.json_:
        described = begins(r'\{\s+"name": .*\s+"file": ')
        output_path(settings.json_, "description by inspect", described)
    tasks = read_config(settings.config, needed=False).tasks
    facts = describe_file(settings.source or settings.model_name, tasks)
    print_description(facts)
    if settings.json_:
        with atomic_path(settings.json_) as temporary:
            temporary.write_text(json.dumps(facts, indent=2, default=str) + "\n")
        print(f"wrote {settings.json_}")
    if facts["kind"] == "study-level model":
        name = settings.source or settings.model_name or facts["name"]
        print_next(command_line("predict", {"model_name": name, "videos": "FOLDER"}))


def cmd_init(settings):
    """Write a commented config for the embeddings, videos and tables in this folder."""
    from echofocus_core.study.first_config import write_config

    print_next(write_config(settings.config))


def cmd_demo(settings):
    """Run the main commands on phantoms and a real DICOM cine, in ./demo."""
    from echofocus_core.report.demo import run_demo

    run_demo(settings.studies)
    print_next(f"{PROGRAM} init  # in the folder of your own data")


# ------------------------------------------------------------------------------------ the library
#
# Each function does what the command of its name does, with the command's options as keywords, and
# returns a DataFrame instead of writing files. A source of studies is one of
#
#     a path             a folder or file of clip embeddings, or a folder of videos
#     a list of paths    the clip embeddings of several encoders, for a model that joins them
#     an array           a study's clip embeddings (V videos, C clips, D features)
#     a dict             study id -> such an array, or -> dict of video -> array (C, D)
#     None               the dataset of the config, as on the command line


def load(model_name: str | os.PathLike, task: str = "", device: str = "") -> LoadedModel:
    """The model with this name in ./trained_models, or at this path.

    task: of the config, for a published checkpoint, which does not contain its labels; device: see
    --device. Raises UserError.
    """
    from echofocus_core.base.world import pick_device
    from echofocus_core.study.config import read_config
    from echofocus_core.study.loading import load_named

    tasks = read_config("", needed=False).tasks
    return load_named(str(model_name), "", tasks, task, pick_device(device))


def predict(model: Model, source: Source = None, **options: Any) -> pd.DataFrame:
    """The model's answers: a row per study, with the columns of the command `predict`.

    model: of `load`, or its name or path. `.attrs["left_out"]` of the result is a dict of the
    studies without an answer, and why. Raises UserError.
    """
    from echofocus_core.study.folds import sample_ids
    from echofocus_core.study.library import library_job, report_left_out
    from echofocus_core.study.predictions import answer_studies
    from echofocus_core.study.sources import warn_of_other_input

    with library_job("predict", options, source, model=model) as job:
        job = job.with_source(limited=True)
        store, eids = job.source.store, sample_ids(job.source.eids, job.settings.sample_limit)
        warn_of_other_input(job.model, store, eids)
        table, reasons, _ = answer_studies(job.model, store, eids, job.settings)
        table.attrs["left_out"] = job.source.unusable() | reasons
        report_left_out(table.attrs["left_out"], len(table))
        return table


def embed(model: Model, source: Source = None, **options: Any) -> pd.DataFrame:
    """The model's embeddings: a row per study, whose id is the index, and a column per feature.

    With level="video" there is a row per study and video, with pool_queries=False per study and
    label. For the arguments and `.attrs` see `predict`.
    """
    import numpy as np
    import pandas as pd

    from echofocus_core.study.embeddings import check_options, embeddings_of
    from echofocus_core.study.folds import sample_ids
    from echofocus_core.study.library import library_job, report_left_out
    from echofocus_core.study.sources import warn_of_other_input

    with library_job("embed", options, source, model=model) as job:
        check_options(job)
        job, left_out = job.with_source(limited=True), {}
        eids = sample_ids(job.source.eids, job.settings.sample_limit)
        warn_of_other_input(job.model, job.source.store, eids)
        studies = list(embeddings_of(job, eids, left_out))
        left_out = job.source.unusable() | left_out
        report_left_out(left_out, len(studies))
        if studies[0][1] is None:
            ids = pd.Index([eid for eid, _, _ in studies], name="eid")
        else:
            pairs = [(eid, name) for eid, names, _ in studies for name in names]
            second = "video" if job.settings.level == "video" else "label"
            ids = pd.MultiIndex.from_tuples(pairs, names=["eid", second])
        table = pd.DataFrame(np.concatenate([np.atleast_2d(x) for *_, x in studies]), ids)
        table.attrs["left_out"] = left_out
        return table


def explain(
    model: Model, source: Source = None, labels: Labels = None, **options: Any
) -> pd.DataFrame:
    """The contribution of each video to each answer: a row per study, label and video.

    labels: the label table, for the column y_true. The columns are those of the command `explain`.
    Unlike there, `subset` is "all" by default. For the other arguments and `.attrs` see `predict`.
    """
    import pandas as pd

    from echofocus_core.study import explanations as ex
    from echofocus_core.study.explanation_tables import labelled_rows
    from echofocus_core.study.library import library_job, report_left_out
    from echofocus_core.study.sources import warn_of_other_input

    with library_job("explain", {"subset": "all"} | options, source, labels, model=model) as job:
        columns = ex.label_columns(job.model, job.settings.explain_tasks)
        job = job.with_source()
        eids, truths, _ = ex.explained_studies(job)
        warn_of_other_input(job.model, job.source.store, eids)
        eids = ex.select_studies(job, eids, truths, columns)
        tables, left_out = [], job.source.unusable()
        for explanation in ex.explain_studies(job, eids, columns, truths):
            if explanation["columns"]:
                tables.append(labelled_rows(job.model, explanation, job.settings, truths))
            elif "unreadable" in explanation:
                left_out[explanation["eid"]] = explanation["unreadable"]
        report_left_out(left_out, len(tables))
        table = pd.concat(tables, ignore_index=True)
        table.attrs["left_out"] = left_out
        return table


def evaluate(
    model: Model | pd.DataFrame,
    source: Source = None,
    labels: Labels = None,
    task: Task = "",
    **options: Any,
) -> pd.DataFrame:
    """Metrics with 95 % intervals over patients: a row per fold, label and metric.

    model: as for `predict`, or a DataFrame of any model's predictions (eid, a column per label);
    labels: the label table; task: see `train`, for predictions. With `by`, rows of the groups
    follow; with `compare`, rows of the differences. Raises UserError.
    """
    import pandas as pd

    from echofocus_core.report.evaluation import evaluation_reports
    from echofocus_core.study.library import library_job

    with library_job("evaluate", options, source, labels, task, model) as job:
        tables = []
        for report in evaluation_reports(job):
            report.compute()
            for table in report.tables.values():
                tables.append(table.copy())
                tables[-1].insert(0, "fold", report.facts["fold"])
        return pd.concat(tables, ignore_index=True)


def train(
    source: Source = None, labels: Labels = None, task: Task = "", **options: Any
) -> LoadedModel:
    """Train a model in ./trained_models, or resume its training, and return it.

    labels: the label table (pid, eid, a column per label), a path or a DataFrame; task: the labels
    to learn, or the keys of a task as a dict, or the name of a task of the config. `model_name` is
    the model's folder. With fold="all" the result averages the models of the folds; with `grid` it
    is the model with the smallest validation loss. Raises UserError.
    """
    import pandas as pd

    from echofocus_core.study.library import library_job
    from echofocus_core.study.loading import model_folder

    with library_job("train", options, source, labels, task) as job:
        cmd_train(job)
        folder = model_folder(job.settings.model_name, job.settings.run_id)
        if job.settings.grid:
            folder = folder.parent / pd.read_csv(folder / "grid.csv")["model"][0]
        return load(os.path.join(folder, ""), device=job.settings.device)


def compare(
    encoders: dict[str, Source] | None = None,
    labels: Labels = None,
    task: Task = "",
    **options: Any,
) -> pd.DataFrame:
    """Train encoders and aggregators on the same folds: a row per combination, label and metric.

    encoders: name -> source of clip embeddings; None for those of the dataset. For the other
    arguments see `train`. The metrics are of the same test patients. `.attrs["folder"]` has the
    page and the other tables, such as differences.csv. Raises UserError.
    """
    from echofocus_core.report.comparison import compare_models
    from echofocus_core.study.library import library_job
    from echofocus_core.study.loading import model_folder

    with library_job("compare", options, encoders, labels, task) as job:
        table = compare_models(job)
        if table is None:
            raise UserError("another process still trains some of these models")
        table.attrs["folder"] = str(model_folder(job.settings.model_name, job.settings.run_id))
        return table


# ------------------------------------------------------------------------------- the command line

COMMANDS = {  # name: (function, what makes its Job in study/job.py; '': it takes Settings, example)
    "init": (cmd_init, "", ""),
    "train": (cmd_train, "training_job", "--task chd --n_folds 5 --fold all"),
    "compare": (
        cmd_compare, "training_job",
        "--task chd --encoders panecho=emb/panecho echoprime=emb/echoprime",
    ),
    "evaluate": (cmd_evaluate, "evaluation_job", "--model_name chd --by sex age:18,65"),
    "predict": (cmd_predict, "model_job", "--model_name EchoFocus_CHD --videos visits --page"),
    "embed": (cmd_embed, "model_job", "--model_name chd --datasets site outside --map"),
    "explain": (cmd_explain, "model_job", "--model_name chd --select confident --page"),
    "pack": (cmd_pack, "dataset_job", "--dataset site --dtype float16"),
    "check": (cmd_check, "", "--task chd --dataset site"),
    "download": (cmd_download, "", "EchoFocus_CHD"),
    "inspect": (cmd_inspect, "", "EchoFocus_CHD"),
    "demo": (cmd_demo, "", "--studies 80"),
}  # fmt: skip
SHARED = {
    "train": "share each optimiser step",
    "compare": "share each optimiser step",
    "explain": "share the studies",
}  # by processes


def build_parser():
    more = f"{PROGRAM} COMMAND --help shows the options of a command."
    parser = Parser(
        "COMMAND", description=__doc__.split("\n\n")[0], epilog=more, prog="echofocus.py"
    )
    parser.add_argument("--version", action="version", version=__version__, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (function, _, example) in COMMANDS.items():
        summary = " ".join(function.__doc__.split("\n\n")[0].split())
        source = "[SOURCE]" if "source" in options_of(command) else ""
        line = f"{PROGRAM} {command}"
        sub = commands.add_parser(
            command, help=summary, arguments=source, program=line, description=summary,
            example=example, prog=parser.prog,
        )  # fmt: skip
        add_options(sub, command)
    return parser


def main(argv=None):
    typed = vars(build_parser().parse_args(argv))
    command = typed.pop("command")
    settings = validate_as(Settings, typed)
    from echofocus_core.base.log import message_log

    with message_log(settings):
        run_command(command, settings)


def run_command(command, settings):
    """Run a command with the typed options, and print the line that usually follows."""
    from echofocus_core.base.world import World, from_environment, join_world, pick_device

    if command not in SHARED and from_environment("WORLD_SIZE", 1, least=1) > 1:
        raise UserError(f"{command} runs in one process: leave out torchrun")
    function, make_job, _ = COMMANDS[command]
    if not make_job:
        return function(settings)
    from echofocus_core.study import job as jobs

    typed = settings.model_dump(exclude_unset=True)
    device, shared = pick_device(typed.get("device", "")), command in SHARED
    with join_world(device, SHARED[command]) if shared else nullcontext(World()) as world:
        job = getattr(jobs, make_job)(command, typed, world)
        function(job)
        if line := line_after(command, job, typed):
            print_next(line)


MORE = {"explain": {"page": True}, "embed": {"map": "pca"}}
KEPT = ("config", "dataset", "videos", "keep", "embedding_path", "label_path", "assume_unseen")


def line_after(command, job, typed):
    """The command line that usually follows a command, with its model and data; '' for none."""
    from echofocus_core.study.config import MODELS
    from echofocus_core.study.loading import model_folder

    s, model = job.settings, job.model
    kept = KEPT if command == "train" else (*KEPT, "task")
    options = {k: x for k, x in typed.items() if k in kept or needs_videos(k)}
    if command == "train" and not s.grid:
        folder = model_folder(s.model_name, s.run_id)
        after = "predict" if s.fold == ALL_FOLDS else "evaluate"
    elif command in ("evaluate", "predict") and model and model.type != "readings":
        if s.page or model.record.level == "video":
            return ""
        folder, after, options["page"] = model.folder, "explain", True
    elif command in MORE and not s.page and not s.map and s.level == "study":
        return command_line(command, typed | MORE[command])
    else:
        return command_line("train", options) if command == "pack" else ""
    name = folder.relative_to(MODELS) if folder.is_relative_to(MODELS) else folder
    options["model_name"] = s.model_name if "," in s.model_name else str(name)
    return command_line(after, options)


def command_line(command, options):
    """The line to type for a command with those of `options` that it has."""
    words = [PROGRAM, command]
    for name, value in options.items():
        if name not in options_of(command):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            values = value.split(",") if name == "model_name" else value
            values = values if isinstance(values, list) else [values]
            words += [f"--{name}", *(shlex.quote(str(x)) for x in values)]
    return " ".join(words)


def program():
    """Run the command line, from a clone or installed."""
    run_main(main, Path(sys.argv[0]).name)


if __name__ == "__main__":
    program()
