import shutil

import numpy as np
import pytest
import torch
from checkpoints import save_all_in_one, save_all_in_one_v1, save_quantized_diffusers_folder
from tiny_pipeline import save_tiny_folder, tiny_clip_tokenizer, tiny_parts, tiny_t5_tokenizer

from flux_nf4 import FluxPipeline
from flux_nf4.errors import DoesNotFitError, InputError, ModelNotFoundError, ShapeError
from flux_nf4.model.blocks import FluxBlocks
from flux_nf4.pipeline import compat, generate, tokenizers
from flux_nf4.pipeline.load import demo_path
from flux_nf4.pipeline.sampling import draw_noise, pack

WISH = {
    "load_in_4bit": True,
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.float32,
}
CALL = {"height": 64, "width": 80, "num_inference_steps": 2, "max_sequence_length": 8}
DESIGN_CALL = """
from flux_nf4 import FluxPipeline
import torch
pipeline = FluxPipeline.from_pretrained("./", torch_dtype=torch.bfloat16, device_map="auto",
    quantization_config={"load_in_4bit": True, "bnb_4bit_use_double_quant": False,
                         "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16})
image = pipeline(prompt="Astronaut in a jungle, cold color palette, muted colors", height=1152, width=896,
    num_inference_steps=20, guidance_scale=1.0, distilled_guidance_scale=3.5, seed=12345).images[0]
"""  # noqa: E501  as README has it


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _bfloat16_is_native(monkeypatch):
    monkeypatch.setattr(compat, "imitates_bfloat16", lambda: False)


@pytest.fixture
def _tiny_tokenizers_packaged(monkeypatch):
    made = {"t5": tiny_t5_tokenizer, "clip": tiny_clip_tokenizer}
    monkeypatch.setattr(tokenizers, "packaged_tokenizer", lambda name, kind: made[kind]())


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:this CPU has no arithmetic for bfloat16")
def test_the_call_of_the_design_runs_as_it_stands(tmp_path, monkeypatch):
    shutil.copy(demo_path(), tmp_path)
    monkeypatch.chdir(tmp_path)
    # A step of this size takes seconds, so the nineteen after the first are given its result.
    forward, found = FluxBlocks.forward, []

    def first_again(blocks, *inputs, **named):
        if not found:
            found.append(forward(blocks, *inputs, **named))
        return found[0]

    monkeypatch.setattr(FluxBlocks, "forward", first_again)
    namespace = {}
    exec(DESIGN_CALL, namespace)
    assert namespace["image"].size == (896, 1152)


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(tiny_folder, monkeypatch):
    monkeypatch.setattr(compat, "imitates_bfloat16", lambda: True)
    with pytest.warns(UserWarning, match="no arithmetic for bfloat16: computing in float32"):
        pipeline = FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    assert pipeline.model.dtype == torch.float32


def test_where_the_cpu_has_bfloat16_no_device_is_asked_for_before_the_model_is(
    tiny_folder, monkeypatch
):
    monkeypatch.setattr(compat, "imitates_bfloat16", lambda: False)
    monkeypatch.setattr(compat, "resolve_device", lambda _: pytest.fail("CUDA starts too early"))
    pipeline = FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.bfloat16)
    assert pipeline.model.dtype == torch.bfloat16


def test_a_warm_up_draws_before_the_pipeline_is_given(tiny_folder, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        generate, "generate", lambda _, request: prompts.append(request.prompt) or ()
    )
    for is_wanted in (False, True):
        FluxPipeline.from_pretrained(tiny_folder, warm_up=is_wanted)

    assert prompts == ["warm-up"]


def test_a_warm_up_that_does_not_fit_is_no_error(tiny_folder, monkeypatch):
    def refuse(*_):
        raise DoesNotFitError("64 x 64 needs 2 MiB")

    monkeypatch.setattr(generate, "generate", refuse)
    assert FluxPipeline.from_pretrained(tiny_folder, warm_up=True).model.facts.default_size


def test_the_demo_in_a_folder_draws_at_its_own_size(tmp_path):
    shutil.copy(demo_path(), tmp_path)
    image = FluxPipeline.from_pretrained(tmp_path)("a cat", num_inference_steps=2).images[0]
    assert image.size == (256, 256)


def test_plain_weights_are_quantised_while_loading(tiny_folder):
    pipeline = FluxPipeline.from_pretrained(tiny_folder, quantization_config=WISH)
    assert pipeline.model.quantization == "nf4 v2"
    assert pipeline("a cat", **CALL).images[0].size == (80, 64)


def test_quantised_while_loading_draws_what_the_quantised_folder_draws(tmp_path):
    parts = tiny_parts()
    plain = save_tiny_folder(tmp_path / "plain", models=parts, dtype=torch.bfloat16)
    quantised = save_quantized_diffusers_folder(tmp_path / "quantised", models=parts)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(plain / name, quantised / name)
    images = [
        FluxPipeline.from_pretrained(folder, quantization_config=WISH)("a", seed=1, **CALL).images
        for folder in (plain, quantised)
    ]
    assert np.array_equal(images[0][0], images[1][0])


def test_weights_are_left_alone_without_a_wish(pipeline):
    assert pipeline.model.quantization == "fp32"


@pytest.mark.usefixtures("_tiny_tokenizers_packaged")
def test_a_v1_file_does_not_meet_a_wish_for_v2(tmp_path):
    path = save_all_in_one_v1(tmp_path / "tiny.safetensors")
    with pytest.raises(InputError, match=r"doubly quantised \(v1\).*\nhint: .*flux-nf4 convert"):
        FluxPipeline.from_pretrained(path, quantization_config=WISH)


@pytest.mark.usefixtures("_tiny_tokenizers_packaged")
def test_an_fp4_file_does_not_meet_a_wish_for_nf4(tmp_path):
    path = save_all_in_one(tmp_path / "tiny.safetensors", transformer="fp4")
    with pytest.raises(InputError, match="fp4, and `bnb_4bit_quant_type` asks for nf4"):
        FluxPipeline.from_pretrained(path, quantization_config=WISH)


@pytest.mark.usefixtures("_tiny_tokenizers_packaged")
def test_a_v2_file_meets_the_wish(tmp_path):
    path = save_all_in_one(tmp_path / "tiny.safetensors")
    assert FluxPipeline.from_pretrained(path, quantization_config=WISH).model.dtype == torch.float32


@pytest.mark.usefixtures("_bfloat16_is_native")
def test_an_object_of_transformers_is_understood(tiny_folder):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    pipeline = FluxPipeline.from_pretrained(
        tiny_folder, torch_dtype=torch.bfloat16, quantization_config=config
    )
    assert (pipeline.model.quantization, pipeline.model.dtype) == ("nf4 v2", torch.bfloat16)


def test_an_object_that_wishes_for_eight_bits_is_refused(tiny_folder):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(InputError, match=r"unknown keys: .*`load_in_8bit`"):
        FluxPipeline.from_pretrained(tiny_folder, quantization_config=config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bnb_4bit_quant_typ": "nf4"}, r"unknown keys: `bnb_4bit_quant_typ`\nhint: the keys are"),
        ({"load_in_8bit": True}, "unknown keys: `load_in_8bit`"),
        ({"load_in_4bit": False}, "must hold `load_in_4bit`: True"),
        ({"load_in_4bit": "yes"}, "`load_in_4bit` must be True or False, got `'yes'`"),
        ({"bnb_4bit_use_double_quant": 0}, "`bnb_4bit_use_double_quant` must be True or False"),
        ({"bnb_4bit_quant_type": "int4"}, "`bnb_4bit_quant_type` must be `nf4` or `fp4`"),
        ({"bnb_4bit_quant_type": ["nf4"]}, "`bnb_4bit_quant_type` must be `nf4` or `fp4`"),
        ({"bnb_4bit_compute_dtype": "float16"}, "FLUX overflows float16"),
        ({"bnb_4bit_compute_dtype": "bf"}, "must be a torch.dtype such as torch.bfloat16"),
        ({"bnb_4bit_compute_dtype": 16}, "must be a torch.dtype"),
        ({"bnb_4bit_quant_storage": torch.bfloat16}, "must be torch.uint8"),
    ],
)
def test_a_wrong_wish_has_its_own_message(tiny_folder, change, reason):
    with pytest.raises(InputError, match=reason):
        FluxPipeline.from_pretrained(tiny_folder, quantization_config=WISH | change)


@pytest.mark.parametrize("config", ["nf4", 4, dict, ["load_in_4bit"]])
def test_a_wish_of_another_kind_is_refused(tiny_folder, config):
    with pytest.raises(InputError, match="must be a dict or a BitsAndBytesConfig"):
        FluxPipeline.from_pretrained(tiny_folder, quantization_config=config)


def test_an_empty_wish_is_refused(tiny_folder):
    with pytest.raises(InputError, match="must hold `load_in_4bit`"):
        FluxPipeline.from_pretrained(tiny_folder, quantization_config={})


def test_dtypes_may_be_named(tiny_folder):
    names = {"bnb_4bit_compute_dtype": "torch.float32", "bnb_4bit_quant_storage": "uint8"}
    pipeline = FluxPipeline.from_pretrained(
        tiny_folder, torch_dtype="float32", quantization_config=WISH | names
    )
    assert pipeline.model.dtype == torch.float32


def test_two_dtypes_that_disagree_are_refused(tiny_folder):
    with pytest.raises(InputError, match=r"torch\.bfloat16 and .* torch\.float32 disagree"):
        FluxPipeline.from_pretrained(
            tiny_folder, torch_dtype=torch.bfloat16, quantization_config=WISH
        )


def test_float16_is_refused_with_the_reason(tiny_folder):
    with pytest.raises(InputError, match="FLUX overflows float16"):
        FluxPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float16)


def test_a_path_that_is_not_there_is_not_downloaded():
    with pytest.raises(ModelNotFoundError, match="nothing is downloaded"):
        FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")


def test_a_path_that_cannot_be_is_not_found():
    with pytest.raises(ModelNotFoundError, match="File name too long"):
        FluxPipeline.from_pretrained("too-long" * 99)


def test_an_empty_folder_holds_no_model(tmp_path):
    with pytest.raises(ModelNotFoundError):
        FluxPipeline.from_pretrained(tmp_path)


def test_two_files_are_both_named(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(demo_path(), tmp_path / name)
    with pytest.raises(InputError, match=r"one\.safetensors.*two\.safetensors"):
        FluxPipeline.from_pretrained(tmp_path)


def test_a_map_of_devices_is_refused(tiny_folder):
    with pytest.raises(InputError, match="`device_map` must be"):
        FluxPipeline.from_pretrained(tiny_folder, device_map={"": 0})


def test_an_unknown_device_is_refused(tiny_folder):
    with pytest.raises(InputError, match="`balanced` is not a device"):
        FluxPipeline.from_pretrained(tiny_folder, device_map="balanced")


def test_a_list_of_prompts_counts_seeds_through(pipeline):
    output = pipeline(["a cat", "a dog"], num_images_per_prompt=2, seed=10, **CALL)
    assert output.seeds == (10, 11, 12, 13)
    alone = pipeline("a dog", seed=12, **CALL).images[0]
    assert np.array_equal(output.images[2], alone)


def test_without_a_seed_the_one_that_was_drawn_repeats_the_image(pipeline):
    first = pipeline("a cat", **CALL)
    again = pipeline("a cat", seed=first.seeds[0], **CALL)
    assert np.array_equal(first.images[0], again.images[0])


def test_two_calls_without_a_seed_differ(pipeline):
    assert pipeline("a cat", **CALL).seeds != pipeline("a cat", **CALL).seeds


def test_a_generator_leaves_no_seed_to_tell(pipeline):
    output = pipeline("a cat", generator=torch.Generator().manual_seed(4), **CALL)
    assert output.seeds == (None,)
    assert np.array_equal(output.images[0], pipeline("a cat", seed=4, **CALL).images[0])


def test_output_types_are_the_same_image(pipeline):
    images = {
        kind: pipeline("a cat", seed=1, output_type=kind, **CALL).images
        for kind in ("pil", "np", "pt")
    }
    assert images["np"].shape == (1, 64, 80, 3)
    assert images["pt"].shape == (1, 3, 64, 80)
    assert np.array_equal(np.round(images["np"][0] * 255), np.asarray(images["pil"][0]))
    assert np.array_equal(images["pt"][0].permute(1, 2, 0), images["np"][0])


def test_latents_are_ordinary_tensors(pipeline):
    latents = pipeline("a cat", seed=1, output_type="latent", **CALL).images
    assert latents.shape == (1, 20, 64)
    assert not latents.is_inference()


def test_latents_given_replace_the_seed(pipeline):
    noise = pack(draw_noise([3], 80, 64))
    given = pipeline("a cat", latents=noise, **CALL)
    assert np.array_equal(given.images[0], pipeline("a cat", seed=3, **CALL).images[0])


def test_a_callback_sees_every_step_and_may_change_latents(pipeline):
    seen = []

    def callback(given, step, timestep, tensors):
        assert given is pipeline
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipeline(
        "a cat", seed=1, output_type="latent", callback_on_step_end=callback, **CALL
    ).images
    assert [step for step, _ in seen] == [0, 1]
    assert seen[0][1] == 1000.0
    assert not latents.any()


def test_a_callbacks_latents_of_another_shape_are_refused(pipeline):
    def callback(_pipeline, _step, _timestep, tensors):
        return {"latents": tensors["latents"][:, 1:]}

    with pytest.raises(ShapeError, match=r"\(1, 19, 64\) cannot take the place of \(1, 20, 64\)"):
        pipeline("a cat", callback_on_step_end=callback, **CALL)


@pytest.mark.parametrize(
    ("prompts", "seed", "reason"),
    [(["a", "\ud800"], 0, "not valid Unicode"), (["a", "b"], 2**64 - 1, "`seed`")],
)
def test_what_is_wrong_with_the_last_prompt_is_told_before_the_first_is_drawn(
    pipeline, prompts, seed, reason
):
    steps = []
    with pytest.raises(InputError, match=reason):
        pipeline(prompts, seed=seed, callback_on_step_end=lambda *step: steps.append(step), **CALL)
    assert steps == []


def test_one_negative_prompt_serves_all_prompts(pipeline):
    settings = CALL | {"seed": 1, "guidance_scale": 3.0}
    both = pipeline(["a cat", "a dog"], negative_prompt="a red apple", **settings).images
    alone = pipeline("a cat", negative_prompt=["a red apple"], **settings).images
    assert np.array_equal(both[0], alone[0])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": 3}, "`prompt` must be a text or a list"),
        ({"prompt": ["a", 3]}, "`prompt` must be a text or a list"),
        ({"prompt": b"a"}, "`prompt` must be a text or a list"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts and 2 negative prompts"),
        ({"output_type": "jpeg"}, "`output_type` must be one of"),
        ({"seed": 1, "generator": torch.Generator()}, "both fix the noise"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 2**64}, "`seed`"),
        ({"seed": "1"}, "`seed`"),
        ({"seed": True}, "`seed`"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"generator": 5}, "`generator`"),
        ({"latents": torch.zeros(2, 20, 64)}, "2 rows for 1 images"),
        ({"latents": torch.zeros(1, 16, 8, 10)}, "must be a packed tensor"),
        ({"latents": torch.zeros(1, 21, 64)}, "initial latents of"),
        ({"latents": torch.zeros(1, 20, 64, dtype=torch.int64)}, "real numbers"),
        ({"latents": "noise"}, "`latents`"),
        ({"width": 100}, "96 or 112"),
        ({"guidance_scale": 0.0}, "`guidance_scale`"),
        ({"num_images_per_prompt": 0}, "`num_images"),
    ],
)
def test_a_wrong_argument_has_its_own_message(pipeline, arguments, reason):
    with pytest.raises(InputError, match=reason):
        pipeline(**{"prompt": "a cat", **CALL, **arguments})
