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


CHAT = ["<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_WORDS = ["<pad>", "<s>", "</s>", "<unk>", *CHAT, "user", "assistant", ":", *WORDS[5:]]
CHAT_WORDS += [str(number) for number in range(20)]
TURNS = """{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}
{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}
{% if add_generation_prompt %}assistant : {% endif %}"""


def _chat_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(CHAT_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=CHAT, **marks
    )


def _chat_text() -> dict:
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **LOUD}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {**size, **marks, "num_attention_heads": 2, "vocab_size": len(CHAT_WORDS)}


def save_llava(folder: Path, template: str | None = TURNS.replace("IMAGE", "<image>")) -> Path:
    """A LLaVA: a model that chats, and sees an image in the place of a token."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, **LOUD}
    vision = CLIPVisionConfig(**size, num_attention_heads=2, image_size=16, patch_size=8)
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_chat_text()),
        image_token_index=CHAT_WORDS.index("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        images,
        _chat_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def save_qwen2_vl(folder: Path) -> Path:
    """A Qwen2-VL: a model that chats, with as many tokens an image as its size asks for."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    tokens |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    patches = {"patch_size": 4, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**_chat_text(), "num_key_value_heads": 2, "rope_scaling": rope},
        vision_config={
            **{"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1},
            **{**patches, "spatial_merge_size": 2, **LOUD},
        },
        **{name: CHAT_WORDS.index(token) for name, token in tokens.items()},
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    limits = {**patches, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024}
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**limits),
        _chat_tokenizer(),
        Qwen2VLVideoProcessor(**limits),
        chat_template=TURNS.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    return folder


def save_chat_model(folder: Path) -> Path:
    """A Llama that chats, without images."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _chat_tokenizer()
    turn = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    tokenizer.chat_template = turn + "{% if add_generation_prompt %}assistant : {% endif %}"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForCausalLM(LlamaConfig(**_chat_text())).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
