"""The encoder and the study-level model as one network, trained on the clips of a study's videos.

    videos of a study -> VideoStore.read: images (V, C, L, S, S, 3) -> EndToEnd: groups of clips
    through the encoder -> clip embeddings (N, 768) -> the study-level model -> logits

Memory depends on the clips of a group, not on the study: a group's activations are discarded and
computed again for its gradient (Chen et al., "Training Deep Nets with Sublinear Memory Cost",
2016), with the same random draws, so that gradients are exact. Only the uint8 images of a study, on
the host, and its embeddings stay in memory.

    python embed/end_to_end.py export MODEL_FOLDER FILE.pt    # writes the published format
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from echofocus_core import __version__
from echofocus_core.base.checkpoints import load_safely, save
from echofocus_core.base.console import (
    EXPORT,
    RUN,
    Parser,
    UserError,
    count_of,
    reason_lines,
    run_main,
    some,
)
from echofocus_core.base.files import output_path, sha256_file, sha256_of
from echofocus_core.base.options import Settings
from echofocus_core.study.config import Input
from echofocus_core.study.folds import sample_ids
from echofocus_core.video.cache import ClipSampling, FrameCache
from echofocus_core.video.clip_tensors import as_input, draw_factors
from echofocus_core.video.decode import SAMPLINGS
from echofocus_core.video.panecho import (
    CONVNEXT_TINY,
    PUBLISHED,
    LoadedEncoder,
    find_weights,
    licence_of,
    load_panecho,
    published_parts,
    read_encoder,
    warn_of_other_clips,
)
from echofocus_core.video.record import EncoderRecord, EncoderTask
from echofocus_core.video.store import MADE_WITH, StudyClips, UnreadableStudy, draw_videos
from echofocus_core.video.studies import find_studies, studies_of_dataset

ENCODER_FILE = "encoder.pt"  # in the model's folder


# ------------------------------------------------------------------------------------ the network


HEAD_RATE = 1e-4  # of the study-level model, unless --head_learning_rate


class EndToEnd(nn.Module):
    """A PanEcho backbone and a study-level model, called like a StudyModel but with images.

    images: uint8 (N, L, S, S, 3) BGR on any device, the clips of studies of `lengths`.
    """

    def __init__(self, encoder, study, clips_at_once=8, freeze="", ping_pong=False):
        """encoder: a PanEcho's FrameTransformer; study: a StudyModel; freeze: as `--freeze`."""
        super().__init__()
        self.encoder, self.study, self.n_outputs = encoder, study, study.n_outputs
        self.width = study.width
        self.clips_at_once, self.freeze, self.ping_pong = clips_at_once, freeze, ping_pong
        self.stages = int(freeze.removeprefix("stages:")) if freeze.startswith("stages:") else 0
        self.begin_epoch(1)

    def begin_epoch(self, number):
        """Freeze the parts that epoch `number` (from 1) does not train.

        ping_pong: odd epochs train the aggregator, even epochs the encoder.
        """
        frozen = {self.freeze}
        if self.ping_pong:
            frozen.add("encoder" if number % 2 else "aggregator")
        self.encoder.requires_grad_("encoder" not in frozen)
        self.study.requires_grad_("aggregator" not in frozen)
        self.encoder.encoder.model.features[: 2 * self.stages].requires_grad_(False)

    def train(self, mode=True):
        """Like nn.Module.train, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in (self.encoder, self.study):
            if is_frozen(part):
                part.eval()
        return self

    def rate_groups(self, settings):
        """Parameter groups of the optimiser: the study-level model and the encoder."""
        rates = settings.head_learning_rate or HEAD_RATE, settings.encoder_learning_rate
        parts = zip((self.study, self.encoder), rates, strict=True)
        return [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]

    def forward(self, images, lengths, rng=None):
        """Logits (S, T) and study embeddings (S, D). rng: see StudyModel; also for the encoder."""
        return self.study(self.encode(images, rng), lengths, rng)

    def encode(self, images, rng=None):
        """Clip embeddings (N, 768) of images (N, L, S, S, 3), group by group."""
        seed = None
        if self.encoder.training and self.training:
            seed = int(torch.randint(2**62, ()) if rng is None else rng.integers(2**62))
        encode = self.encode_group
        with_graph = torch.is_grad_enabled() and not is_frozen(self.encoder)
        if with_graph:
            encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
        first, embeddings = 0, []
        with torch.set_grad_enabled(with_graph):
            for group in images.split(self.clips_at_once):
                embeddings.append(encode(group, first, seed))
                first += len(group)
        return torch.cat(embeddings)

    def encode_group(self, images, first, seed):
        """Embeddings of a group, float32. Draws depend on `seed` and the number of each clip."""
        device, dtype = next(self.encoder.parameters()).device, torch.float32
        x = as_input(images.to(device, non_blocking=True), "imagenet")
        if seed is None:
            return self.encoder(x).to(dtype)
        keys = range(first, first + len(images))
        depth, _ = draw_factors(self.encoder, keys, seed, images.shape[1])
        frozen = sum(n for _, n in CONVNEXT_TINY[: self.stages])
        depth[:frozen] = 1  # no stochastic depth in frozen stages
        return self.encoder(x, depth).to(dtype)


def is_frozen(net):
    return not any(p.requires_grad for p in net.parameters())


@dataclass(frozen=True)
class EncoderStart:
    """The initial encoder of an end-to-end training, and the record for its file."""

    loaded: LoadedEncoder  # its encoder is trained; its heads are kept only if that is frozen
    settings: Settings
    licence: str

    @classmethod
    def of(cls, settings):
        """The encoder of --weights. Raises WeightsError."""
        start, licence = load_panecho(settings.weights, settings.clip_len), ""
        if settings.weights != "random":
            licence = licence_of(find_weights(settings.weights), start.record)
        warn_of_other_clips(start.record, settings.weights, settings.size, settings.clip_len)
        return cls(start, settings, licence)

    def input(self, sha256=""):
        """The Input of a model on embeddings of the encoder with this digest."""
        s = self.settings
        return Input(
            encoder="PanEcho", weights_sha256=sha256 or self.loaded.sha256, weights=ENCODER_FILE,
            size=s.size, clip_len=s.clip_len, sampling=SAMPLINGS["independent"], mask="none",
        )  # fmt: skip

    def write(self, folder, seen):
        """Write encoder.pt; with heads only if it was frozen, since other heads would be wrong.

        seen: list of Seen, of the training and of the models it started from. Returns its Input.
        """
        s, path = self.settings, Path(folder, ENCODER_FILE)
        state, tasks = self.loaded.model.state_dict(), self.loaded.model.tasks
        if s.freeze != "encoder":
            state, tasks = {k: v for k, v in state.items() if k.startswith("encoder.")}, []
        record = EncoderRecord(
            tasks=[EncoderTask(**task) for task in tasks], version=__version__,
            cohort=s.dataset, size=s.size, clip_len=s.clip_len, licence=self.licence,
            started_from=Path(s.weights).name, started_sha256=self.loaded.sha256,
        )  # fmt: skip
        saved = {"weights": state, "encoder": record.to_save()}
        save(saved | {"seen": [part.saved() for part in seen]}, path)
        return self.input(sha256_file(path))


# ------------------------------------------------------------------------------------------- images


class VideoStore:
    """A store (see store.Store) that reads studies as images, from a cache of decoded videos.

    A study has num_clips random clips of each of up to most_videos videos, drawn by the `rng` of
    `read`; without one they are always the same.
    """

    def __init__(self, studies, cache, num_clips, clip_len, seed=0, most_videos=0):
        self.files = {study.name: study for study in studies}
        self.cache, self.num_clips, self.seed = cache, num_clips, seed
        self.sampling = ClipSampling(clip_len, cache.size)
        self.augmented = ClipSampling(clip_len, cache.size, augment=True)
        self.most_videos, self.reasons = most_videos, {}

    def source(self, eid, video):
        """The path of a video, or a tuple of the paths of its frames."""
        source = self.files[eid].source(video)
        return tuple(source) if isinstance(source, list) else source

    def fill(self, workers, world):
        """Decode every video that is not in the cache; the processes share the work."""
        every = {
            f"{e}/{v}": self.source(e, v) for e, study in self.files.items() for v in study.videos
        }
        part = list(every.values())[world.rank :: world.size]
        for reasons in world.gather(self.cache.fill(part, workers, quiet=world.rank > 0)):
            self.reasons |= reasons
        unused = {name: self.reasons[s] for name, s in every.items() if s in self.reasons}
        if unused:
            n, reasons = len(unused), reason_lines(unused)
            RUN.warning(f"{count_of(n, 'videos')} cannot be used:{reasons}")

    def videos(self, eid):
        """The names of a study's videos that can be decoded."""
        study = self.files[eid]
        return [v for v in study.videos if self.source(eid, v) not in self.reasons]

    def size(self, eid):
        n = len(self.videos(eid))
        return self.num_clips * min(n, self.most_videos or n)

    def read(self, eid, rng=None):
        """StudyClips whose embeddings are images (V, C, L, S, S, 3). Raises UnreadableStudy.

        rng: draws the videos, clips and transforms of a training; a numpy Generator.
        """
        names = self.videos(eid)
        if not names:
            why = {self.reasons[self.source(eid, v)] for v in self.files[eid].videos}
            raise UnreadableStudy(f"no usable video: {some(sorted(why))}")
        names = [names[i] for i in draw_videos(eid, len(names), self.most_videos, rng)]
        seed = self.seed if rng is None else int(rng.integers(2**62))
        sampling = self.sampling if rng is None else self.augmented
        images = []
        for name in names:
            try:
                call = (self.source(eid, name), self.num_clips, sampling, seed, f"{eid}/{name}")
                images.append(self.cache.clips(*call))
            except UserError as error:
                raise UnreadableStudy(str(error)) from error
        return StudyClips(np.stack(images), names)

    def copies(self, eids):
        """Empty, since the files are not compared."""
        return []

    def made_with(self, eids):
        """The same for all studies, since all are read in the same way."""
        return {name: {"": list(eids)} for name in MADE_WITH}

    def digest(self, eids):
        """SHA-256 of the studies' names, videos, sizes and times."""
        videos = ((e, self.source(e, v)) for e in eids for v in self.videos(e))
        return sha256_of([[e, self.cache.key(source)] for e, source in videos])


def open_videos(settings, dataset, ids, world):
    """The VideoStore of --videos, or else of a dataset's video_base_path.

    It has the studies `ids`, or --sample_limit of them, and decodes every video of these. Raises
    UserError.
    """
    if settings.videos:
        studies = find_studies(
            settings.videos, settings.group, settings.manifest, settings.study_id
        )
    elif dataset.video_base_path:
        studies = studies_of_dataset(dataset.video_base_path, dataset.video_subdir_format, ids)
    else:
        raise UserError(
            "--end_to_end needs videos: give --videos FOLDER, or set video_base_path of the "
            "dataset in the config"
        )
    names = {study.name for study in studies} & set(ids)
    if not settings.first_study_only:  # which is applied before the limit
        names = set(sample_ids(sorted(names), settings.sample_limit))
    store = VideoStore(
        [study for study in studies if study.name in names],
        FrameCache(settings.cache_dir, settings.size), settings.num_clips, settings.clip_len,
        settings.sampling_seed, settings.max_videos_per_study,
    )  # fmt: skip
    store.fill(settings.workers, world)
    return store


# -------------------------------------------------------------------------------------------- files


def export(folder, file):
    """Write a model folder with an encoder.pt as one checkpoint in the published format."""
    folder = Path(folder)
    study = load_safely(folder / "best_checkpoint.pt")
    encoder = read_encoder(folder / ENCODER_FILE)
    joined = {
        PUBLISHED["encoder"] + k.removeprefix("encoder."): v
        for k, v in encoder.state.items()
        if k.startswith("encoder.")
    }
    joined |= {PUBLISHED["study"] + k: v for k, v in study["model_state_dict"].items()}
    if encoder.seen:
        study["seen"] = [part.saved() for part in encoder.seen]
    save(study | {"model_state_dict": joined}, Path(file))


def is_published(path):
    """Whether a file was written by `export`."""
    try:
        saved = load_safely(path)
    except UserError:
        return False
    return isinstance(saved, dict) and bool(published_parts(saved.get("model_state_dict")))


def main(argv=None):
    summary = "Write an end-to-end model as a file of the published format."
    parser = Parser("export FOLDER FILE", EXPORT, summary, "export trained_models/chd chd.pt")
    parser.add_argument("command", choices=["export"], help="write the published format")
    parser.add_argument("folder", metavar="FOLDER", help="model folder")
    parser.add_argument("file", metavar="FILE", help="output file")
    typed = parser.parse_args(argv)
    output_path(typed.file, "published end-to-end checkpoint", is_published)
    export(typed.folder, typed.file)
    print(f"wrote {typed.file}")


def program():
    """Run the command line."""
    run_main(main, "embed/end_to_end.py")
