"""torch.hub entry point: `torch.hub.load('<this repository>', 'PanEcho', source='local')`."""

dependencies = ["torch", "numpy", "pydantic"]


def PanEcho(
    pretrained=True,
    image_encoder_only=False,
    backbone_only=False,
    tasks="all",
    activations=True,
    clip_len=16,
):
    """The PanEcho video encoder.

    Takes float32 clips (B, 3, clip_len, H, W), 224x224 or 112x112, scaled to 0..1 and normalised
    with the ImageNet mean and standard deviation.

    pretrained: load the published weights (downloaded once into torch.hub's cache).
    image_encoder_only: return the ConvNeXt-Tiny, (B, 3, H, W) -> (B, 768).
    backbone_only: return image encoder and frame transformer, (B, 3, L, H, W) -> (B, 768).
    tasks: 'all', or a list of task names; the full model returns a dict of task to (B, n).
    activations: probabilities for classification tasks; False for raw outputs.
    clip_len: frames per clip; other lengths work too, as frame positions are computed.
    """
    from echofocus_core.video.panecho import build

    return build(
        pretrained,
        image_encoder_only,
        backbone_only,
        tasks=tasks,
        activations=activations,
        clip_len=clip_len,
    )
