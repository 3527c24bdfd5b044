"""Which patient is in which fold, and whom a model has seen: no patient may be on both sides.

The folds are a seeded hash of the patient, or what a column of the label table gives. A model
carries hashes of its own and its ancestors' patients and studies.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch

from echofocus_core.base.console import RUN, UserError, printable, some
from echofocus_core.base.files import derive_seed, write_table
from echofocus_core.base.options import FOLDS, parse_split
from echofocus_core.base.tables import as_seen, look_alike, read_table
from echofocus_core.study.outputs import EVENT

STUDY = "study of the video"  # a column of label tables of videos, whose index is study/video
GIVEN_FOLD = "fold given"  # the column of a label table (as read) for what `split_column` says
FOLD_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
FOLD_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")

# How it is known that a test study is unseen; several are joined by '; ' (see `what_is_seen`).
BY_ID, ELSEWHERE = "by patient and study id", "trained elsewhere, not compared"
ASSUMED, ENCODER_UNKNOWN = "assumed", "the encoder's patients are not known"
ALIKE = "ids that look alike"


def given_folds(cells, path, listener):
    """The cells of a split column (text) -> train, val, test or None; other words are an error."""
    folds = cells.str.lower().map(FOLD_WORDS)
    odd = cells[folds.isna() & cells.notna()]
    if len(odd):
        listener.error(
            f"{path}, {cells.name}: no folds: {some(map(printable, odd.unique()))} "
            f"(line {some(odd.index)})",
            f"use train, val and test ({', '.join(FOLD_WORDS)} are understood)",
        )
    return folds.astype(object)


def refuse_split_patients(table, column, path, listener):
    """A patient whose studies a given split puts into two folds is an error."""
    folds = table.dropna(subset=[GIVEN_FOLD]).groupby("pid")[GIVEN_FOLD].nunique()
    both = folds.index[folds > 1]
    if len(both):
        listener.error(
            f"{path}, {column}: {len(both)} patients are in two folds (studies "
            f"{some(table.index[table['pid'].isin(both)])})",
            "give all studies of a patient one fold",
        )
    if blank := int(table[GIVEN_FOLD].isna().sum()):
        listener.warning(f"{path}, {column}: {blank} studies have no fold", "they are left out")


def some_of(ids, limit):
    """So many of the ids as --sample_limit says, by a hash, in the order given; 0 is all."""
    ids = list(ids)
    chosen = set(sorted(ids, key=lambda x: derive_seed("limit", x))[: limit or None])
    return [x for x in ids if x in chosen]


def fold_of(pid, seed, percent, n_folds=0, test_fold=0):
    """The fold of a patient: by a seeded hash of the id, so that new patients move nobody.

    With n_folds the patients fall into so many equal parts: part `test_fold` is the test fold,
    the next one validates, the others train.
    """
    return fold_at(derive_seed("split", seed, pid) / 2**63, percent, n_folds, test_fold)


def fold_at(share, percent, n_folds=0, test_fold=0):
    """The fold at a place from 0 to 1 among the patients, see `fold_of`."""
    if n_folds:
        part = (int(share * n_folds) - test_fold) % n_folds
        return {0: "test", 1: "val"}.get(part, "train")
    position = share * sum(percent)
    for fold, edge in zip(FOLDS, np.cumsum(percent), strict=True):
        if position < edge:
            return fold
    return FOLDS[-1]


def split_patients(table, made, outputs=None):
    """Label table -> Series of study id to fold, by patient; `made`: seed, split, n_folds, fold.

    outputs: of the labels, which say how `stratify` tells patients apart. A column GIVEN_FOLD
    decides instead; where it is blank the study is 'left out'.
    """
    if GIVEN_FOLD in table:
        return table[GIVEN_FOLD].fillna("left out").rename("fold")
    seed, *rule = made["seed"], parse_split(made["split"]), made["n_folds"], made["fold"]
    if made.get("stratify"):
        folds = stratified(table, made["stratify"], seed, rule, outputs)
    else:
        folds = {pid: fold_of(pid, seed, *rule) for pid in table["pid"].unique()}
    return table["pid"].map(folds).rename("fold")


def stratified(table, label, seed, rule, outputs=None):
    """Patient -> fold: patients alike in a label are dealt in equal shares, in the hash's order.

    Alike: with a positive study (or the event), with none, or without the label; of classes, the
    highest of the patient's; of a measurement, the third that the patient's mean is in. Unlike by
    the hash alone, patients who come later would move others: the folds of a training are written
    down, and later patients count as test.
    """
    kind = outputs.kinds[label] if outputs else ""
    values = table[label + EVENT] if kind == "survival" else table[label]
    apart = kind == "multiclass" or is_finding(values)
    y = values.groupby(table["pid"]).agg("max" if apart else "mean")
    group = y if apart else pd.Series(np.nan, y.index)
    if not apart:
        known = y.dropna()
        group[known.index] = np.searchsorted(known.quantile([1 / 3, 2 / 3]), known)
    folds = {}
    for _, alike in group.groupby(group.fillna(-1)):
        order = sorted(alike.index, key=lambda pid: derive_seed("split", seed, pid))
        places = (np.arange(len(order)) + 0.5) / max(len(order), 1)
        folds |= {pid: fold_at(x, *rule) for pid, x in zip(order, places, strict=True)}
    return folds


def is_finding(values):
    return values.dropna().isin([0, 1]).all()


def write_split(folder, split):
    """split.csv: study, patient and fold, for a person to look up. split: pid and fold by eid."""
    write_table(split.rename_axis("eid"), folder / "split.csv")


def read_split(folder):
    """The model folder's split as DataFrame (index eid; pid, fold), or None: it has none."""
    path = folder / "split.csv"
    if not path.is_file():
        return None
    split = read_table(path, RUN)
    for column in ("eid", "pid", "fold"):
        if column not in split:
            raise UserError(f"{path} has no column '{column}'; it lists eid, pid and fold")
    return split.set_index("eid")


@dataclass(eq=False)
class Seen:
    """The patients and studies that a run trained and validated on, as hashes under its own key.

    So a checkpoint knows them without a file beside it and names nobody: 8 bytes a form (keyed
    BLAKE2b), a patient or a study matches by itself. Older versions have no hash of `look_alike`.
    """

    key: str  # hexadecimal
    train: np.ndarray  # int64, sorted
    val: np.ndarray

    @classmethod
    def of(cls, split, key):
        """From a DataFrame of pid and fold, indexed by study id."""
        parts = {}
        for fold in ("train", "val"):
            part = split[split["fold"] == fold]
            codes = []
            for kind, ids in (("p", part["pid"]), ("e", studies_in(part))):
                codes += [hashed(form, kind, key) for form in same_forms(ids)]
                codes += [hashed(map(look_alike, ids), f"{kind} alike", key)]
            parts[fold] = np.unique(np.concatenate(codes))
        return cls(key, **parts)

    def weights(self, table, alike=False):
        """(by patient, by study), each (S,): 2 where training had it, 1 validation, 0 neither.

        alike: also what matches by `look_alike` alone, in either case.
        """
        pids, place = np.unique(table["pid"].to_numpy(str), return_inverse=True)
        return [self.known(pids, "p", alike)[place], self.known(studies_in(table), "e", alike)]

    def known(self, ids, kind, alike=False):
        """(n,) as `weights`, of ids of a kind, in whatever form (`same_forms`)."""
        codes = [hashed(form, kind, self.key) for form in same_forms(ids)]
        if alike:
            keys = list(map(look_alike, map(str, ids)))
            codes += [hashed(keys, x, self.key) for x in (kind, f"{kind} alike")]
        codes = np.stack(codes)
        return np.where(np.isin(codes, self.train), 2, np.isin(codes, self.val) * 1).max(axis=0)

    def saved(self):
        """As it is kept in a checkpoint."""
        return {"key": self.key} | {k: torch.from_numpy(getattr(self, k)) for k in ("train", "val")}

    @classmethod
    def load(cls, saved, path):
        """From what `saved` gave. Raises UserError."""
        try:
            hashed(["a"], "p", saved["key"])
            parts = [saved[fold].numpy() for fold in ("train", "val")]
            if any(x.dtype != np.int64 or x.ndim != 1 for x in parts):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: its list of seen patients is damaged") from error
        return cls(saved["key"], *parts)


def studies_in(table):
    """The study of each row of a table of studies, or of their videos."""
    return table.get(STUDY, table.index)


def same_forms(ids):
    """The ids as they are and, where that differs, as file systems and spreadsheets write the same
    one: in the Unicode normal forms NFC and NFD, and `as_seen`."""
    ids = list(map(str, ids))
    yield ids
    for form in (*(partial(unicodedata.normalize, x) for x in ("NFC", "NFD")), as_seen):
        if (other := list(map(form, ids))) != ids:
            yield other


def hashed(ids, kind, key):
    """Ids -> int64 (n,), keyed so that lists of two runs cannot be matched with each other."""
    key = bytes.fromhex(key)
    parts = (
        hashlib.blake2b(f"{kind}|{x}".encode(errors="surrogatepass"), digest_size=8, key=key)
        for x in ids
    )
    return np.frombuffer(b"".join(part.digest() for part in parts), np.int64)


def seen_from(saved, folder):
    """What a checkpoint's model and its ancestors have seen: a list of Seen, its own first.

    From the checkpoint; for one of an older version, or a published one, from split.csv in its
    folder. None where neither says it.
    """
    path = folder / "split.csv"
    if "seen" in saved:
        if not isinstance(saved["seen"], list) or not saved["seen"]:
            raise UserError(f"{folder}: its list of seen patients is damaged")
        return [Seen.load(entry, folder) for entry in saved["seen"]]
    split = read_split(folder)
    if split is None:
        return None
    ancestors = split[~split["fold"].isin(FOLDS)]  # whom an ancestor knows, or who had no fold
    own = Seen.of(split, hashlib.sha256(path.read_bytes()).hexdigest()[:32])
    return [own, Seen.of(ancestors.assign(fold="train"), own.key)]


def seen_weights(seen, table, alike=False):
    """(S,) 2 where a model was trained on a study or its patient, 1 validated, 0 neither.

    A match of the patient id or of the study id is enough, and holds for all the patient's
    studies in the table: ids of patients are often coded anew, those of studies are not.
    alike: also by ids that only look alike.
    """
    weights = np.zeros(len(table), int)
    for part in seen:
        weights = np.maximum.reduce([weights, *part.weights(table, alike)])
    return pd.Series(weights, table.index).groupby(table["pid"]).transform("max")


def warn_of_other_spellings(name, seen, table, listener):
    """Tell where the ids of a table may be called otherwise than in the training of `name`, whose
    list `seen` is; what of it a report says, [] or one text."""
    known = seen_weights(seen, table) > 0
    alike = (seen_weights(seen, table, alike=True) > 0) & ~known
    if alike.any():
        text = (
            f"{alike.sum()} studies, or their patients, are called almost as some that {name} knows"
        )
        listener.warning(
            f"{text} ({some(map(printable, alike.index[alike]))}): ids that differ in case, or in "
            "zeros in front, count as different ones",
            "if they are the same, write them as in its training",
        )
        return [f"{ALIKE}: {text}"]
    if seen and not known.any():
        listener.note(
            f"{name} knows its patients and none of them is here, by the ids: are patients and "
            "studies called as in its training?"
        )
    return []


def what_is_seen(model, table, dataset, digest, assume_unseen):
    """(list of Seen to keep away from a test, how it is known). Raises UserError if it is not.

    1. The checkpoint or its split.csv says it (`seen_from`).
    2. Our own model of an older version alone, and the very table of its training (`digest`):
       rebuilt from seed and split, unless it was begun from another model.
    3. A published model was trained elsewhere; nothing can be compared, which is said.
    4. Else the user must say `--assume_unseen`.
    """
    record, name = model.record, model.folder.name
    if model.seen is not None:
        return model.seen, BY_ID
    if not record.labels:
        print(f"{name} was trained elsewhere, on patients it does not name: all count as unseen")
        return [], ELSEWHERE
    home, made = dataset == record.dataset, record.settings
    if home and not made.init_from and digest() == record.labels_sha256:
        own = Seen.of(table[["pid"]].assign(fold=split_patients(table, vars(made))), "00")
        return [own], BY_ID
    if assume_unseen:
        print(f"WARNING: {dataset} counts as unseen by {name}, as --assume_unseen says")
        return [], ASSUMED
    raise UserError(
        f"{name} does not say whom it was trained on (an older version wrote it), and its "
        f"split.csv is not beside it: studies of {dataset} may be of its training; put split.csv "
        "there, or say --assume_unseen if you know that none is"
    )


def folds_for(model, table, dataset, listener=RUN, assume_unseen=False, digest=str):
    """(study id -> fold of a labelled dataset, how it is known that a test study is unseen).

    On its own dataset each patient keeps the fold of the training, and new ones get theirs by the
    same rule. Any other dataset is all test, less what the model or an ancestor has seen.
    Of models that are averaged a study is test where none has seen its patient, and val where one
    validated on him and none trained.
    digest: a function that gives the digest of the labels, as training computed it.
    """
    seen, how = what_is_seen(model, table, dataset, digest, assume_unseen)
    alike = warn_of_other_spellings(model.folder.name, seen, table, listener)
    averaged = bool(getattr(model, "members", ()))
    home = dataset == model.record.dataset and not averaged
    if home and seen:
        refuse_moved(seen[0], table, listener)
    own = len(seen) if averaged else 1
    folds = seen_weights(seen[:own], table).map({0: None, 1: "val", 2: "train"}).astype(object)
    ancestors = folds.isna() & (seen_weights(seen[own:], table) > 0)
    known = ancestors if home else ancestors | folds.notna()
    if assume_unseen and known.any():
        how = count_as_unseen(known, model.folder.name, listener)
        folds = folds.mask(known)
    else:
        if not home and known.any():
            listener.note(
                f"left out {known.sum()} labelled studies: {model.folder.name} was trained on "
                "them or their patients, by the ids"
            )
        folds = folds.mask(ancestors, "seen by an ancestor")
    made = vars(model.record.settings)
    by_rule = home and not made.get("stratify")
    folds = folds.fillna(split_patients(table, made) if by_rule else "test")
    return folds, "; ".join([how, *alike])


def count_as_unseen(known, name, listener):
    """Warn of studies that the model `name` knows and the user says it does not; how it is known
    that they are unseen, in words."""
    text = f"{known.sum()} studies are known to {name}"
    listener.warning(f"{text}, by the ids; they count as unseen, as --assume_unseen says")
    return f"{ASSUMED}: {text}"


def refuse_moved(seen, table, listener):
    """An error when the table gives a study of the training to a patient who was not in it."""
    by_patient, by_study = seen.weights(table)
    moved = table.index[(by_study > 0) & (by_patient == 0)]
    if len(moved):
        listener.error(
            f"the label table gives {len(moved)} studies to other patients than when the model was "
            f"trained ({some(moved)}): a training patient could turn up in the test fold",
            "restore the pids, or train under a new name",
        )


def known_to_others(whole, settings, encoder, begun_from=None, listener=RUN, digest=str):
    """([(name, `seen_weights`)] of the model to start from and of the encoder, how it is known).

    whole: the label table before any study is left out, since a patient is known by each of his;
    encoder: of `Store.encoder_seen`. What --assume_unseen overrules is not among them, but said.
    """
    (seen, said), alike = encoder, []
    known, assumed = [("the encoder", seen_weights(seen, whole), settings.assume_unseen)], []
    alike += warn_of_other_spellings("the encoder of the embeddings", seen, whole, listener)
    if begun_from:
        name, dataset = begun_from.folder.name, settings.dataset
        own, how = what_is_seen(begun_from, whole, dataset, digest, settings.assume_unseen)
        alike += warn_of_other_spellings(name, own, whole, listener)
        assumed += [how] * (how == ASSUMED)
        overruled = settings.assume_unseen and dataset != begun_from.record.dataset
        known.insert(0, (name, seen_weights(own, whole), overruled))
    for name, before, overruled in known:
        if overruled and before.any():
            assumed.append(count_as_unseen(before > 0, name, listener))
    kept = [(name, before) for name, before, overruled in known if not overruled]
    return kept, [*assumed, *alike, *([] if said else [ENCODER_UNKNOWN])]


def without_seen(folds, known, listener=RUN, what="studies"):
    """Folds less the val and test patients whom others know, see `known_to_others`.

    what: that the folds are of, studies or videos.
    """
    for name, before in known:
        before = before.loc[folds.index]
        lost = (before == 2) & folds.isin(["val", "test"]) | (before == 1) & (folds == "test")
        if lost.any():
            listener.note(
                f"left out {lost.sum()} {what} of val and test: {name} knows them or their "
                f"patients ({some(map(printable, lost.index[lost]))})"
            )
        folds = folds.mask(lost, f"known to {name}")
    return folds


def refuse_other_folds(folder, folds):
    """UserError where a run that goes on has others in its folds than its split.csv says.

    Why a study is in none may be said in other words: versions differ in them.
    """
    written, now = read_split(folder), folds.sort_index()
    text, remedy = f"the studies or patients have changed since {folder} was begun", ""
    if written is not None:  # an older version has lines of what an ancestor has 'seen'
        then = written["fold"][written["fold"] != "seen"].sort_index()
        if then.index.equals(now.index):
            now, then = (x.astype(str).where(x.isin(FOLDS), "") for x in (now, then))
            other = now[now != then]
            if not len(other):
                return
            if ((other == "") | (then[other.index] == "")).all():
                text = (
                    f"{len(other)} studies are left out now, or are not any more, unlike when "
                    f"{folder} was begun ({some(map(printable, other.index))}): the list of whom "
                    "the encoder (encoder_seen.pt) or --init_from knows came or went, or "
                    "--assume_unseen"
                )
                remedy = "restore it, or "
    raise UserError(f"{text}; {remedy}use another --model_name or --run_id")


def all_seen(*lists):
    """Lists of Seen, or None, as one without doubles."""
    parts = [part for known in lists for part in known or ()]
    return list({(p.key, p.train.tobytes(), p.val.tobytes()): p for p in parts}.values())
