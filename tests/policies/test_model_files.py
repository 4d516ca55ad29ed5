"""Models in diffusers' format that cannot be taken, in a folder or on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from fastgrpo.policies import model_files, pretrained
from fastgrpo.policies.wan import WanPolicy

CPU = torch.device("cpu")


PROMPTS = ["a red ball", "two red balls roll to the left"]


LENGTH = 64


@pytest.fixture(scope="module")
def make(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WanPolicy]:
    """make(lora=...): a loaded policy whose prompts are embedded."""
    cache = tmp_path_factory.mktemp("cache")

    def loaded(**options: Any) -> WanPolicy:
        policy = WanPolicy(
            str(wan_folder),
            max_sequence_length=LENGTH,
            text_cache=str(cache),
            text_dtype="fp32",
            **options,
        )
        policy.embed(PROMPTS, CPU)
        policy.load(CPU)
        return policy

    return loaded


@pytest.fixture(scope="module")
def policy(make: Callable[..., WanPolicy]) -> WanPolicy:
    return make()


@pytest.fixture
def folder(wan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_folder, tmp_path / "wan"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_configuration_files_are_enough_to_check_a_run(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    policy = WanPolicy(str(folder))
    assert policy.latent_shape(32, 48, 9) == (16, 3, 4, 6)
    policy.check_prompts(["x" * 10])
    with pytest.raises(
        FileNotFoundError, match=r"policy.model: expected safetensors in .*transformer"
    ):
        policy.load(CPU)
    with pytest.raises(
        FileNotFoundError, match=r"policy.model: expected safetensors in .*text_encoder"
    ):
        policy.embed(PROMPTS, CPU)


@pytest.mark.parametrize(
    ("file", "values", "problem"),
    [
        (
            "model_index.json",
            {"_class_name": "WanImageToVideoPipeline"},
            "a WanPipeline, got 'WanImageToVideoPipeline'",
        ),
        (
            "model_index.json",
            {"transformer": ["diffusers", "FluxTransformer2DModel"]},
            "WanTransformer3DModel as transformer",
        ),
        ("model_index.json", {"vae": None}, "AutoencoderKLWan as vae, got None"),
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            r"Wan2.1's one transformer.*Wan2.2",
        ),
        ("model_index.json", {"expand_timesteps": True}, "one time step per video"),
        (
            "transformer/config.json",
            {"in_channels": 36},
            r"the VAE's 16 channels.* got .*'in_channels': 36",
        ),
        ("transformer/config.json", {"text_dim": 4096}, "text_dim 32, got 4096"),
        ("transformer/config.json", {"image_dim": 1280}, "text-to-video"),
        ("vae/config.json", {"latents_mean": [0.0]}, "'latents_mean': 1"),
    ],
)
def test_another_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, values: dict[str, Any], problem: str
) -> None:
    edit(folder / file, **values)
    monkeypatch.setattr(
        pretrained, "load_part", lambda *_: pytest.fail("allocated before the check")
    )
    for check in (lambda p: p.load(CPU), lambda p: p.latent_shape(32, 48, 9)):
        with pytest.raises(ValueError, match=f"policy.model: .*expected .*{problem}"):
            check(WanPolicy(str(folder)))


def test_defaults_of_an_old_configuration_are_filled_in(folder: Path) -> None:
    config = json.loads((folder / "vae" / "config.json").read_text())
    del config["scale_factor_temporal"], config["scale_factor_spatial"], config["latents_mean"]
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    assert WanPolicy(str(folder)).latent_shape(32, 48, 9) == (16, 3, 4, 6)
    assert (
        model_files.read_configs(folder, WanPipeline, {"vae": AutoencoderKLWan})["vae"][
            "latents_mean"
        ][0]
        == -0.7571
    )


def test_damaged_weights(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"policy.model: expected a readable WanTransformer3DModel"
    ):
        WanPolicy(str(folder)).load(CPU)
    save_file(
        {name: tensor for name, tensor in whole.items() if name != "proj_out.weight"},
        weights,
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"policy.model: .*{'missing': \['proj_out.weight'\]}"):
        WanPolicy(str(folder)).load(CPU)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "b.safetensors"}})
    )
    with pytest.raises(FileNotFoundError, match=r"policy.model: .* found no b.safetensors"):
        WanPolicy(str(folder)).load(CPU)
    for content in ("[]", "{", '{"weight_map": 3}', "{}"):
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            content
        )
        with pytest.raises(ValueError, match=r"policy.model: expected JSON with a weight_map"):
            WanPolicy(str(folder)).load(CPU)
    (folder / "text_encoder" / "config.json").write_text('{"d_model": "wide"}')
    with pytest.raises(ValueError, match=r"policy.model: .*config"):
        WanPolicy(str(folder)).load(CPU)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": 5}))
    with pytest.raises(ValueError, match=r"expected a AutoencoderKLWan as vae, got 5"):
        WanPolicy(str(folder)).load(CPU)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match=r"policy.model: expected JSON in"):
        WanPolicy(str(folder)).load(CPU)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "num_layers", "2"),
        ("transformer", "num_attention_heads", 0),
        ("transformer", "attention_head_dim", 23),  # an assertion without words
        ("transformer", "rope_max_seq_len", "1024"),
        ("transformer", "patch_size", [1, 0, 2]),
        ("transformer", "patch_size", "122"),
        ("transformer", "patch_size", 2),
        ("vae", "scale_factor_temporal", "4"),
        ("vae", "scale_factor_spatial", -8),
        ("vae", "dim_mult", []),
    ],
)
def test_a_value_that_cannot_be_is_one_line(
    folder: Path, part: str, key: str, value: object
) -> None:
    """For sizes, for `plan`, and for the ranks with and without weights."""
    edit(folder / part / "config.json", **{key: value})

    def plan() -> None:
        policy = WanPolicy(str(folder))
        policy.latent_shape(32, 48, 9)
        policy.load_meta()

    with pytest.raises(ValueError, match=r"^policy\.model: expected "):
        plan()
    if part == "transformer":
        with pytest.raises(ValueError, match=r"^policy\.model: expected "):
            WanPolicy(str(folder)).load(CPU)


def test_a_part_without_weights_has_the_tensors_of_the_file(folder: Path) -> None:
    kind = WanPolicy(str(folder)).part_classes["transformer"]
    with torch.device("meta"):
        network = model_files.build_part(kind, WanPolicy(str(folder)).configs["transformer"])
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(parameter.is_meta for parameter in network.parameters())
    assert {name: p.shape for name, p in network.named_parameters()} == {
        name: tensor.shape for name, tensor in saved.items()
    }


def test_a_pickle_beside_other_safetensors_is_not_read(folder: Path) -> None:
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match=r"transformer, got .*diffusion_pytorch_model.safetensors"):
        WanPolicy(str(folder)).load(CPU)


def test_damaged_text_encoder(folder: Path, tmp_path: Path) -> None:
    """transformers itself would fill what is missing with random numbers; more does no harm."""
    weights = folder / "text_encoder" / "model.safetensors"
    whole = load_file(weights)

    def embed() -> None:
        WanPolicy(
            str(folder), max_sequence_length=LENGTH, text_cache=str(tmp_path / "cache")
        ).embed(PROMPTS, CPU)

    save_file(
        {
            name: tensor
            for name, tensor in whole.items()
            if "block.1.layer.0.SelfAttention.q" not in name
        },
        weights,
        {"format": "pt"},
    )
    with pytest.raises(
        ValueError,
        match=r"policy.model: .*text_encoder: .*'missing': \['encoder.block.1.layer.0.*\.q",
    ):
        embed()
    save_file(whole | {"more": torch.ones(1)}, weights, {"format": "pt"})
    embed()
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"policy.model: expected a readable UMT5EncoderModel in .*text_encoder"
    ):
        embed()
    weights.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"policy.model: expected safetensors in .*text_encoder"
    ):
        embed()


def test_a_tokenizer_is_taken_as_it_was_saved(folder: Path) -> None:
    """Of a T5TokenizerFast, such as UMT5's, transformers 5 makes one without the bytes of
    characters that the vocabulary lacks.
    """
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<s>", 0.0),
        ("<unk>", 0.0),
        *((f"<0x{i:02X}>", -20.0) for i in range(256)),
        ("a", -1.0),
    ]
    saved = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    saved.save(str(folder / "tokenizer" / "tokenizer.json"))
    edit(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="T5Tokenizer", extra_ids=0)
    edit(folder / "model_index.json", tokenizer=["transformers", "T5TokenizerFast"])
    expected = saved.encode("aé").ids
    assert expected == [260, 4 + 0xC3, 4 + 0xA9]
    pipeline = model_files.load_text_pipeline(WanPipeline, str(folder), None, torch.float32, CPU)
    for tokenizer in (model_files.load_tokenizer(folder / "tokenizer"), pipeline.tokenizer):
        assert tokenizer("aé").input_ids == expected
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"policy.model: expected a readable tokenizer in .*tokenizer, got"
    ):
        model_files.load_tokenizer(folder / "tokenizer")


def test_no_such_folder(tmp_path: Path, wan_folder: Path) -> None:
    for model in (str(tmp_path / "none"), "none", "./none", "~nobody-here/none/x"):
        with pytest.raises(
            FileNotFoundError,
            match=r"policy.model: expected a folder .* or a hub id OWNER/NAME, found no folder at",
        ):
            WanPolicy(model).latent_shape(32, 48, 9)
    with pytest.raises(FileNotFoundError, match=r"policy.model: .* found no model_index.json in"):
        WanPolicy(str(tmp_path)).load(CPU)
    with pytest.raises(
        ValueError, match=r"policy.revision: expected none beside .*folder.*, got 'main'"
    ):
        WanPolicy(str(wan_folder), revision="main").load(CPU)


@pytest.mark.parametrize(
    ("kind", "expected", "problem"),
    [
        (
            hub.GatedRepoError,
            ValueError,
            "policy.model: a/b at revision 'r' is gated: .*huggingface.co/a/b .*hf auth login",
        ),
        (
            hub.RepositoryNotFoundError,
            FileNotFoundError,
            "policy.model: found no folder .* no model a/b on the hub.*hf auth login",
        ),
        (
            hub.RevisionNotFoundError,
            FileNotFoundError,
            "policy.revision: the hub has a/b, but no revision 'r'",
        ),
        (
            hub.LocalEntryNotFoundError,
            FileNotFoundError,
            "policy.model: .*a/b at revision 'r' is not in the hub's .*cache.*hf download",
        ),
        (hub.HfHubHTTPError, ValueError, "policy.model: cannot fetch a/b .* from the hub"),
        (OSError, ValueError, "policy.model: cannot fetch a/b .*: words"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], expected: type[Exception], problem: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind.__new__(kind, "words")  # __init__ would want the hub's answer

    monkeypatch.setattr("fastgrpo.hub.snapshot_download", fail)
    for check in (
        lambda p: p.latent_shape(32, 48, 9),
        lambda p: p.check_prompts(["x"]),
        lambda p: p.load(CPU),
        lambda p: p.embed(["x"], CPU),
    ):
        with pytest.raises(expected, match=problem):
            check(WanPolicy("a/b", revision="r"))


def test_a_hub_model_is_fetched_in_parts(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def snapshot(model: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (model, revision) == ("a/b", "r")
        asked.append(tuple(allow_patterns))
        return str(wan_folder)

    monkeypatch.setattr("fastgrpo.hub.snapshot_download", snapshot)
    policy = WanPolicy(
        "a/b", revision="r", max_sequence_length=LENGTH, text_cache=str(tmp_path), text_dtype="fp32"
    )
    policy.latent_shape(32, 48, 9)
    policy.check_prompts(PROMPTS)
    assert set(asked) == {model_files.CONFIG_FILES}
    policy.embed(PROMPTS, CPU)
    policy.load(CPU)
    assert set(asked) == {
        model_files.CONFIG_FILES,
        model_files.TEXT_FILES,
        model_files.NETWORK_FILES,
    }
    assert policy.cache.identity["commit"] == wan_folder.name
    latents = torch.zeros(1, *policy.latent_shape(32, 48, 9))
    with torch.no_grad():
        velocity = policy.velocity(latents, torch.full((1,), 937.0), policy.encode(PROMPTS[:1]))
    assert velocity.isfinite().all()
