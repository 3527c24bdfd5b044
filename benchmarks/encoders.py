"""Speed of encoders against the floor of this machine: python benchmarks/encoders.py echoprime

For each encoder (a name as for --encoder, with random weights) and number format: seconds to decode
a phantom AVI, seconds to encode its clips in full batches, and the ratio of these to the floor,
which is the FLOPs of the encoder at the machine's rate of matrix products.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe, matmul_rate, peak_memory, timed
from echofocus_core.base.options import Settings
from echofocus_core.base.world import exact_convolutions
from echofocus_core.video import extract, phantom
from echofocus_core.video.decode import read_clips


def flops_of_piece(encoder):
    """The FLOPs of one piece (an image or a clip), on the CPU."""
    shape = [1, 3, encoder.frames] if encoder.images_of_piece() > 1 else [1, 3]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.encode(torch.zeros(*shape, encoder.pixels.size, encoder.pixels.size))
    return counter.get_total_flops()


def measure(name, precision, device, videos, path):
    """Print a row of seconds a video and ratios."""
    settings = Settings(encoder=name, weights="random", device=device, precision=precision)
    encoder = extract.encoder_of(settings)
    flops, sampling = flops_of_piece(encoder), extract.sampling_of(settings, encoder)
    decode = timed(lambda: read_clips(path, sampling), "cpu", 3)
    reply = read_clips(path, sampling), 0.0
    batches = extract.batches_of(encoder, settings)
    pieces = len(extract.Pending(None, reply, encoder, device).pieces)

    def encode():
        return list(batches([(None, reply)] * videos))

    encode()
    seconds = timed(encode, device, 3) / videos
    floor = pieces * flops / matmul_rate(device, extract.PRECISIONS[precision])
    images = pieces * encoder.images_of_piece() / seconds
    print(
        f"{encoder.name} {precision}: decode {decode:.3g} s, encode {seconds:.3g} s a video, "
        f"{images:.3g} images/s, {flops / 1e9:.3g} GFLOP a piece, {seconds / floor:.2f} x floor, "
        f"peak {peak_memory(device) / 1e9:.2g} GB"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", help="as for --encoder; weights are random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--videos", type=int, default=4, help="encoded together")
    args = parser.parse_args()
    print(describe(args.device))
    with tempfile.TemporaryDirectory() as folder, exact_convolutions():
        path = Path(folder, "phantom.avi")
        frames = phantom.phantom_cine("A4C", frames=80, size=(600, 800), seed=1)
        phantom.write_video(path, frames)
        for name in args.names:
            for precision in args.precision:
                measure(name, precision, args.device, args.videos, path)


if __name__ == "__main__":
    main()
