"""EchoPrime's video encoder and view classifier (Vukadinovic et al., 2024), by torchvision."""

from torch import nn

from echofocus_core.video.decode import Pixels
from echofocus_core.video.encoders.base import ClipEncoder, library, load_weights

SOURCE = "echo_prime_encoder.pt of model_data.zip (release v1.0.0 of github.com/echonet/EchoPrime)"


class EchoPrime(ClipEncoder):
    """An MViT v2 S: frames 0, 2, ..., 30 -> 512 features."""

    name, width = "echoprime", 512
    licence = "MIT"
    citation = "Vukadinovic et al., EchoPrime, arXiv:2410.09704"
    padding = "zeros"
    pixels = Pixels(
        square=True, cut=0.1, filter="INTER_CUBIC", order="RGB except DICOM"
    )  # as published: its reader turns the pixels of DICOM to BGR
    range = 255.0
    mean = (29.110628, 28.076836, 29.096405)
    deviation = (47.989223, 46.456997, 47.20083)

    def __init__(self, weights=""):
        load_weights(self, self.network, weights, source=SOURCE)

    def network(self):
        model = library("torchvision.models").video.mvit_v2_s()
        model.head[-1] = nn.Linear(model.head[-1].in_features, self.width)
        return model
