"""The page of live search in a real browser (headless Chromium), served by search.py."""

import base64
import json
import time
from urllib.parse import parse_qs

import pytest
from chromium import assert_fits, chromium, emulated
from extraction_world import draw_image, encode_jpeg
from live_world import HOSTILE, PHOTOS, ROOT, World, make_world, serving
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from methods import list_methods

pytest.importorskip("starlette", reason="starlette is not installed: no live search")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: no live search")

HOSTILE_TEXT = "</script><img src=x onerror='window.hacked=2'>&amp;#%2e\u2028\u202e"


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_clip) -> World:
    return make_world(tmp_path_factory.mktemp("live"), small_clip)


@pytest.fixture(scope="module")
def server(world):
    with serving(world.folder, "photos", *world.flags()) as server:
        yield server


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), 1400) as driver:
        yield driver


@pytest.fixture
def browser(session, server):
    """The browser on the page; after the test, whatever it complained of fails the test."""
    for kind in ("browser", "performance"):
        session.get_log(kind)
    open_page(session, server)
    yield session
    assert [entry["message"] for entry in session.get_log("browser")] == []


def wait_until(browser, what) -> None:
    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda _: what())


def open_page(browser, server, fragment: str = "") -> None:
    browser.get("about:blank")
    browser.get(f"{server.address}{fragment}")
    wait_until(browser, lambda: is_ready(browser))


def is_ready(browser) -> bool:
    return browser.execute_script("return document.body.dataset.ready === '1'")


def find(browser, selector: str) -> list:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def one(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def said(browser) -> str:
    return one(browser, "#said").text


def asked(browser) -> dict[str, str]:
    """What the address asks."""
    fragment = browser.execute_script("return location.hash.slice(1)")
    return {name: values[0] for name, values in parse_qs(fragment).items()}


def rows(browser, column: str = "composed") -> list[int]:
    """The gallery rows of a column, best first; none while it is not up to date."""
    return browser.execute_script(
        """
        if (document.getElementById("columns").classList.contains("waiting")) return [];
        return [...document.querySelectorAll(`[data-column="${arguments[0]}"] .hit`)]
          .map((hit) => Number(hit.dataset.row));
        """,
        column,
    )


def settled(browser, column: str = "composed", other_than: list[int] = ()) -> list[int]:
    """The rows of a column once it has come, another one than before."""
    found: list[int] = []

    def look() -> bool:
        found[:] = rows(browser, column)
        return bool(found) and found != list(other_than)

    wait_until(browser, look)
    return found


def write(browser, text: str) -> None:
    field = one(browser, "#text")
    field.clear()
    field.send_keys(text)


def upload(browser, tmp_path, seed: int = 60) -> None:
    path = tmp_path / f"given {seed}.jpg"
    path.write_bytes(encode_jpeg(draw_image(seed)))
    one(browser, "#file").send_keys(str(path))
    wait_until(browser, lambda: asked(browser).get("image", "").startswith("u"))


def set_knob(browser, name: str, value: float) -> None:
    """Drag a slider to a value, as far as a script can."""
    browser.execute_script(
        """
        const slider = document.querySelector(`[data-name="${arguments[0]}"] [type="range"]`);
        slider.value = arguments[1];
        slider.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        name,
        value,
    )


def expect(server, browser) -> list[int]:
    """The rows that the server gives for what the address asks."""
    fragment = browser.execute_script("return location.hash.slice(1)")
    found = server.json(f"/api/rank?{fragment}")["columns"]
    return [row["row"] for row in found["composed"]]


# --- first use ---------------------------------------------------------------------------------


def test_a_gallery_image_and_a_text_give_three_columns(browser, server):
    assert "token" not in browser.current_url
    assert len(find(browser, "#gallery .picture")) == PHOTOS
    wait_until(
        browser,
        lambda: browser.execute_script(
            "return [...document.querySelectorAll('#gallery img')].every((i) => i.naturalWidth)"
        ),
    )
    find(browser, "#gallery .picture")[4].click()
    assert settled(browser, "image")[0] == 4
    assert not find(browser, '[data-column="composed"]')
    write(browser, "at night")
    composed = settled(browser)
    assert composed == expect(server, browser)
    titles = [title.text for title in find(browser, ".column h2")]
    assert titles == ["Image and text: basic", "Image only", "Text only"]
    ranks = [int(rank.text) for rank in find(browser, '[data-column="composed"] .rank')]
    assert ranks == list(range(1, PHOTOS + 1))
    assert one(browser, "#plot").is_displayed()
    assert "the line: scores like rank" in one(browser, "#legend").text


def test_results_come_as_one_types_and_only_once(browser):
    find(browser, "#gallery .picture")[2].click()
    settled(browser, "image")
    browser.get_log("performance")
    write(browser, "a red thing")
    settled(browser)
    asked_for = [url for url in requests_made(browser) if "/api/rank" in url]
    assert len(asked_for) <= 3  # not one a letter
    assert "text=a+red+thing" in asked_for[-1]


def requests_made(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def test_no_request_leaves_the_page(browser, server, tmp_path):
    browser.get_log("performance")
    open_page(browser, server)
    upload(browser, tmp_path)
    write(browser, "in the snow")
    settled(browser)
    urls = [url for url in requests_made(browser) if not url.startswith(("data:", "about:"))]
    assert len(urls) > 10
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in urls)


# --- images that are brought -------------------------------------------------------------------


def test_an_image_is_picked_pasted_and_dropped(browser, tmp_path):
    upload(browser, tmp_path, 61)
    first = asked(browser)["image"]
    settled(browser, "image")
    keys = [first]
    for number, kind in enumerate(("paste", "drop")):
        content = base64.b64encode(encode_jpeg(draw_image(62 + number))).decode()
        browser.execute_script(
            """
            const bytes = Uint8Array.from(atob(arguments[1]), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "one.jpg", { type: "image/jpeg" }));
            const event = arguments[0] === "paste"
              ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
              : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
            """,
            kind,
            content,
        )
        wait_until(browser, lambda: asked(browser)["image"] not in keys)
        keys.append(asked(browser)["image"])
    assert len(set(keys)) == 3
    wait_until(
        browser,
        lambda: browser.execute_script("return document.querySelector('#given img').naturalWidth"),
    )
    one(browser, "#remove").click()
    wait_until(browser, lambda: "image" not in asked(browser))


def test_what_is_too_large_or_broken_is_named_and_the_page_goes_on(browser, tmp_path):
    large = tmp_path / "large.jpg"
    with open(large, "wb") as file:
        file.truncate(200 << 20)
    one(browser, "#file").send_keys(str(large))
    wait_until(browser, lambda: "large.jpg has more than 40 MB" in said(browser))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image at all")
    one(browser, "#file").send_keys(str(broken))
    wait_until(browser, lambda: "this image cannot be read: not an image" in said(browser))
    browser.get_log("browser")  # it notes the answer's status
    upload(browser, tmp_path)
    settled(browser, "image")
    assert said(browser) == ""


def test_photographs_that_cannot_be_read_are_named(browser):
    assert "1 cannot be read" in one(browser, "#facts").text
    assert "broken.jpg: not an image" in one(browser, "#skipped-list").text


# --- the method --------------------------------------------------------------------------------


def test_a_slider_ranks_anew_and_is_in_the_address(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=sum")
    first = settled(browser)
    set_knob(browser, "fusion_weight", 0.9)
    second = settled(browser, other_than=first)
    assert asked(browser)["p.fusion_weight"] == "0.9"
    assert second == expect(server, browser)
    assert find(browser, ".moved")
    field = one(browser, '[data-name="fusion_weight"] [type="number"]')
    assert field.get_attribute("value") == "0.9"
    one(browser, "#reset").click()
    assert settled(browser, other_than=second) == first
    assert "p.fusion_weight" not in asked(browser)


def test_switches_and_methods_rank_as_the_server_says(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=basic")
    first = settled(browser)
    one(browser, '[data-name="do_query_expansion"] input').click()
    second = settled(browser, other_than=first)
    assert second == expect(server, browser)
    idle = one(browser, '[data-name="qe_k"]')
    assert "idle" in idle.get_attribute("class")
    for method in ("sum", "product", "weicom", "freedom"):
        before = rows(browser)
        Select(one(browser, "#method")).select_by_visible_text(method)
        wait_until(browser, lambda method=method: asked(browser)["method"] == method)
        assert settled(browser, other_than=before) == expect(server, browser)
    lacking = [o for o in find(browser, "#method option") if not o.is_enabled()]
    names = {option.get_attribute("value") for option in lacking}
    methods = list_methods().values()
    assert names == {m.name for m in methods if set(m.reads) - {"image", "text"}}


def test_the_query_image_itself_is_left_out(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=sum")
    assert 3 in settled(browser)
    one(browser, "#out").click()
    wait_until(browser, lambda: rows(browser) and 3 not in rows(browser))
    assert asked(browser)["out"] == "1"


def test_the_scatter_lights_what_is_pointed_at(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=sum")
    settled(browser)
    hit = find(browser, '[data-column="composed"] .hit')[4]
    webdriver.ActionChains(browser).move_to_element(hit).perform()
    wait_until(browser, lambda: "rank 5" in one(browser, "#legend").text)
    row = hit.get_attribute("data-row")
    assert {own.get_attribute("data-row") for own in find(browser, ".hit.lit")} == {row}


# --- going on, and back ------------------------------------------------------------------------


def test_a_result_becomes_the_query_and_back_restores(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=sum")
    first = settled(browser)
    find(browser, '[data-column="composed"] .picture')[2].click()
    second = settled(browser, other_than=first)
    assert asked(browser)["image"].startswith(f"g{first[2]}-")
    assert asked(browser)["text"] == "at night"
    one(browser, "#back").click()
    assert settled(browser, other_than=second) == first
    one(browser, "#forward").click()
    assert settled(browser, other_than=first) == second
    browser.refresh()
    wait_until(browser, lambda: is_ready(browser))
    assert settled(browser) == second
    assert one(browser, "#text").get_attribute("value") == "at night"


def test_typing_is_one_step_of_the_history(browser):
    find(browser, "#gallery .picture")[1].click()
    settled(browser, "image")
    for text in ("a", "a dog", "a dog at night"):
        write(browser, text)
        wait_until(browser, lambda text=text: asked(browser).get("text") == text)
    settled(browser)
    browser.back()
    wait_until(browser, lambda: "text" not in asked(browser))
    assert one(browser, "#text").get_attribute("value") == ""


def test_everything_can_be_done_by_keyboard(browser):
    def press(key: str) -> None:
        browser.switch_to.active_element.send_keys(key)

    press(Keys.ARROW_DOWN)
    press(Keys.ARROW_RIGHT)
    chosen = browser.switch_to.active_element.get_attribute("data-key")
    assert chosen.startswith("g1-")
    press(Keys.ENTER)
    wait_until(browser, lambda: asked(browser).get("image") == chosen)
    settled(browser, "image")
    one(browser, "body").send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "text"
    browser.switch_to.active_element.send_keys("from above")
    composed = settled(browser)
    press(Keys.ESCAPE)
    one(browser, "body").send_keys("2")
    shown = [c for c in find(browser, ".column") if c.is_displayed()]
    assert [c.get_attribute("data-column") for c in shown] == ["image"]
    one(browser, "body").send_keys("0")
    assert len([c for c in find(browser, ".column") if c.is_displayed()]) == 3
    find(browser, '[data-column="composed"] .picture')[0].send_keys("o")
    wait_until(browser, lambda: one(browser, "#large-image").is_displayed())
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_until(browser, lambda: not one(browser, "#large").is_displayed())
    one(browser, "body").send_keys("?")
    assert one(browser, "#keys").is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    find(browser, '[data-column="composed"] .picture')[3].send_keys(Keys.ENTER)
    settled(browser, other_than=composed)
    one(browser, "body").send_keys(Keys.BACKSPACE)
    wait_until(browser, lambda: rows(browser) == composed)
    one(browser, "body").send_keys("g")
    wait_until(browser, lambda: one(browser, "#gallery").is_displayed())


def test_the_command_and_the_table_are_there(browser, server):
    open_page(browser, server, "#image=g3&text=at+night&method=sum&p.fusion_weight=0.7")
    settled(browser)
    one(browser, "#command").click()
    wait_until(browser, lambda: "run_retrieval.py" in one(browser, "#line").text)
    assert "--method sum --fusion_weight 0.7" in one(browser, "#line").text
    link = one(browser, "#csv").get_attribute("href")
    assert "p.fusion_weight=0.7" in link
    status, _, content = server.ask(link.partition(str(server.port))[2])
    assert (status, content.splitlines()[0]) == (200, b"rank,path,score,image,text")


# --- what may go wrong -------------------------------------------------------------------------


def test_hostile_names_and_texts_are_shown_as_they_are(browser):
    titles = {own.get_attribute("data-name") for own in find(browser, "#gallery .picture")}
    assert {f"trip/{name}" for name in HOSTILE if not name.startswith(".")} <= titles
    find(browser, "#gallery .picture")[0].click()
    browser.execute_script(
        """
        const field = document.getElementById("text");
        field.value = arguments[0];
        field.dispatchEvent(new Event("input", { bubbles: true }));
        """,
        HOSTILE_TEXT,
    )
    settled(browser)
    browser.refresh()
    wait_until(browser, lambda: is_ready(browser))
    settled(browser)
    assert one(browser, "#text").get_attribute("value") == HOSTILE_TEXT
    assert browser.execute_script("return window.hacked") is None


def test_a_hostile_address_is_refused_in_words(browser, server):
    for fragment, words in (
        ("#image=../../etc/passwd&text=x", "no image's key"),
        ("#image=g9999-0000000000000000&text=x", "no longer in the gallery"),
        ("#image=g1&text=x&method=sum&p.fusion_weight=7", "between 0 and 1"),
    ):
        open_page(browser, server, fragment)
        wait_until(browser, lambda words=words: words in said(browser))
    open_page(browser, server, "#image=g1&text=x&method=magic&p.__proto__=1")
    settled(browser)
    browser.get_log("browser")  # it notes the answers' status


def test_two_tabs_work_at_once(browser, server):
    open_page(browser, server, "#image=g1&text=at+night&method=sum")
    first = settled(browser)
    tab = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        open_page(browser, server, "#image=g9&text=a+drawing&method=basic")
        second = settled(browser)
        for value in (0.05, 0.2, 0.3):
            set_knob(browser, "harris_lambda", value)
        browser.switch_to.window(tab)
        set_knob(browser, "fusion_weight", 1)
        assert settled(browser, other_than=first) == expect(server, browser)
        browser.switch_to.window(next(h for h in browser.window_handles if h != tab))
        wait_until(browser, lambda: rows(browser) == expect(server, browser))
        assert second
        browser.close()
    finally:
        browser.switch_to.window(tab)


def test_a_server_that_stops_and_starts_under_the_page(session, world, tmp_path):
    flags = [*world.flags(), "--port"]
    with serving(world.folder, "photos", *flags, "0") as server:
        open_page(session, server)
        port = server.port
        upload(session, tmp_path, 70)
        write(session, "at night")
        first = settled(session)
    write(session, "at night in the rain")
    wait_until(session, lambda: "does not answer" in said(session))
    with serving(world.folder, "photos", *flags, str(port)):
        second = settled(session, other_than=first)
        assert second
        assert said(session) == ""
        session.refresh()
        wait_until(session, lambda: is_ready(session))
        assert settled(session) == second


# --- the demo, widths, colours -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_hangs_over_the_edge(browser, server, width, scheme):
    with emulated(browser, width, scheme):
        for fragment in ("", "#image=g3&text=at+night&method=basic"):
            open_page(browser, server, fragment)
            if fragment:
                settled(browser)
                shown = [c for c in find(browser, ".column") if c.is_displayed()]
                assert len(shown) == (1 if width <= 900 else 3)
            assert_fits(browser, scheme)


def test_the_demo_from_its_start_to_a_ranking(session, tmp_path):
    """The whole tiny world is made: the one test that takes long."""
    started = time.monotonic()
    places = ["--features_dir", tmp_path / "features", "--data_dir", tmp_path / "data"]
    places += ["--gpu", "-1", "--no-open"]
    with serving(ROOT, "--demo", *places) as server:
        open_page(session, server)
        wait_until(session, lambda: len(find(session, "#asked-list button")) == 60)
        text = one(session, "#asked-list span").text
        one(session, "#asked-list button").click()
        composed = settled(session)
        assert asked(session)["text"] == text
        assert composed == expect(server, session)
        assert one(session, "#scatter").is_displayed()
    assert time.monotonic() - started < 300
