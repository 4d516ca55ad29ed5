"""VideoAlign in its published layout: a tiny Qwen2-VL with LoRA beside its weights, its tokenizer,
settings and prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fastgrpo.rewards.models.video_align import VideoAlign
from fastgrpo.rewards.models.video_align_files import REWARD_TOKENS

PROMPT = (
    "\nGrade how it looks: <|VQ_reward|>\nmoves: <|MQ_reward|>  \n"
    "and fits - {text_prompt}\nhere: <|TA_reward|>\nEND\n"
)
MEAN, STD = (0.5, -0.25, 1.0), (2.0, 0.5, 1.5)
MEAN, STD = (0.5, -0.25, 1.0), (2.0, 0.5, 1.5)


@dataclass(frozen=True)
class Source:
    """A published VideoAlign.

    Attributes:
        folder: With `reward` as published, `base` and `prompt_template.py`.
        tuned: The network, with peft's own LoRA.
        tokenizer: Its tokenizer.
    """

    folder: Path
    tuned: Any
    tokenizer: Any

    @property
    def checkpoint(self) -> Path:
        """The folder of weights and tokenizer."""
        return self.folder / "reward" / "checkpoint-20"

    def judge(self, reward: Path | None = None, **arguments: Any) -> VideoAlign:
        """A judge of it, or of a changed copy `reward`; not loaded."""
        return VideoAlign(
            **{
                "prompt_file": str(self.folder / "prompt_template.py"),
                "model": str(reward or self.folder / "reward"),
                "base": str(self.folder / "base"),
                "dtype": "fp32",
                **arguments,
            }
        )


def publish(qwen_folder: Path, folder: Path) -> Source:
    """Write a VideoAlign into `folder`, with the tokenizer of `qwen_folder`."""
    checkpoint = folder / "reward" / "checkpoint-20"
    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    # as Qwen/Qwen2-VL-2B-Instruct has it: the language model's settings at the top, a vocabulary
    # beyond the tokenizer's
    flat = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "initializer_range": 0.1,
        },
    }
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(flat))
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder / "base"))
    model.resize_token_embeddings(len(tokenizer))
    model.rm_head = nn.Linear(64, 1, bias=False)
    targets = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and "language_model" in name
    ]
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    for name, part in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(part, std=0.1)
    old = {
        name.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): value
        for name, value in tuned.state_dict().items()
    }
    torch.save(old, checkpoint / "model.pth")
    settings = {
        "data_config": {
            "fps": 2,
            "max_frame_pixels": 200704,
            "num_frames": None,
            "eval_dim": ["VQ", "MQ", "TA"],
            "sample_type": "uniform",
            "prompt_template_type": "detailed_special",
            "meta_data": "elsewhere.csv",
        },
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct",
            "output_dim": 1,
            "use_special_tokens": True,
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": 4,
            "lora_alpha": 8,
            "use_rslora": False,
        },
        "inference_config": {
            f"{name}_{what}": value[i]
            for i, name in enumerate(("VQ", "MQ", "TA"))
            for what, value in (("mean", MEAN), ("std", STD))
        },
    }
    (folder / "reward" / "model_config.json").write_text(json.dumps(settings))
    (folder / "prompt_template.py").write_text(
        '"""Prompts."""\nimport nothing_that_is\nOTHER = "{text_prompt}"\n'
        f'BEST = """{PROMPT}"""\n'
    )
    return Source(folder, tuned, tokenizer)
