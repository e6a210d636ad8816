"""ViTMAEForPreTraining of transformers, which MAEPretrainer is measured against."""

from typing import Any

from zoo.common import batch as batches
from zoo.common.peers import TRAINING, Built, Peer


def _huggingface(model: Any, axes: dict[str, str]) -> Built:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    hp, encoder = model.hparams, model.backbone
    channels, height, width = model.input_shape
    if height != width or not hp.class_token:
        raise ValueError("transformers' ViTMAE takes square images and has a class token: leave it out of --peers")
    config = ViTMAEConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.num_heads,
        intermediate_size=4 * encoder.embed_dim,
        patch_size=model.patch_size[0],
        image_size=height,
        num_channels=channels,
        mask_ratio=hp.mask_ratio,
        norm_pix_loss=hp.norm_pix_loss,
        decoder_hidden_size=hp.decoder_dim,
        decoder_num_hidden_layers=hp.decoder_depth,
        decoder_num_attention_heads=hp.decoder_heads,
        decoder_intermediate_size=4 * hp.decoder_dim,
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "sdpa"
    return ViTMAEForPreTraining(config), lambda network, batch: network(batches.images(batch)).loss


PEERS = {
    "huggingface": Peer(
        "transformers",
        TRAINING,
        "ViTMAEForPreTraining with SDPA attention, and the paper's decoder, of self-attention",
        _huggingface,
    )
}
