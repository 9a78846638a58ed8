import asyncio
import base64
import io
import json

import pytest
from asgi_client import KEY, ask, bearer, error_of, open_client
from PIL import Image
from server_fakes import FakeEngine, fake_capabilities, image_file, out_of_memory

from flux_nf4.pipeline.image_metadata import read_image
from flux_nf4.server.openai_api import nearest_size

PATH = "/v1/images/generations"


def generate(engine=None, settings=None, **body):
    body = {"prompt": "a cat", **body}
    return ask("POST", PATH, json=body, engine=engine, settings=settings)


def picture_of(image):
    return Image.open(io.BytesIO(base64.b64decode(image["b64_json"])))


def spec_of(**body):
    """The job that a request becomes."""
    engine = FakeEngine()
    answer = generate(engine, **body)
    assert answer.status_code == 200, answer.text
    (job,) = engine.jobs(owner="local")
    return job.spec


# ---- images -------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_png_in_base64():
    body = generate().json()

    assert picture_of(body["data"][0]).format == "PNG"
    assert body["size"] == "64x64"
    assert (body["output_format"], body["background"]) == ("png", "opaque")
    assert isinstance(body["created"], int)


def test_n_images_have_seeds_that_count_up():
    body = generate(n=3, seed=7).json()

    assert [image["seed"] for image in body["data"]] == [7, 8, 9]
    assert len({image["sha256"] for image in body["data"]}) == 3


def test_the_same_seed_gives_the_same_image():
    first, second = (generate(seed=7).json()["data"][0]["sha256"] for _ in range(2))

    assert first == second


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_it_is_random_and_told(seed):
    seeds = {generate(seed=seed).json()["seed"] for _ in range(3)}

    assert len(seeds) == 3


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_the_format_is_as_asked_and_carries_the_settings(form):
    body = generate(output_format=form, seed=7).json()

    assert picture_of(body["data"][0]).format == form.upper()
    assert read_image(base64.b64decode(body["data"][0]["b64_json"])).pairs["Seed"] == "7"


def test_compression_is_the_quality_of_a_jpeg():
    small, large = (
        generate(output_format="jpeg", output_compression=quality, seed=1, size="256x256")
        for quality in (5, 100)
    )

    assert len(small.content) < len(large.content)


def test_a_link_shows_the_image_without_a_key():
    async def run():
        async with open_client(api_keys=(KEY,)) as client:
            body = {"prompt": "x", "response_format": "url", "output_format": "webp", "n": 2}
            answer = await client.post(PATH, json=body, headers=bearer())
            return [await client.get(image["url"]) for image in answer.json()["data"]]

    answers = asyncio.run(run())
    assert [answer.headers["content-type"] for answer in answers] == ["image/webp"] * 2
    assert answers[0].content != answers[1].content


def test_a_link_ends():
    async def run():
        async with open_client(link_lifetime_s=-1.0) as client:
            answer = await client.post(PATH, json={"prompt": "x", "response_format": "url"})
            return await client.get(answer.json()["data"][0]["url"])

    assert asyncio.run(run()).status_code == 404


# ---- what is told beside them -------------------------------------------------------------------


def test_usage_counts_image_tokens():
    usage = generate(size="128x64", n=2).json()["usage"]

    assert usage["output_tokens"] == 2 * 8 * 4
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"] == {"text_tokens": 512, "image_tokens": 0}


def test_settings_and_times_are_told():
    body = generate(num_inference_steps=3, guidance_scale=2.0).json()

    assert body["metadata"]["num_inference_steps"] == 3
    assert body["metadata"]["guidance_scale"] == 2.0
    assert body["metrics"]["run_s"] >= 0
    assert body["model"] == "demo"


def test_a_truncated_prompt_is_a_warning():
    engine = FakeEngine()
    engine.notices = ["the prompt is longer than 512 tokens; not read: `and so on`"]
    body = generate(engine).json()

    assert body["x_prompt_truncated"] is True
    assert body["warnings"] == engine.notices


def test_a_prompt_that_was_read_whole_is_not_called_truncated():
    assert generate().json()["x_prompt_truncated"] is False


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"user": "u1"}, "u1"),
        ({"user": "u1", "safety_identifier": "s1"}, "s1"),
        ({"user": "u1", "safety_identifier": ""}, "u1"),
    ],
)
def test_the_safety_identifier_comes_back(given, told):
    assert generate(**given).json()["safety_identifier"] == told


# ---- what a request becomes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quality", "num_steps"),
    [
        (None, 20),
        ("auto", 20),
        ("low", 10),
        ("medium", 20),
        ("standard", 20),
        ("high", 28),
        ("hd", 28),
        ("xhigh", 40),
        ("max", 50),
    ],
)
def test_quality_is_a_number_of_steps(quality, num_steps):
    assert spec_of(quality=quality).num_inference_steps == num_steps


def test_steps_win_over_quality():
    assert spec_of(quality="max", num_inference_steps=3).num_inference_steps == 3


def test_the_quality_that_is_told_is_the_nearest():
    assert generate(num_inference_steps=30).json()["quality"] == "high"


def test_a_model_made_for_few_steps_takes_those_at_every_quality():
    engine = FakeEngine(capabilities=fake_capabilities(variant="schnell", default_steps=4))
    generate(engine, quality="max")

    assert engine.jobs(owner="local")[0].spec.num_inference_steps == 4


def test_extensions_have_the_names_of_other_engines():
    spec = spec_of(
        guidance_scale=2.5, true_cfg_scale=1.5, negative_prompt="rain", width=128, height=96, seed=5
    )

    assert spec.distilled_guidance_scale == 2.5
    assert spec.guidance_scale == 1.5
    assert spec.negative_prompt == "rain"
    assert (spec.width, spec.height, spec.seed) == (128, 96, 5)


def test_auto_is_the_models_own_size():
    assert (spec_of(size="auto").width, spec_of(size="auto").height) == (64, 64)


def test_a_size_is_width_by_height():
    assert (spec_of(size="128x64").width, spec_of(size="128x64").height) == (128, 64)


def test_partial_images_are_drawn_only_for_streams():
    assert spec_of(partial_images=3).num_previews == 0


def test_what_open_webui_sends_is_taken():
    body = {"model": "dall-e-2", "n": 1, "size": "512x512", "response_format": "b64_json"}

    assert spec_of(**body, num_inference_steps=1).width == 512


def test_what_librechat_sends_is_taken():
    body = {
        "model": "gpt-image-1",
        "n": 1,
        "background": "auto",
        "quality": "auto",
        "size": "auto",
        "output_format": "png",
        "output_compression": 100,
        "moderation": "auto",
    }

    assert generate(**body).status_code == 200


def test_what_sillytavern_sends_is_taken():
    body = {
        "model": "dall-e-3",
        "n": 1,
        "size": "64x64",
        "quality": "standard",
        "style": "vivid",
        "response_format": "b64_json",
        "moderation": "low",
    }

    assert generate(**body).status_code == 200


def test_null_is_as_if_it_were_not_given():
    names = ("model", "n", "size", "quality", "stream", "seed", "user", "lora", "output_format")

    assert generate(**dict.fromkeys(names)).status_code == 200


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "  \n"),
        ("prompt", 1),
        ("prompt", None),
        ("prompt", "x" * 32_001),
        ("n", 0),
        ("n", 11),
        ("n", "2"),
        ("n", True),
        ("n", 1.5),
        ("size", "big"),
        ("size", "64"),
        ("size", "64X64"),
        ("size", "0x64"),
        ("size", "-64x64"),
        ("size", "100x100"),
        ("size", "256x64"),
        ("size", "4112x4112"),
        ("size", 64),
        ("quality", "best"),
        ("background", "transparent"),
        ("output_format", "gif"),
        ("output_format", "svg"),
        ("output_compression", 101),
        ("output_compression", -1),
        ("response_format", "file"),
        ("moderation", "none"),
        ("partial_images", 4),
        ("stream", "yes"),
        ("stream", 1),
        ("svg", {"model": "x"}),
        ("frame_count", 9),
        ("seed", -2),
        ("seed", 2**64),
        ("seed", False),
        ("seed", 1.0),
        ("num_inference_steps", 0),
        ("num_inference_steps", 1001),
        ("guidance_scale", -1),
        ("guidance_scale", "3"),
        ("true_cfg_scale", 0.5),
        ("width", 65),
        ("width", 0),
        ("height", 8192),
        ("lora", "style"),
        ("steps", 20),
        ("unknown", 1),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(field, value):
    answer = generate(**{field: value})

    assert answer.status_code == 400
    assert error_of(answer)["param"] == field


def test_not_a_number_is_refused():
    answer = ask(
        "POST",
        PATH,
        content=b'{"prompt": "x", "guidance_scale": NaN}',
        headers={"content-type": "application/json"},
    )

    assert error_of(answer)["param"] == "guidance_scale"


@pytest.mark.parametrize(
    ("field", "value"),
    [("background", "transparent"), ("output_format", "gif"), ("svg", {}), ("lora", "x")],
)
def test_what_others_can_and_this_cannot_is_called_unsupported(field, value):
    assert error_of(generate(**{field: value}))["code"] == "unsupported_value"


def test_an_adapter_is_refused_with_the_reason():
    assert "no LoRA adapters" in error_of(generate(lora="style"))["message"]


def test_a_size_that_cannot_be_drawn_names_the_nearest():
    assert "the nearest is 1024x768" in error_of(generate(size="1020x770"))["message"]


def test_two_sizes_are_one_too_many():
    assert error_of(generate(size="64x64", width=64))["param"] == "size"


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1000, 1000), (1008, 1008)),
        ((1, 1), (64, 64)),
        ((3000, 500), (1504, 496)),
        ((64, 1024), (64, 192)),
        ((99_999, 99_999), (2048, 2048)),
        ((9999, 3333), (3536, 1168)),
    ],
)
def test_the_nearest_size_is_one_that_can_be_drawn(asked, nearest):
    width, height = nearest_size(*asked, max_pixels=2048 * 2048)

    assert max(width, height) <= 3 * min(width, height)
    assert width * height <= 2048 * 2048
    assert (width % 16, height % 16) == (0, 0)
    assert abs(width - nearest[0]) + abs(height - nearest[1]) <= 32


# ---- models -------------------------------------------------------------------------------------


def test_models_are_listed_under_every_name():
    body = ask("GET", "/v1/models", settings={"served_model_names": ("a", "org/b")}).json()

    assert [model["id"] for model in body["data"]] == ["a", "org/b"]
    assert {model["object"] for model in body["data"]} == {"model"}


def test_a_model_is_found_by_a_name_with_a_slash():
    answer = ask("GET", "/v1/models/org/b", settings={"served_model_names": ("org/b",)})

    assert answer.json()["id"] == "org/b"


def test_an_unknown_model_is_a_404():
    answer = ask("GET", "/v1/models/gpt-image-1")

    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


def test_any_model_may_be_named_and_the_real_one_is_told():
    assert generate(model="gpt-image-1").json()["model"] == "demo"


def test_a_strict_server_draws_only_with_the_model_that_is_named():
    settings = {"strict_model": True, "served_model_names": ("a", "b")}

    assert generate(settings=settings, model="b").status_code == 200
    assert generate(settings=settings).status_code == 200
    refused = generate(settings=settings, model="c")
    assert refused.status_code == 404
    assert error_of(refused)["param"] == "model"


# ---- faults -------------------------------------------------------------------------------------


def test_a_job_that_fails_is_an_error_with_its_remedy():
    engine = FakeEngine()
    engine.fail_next = out_of_memory()
    answer = generate(engine)

    assert answer.status_code == 503
    assert error_of(answer)["code"] == "out_of_memory"
    assert "try a smaller size" in error_of(answer)["message"]
    assert answer.headers["x-should-retry"] == "false"


# ---- streams ------------------------------------------------------------------------------------


def events_of(text):
    """(event, data) of each frame; comments left out."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    parsed = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in frames]
    return [(frame["event"], json.loads(frame["data"])) for frame in parsed]


def stream(engine=None, **body):
    return generate(engine, stream=True, **body)


def test_a_stream_has_partial_images_and_then_the_image():
    answer = stream(partial_images=2, output_format="webp")
    events = events_of(answer.text)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert [name for name, _ in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [data["type"] for _, data in events] == [name for name, _ in events]
    assert [data.get("partial_image_index") for _, data in events] == [0, 1, None]


def test_an_event_says_what_its_image_is():
    partial, done = (
        data for _, data in events_of(stream(partial_images=1, output_format="webp").text)
    )

    for data in (partial, done):
        assert picture_of(data).format.lower() == data["output_format"]
        assert {"created_at", "size", "quality", "background"} <= set(data)
    assert done["usage"]["output_tokens"] == 16


def test_without_partial_images_a_stream_has_the_image_alone():
    assert [name for name, _ in events_of(stream().text)] == ["image_generation.completed"]


def test_a_stream_of_several_images_completes_each():
    events = events_of(stream(n=3, seed=5, partial_images=1).text)

    assert [data["seed"] for name, data in events if name.endswith("completed")] == [5, 6, 7]


def test_a_stream_that_fails_ends_in_an_error():
    engine = FakeEngine()
    engine.fail_next = out_of_memory()
    (event,) = events_of(stream(engine).text)

    assert event[1]["error"]["code"] == "out_of_memory"


def test_a_stream_shows_each_image_once_when_the_job_is_drawn_again():
    async def run():
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine) as client:
            body = {"prompt": "x", "n": 2, "seed": 5, "stream": True, "num_inference_steps": 2}
            asking = asyncio.create_task(client.post(PATH, json=body))
            while not engine.jobs(owner="local"):
                await asyncio.sleep(0)
            (job,) = engine.jobs(owner="local")
            engine.allow_steps(2)
            async for event in job.events():
                if event.kind == "image":
                    break
            engine.draw_again(job)
            engine.release()
            return (await asking).text

    events = events_of(asyncio.run(run()))
    assert [data["seed"] for _, data in events] == [5, 6]


def test_a_bad_request_for_a_stream_is_a_plain_error():
    assert stream(size="1x1").status_code == 400


# ---- edits --------------------------------------------------------------------------------------


def edit(files, engine=None, settings=None, **fields):
    data = {"prompt": "a green cat", **fields}
    return ask("POST", "/v1/images/edits", data=data, files=files, engine=engine, settings=settings)


def edited_spec(files, **fields):
    engine = FakeEngine()
    answer = edit(files, engine, **fields)
    assert answer.status_code == 200, answer.text
    return engine.jobs(owner="local")[0].spec


@pytest.mark.parametrize("name", ["image", "image[]"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_edit_starts_from_the_image_as_it_was_sent(name, form):
    data = image_file(form=form)

    assert edited_spec({name: data}).image == data


def test_fields_of_an_edit_come_as_text():
    spec = edited_spec(
        {"image": image_file()}, n="2", seed="7", strength="0.8", num_inference_steps="5"
    )

    assert (spec.num_images, spec.seed, spec.strength, spec.num_inference_steps) == (2, 7, 0.8, 5)


def test_an_edit_takes_the_shape_of_its_image():
    spec = edited_spec({"image": image_file(400, 200)})

    assert (spec.width, spec.height) == (96, 64)


def test_an_edit_takes_the_shape_of_its_image_as_one_sees_it():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: a photograph of a telephone held upright
    file = io.BytesIO()
    Image.new("RGB", (400, 200)).save(file, "JPEG", exif=exif)
    spec = edited_spec(
        {"image": file.getvalue(), "mask": image_file(200, 400, mode="RGBA", colour=0)}
    )

    assert (spec.width, spec.height) == (64, 96)


def test_an_edit_may_have_another_size():
    spec = edited_spec({"image": image_file(400, 200)}, size="128x128")

    assert (spec.width, spec.height) == (128, 128)


def test_what_is_transparent_in_the_mask_is_white_in_ours():
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    file = io.BytesIO()
    mask.save(file, "PNG")
    spec = edited_spec({"image": image_file(), "mask": file.getvalue()})

    ours = Image.open(io.BytesIO(spec.mask_image))
    assert (ours.mode, ours.getpixel((0, 0)), ours.getpixel((63, 0))) == ("L", 255, 0)


def test_an_edit_can_be_streamed():
    answer = edit({"image": image_file()}, stream="true", partial_images="1")

    assert [name for name, _ in events_of(answer.text)] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


def test_usage_of_an_edit_counts_its_image():
    usage = edit({"image": image_file()}).json()["usage"]

    assert usage["input_tokens_details"]["image_tokens"] == 16


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({}, "image"),
        ({"mask": image_file(mode="RGBA")}, "image"),
        ({"image": b"GIF89a"}, "image"),
        ([("image[]", image_file()), ("image[]", image_file())], "image"),
        ({"image": image_file(), "mask": image_file()}, "mask"),
        ({"image": image_file(), "mask": image_file(32, 32, mode="RGBA", colour=0)}, "mask"),
        ({"image": image_file(), "mask": b"no image"}, "mask"),
        ({"image": image_file(), "markup": image_file()}, "markup"),
    ],
    ids=["none", "mask alone", "a gif", "two", "opaque", "another size", "no image", "markup"],
)
def test_files_that_cannot_be_used_are_named(files, param):
    files = files or {"other": (None, b"x")}
    answer = edit(files)

    assert answer.status_code == 400
    assert error_of(answer)["param"] in (param, "other")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "x"),
        ("n", "1.5"),
        ("n", "true"),
        ("seed", ""),
        ("strength", "0"),
        ("strength", "2"),
        ("stream", "maybe"),
        ("size", "1x1"),
        ("unknown", "1"),
        ("lora", "x"),
        ("strength", "nan"),
    ],
)
def test_a_bad_field_of_an_edit_is_named(field, value):
    answer = edit({"image": image_file()}, **{field: value})

    assert answer.status_code == 400
    assert error_of(answer)["param"] == field


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"--y\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--"),
        ("multipart/form-data; boundary=", b"--\r\n"),
        ("multipart/form-data; boundary=x", b"\x00" * 1000),
    ],
)
def test_a_body_that_is_not_multipart_is_a_400(content_type, content):
    answer = ask(
        "POST", "/v1/images/edits", content=content, headers={"content-type": content_type}
    )

    assert answer.status_code == 400
    assert error_of(answer)["message"]


def test_json_is_no_body_of_an_edit():
    assert ask("POST", "/v1/images/edits", json={"prompt": "x"}).status_code == 415
