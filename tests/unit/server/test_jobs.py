import asyncio
import json

import pytest
from engines import make_spec

from flux_nf4.errors import FormatError, InputError
from flux_nf4.server.jobs import Job, JobError, JobImage, JobSpec


def make_job(**more):
    return Job(make_spec(**more), owner="somebody", api="jobs")


def collect(job, after=0):
    async def read():
        return [event async for event in job.events(after)]

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("negative_prompt", 5),
        ("width", 100),
        ("height", "64"),
        ("width", True),
        ("num_inference_steps", 0),
        ("distilled_guidance_scale", float("nan")),
        ("guidance_scale", 0.5),
        ("seed", -1),
        ("num_images", 0),
        ("schedule", "karras"),
        ("strength", 0),
        ("strength", 1.5),
        ("num_previews", -1),
        ("mask_image", b"png"),
    ],
)
def test_what_is_wrong_is_named_first(name, value):
    with pytest.raises(InputError, match=f"^`{name}` "):
        make_spec(**{name: value})


def test_a_size_between_the_legal_ones_hints_at_both():
    with pytest.raises(InputError) as caught:
        make_spec(width=100)

    assert caught.value.hint == "use 96 or 112"


def test_a_spec_survives_json():
    spec = make_spec(image=b"\x89PNG", mask_image=b"\xff\x00", guidance_scale=2.5, num_previews=3)

    assert JobSpec.from_dict(json.loads(json.dumps(spec.to_dict())), spec.uploads) == spec


@pytest.mark.parametrize("change", [{"colour": "red"}, {"seed": None}])
def test_what_is_no_spec_is_refused(change):
    with pytest.raises((FormatError, InputError)):
        JobSpec.from_dict(make_spec().to_dict() | change, {})


def test_a_spec_without_a_seed_is_refused():
    values = make_spec().to_dict()
    del values["seed"]

    with pytest.raises(FormatError, match="seed"):
        JobSpec.from_dict(values, {})


def test_uploads_are_not_in_its_text():
    assert "secret" not in repr(make_spec(image=b"secret"))


def test_ids_are_prefixed_and_differ():
    first, second = make_job(), make_job()

    assert first.id.startswith("job_")
    assert first.id != second.id


def test_events_are_numbered_from_one():
    job = make_job()
    job.start()
    job.finish("done")

    assert [(event.number, event.kind) for event in collect(job)] == [
        (1, "queued"),
        (2, "started"),
        (3, "done"),
    ]


def test_events_after_a_number_leave_out_the_others():
    job = make_job()
    job.start()
    job.finish("done")

    assert [event.number for event in collect(job, after=2)] == [3]


def test_events_after_the_last_end_at_once():
    job = make_job()
    job.finish("cancelled")

    assert collect(job, after=100) == []


def test_a_reader_follows_to_the_end():
    async def claim():
        job = make_job()
        reading = asyncio.create_task(anext(job.events(after=1)))
        await asyncio.sleep(0)
        job.finish("done")
        assert (await reading).kind == "done"

    asyncio.run(claim())


def test_two_readers_see_the_same():
    async def claim():
        job = make_job()

        async def read():
            return [event.number async for event in job.events()]

        readers = [asyncio.create_task(read()) for _ in range(2)]
        await asyncio.sleep(0)
        job.start()
        job.finish("done")
        assert await asyncio.gather(*readers) == [[1, 2, 3]] * 2

    asyncio.run(claim())


def test_only_the_newest_preview_is_kept():
    job = make_job()
    for step in (1, 2):
        job.emit("step", {"step": step, "preview": b"jpeg"})
    job.emit("step", {"step": 3, "preview": None})

    assert [event.data.get("preview") for event in job._log] == [None, None, b"jpeg", None]


def test_a_finished_job_keeps_no_preview():
    job = make_job()
    job.emit("step", {"step": 1, "preview": b"jpeg"})
    job.finish("done")

    assert all(event.data.get("preview") is None for event in collect(job))


def test_a_slow_reader_still_gets_the_preview_in_his_hand():
    async def claim():
        job = make_job()
        job.emit("step", {"step": 1, "preview": b"first"})
        reader = job.events(after=1)
        event = await anext(reader)
        job.emit("step", {"step": 2, "preview": b"second"})
        assert event.data["preview"] == b"first"

    asyncio.run(claim())


def test_a_thousand_steps_do_not_pile_up():
    job = make_job()
    for step in range(1000):
        job.emit("step", {"step": step, "preview": None})
    job.emit("image", {"index": 0})
    job.finish("done")

    events = collect(job)
    assert len(events) < 300
    assert [event.kind for event in events[:1] + events[-2:]] == ["queued", "image", "done"]


def test_a_reader_who_missed_steps_goes_on_with_the_next():
    job = make_job()
    for step in range(1000):
        job.emit("step", {"step": step, "preview": None})
    job.finish("done")

    numbers = [event.number for event in collect(job, after=10)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 1002


def test_a_retry_begins_anew():
    job = make_job()
    job.start()
    job.step, job.notices = 2, ["a notice"]
    job.retry()

    assert (job.state, job.step, job.notices, job.images) == ("queued", 0, [], [])


def test_progress_counts_images_and_steps():
    job = make_job(num_images=2, num_inference_steps=4)
    job.start()
    image = JobImage(index=0, seed=7, width=64, height=64, png=b"png", sha256="")
    job.step, job.image_index = 4, 0
    before_the_image = job.progress
    job.images.append(image)
    after_it = job.progress
    job.step, job.image_index = 1, 1

    assert (before_the_image, after_it, job.progress) == (0.5, 0.5, 0.625)


def test_the_last_event_of_a_failure_holds_the_error():
    job = make_job()
    job.finish("failed", JobError(message="no memory", code="out_of_memory", status=503))

    assert collect(job)[-1].data["error"]["code"] == "out_of_memory"


def test_what_a_job_keeps_counts_its_texts_as_well():
    grown = make_job(prompt="a" * 1000, negative_prompt="猫" * 1000).size_bytes
    assert grown - make_job(prompt="a").size_bytes > 2900
