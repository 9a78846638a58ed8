"""The routes of A1111, asked as its clients ask them, by plain HTTP."""

import base64
import http.client
import io
import json
import threading

import httpx2
import pytest
from asgi_client import KEY, ask
from live_server import live_server
from PIL import Image
from server_fakes import FakeEngine, fake_capabilities, image_file, out_of_memory, wait_until

from flux_nf4.pipeline.image_metadata import read_image

LIBRECHAT = {
    "prompt": "a lighthouse, oil painting",
    "negative_prompt": "lowres, blurry",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
SILLYTAVERN = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": "a lighthouse",
    "negative_prompt": "",
    "sampler_name": "Euler",
    "scheduler": "Simple",
    "steps": 20,
    "cfg_scale": 1,
    "distilled_cfg_scale": 3.0,
    "width": 512,
    "height": 768,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.5,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": 7,
    "override_settings": {
        "CLIP_stop_at_last_layers": 1,
        "sd_vae": "Automatic",
        "forge_additional_modules": ["ae.safetensors"],
    },
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
OPEN_WEBUI = {
    "prompt": "a lighthouse",
    "batch_size": 1,
    "width": 512,
    "height": 512,
    "steps": 4,
    "negative_prompt": None,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}


@pytest.fixture(scope="module")
def server():
    with live_server() as live:
        yield live


@pytest.fixture
def api(server):
    with httpx2.Client(base_url=f"{server.url}/sdapi/v1", timeout=30) as client:
        yield client


def drawn(api, **body):
    """The answer to a small request, with `info` as JSON."""
    response = api.post("/txt2img", json={"prompt": "a", "steps": 1, "seed": 5} | body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer | {"info": json.loads(answer["info"])}


def started(api, **body):
    """A request on its way, in a thread; `.join()` waits, `.response` is its answer."""
    thread = threading.Thread(target=lambda: setattr(thread, "response", post(api, body)))
    thread.start()
    return thread


def post(api, body):
    return api.post("/txt2img", json={"prompt": "a", "steps": 4, "seed": 5} | body)


def picture(answer, index=0):
    return base64.b64decode(answer["images"][index], validate=True)


def in_base64(data):
    return base64.b64encode(data).decode()


# ---- clients' own requests ----------------------------------------------------------------------


@pytest.mark.parametrize("body", [LIBRECHAT, SILLYTAVERN, OPEN_WEBUI], ids=["lc", "st", "owui"])
def test_the_requests_of_real_clients_are_drawn_at_their_size(api, body):
    answer = drawn(api, **body)
    image = Image.open(io.BytesIO(picture(answer)))

    assert image.format == "PNG"
    assert image.size == (body["width"], body["height"])
    assert answer["parameters"]["prompt"] == body["prompt"]


def test_info_has_what_librechat_reads(api):
    info = drawn(api, **LIBRECHAT, seed=11)["info"]

    assert (info["seed"], info["width"], info["height"]) == (11, 1024, 1024)
    assert info["all_seeds"] == [11]
    assert "Seed: 11" in info["infotexts"][0].split("\n").pop()


def test_librechats_cfg_is_ignored_and_that_is_told(api):
    info = drawn(api, **LIBRECHAT)["info"]

    assert info["cfg_scale"] == 1.0
    assert any("`cfg_scale` 4.5 is ignored" in said for said in info["warnings"])
    assert any("`negative_prompt` has no effect" in said for said in info["warnings"])


def test_a_forge_client_gets_guidance_and_schedule_of_forge(api):
    answer = drawn(api, **SILLYTAVERN)
    settings = read_image(picture(answer)).settings

    assert settings.distilled_guidance_scale == 3.0
    assert settings.schedule == "forge"
    assert (settings.seed, settings.guidance_scale) == (7, 1.0)


def test_what_forge_decides_in_its_options_is_told_to_have_no_effect(api):
    warnings = drawn(api, **SILLYTAVERN)["info"]["warnings"]

    assert [said for said in warnings if "forge_additional_modules" in said]
    assert [said for said in warnings if "save_images" in said]


# ---- what a request means -----------------------------------------------------------------------


def test_nothing_given_is_the_models_own(api):
    info = drawn(api, steps=None, seed=None)["info"]

    assert (info["width"], info["height"], info["steps"]) == (64, 64, 20)
    assert info["warnings"] == []


def test_no_seed_and_minus_one_are_random(api):
    seeds = [drawn(api, seed=seed)["info"]["seed"] for seed in (-1, -1, None)]

    assert len(set(seeds)) == 3


def test_batches_times_iterations_are_images_with_seeds_counting_up(api):
    answer = drawn(api, batch_size=2, n_iter=3)

    assert answer["info"]["all_seeds"] == [5, 6, 7, 8, 9, 10]
    assert [read_image(picture(answer, index)).settings.seed for index in range(6)] == [
        *range(5, 11)
    ]


def test_more_images_than_one_request_may_have_are_capped_and_told(api):
    info = drawn(api, batch_size=8, n_iter=100)["info"]

    assert len(info["all_seeds"]) == 10
    assert any("is 800" in said for said in info["warnings"])


@pytest.mark.parametrize(("asked", "size"), [(72, 80), (71, 64), (1000, 1008), (64, 64)])
def test_sizes_are_rounded_to_16_and_that_is_told(api, asked, size):
    info = drawn(api, width=asked, height=64)["info"]

    assert (info["width"], info["height"]) == (size, 64)
    assert bool(info["warnings"]) == (asked != size)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"refiner_checkpoint": "x"}, "refiner"),
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["x"]}, "styles"),
        ({"sampler_name": "DPM++ 2M"}, "the sampler is Euler, not `DPM++ 2M`"),
        ({"scheduler": "Karras"}, "not `Karras`"),
        ({"script_name": "X/Y/Z plot"}, "script `X/Y/Z plot`"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, "script `ControlNet`"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "not `other`"),
        ({"override_settings": {"eta_noise_seed_delta": 1}}, "eta_noise_seed_delta"),
    ],
)
def test_what_has_no_effect_is_told(api, body, said):
    assert any(said in warning for warning in drawn(api, **body)["info"]["warnings"])


def test_scripts_that_are_off_need_no_words(api):
    scripts = {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}

    assert drawn(api, alwayson_scripts=scripts)["info"]["warnings"] == []


def test_notices_of_the_job_are_told(server, api):
    server.engine.notices = ["the prompt was cut to 512 tokens"]
    try:
        assert drawn(api)["info"]["warnings"] == ["the prompt was cut to 512 tokens"]
    finally:
        server.engine.notices = []


def test_what_has_no_effect_may_be_anything(api):
    body = '{"prompt": "a", "steps": 1, "tiling": NaN, "alwayson_scripts": [1], "styles": 5}'
    response = api.post("/txt2img", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 200
    assert response.json()["parameters"] == {"prompt": "a", "steps": 1}


@pytest.mark.parametrize("value", ["5", 5.0])
def test_numbers_may_be_written_as_clients_write_them(api, value):
    assert drawn(api, seed=value)["info"]["seed"] == 5


def test_images_are_left_out_where_they_are_not_wanted(api):
    assert drawn(api, send_images=False)["images"] == []


@pytest.mark.parametrize(
    ("cfg", "body", "distilled", "true_cfg"),
    [
        ("auto", {"cfg_scale": 7}, 3.5, 1.0),
        ("auto", {"cfg_scale": 7, "distilled_cfg_scale": 2}, 2.0, 7.0),
        ("ignore", {"cfg_scale": 7, "distilled_cfg_scale": 2}, 2.0, 1.0),
        ("true", {"cfg_scale": 7}, 3.5, 7.0),
        ("true", {"cfg_scale": 0.5}, 3.5, 1.0),
        ("guidance", {"cfg_scale": 7}, 7.0, 1.0),
        ("guidance", {"cfg_scale": 7, "distilled_cfg_scale": 2}, 2.0, 1.0),
    ],
)
def test_cfg_means_what_the_server_was_told(cfg, body, distilled, true_cfg):
    from flux_nf4.server.sdapi_mapping import to_wish
    from flux_nf4.server.sdapi_schemas import TextToImage

    spec = to_wish(TextToImage(prompt="a", **body), fake_capabilities(), cfg).spec

    assert (spec.distilled_guidance_scale, spec.guidance_scale) == (distilled, true_cfg)


# ---- img2img and png-info -----------------------------------------------------------------------


def test_an_image_is_drawn_from_an_image(server, api):
    picture = image_file(64, 64)
    body = {"init_images": [f"data:image/png;base64,{in_base64(picture)}"], "prompt": "a"}
    response = api.post("/img2img", json=body | {"steps": 1, "denoising_strength": 0.4})
    spec = server.engine.jobs(owner="local")[-1].spec

    assert response.status_code == 200
    assert (spec.image, spec.mask_image, spec.strength) == (picture, None, 0.4)
    assert response.json()["parameters"].keys().isdisjoint({"init_images", "mask"})


def test_an_image_on_its_side_is_as_wide_as_one_sees_it(api):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (128, 64)).save(file, "JPEG", exif=exif)
    body = {"init_images": [in_base64(file.getvalue())], "width": 64, "height": 128, "steps": 1}
    info = json.loads(api.post("/img2img", json=body).json()["info"])

    assert info["warnings"] == []


def test_a_mask_can_be_turned_around(server, api):
    body = {
        "init_images": [in_base64(image_file())],
        "mask": in_base64(image_file(mode="L", colour=255)),
        "inpainting_mask_invert": 1,
        "steps": 1,
    }
    api.post("/img2img", json=body)
    spec = server.engine.jobs(owner="local")[-1].spec

    assert Image.open(io.BytesIO(spec.mask_image)).getextrema() == (0, 0)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"mask_blur": 4}, ["mask_blur"]),
        ({"inpaint_full_res": True}, ["inpaint_full_res"]),
        ({"inpainting_fill": 2}, ["inpainting_fill"]),
        ({"mask_blur": 0, "inpaint_full_res": 0, "inpainting_fill": 1}, []),
    ],
)
def test_what_is_done_otherwise_about_a_mask_is_told(api, asked, told):
    picture = in_base64(image_file())
    body = {"init_images": [picture], "steps": 1} | asked

    with_mask = json.loads(api.post("/img2img", json=body | {"mask": picture}).json()["info"])
    without = json.loads(api.post("/img2img", json=body).json()["info"])
    assert [said.split("`")[1] for said in with_mask["warnings"]] == told
    assert without["warnings"] == []


def test_cropping_and_further_images_are_told(api):
    body = {"init_images": [in_base64(image_file(96, 64))] * 2, "steps": 1, "width": 64}
    info = json.loads(api.post("/img2img", json=body).json()["info"])

    assert len(info["warnings"]) == 2


@pytest.mark.parametrize("init_images", [None, [], ["%"], [in_base64(b"GIF89a")], [""]])
def test_an_image_that_is_none_is_an_error_that_names_the_field(api, init_images):
    response = api.post("/img2img", json={"init_images": init_images})

    assert response.status_code == 400
    assert "`init_images`" in response.json()["detail"]


def test_png_info_gives_back_what_made_an_image(api):
    answer = drawn(api, prompt="a cat", width=80)
    told = api.post("/png-info", json={"image": answer["images"][0]}).json()

    assert told["info"] == answer["info"]["infotexts"][0]
    assert json.loads(told["items"]["flux_nf4"])["prompt"] == "a cat"
    assert told["parameters"]["Prompt"] == "a cat"
    assert (told["parameters"]["Size-1"], told["parameters"]["Size-2"]) == ("80", "64")


def test_png_info_of_a_plain_image_is_empty(api):
    told = api.post("/png-info", json={"image": in_base64(image_file())}).json()

    assert told == {"info": "", "items": {}, "parameters": {}}


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"steps": True}, "steps"),
        ({"width": 32}, "width"),
        ({"width": 10**9}, "width"),
        ({"distilled_cfg_scale": -1}, "distilled_cfg_scale"),
        ({"seed": 2**64}, "seed"),
        ({"n_iter": 0}, "n_iter"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a <lora:style:0.8>"}, "prompt"),
        ({"lora": [{"path": "x"}]}, "lora"),
        ({"n_iter": 10**30}, "n_iter"),
        ({"override_settings": {"samples_format": "gif"}}, "samples_format"),
        ({"override_settings": {"samples_format": []}}, "samples_format"),
    ],
)
def test_a_value_that_cannot_be_is_a_400_that_names_it(api, body, param):
    response = api.post("/txt2img", json={"prompt": "a", "steps": 1} | body)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["detail"] == response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("txt2img", '{"prompt": "a", "override_settings": {"x": NaN}}'),
        ("txt2img", '{"prompt": "a", "cfg_scale": 1e999}'),
        ("txt2img", "[" * 9_000),
        ("txt2img", '{"seed": ' + "9" * 5000 + "}"),
        ("options", '{"forge_inference_memory": Infinity}'),
        ("options", "[1]"),
        ("options", ""),
        ("png-info", "{}"),
    ],
)
def test_a_body_that_cannot_be_is_a_400_with_a_detail(api, path, content):
    headers = {"content-type": "application/json"}
    response = api.post(f"/{path}", content=content, headers=headers)

    assert response.status_code == 400
    assert response.json()["detail"]


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_a_body_that_is_nested_deeply_is_no_fault_of_ours(api, depth):
    content = '{"override_settings": {"x": ' + "[" * depth + "]" * depth + "}}"
    headers = {"content-type": "application/json"}

    assert api.post("/txt2img", content=content, headers=headers).status_code in (200, 400)


@pytest.mark.parametrize(
    ("method", "path", "request_", "status"),
    [
        ("GET", "no-such-route", {}, 404),
        ("GET", "txt2img", {}, 405),
        ("POST", "txt2img", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ("POST", "options", {"json": {"x": "x" * 1_000_000}}, 413),
        ("GET", "samplers", {"headers": {"host": "elsewhere.example"}}, 403),
    ],
)
def test_a_refusal_before_any_route_has_a_detail_too(api, method, path, request_, status):
    response = api.request(method, f"/{path}", **request_)

    assert response.status_code == status
    assert response.json()["detail"] == response.json()["error"]["message"]


def test_a_missing_key_has_a_detail_too():
    answer = ask("GET", "/sdapi/v1/samplers", settings={"api_keys": (KEY,)})

    assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_a_lora_is_refused(api):
    response = api.post("/txt2img", json={"prompt": "<lora:style:1> a"})

    assert "no LoRA adapters" in response.json()["detail"]
    assert response.json()["error"]["code"] == "unsupported_value"


def test_a_job_that_failed_tells_why_and_what_to_do(server, api):
    server.engine.fail_next = out_of_memory()
    response = post(api, {})

    assert response.status_code == 503
    assert "try a smaller size" in response.json()["detail"]


def test_a_full_queue_says_when_to_come_back():
    engine = FakeEngine(max_queue=1)
    with live_server(engine) as live, httpx2.Client(base_url=f"{live.url}/sdapi/v1") as api:
        live.pull(engine.hold)
        running = started(api)
        wait_until(lambda: engine.status().num_running)
        waiting = started(api)
        wait_until(lambda: engine.status().num_queued)
        response = post(api, {})
        live.pull(engine.release)
        running.join()
        waiting.join()

    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    assert "the queue is full" in response.json()["detail"]


# ---- progress and interruption ------------------------------------------------------------------


def test_idle_is_zero_progress_and_no_jobs(api):
    told = api.get("/progress").json()

    assert (told["progress"], told["state"]["job_count"]) == (0.0, 0)
    assert told["current_image"] is None


def test_progress_shows_steps_and_the_picture_so_far():
    with live_server() as live, httpx2.Client(base_url=f"{live.url}/sdapi/v1") as api:
        live.pull(live.engine.hold)
        request = started(api, steps=8)
        wait_until(lambda: live.engine.jobs(owner="local"))
        live.pull(live.engine.allow_steps, 4)
        wait_until(lambda: api.get("/progress").json()["state"]["sampling_step"] == 4)
        told = api.get("/progress").json()
        bare = api.get("/progress", params={"skip_current_image": True}).json()
        live.pull(live.engine.release)
        request.join()

    assert told["progress"] == 0.5
    assert (told["state"]["job_count"], told["state"]["sampling_steps"]) == (1, 8)
    assert Image.open(io.BytesIO(base64.b64decode(told["current_image"]))).size == (32, 32)
    assert bare["current_image"] is None
    assert request.response.status_code == 200


@pytest.mark.parametrize("verb", ["interrupt", "skip"])
def test_an_interrupted_request_answers_with_what_it_has(verb):
    with live_server() as live, httpx2.Client(base_url=f"{live.url}/sdapi/v1") as api:
        live.pull(live.engine.hold)
        request = started(api, steps=4, n_iter=3)
        wait_until(lambda: live.engine.jobs(owner="local"))
        live.pull(live.engine.allow_steps, 5)
        wait_until(lambda: live.engine.started_steps == 5)
        assert api.post(f"/{verb}").status_code == 200
        live.pull(live.engine.release)
        request.join()
        answer = request.response.json()

    assert len(answer["images"]) == 1
    assert "interrupted" in json.loads(answer["info"])["warnings"]


def test_interrupted_before_the_first_image_is_an_error():
    with live_server() as live, httpx2.Client(base_url=f"{live.url}/sdapi/v1") as api:
        live.pull(live.engine.hold)
        request = started(api)
        wait_until(lambda: api.get("/progress").json()["state"]["job_count"])
        api.post("/interrupt")
        live.pull(live.engine.release)
        request.join()

    assert request.response.status_code == 499
    assert request.response.json()["detail"] == "the job was cancelled"


def test_interrupting_when_idle_does_nothing(api):
    assert api.post("/interrupt").json() == {}


def test_a_caller_sees_and_stops_nothing_but_his_own():
    keys = ("k" * 20, "m" * 20)
    with live_server(api_keys=keys) as live:
        ours, theirs = (
            httpx2.Client(base_url=f"{live.url}/sdapi/v1", auth=("user", key)) for key in keys
        )
        live.pull(live.engine.hold)
        request = started(ours)
        wait_until(lambda: ours.get("/progress").json()["state"]["job_count"])
        seen = theirs.get("/progress").json()
        theirs.post("/interrupt")
        live.pull(live.engine.release)
        request.join()
        ours.close()
        theirs.close()

    assert (seen["progress"], seen["state"]["job_count"]) == (0.0, 0)
    assert request.response.status_code == 200


def test_a_client_that_leaves_stops_its_job():
    with live_server() as live:
        live.pull(live.engine.hold)
        client = http.client.HTTPConnection("127.0.0.1", live.port)
        headers = {"Content-Type": "application/json"}
        client.request("POST", "/sdapi/v1/txt2img", json.dumps({"prompt": "a"}), headers)
        wait_until(lambda: live.engine.status().num_running)
        client.close()
        wait_until(lambda: "disconnect" in live.engine.cancel_causes.values())


# ---- options and pickers ------------------------------------------------------------------------


def test_options_name_the_model_and_are_forges(api):
    options = api.get("/options").json()

    assert options["sd_model_checkpoint"] == fake_capabilities().model
    assert options["forge_preset"] == "flux"


@pytest.mark.parametrize(("name", "form"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_the_format_of_images_can_be_chosen(api, name, form):
    answer = drawn(api, override_settings={"samples_format": name})
    data = picture(answer)

    assert Image.open(io.BytesIO(data)).format == form
    assert read_image(data).settings.seed == 5


def test_options_are_kept_for_the_caller_alone():
    keys = ("k" * 20, "m" * 20)
    with live_server(api_keys=keys) as live:
        ours, theirs = (
            httpx2.Client(base_url=f"{live.url}/sdapi/v1", auth=("user", key)) for key in keys
        )
        ours.post("/options", json={"samples_format": "jpg", "forge_inference_memory": 4096})
        kept, others = ours.get("/options").json(), theirs.get("/options").json()
        answer = drawn(ours)
        ours.close()
        theirs.close()

    assert (kept["samples_format"], kept["forge_inference_memory"]) == ("jpg", 4096)
    assert (others["samples_format"], others["forge_inference_memory"]) == ("png", 1024)
    assert Image.open(io.BytesIO(picture(answer))).format == "JPEG"


def test_options_that_have_no_effect_are_told(api):
    told = api.post("/options", json={"forge_async_loading": "Async", "unheard_of": 1}).json()

    assert len(told["warnings"]) == 2


@pytest.mark.parametrize(
    ("strict", "status"), [({}, 200), ({"strict_model": True}, 404)], ids=["lax", "strict"]
)
def test_another_model_is_told_or_refused_as_the_server_was_told(strict, status):
    with live_server(**strict) as live:
        body = {"sd_model_checkpoint": "sdxl.safetensors"}
        response = httpx2.post(f"{live.url}/sdapi/v1/options", json=body)

    assert response.status_code == status


def test_every_served_name_is_a_checkpoint_without_a_path():
    with live_server(served_model_names=("flux", "dall-e")) as live:
        models = httpx2.get(f"{live.url}/sdapi/v1/sd-models").json()

    assert [model["title"] for model in models] == ["flux", "dall-e"]
    assert [model["filename"] for model in models] == ["flux", "dall-e"]


@pytest.mark.parametrize(
    "path",
    [
        *("samplers", "schedulers", "upscalers", "latent-upscale-modes", "sd-modules", "sd-vae"),
        *("loras", "prompt-styles", "hypernetworks", "face-restorers", "realesrgan-models"),
    ],
)
def test_pickers_are_lists(api, path):
    assert isinstance(api.get(f"/{path}").json(), list)


@pytest.mark.parametrize("path", ["cmd-flags", "memory", "scripts", "embeddings"])
def test_other_tables_are_objects(api, path):
    assert isinstance(api.get(f"/{path}").json(), dict)


def test_flags_hold_no_key():
    with live_server(api_keys=("s3cret" * 4,)) as live:
        text = httpx2.get(f"{live.url}/sdapi/v1/cmd-flags", auth=("u", "s3cret" * 4)).text

    assert "s3cret" not in text


@pytest.mark.parametrize("path", ["refresh-checkpoints", "refresh-loras"])
def test_refreshing_is_taken(api, path):
    assert api.post(f"/{path}").status_code == 200


def test_an_unknown_route_is_a_404(api):
    assert api.post("/interrogate").status_code == 404
