"""`embed` by video and its map, and `check`: every fault planted in a small cohort is named."""

import h5py
import numpy as np
import torch

import echofocus as ef


def by_hand(net, clips):
    """Study embedding (768,) of clips (N, 768) of the standard kind, by torch's own encoder."""
    with torch.no_grad():
        return net.encoder(torch.from_numpy(clips)[None]).mean(1)[0].numpy()


def test_video_embeddings(cohort, cli):
    """Each is what the model makes of that video alone; what cannot be read is listed."""
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    (cohort / "emb" / "1003.hdf5").write_bytes(b"not HDF5")
    for options in ((), ("--batch_tokens", "1")):  # all of a study's at once, or one by one
        status, out, err = cli("embed", "--level", "video", *options)
        assert status == 0, err
        assert "1 studies left out" in out and "1003.hdf5" in out
        with h5py.File("trained_models/defect/video_embeddings_site_defect.h5") as f:
            assert len(f) == 59 and f.attrs["level"] == "video" and f.attrs["dataset"] == "site"
            found = {eid: group["embeddings"][:] for eid, group in f.items()}
            videos = {eid: group["videos"].asstr()[:].tolist() for eid, group in f.items()}
        folder = cohort / "trained_models" / "defect"
        net = ef.load_model(folder, ef.read_config("config.json")).net
        for eid in ("1000", "1001", "1059"):
            with h5py.File(cohort / "emb" / f"{eid}.hdf5") as f:
                bag, names = f["embeddings"][:], f["videos"].asstr()[:].tolist()
            assert videos[eid] == names and found[eid].shape == (len(bag), 768)
            for v, clips in enumerate(bag):
                np.testing.assert_allclose(found[eid][v], by_hand(net, clips), atol=1e-5)
    assert sum(map(len, found.values())) > 59  # several videos a study, then


def test_embedding_nothing_leaves_no_file(cohort, cli):
    assert cli("train", "--task", "defect", "--epoch_lim", "1")[0] == 0
    for file in (cohort / "emb").iterdir():
        file.write_bytes(b"not HDF5")
    for level in ("study", "video"):
        status, _, err = cli("embed", "--level", level)
        assert status == 1 and "no study could be read" in err
    assert not list((cohort / "trained_models" / "defect").glob("*.h5"))
