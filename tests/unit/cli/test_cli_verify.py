import json

import pytest
import torch
from checkpoints import (
    PREFIX,
    canonical_entries,
    quantized,
    save_all_in_one,
    save_all_in_one_v1,
    save_diffusers_folder,
    save_quantized_diffusers_folder,
    transformer_tensors,
)
from safetensors.torch import load_file, save_file

from flux_nf4.formats import verification
from flux_nf4.pipeline.load import demo_path

IMG_IN = f"{PREFIX}img_in.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_all_in_one(folder / "v2.safetensors")
    save_all_in_one_v1(folder / "v1.safetensors")
    save_diffusers_folder(folder / "bf16")
    save_quantized_diffusers_folder(folder / "nested", nested=True)
    schnell = save_diffusers_folder(folder / "schnell", guidance=False)
    fill = save_diffusers_folder(folder / "fill", in_channels=384)
    assert schnell != fill
    return folder


@pytest.fixture
def broken(models, folder):
    """A function that saves the all-in-one file with some tensors changed (None: left out)."""

    def save(**changes):
        tensors = load_file(models / "v2.safetensors")
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor
        save_file(tensors, "broken.safetensors")
        return "broken.safetensors"

    return save


def texts_of(ended):
    return [finding["text"] for finding in json.loads(ended.out)["findings"]]


@pytest.mark.parametrize(
    "name",
    ["v2.safetensors", "v1.safetensors", "bf16", "nested", "schnell", "fill", "bf16/transformer"],
)
def test_a_sound_checkpoint_has_no_findings(flux, models, name):
    ended = flux("verify", str(models / name), "--json")

    assert (ended.exit_code, texts_of(ended), json.loads(ended.out)["ok"]) == (0, [], True)


def test_the_built_in_model_is_sound(flux):
    ended = flux("verify", str(demo_path()))

    assert (ended.exit_code, ended.out.startswith("ok: ")) == (0, True)


@pytest.mark.parametrize("kind", ["t5", "clip", "vae"])
def test_a_part_alone_is_looked_through(flux, models, folder, kind):
    flux("convert", str(models / "v2.safetensors"), "p", "--parts")
    told = json.loads(flux("verify", f"p/{kind}.safetensors", "--json").out)

    assert (told["ok"], told["parts"]) == (True, [kind])


def test_every_fault_is_listed(flux, broken):
    path = broken(
        **{
            f"{PREFIX}img_in.bias": None,
            "vae.encoder.conv_in.bias": None,
            "vae.strange": torch.zeros(1),
            f"{PREFIX}double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(32),
            f"{PREFIX}double_blocks.0.img_mod.lin.weight.quant_map": torch.zeros(16),
        }
    )
    ended = flux("verify", path, "--json")
    said = " | ".join(texts_of(ended))

    assert ended.exit_code == 3
    assert len(texts_of(ended)) == 5
    for words in (
        "`img_in.bias` is missing",
        "`encoder.conv_in.bias` is missing",
        "`vae.strange` is unknown",
        "key_norm.scale` has the shape [32], and must have [64]",
        "img_mod.lin.weight.quant_map` is not the table",
    ):
        assert words in said


def test_a_matrix_of_another_shape_is_found(flux, models, folder):
    entries = dict(canonical_entries(models / "bf16")["transformer"])
    entries["single_blocks.1.linear2.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)
    save_file(transformer_tensors(quantized(entries)), "t.safetensors")
    (text,) = texts_of(flux("verify", "t.safetensors", "--json"))

    assert (
        text
        == "`single_blocks.1.linear2.weight` has the shape [128, 128], and must have [128, 640]"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_found(flux, models, broken, value):
    absmax = load_file(models / "v2.safetensors")[f"{IMG_IN}.absmax"].clone()
    absmax[3] = value
    (text,) = texts_of(flux("verify", broken(**{f"{IMG_IN}.absmax": absmax}), "--json"))

    assert "absmax of `img_in.weight` holds NaN or infinity" in text


def test_a_vector_that_is_not_finite_is_found(flux, broken):
    bias = torch.full((128,), float("nan"), dtype=torch.bfloat16)
    (text,) = texts_of(flux("verify", broken(**{f"{PREFIX}img_in.bias": bias}), "--json"))

    assert text == "`img_in.bias` holds NaN or infinity"


@pytest.mark.parametrize("state", [b"{", b"[]", b'{"quant_type": "nf4"}'])
def test_a_quant_state_that_is_no_such_json_is_found(flux, broken, state):
    name = f"{IMG_IN}.quant_state.bitsandbytes__nf4"
    path = broken(**{name: torch.frombuffer(bytearray(state), dtype=torch.uint8)})
    texts = texts_of(flux("verify", path, "--json"))

    assert name in texts[0]
    assert texts[1:] == [
        "no shape was compared: `img_in.weight`, which tells the sizes of this part, "
        "is not there to be read"
    ]


@pytest.mark.parametrize("length", [0, 4, 100, 200_000])
def test_a_truncated_file_is_told_clearly(flux, models, folder, length):
    data = (models / "v2.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:length])
    ended = flux("verify", "cut.safetensors")

    assert (ended.exit_code, ended.err) == (3, "")
    assert "get it again" in ended.out


def test_a_pickle_is_told_and_not_opened(flux, folder):
    (folder / "p.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    ended = flux("verify", "p.safetensors")

    assert (ended.exit_code, "pickle" in ended.out) == (3, True)


def test_a_file_that_is_not_there_is_an_error(flux):
    ended = flux("verify", "nowhere.safetensors")

    assert (ended.exit_code, ended.out) == (3, "")


def test_a_folder_s_broken_part_is_named(flux, models, folder):
    save_diffusers_folder(folder / "d")
    (folder / "d/vae/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50)
    told = json.loads(flux("verify", "d", "--json").out)

    assert [finding["part"] for finding in told["findings"]] == ["vae"]
    assert told["parts"] == ["transformer", "t5", "clip"]


def test_a_published_file_is_known_by_its_length_and_its_hash(flux, models, monkeypatch):
    import hashlib

    path = models / "v2.safetensors"
    data = path.read_bytes()
    good = verification.Reference(
        name="known.safetensors", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    monkeypatch.setattr(verification, "REFERENCES", (good,))
    told = json.loads(flux("verify", str(path), "--sha256", "--json").out)

    assert (told["ok"], told["reference"], told["sha256"]) == (True, good.name, good.sha256)


def test_a_wrong_hash_of_a_known_length_is_a_finding(flux, models, monkeypatch):
    path = models / "v2.safetensors"
    other = verification.Reference(
        name="known.safetensors", num_bytes=path.stat().st_size, sha256="0" * 64
    )
    monkeypatch.setattr(verification, "REFERENCES", (other,))

    assert flux("verify", str(path)).exit_code == 0
    assert flux("verify", str(path), "--sha256").exit_code == 3


def test_a_known_name_with_another_length_is_a_finding(flux, models, folder):
    data = (models / "v2.safetensors").read_bytes()
    (folder / "flux1-dev-bnb-nf4-v2.safetensors").write_bytes(data)
    (text,) = texts_of(flux("verify", "flux1-dev-bnb-nf4-v2.safetensors", "--json"))

    assert "the published file of this name has 12,044,280,207" in text


def test_the_references_have_the_published_lengths():
    assert [each.num_bytes for each in verification.REFERENCES] == [11_489_884_113, 12_044_280_207]


def test_a_hash_of_a_folder_is_a_usage_error(flux, models):
    assert flux("verify", str(models / "bf16"), "--sha256").exit_code == 2
