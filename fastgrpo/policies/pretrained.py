"""What generators of diffusers share: loading, text embeddings, LoRA, fused blocks, export.

All that computes is diffusers' own, transformers' or peft's.
"""

# No `from __future__ import annotations`: jsonargparse reads the fields' types from subclasses in
# other files, where their names are unknown.

import functools
import gc
import math
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgrpo.distributed.collectives import rank
from fastgrpo.errors import UserError, require
from fastgrpo.interfaces import Conditioning, Policy
from fastgrpo.policies.attention import describe_attention, set_attention
from fastgrpo.policies.fused import fuse
from fastgrpo.policies.lora import LoRA, add_lora, has_lora
from fastgrpo.policies.model_files import (
    CONFIG_FILES,
    NETWORK_FILES,
    build_part,
    fetch,
    load_part,
    load_text_pipeline,
    load_tokenizer,
    quiet_diffusers,
    read_configs,
)
from fastgrpo.policies.text_cache import TextCache, embed_missing, fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Compression(NamedTuple):
    """How a video becomes tokens.

    Attributes:
        channels: Of a latent.
        time: Frames per frame of a latent, after the first.
        space: Pixels per pixel of a latent, in height and in width.
        patch: Pixels [T, H, W] of a latent per token.
    """

    channels: int
    time: int
    space: int
    patch: Sequence[int]


@dataclass(eq=False)
class DiffusersPolicy(Policy):
    """A pipeline of diffusers: its transformer is trained, its VAE decodes, and its text encoders
    run once per prompt.
    """

    model: str = field()
    """A folder in diffusers' format, or a hub id OWNER/NAME."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    fps: int = 15
    """Frames per second of a video."""
    max_sequence_length: int = 512
    """Tokens of a prompt; a longer one is cut off, as the pipeline does."""
    text_cache: str = "text_embeddings"
    """Folder of the text embeddings."""
    text_dtype: Literal["fp32", "bf16"] = "bf16"
    """dtype of the text encoders."""
    attention: str = "native"
    """A backend of diffusers (`native`: torch's own choice), or `fa3`, `fa4` where FlashAttention-3
    or -4 is installed.
    """
    attention_as_in_training: bool = True
    """Compute attention in a rollout by the request that training makes of it, log-sum-exp
    included, so that one kernel serves both. False leaves the request to torch, to measure whether
    another kernel serves then: watch ratio_drift.
    """
    fused: bool | Literal["auto"] = "auto"
    """Whether the operations of fastgrpo_kernels do the blocks' pointwise work; auto: where they
    are compiled, on a GPU with Triton and on a CPU with csrc/.
    """
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """dtype of the VAE."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, which takes less memory and blends their edges. Without it, the
    decode is exact.
    """
    lora: LoRA | None = None
    """Train a LoRA instead of all weights."""

    lora_targets: ClassVar[tuple[str, ...]]
    """Ends of names of the linear layers in the blocks that LoRA takes by default."""
    attends_with_mask: ClassVar[bool] = False
    """Whether several videos at a time attend with a mask over the text."""

    # Properties, since diffusers takes seconds to import: a recipe is read, and its help shown,
    # without it.
    @property
    @abstractmethod
    def pipeline_class(self) -> Any:
        """The class of the pipeline, as model_index.json must name it."""

    @property
    @abstractmethod
    def part_classes(self) -> dict[str, Any]:
        """The classes of its transformer, VAE and text encoders, by their names in
        model_index.json.
        """

    @property
    def prompt_template(self) -> str:
        """What the pipeline puts around a prompt."""
        return "{}"

    @property
    def template_length(self) -> int:
        """Tokens of the template that the pipeline cuts off again."""
        return 0

    def __post_init__(self) -> None:
        for name in ("fps", "max_sequence_length"):
            number = getattr(self, name)
            require(number >= 1, f"policy.{name}", "at least 1", number)
        self.transformer: Any
        self.vae: Any
        self.is_fused: bool
        self._device: torch.device

    @abstractmethod
    def check_configs(self, folder: Path, configs: dict[str, Any]) -> None:
        """Check that the parts of the model in `folder` (see `read_configs`) fit each other.

        Raises:
            UserError: They do not.
        """

    @abstractmethod
    def compression(self) -> Compression:
        """The sizes in `configs`."""

    @abstractmethod
    def unscale(self, latents: Tensor) -> Tensor:
        """fp32 latents, as the VAE decodes them."""

    @abstractmethod
    def attention_lengths(self, num_tokens: int) -> list[tuple[int, int]]:
        """Numbers of queries and keys of each kind of attention, for a video of `num_tokens`."""

    @abstractmethod
    def encode_prompt(self, pipeline: Any, text: str, device: torch.device) -> dict[str, Tensor]:
        """What the pipeline makes of one text, cut to its own length."""

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """[C, T, H, W]; reads only the model's configuration files."""
        compression = channels, time, space, patch = self.compression()
        sizes = [channels, time, space, *(patch if isinstance(patch, Sequence) else [patch])]
        are_sizes = len(sizes) == 6 and all(isinstance(n, int) and n > 0 for n in sizes)
        expected = "sizes of latents and patches, whole numbers above 0, in the config.json files"
        require(are_sizes, "policy.model", expected, compression)
        step = space * patch[1]
        require(height % step == 0, "height", f"a number divisible by {step}", height)
        require(width % step == 0, "width", f"a number divisible by {step}", width)
        frames = (num_frames - 1) // time + 1
        fits = (num_frames - 1) % time == 0 and frames % patch[0] == 0
        require(fits, "num_frames", f"a number {time} n + 1", num_frames)
        return (channels, frames, height // space, width // space)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse an empty prompt, the unconditional branch; warn, once and from rank 0, of prompts
        with more tokens than `max_sequence_length`.
        """
        require(all(prompts), "prompts", "prompts with words in them", "an empty one")
        folder = fetch(self.model, self.revision, CONFIG_FILES) / "tokenizer"
        limit = self.max_sequence_length + self.template_length
        texts = [self.prompt_template.format(prompt) for prompt in prompts]
        # A tokenizer makes at most one token per byte, and a few of its own: short prompts need
        # not be tried.
        doubtful = [t for t in texts if len(t.encode("utf-8", "surrogatepass")) + 4 > limit]
        if not doubtful or rank() != 0:
            return
        lengths = [len(ids) for ids in load_tokenizer(folder)(doubtful).input_ids]
        num_cut = sum(length > limit for length in lengths)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {len(prompts)} prompts have more than the {limit} tokens that the "
                f"text encoder takes (up to {max(lengths)}); their ends are cut off, as the "
                "pipeline does. policy.max_sequence_length is the limit",
                stacklevel=2,
            )

    def embed(self, prompts: Sequence[str], device: torch.device) -> None:
        """Make, once, the text embeddings of these prompts and of the unconditional branch."""

        @functools.lru_cache(maxsize=1)
        def pipeline() -> Any:  # only loaded where an embedding is missing
            dtype = DTYPES[self.text_dtype]
            return load_text_pipeline(self.pipeline_class, self.model, self.revision, dtype, device)

        texts = [self.text_of(prompt) for prompt in ("", *prompts)]
        try:
            with torch.no_grad():
                embed_missing(
                    self.cache, texts, lambda text: self.encode_prompt(pipeline(), text, device)
                )
        finally:
            pipeline.cache_clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def load(self, device: torch.device) -> None:
        """Load the VAE onto `device`, and the transformer's fp32 master weights onto rank 0's CPU.
        On other ranks the transformer is on the meta device.
        """
        _ = self.configs  # checked before anything is allocated
        folder = fetch(self.model, self.revision, NETWORK_FILES)
        kinds, vae_dtype = self.part_classes, DTYPES[self.vae_dtype]
        if rank() == 0:
            transformer = load_part(kinds["transformer"], folder, "transformer", torch.float32)
        else:
            with torch.device("meta"):
                transformer = build_part(kinds["transformer"], self.configs["transformer"])
        self.use(transformer, load_part(kinds["vae"], folder, "vae", vae_dtype), device)

    def new_networks(self) -> tuple[Any, Any]:
        """A transformer and a VAE with random weights, on torch's default device."""
        transformer, vae = (
            build_part(self.part_classes[name], self.configs[name])
            for name in ("transformer", "vae")
        )
        with quiet_diffusers():  # it warns of modules that should stay fp32; here none should
            vae.to(DTYPES[self.vae_dtype])
        return transformer, vae

    def use(self, transformer: Any, vae: Any, device: torch.device) -> None:
        """Take networks that are in memory, each in its dtype: what `load` does after reading.

        Raises:
            UserError: `lora`, `attention` or `fused` cannot be had.
        """
        transformer.eval().requires_grad_(self.lora is None)
        if self.lora is not None:
            self.loaded_by = "load_lora_weights"
            add_lora(transformer, self.lora, self.lora_targets)
        self.is_fused = fuse(transformer, self.fused, device)
        set_attention(
            transformer, self.attention, device, self.is_fused, self.attention_as_in_training
        )
        self.transformer = transformer
        self.vae = vae.eval().requires_grad_(False).to(device)
        if self.vae_tiling:
            self.vae.enable_tiling()
        self._device = device

    def load_meta(self) -> Conditioning:
        """Take networks without weights, on the meta device, set up as on a GPU with Triton.
        Subclasses add the conditioning.
        """
        with torch.device("meta"):
            networks = self.new_networks()
        self.attention, self.fused = "native", self.fused is not False
        self.use(*networks, torch.device("meta"))
        return {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `Policy.decode`, one video after the other; never rounded to 8 bits."""
        vae = self.vae
        videos = (
            vae.decode(x[None].to(vae.dtype), return_dict=False)[0]
            for x in self.unscale(latents.float())
        )
        return torch.stack([to_frames(video) for video in videos])

    def describe_attention(
        self, latent_shape: tuple[int, ...], dtype: torch.dtype, batch_size: int
    ) -> str:
        patch = self.compression().patch
        sizes = (size // step for size, step in zip(latent_shape[1:], patch, strict=True))
        lengths, masked = self.attention_lengths(math.prod(sizes)), self.attends_with_mask
        return describe_attention(
            self.transformer, lengths, dtype, self._device, batch_size, masked and batch_size > 1
        )

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write these weights of `transformer` for diffusers' `from_pretrained`, or those of its
        LoRA for the pipeline's `load_lora_weights`, with rank and alpha.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if has_lora(self.transformer):
            from peft import get_peft_model_state_dict

            layers = get_peft_model_state_dict(
                self.transformer, state_dict=dict(weights), adapter_name="default"
            )
            self.pipeline_class.save_lora_weights(
                folder,
                transformer_lora_layers={name: t.contiguous() for name, t in layers.items()},
                transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
            )
            return
        config = dict(self.transformer.config)
        config.pop("_name_or_path", None)  # a place on this machine
        from accelerate import init_empty_weights

        with init_empty_weights():  # `transformer` itself may be sharded
            whole = self.part_classes["transformer"].from_config(config)
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(folder)

    def text_of(self, prompt: str) -> str:
        """The text that is encoded for a prompt; "" is the unconditional branch."""
        return prompt

    def padded(self, rows: Sequence[Tensor]) -> Tensor:
        """Stack text embeddings [n, C] to [B, max_sequence_length, C] fp32, zero after their ends,
        on the device.
        """
        length = self.max_sequence_length
        padded = [F.pad(row.float(), (0, 0, 0, length - len(row))) for row in rows]
        return torch.stack(padded).to(self._device)

    def cleaning(self) -> dict[str, str]:
        """What else decides what the text encoders make of a prompt."""
        return {}

    @functools.cached_property
    def cache(self) -> TextCache:
        """The embeddings of this model's text encoders, under these settings.

        Of a local folder, the encoders' and tokenizers' files are hashed; of the hub, the commit is
        what is known without the weights.
        """
        folder = fetch(self.model, self.revision, CONFIG_FILES)
        identity = {"model": self.model, "commit": folder.name}
        if os.path.isdir(os.path.expanduser(self.model)):
            parts = sorted(folder.iterdir())
            is_text = re.compile(r"(text_encoder|tokenizer)(_\d)?").fullmatch
            # Every byte: an encoder may differ in one token's row of its embedding.
            identity = {p.name: fingerprint(p, whole=True) for p in parts if is_text(p.name)}
        identity |= {
            "encoder": f"{self.pipeline_class.__name__}.encode_prompt",
            "length": str(self.max_sequence_length),
            "dtype": self.text_dtype,
        }
        return TextCache(Path(self.text_cache), identity | self.cleaning())

    @functools.cached_property
    def configs(self) -> dict[str, Any]:
        """The configuration of each part, checked; needs no weights."""
        folder = fetch(self.model, self.revision, CONFIG_FILES)
        configs = read_configs(folder, self.pipeline_class, self.part_classes)
        try:
            self.check_configs(folder, configs)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"policy.model: expected the values of a {self.pipeline_class.__name__} in the "
                f"config.json files of {folder}, got {type(error).__name__}: {error}"
            ) from error
        return configs


def to_frames(video: Tensor) -> Tensor:
    """Frames [T, 3, H, W] fp32 in [0, 1] of what a VAE decoded, [1, 3, T, H, W] about [-1, 1]."""
    from diffusers.video_processor import VideoProcessor

    frames: Tensor = VideoProcessor().postprocess_video(video.float(), output_type="pt")
    return frames[0]
