"""Compare a study with the training data, and estimate how much its answer changes with other
clips."""

import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from echofocus_core import EMBED_DIM as D
from echofocus_core.base.console import RUN, some
from echofocus_core.base.files import derive_seed
from echofocus_core.base.options import validate_as
from echofocus_core.study.config import Input
from echofocus_core.video.store import MADE_WITH, StudyClips, UnreadableStudy, almost_the_same

# ----------------------------------------------------------------------------- training data

MAX_DESCRIBED = 512  # training studies that are read


@dataclass
class TrainingInput:
    """A description of a model's training fold, for `InputCheck` and as a baseline."""

    input: Input
    clip_mean: torch.Tensor  # (D,) float32, mean clip embedding; each study has the same weight
    novelty: "Novelty | None"

    @classmethod
    def of(cls, store, patients):
        """patients: of the studies of the training fold, dict of study id to patient."""
        eids = sorted(patients, key=lambda eid: derive_seed("input", eid))[:MAX_DESCRIBED]
        facts = {name: set(values) for name, values in store.made_with(patients).items()}
        facts |= {"weights": set(), "n_clips": set()}
        norms, videos, groups = [], [], []
        for eid in eids:
            with suppress(UnreadableStudy):
                study = store.read(eid)
                norms.append(mean_norm(study))
                videos.append(study.embeddings.mean(1, dtype=np.float64))
                groups.append(patients[eid])
                facts["weights"].add(study.made_with.get("weights", ""))
                facts["n_clips"].add(study.embeddings.shape[1])
        mean = np.mean([v.mean(0) for v in videos], axis=0) if videos else np.zeros(D)
        shared = {name: values.pop() for name, values in facts.items() if len(values) == 1}
        shared = {k: v for k, v in shared.items() if v != "" and str(v).isprintable()}
        if norms:
            shared |= {"norm_mean": float(np.mean(norms)), "norm_sd": float(np.std(norms))}
        description = validate_as(Input, shared, "the attributes of the embedding files")
        novelty = Novelty.of(videos, groups)
        return cls(description, torch.from_numpy(mean).float(), novelty)


def mean_norm(study):
    return float(np.linalg.norm(study.embeddings.astype(np.float64), axis=2).mean())


# ----------------------------------------------------------------------------------- novelty

MAX_COMPONENTS = 32  # directions that have their own variance
FEWEST = 20  # training studies that a distribution is fitted to
FOLDS = 5
QUANTILES = np.linspace(0, 1, 201)
UNUSUAL = 0.99  # share of training studies that are nearer; above it a study gets a warning


@dataclass
class Distribution:
    """A normal distribution of embeddings: a variance for each of some directions, and one for all
    others (probabilistic principal components: Tipping and Bishop, J R Stat Soc B 1999)."""

    mean: np.ndarray  # (D,)
    components: np.ndarray  # (K, D) orthonormal
    video_variance: np.ndarray  # (K + 1,) of a video along each, and along any other direction
    study_variance: np.ndarray  # (K + 1,) of the mean of a study's videos

    @classmethod
    def of(cls, videos):
        """videos: list of (V, D), one for each study."""
        means = np.stack([v.mean(0) for v in videos])
        mean = means.mean(0)
        each = np.concatenate([(v - mean) / np.sqrt(len(v)) for v in videos])  # a study counts once
        K = min(MAX_COMPONENTS, max(1, len(videos) // 4))
        if len(each) < D:
            components = np.linalg.svd(each, full_matrices=False)[2][:K]
        else:
            components = np.linalg.eigh(each.T @ each)[1].T[: -K - 1 : -1]
        scaled = [squares(v - mean, components) / len(v) for v in videos]
        scaled = np.concatenate(scaled).sum(0) / len(videos)
        of_study = squares(means - mean, components).mean(0)
        least = 1e-12 + 1e-6 * scaled.sum() / D
        return cls(mean, components, scaled.clip(least), of_study.clip(least))

    def distances(self, videos):
        """Squared Mahalanobis distances of a study's videos (V, D): (2,), that of their mean, and
        the mean of their distances."""
        K = len(self.components)
        sizes = np.append(np.ones(K), D - K)  # number of directions in each part
        study = squares(videos.mean(0, keepdims=True) - self.mean, self.components)
        each = squares(videos - self.mean, self.components).mean(0)
        return np.array(
            [study[0] / self.study_variance @ sizes, each / self.video_variance @ sizes]
        )


def squares(x, components):
    """x (n, D) -> (n, K + 1): squared lengths along each component, and the mean of the rest."""
    along = (x @ components.T) ** 2
    rest = ((x**2).sum(1) - along.sum(1)).clip(0) / (D - len(components))
    return np.column_stack([along, rest])


@dataclass
class Novelty:
    """How much a study differs from a model's training studies.

    It holds no data of a patient: only a distribution, and quantiles of the distances of studies
    from the distribution of other patients.
    """

    distribution: Distribution
    quantiles: np.ndarray  # (3, 201): of the two distances, then of the larger of their two ranks

    @classmethod
    def of(cls, videos, groups):
        """videos: list of (V, D), one for each training study; groups: its patient. None for fewer
        than FEWEST studies.

        Distances are from the distribution of other patients (in five folds): a study is too near
        to a distribution that was fitted to it.
        """
        if len(videos) < FEWEST:
            return None
        fold = np.array([derive_seed("novelty", patient) % FOLDS for patient in groups])
        distances = np.zeros((len(videos), 2))
        for k in np.unique(fold):
            others = [v for v, f in zip(videos, fold, strict=True) if f != k]
            distribution = Distribution.of(others or videos)
            for i in np.flatnonzero(fold == k):
                distances[i] = distribution.distances(videos[i])
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
        """From the dict of `to_save`."""
        names = ("mean", "components", "video_variance", "study_variance", "quantiles")
        *distribution, quantiles = (saved[name].double().numpy() for name in names)
        return cls(Distribution(*distribution), quantiles)


def ranks(distances, quantiles):
    """Ranks of distances (n,) among quantiles (n, 201): shares (n,)."""
    return np.array([np.interp(d, q, QUANTILES) for d, q in zip(distances, quantiles, strict=True)])


@dataclass
class InputReport:
    """Records about studies before prediction, each a dict by study id."""

    warnings: dict[str, str] = field(default_factory=dict)  # unlike the model's training data
    notes: dict[str, str] = field(default_factory=dict)  # what else the reader should know
    novelty: dict[str, float] = field(default_factory=dict)
    modulo: dict[str, bool] = field(default_factory=dict)  # starts of one class, `clip_starts`


class InputCheck:
    """Compares each study with the input that a model was trained on."""

    def __init__(self, reference, novelty=None):
        """reference: an Input as a dict; novelty: a Novelty or None."""
        self.reference, self.novelty, self.report = reference, novelty, InputReport()

    def __call__(self, eid, study):
        differences, reference, made_with = [], self.reference, study.made_with
        self.report.modulo[eid] = made_with.get("starts") == "modulo"
        untrained = str(made_with.get("weights", "")).startswith("random")
        if untrained and reference.get("weights_sha256") != made_with.get("weights_sha256"):
            differences.append("the encoder was untrained: the answers mean nothing")
        for name in MADE_WITH:
            then = str(reference.get(name))
            now = str(made_with.get(name, then))
            if name in reference and now != then:
                differences.append(f"{name} {now[:12]}, trained on {then[:12]}")
        if "norm_mean" in reference:
            norm, usual = mean_norm(study), reference["norm_mean"]
            if abs(norm - usual) > max(6 * reference["norm_sd"], 0.1 * usual):
                differences.append(f"norm of clip embeddings {norm:.3g}, trained on {usual:.3g}")
        if self.novelty:
            self.report.novelty[eid] = self.novelty(study)
            if self.report.novelty[eid] > UNUSUAL:
                differences.append(f"unlike the training data (novelty above {UNUSUAL})")
        if pairs := almost_the_same(study.embeddings):
            names = some([f"{study.videos[j]} and {study.videos[i]}" for i, j in pairs])
            self.report.notes[eid] = f"{len(pairs)} videos almost the same as others: {names}"
        if differences:
            self.report.warnings[eid] = "; ".join(differences)


def report_warnings(warnings, model_name):
    """Print a summary; all warnings are in the table."""
    for text, n in Counter(warnings.values()).most_common(3):
        RUN.warning(
            f"{n} studies are unlike the training data of {model_name}: {text}",
            "see the column warning",
        )


# ---------------------------------------------------------------------------- range of an answer

DRAWS = 16  # resamples of a study
# Variance between classes of starts modulo the clip length (`video.clip_starts`), which the clips
# of one extraction cannot show, as a share of that within: measured on phantoms.
BETWEEN_CLASSES = 0.3


class Resamples:
    """A store of resampled studies: (eid, k) is study eid with its clips drawn with replacement
    within each video; unit 'videos': and its videos too."""

    def __init__(self, store, unit):
        self.store, self.unit = store, unit
        self.bag = lru_cache(maxsize=32)(store.read)

    def read(self, key, rng=None):
        bag = self.bag(key[0])
        V, C, _ = bag.embeddings.shape
        content = zlib.crc32(np.ascontiguousarray(bag.embeddings))  # independent of the study's id
        rng = np.random.default_rng(derive_seed("spread", content, key[1]))
        video = rng.integers(V, size=V) if self.unit == "videos" else np.arange(V)
        clip = rng.integers(C, size=(V, C))
        return StudyClips(bag.embeddings[video[:, None], clip], bag.videos)

    def size(self, key):
        return self.store.size(key[0])


def interval_half_width(draws, videos, clips, modulo=False, whole=False):
    """(S, T): the half-width of the 90 % range of each answer. The answer from another extraction
    of the same study is in this range nine times of ten.

    draws: (S, DRAWS, T) outputs of resampled studies; videos: (S,) number in each study; clips:
    (S,) number in each video; modulo: (S,) whether a study's clips are of one class of starts;
    whole: whether videos were resampled too. NaN where there is only one clip, or one video.

    - The variance between resamples of n clips is (n - 1) / n of that between extractions.
    - The difference between two extractions has twice the variance of one.
    - Student's t allows for the few draws and the few clips. Their relative errors add
      (Satterthwaite, Biometrics Bulletin 1946).
    """
    from scipy.stats import t

    V, C = (np.asarray(x, float)[:, None] for x in (videos, clips))
    with np.errstate(divide="ignore"):
        factor, freedom = C / (C - 1), V * (C - 1)
        if whole:
            factor, freedom = np.maximum(factor, V / (V - 1)), np.minimum(freedom, V - 1)
        freedom = 1 / (1 / (DRAWS - 1) + 1 / freedom)
    factor = np.where(np.isfinite(factor), factor, np.nan)
    factor = factor * (1 + BETWEEN_CLASSES * C * np.asarray(modulo).reshape(-1, 1))
    return t.ppf(0.95, freedom) * np.sqrt(2 * factor) * draws.std(axis=1, ddof=1)
