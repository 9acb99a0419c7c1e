"""Tiny models of the libraries that towers are made of.

With random weights, written as those libraries write them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = "red green blue crimson shoe sneaker mug coffee lamp query passage a by from no".split()


def write_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of two layers for the transformers library.

    With a tokenizer of a few words and of all letters.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.:,")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *(f"##{c}" for c in letters),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(dict.fromkeys(vocabulary)),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_open_clip(
    folder: Path, seed: int = 0, context_length: int = 16, tokenizer: Path | None = None
) -> Path:
    """A CLIP of one layer on each side for open_clip's `local-dir:`.

    With open_clip's own tokenizer, or with another.

    Args:
        folder: to be made.
        seed: of the weights.
        context_length: tokens that the text side reads.
        tokenizer: folder of a tokenizer of the transformers library.
    """
    import open_clip

    folder.mkdir(parents=True)
    text = {
        "context_length": context_length,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    }
    if tokenizer is not None:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        text |= {"hf_tokenizer_name": "somewhere/else", "vocab_size": 200, "pool_type": "last"}
    config = {
        "model_cfg": {
            "embed_dim": 12,
            "vision_cfg": {
                "image_size": 32,
                "patch_size": 16,
                "width": 32,
                "head_width": 16,
                "layers": 1,
            },
            "text_cfg": text,
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


TIMM = "convnext_atto"
TIMM_ARGS = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def write_timm(path: Path, seed: int = 0) -> torch.nn.Module:
    """Weights of a small timm model, classifier included, as .safetensors or .pth.

    Returns the model.
    """
    import timm

    torch.manual_seed(seed)
    model = timm.create_model(TIMM, num_classes=7, **TIMM_ARGS).eval()
    for (
        parameter
    ) in model.parameters():  # layer scales start near zero, which would hide differences
        parameter.data += 0.05 * torch.randn_like(parameter)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return model


def write_timm_hub(cache: Path, repo: str, seed: int = 0) -> None:
    """The cache that the Hugging Face hub client keeps of a small timm model."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1", encoding="utf-8")
    write_timm(snapshot / "model.safetensors", seed)
    own = {
        "input_size": [3, 32, 32],
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    own |= {"classifier": "head.fc", "first_conv": "stem.0"}
    config = {
        "architecture": TIMM,
        "num_classes": 7,
        "model_args": TIMM_ARGS,
        "pretrained_cfg": own,
    }
    (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
