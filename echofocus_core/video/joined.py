"""Clip embeddings of several encoders as one dataset."""

import os
from contextlib import ExitStack, contextmanager

import numpy as np

from echofocus_core.base.console import RUN, UserError, some
from echofocus_core.base.hdf5 import shortest_distinct
from echofocus_core.base.seen import all_seen
from echofocus_core.video.store import Header, OpenStudy, Store, open_store


def open_stores(paths, findings=RUN, most_videos=0):
    """The Store of a dataset: see `open_store`; of several encoders, joined. Raises UserError."""
    stores = [open_store(path, findings) for path in paths]
    if len(stores) > 1:
        places = [path.with_suffix("") if path.is_file() else path for path in paths]
        names = shortest_distinct(map(os.fsencode, places))
        if len(set(names)) < len(names):
            raise UserError(f"embedding_path names a folder twice: {some(names)}")
        stores = [JoinedStore(dict(zip(names, stores, strict=True)))]
        stores[0].report_missing(findings)
    stores[0].most_videos = most_videos
    return stores[0]


class JoinedStore(Store):
    """Stores of several encoders as one: a study has the videos of each, as <encoder>/<video>.

    A clip embedding has a block of features for each of the K encoders, zero except that of its own
    encoder, then K numbers, 1 for its own encoder and else 0: (V, C, D_1 + ... + D_K + K). An
    encoder with fewer clips a video repeats them, so that the encoders have the same weight.
    Studies may lack encoders, but a damaged file makes a study unreadable.
    """

    parts = None  # name -> Store

    def __init__(self, parts):
        self.parts, files = parts, {}
        for part in reversed(parts.values()):
            files |= part.files
        first = next(iter(parts.values())).folder
        super().__init__(first.parent / "+".join(parts), dict(sorted(files.items())))
        headers = (part.readable_headers(part.files) for part in parts.values())
        self.widths = [next((header.width for _, header in each), 0) for each in headers]
        self.starts = np.cumsum([0, *self.widths])  # of the blocks

    def of_parts(self, eids):
        """(Store, those of these studies that it has) of each encoder."""
        return [(x, [eid for eid in eids if eid in x.files]) for x in self.parts.values()]

    def width(self, eids):
        """The number of features of each encoder, a list. UserError if those of one differ."""
        return [part.width(mine or part.files) for part, mine in self.of_parts(eids)]

    def report_missing(self, findings):
        for name, part in self.parts.items():
            if missing := sorted(self.files.keys() - part.files.keys()):
                findings.warning(
                    f"{len(missing)} studies have no clip embeddings of {name}: "
                    f"{some(missing, 50)}",
                    "they are answered from the other encoders",
                )

    @contextmanager
    def open(self, eid):
        with ExitStack() as stack:
            studies = {
                name: stack.enter_context(part.open_study(eid))
                for name, part in self.parts.items()
                if eid in part.files
            }
            headers = {name: study.header for name, study in studies.items()}
            copies, V, C = (
                f(getattr(header, name) for header in headers.values())
                for f, name in ((max, "copies"), (sum, "videos"), (max, "clips"))
            )

            def read_copy(number):
                blocks = (
                    self.block(name, study.clips(number % study.header.copies).embeddings, C)
                    for name, study in studies.items()
                )
                return np.concatenate(list(blocks))

            yield OpenStudy(
                Header(copies, V, C, self.starts[-1] + len(self.parts)),
                read_copy,
                lambda: [f"{name}/{x}" for name in studies for x in studies[name].read_videos()],
                tuple(headers[name].made_with if name in headers else {} for name in self.parts),
            )

    def block(self, name, clips, C):
        """The clips (V, c, D) of an encoder as (V, C, features of all encoders + K)."""
        k, K, (V, c, D) = list(self.parts).index(name), len(self.parts), clips.shape
        if self.widths[k] != D:
            raise ValueError(f"its embeddings of {name} have {D} features, not {self.widths[k]}")
        block = np.zeros((V, C, self.starts[-1] + K), np.float32)
        block[:, :, self.starts[k] : self.starts[k + 1]] = clips[:, np.arange(C) * c // C]
        block[:, :, k - K] = 1
        return block

    def content(self, eid):
        return "; ".join(
            f"{k} {part.content(eid)}"
            for k, part in enumerate(self.parts.values())
            if eid in part.files
        )

    def copies(self, eids):
        return [same for part, mine in self.of_parts(eids) for same in part.copies(mine)]

    def encoder_seen(self, eids, listener=RUN):
        each = [part.encoder_seen(mine, listener) for part, mine in self.of_parts(eids)]
        return all_seen(*(seen for seen, _ in each)), all(complete for _, complete in each)
