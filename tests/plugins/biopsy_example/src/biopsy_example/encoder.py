"""An encoder: a vision transformer of one block."""

from biopsy.models.networks.encoders import Encoder, register_encoder


def register() -> None:
    register_encoder(
        Encoder(
            name="example-vit",
            hub="example/vit",
            architecture="vit_tiny_patch16_224",
            arguments={"depth": 1, "embed_dim": 24, "num_heads": 2},
            n_features=24,
            millions=0.1,
            licence="apache-2.0",
            is_gated=False,
        ),
        register,
    )


register()
