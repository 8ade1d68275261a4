"""Image-to-text models of random weights, small enough for tests, saved as transformers does."""

from __future__ import annotations

from pathlib import Path

import torch

LOUD = {"initializer_range": 1.0}  # so that the image matters to what is said of it
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*MARKS, "a", "the", "cat", "dog", "red", "blue", "mug", "in", "on", "at"]


def _tokenizer(folder: Path):
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizer(str(folder / "vocab.txt"))


def save_blip(folder: Path) -> Path:
    """A BLIP: one processor for images and prompts, a decoder that attends to the image."""
    from transformers import (
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    tokenizer = _tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **LOUD}
    heads = {"num_attention_heads": 2}
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = BlipConfig(
        vision_config={**size, **heads, "image_size": 16, "patch_size": 8},
        text_config={**size, **heads, **marks, "vocab_size": len(WORDS), "encoder_hidden_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    """A vision encoder with a text decoder: an image processor and a tokenizer, side by side."""
    from transformers import (
        BertConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessor,
    )

    tokenizer = _tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **LOUD}
    heads = {"num_attention_heads": 2}
    decoder = BertConfig(**size, **heads, vocab_size=len(WORDS))
    encoder = ViTConfig(**size, **heads, image_size=16, patch_size=8)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    with torch.random.fork_rng():
        torch.manual_seed(3)
        VisionEncoderDecoderModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_blip2(folder: Path) -> Path:
    """A BLIP-2 with a decoder (OPT) that reads the queries of its Q-Former as tokens."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessor,
        OPTConfig,
    )

    tokenizer = _tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **LOUD}
    heads = {"num_attention_heads": 2}
    vision = Blip2VisionConfig(**size, **heads, image_size=16, patch_size=8)
    former = Blip2QFormerConfig(**size, **heads, encoder_hidden_size=16, vocab_size=len(WORDS))
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = OPTConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=1.0,
        **marks,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=former.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=len(WORDS),
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder
