"""The training patients of a model or an encoder: hashed ids of patients and studies."""

import hashlib
import unicodedata
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from echofocus_core.base.console import UserError

STUDY = "study of the video"  # a column of label tables of videos, whose index is study/video


def normal_form(text):
    """An id without differences that readers ignore: Unicode form, case, surrounding spaces."""
    return " ".join(unicodedata.normalize("NFKC", str(text)).casefold().split())


def id_key(text):
    """`normal_form` without leading zeros, which spreadsheets drop. Ids with one key are equal."""
    return normal_form(text).lstrip("0")


def hash_ids(ids, kind, key):
    """Ids -> int64 (n,) hashes of their `id_key`, keyed so that runs cannot be compared."""
    key = bytes.fromhex(key)
    texts = (f"{kind}|{id_key(x)}".encode(errors="surrogatepass") for x in ids)
    digests = (hashlib.blake2b(text, digest_size=8, key=key).digest() for text in texts)
    return np.frombuffer(b"".join(digests), np.int64)


@dataclass(eq=False)
class Seen:
    """The patients and studies that a run trained and validated on, as hashes keyed per run.

    They are stored in the checkpoint instead of ids: 8 bytes for each id (keyed BLAKE2b). A match
    of the patient or of the study is enough.
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
            codes = [hash_ids(part["pid"], "p", key), hash_ids(studies_in(part), "e", key)]
            parts[fold] = np.unique(np.concatenate(codes))
        return cls(key, **parts)

    def levels(self, table):
        """(by patient, by study), each (S,): 2 used in training, 1 in validation, 0 in neither."""
        codes = hash_ids(table["pid"], "p", self.key), hash_ids(studies_in(table), "e", self.key)
        return [np.where(np.isin(x, self.train), 2, np.isin(x, self.val) * 1) for x in codes]

    def saved(self):
        """The form that a checkpoint stores."""
        return {"key": self.key} | {k: torch.from_numpy(getattr(self, k)) for k in ("train", "val")}

    @classmethod
    def load(cls, saved, path):
        """Read the form that `saved` returns. Raises UserError."""
        try:
            hash_ids(["a"], "p", saved["key"])
            parts = [saved[fold].numpy() for fold in ("train", "val")]
            if any(x.dtype != np.int64 or x.ndim != 1 for x in parts):
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: its list of seen patients is damaged") from error
        return cls(saved["key"], *parts)


def studies_in(table):
    """The study of each row of a table of studies, or of their videos."""
    return table.get(STUDY, table.index)


def seen_from(saved, path):
    """The Seen of a checkpoint's model and of its ancestors, in this order.

    None if the checkpoint has no such list, like published ones. Raises UserError.
    """
    if "seen" not in saved:
        return None
    if not isinstance(saved["seen"], list) or not saved["seen"]:
        raise UserError(f"{path}: its list of seen patients is damaged")
    return [Seen.load(entry, path) for entry in saved["seen"]]


def seen_levels(seen, table):
    """(S,) 2 if a model was trained on the study or its patient, 1 if only validated, else 0.

    A match of the patient id or of the study id is enough, and applies to all studies of the
    patient in the table: patient ids are often recoded, study ids are not.
    """
    levels = np.zeros(len(table), int)
    for part in seen:
        levels = np.maximum.reduce([levels, *part.levels(table)])
    return pd.Series(levels, table.index).groupby(table["pid"]).transform("max")


def all_seen(*lists):
    """Join lists of Seen (or None) into one list without duplicates."""
    parts = [part for each in lists for part in each or ()]
    return list({(p.key, p.train.tobytes(), p.val.tobytes()): p for p in parts}.values())
