import asyncio
import base64
import json

import pytest
from asgi_client import ask, error_of, finished_job, open_client
from server_fakes import FakeEngine, fake_capabilities, image_file, out_of_memory

from flux_nf4 import __version__

CAT = {"prompt": "a cat", "num_inference_steps": 4}


def events_of(text):
    """(number, event, data) of each frame; comments left out."""
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    parsed = [dict(line.split(": ", 1) for line in frame.split("\n")) for frame in frames]
    return [(int(frame["id"]), frame["event"], json.loads(frame["data"])) for frame in parsed]


# ---- jobs ---------------------------------------------------------------------------------------


def test_a_job_is_accepted_at_once_with_its_seed_fixed():
    answer = ask("POST", "/v1/jobs", json=CAT)
    job = answer.json()

    assert answer.status_code == 202
    assert (job["object"], job["state"]) == ("job", "queued")
    assert 0 <= job["request"]["seed"] < 2**32


def test_a_finished_job_has_its_images():
    job, _ = finished_job({**CAT, "num_images": 2, "seed": 5})

    assert job["state"] == "done"
    assert job["progress"] == 1
    assert [image["seed"] for image in job["images"]] == [5, 6]
    assert job["images"][1]["url"] == f"/v1/jobs/{job['id']}/images/1.png"


def test_what_is_left_out_is_the_models_own():
    request = finished_job({"prompt": "a cat"})[0]["request"]

    assert (request["width"], request["height"]) == (64, 64)
    assert request["num_inference_steps"] == 20
    assert request["distilled_guidance_scale"] == 3.5
    assert (request["num_images"], request["schedule"]) == (1, "flux")


def test_a_failed_job_tells_why_and_what_to_do():
    engine = FakeEngine()
    engine.fail_next = out_of_memory()
    job, events = finished_job(CAT, engine=engine)

    assert job["state"] == "failed"
    assert job["error"]["code"] == "out_of_memory"
    assert job["error"]["hint"] == "try a smaller size"
    assert events_of(events)[-1][2]["job"]["error"] == job["error"]


def test_notices_are_told():
    engine = FakeEngine()
    engine.notices = ["the prompt is empty"]

    assert finished_job(CAT, engine=engine)[0]["notices"] == ["the prompt is empty"]


def test_images_are_sent_in_base64_and_not_told_back():
    picture = base64.b64encode(image_file()).decode()
    engine = FakeEngine()
    job, _ = finished_job(
        {**CAT, "image": f"data:image/png;base64,{picture}", "mask_image": picture}, engine=engine
    )

    assert engine.jobs(owner="local")[0].spec.image == image_file()
    assert (job["request"]["has_image"], job["request"]["has_mask"]) == (True, True)
    assert "image" not in job["request"]


def test_jobs_are_listed_newest_first_up_to_a_limit():
    async def run():
        async with open_client() as client:
            ids = [(await client.post("/v1/jobs", json=CAT)).json()["id"] for _ in range(3)]
            return ids, (await client.get("/v1/jobs?limit=2")).json()

    ids, listed = asyncio.run(run())
    assert listed["object"] == "list"
    assert [job["id"] for job in listed["data"]] == [ids[2], ids[1]]


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1"])
def test_a_limit_out_of_range_is_named(limit):
    assert error_of(ask("GET", f"/v1/jobs?limit={limit}"))["param"] == "limit"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 7),
        ("prompt", None),
        ("width", 65),
        ("height", 32),
        ("width", "64"),
        ("num_inference_steps", 0),
        ("num_inference_steps", True),
        ("distilled_guidance_scale", 101),
        ("guidance_scale", 0.5),
        ("seed", -1),
        ("num_images", 11),
        ("schedule", "karras"),
        ("strength", 0),
        ("image", "%%%"),
        ("image", ""),
        ("mask_image", base64.b64encode(image_file()).decode()),
        ("num_previews", -1),
        ("lora", [{"name": "x"}]),
        ("steps", 3),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(field, value):
    answer = ask("POST", "/v1/jobs", json={"prompt": "a cat", field: value})

    assert answer.status_code == 400
    assert error_of(answer)["param"] == field


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/job_x"),
        ("DELETE", "/v1/jobs/job_x"),
        ("POST", "/v1/jobs/job_x/cancel"),
        ("GET", "/v1/jobs/job_x/events"),
        ("GET", "/v1/jobs/job_x/images/0.png"),
    ],
)
def test_a_job_that_does_not_exist_is_a_404(method, path):
    answer = ask(method, path)

    assert answer.status_code == 404
    assert error_of(answer)["code"] == "job_not_found"


# ---- stopping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rest"), [("POST", "/cancel"), ("DELETE", "")])
def test_a_running_job_stops_at_its_next_step(method, rest):
    async def run():
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine) as client:
            url = f"/v1/jobs/{(await client.post('/v1/jobs', json=CAT)).json()['id']}"
            engine.allow_steps(1)
            (job,) = engine.jobs(owner="local")
            async for event in job.events():
                if event.kind == "step":
                    break
            await client.request(method, url + rest)
            engine.release()
            await job.wait()
            return (await client.get(url)).json(), engine.started_steps

    job, num_steps = asyncio.run(run())
    assert job["state"] == "cancelled"
    assert job["error"] is None
    assert num_steps == 1


def test_deleting_a_finished_job_forgets_it():
    async def run():
        async with open_client() as client:
            url = f"/v1/jobs/{(await client.post('/v1/jobs', json=CAT)).json()['id']}"
            await client.get(f"{url}/events")
            return await client.delete(url), await client.get(url)

    deleted, asked = asyncio.run(run())
    assert deleted.json()["state"] == "done"
    assert asked.status_code == 404


def test_a_waiting_job_tells_its_place():
    async def run():
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine) as client:
            jobs = [(await client.post("/v1/jobs", json=CAT)).json() for _ in range(3)]
            async for event in engine.jobs(owner="local")[0].events():
                if event.kind == "started":
                    break
            return (await client.get(f"/v1/jobs/{jobs[2]['id']}")).json()

    assert asyncio.run(run())["position"] == 2


# ---- events -------------------------------------------------------------------------------------


def test_events_tell_everything_from_the_queue_to_the_end():
    _, text = finished_job({**CAT, "num_previews": 1})
    kinds = [kind for _, kind, _ in events_of(text)]

    assert kinds == ["queued", "started", "stage", *["step"] * 4, "image", "done"]


def test_events_are_numbered_from_one():
    _, text = finished_job(CAT)
    numbers = [number for number, _, _ in events_of(text)]

    assert numbers == list(range(1, len(numbers) + 1))


def test_a_step_tells_how_far_it_is_and_a_preview_is_a_jpeg():
    # Watched from the beginning: of a job that is over no previews are kept.
    async def run():
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine) as client:
            job = (await client.post("/v1/jobs", json={**CAT, "num_previews": 1})).json()
            watching = asyncio.create_task(client.get(f"/v1/jobs/{job['id']}/events"))
            for _ in range(4):
                engine.allow_steps(1)
                await asyncio.sleep(0)
            return (await watching).text

    steps = [data for _, kind, data in events_of(asyncio.run(run())) if kind == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert {step["num_steps"] for step in steps} == {4}


def test_the_last_event_holds_the_job():
    job, text = finished_job(CAT)

    assert events_of(text)[-1][2] == {"job": job}


def test_a_reader_that_comes_back_goes_on_where_it_was():
    async def run(last):
        async with open_client() as client:
            job = (await client.post("/v1/jobs", json=CAT)).json()
            url = f"/v1/jobs/{job['id']}/events"
            await client.get(url)
            return (await client.get(url, headers={"last-event-id": last})).text

    assert events_of(asyncio.run(run("6")))[0][0] == 7
    assert asyncio.run(run("999")) == ""
    assert events_of(asyncio.run(run("x")))[0][0] == 1


# ---- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("0.png", 200),
        ("0.jpeg", 200),
        ("0.webp", 200),
        ("1.png", 404),
        ("0.gif", 404),
        ("0", 404),
        ("-1.png", 404),
        ("0.svg", 404),
        ("99999.png", 404),
    ],
)
def test_an_image_is_served_as_what_it_is(name, status):
    async def run():
        async with open_client() as client:
            url = f"/v1/jobs/{(await client.post('/v1/jobs', json=CAT)).json()['id']}"
            await client.get(f"{url}/events")
            return await client.get(f"{url}/images/{name}")

    answer = asyncio.run(run())
    assert answer.status_code == status
    if status == 200:
        assert answer.headers["content-type"] == f"image/{name.partition('.')[2]}"
        assert answer.headers["x-content-type-options"] == "nosniff"


# ---- capabilities -------------------------------------------------------------------------------


def capabilities(engine=None, **settings):
    return ask("GET", "/v1/capabilities", engine=engine, settings=settings).json()


def test_capabilities_tell_the_model_the_limits_and_the_version():
    told = capabilities(max_pixels=10**6)

    assert told["model"]["name"] == "demo"
    assert told["limits"]["max_pixels"] == 10**6
    assert told["features"]["lora"] is False
    assert told["version"] == __version__


def test_every_size_that_is_offered_can_be_drawn():
    for default in (64, 256, 1024):
        engine = FakeEngine(
            capabilities=fake_capabilities(default_width=default, default_height=default)
        )
        sizes = capabilities(engine)["sizes"]
        assert len({(size["width"], size["height"]) for size in sizes}) == 5
        for size in sizes:
            assert size["width"] % 16 == size["height"] % 16 == 0
            assert min(size["width"], size["height"]) >= 64


def test_a_model_made_for_few_steps_has_one_preset():
    engine = FakeEngine(capabilities=fake_capabilities(default_steps=4))

    assert capabilities(engine)["presets"] == [{"name": "auto", "num_inference_steps": 4}]


def test_what_an_image_tells_of_its_making():
    async def run():
        async with open_client() as client:
            url = f"/v1/jobs/{(await client.post('/v1/jobs', json=CAT)).json()['id']}"
            await client.get(f"{url}/events")
            png = (await client.get(f"{url}/images/0.png")).content
            headers = {"content-type": "image/png"}
            return (await client.post("/v1/image-info", content=png, headers=headers)).json()

    told = asyncio.run(run())
    assert told["settings"]["prompt"] == "a cat"
    assert told["pairs"]["Steps"] == "4"
    assert (told["width"], told["height"]) == (64, 64)


@pytest.mark.parametrize("data", [b"", b"no image", image_file()[:40]])
def test_what_is_no_image_tells_nothing(data):
    answer = ask("POST", "/v1/image-info", content=data, headers={"content-type": "image/png"})

    assert answer.status_code == 400
