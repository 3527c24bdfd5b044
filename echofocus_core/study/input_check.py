"""How far to trust an answer: what a model was trained on, how unlike it a study is, and how much
its answer moves with other clips."""

import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core.base.files import derive_seed
from echofocus_core.base.options import validated
from echofocus_core.study.config import Input
from echofocus_core.video.store import MADE_WITH, StudyClips, UnreadableStudy

# ------------------------------------------------------------------------- what was trained on

DESCRIBED = 512  # training studies that are looked at, at most


@dataclass
class TrainingInput:
    """What a model's training fold looks like, for `InputCheck` and as a baseline."""

    input: Input
    clip_mean: torch.Tensor  # (D,) float32, mean clip embedding, each study counting alike
    novelty: "Novelty | None"

    @classmethod
    def of(cls, store, patients):
        """patients: of the studies of the training fold, dict of study id to patient."""
        eids = sorted(patients, key=lambda eid: derive_seed("input", eid))[:DESCRIBED]
        made_with = store.made_with(patients)
        shared = {k: next(iter(v)) for k, v in made_with.items() if len(v) == 1}
        norms, videos, groups, more = [], [], [], []
        for eid in eids:
            with suppress(UnreadableStudy):
                study = store.read(eid)
                norms.append(mean_norm(study))
                videos.append(study.embeddings.mean(1, dtype=np.float64))
                groups.append(patients[eid])
                weights, n_clips = study.made_with.get("weights", ""), study.embeddings.shape[1]
                more.append({"weights": weights, "n_clips": n_clips})
        mean = np.mean([v.mean(0) for v in videos], axis=0) if videos else np.zeros(D)
        shared |= {k: v for k, v in more[0].items() if all(m[k] == v for m in more)} if more else {}
        shared = {k: v for k, v in shared.items() if v != "" and str(v).isprintable()}
        if norms:
            shared |= {"norm_mean": float(np.mean(norms)), "norm_sd": float(np.std(norms))}
        kind = validated(Input, shared, "the attributes of the embedding files")
        return cls(kind, torch.from_numpy(mean).float(), Novelty.of(videos, groups))


def mean_norm(study):
    return float(np.linalg.norm(study.embeddings.astype(np.float64), axis=2).mean())


# ----------------------------------------------------------------------------------- novelty

COMPONENTS = 32  # directions with a variance of their own, at most
FEWEST = 20  # training studies that say what is usual, at least
FOLDS = 5
QUANTILES = np.linspace(0, 1, 201)
UNUSUAL = 0.99  # share of training studies that are nearer, from which on a study is warned of


@dataclass
class Distribution:
    """A normal distribution of embeddings: some directions with their variances, one variance for
    all others (probabilistic principal components: Tipping and Bishop, J R Stat Soc B 1999)."""

    mean: np.ndarray  # (D,)
    components: np.ndarray  # (K, D) orthonormal
    video_variance: np.ndarray  # (K + 1,) of a video along each, and along any other direction
    study_variance: np.ndarray  # (K + 1,) of the mean of a study's videos

    @classmethod
    def of(cls, videos):
        """videos: list of (V, D), a study each."""
        means = np.stack([v.mean(0) for v in videos])
        mean = means.mean(0)
        each = np.concatenate([(v - mean) / np.sqrt(len(v)) for v in videos])  # a study counts once
        K = min(COMPONENTS, max(1, len(videos) // 4))
        if len(each) < D:
            components = np.linalg.svd(each, full_matrices=False)[2][:K]
        else:
            components = np.linalg.eigh(each.T @ each)[1].T[: -K - 1 : -1]
        scaled = np.concatenate(
            [squares(v - mean, components) / len(v) for v in videos]
        ).sum(0) / len(videos)  # fmt: skip
        of_study = squares(means - mean, components).mean(0)
        floor = 1e-12 + 1e-6 * scaled.sum() / D
        return cls(mean, components, scaled.clip(floor), of_study.clip(floor))

    def distances(self, videos):
        """Mahalanobis distances, squared, of a study's videos (V, D): of their mean, and their
        own mean distance: (2,)."""
        study = squares(videos.mean(0, keepdims=True) - self.mean, self.components)
        each = squares(videos - self.mean, self.components)
        return np.array(
            [weighed(study, self.study_variance)[0], weighed(each, self.video_variance).mean()]
        )


def squares(x, components):
    """x (n, D) -> (n, K + 1): squared lengths along each component, and of the rest a dimension."""
    along = (x @ components.T) ** 2
    rest = ((x**2).sum(1) - along.sum(1)).clip(0) / (D - len(components))
    return np.column_stack([along, rest])


def weighed(parts, variance):
    sizes = np.append(np.ones(len(variance) - 1), D - len(variance) + 1)
    return parts / variance @ sizes


@dataclass
class Novelty:
    """How unlike the studies that a model was trained on a study is. No patient is in it: a
    distribution, and quantiles of the distances of studies from that of other patients."""

    distribution: Distribution
    quantiles: np.ndarray  # (3, 201): of the two distances, then of the larger of their two ranks

    @classmethod
    def of(cls, videos, groups):
        """videos: list of (V, D), a training study each; groups: its patient. None of too few.

        Distances are from the distribution of the other patients (in five folds): a study that
        helped to make it lies too near.
        """
        if len(videos) < FEWEST:
            return None
        fold = np.array([derive_seed("novelty", patient) % FOLDS for patient in groups])
        distances = np.zeros((len(videos), 2))
        for k in np.unique(fold):
            others = [v for v, f in zip(videos, fold, strict=True) if f != k]
            there = Distribution.of(others or videos)
            for i in np.flatnonzero(fold == k):
                distances[i] = there.distances(videos[i])
        quantiles = np.quantile(distances, QUANTILES, axis=0).T
        larger = [ranks(d, quantiles).max() for d in distances]
        quantiles = np.vstack([quantiles, np.quantile(larger, QUANTILES)])
        return cls(Distribution.of(videos), quantiles)

    def __call__(self, study):
        """The share (0 to 1) of training studies that are nearer than this StudyClips."""
        distances = self.distribution.distances(study.embeddings.mean(1, dtype=np.float64))
        larger = ranks(distances, self.quantiles[:2])
        if (distances > self.quantiles[:2, -1]).any():  # farther than any
            return 1.0
        return float(np.interp(larger.max(), self.quantiles[2], QUANTILES))

    def to_save(self):
        """A dict of float32 tensors."""
        parts = vars(self.distribution) | {"quantiles": self.quantiles}
        return {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in parts.items()}

    @classmethod
    def load(cls, saved):
        """Of `to_save`'s dict; ValueError for anything else."""
        names = ("mean", "components", "video_variance", "study_variance", "quantiles")
        if not isinstance(saved, dict) or set(saved) != set(names):
            raise ValueError("it has not the parts that it should")
        if not all(torch.is_tensor(x) and x.isfinite().all() for x in saved.values()):
            raise ValueError("it holds what are no finite numbers")
        mean, components, *variances, quantiles = (
            saved[name].double().numpy() for name in names
        )  # fmt: skip
        K = len(components)
        shapes = [mean.shape, components.shape, *(v.shape for v in variances), quantiles.shape]
        if shapes != [(D,), (K, D), (K + 1,), (K + 1,), (3, len(QUANTILES))] or not 0 < K < D:
            raise ValueError("its shapes are not what they should be")
        if min(v.min() for v in variances) <= 0 or (np.diff(quantiles) < 0).any():
            raise ValueError("its numbers contradict each other")
        return cls(Distribution(mean, components, *variances), quantiles)


def ranks(distances, quantiles):
    """Where distances (n,) lie among quantiles (n, 201): shares (n,)."""
    return np.array([np.interp(d, q, QUANTILES) for d, q in zip(distances, quantiles, strict=True)])


@dataclass
class InputFound:
    """What is found of studies before they are answered, each a dict by study id."""

    warnings: dict[str, str] = field(default_factory=dict)  # unlike the model's input
    notes: dict[str, str] = field(default_factory=dict)  # what else the reader should know
    novelty: dict[str, float] = field(default_factory=dict)
    modulo: dict[str, bool] = field(
        default_factory=dict
    )  # clips of one residue class, `clip_starts`


class InputCheck:
    """Collects in what a study does not look like the input that a model was trained on."""

    def __init__(self, reference, novelty=None):
        """reference: an Input as a dict; novelty: a Novelty or None."""
        self.reference, self.novelty, self.found = reference, novelty, InputFound()

    def __call__(self, eid, study):
        differences, ref, made_with = [], self.reference, study.made_with
        self.found.modulo[eid] = made_with.get("starts") == "modulo"
        untrained = str(made_with.get("weights", "")).startswith("random")
        if untrained and ref.get("weights_sha256") != made_with.get("weights_sha256"):
            differences.append("the encoder was untrained: the answers mean nothing")
        for name in MADE_WITH:
            if name in ref and str(made_with.get(name, ref[name])) != str(ref[name]):
                now, then = (str(x)[:12] for x in (made_with[name], ref[name]))
                differences.append(f"{name} {now}, trained on {then}")
        if "norm_mean" in ref:
            norm, usual = mean_norm(study), ref["norm_mean"]
            if abs(norm - usual) > max(6 * ref["norm_sd"], 0.1 * usual):
                differences.append(f"norm of clip embeddings {norm:.3g}, trained on {usual:.3g}")
        if self.novelty:
            self.found.novelty[eid] = self.novelty(study)
            if self.found.novelty[eid] > UNUSUAL:
                differences.append(f"unlike the training data (novelty above {UNUSUAL})")
        if differences:
            self.found.warnings[eid] = "; ".join(differences)


def report_warnings(warnings, model_name):
    """A few lines on screen; the whole is in the table."""
    for text, n in Counter(warnings.values()).most_common(3):
        print(f"WARNING: {n} studies do not look like what {model_name} was trained on: {text}")


# ------------------------------------------------------------------------------- sampling spread

DRAWS = 16  # resamplings of a study
# Variance between residue classes of starts (`video.clip_starts`), which the clips of one
# extraction cannot show, as a share of that within: measured on phantoms, by extracting anew.
BETWEEN_CLASSES = 0.3


class Resamples:
    """A store of resampled studies: (eid, k) is study eid with its clips drawn anew, with
    replacement, within each video; how 'videos': and its videos too."""

    def __init__(self, store, how):
        self.store, self.how = store, how
        self.bag = lru_cache(maxsize=32)(store.read)

    def read(self, key, rng=None):
        bag = self.bag(key[0])
        V, C, _ = bag.embeddings.shape
        content = zlib.crc32(np.ascontiguousarray(bag.embeddings))  # whatever the study is called
        rng = np.random.default_rng(derive_seed("spread", content, key[1]))
        video = rng.integers(V, size=V) if self.how == "videos" else np.arange(V)
        clip = rng.integers(C, size=(V, C))
        return StudyClips(bag.embeddings[video[:, None], clip], bag.videos)

    def size(self, key):
        return self.store.size(key[0])


def reach_of(draws, videos, clips, modulo=False, whole=False):
    """How far from an answer another extraction's lies nine times of ten, at most: (S, T).

    draws: (S, DRAWS, T) outputs of resampled studies; videos: of each study, (S,); clips: of each
    video, (S,); modulo: whether these are of one residue class, (S,); whole: whether videos were
    resampled too. A resample of C clips (or V videos) varies (C - 1) / C as much as C drawn anew;
    of one nothing can be said (NaN). The difference between two extractions varies twice as much
    as one. Student's t allows for the few draws, and the few clips that they are drawn from, whose
    relative errors add (Satterthwaite, Biometrics Bulletin 1946).
    """
    from scipy.stats import t

    V, C = (np.asarray(x, float)[:, None] for x in (videos, clips))
    parts = [(C, V * (C - 1))] + [(V, V - 1)] * whole
    factor, freedom = np.ones_like(C), np.full_like(C, np.inf)
    for n, known in parts:
        with np.errstate(divide="ignore"):
            factor = np.maximum(factor, np.where(n > 1, n / (n - 1), np.nan))
        freedom = np.minimum(freedom, known)
    factor = factor * (1 + BETWEEN_CLASSES * C * np.asarray(modulo).reshape(-1, 1))
    with np.errstate(divide="ignore"):
        freedom = 1 / (1 / (DRAWS - 1) + 1 / freedom)
    return t.ppf(0.95, freedom) * np.sqrt(2 * factor) * draws.std(axis=1, ddof=1)
