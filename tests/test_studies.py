"""Grouping of files into studies, names of studies, and shards of workers."""

import csv
import gzip
import os
import shutil
import unicodedata
import zipfile

import cv2
import pydicom
import pytest
from helpers import FIXTURES, moving_square, write_dicom
from pydicom.encaps import encapsulate

from echofocus_core.base.console import Collected, UserError
from echofocus_core.video import extract, phantom, studies

OPTIONS = ("--weights", "random", "--size", "56", "--n_clips", "3")

pytestmark = pytest.mark.usefixtures("weights_drawn_once")

PIXELS = moving_square(17, 32, 32)[..., ::-1].copy()


def put(root, path, study="", **tags):
    """Write a small cine of a study."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    if study:
        tags["StudyInstanceUID"] = study
    write_dicom(root / path, PIXELS, "RGB", **tags)


def layout_of(root, *args, **kwargs):
    """name -> (folder, videos)"""
    listener = kwargs.pop("listener", None)
    all_studies = studies.find_studies(root, *args, listener=listener, **kwargs)
    return {s.name: (s.folder.relative_to(root).as_posix(), s.videos) for s in all_studies}


def lay_out(root, files):
    """Write files: path -> StudyInstanceUID, or '' for an AVI."""
    for path, uid in files.items():
        if uid:
            put(root, path, uid)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"x")


d = studies.short_digest

LAYOUTS = {
    "a folder for each study, with folders in it": (
        {"A/x.dcm": "1", "A/series/y": "1", "B/DICOM/z": "2", "C/DICOM/z": "3"},
        {"A": ("A", ["series/y", "x.dcm"]), "B": ("B", ["DICOM/z"]), "C": ("C", ["DICOM/z"])},
    ),
    "MIMIC": (
        {f"files/p10/p100/{s}/a.dcm": s[1] for s in ("s1", "s2")} | {"files/p11/p110/s3/b": "3"},
        {
            "s1": ("files/p10/p100/s1", ["a.dcm"]),
            "s2": ("files/p10/p100/s2", ["a.dcm"]),
            "s3": ("files/p11/p110/s3", ["b"]),
        },
    ),
    "a folder for each day": (
        {"mon/a": "1", "mon/b": "2", "tue/c": "3"},
        {f"mon-{d('1')}": ("mon", ["a"]), f"mon-{d('2')}": ("mon", ["b"]), "tue": ("tue", ["c"])},
    ),
    "two UIDs in the same two folders": (
        {"x/a": "1", "y/b": "1", "x/c": "2", "y/d": "2"},
        {
            f"x-{d('1folder x')}": ("x", ["a"]),
            f"y-{d('1folder y')}": ("y", ["b"]),
            f"x-{d('2folder x')}": ("x", ["c"]),
            f"y-{d('2folder y')}": ("y", ["d"]),
        },
    ),
    "a CD with a viewer's film": (
        {"DICOM/a": "1", "help/tutorial.mp4": "", "help/note.dcm": ""},
        {"SOURCE": (".", ["DICOM/a", "help/note.dcm"])},
    ),
    "folders of operating systems": (
        {"A/x": "1", "A/@eaDir/x": "2", "__MACOSX/z.avi": "", "A/Thumbs.db": ""},
        {"A": ("A", ["x"])},
    ),
    "loose files of one study": ({"a": "1", "b": "1"}, {"SOURCE": (".", ["a", "b"])}),
    "loose files of two studies": (
        {"a": "1", "b": "2"},
        {f"SOURCE-{d('1')}": (".", ["a"]), f"SOURCE-{d('2')}": (".", ["b"])},
    ),
    "no DICOM at all": (
        {"A/x.avi": "", "A/deep/y.AVI": "", "B/z.Mp4": ""},
        {"A": ("A", ["deep/y.AVI", "x.avi"]), "B": ("B", ["z.Mp4"])},
    ),
    "DICOM and other videos": (
        {"A/x": "1", "A/export/y.avi": "", "B/z.avi": "", "B/s/w.avi": ""},
        {"A": ("A", ["x"]), "B": ("B", ["s/w.avi", "z.avi"])},
    ),
    "two folders of one name": (
        {"p/echo/a": "1", "p/b": "3", "p/echo2/c": "2", "q/echo/d": "4", "q/e": "5"},
        {
            f"echo-{d('1')}": ("p/echo", ["a"]),
            "echo2": ("p/echo2", ["c"]),
            f"echo-{d('4')}": ("q/echo", ["d"]),
            f"p-{d('3')}": ("p", ["b"]),
            f"q-{d('5')}": ("q", ["e"]),
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    """Files are grouped by header; a study is named after its folder, or with a digest."""
    files, expected = LAYOUTS[layout]
    lay_out(tmp_path / "SOURCE", files)
    assert layout_of(tmp_path / "SOURCE") == expected


def test_a_cd_of_two_patients(tmp_path):
    """Two studies in one folder are split by header and refused with --group folder."""
    cd = tmp_path / "cd"
    shutil.copytree(FIXTURES / "cd_of_two_patients", cd / "DICOM")
    (cd / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    uids = [pydicom.dcmread(p).StudyInstanceUID for p in sorted((cd / "DICOM").iterdir())]
    expected = {f"DICOM-{d(u)}": ("DICOM", [f"IM00000{i}"]) for i, u in enumerate(uids)}
    assert layout_of(cd) == expected
    for group in ("folder", "one"):
        with pytest.raises(UserError, match=r"several studies .*--group dicom"):
            layout_of(cd, group)
    assert set(layout_of(cd, study_id="uid")) == set(uids)
    names = layout_of(cd, study_id="digest")
    assert all(len(n) == 16 and set(n) <= set("0123456789abcdef") for n in names)


def test_one_study_of_two_patients_is_left_out(tmp_path, capsys):
    put(tmp_path, "A/x", "1", PatientID="MRN-4711")
    put(tmp_path, "A/y", "1", PatientID="MRN-4712")
    put(tmp_path, "B/z", "2", PatientID="MRN-4711")
    put(tmp_path, "B/w", "2")  # without a PatientID
    assert set(layout_of(tmp_path)) == {"B"}
    out = capsys.readouterr().out
    assert "2 patients: A/x, A/y" in out and "MRN" not in out


NAMED = ["Muster/x", "K-4711 b/x", "2024 M\u00fcller/x", "DOE_JANE/x", "Doe^J/x"]
UNNAMED = ["S01/x", "Study 12/x", "CHD_007/x", "p10002221/x", "4711a/x", "Apical view/x"]
LIKE_NAMES = ["DOE_JANE_19500102", "m\u00fcller_anna", "MUELLERJUERGEN1970", "MUELLER_ANNA_A4C.avi",
              "exam/MuellerAnna.dcm", "2024 Mu\u0308ller"]  # fmt: skip
LIKE_VIEWS = [
    "Ambulanz", "Herzzentrum", "Kontrollen", "A4C.avi", "PSAX_LV.avi", "Subcostal.mp4", "IM_0001",
    "US000001", "1.2.840.113619.2.5.19700101", "0X100009310A3BD7FC.avi", "mitral_inflow_2.avi",
    "DICOM/PAT00001/STUD0001/IMAG0001", "Echo 2024-05-01", "PLAX L\u00e4ngsachse.dcm",
]  # fmt: skip


def test_studies_and_videos_named_like_their_patient_are_reported(tmp_path, capsys):
    tags = {"PatientName": "MUSTER^Eva", "PatientID": "4711"}
    for k, file in enumerate([*NAMED, *UNNAMED]):
        put(tmp_path, file, str(k + 1), **(tags if k in (0, 1, 5, 9) else {}))
    put(tmp_path, "S01/muster.dcm", "6", **tags)
    put(tmp_path, "S01/MEIER_ANNA/A4C.dcm", "6", **tags)
    all_studies = studies.find_studies(tmp_path)
    names = {study.name: study.names_patient for study in all_studies if study.names_patient}
    assert names == {"Muster": "study", "K-4711 b": "study", "S01": "videos"}
    assert "5 of 11 studies" in (out := capsys.readouterr().out) and "2 of 13 videos" in out
    studies.find_studies(tmp_path, study_id="digest")
    assert "11 studies" not in (out := capsys.readouterr().out) and "2 of 13 videos" in out
    (tmp_path / "list.csv").write_text("study,path\nDoe^J,S01/muster.dcm\n")
    studies.find_studies(tmp_path, manifests=[tmp_path / "list.csv"])
    assert "1 of 1 studies" in (out := capsys.readouterr().out) and "1 of 1 videos" in out
    assert all(map(studies.path_may_name_patient, LIKE_NAMES))
    assert not any(map(studies.path_may_name_patient, LIKE_VIEWS))


def test_files_without_a_study_are_left_out(tmp_path, capsys):
    lay_out(tmp_path, {"A/x": "1", "A/y": "2", "A/z.avi": "", "B/w": "3", "loose.mp4": ""})
    assert sorted(v for _, vs in layout_of(tmp_path).values() for v in vs) == ["w", "x", "y"]
    assert "A/z.avi, loose.mp4" in capsys.readouterr().out


def test_one_uid_merges_folders_of_one_patient_only(tmp_path):
    """Files in several folders are one study if all have the same patient."""
    for patients, expected in (
        (("P", "P"), ["SOURCE"]), (("P", "Q"), ["x", "y"]), (("P", ""), ["x", "y"]),
    ):  # fmt: skip
        root = tmp_path / "".join(patients) / "SOURCE"
        for folder, patient in zip("xy", patients, strict=True):
            put(root, f"{folder}/a", "1", PatientID=patient)
        listener = Collected()
        assert sorted(layout_of(root, listener=listener)) == expected
        warned = [f.text for f in listener.findings if f.level == "WARNING"]
        assert bool(warned) == (len(expected) == 2) and all("x and y" in t for t in warned)
        names = [layout_of(root, study_id=kind) for kind in ("folder", "digest")]
        assert [len(n) for n in names] == [len(expected)] * 2


def test_one_uid_in_deeper_folders_is_reported(tmp_path):
    """Nothing in the files tells series of one study from patients below one more folder."""
    for patient, warned in (("", True), ("P", False)):
        root, listener = tmp_path / f"source{patient}", Collected()
        for folder in ("site/x", "site/y"):
            put(root, f"{folder}/a", "1", PatientID=patient)
        assert len(layout_of(root, listener=listener)) == 1
        texts = [f.text for f in listener.findings if f.level == "WARNING"]
        assert any("site/x and site/y" in text for text in texts) == warned


def jpeg_copy(path, source, **tags):
    """Write a DICOM file again as JPEG, with other tags."""
    ds = pydicom.dcmread(source)
    frames = [cv2.imencode(".jpg", f[..., ::-1])[1].tobytes() for f in ds.pixel_array]
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    ds.PixelData, ds.PhotometricInterpretation = encapsulate(frames), "YBR_FULL_422"
    ds["PixelData"].is_undefined_length = True
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path)


def test_repeats_of_a_loop_are_skipped(tmp_path, cli):
    """Repeats have another tag, are JPEG or have a new UID; another loop has the same UID."""
    A = tmp_path / "in" / "A"
    put(tmp_path / "in", "A/s/best", "1", SOPInstanceUID="1.5", PatientID="P")
    jpeg_copy(A / "a_jpeg", A / "s/best")
    put(tmp_path / "in", "A/t/again", "1", SOPInstanceUID="1.5", InstitutionName="X")
    put(tmp_path / "in", "A/t/new_uid", "1", SOPInstanceUID="1.6")
    other = phantom.phantom_cine(frames=17, seed=3)
    write_dicom(A / "other", other, "RGB", StudyInstanceUID="1", SOPInstanceUID="1.5")
    (study,) = studies.find_studies(tmp_path / "in")
    assert study.videos == ["other", "s/best", "t/new_uid"]
    assert sorted(study.left_out) == ["a_jpeg", "t/again"]
    status, _, error = cli(tmp_path / "in", "--out", tmp_path / "out", *OPTIONS, main=extract.main)
    assert status == 0, error
    with open(tmp_path / "out" / "extract_log.csv") as f:
        rows = {row["video"]: (row["result"], row["reason"]) for row in csv.DictReader(f)}
    assert {v for v, (result, _) in rows.items() if result == "ok"} == {"other", "s/best"}
    assert rows["t/new_uid"] == ("skipped", "a repeat: the same frames as s/best")
    assert rows["a_jpeg"] == ("skipped", "a repeat: the same SOPInstanceUID as A/s/best")


def test_compressed_files_are_named(tmp_path, cli):
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.dcm").write_bytes(gzip.compress(b"x" * 500))
    with zipfile.ZipFile(root / "study.zip", "w") as f:
        f.writestr("x", "y")
    status, text, _ = cli(root, "--out", tmp_path / "o", *OPTIONS, main=extract.main)
    assert status == 1 and "a.dcm: packed (gzip)" in text and "study.zip: packed (zip)" in text


def test_odd_names_and_odd_files(tmp_path, cli):
    """Names are not UTF-8, have two normal forms, escape sequences or 250 characters."""
    root = tmp_path / "in"
    cafe = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    odd = os.fsdecode(b"caf\xe9")
    names = [*cafe, odd, "caf%E9", "a\nb", "e\x1b[31m", "x" * 250]
    for i, name in enumerate(names):
        put(root, f"{name}/v{i}\udcff.DCM", str(i + 1))
    os.mkfifo(root / "a\nb" / "pipe.avi")
    (root / "a\nb" / "null.dcm").symlink_to("/dev/null")
    (root / "a\nb" / "nowhere.avi").symlink_to(root / "gone")
    status, text, error = cli(root, "--out", tmp_path / "out", *OPTIONS, main=extract.main)
    assert status == 0, error
    assert "7 studies extracted" in text and "not a regular file 3" in text
    assert "\x1b" not in text + error
    written = {p.stem for p in (tmp_path / "out").glob("[!.]*.hdf5")}
    long = "x" * 191 + "-" + d("x" * 250)
    assert written == {*cafe, "caf%E9", "caf%25E9", "a%0Ab", "e%1B[31m", long}
    assert "v2%FF.DCM" in (tmp_path / "out" / "extract_log.csv").read_text()
    again = cli(root, "--out", tmp_path / "out", *OPTIONS, main=extract.main)
    assert again[0] == 0 and "0 studies extracted, 7 already there" in again[1]


def test_the_output_folder_is_not_read(source, cli):
    out = source / "embeddings"
    for expected in ("2 studies extracted", "0 studies extracted, 2 already there"):
        status, text, _ = cli(source, "--out", out, *OPTIONS, main=extract.main)
        assert status == 0 and expected in text
        assert "1 files are not videos: .txt 1" in text


def test_ignored_files_are_counted(source, tmp_path, cli):
    """Links are followed once; other files and empty folders are counted."""
    shutil.move(source / "A_1" / "series", tmp_path / "elsewhere")
    (source / "A_1" / "series").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    (source / "C").mkdir()
    for name in ("a.TXT", "b.xml", "noending", ".hidden"):
        (source / "C" / name).write_text("no video")
    assert {n: v for n, (_, v) in layout_of(source).items()} == {
        "A_1": ["IM0001", "series/y.dcm", "x.dcm"],
        "B": ["notes.dcm", "real.dcm", "still.dcm"],
    }
    _, text, _ = cli(source, "--out", tmp_path / "out", *OPTIONS, main=extract.main)
    assert "4 files are not videos: .txt 2, " in text and "1 folders hold no video: C" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folders_are_named(source, capsys):
    (source / "A_1" / "series").chmod(0)
    try:
        studies.find_studies(source)
    finally:
        (source / "A_1" / "series").chmod(0o755)
    out = capsys.readouterr().out
    assert "1 subfolders cannot be read: A_1/series: Permission denied" in out


def test_wrong_sources(tmp_path, cli):
    for name, files, message in (
        ("absent", (), "is not a folder"),
        ("empty", (), "no video or DICOM file"),
        ("mixed", ("a.avi", "study/b.avi"), "both study folders and loose videos (a.avi"),
        ("text", ("a.dcm",), "no study"),
    ):
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("no")
        (tmp_path / "empty").mkdir(exist_ok=True)
        line = (tmp_path / name, "--out", tmp_path / "o", *OPTIONS)
        status, _, error = cli(*line, main=extract.main)
        assert status == 1 and message in error
    (tmp_path / "file").touch()
    status, _, error = cli(*line[:2], tmp_path / "file" / "o", *OPTIONS, main=extract.main)
    assert status == 1 and str(tmp_path / "file") in error and "Traceback" not in error


# ------------------------------------------------------------------------------------------ tables


def from_manifest(root, text, listener=None):
    table = root / "list.csv"
    table.write_text(text)
    return studies.find_studies(root, manifests=[table], listener=listener)


def test_manifests(tmp_path):
    """A list of study and path, and the tables of MIMIC and EchoNet."""
    lay_out(tmp_path, {"A/x.dcm": "1", "A/s/y.dcm": "1", "B/z.dcm": "2"})
    s1, s2 = from_manifest(tmp_path, "study,path\ns1,A/x.dcm\ns1,A/gone.dcm\ns2,B/z.dcm\n")
    assert (s1.name, s1.videos, list(s1.left_out)) == ("s1", ["x.dcm"], ["gone.dcm"])
    assert (s2.name, s2.videos) == ("s2", ["z.dcm"])
    (study,) = from_manifest(
        tmp_path,
        "subject_id,study_id,acquisition_datetime,dicom_filepath\n"
        "10002221,94106955,2020-01-01,A/x.dcm\n10002221,94106955,2020-01-01,A/s/y.dcm\n",
    )
    assert (study.name, study.videos) == ("94106955", ["s/y.dcm", "x.dcm"])

    for view in ("A4C", "PSAX"):
        (tmp_path / view / "Videos").mkdir(parents=True)
        (tmp_path / view / "Videos" / "CR1-CR2-000.avi").write_text("x")
        (tmp_path / view / "FileList.csv").write_text("FileName,EF\nCR1-CR2-000.avi,60\n")
    lists = [tmp_path / view / "FileList.csv" for view in ("A4C", "PSAX")]
    (study,) = studies.find_studies(tmp_path, manifests=lists)
    assert study.name == "CR1-CR2"
    assert study.videos == ["A4C/Videos/CR1-CR2-000.avi", "PSAX/Videos/CR1-CR2-000.avi"]
    lists[0].write_text("FileName,EF\n0X1,60\n")
    (study,) = studies.find_studies(tmp_path, manifests=lists[:1])
    assert (study.name, list(study.left_out)) == ("0X1", ["0X1.avi"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "a manifest has study and path"),
        ("study,path\n../x,A/x.dcm\n", "line 2.*cannot be a study's name"),
        ("study,path\ns,A/x.dcm\ns,\n", "line 3: study or path is empty"),
        ("study,path\ns,A/x.dcm,more\n", "line 2"),
        ("study,path\ns,../secret.dcm\n", "line 2: the path is outside"),
    ],
)
def test_wrong_manifests(tmp_path, text, message):
    put(tmp_path, "A/x.dcm", "1")
    with pytest.raises(UserError, match=message):
        from_manifest(tmp_path, text)
    with pytest.raises(UserError, match="--study_id has no effect"):
        studies.find_studies(tmp_path, manifests=["m.csv"], study_id="digest")


def test_manifests_may_contain_absolute_paths_below_the_source(tmp_path):
    put(tmp_path, "A/x.dcm", "1")
    (study,) = from_manifest(tmp_path, f"study,path\ns,{tmp_path}/A/x.dcm\n")
    assert study.source("x.dcm").is_file()


def test_a_manifest_that_mixes_studies_gives_warnings(tmp_path):
    lay_out(tmp_path, {"A/x.dcm": "1", "B/z.dcm": "2"})
    listener = Collected()
    from_manifest(tmp_path, "study,path\ns,A/x.dcm\ns,B/z.dcm\nt,B/z.dcm\n", listener)
    texts = [f.text for f in listener.findings if f.level == "WARNING"]
    assert "1 files are listed in two studies: B/z.dcm" in texts[0]
    assert "1 studies of the manifest hold files of several studies" in texts[1]


def test_videos_of_a_published_config(tmp_path):
    """`video_subdir_format` describes the names of folders, which contain the study's id."""
    lay_out(tmp_path, {"101_trim/a.avi": "", "102_trim/s/b.avi": "", "other/c.avi": ""})
    all_studies = studies.studies_of_dataset(tmp_path)
    assert [(s.name, s.videos) for s in all_studies] == [("101", ["a.avi"]), ("102", ["s/b.avi"])]
    listener = Collected()
    form = "{echo_id}_trim"
    (study,) = studies.studies_of_dataset(tmp_path, form, ["102", "7", "../x"], listener)
    assert study.name == "102" and study.source("s/b.avi") == tmp_path / "102_trim" / "s" / "b.avi"
    assert [f.text for f in listener.findings] == [
        f"2 studies have no video in {tmp_path}/{{echo_id}}_trim: 7, ../x"
    ]
    with pytest.raises(UserError, match=r"not contain \{echo_id\}"):
        studies.studies_of_dataset(tmp_path, "trim")


# ----------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        (
            {f"SLURM_ARRAY_TASK_{k}": v for k, v in (("ID", "12"), ("MIN", "10"), ("COUNT", "4"))},
            (2, 4),
        ),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
    ],
)
def test_shards_from_the_environment(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert studies.shard_from("auto") == expected
    assert studies.shard_from("2/5") == (2, 5)
    with pytest.raises(UserError, match="--shard"):
        studies.shard_from("5/5")
