"""A detection model of transformers with a few random weights, written as publishers write them."""
from pathlib import Path

import torch
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

LABELS = {0: "cup", 1: "<|im_end|>", 2: "spoon"}


def write_detector(directory: Path) -> Path:
    """Writes a DETR whose scores are 0.2 to 0.6, different for each image; label 1 is always the best."""
    torch.manual_seed(0)
    stem = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = DetrConfig(
        backbone_config=ResNetConfig(**stem, out_features=["stage4"]),
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=8,
        id2label=LABELS,
        label2id={name: number for number, name in LABELS.items()},
    )
    model = DetrForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2).add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(directory)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(directory)
    return directory
