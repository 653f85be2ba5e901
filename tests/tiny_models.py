"""Nine vision-language families in miniature: real processors, untrained models of about 100,000 parameters, offline.

Import this before loading a folder that `build` wrote: where torchvision is absent, transformers cannot make the video
processors that six of the families have, and their processors are registered here without one.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

Built = tuple[ProcessorMixin, PreTrainedModel]

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SQUARE = {"height": 28, "width": 28}
PICTURES_PER_ROW = (1, 3, 0, 2)  # so that each batch of four has every kind of row
SIZES = ((40, 56), (64, 32), (28, 28))
CHAT_TEMPLATE = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}
{% if part.type == "image" %}PICTURE{% else %}{{ part.text }}{% endif %}
{% endfor %}
{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

processing_smolvlm.num2words = processing_smolvlm.num2words or str  # an extra package, for the captions of videos only


class ImageOnly:
    """The first base of a processor that shall have no video processor.

    Transformers asks the class for its parts, and hands them to `__init__` in this order.
    """

    video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM reads these two without any video

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class ImageOnlySmolVLMProcessor(ImageOnly, hf.SmolVLMProcessor):
    """Also gives `video_processor` a default, which the other families have."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        video_processor: None = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, image_seq_len, chat_template)


VIDEO_PROCESSORS = {
    "InternVL": "InternVLVideoProcessor",
    "Qwen2VL": "Qwen2VLVideoProcessor",
    "Qwen2_5_VL": "Qwen2VLVideoProcessor",
    "Qwen3VL": "Qwen3VLVideoProcessor",
    "LlavaOnevision": "LlavaOnevisionVideoProcessor",
    "SmolVLM": "SmolVLMVideoProcessor",
}
IMAGE_ONLY = {
    family: type(f"ImageOnly{family}Processor", (ImageOnly, getattr(hf, f"{family}Processor")), {})
    for family in VIDEO_PROCESSORS
} | {"SmolVLM": ImageOnlySmolVLMProcessor}
if not is_torchvision_available():
    for _family, _processor in IMAGE_ONLY.items():
        AutoProcessor.register(getattr(hf, f"{_family}Config"), _processor, exist_ok=True)


def assemble(family: str, picture_token: str, processor: dict[str, Any], model: dict[str, Any]) -> Built:
    """Processor and model from their settings; `picture_token` stands for a picture in the chat template."""
    processor["chat_template"] = CHAT_TEMPLATE.replace("PICTURE", picture_token)
    processor_class = getattr(hf, f"{family}Processor")
    if family in VIDEO_PROCESSORS and is_torchvision_available():
        processor["video_processor"] = getattr(hf, VIDEO_PROCESSORS[family])()
    elif family in VIDEO_PROCESSORS:
        processor_class = IMAGE_ONLY[family]
    config = getattr(hf, f"{family}Config")(**model)
    return processor_class(**processor), getattr(hf, f"{family}ForConditionalGeneration")(config)


def byte_tokenizer(others: Iterable[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that any text can be encoded, and special ones: `others`, and those with a name."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, START, END, *named.values(), *others])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="left", extra_special_tokens=named
    )


def text_config(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    return {**LAYERS, **sizes, **ids, **more}


def internvl() -> Built:
    tokenizer = byte_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = {
        "image_processor": GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=4),
        "tokenizer": tokenizer,
        "image_seq_length": 1,
    }
    model = {
        "vision_config": {**LAYERS, "image_size": [28, 28], "patch_size": [14, 14]},
        "text_config": text_config(tokenizer, model_type="qwen2"),
        "image_token_id": tokenizer.context_image_token_id,
    }
    return assemble("InternVL", "<IMG_CONTEXT>\n", processor, model)


def qwen_vl(family: str, sections: list[int], **tower: Any) -> Built:
    """Of any generation; `sections` says how rotary frequencies are dealt out to time, height and width."""
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = byte_tokenizer(**names)
    area = (2 * tower["patch_size"]) ** 2  # in pixels, of what becomes one token
    sizes = {"min_pixels": area, "max_pixels": 4 * area, "patch_size": tower["patch_size"]}
    processor = {"image_processor": Qwen2VLImageProcessorPil(**sizes), "tokenizer": tokenizer}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}
    model = {
        "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 4, **tower},
        "text_config": text_config(tokenizer, head_dim=8, rope_parameters=rope),
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names},
    }
    return assemble(family, "<|vision_start|><|image_pad|><|vision_end|>", processor, model)


def qwen2_vl() -> Built:
    return qwen_vl("Qwen2VL", [1, 1, 2], patch_size=14, embed_dim=32, mlp_ratio=2)


def qwen2_5_vl() -> Built:
    tower = {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    return qwen_vl("Qwen2_5_VL", [1, 1, 2], patch_size=14, **tower)


def qwen3_vl() -> Built:
    tower = {"intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 16}
    return qwen_vl("Qwen3VL", [2, 1, 1], patch_size=16, deepstack_visual_indexes=[0], **tower)


def llava() -> Built:
    tokenizer = byte_tokenizer(image_token="<image>")
    processor = {
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
        "tokenizer": tokenizer,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    model = {
        "vision_config": {**LAYERS, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
        "text_config": text_config(tokenizer, model_type="llama"),
        "image_token_id": tokenizer.image_token_id,
    }
    return assemble("Llava", "<image>\n", processor, model)


def llava_onevision() -> Built:
    tokenizer = byte_tokenizer(image_token="<image>", video_token="<video>")
    tilings = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = {
        "image_processor": LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=tilings),
        "tokenizer": tokenizer,
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
    }
    tower = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    model = {
        "vision_config": {**LAYERS, **tower},
        "text_config": text_config(tokenizer, model_type="qwen2"),
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "image_grid_pinpoints": tilings,
    }
    return assemble("LlavaOnevision", "<image>\n", processor, model)


def idefics(family: str, image_processor: type) -> Built:
    """Idefics3 or SmolVLM, which differ in their processors only."""
    tokenizer = byte_tokenizer(
        [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)],
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    processor = {
        "image_processor": image_processor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        "tokenizer": tokenizer,
        "image_seq_len": 4,
    }
    model = {
        "vision_config": {**LAYERS, "image_size": 32, "patch_size": 8},
        "text_config": text_config(tokenizer, model_type="llama"),
        "image_token_id": tokenizer.image_token_id,
    }
    return assemble(family, "<image>", processor, model)


def idefics3() -> Built:
    return idefics("Idefics3", Idefics3ImageProcessorPil)


def smolvlm() -> Built:
    return idefics("SmolVLM", SmolVLMImageProcessorPil)


def gemma3() -> Built:
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(**names)
    processor = {
        "image_processor": Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=4),
        "tokenizer": tokenizer,
        "image_seq_length": 4,
    }
    model = {
        "vision_config": {**LAYERS, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        "text_config": text_config(tokenizer, head_dim=8, sliding_window=64),
        "mm_tokens_per_image": 4,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names},
    }
    return assemble("Gemma3", "<start_of_image>", processor, model)


FAMILIES: dict[str, Callable[[], Built]] = {
    family.__name__: family
    for family in (internvl, qwen2_vl, qwen2_5_vl, qwen3_vl, llava, llava_onevision, idefics3, smolvlm, gemma3)
}


def build(name: str, folder: Path) -> None:
    """Saves a family's processor, and its model with the same weights every time."""
    torch.manual_seed(0)
    processor, model = FAMILIES[name]()
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> Image.Image:
    """Random noise, `size` pixels wide and high."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def preference_rows(num_pairs: int = 8) -> list[dict[str, Any]]:
    """TRL's conversational pairs with one picture, three of different sizes, none, two, and so on."""
    return [_preference_row(index, PICTURES_PER_ROW[index % 4]) for index in range(num_pairs)]


def _preference_row(index: int, num_pictures: int) -> dict[str, Any]:
    return {
        "images": [picture(10 * index + place, SIZES[place]) for place in range(num_pictures)],
        "prompt": [{"role": "user", "content": f"Question {index}: how many?"}],
        "chosen": [{"role": "assistant", "content": f"There are {num_pictures}."}],
        "rejected": [{"role": "assistant", "content": "None" + "!" * (1 + index % 3)}],
    }
