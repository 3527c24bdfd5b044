"""Stores whose studies are single videos: for labels of videos, and for embeddings of videos."""

from dataclasses import replace
from functools import lru_cache

from echofocus_core.base.console import RUN, progress, reason_lines
from echofocus_core.video.store import Store, UnreadableStudy, draw_copy


class VideosOf(Store):
    """The videos of a store's studies, each a study of its own, with the id study/video."""

    def __init__(self, store, findings=RUN):
        super().__init__(store.folder, {})
        self.store, self.place, self.numbers, left_out = store, store.place, {}, {}
        self.whole = lru_cache(maxsize=64)(self.read_study)
        for eid in progress(store.files, desc="videos", unit="study", leave=False, delay=2):
            try:
                with store.opened(eid) as study:
                    names = list(study.read_videos())
            except UnreadableStudy as error:
                left_out[eid] = str(error)
                continue
            if len(set(names)) < len(names):
                left_out[eid] = "two of its videos have one name"
                continue
            for number, name in enumerate(names):
                self.numbers[f"{eid}/{name}"] = eid, number
                self.files[f"{eid}/{name}"] = store.files[eid]
        if left_out:
            findings.warning(
                f"the videos of {len(left_out)} studies are left out:{reason_lines(left_out, 50)}",
                "extract these again",
            )

    def read_study(self, eid, copy):
        with self.store.opened(eid) as study:
            return study.clips(copy)

    def header(self, video):
        return replace(self.store.header(self.numbers[video][0]), videos=1, crc32=())

    def read(self, video, rng=None):
        eid, number = self.numbers[video]
        return only(self.whole(eid, draw_copy(rng, self.store.header(eid).copies)), number)

    def read_all(self, video):
        eid, number = self.numbers[video]
        for clips in self.store.read_all(eid):
            yield only(clips, number)

    def copies(self, videos):
        """Of whole studies, each represented by the first of its videos."""
        first = {}
        for video in videos:
            first.setdefault(self.numbers[video][0], video)
        return [[first[eid] for eid in same] for same in self.store.copies(list(first))]

    def stamp(self, video):
        return self.store.stamp(self.numbers[video][0])

    def content(self, video):
        eid, number = self.numbers[video]
        return f"{self.store.content(eid)} {number}"


def only(clips, number):
    """The StudyClips of one video of a study."""
    return replace(clips, embeddings=clips.embeddings[[number]], videos=[clips.videos[number]])


class VideosAsStudies:
    """A study's StudyClips as a store: each of its videos, by number, is a study of its own."""

    def __init__(self, study):
        self.study = study

    def read(self, number, rng=None):
        return only(self.study, number)

    def size(self, number):
        return self.study.embeddings.shape[1]
