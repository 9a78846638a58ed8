"""A worker without a model. Its argument says how it starts, a job's prompt what becomes of it.

ready           answers; the pixels of an image are its seed
exit            dies before it is ready
killed          is killed before it is ready
unloadable      says that the model is missing, and dies
mute            never says a word
garbage         says what is no frame
planned         ready, with a plan for memory: it needs 1 GiB, and dies of a budget of 1 byte
child           ready, with a process of its own that outlives it unless its group is killed

hold PATH       one step, then waits: for a cancel, or for a writer at the pipe PATH
deaf            one step, then hears no cancel, and says nothing more
busy            steps without end; hears no cancel
die             dies in the middle of its first image, its pixels in the shared memory
die once PATH   the same, but only where PATH does not exist
hang once PATH  stops there instead
garbage         says what is no frame
stranger        speaks of another job
quit            says that it was cancelled, which it was not
huge            says that an image is larger than images can be
fail            tells that it ran out of memory
notice          a notice before the images
anything else   draws
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from flux_nf4.server.frames import pack_frame, put_shared, read_frame, take_shared

CAPABILITIES = {
    "model": "fake",
    "variant": "dev",
    "quantization": "nf4 v2",
    "device": "cpu",
    "dtype": "bfloat16",
    "default_width": 64,
    "default_height": 64,
    "default_steps": 2,
    "embeds_guidance": True,
    "max_sequence_length": 32,
    "licence": "Apache-2.0",
    "is_demo": True,
}
USAGE = {"budget": 6, "peak": 5, "resident": 4, "moved": 3}
# Unbuffered: `select` must see what is there.
ORDERS = os.fdopen(0, "rb", buffering=0, closefd=False)


def send(kind, **values):
    os.write(1, pack_frame({"kind": kind} | values))


def sleep_for_ever():
    while True:
        signal.pause()


def die():
    os.write(2, b"out of luck\n")
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_taken():
    while (order := read_frame(ORDERS)) is not None and order["kind"] != "taken":
        pass


def memory(vram):
    plan = [{"name": "denoise", "peak_bytes": 2**30}]
    sizes = {"device_bytes": vram or 8 * 2**30, "total_bytes": 12 * 2**30, "step_bytes": 0}
    return {"vram": vram, **sizes, "plan": plan}


def answer_for_budget(vram):
    if vram == 1:
        die()
    if vram is None or vram >= 2**30:
        return send("memory", memory=memory(vram), error=None)
    error = {"message": "it needs 1,024 MiB", "hint": "allow 1024MiB", "class": "DoesNotFitError"}
    return send("memory", memory=None, error=error)


def draw(order, shared):
    job, spec = order["job"], order["spec"]
    size = {"width": spec["width"], "height": spec["height"]}
    for index in range(spec["num_images"]):
        send("stage", job=job, stage="denoise")
        for step in range(1, spec["num_inference_steps"] + 1):
            preview = None
            if spec["num_previews"]:
                put_shared(shared, [bytes(3 * 8 * 8)])
                preview = {"width": 8, "height": 8}
            num_steps = spec["num_inference_steps"]
            send("step", job=job, step=step, num_steps=num_steps, preview=preview)
            if preview:
                wait_until_taken()
        if not act(order, index, shared):
            return
        seed = spec["seed"] + index
        put_shared(shared, [bytes([seed % 256]) * (3 * spec["width"] * spec["height"])])
        send("image", job=job, index=index, seed=seed, **size)
        wait_until_taken()
    send("done", job=job, usage=USAGE)


def act(order, index, shared):
    """What the prompt says, after the steps of an image; whether the image is drawn."""
    job, prompt = order["job"], order["spec"]["prompt"]
    match prompt.split():
        case ["hold", path]:
            return hold(job, path)
        case ["deaf"]:
            sleep_for_ever()
        case ["busy"]:
            while True:
                send("step", job=job, step=1, num_steps=2, preview=None)
                time.sleep(0.01)
        case ["die" | "hang", *once] if not once or not Path(once[1]).exists():
            if once:
                Path(once[1]).touch()
            put_shared(shared, [bytes(100_000)])
            die() if prompt.startswith("die") else sleep_for_ever()
        case ["fail"]:
            error = {"message": "no memory", "hint": None, "code": "out_of_memory", "status": 503}
            send("failed", job=job, usage=None, error=error)
            return False
        case _:
            say(order, shared)
    return True


def say(order, shared):
    job = order["job"]
    match order["spec"]["prompt"]:
        case "garbage":
            os.write(1, b"\xff" * 100)
            sleep_for_ever()
        case "stranger":
            send("done", job="job_of_another", usage=None)
        case "quit":
            send("cancelled", job=job, usage=None)
        case "huge":
            send("image", job=job, index=0, seed=0, width=10**6, height=10**6)
        case "notice":
            send("notice", job=job, message="a notice", is_oom=True)
        case "uploads":
            sizes = order["uploads"]
            texts = take_shared(shared, sum(sizes.values())).decode()
            send("notice", job=job, message=f"{sizes} {texts}", is_oom=False)


def hold(job, path):
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while True:
            ready, _, _ = select.select([ORDERS, pipe], [], [])
            if pipe in ready and pipe.read(1):
                return True
            if ORDERS in ready:
                order = read_frame(ORDERS)
                if order is None:
                    os._exit(0)
                if order["kind"] == "memory":
                    answer_for_budget(order["vram"])
                if order["kind"] == "cancel" and order["job"] == job:
                    send("cancelled", job=job, usage=None)
                    return False


def main(start, child_file=""):
    settings = read_frame(ORDERS)
    match start:
        case "exit":
            sys.exit("no such luck")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "mute":
            sleep_for_ever()
        case "garbage":
            os.write(1, b"Loading checkpoint shards: 100%\n")
            sleep_for_ever()
        case "unloadable":
            send(
                "unloadable",
                error={"message": "no such model", "hint": None, "class": "ModelNotFoundError"},
            )
            return
        case "child":
            command = [sys.executable, "-c", "import signal; signal.pause()"]
            nowhere = subprocess.DEVNULL
            child = subprocess.Popen(command, stdin=nowhere, stdout=nowhere)
            Path(child_file).write_text(str(child.pid))
    is_all = settings["device"] == "all"
    send("loading", stage="weights")
    send("hello", device="cuda:0" if is_all else "cpu", num_devices=3 if is_all else 1)
    planned = memory(settings["vram"]) if start == "planned" else None
    send("ready", capabilities=CAPABILITIES | {"memory": planned}, usage=None)
    while (order := read_frame(ORDERS)) is not None:
        if order["kind"] == "job":
            draw(order, settings["shared_memory"])
        elif order["kind"] == "memory":
            answer_for_budget(order["vram"])


if __name__ == "__main__":
    main(*sys.argv[1:])
