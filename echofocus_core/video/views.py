"""The view of each video by EchoPrime's classifier: `embed/extract.py --views echoprime`."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from echofocus_core.base.console import RUN, UserError, progress
from echofocus_core.base.files import write_table
from echofocus_core.base.hdf5 import UNREADABLE
from echofocus_core.base.tables import read_table
from echofocus_core.base.world import pick_device
from echofocus_core.video import store
from echofocus_core.video.decode import first_frame
from echofocus_core.video.encoders.base import library, load_weights
from echofocus_core.video.encoders.echoprime import EchoPrime
from echofocus_core.video.errors import VideoError
from echofocus_core.video.studies import visible

VIEWS = (  # in the order of the classifier's outputs
    "A2C", "A3C", "A4C", "A5C", "Apical_Doppler", "Doppler_Parasternal_Long",
    "Doppler_Parasternal_Short", "Parasternal_Long", "Parasternal_Short", "SSN", "Subcostal",
)  # fmt: skip
SOURCE = "view_classifier.pt of model_data.zip (release v1.0.0 of github.com/echonet/EchoPrime)"
COLUMNS = ("eid", "video", "view", "probability", "content", "weights_sha256")
BATCH = 16  # images


class ViewClassifier(EchoPrime):
    """A ConvNeXt-Base on the first picture of EchoPrime's clip -> logits of VIEWS."""

    name, width = "EchoPrime's view classifier", len(VIEWS)

    def __init__(self, weights):
        try:
            load_weights(self, self.network, weights, source=SOURCE)
        except UserError as error:
            raise UserError(str(error).replace("--weights", "--view_weights")) from error

    def network(self):
        model = library("torchvision.models").convnext_base()
        model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, self.width)
        return model

    @torch.inference_mode()
    def classify(self, pictures, device):
        """uint8 (n, S, S, 3) -> view and probability of each."""
        probabilities = self.model(self.normalise(torch.from_numpy(pictures).to(device))).softmax(1)
        best, number = probabilities.cpu().max(1)
        return [(VIEWS[i], round(float(p), 4)) for i, p in zip(number, best, strict=True)]


def classify_views(studies, path, out, settings, map_in_processes):
    """Write the table `path`, a row for each video with embeddings in the folder `out`.

    Rows of an earlier table are kept for videos with the same bytes and classifier.
    map_in_processes: see `extract`.
    """
    classifier = ViewClassifier(settings.view_weights)
    device, digest = pick_device(settings.device), classifier.digest()
    classifier.prepare(device, torch.float32)
    kept = read_rows(path) if path.is_file() and not settings.redo else {}
    rows, sources = {}, {}
    for study in studies:
        try:
            files = store.load_details(store.study_path(out, study)).files
        except UNREADABLE:  # it has no usable video
            continue
        for video in study.videos:
            record = files.get(visible(video))
            if record and record.result == "ok":
                key = study.name, visible(video), record.content, digest
                if key in kept:
                    rows[key] = kept[key]
                else:
                    sources[key] = study.source(video)
    calls = ((key, (first_frame, source, classifier.pixels)) for key, source in sources.items())
    batch = []
    for key, (picture, _) in progress(
        map_in_processes(calls, settings.workers), total=len(sources), desc="views", unit="video"
    ):
        if not isinstance(picture, VideoError):
            batch.append((key, picture))
        if len(batch) == BATCH:
            rows |= classify_batch(classifier, batch, device)
            batch = []
    rows |= classify_batch(classifier, batch, device) if batch else {}
    table = [(eid, video, *rows[eid, video, c, d], c, d) for eid, video, c, d in sorted(rows)]
    write_table(pd.DataFrame(table, columns=COLUMNS), path)
    print(f"views of {len(rows)} videos in {path}; name it as `views` of the dataset for explain")


def classify_batch(classifier, batch, device):
    """[(key, picture)] -> key -> (view, probability)."""
    keys, pictures = zip(*batch, strict=True)
    return dict(zip(keys, classifier.classify(np.stack(pictures), device), strict=True))


def read_rows(path):
    """The rows of a table of `classify_views`: (eid, video, content, digest) -> the others."""
    table = read_table(path, RUN, "table of views")
    if absent := [name for name in COLUMNS if name not in table]:
        raise UserError(f"{path} has no column {absent[0]}: it is another table; move it away")
    rows = table[list(COLUMNS)].itertuples(index=False)
    return {(r.eid, r.video, r.content, r.weights_sha256): (r.view, r.probability) for r in rows}
