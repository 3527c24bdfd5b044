"""Compare a study with the training data, and estimate how much its answer changes with other
clips."""

import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from echofocus_core import EMBED_DIM
from echofocus_core.base.console import RUN, count_of, some
from echofocus_core.base.files import derive_seed
from echofocus_core.base.options import validate_as
from echofocus_core.study.config import Input
from echofocus_core.video.store import (
    MADE_WITH,
    StudyClips,
    UnreadableStudy,
    almost_the_same,
    is_untrained,
)
from echofocus_core.video.studies import may_name_patient, path_may_name_patient

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
        mean = np.mean([v.mean(0) for v in videos], axis=0) if videos else np.zeros(EMBED_DIM)
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

FEWEST = 20  # patients, and studies with a number of videos, that novelty is calibrated on
FOLDS = 5
MAX_DIRECTIONS = 32  # that have their own variances
NUMBERS_OF_VIDEOS = (1, 2, 4, 8, 16, 32, 64)  # that novelty is calibrated for
TAIL = 7  # degrees of freedom of scores beyond all others: heavier tails than normal ones
QUANTILES = np.linspace(0, 1, 201)
UNUSUAL = 0.99  # share of training studies that are nearer; above it a study gets a warning


@dataclass
class Directions:
    """The mean of studies, and their principal directions."""

    mean: np.ndarray  # (D,)
    directions: np.ndarray  # (K, D) orthonormal

    @classmethod
    def of(cls, studies, K):
        """studies: list of (V, D), embeddings of videos; each study has the same weight."""
        mean = np.mean([v.mean(0) for v in studies], axis=0)
        each = np.concatenate([(v - mean) / np.sqrt(len(v)) for v in studies])
        if len(each) < len(mean):
            return cls(mean, np.linalg.svd(each, full_matrices=False)[2][:K])
        return cls(mean, np.linalg.eigh(each.T @ each)[1].T[: -K - 1 : -1])

    @property
    def sizes(self):
        """(K + 1,): 1 for each direction, then the number of all others."""
        K, width = self.directions.shape
        return np.append(np.ones(K), width - K)

    def squares(self, x):
        """x (n, D) -> (n, K + 1): squared length along each direction, and the mean of the rest."""
        along = (x @ self.directions.T) ** 2
        rest = ((x**2).sum(1) - along.sum(1)).clip(0) / self.sizes[-1]
        return np.column_stack([along, rest])

    def distances(self, videos, between, within):
        """Log squared Mahalanobis distances of a study's videos (V, D): (2,), that of their mean,
        and the mean of theirs. between, within: variances (K + 1,) of studies, and in a study."""
        of_mean = self.squares(videos.mean(0, keepdims=True) - self.mean)[0]
        of_video = self.squares(videos - self.mean).mean(0)
        of_mean /= between + within / len(videos)
        of_video /= between + within
        return np.log(np.maximum([of_mean @ self.sizes, of_video @ self.sizes], 1e-300))


@dataclass
class Calibration:
    """Distances (n, 2) of training studies with one number of videos. A study's score is the larger
    of its two distances, each standardised."""

    n: float  # studies
    mean: np.ndarray  # (2,)
    sd: np.ndarray  # (2,)
    scores: np.ndarray  # (201,) quantiles

    @classmethod
    def of(cls, distances):
        mean, sd = distances.mean(0), distances.std(0, ddof=1).clip(1e-6)
        scores = ((distances - mean) / sd).max(1)
        return cls(len(distances), mean, sd, np.quantile(scores, QUANTILES))

    def __call__(self, distances):
        """The share of studies with a lower score: i / (n + 1) above i of n scores. Above all of
        them: the share expected by Student's t for each of the two distances."""
        from scipy.special import stdtr

        n, score = self.n, ((distances - self.mean) / self.sd).max()
        share = (1 + (n - 1) * np.interp(score, self.scores, QUANTILES)) / (n + 1)
        if score <= self.scores[-1]:
            return share
        return max(share, 1 - 2 * stdtr(TAIL, -score / np.sqrt(1 + 1 / n)))


@dataclass
class Novelty:
    """How much a study differs from a model's training studies with as many videos.

    Embeddings of videos are normal: a study has a mean, with variances `between` studies, and its
    videos have variances `within` the study, along each principal direction, and along any other
    (probabilistic principal components: Tipping and Bishop, J R Stat Soc B 1999). It holds no data
    of a patient: only this distribution, and quantiles of the scores of studies.
    """

    space: Directions
    between: np.ndarray  # (K + 1,)
    within: np.ndarray  # (K + 1,)
    calibrations: dict  # number of videos -> Calibration

    @classmethod
    def of(cls, studies, patients):
        """studies: list of (V, D), embeddings of videos; patients: of each. None for fewer than
        FEWEST patients.

        Variances and distances are of held-out patients, in five folds: directions that were fitted
        to a study have too little variance in others.
        """
        names = sorted(set(patients), key=lambda x: derive_seed("novelty", x))
        if len(names) < FEWEST:
            return None
        number, width = {x: i for i, x in enumerate(names)}, studies[0].shape[1]
        K = min(MAX_DIRECTIONS, len(names) // 5, width - 1)
        fold = np.array([number[x] % FOLDS for x in patients])
        spaces = [
            Directions.of([v for v, f in zip(studies, fold, strict=True) if f != k], K)
            for k in range(FOLDS)
        ]
        pairs = [(v, spaces[f]) for v, f in zip(studies, fold, strict=True)]
        means = np.concatenate([x.squares(v.mean(0, keepdims=True) - x.mean) for v, x in pairs])
        within = [x.squares(v - v.mean(0)).sum(0) / (len(v) - 1) for v, x in pairs if len(v) > 1]
        within = np.mean(within or [np.zeros(K + 1)], axis=0)
        least = 1e-12 + 1e-6 * (means.mean(0) + within) @ spaces[0].sizes / width
        between = means.mean(0) - within * np.mean([1 / len(v) for v in studies])
        between = between.clip(0.01 * means.mean(0) + least)
        within, calibrations = within.clip(least), {}
        rng = np.random.default_rng(derive_seed("novelty"))
        for V in NUMBERS_OF_VIDEOS:
            drawn = [(rng.permutation(v)[:V], x) for v, x in pairs if len(v) >= V]
            if len(drawn) >= FEWEST:
                distances = np.stack([x.distances(v, between, within) for v, x in drawn])
                calibrations[V] = Calibration.of(distances)
        return cls(Directions.of(studies, K), between, within, calibrations)

    def __call__(self, study):
        """The share (0 to 1) of training studies that are less unusual than this StudyClips."""
        videos = study.embeddings.mean(1, dtype=np.float64)
        distances = self.space.distances(videos, self.between, self.within)
        nearer = [-np.log1p(-min(x(distances), 1 - 1e-15)) for x in self.calibrations.values()]
        return float(
            -np.expm1(-np.interp(np.log(len(videos)), np.log([*self.calibrations]), nearer))
        )

    def to_save(self):
        """A dict of float32 tensors."""
        parts = vars(self.space) | {"between": self.between, "within": self.within}
        parts["videos"] = [*self.calibrations]
        for name in ("n", "mean", "sd", "scores"):
            parts[f"at_{name}"] = [getattr(x, name) for x in self.calibrations.values()]
        return {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in parts.items()}

    @classmethod
    def load(cls, saved):
        """From the dict of `to_save`; None for a record of an earlier version."""
        if "between" not in saved:
            RUN.note("the model's record of its training data is of an earlier version: no novelty")
            return None
        parts = {name: x.double().numpy() for name, x in saved.items()}
        columns = (parts[f"at_{name}"] for name in ("n", "mean", "sd", "scores"))
        calibrations = [Calibration(*row) for row in zip(*columns, strict=True)]
        return cls(
            Directions(parts["mean"], parts["directions"]), parts["between"], parts["within"],
            dict(zip(parts["videos"], calibrations, strict=True)),
        )  # fmt: skip


@dataclass
class InputReport:
    """Records about studies before prediction, each a dict by study id."""

    warnings: dict[str, str] = field(default_factory=dict)  # unlike the model's training data
    notes: dict[str, str] = field(default_factory=dict)  # what else the reader should know
    novelty: dict[str, float] = field(default_factory=dict)
    modulo: dict[str, bool] = field(default_factory=dict)  # starts of one class, `clip_starts`


NAMES_PATIENT = "the study id may name the patient: extract with --study_id digest"
VIDEOS_NAME_PATIENT = "names of videos may name the patient: rename them and extract again"


class InputCheck:
    """Compares each study with the input that a model was trained on."""

    def __init__(self, references, novelty=None):
        """references: `Record.inputs`; novelty: a Novelty or None."""
        self.references = {k: x.model_dump(exclude_none=True) for k, x in references.items()}
        self.novelty, self.report = novelty, InputReport()

    def __call__(self, eid, study):
        differences, notes, pairs, parts = [], [], [], study.by_encoder()
        starts = [part.made_with.get("starts") for part in parts]
        self.report.modulo[eid] = "modulo" in starts
        for (encoder, reference), part in zip(self.references.items(), parts, strict=True):
            if not part.videos:
                notes.append(f"no clip embeddings of {encoder}")
                continue
            texts = differences_of(reference, part)
            differences += [f"{encoder}: {text}" for text in texts] if encoder else texts
            same = almost_the_same(part.embeddings)
            pairs += [f"{part.videos[j]} and {part.videos[i]}" for i, j in same]
        if self.novelty:
            self.report.novelty[eid] = self.novelty(study)
            if self.report.novelty[eid] > UNUSUAL:
                differences.append(f"unlike the training data (novelty above {UNUSUAL})")
        if pairs:
            n = count_of(len(pairs), "videos")
            notes.append(f"{n} almost the same as others: {some(pairs)}")
        named = " ".join(str(part.made_with.get("names_patient", "")) for part in parts)
        if may_name_patient(eid) or "study" in named or "yes" in named:
            notes.append(NAMES_PATIENT)
        files = [
            video.removeprefix(f"{encoder}/")
            for encoder, part in zip(self.references, parts, strict=True)
            for video in part.videos
        ]
        if "videos" in named or any(map(path_may_name_patient, files)):
            notes.append(VIDEOS_NAME_PATIENT)
        if notes:
            self.report.notes[eid] = "; ".join(notes)
        if differences:
            self.report.warnings[eid] = "; ".join(differences)


def differences_of(reference, study):
    """How the StudyClips of one encoder differ from an Input (a dict), in words."""
    differences, made_with = [], study.made_with
    if is_untrained(made_with) and reference.get("weights_sha256") != made_with.get(
        "weights_sha256"
    ):
        differences.append("the encoder was untrained: the answers mean nothing")
    for name in MADE_WITH:
        then = str(reference.get(name))
        now = str(made_with.get(name, then))
        if name in reference and now != then:
            differences.append(f"{name} is {now[:12]}, but {then[:12]} in training")
    if "norm_mean" in reference:
        norm, usual = mean_norm(study), reference["norm_mean"]
        if abs(norm - usual) > max(6 * reference["norm_sd"], 0.1 * usual):
            differences.append(
                f"norm of clip embeddings is {norm:.3g}, but {usual:.3g} in training"
            )
    return differences


def report_warnings(warnings, model_name):
    """Print a summary; all warnings are in the table."""
    for text, n in Counter(warnings.values()).most_common(3):
        RUN.warning(
            f"{count_of(n, 'studies are')} unlike the training data of {model_name}: {text}",
            "see the column warning",
        )


# ---------------------------------------------------------------------------- range of an answer

GROUPS = 16  # at most; each is left out once
# Variance between classes of starts modulo 3 (`video.clip_starts`), which the clips of one
# extraction cannot show, as a share of the variance of clips within a class: measured on phantoms.
# The mean of C clips has a C-th of the latter, so the variance of an answer is 1 + 0.3 C times
# that of its clips. Other videos have other classes: their variance includes it.
BETWEEN_CLASSES = 0.3


class Jackknife:
    """A store of studies without one group of their clips, as many of each video; unit 'videos':
    without one group of their videos.

    The study (eid, k) is without group k % G, in the assignment k // G of clips to groups. An
    assignment is random, independent in each video, and depends only on the study's embeddings.
    """

    def __init__(self, store, unit):
        self.store, self.unit = store, unit
        self.bag = lru_cache(maxsize=32)(self.read_whole)

    def read_whole(self, eid):
        """(StudyClips, checksums of its clips (V, C); unit 'videos': of its videos (1, V))."""
        bag = self.store.read(eid)
        sums = [[zlib.crc32(np.ascontiguousarray(x)) for x in video] for video in bag.embeddings]
        sums = np.array(sums)
        return bag, sums.sum(1)[None] if self.unit == "videos" else sums

    def assignments(self, videos, clips):
        """(M, G): the numbers of assignments and of groups of a study of so many videos, each of so
        many clips. One video's clips, or videos, need one assignment: others would be the same, or
        hardly differ. G is 1 where nothing can be left out."""
        alone = self.unit == "videos" or videos == 1
        G = min(videos if self.unit == "videos" else clips, GROUPS)
        return 1 if alone else -(-GROUPS // G), G

    def keys(self, eid, videos, clips):
        M, G = self.assignments(videos, clips)
        return [(eid, k) for k in range(M * G if G > 1 else 0)]

    def read(self, key, rng=None):
        bag, sums = self.bag(key[0])
        m, left_out = divmod(key[1], self.assignments(*bag.embeddings.shape[:2])[1])
        order = sums.argsort(1, kind="stable")  # independent of the order in the file
        for i, of_video in enumerate(sums):
            rng = np.random.default_rng(derive_seed("spread", of_video.sum(), m))
            order[i] = order[i][rng.permutation(len(of_video))]
        kept = order[:, np.arange(order.shape[1]) % GROUPS != left_out]
        if self.unit == "videos":
            return StudyClips(bag.embeddings[kept[0]], [bag.videos[i] for i in kept[0]])
        return StudyClips(bag.embeddings[np.arange(len(sums))[:, None], kept], bag.videos)

    def size(self, key):
        return self.store.size(key[0])


def interval_half_width(answers, videos, between=0.0):
    """(T,): the half-width of the 90 % range of each answer. The answer from another extraction of
    the same study is in this range nine times of ten.

    answers: (M, G, T) of a Jackknife's studies; videos: the number whose clips are left out
    independently; between: variance of what all clips of a video share, as a multiple of that of
    the mean of its clips.

    - The variance of the answer is estimated by the jackknife of G groups (Shao and Wu, Ann Stat
      1989), averaged over the assignments.
    - Student's t has G - 1 degrees of freedom if one video determines the answer: then all
      assignments agree. If V do, it has up to V (G - 1), since averages over assignments vary less:
      from the relative variance, 2 / freedom (Satterthwaite, Biometrics Bulletin 1946).
    - The difference between two extractions has twice the variance of one.
    """
    from scipy.stats import t

    M, G, _ = answers.shape
    each = (G - 1) * answers.var(axis=1, dtype=np.float64)  # (M, T)
    variance, relative = each.mean(0), 2 / (G - 1)
    if M > 1:
        reduction = each.var(0, ddof=1) / np.maximum(variance, 1e-100) ** 2 * (1 - 1 / M)
        relative = np.maximum(relative - reduction, relative / videos)
    return t.ppf(0.95, 2 / relative) * np.sqrt(2 * variance * (1 + between))
