"""What generators of real size share: finding a model in a folder or on the hub, text embeddings,
LoRA, attention, decoding, export.

Everything that computes is diffusers' own, transformers' or peft's; these functions open it,
check it, and say in one line what is wrong.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from fastgrpo_kernels import dispatch
from fastgrpo_kernels.patch import fuse
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo.distributed.collectives import rank
from fastgrpo.hub import fetch_files, require_weights
from fastgrpo.policies.text_cache import TextCache, embed_missing, fingerprint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG_FILES = ("model_index.json", "*/config.json", "tokenizer*/*")
"""Of a model in diffusers' format, all that its sizes and its prompts are checked with: some
megabytes at most.
"""
TEXT_FILES = ("model_index.json", "text_encoder*/*", "tokenizer*/*", "scheduler/*")
NETWORK_FILES = ("model_index.json", "transformer/*", "vae/*")
_TORCH_FLASH = ("fa3", "fa4")
_CAST_BY_AUTOCAST = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    *_TORCH_FLASH,
)
"""Attention that runs through torch's scaled_dot_product_attention, whose arguments autocast brings
to one dtype.
"""


@dataclass(frozen=True)
class LoRA:
    """Train a low-rank addition to some linear layers (peft) and leave the model's own weights as
    they are.
    """

    rank: int = 32
    """Rank of the addition B A."""
    alpha: float = 32.0
    """The addition is scaled by alpha / rank."""
    dropout: float = 0.0
    """Must be 0: rollout and update must compute the same bits, so the network is always in eval
    mode, where dropout does nothing.
    """
    target_modules: tuple[str, ...] | None = None
    """Names, or ends of names, of the linear layers; none: those of attention and feed-forward in
    the transformer's blocks.
    """
    seed: int = 0
    """Seed of A; B starts at zero, so that training starts from the model itself."""

    def __post_init__(self) -> None:
        for key, ok, expected in (
            ("rank", self.rank >= 1, "at least 1"),
            ("alpha", self.alpha > 0, "a number above 0"),
            (
                "dropout",
                self.dropout == 0,
                "0: the network is always in eval mode, so that rollout and update compute the same bits",
            ),
            (
                "target_modules",
                self.target_modules is None or len(self.target_modules) > 0,
                "at least one name, or none for the default",
            ),
        ):
            if not ok:
                raise ValueError(
                    f"policy.lora.{key}: expected {expected}, got {getattr(self, key)!r}"
                )


# -------- finding a model


def fetch(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a model in diffusers' format: `model` itself, or a hub id's files that match
    `patterns`, from the hub or its cache.

    Raises:
        FileNotFoundError: neither a folder nor something that the hub has (and shows).
            ValueError: the hub has it and refuses.
    """
    return fetch_files(model, revision, patterns, "policy", "diffusers")


def read_configs(folder: Path, pipeline: type, parts: Mapping[str, type]) -> dict[str, Any]:
    """The configuration of each part of a pipeline, defaults filled in: dicts for diffusers'
    classes, config objects for transformers'.

    parts: by the name in model_index.json, the class that it must be.

    Raises:
        FileNotFoundError: a file is missing. ValueError: another pipeline, or another class of a
            part.
    """
    index = _read_json(folder, "model_index.json")
    expect(
        index.get("_class_name") == pipeline.__name__,
        folder,
        f"a {pipeline.__name__}",
        index.get("_class_name"),
    )
    configs: dict[str, Any] = {"index": index}
    for name, kind in parts.items():
        got = (index.get(name) or [None, None])[1]
        expect(got == kind.__name__, folder, f"a {kind.__name__} as {name}", got)
        config = _read_json(folder, f"{name}/config.json")
        if hasattr(kind, "config_class"):
            configs[name] = kind.config_class.from_dict(config)
        else:
            defaults = {
                p.name: p.default
                for p in inspect.signature(kind).parameters.values()
                if p.default is not p.empty
            }
            configs[name] = defaults | config
    return configs


def expect(ok: bool, folder: Path, wanted: str, got: object) -> None:
    """ValueError that the model in `folder` is not what is wanted."""
    if not ok:
        raise ValueError(f"policy.model: expected {wanted} in {folder}, got {got}")


def latent_shape(
    height: int,
    width: int,
    num_frames: int,
    channels: int,
    vae: tuple[int, int],
    patch: tuple[int, int],
) -> tuple[int, ...]:
    """[C, T, H, W] of a video; vae: its compression in time and space; patch: what the transformer
    further divides these by.

    ValueError: a size that does not divide.
    """
    step = vae[1] * patch[1]
    for name, size in (("height", height), ("width", width)):
        if size % step:
            raise ValueError(f"expected a {name} divisible by {step}, got {size}")
    frames = (num_frames - 1) // vae[0] + 1
    if (num_frames - 1) % vae[0] or frames % patch[0]:
        raise ValueError(f"expected num_frames of {vae[0]} n + 1, got {num_frames}")
    return (channels, frames, height // vae[1], width // vae[1])


def tokens(latent_shape: Sequence[int], patch: Sequence[int]) -> int:
    """Tokens of a latent [C, T, H, W] in patches of [T, H, W]."""
    return math.prod(size // step for size, step in zip(latent_shape[1:], patch, strict=True))


def load_part(
    kind: Any, folder: Path, name: str, dtype: torch.dtype, may_have_more: bool = False
) -> Any:
    """A model of diffusers or transformers from its folder, on the CPU, in `dtype` and eval mode.

    may_have_more: whether the file may hold tensors that the model does not have.

    FileNotFoundError: no safetensors. ValueError: unreadable, or other tensors than the
    configuration says.
    """
    require_weights(folder / name, "policy")
    try:
        module, info = kind.from_pretrained(
            folder, subfolder=name, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"policy.model: expected a readable {kind.__name__} in {folder / name}, got {error}"
        ) from error
    for key in (
        "missing_keys",
        "mismatched_keys",
        *(() if may_have_more else ("unexpected_keys",)),
    ):
        expect(
            not info[key],
            folder / name,
            "the tensors of its configuration",
            f"{key.split('_')[0]} {list(info[key])[:3]}",
        )
    return module.eval()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"policy.model: expected a model in diffusers' format, found no {name} in {folder}"
        ) from error
    except ValueError as error:
        raise ValueError(f"policy.model: expected JSON in {folder / name}, got {error}") from error
    expect(isinstance(content, dict), folder / name, "a JSON object", type(content).__name__)
    return content


# -------- text embeddings


def open_cache(folder: str, model: str, revision: str | None, **settings: object) -> TextCache:
    """The cache of what a model's text encoders make of prompts. settings: what else their output
    depends on.

    Of a local folder the encoders' and tokenizers' files are hashed; of the hub the commit is
    what is known without the weights.
    """
    files = fetch(model, revision, CONFIG_FILES)
    if Path(model).expanduser().is_dir():
        parts = sorted(
            p for p in files.iterdir() if re.fullmatch(r"(text_encoder|tokenizer)(_\d)?", p.name)
        )
        source = {part.name: fingerprint(part) for part in parts}
    else:
        source = {"model": model, "commit": files.name}
    return TextCache(Path(folder), source | {key: str(value) for key, value in settings.items()})


def load_text_pipeline(
    pipeline: Any, model: str, revision: str | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """A pipeline with its text encoders (on `device`, in `dtype`) and tokenizers alone.
    FileNotFoundError, ValueError: as `load_part`.
    """
    folder = fetch(model, revision, TEXT_FILES)
    kinds = {
        name: part[1]
        for name, part in _read_json(folder, "model_index.json").items()
        if name.startswith("text_encoder") and part[1]
    }
    # One by one: the pipeline would fill what the files lack with random numbers.
    encoders = {
        name: load_part(getattr(transformers, kind), folder, name, dtype, may_have_more=True)
        for name, kind in kinds.items()
    }
    tokenizers = {
        file.parent.name: load_tokenizer(file.parent)
        for file in folder.glob("tokenizer*/tokenizer.json")
    }
    parts = encoders | tokenizers | {"transformer": None, "vae": None}
    try:
        return pipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **parts).to(
            device
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"policy.model: expected readable tokenizers in {folder}, got {error}"
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer as its tokenizer.json describes it, where there is one. ValueError: unreadable.

    transformers 5 builds those of some classes anew, from the vocabulary alone:
    LlamaTokenizerFast, HunyuanVideo's, then takes bytes for SentencePiece's pieces and loses
    every space (https://github.com/huggingface/transformers/issues/45488); T5TokenizerFast,
    Wan's, loses the bytes of characters that the vocabulary lacks.
    """
    kind: Any = (
        transformers.PreTrainedTokenizerFast
        if (folder / "tokenizer.json").is_file()
        else transformers.AutoTokenizer
    )
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ValueError(
            f"policy.model: expected a readable tokenizer in {folder}, got {error}"
        ) from error


def embed_texts(
    cache: TextCache,
    texts: Sequence[str],
    load: Callable[[], Any],
    encode: Callable[[Any, str], dict[str, Tensor]],
) -> None:
    """Make the embeddings that `cache` lacks, all ranks together; the pipeline that `load` gives
    lives only while it is needed.
    """
    pipeline = functools.lru_cache(maxsize=1)(load)
    try:
        with torch.no_grad():
            embed_missing(cache, list(dict.fromkeys(texts)), lambda text: encode(pipeline(), text))
    finally:
        pipeline.cache_clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def warn_of_cut_prompts(
    prompts: Sequence[str], tokenizer: Path, limit: int, template: str = "{}"
) -> None:
    """Say, once and from rank 0, how many prompts have more tokens than the text encoder takes: it
    sees their beginning.

    ValueError: an empty prompt, which is the unconditional branch.
    """
    if not all(prompts):
        raise ValueError(
            "expected prompts with words in them, got an empty one, which is the unconditional branch"
        )
    # A tokenizer makes at most one token of a byte, and a few of its own: short prompts need not be
    # tried.
    doubtful = [
        text
        for text in map(template.format, prompts)
        if len(text.encode("utf-8", "surrogatepass")) + 4 > limit
    ]
    if not doubtful or rank() != 0:
        return
    lengths = [len(ids) for ids in load_tokenizer(tokenizer)(doubtful).input_ids]
    cut = sum(length > limit for length in lengths)
    if cut:
        warnings.warn(
            f"{cut} of {len(prompts)} prompts have more than the {limit} tokens that the text encoder takes (up to {max(lengths)}); "
            "their ends are cut off, as the pipeline does. policy.max_sequence_length is the limit",
            stacklevel=2,
        )


# -------- the network


def prepare_transformer(
    transformer: Any,
    device: torch.device,
    lora: LoRA | None,
    lora_targets: Sequence[str],
    attention: str,
    fused: bool | str,
) -> bool:
    """Make a loaded transformer ready to be trained on `device`, in place: LoRA, attention backend,
    fused operations, eval mode.

    lora_targets: ends of names of the linear layers in its blocks that LoRA takes by default.

    Returns:
        Whether the fused operations are in.

    Raises:
        ValueError: `policy.lora`, `policy.attention` or `policy.fused` cannot be had.
    """
    transformer.eval().requires_grad_(lora is None)
    if lora is not None:
        add_lora(transformer, lora, lora_targets)
    swapped = fused_serves(device) if fused == "auto" else bool(fused)
    if swapped:
        fuse(transformer)
    set_attention(transformer, attention, device, swapped)
    return swapped


def use_meta(policy: Any, transformer: Any, vae: Any) -> None:
    """Let a policy `use` a network and a VAE of these classes without weights, on the meta device,
    set as on a GPU with Triton.
    """
    with torch.device("meta"):
        parts = [
            kind.from_config(policy._configs[name])
            for name, kind in (("transformer", transformer), ("vae", vae))
        ]
    policy.attention, policy.fused = "native", policy.fused is not False
    with quiet_diffusers():  # of which nothing is to be kept in fp32
        parts[1].to(DTYPES[policy.vae_dtype])
    policy.use(*parts, torch.device("meta"))


def fused_serves(device: torch.device) -> bool:
    """What `fused: auto` comes to: on a GPU with Triton, where the fused operations are faster; a
    CPU has only their specification.
    """
    return (
        device.type == "cuda"
        and dispatch.select_backend("ln_modulate", torch.empty(0, device=device)) == "triton"
    )


def add_lora(transformer: Any, lora: LoRA, default_targets: Sequence[str]) -> None:
    """Add a seeded, trainable LoRA adapter named `default`; ValueError where peft is missing or no
    layer has such a name.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ValueError(f"policy.lora: needs peft ({error}): pip install peft") from error
    targets = list(lora.target_modules or block_linears(transformer, default_targets))
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": targets}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(lora.seed)
            transformer.add_adapter(LoraConfig(**options, init_lora_weights=True))
    except ValueError as error:
        raise ValueError(f"policy.lora.target_modules: {error}") from error
    layers: list[Any] = [
        module for module in transformer.modules() if isinstance(module, BaseTunerLayer)
    ]
    for layer in layers:
        # peft would copy every bf16 input to the adapter's fp32, which autocast then casts back
        layer.cast_input_dtype_enabled = False
    transformer.eval()


def block_linears(transformer: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the linear layers in the repeated blocks whose names end in one of `ends`."""
    blocks = [
        f"{name}."
        for name, module in transformer.named_modules()
        if type(module).__name__.endswith("TransformerBlock")
    ]
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.endswith(tuple(f".{end}" for end in ends))
        and name.startswith(tuple(blocks))
    ]


def save_transformer(
    transformer: Any, pipeline: Any, folder: Path, weights: Mapping[str, Tensor]
) -> None:
    """Write a state dict of `transformer`, whole and on the CPU, so that diffusers takes it;
    `transformer` itself may be sharded.

    Without LoRA a folder for `from_pretrained`; with it pytorch_lora_weights.safetensors for the
    pipeline's `load_lora_weights`, rank and alpha included. ValueError: names or shapes are not
    those of the transformer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if getattr(transformer, "peft_config", None):
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(
            transformer, state_dict=dict(weights), adapter_name="default"
        )
        config = transformer.peft_config["default"].to_dict()
        layers = {name: tensor.contiguous() for name, tensor in layers.items()}
        pipeline.save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config
        )
        return
    kinds: tuple[Any, ...] = type(transformer).__mro__
    kind = next(
        kind for kind in kinds if kind.__module__.startswith("diffusers.")
    )  # fully_shard puts a class of its own above it
    config = {
        key: value for key, value in transformer.config.items() if key != "_name_or_path"
    }  # a place on this machine
    with init_empty_weights():
        whole = kind.from_config(config)
    try:
        whole.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights to save are not those of the transformer: {error}"
        ) from error
    whole.save_pretrained(folder)


# -------- attention


def set_attention(transformer: Any, name: str, device: torch.device, fused: bool) -> None:
    """Choose the attention of a transformer: a backend of diffusers, or FlashAttention-3 or -4
    through torch (`fa3`, `fa4`).

    Raises:
        ValueError: unknown, not installed, without a backward, or not for what reaches it under
            autocast.
    """
    names = [*_TORCH_FLASH, *sorted(backend.value for backend in AttentionBackendName)]
    if name not in names:
        raise ValueError(f"policy.attention: expected one of {', '.join(names)}, got {name!r}")
    if device.type == "cuda" and not fused and name not in _CAST_BY_AUTOCAST:
        raise ValueError(
            f"policy.attention: {name} takes q, k and v of one 16-bit dtype, but under autocast diffusers' norms of q and k give fp32; "
            "set policy.fused to true (or attention to native)"
        )
    try:
        backend = _activate(name)
        with (
            attention_backend(),
            quiet_diffusers(),
        ):  # the first ends what set_attention_backend also does to the process's other models
            transformer.set_attention_backend(backend)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = 1, 16, 1, transformer.config.attention_head_dim
        q, k, v = (
            torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
        )
        torch.autograd.grad(
            dispatch_attention_fn(q, k, v, backend=AttentionBackendName(backend)).sum(), [q, k, v]
        )
    # whatever a package says that is missing, too old, not for this device or without a backward
    except Exception as error:
        raise ValueError(
            f"policy.attention: {name} does not run forward and backward on {device}: {error}"
        ) from error


def describe_attention(
    transformer: Any,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    batch: int,
    masked: bool,
) -> str:
    """What serves this transformer's attention on `device`: the backend's name, and the operators
    that its forward comes down to.

    lengths: of queries and keys, for each kind of attention. masked: with a mask over the keys.
    """
    processors: list[Any] = [getattr(module, "processor", None) for module in transformer.modules()]
    backend = next(p._attention_backend for p in processors if hasattr(p, "_attention_backend"))
    heads, channels, found = (
        transformer.config.num_attention_heads,
        transformer.config.attention_head_dim,
        dict[str, None](),
    )
    for queries, keys in lengths:
        q, k = (
            torch.zeros(batch, n, heads, channels, dtype=dtype, device=device, requires_grad=True)
            for n in (queries, keys)
        )
        mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device) if masked else None
        with _Operators() as operators:
            dispatch_attention_fn(q, k, k, attn_mask=mask, backend=backend)
        found |= dict.fromkeys(
            name for name in operators.names if re.search(r"attention|attn|flash", name)
        )
    return f"{getattr(backend, 'value', backend)} ({', '.join(found) or 'no fused kernel'})"


class _Operators(TorchDispatchMode):
    """The names of the operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _activate(name: str) -> str:
    """The backend of diffusers for a name, FlashAttention-3 or -4 switched on in torch where the
    name asks for it.
    """
    if name not in _TORCH_FLASH:
        return name
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise ValueError("this torch has no activate_flash_attention_impl")
    activate(name.upper())
    return "_native_flash"


# -------- others


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warnings, for what is as it should be."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def to_frames(video: Tensor) -> Tensor:
    """What a VAE decoded, [1, 3, T, H, W] about [-1, 1], as frames [T, 3, H, W] fp32 in [0, 1],
    never rounded to 8 bits.
    """
    frames: Tensor = VideoProcessor().postprocess_video(video.float(), output_type="pt")
    return frames[0]
