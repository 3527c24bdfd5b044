"""Train encoders and aggregators on the same folds; compare them on the same unseen patients."""

import os
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from echofocus_core.base.console import UserError, some
from echofocus_core.base.files import InUse
from echofocus_core.base.options import CELL, RECORDED, grid_of
from echofocus_core.base.resume import differences
from echofocus_core.base.world import from_environment, pick_device
from echofocus_core.study import statistics as st
from echofocus_core.study.config import read_record
from echofocus_core.study.evaluation import headlines_of, subgroups
from echofocus_core.study.fold_answers import answer_fold
from echofocus_core.study.job import check_settings
from echofocus_core.study.loading import load_model, model_folder, read_checkpoint
from echofocus_core.study.sources import Source, open_embeddings
from echofocus_core.study.train_command import best_of, train_model
from echofocus_core.video.extract import extraction_seconds
from echofocus_core.video.joined import open_stores

COMPARED = "compared models"


@dataclass(frozen=True)
class Cell:
    """A combination that is trained."""

    encoder: str
    aggregator: str
    fraction: float = 1.0

    @property
    def name(self):
        part = "" if self.fraction == 1 else f"_{self.fraction:g}"
        return f"{self.encoder}_{self.aggregator}{part}"


@dataclass
class Trained:
    """A trained Cell with its answers for the test fold."""

    cell: Cell
    studies: object  # Studies, see study/evaluation.py
    facts: dict  # cost and chosen options, for the table
    warnings: list
    perturbed: dict  # name of perturbed embeddings -> Studies of them


def cells_of(job):
    """[Cell] and encoder -> its embeddings, from --encoders, --aggregators and --fractions.

    Raises UserError.
    """
    settings = job.settings
    folders = dict(named_paths("--encoders", settings.encoders))
    name = "+".join(path.stem for path in job.dataset.embedding_paths)
    folders = folders or {name: job.dataset.embedding_paths}
    for name, _ in named_paths("--perturbed", settings.perturbed):
        if name not in folders:
            raise UserError(f"--perturbed {name}=...: no such encoder (there are {some(folders)})")
    aggregators = settings.aggregators or [settings.transformer_type]
    for text in settings.grid:
        if text.partition("=")[0] in CELL:
            raise UserError(
                f"--grid {text}: it defines the combinations; use --aggregators, --fractions"
            )
    fractions = sorted(set(settings.fractions or [1.0]))
    if not 0 < fractions[0] <= fractions[-1] <= 1:
        raise UserError(
            "--fractions: give fractions of the training patients, above 0 and at most 1"
        )
    return [Cell(*x) for x in product(folders, dict.fromkeys(aggregators), fractions)], folders


def named_paths(option, texts):
    """[(name, list of paths)] of texts such as panecho=emb/p, or both=emb/p,emb/e for joined
    encoders. Raises UserError."""
    pairs = []
    for text in texts:
        name, _, part = text.partition("=")
        paths = [Path(x) for x in part.split(",")]
        repeated = option == "--encoders" and name in dict(pairs)
        if not name or Path() in paths or "/" in name or repeated:
            raise UserError(f"{option} {text}: write a name and a folder, as in panecho=emb/p")
        pairs.append((name, paths))
    return pairs


def train_cells(job):
    """Train what is not trained yet; (finished Cell -> folder of its model, all cells).

    With --grid, each combination of its options is trained, and the best by validation loss
    represents the cell. Several processes may share the work, such as the jobs of a SLURM array:
    each begins at another place and leaves out what another one trains.
    """
    cells, folders = cells_of(job)
    for paths in folders.values():  # so that faults are reported before the first training
        store = open_stores(paths)
        store.width(store.files)
    grid = grid_of(job.settings.grid) if job.settings.grid else [{}]
    refuse_other_cells(job, cells)
    runs = []
    for cell, (k, options) in product(cells, enumerate(grid)):
        part = f"grid_{k}" if options else ""
        one = job_of_cell(job, cell, folders[cell.encoder], part).but(**options)
        check_settings(one.settings)
        runs.append((cell, options, one, Path(one.settings.model_name).absolute()))
    first = from_environment("SLURM_ARRAY_TASK_ID", 0) % len(runs)
    for i, (cell, options, one, place) in enumerate(runs[first:] + runs[:first]):
        print(f"{cell.name}, {i + 1} of {len(runs)}" + f": {options}" * bool(options))
        if best_of(place, options):
            refuse_changes(place, one.settings)
        try:
            train_model(one)  # compares labels and embeddings, also of a finished model
        except InUse:
            print(f"{place.name} is trained by another process")
    finished = {}
    for cell in cells:
        best = {place: best_of(place, options) for c, options, _, place in runs if c == cell}
        if all(best.values()):
            finished[cell] = min(best, key=lambda place: best[place]["val_loss"])
    return finished, cells


def refuse_other_cells(job, cells):
    """UserError where the results of other combinations would be replaced."""
    folder = model_folder(job.settings.model_name, job.settings.run_id)
    for cell in cells:
        place = folder / cell.name
        whole, parts = (place / "last_checkpoint.pt").exists(), any(place.glob("grid_*"))
        if whole if job.settings.grid else parts:
            other = "without" if job.settings.grid else "with"
            raise UserError(f"{cell.name} was trained {other} --grid: use another --model_name")
    if (folder / "cells.csv").is_file():
        names = ["encoder", "aggregator", "fraction"]
        rows = pd.read_csv(folder / "cells.csv", dtype={"encoder": str})[names].drop_duplicates()
        if missing := {Cell(*row).name for row in rows.to_numpy()} - {cell.name for cell in cells}:
            raise UserError(
                f"{folder} compares other combinations too ({some(sorted(missing))}): name them "
                "again, or use another --model_name"
            )


def refuse_changes(place, settings):
    """UserError if a finished model was trained with other settings, which would not be told."""
    path = place / "last_checkpoint.pt"
    trained = read_record(read_checkpoint(path), path).settings
    pairs = ({name: getattr(x, name) for name in RECORDED} for x in (trained, settings))
    if changes := differences(*pairs):
        raise UserError(
            f"{place.name} is trained: {'; '.join(changes.values())}; use another --model_name"
        )


def job_of_cell(job, cell, folder, part):
    """The training Job of a cell."""
    name = model_folder(job.settings.model_name, job.settings.run_id) / cell.name / part
    one = job.but(
        transformer_type=cell.aggregator, train_fraction=cell.fraction, grid=[], run_id="",
        model_name=os.path.relpath(name.absolute()),
    )  # fmt: skip
    return replace(one, dataset=job.dataset.model_copy(update={"embedding_path": folder}))


def answer_cells(job, finished):
    """[Trained] of the finished cells, all on the test studies that each of them can answer."""
    _, folders = cells_of(job)
    trained = []
    for cell, place in finished.items():
        model = load_model(place, device=pick_device(job.settings.device))
        studies, warnings = answer_cell(job, cell, folders[cell.encoder], model)
        perturbed = {}
        for name, paths in named_paths("--perturbed", job.settings.perturbed):
            if name == cell.encoder and cell.fraction == 1:
                title = "+".join(path.name for path in paths)
                perturbed[title], more = answer_cell(job, cell, paths, model)
                warnings = [*warnings, *more]  # such as embeddings of other weights
        saved = read_checkpoint(place / "last_checkpoint.pt")
        history = np.array([row[1:5] for row in saved["perf_log"]], float)
        split = pd.read_csv(place / "split.csv", dtype=str)
        split = split[split["fold"] == "train"]
        facts = {
            "model": "/".join(place.parts[-2:] if place.name == cell.name else place.parts[-3:]),
            "train_studies": len(split), "train_patients": split["pid"].nunique(),
            "width": model.net.width,
            "parameters": sum(p.numel() for p in model.net.parameters()),
            "epochs": len(history), "best_epoch": 1 + int(history[:, 1].argmin()),
            "val_loss": history[:, 1].min(),
            "train_seconds": history[:, 3].sum(),
            "extract_seconds": extraction_seconds_of(folders[cell.encoder]),
        }  # fmt: skip
        chosen = model.record.settings.model_dump(include=set(dict(option_names(job))))
        trained.append(Trained(cell, studies, facts | chosen, list(warnings), perturbed))
    common = set.intersection(*(set(x.studies.eids) for x in trained))
    if not common:
        raise UserError("no test study has the embeddings of every encoder")
    for x in trained:
        x.studies = only(x.studies, common)
    return trained


def warnings_of(job, trained):
    """Sorted texts for the reader of a comparison, about the embeddings and the training."""
    warnings = {text for x in trained for text in x.warnings}
    fractions = {x.cell.fraction for x in trained}
    if len({(x.cell.fraction, x.facts["train_studies"]) for x in trained}) > len(fractions):
        warnings.add("Encoders without embeddings of some studies were trained on fewer studies.")
    limit = job.settings.epoch_lim
    if falling := [x.cell.name for x in trained if x.facts["best_epoch"] == limit]:
        warnings.add(
            f"The validation loss of {some(falling, 8)} was still falling when --epoch_lim {limit} "
            "ended the training, so better results are possible: use a larger --epoch_lim, or "
            "choose the learning rate with --grid."
        )
    return sorted(warnings)


def extraction_seconds_of(folders):
    """Mean seconds of extraction per study, summed over joined encoders; NaN if not recorded."""
    seconds = [extraction_seconds(folder) for folder in folders]
    return np.nan if None in seconds else sum(seconds)


def answer_cell(job, cell, folder, model):
    """(Studies of the test fold from the embeddings in a folder, warnings)."""
    one = job_of_cell(job, cell, folder, "").but(subset="test")
    source = Source(job.settings.dataset, open_embeddings(one.dataset, job.task, one.settings))
    one = replace(one, model=model, source=source)
    answers = answer_fold(one, model.record.thresholds)
    return answers.studies, answers.warnings


def only(studies, eids):
    """The Studies among some ids, in the order of their ids."""
    rows = [i for i, eid in enumerate(studies.eids) if eid in eids]
    return studies.take(sorted(rows, key=lambda i: studies.eids[i]))


def option_names(job):
    """[(option, values)] of --grid."""
    return [(text.partition("=")[0], text) for text in job.settings.grid]


def cell_rows(trained, n_boot, seed):
    """(rows of the table of cells, Cell -> its Estimates of headline metrics)."""
    rows, headlines = [], {}
    for x in trained:
        estimates = st.estimates(x.studies.outcomes, x.studies.patients, n_boot, seed)
        chosen = headlines_of(x.studies, estimates)
        metrics = {e.metric for e in chosen.values()}
        means = [e for e in estimates if e.label == "mean" and e.metric in metrics]
        headlines[x.cell] = chosen | ({"mean": means[0]} if len(means) == 1 else {})
        for e in headlines[x.cell].values():
            rows.append(vars(x.cell) | e.row() | x.facts)
    return rows, headlines


def difference_rows(trained, reference, n_boot, seed):
    """Rows with the paired differences of every cell minus a reference, a Trained, on the same
    patients; p-values are adjusted by Holm's method over all of them."""
    rows = []
    for x in trained:
        if x.cell == reference.cell:
            continue
        patients = x.studies.patients
        estimates = st.compare(
            x.studies.outcomes, reference.studies.outcomes, patients, n_boot, seed
        )
        headline = {o.label: o.headline for o in x.studies.outcomes}
        for e in estimates:
            if headline.get(e.label) == e.metric:
                rows.append(vars(x.cell) | {"minus": reference.cell.name} | e.row())
    adjusted = st.holm([row["p_value"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def perturbed_rows(trained, n_boot, seed):
    """Rows with the metric on perturbed embeddings minus that on the plain ones, of each cell."""
    rows = []
    for x in trained:
        for name, studies in x.perturbed.items():
            common = set(studies.eids) & set(x.studies.eids)
            pair = only(studies, common), only(x.studies, common)
            headline = {o.label: o.headline for o in x.studies.outcomes}
            for e in st.compare(*(s.outcomes for s in pair), pair[0].patients, n_boot, seed):
                if headline.get(e.label) == e.metric:
                    rows.append(vars(x.cell) | {"perturbed": name} | e.row())
    return rows


def best_of_cells(trained, headlines):
    """The Trained with the best mean rank over labels by the headline metric of each; a smaller
    error is better."""
    ranks = []
    for label in headlines[trained[0].cell]:
        rows = [headlines[x.cell][label] for x in trained]
        values = pd.Series([-r.value if "error" in r.metric else r.value for r in rows])
        if label != "mean":
            ranks.append(values.rank(ascending=False))
    return trained[int(np.argmin(np.mean(ranks, axis=0)))]


def group_rows(trained, columns, n_boot, seed):
    """Rows of the headline metrics of every group of --by."""
    rows = []
    for x in trained:
        headline = {o.label: o.headline for o in x.studies.outcomes}
        for column, (cells, edges) in columns.items():
            for group, e in subgroups(
                x.studies, cells.reindex(x.studies.eids), edges, n_boot, seed
            ):
                if headline.get(e.label) == e.metric:
                    rows.append(vars(x.cell) | {"by": column, "group": group} | e.row())
    return rows


def tables_of(job, trained, columns):
    """name -> DataFrame: cells, differences and groups."""
    settings = job.settings
    boot = settings.n_boot, settings.seed
    cells, headlines = cell_rows(trained, *boot)
    whole = [x for x in trained if x.cell.fraction == max(t.cell.fraction for t in trained)]
    references = dict.fromkeys((0, whole.index(best_of_cells(whole, headlines))))
    references = [whole[i] for i in references]
    rows = [row for x in references for row in difference_rows(whole, x, *boot)]
    tables = {"cells": pd.DataFrame(cells).drop(columns="p_value")}
    if rows:  # none for a single combination
        tables["differences"] = pd.DataFrame(rows)
    if settings.perturbed:
        tables["perturbed"] = pd.DataFrame(perturbed_rows(trained, *boot))
    if columns:
        groups = pd.DataFrame(group_rows(trained, columns, *boot))
        tables["groups"] = groups.drop(columns="p_value", errors="ignore")
    return tables, headlines, references
