"""Image-to-text models of transformers: a folder or a name of the Hub, and captions of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils import UserError
from utils_backbones import PRECISIONS

if TYPE_CHECKING:
    import torch
    from PIL import Image

CHAT_PROMPT = "Describe the image in one sentence."  # of models that chat, if none is given


@dataclass(frozen=True)
class Sampling:
    """How captions are generated: what transformers' generate is told.

    count: captions an image. sample: drawn, with top_p and temperature, not searched for. seed: of
    the drawing, which starts anew with each batch. prompt: what the model is told, or None.
    """

    count: int
    sample: bool
    top_p: float
    temperature: float
    beams: int
    min_tokens: int
    max_tokens: int
    seed: int
    prompt: str | None

    def options(self) -> dict[str, Any]:
        """The arguments of generate."""
        drawn = {"top_p": self.top_p, "temperature": self.temperature} if self.sample else {}
        return {
            "do_sample": self.sample,
            "num_beams": self.beams,
            "num_return_sequences": self.count,
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": self.max_tokens,
            **drawn,
        }


@dataclass(frozen=True, eq=False)
class Captioner:
    """A loaded model. images, texts: what turns images and prompts into its inputs and back.

    processor: takes both together, or None where a model has none and no prompt. revision: of the
    model, as far as the Hub says.
    """

    model: Any
    processor: Any
    images: Any
    texts: Any
    device: torch.device
    revision: str | None

    def caption(
        self, images: Sequence[Image.Image], sampling: Sampling, number: int
    ) -> list[tuple[str, ...]]:
        """The captions of RGB images; number: of the batch, which with the seed decides.

        Raises UserError if the model does not describe images as it is asked, with its reason.
        """
        import torch

        try:
            texts = self._generate(images, sampling, number)
        except UserError:
            raise
        except torch.OutOfMemoryError as error:
            cause = str(error).partition("\n")[0]
            raise UserError(f"{cause}: describe the images with a smaller --batch") from error
        except Exception as error:  # each family of models has its own
            cause = " ".join(str(error).split())[:200]
            raise UserError(
                f"--captioner: the model cannot describe images as it is asked ({cause}); it may "
                "need words of its own, such as a token for the image, in --captioner_prompt"
            ) from error
        starts = range(0, len(texts), sampling.count)
        return [tuple(texts[start : start + sampling.count]) for start in starts]

    def _generate(
        self, images: Sequence[Image.Image], sampling: Sampling, number: int
    ) -> list[str]:
        """What is generated, without what the model was told, one image's captions together."""
        import torch

        inputs = self._prepare(images, sampling.prompt)
        torch.manual_seed((sampling.seed << 32) + number)
        with torch.inference_mode():
            found = self.model.generate(**inputs, **sampling.options())
        told, repeated = inputs.get("input_ids"), sampling.prompt
        if told is not None and not self.model.config.is_encoder_decoder:
            told = told.repeat_interleave(sampling.count, 0)
            length = told.shape[1]
            if found.shape[1] >= length and bool((found[:, :length] == told).all()):
                found, repeated = found[:, length:], None
        texts = self.texts.batch_decode(found, skip_special_tokens=True)
        return [_without_prompt(" ".join(text.split()), repeated) for text in texts]

    def _prepare(self, images: Sequence[Image.Image], prompt: str | None) -> dict[str, Any]:
        """The model's inputs of some images, on its device and in its precision."""
        told = prompt
        if self.processor is None:
            if prompt is not None:
                raise UserError("--captioner_prompt: this captioner takes images alone")
            inputs = self.images(images=list(images), return_tensors="pt")
        else:
            if getattr(self.processor, "chat_template", None):
                told = _chat(self.processor, prompt or CHAT_PROMPT)
            texts = {} if told is None else {"text": [told] * len(images), "padding": True}
            inputs = self.processor(images=list(images), return_tensors="pt", **texts)
        floats = {"device": self.device, "dtype": self.model.dtype}
        return {
            name: value.to(**floats) if value.is_floating_point() else value.to(self.device)
            for name, value in inputs.items()
        }


def _chat(processor: Any, prompt: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def _without_prompt(text: str, prompt: str | None) -> str:
    told = " ".join((prompt or "").split())
    return text[len(told) :].strip() if told and text.lower().startswith(told.lower()) else text


def load_captioner(name: str, device: torch.device, precision: str) -> Captioner:
    """Load a model: a folder, or a name of the Hub.

    precision: "fp32", "bf16" or "fp16". Raises UserError if there is no such model, if its files
    are neither here nor to be had, or if it does not turn images into text.
    """
    import torch
    from transformers import (
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )

    dtype = getattr(torch, PRECISIONS[precision] or "float32")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
        if hasattr(processor, "image_processor"):
            images, texts = processor.image_processor, processor.tokenizer
        else:
            processor = None
            images, texts = (
                kind.from_pretrained(name) for kind in (AutoImageProcessor, AutoTokenizer)
            )
    except Exception as error:  # the hub, the files and the architecture each raise their own
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"--captioner {name} could not be loaded ({cause}); give a folder or a name of the "
            "Hugging Face Hub of a model that turns images into text, such as "
            "Salesforce/blip2-opt-2.7b, and load it once where the network reaches the Hub"
        ) from error
    texts.padding_side = "left"  # what is generated follows the prompts
    revision = getattr(model.config, "_commit_hash", None)
    return Captioner(model.eval().to(device), processor, images, texts, device, revision)
