"""One test, at least, for each row of the tables of threats that is the front's to meet."""

import ast
import asyncio
import base64
from pathlib import Path

import pytest
from asgi_client import KEY, OTHER_KEY, ask, bearer, error_of, open_client
from server_fakes import FakeEngine, image_file

import flux_nf4
from flux_nf4.errors import InputError
from flux_nf4.server.app import build_app
from flux_nf4.server.schemas import EditRequest, ImageRequest, JobRequest
from flux_nf4.server.settings import ServeSettings

WITH_KEY = {"api_keys": (KEY, OTHER_KEY)}
OPEN = {"/", "/favicon.ico", "/livez", "/readyz", "/health", "/startupz"}
OPEN_FOLDERS = ("/static/", "/v1/files/")
JSON = {"content-type": "application/json"}


def all_routes():
    """Every route of the application, found by walking it: (method, path)."""

    def walk(routes):
        for route in routes:
            if getattr(route, "methods", None):
                yield from ((method, route.path) for method in route.methods)
            inner = getattr(route, "original_router", None) or getattr(route, "app", None)
            if hasattr(inner, "routes"):
                yield from walk(inner.routes)

    return sorted(set(walk(build_app(ServeSettings(), FakeEngine()).routes)))


def test_the_walk_finds_the_routes():
    assert {("POST", "/v1/jobs"), ("GET", "/docs"), ("POST", "/sdapi/v1/txt2img")} <= set(
        all_routes()
    )


# ---- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), all_routes())
def test_every_route_needs_a_key_but_health_page_and_links(method, path):
    is_open = path in OPEN or path.startswith(OPEN_FOLDERS)
    answer = ask(method, path, settings=WITH_KEY)

    assert (answer.status_code == 401) == (not is_open)


def test_a_missing_key_is_told_in_openais_shape():
    answer = ask("GET", "/v1/models", settings=WITH_KEY)

    assert error_of(answer)["type"] == "authentication_error"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_of_several_keys_opens(key):
    assert ask("GET", "/v1/models", settings=WITH_KEY, headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("given", ["wrong", "", KEY[:-1], KEY + "x", "\x80\xff", "Bearer"])
def test_a_wrong_key_does_not_open(given):
    headers = {"authorization": f"Bearer {given}".encode("latin-1")}

    assert ask("GET", "/v1/models", settings=WITH_KEY, headers=headers).status_code == 401


def basic(key):
    return {"authorization": f"Basic {base64.b64encode(f'user:{key}'.encode()).decode()}"}


def test_a1111s_clients_may_send_the_key_as_a_password():
    path = "/sdapi/v1/samplers"

    assert ask("GET", path, settings=WITH_KEY, headers=basic(KEY)).status_code == 200
    assert ask("GET", path, settings=WITH_KEY, headers=basic("no")).status_code == 401


def test_elsewhere_a_password_does_not_open():
    assert ask("GET", "/v1/models", settings=WITH_KEY, headers=basic(KEY)).status_code == 401


@pytest.mark.parametrize("value", ["Basic", "Basic !!!", "Basic gICA", "Basic \xe9", "Negotiate x"])
def test_an_odd_authorization_is_a_401(value):
    headers = {"authorization": value.encode("latin-1")}

    assert ask("GET", "/sdapi/v1/samplers", settings=WITH_KEY, headers=headers).status_code == 401


def test_the_keys_are_not_shown_when_the_settings_are_printed():
    assert KEY not in repr(ServeSettings(**WITH_KEY))


def test_a_job_does_not_exist_for_another_key():
    async def run():
        async with open_client(**WITH_KEY) as client:
            job = await client.post("/v1/jobs", json={"prompt": "a cat"}, headers=bearer())
            url = f"/v1/jobs/{job.json()['id']}"
            await client.get(f"{url}/events", headers=bearer())
            others = [
                await client.request(method, url + rest, headers=bearer(OTHER_KEY))
                for method, rest in (
                    ("GET", ""),
                    ("GET", "/events"),
                    ("GET", "/images/0.png"),
                    ("POST", "/cancel"),
                    ("DELETE", ""),
                )
            ]
            listed = await client.get("/v1/jobs", headers=bearer(OTHER_KEY))
            return others, listed.json()["data"]

    others, listed = asyncio.run(run())
    assert {answer.status_code for answer in others} == {404}
    assert listed == []


# ---- where it listens ---------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.local"])
def test_it_does_not_serve_others_without_a_key(host):
    with pytest.raises(InputError, match="no API key is set"):
        ServeSettings(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_no_key(host):
    assert ServeSettings(host=host).is_loopback


@pytest.mark.parametrize("allowance", [WITH_KEY, {"insecure": True}])
def test_a_key_or_a_clear_word_opens_it_to_others(allowance):
    assert not ServeSettings(host="0.0.0.0", **allowance).is_loopback


# ---- host names ---------------------------------------------------------------------------------


def status_for_host(host, **settings):
    return ask("GET", "/livez", settings=settings, headers={"host": host}).status_code


@pytest.mark.parametrize(
    "host", ["attacker.example", "localhost.attacker.example", "127.0.0.1.nip.io"]
)
def test_a_name_that_was_pointed_here_is_refused(host):
    assert status_for_host(host) == 403


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "[::1]:8000"])
def test_its_own_names_are_served(host):
    assert status_for_host(host) == 200


def test_a_name_on_the_list_is_served():
    assert status_for_host("box.local:8000", allowed_hosts=("box.local",)) == 200


def test_with_a_key_every_name_is_served():
    assert status_for_host("box.local", **WITH_KEY) == 200


def test_with_a_key_a_list_of_names_still_holds():
    assert status_for_host("attacker.example", allowed_hosts=("box.local",), **WITH_KEY) == 403


@pytest.mark.parametrize("host", ["", "a b", "user@localhost", "localhost/x", "localhost:99999999"])
def test_what_is_no_host_is_refused(host):
    assert status_for_host(host) == 400


# ---- origins ------------------------------------------------------------------------------------


def status_for_origin(origin, method="POST", **settings):
    headers = {"origin": origin, "host": "localhost:8000"}
    answer = ask(method, "/v1/jobs", settings=settings, headers=headers, json={"prompt": "a cat"})
    return answer.status_code


@pytest.mark.parametrize(
    "origin",
    [
        "https://attacker.example",
        "null",
        "http://localhost:9999",
        "http://127.0.0.1:8000",
        "http://[",
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_a_page_from_elsewhere_changes_nothing(origin, method):
    assert status_for_origin(origin, method) == 403


def test_its_own_page_may():
    assert status_for_origin("http://localhost:8000") == 202


def test_a_page_on_the_list_may():
    assert status_for_origin("https://a.example", cors_origins=("https://a.example",)) == 202


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_browser_that_names_no_origin_but_comes_from_elsewhere_changes_nothing(site):
    answer = ask("POST", "/v1/jobs", headers={"sec-fetch-site": site}, json={"prompt": "a cat"})

    assert answer.status_code == 403


def test_no_origin_may_read_unless_it_is_on_the_list():
    answer = ask("GET", "/v1/models", headers={"origin": "https://a.example"})

    assert not any(name.startswith("access-control") for name in answer.headers)


def test_an_origin_on_the_list_may_read():
    headers = {"origin": "https://a.example"}
    answer = ask(
        "GET", "/v1/models", headers=headers, settings={"cors_origins": ("https://a.example",)}
    )

    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["https://a.example", "https://b.example"])
def test_a_preflight_allows_only_origins_on_the_list(origin):
    answer = ask(
        "OPTIONS",
        "/v1/jobs",
        headers={"origin": origin, "access-control-request-method": "POST"},
        settings={"cors_origins": ("https://a.example",), **WITH_KEY},
    )

    assert answer.status_code == 204
    assert ("access-control-allow-methods" in answer.headers) == (origin == "https://a.example")


def test_a_page_on_the_list_may_send_what_its_client_sends():
    wanted = "authorization, content-type, x-stainless-lang, x-stainless-retry-count"
    answer = ask(
        "OPTIONS",
        "/v1/images/generations",
        headers={"origin": "https://a.example", "access-control-request-headers": wanted},
        settings={"cors_origins": ("https://a.example",)},
    )

    assert answer.headers["access-control-allow-headers"] == wanted


@pytest.mark.parametrize("origin", ["*", "a.example", "https://a.example/path"])
def test_an_origin_must_be_one(origin):
    with pytest.raises(InputError, match="cors-origin"):
        ServeSettings(cors_origins=(origin,))


# ---- bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"]
)
def test_what_a_form_of_another_site_can_send_is_not_taken_for_json(content_type):
    answer = ask(
        "POST", "/v1/jobs", content=b'{"prompt": "x"}', headers={"content-type": content_type}
    )

    assert answer.status_code == 415
    assert "application/json" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("path", "limit"), [("/v1/images/generations", 1_000_000), ("/v1/jobs", 25_000_000)]
)
def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(path, limit):
    headers = {**JSON, "content-length": str(limit + 1)}
    answer = ask("POST", path, headers=headers, content=b"{}")

    assert answer.status_code == 413
    assert error_of(answer)["code"] == "too_large"


@pytest.mark.parametrize("body", [b"[" * 10_001, b'{"a":1' + b',"b":1' * 5_000 + b"}"])
def test_json_of_too_many_values_is_not_even_parsed(body):
    answer = ask("POST", "/v1/jobs", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 413


def test_the_longest_prompt_of_short_words_is_parsed():
    prompt = ", ".join(["a red cat"] * 9_000)
    answer = ask("POST", "/v1/jobs", json={"prompt": prompt, "num_inference_steps": 1})

    assert answer.status_code == 202


@pytest.mark.parametrize("start", [b"0.", b"1"])
def test_a_number_without_measure_is_no_number(start):
    body = b'{"prompt": "a", "seed": ' + start + b"1" * 1000 + b"}"
    answer = ask("POST", "/v1/jobs", content=body, headers={"content-type": "application/json"})

    assert error_of(answer)["code"] == "invalid_json"


def test_a_body_that_says_nothing_of_its_length_is_counted_while_it_comes():
    sent = []

    async def endless():
        for _ in range(100):
            sent.append(1)
            yield b" " * 100_000

    settings = {"max_upload_bytes": 500_000}
    answer = ask(
        "POST", "/v1/images/generations", content=endless(), headers=JSON, settings=settings
    )

    assert answer.status_code == 413
    assert len(sent) < 30


def test_all_bodies_together_have_a_limit():
    answer = ask(
        "POST",
        "/v1/jobs",
        content=b" " * 2000,
        headers=JSON,
        settings={"max_buffered_bytes": 1000},
    )

    assert answer.status_code == 503
    assert error_of(answer)["code"] == "busy"


def test_a_body_counts_as_long_as_its_request_is_answered():
    async def claim():
        picture = base64.b64encode(image_file()).decode()
        engine = FakeEngine()
        engine.hold()
        async with open_client(engine, max_buffered_bytes=1000) as client:
            body = {"init_images": [picture], "steps": 1, "prompt": "x" * 500}
            first = asyncio.create_task(client.post("/sdapi/v1/img2img", json=body))
            while not engine.jobs(owner="local"):
                await asyncio.sleep(0)
            busy = await client.post("/v1/jobs", json={"prompt": "x" * 500})
            engine.release()
            assert (await first).status_code == 200
            after = await client.post("/v1/jobs", json={"prompt": "x" * 500})
        assert (busy.status_code, after.status_code) == (503, 202)

    asyncio.run(claim())


def test_a_body_that_does_not_arrive_in_time_is_cut_off():
    async def stalled():
        yield b"{"
        await asyncio.sleep(60)

    answer = ask(
        "POST", "/v1/jobs", content=stalled(), headers=JSON, settings={"body_timeout_s": 0.05}
    )

    assert answer.status_code == 408


@pytest.mark.parametrize("length", ["-1", "abc", "1_0", "٣"])
def test_a_length_that_is_no_number_is_refused(length):
    headers = {**JSON, "content-length": length.encode()}

    assert ask("POST", "/v1/jobs", headers=headers, content=b"{}").status_code == 413


# ---- images -------------------------------------------------------------------------------------


def test_an_image_with_too_many_pixels_is_refused_from_its_header():
    header = image_file(64, 64)
    bomb = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    answer = ask("POST", "/v1/jobs", json={"prompt": "x", "image": base64.b64encode(bomb).decode()})

    assert answer.status_code == 400
    assert error_of(answer)["param"] == "image"


def test_what_is_no_image_is_refused_by_its_content():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    answer = ask("POST", "/v1/jobs", json={"prompt": "x", "image": base64.b64encode(svg).decode()})

    assert answer.status_code == 400


@pytest.mark.parametrize("image", ["http://169.254.169.254/latest", "file:///etc/passwd"])
def test_an_address_is_no_image_and_is_not_fetched(image):
    answer = ask("POST", "/v1/jobs", json={"prompt": "x", "image": image})

    assert answer.status_code == 400
    assert "not base64" in error_of(answer)["message"]


# ---- work ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"width": 4096, "height": 4096}, "too_many_pixels"),
        ({"width": 2048, "height": 2048, "num_inference_steps": 1000}, "too_much_work"),
        (
            {"width": 1024, "height": 1024, "num_images": 10, "num_inference_steps": 200},
            "too_much_work",
        ),
    ],
)
def test_a_request_for_too_much_is_refused(more, code):
    answer = ask("POST", "/v1/jobs", json={"prompt": "a cat", **more})

    assert answer.status_code == 400
    assert error_of(answer)["code"] == code


def test_a_full_queue_is_a_429_that_says_when_to_come_back():
    async def run():
        engine = FakeEngine(max_queue=1)
        engine.hold()
        async with open_client(engine) as client:
            answers = [await client.post("/v1/jobs", json={"prompt": "x"}) for _ in range(4)]
        return answers[-1]

    answer = asyncio.run(run())
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert error_of(answer)["type"] == "rate_limit_error"


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/livez", "/v1/models", "/nothing", "/docs"])
def test_every_answer_forbids_framing_sniffing_and_foreign_code(path):
    headers = ask("GET", path).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server/app.py",
        "/static/..%2f..%2fcli%2fapp.py",
        "/v1/jobs/..%2f..%2fetc%2fpasswd",
        "/v1/jobs/x/images/..%2f..%2fetc%2fpasswd",
        "/v1/files/..%2f..%2fetc%2fpasswd",
    ],
)
def test_no_path_of_a_request_leads_to_a_file(path):
    assert ask("GET", path).status_code == 404


def test_the_server_does_not_tell_what_it_is_made_of():
    assert "server" not in ask("GET", "/livez").headers


# ---- the code itself ----------------------------------------------------------------------------

PACKAGE = Path(flux_nf4.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SERVER_MODULES = sorted((PACKAGE / "server").rglob("*.py"))


def names_in(path):
    """Every module that a file imports, and every name that it calls."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_turns_bytes_into_code(path):
    forbidden = {"pickle", "marshal", "shelve", "dill", "yaml", "eval", "exec", "torch.load"}

    assert forbidden.isdisjoint(names_in(path))


@pytest.mark.parametrize("path", SERVER_MODULES, ids=lambda path: path.name)
def test_the_server_fetches_nothing(path):
    clients = {"urllib.request", "http.client", "requests", "httpx", "httpx2", "aiohttp"}

    assert clients.isdisjoint(names_in(path))


@pytest.mark.parametrize("body", [JobRequest, ImageRequest, EditRequest])
def test_no_request_can_name_a_file_or_an_address(body):
    assert not [name for name in body.model_fields if "path" in name or "url" in name]
