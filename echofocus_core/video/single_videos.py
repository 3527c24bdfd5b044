"""Stores whose studies are single videos: for labels of videos, and for embeddings of videos."""

from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

from echofocus_core.base.console import RUN, progress, reason_lines
from echofocus_core.video.store import OpenStudy, Store, UnreadableStudy


class VideosOf(Store):
    """The videos of a store's studies as studies with the id study/video."""

    def __init__(self, store, findings=RUN):
        super().__init__(store.folder, {})
        self.store, self.numbers, left_out = store, {}, {}
        self.whole = lru_cache(maxsize=64)(self.read_study)
        for eid in progress(store.files, desc="videos", unit="study", delay=2):
            try:
                with store.open_study(eid) as study:
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
        with self.store.open_study(eid) as study:
            return study.clips(copy)

    @contextmanager
    def open(self, video):
        eid, number = self.numbers[video]
        yield OpenStudy(
            replace(self.store.header(eid), videos=1, crc32=()),
            lambda copy: self.whole(eid, copy).embeddings[[number]],
            lambda: [video.removeprefix(f"{eid}/")],
        )

    def copies(self, videos):
        """Of whole studies, each represented by the first of its videos."""
        first = {}
        for video in videos:
            first.setdefault(self.numbers[video][0], video)
        return [[first[eid] for eid in same] for same in self.store.copies(list(first))]

    def content(self, video):
        eid, number = self.numbers[video]
        return f"{self.store.content(eid)} {number}"


class VideosAsStudies:
    """A study's StudyClips as a store whose studies are its videos, by number."""

    def __init__(self, study):
        self.study = study

    def read(self, number, rng=None):
        embeddings, videos = self.study.embeddings[[number]], [self.study.videos[number]]
        return replace(self.study, embeddings=embeddings, videos=videos)

    def size(self, number):
        return self.study.embeddings.shape[1]
