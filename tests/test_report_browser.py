"""A report in a real browser (headless Chromium), as run_retrieval.py writes it."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import semantic_files
from chromium import assert_fits, chromium, emulated
from report_world import (
    HOSTILE,
    LOST,
    UNANSWERED,
    evaluate_world,
    make_rooms,
    make_semantic,
    make_world,
    page_data,
)
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from report import write_report
from utils_datasets import Dataset, ImageStore

ROOT = Path(__file__).resolve().parent.parent

TOP_K = 6
CLASS_OF_FLAG = {"1": {"positive"}, "0": {"related", "other"}}


def run_retrieval(*flags) -> None:
    command = [sys.executable, "run_retrieval.py", *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A drawn data set with reports of the methods sum and image (top 6), and their comparison."""
    world = make_world(tmp_path_factory.mktemp("world"))
    for method in ("sum", "image"):
        run_retrieval(*world.flags(), "--method", method, "--top_k", TOP_K, "--report")
    results = world.folder / "results" / "world"
    run_retrieval("--compare", results / "image", results / "sum")
    return world


@pytest.fixture(scope="module")
def report(world) -> Path:
    return world.folder / "results" / "world" / "sum" / "report" / "index.html"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile"), 1280) as driver:
        yield driver


@pytest.fixture
def browser(session):
    """The browser, on an empty page; after the test, whatever it complained of fails the test."""
    session.get("about:blank")
    for kind in ("browser", "performance"):
        session.get_log(kind)
    yield session
    assert [entry["message"] for entry in session.get_log("browser")] == []


def open_page(browser, page: Path, fragment: str = "") -> None:
    browser.get("about:blank")
    browser.get(page.as_uri() + fragment)


def find(browser, selector: str) -> list:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def shown(browser, column: str) -> list[str]:
    """The texts of a column in the table, from the top; the column is named by its sort key."""
    return browser.execute_script(
        """
        const at = [...document.querySelectorAll("th[data-key]")]
          .findIndex((cell) => cell.dataset.key === arguments[0]);
        return [...document.querySelectorAll("#body tr")]
          .map((row) => (row.cells[at].querySelector("a") || row.cells[at]).textContent);
        """,
        column,
    )


def sort_by(browser, column: str) -> str:
    """Click a column's head; returns what the head then says of its order."""
    head = find(browser, f'th[data-key="{column}"]')[0]
    head.find_element(By.TAG_NAME, "button").click()
    return head.get_attribute("aria-sort")


def wait_until(browser, what) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: what())


def all_loaded(browser, selector: str) -> bool:
    """Whether every image has come with pixels in it; brings the first that has not into view.

    In one script, for the page replaces an image that is lost by a box.
    """
    return browser.execute_script(
        """
        const images = [...document.querySelectorAll(arguments[0])];
        const waiting = images.find((image) => image.naturalWidth === 0);
        if (waiting) waiting.scrollIntoView();
        return images.length > 0 && !waiting;
        """,
        selector,
    )


def query_shown(browser) -> list[str] | None:
    """The query in the address, the title and place of the one that is shown; None without one.

    In one script, for the address changes first and the page follows.
    """
    return browser.execute_script(
        """
        if (document.getElementById("detail").hidden) return null;
        const said = ["#title", "#detail .where"].map((part) => document.querySelector(part));
        return [location.hash.split("&")[0], ...said.map((part) => part.textContent)];
        """
    )


def requests_made(browser) -> list[str]:
    """Every address the browser asked for since the test began."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


# --- the table ---------------------------------------------------------------------------------


def test_the_table_lists_every_query(browser, world, report):
    open_page(browser, report)
    assert shown(browser, "text") == list(world.queries["text"])
    assert shown(browser, "label-0") == list(world.queries["instance"])
    with open(report.parents[1] / "APs.csv", newline="", encoding="utf-8") as file:
        expected = [f"{100 * float(row['AP']):.1f}" for row in csv.DictReader(file)]
    assert shown(browser, "value-0") == expected
    assert "sum" in browser.find_element(By.ID, "means").text
    assert (
        browser.find_element(By.ID, "count").text == f"{len(expected)} of {len(expected)} queries"
    )


@pytest.mark.parametrize("column", ["value-0", "positives", "first-0"])
def test_the_table_sorts_by_numbers(browser, report, column):
    open_page(browser, report)
    assert sort_by(browser, column) == "ascending"
    rising = shown(browser, column)
    numbers = [float(text) for text in rising if text != "none"]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 1
    assert sort_by(browser, column) == "descending"
    falling = [float(text) for text in shown(browser, column) if text != "none"]
    assert falling == numbers[::-1]
    if column == "first-0":  # a query without positives is last either way
        assert rising[-1] == shown(browser, column)[-1] == "none"


def test_the_table_sorts_by_words(browser, report):
    open_page(browser, report)
    sort_by(browser, "label-0")
    assert shown(browser, "label-0") == sorted(shown(browser, "label-0"), key=str.lower)
    assert len(find(browser, "th[aria-sort]")) == 1


def test_the_table_filters(browser, world, report):
    open_page(browser, report)
    search = browser.find_element(By.ID, "search")
    search.send_keys("SNOW, seen")
    assert set(shown(browser, "text")) == {"in the snow, seen from above"}
    search.send_keys(" from nowhere")
    assert shown(browser, "text") == []
    assert browser.find_element(By.ID, "nothing").is_displayed()
    search.clear()
    search.send_keys(Keys.SPACE)
    Select(browser.find_element(By.ID, "tag-0")).select_by_visible_text("<b>clock</b>")
    assert set(shown(browser, "label-0")) == {"<b>clock</b>"}
    Select(browser.find_element(By.ID, "tag-0")).select_by_index(0)
    every = [float(ap) for ap in shown(browser, "value-0")]
    assert len(every) == len(world.queries)
    browser.find_element(By.ID, "low").send_keys("20")
    browser.find_element(By.ID, "high").send_keys("60")
    within = [ap for ap in every if 20 <= ap <= 60]
    assert [float(ap) for ap in shown(browser, "value-0")] == within
    assert 0 < len(within) < len(every)
    assert browser.find_element(By.ID, "count").text == f"{len(within)} of {len(every)} queries"


# --- a query -----------------------------------------------------------------------------------


def test_frames_match_the_flags_of_the_table_of_best_rows(browser, report):
    with open(report.parents[1] / f"top{TOP_K}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for query, row in enumerate(rows):
        open_page(browser, report, f"#query-{query}")
        hits = browser.execute_script(
            """
            return [...document.querySelectorAll(".ranked .hit")].map((hit) => [
              hit.classList[1], hit.querySelector(".thumbnail, .missing").title,
              hit.querySelector(".rank").textContent,
              getComputedStyle(hit.querySelector(".frame")).borderTopStyle]);
            """
        )
        assert len(hits) == TOP_K
        for n, (kind, title, rank, style) in enumerate(hits, 1):
            assert kind in CLASS_OF_FLAG[row[f"match_{n}"]]
            assert row[f"path_{n}"] in title
            assert rank == str(n)
            assert style == ("dashed" if kind == "related" else "solid")
            seen.add(kind)
    assert seen == {"positive", "related", "other"}


def test_thumbnails_load(browser, world, report):
    open_page(browser, report)
    wait_until(browser, lambda: all_loaded(browser, "#body img"))
    clock = world.queries["instance"].eq("<b>clock</b>").argmax()  # its images are all there
    open_page(browser, report, f"#query-{clock}")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    assert len(find(browser, ".ranked img")) == TOP_K
    assert not find(browser, "#detail .missing")


def test_queries_open_and_close_by_mouse_and_by_keyboard(browser, world, report):
    open_page(browser, report)
    sort_by(browser, "value-0")
    order = [int(row.get_attribute("data-query")) for row in find(browser, "#body tr")]

    def opens(place: int) -> None:
        where = f"{place + 1} of {len(order)} in the order of the table"
        expected = [f"#query-{order[place]}", world.queries["text"][order[place]], where]
        wait_until(browser, lambda: query_shown(browser) == expected)

    def press(key: str) -> None:
        browser.switch_to.active_element.send_keys(key)

    find(browser, "#body tr")[1].find_element(By.CLASS_NAME, "number").click()
    opens(1)
    assert not browser.find_element(By.ID, "overview").is_displayed()
    for key, place in ((Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.ARROW_LEFT, 0)):
        press(key)
        opens(place)
    assert not find(browser, "#previous")
    press(Keys.ESCAPE)
    wait_until(browser, lambda: browser.find_element(By.ID, "overview").is_displayed())
    assert not browser.find_element(By.ID, "detail").is_displayed()
    focus = browser.switch_to.active_element
    assert focus.get_attribute("href").endswith(f"#query-{order[0]}")
    focus.send_keys(Keys.ENTER)
    opens(0)
    browser.back()
    wait_until(browser, lambda: browser.find_element(By.ID, "overview").is_displayed())


def test_missed_positives_are_listed_with_their_ranks(browser, world, report):
    seen = 0
    for query, row in world.queries.iterrows():
        open_page(browser, report, f"#query-{query}")
        found = len(find(browser, ".ranked .positive"))
        missed = [int(rank.text) for rank in find(browser, ".missed .positive .rank")]
        total = world.database["text"].eq(row.text) & world.database["instance"].eq(row.instance)
        assert found + len(missed) == total.sum()
        assert missed == sorted(missed)
        assert all(rank > TOP_K for rank in missed)
        seen += len(missed)
        if row.text == UNANSWERED:
            assert "no positives" in browser.find_element(By.CLASS_NAME, "facts").text
    assert seen


def test_a_lost_image_is_a_box_with_its_name(browser, world, tmp_path):
    k = len(world.database)
    flags = [*world.flags(), "--results_dir", tmp_path, "--method", "image", "--top_k", k]
    run_retrieval(*flags, "--report")
    page = tmp_path / "world" / "image" / "report" / "index.html"
    for thumbnail in list((page.parent / "thumbnails").iterdir())[::3]:
        thumbnail.unlink()  # as when a report was copied without them
    queries = world.queries["instance"].eq("mug")
    open_page(browser, page, f"#query-{queries.argmax()}")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    boxes = {box.text for box in find(browser, "#detail .missing")}
    assert Path(LOST).name in boxes
    assert len(boxes) > 1
    # That the files are gone is the one thing the browser may say.
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert all("ERR_FILE_NOT_FOUND" in message for message in messages)


# --- what scores are made of -------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(world) -> Path:
    """A page of basic with query expansion beside sum, from the commands' own evaluations."""
    flags = ("--method", "basic", "--do_query_expansion", "--qe_k", "8", "--top_k", TOP_K)
    run_retrieval(*world.flags(), *flags, "--report")
    [page] = (world.folder / "results" / "world").glob("basic*_k8_*/report/index.html")
    return page


def test_parts_of_every_score_are_shown_and_make_it(browser, world, explained):
    data = page_data(explained)
    [method] = data["methods"]
    x, y, xx, xy, yy = method["fusion"]
    for number, query in enumerate(data["queries"]):
        [run] = query["runs"]
        for (a, b), score in zip(run["parts"], run["scores"], strict=True):
            assert abs(x * a + y * b + xx * a * a + xy * a * b + yy * b * b - score) < 2e-3
        if number > 3:
            continue
        open_page(browser, explained, f"#query-{number}")
        shown_parts = [
            [float(part.text.split()[-1]) for part in hit.find_elements(By.CLASS_NAME, "part")]
            for hit in find(browser, ".ranked .hit, .missed .hit")
        ]
        expected = [*run["parts"], *run["missedParts"]]
        for ours, own in zip(shown_parts, expected, strict=True):
            assert ours == [float(f"{value:.3g}") for value in own]


def test_the_scatter_shows_the_gallery_and_the_level_of_the_first_positive(browser, explained):
    open_page(browser, explained, "#query-1")
    run = page_data(explained)["queries"][1]["runs"][0]
    points = find(browser, ".scatter .point")
    assert len(points) == len(run["rows"]) + len(run["missed"])
    positive = run["kinds"].count("p") + len(run["missed"])
    assert len(find(browser, ".scatter .point.positive")) == positive > 0
    dots = find(browser, ".scatter .cloud")[0].get_attribute("d").count("M")
    assert dots == 21  # the instance's whole gallery
    first = next(k for k, kind in enumerate(run["kinds"]) if kind == "p")
    # The line passes through the first positive: where it lies, the line is near.
    near = browser.execute_script(
        """
        const at = document.querySelectorAll(".scatter .point")[arguments[0]];
        const [x, y] = [at.getAttribute("cx"), at.getAttribute("cy")].map(Number);
        const line = document.querySelector(".scatter .level");
        const length = line.getTotalLength();
        const away = (t) => Math.hypot(...["x", "y"].map((axis, n) =>
          line.getPointAtLength(t)[axis] - [x, y][n]));
        return Math.min(...Array.from({length: 400}, (_, n) => away(length * n / 399)));
        """,
        first,
    )
    assert near < 1.5
    open_page(browser, explained, "#query-18")  # without positives there is no line
    assert find(browser, ".scatter .cloud")
    assert not find(browser, ".scatter .level")


def test_parts_whose_fusion_is_no_polynomial_have_no_line(browser, world, tmp_path):
    [run] = evaluate_world(world, ["product"], TOP_K)
    run = replace(run, explained=replace(run.explained, fusion=None))
    page = write_report(tmp_path / "report", [run], ImageStore(Dataset("world", world.data)), TOP_K)
    open_page(browser, page, "#query-1")
    assert find(browser, ".scatter .cloud")
    assert find(browser, ".hit .part")
    assert not find(browser, ".scatter .level")


def test_neighbours_of_the_expansion_are_shown_and_marked(browser, explained):
    open_page(browser, explained, "#query-0")
    assert "query expansion took: 8" in browser.find_element(By.CSS_SELECTOR, ".neighbours h3").text
    assert len(find(browser, ".neighbours .hit")) == 6
    run = page_data(explained)["queries"][0]["runs"][0]
    marked = [
        bool(hit.find_elements(By.CLASS_NAME, "mark")) for hit in find(browser, ".ranked .hit")
    ]
    assert marked == [marks == [0] for marks in run["marks"]]
    assert True in marked
    legend = browser.find_element(By.CLASS_NAME, "legend").text
    assert "neighbour that query expansion took" in legend


def test_the_same_image_is_marked_across_methods_by_mouse_and_keyboard(browser, side_by_side):
    open_page(browser, side_by_side, "#query-2")
    counts = browser.execute_script(
        """
        const rows = [...document.querySelectorAll(".hit")].map((hit) => hit.dataset.row);
        return rows.map((row) => rows.filter((other) => other === row).length);
        """
    )
    number = counts.index(max(counts))
    assert counts[number] > 1
    hit = find(browser, ".hit")[number]
    ActionChains(browser).move_to_element(hit).perform()
    same = {other.get_attribute("data-row") for other in find(browser, ".hit.same")}
    assert same == {hit.get_attribute("data-row")}
    assert len(find(browser, ".hit.same")) == counts[number]
    assert find(browser, ".scatter .point.same")
    ActionChains(browser).move_to_element(browser.find_element(By.ID, "title")).perform()
    assert not find(browser, ".same")
    hit.find_element(By.CLASS_NAME, "opens").send_keys("")  # takes the focus
    assert len(find(browser, ".hit.same")) == counts[number]


def test_a_click_shows_the_whole_image(browser, world, report, tmp_path):
    open_page(browser, report, "#query-1")
    hit = find(browser, ".ranked .opens")[0]
    hit.click()
    wait_until(browser, lambda: all_loaded(browser, "#full-image"))
    size = browser.execute_script("return document.getElementById('full-image').naturalWidth")
    assert size == 64  # the file itself
    source = browser.find_element(By.ID, "full-image").get_attribute("src")
    assert source.startswith(world.data.as_uri())
    assert not browser.find_element(By.ID, "full-note").is_displayed()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "full").is_displayed()
    assert browser.find_element(By.ID, "detail").is_displayed()  # Escape closed the image alone
    hit.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "full").is_displayed()
    browser.find_element(By.ID, "full-close").click()
    assert not browser.find_element(By.ID, "full").is_displayed()


def test_where_the_file_is_gone_the_thumbnail_is_shown(browser, report, tmp_path):
    moved = shutil.copytree(report.parent, tmp_path / "a" / "b" / "moved") / "index.html"
    open_page(browser, moved, "#query-1")
    find(browser, ".ranked .opens")[0].click()
    wait_until(browser, lambda: all_loaded(browser, "#full-image"))
    assert "thumbnails/" in browser.find_element(By.ID, "full-image").get_attribute("src")
    assert "this is the thumbnail" in browser.find_element(By.ID, "full-note").text
    messages = [entry["message"] for entry in browser.get_log("browser")]
    assert all("ERR_FILE_NOT_FOUND" in message for message in messages)


# --- the address -------------------------------------------------------------------------------


def test_filters_order_and_query_are_in_the_address(browser, world, report):
    open_page(browser, report)
    browser.find_element(By.ID, "search").send_keys("snow & seen")
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys("snow, seen")
    Select(browser.find_element(By.ID, "tag-0")).select_by_visible_text("mug")
    sort_by(browser, "value-0")
    sort_by(browser, "value-0")
    texts, values = shown(browser, "text"), shown(browser, "value-0")
    address = browser.current_url
    open_page(browser, report, "#" + address.partition("#")[2])
    assert (shown(browser, "text"), shown(browser, "value-0")) == (texts, values)
    assert len(values) == 2
    find(browser, "#body a")[1].click()
    wait_until(browser, lambda: query_shown(browser))
    opened = browser.current_url
    assert "#query-" in opened
    assert "search=snow%2C%20seen" in opened
    open_page(browser, report, "#" + opened.partition("#")[2])
    assert query_shown(browser)[2] == "2 of 2 in the order of the table"
    browser.find_element(By.ID, "back").click()
    wait_until(browser, lambda: browser.find_element(By.ID, "overview").is_displayed())
    assert shown(browser, "value-0") == values
    open_page(browser, report, "#query-0&tag-0=99&sort=nothing&low=x&method=7&%E0%A4%A")
    assert query_shown(browser)[0] == "#query-0"
    assert browser.find_element(By.ID, "low").get_attribute("value") == ""


# --- the run, headings, plots ------------------------------------------------------------------


def test_the_page_names_date_weights_features_and_what_was_left_out(browser, world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "copy")
    manifest = folder / "features/clip_features/world/manifest.json"
    content = json.loads(manifest.read_text())
    content["counts"] = {"query": len(world.queries), "database": len(world.database)}
    lost = {"split": "database", "image_path": "<b>bad</b>.jpg", "cause": "it is cut"}
    content["skipped"] = [lost] * 25
    content["model"] |= {"pretrained": "openai", "weights_sha256": "0123456789abcdef" * 4}
    manifest.write_text(json.dumps(content))
    copied = replace(world, folder=folder)
    run_retrieval(*copied.flags(), "--method", "image", "--report")
    page = folder / "results" / "world" / "image" / "report" / "index.html"
    open_page(browser, page)
    about = browser.find_element(By.ID, "about").text
    with open(page.parents[1] / "mAP_table.csv", newline="", encoding="utf-8") as file:
        *_, row = csv.DictReader(file)
    for words in (row["features"], row["version"], "some-model, openai, SHA-256 0123456789ab"):
        assert words in about
    assert row["timestamp"][:10] in about
    assert f"25 of {len(world.database) + 25} database rows" in about
    assert about.count("<b>bad</b>.jpg (it is cut)") == 20
    assert "and 5 more" in about


def test_headings_stay_in_sight(browser, side_by_side):
    open_page(browser, side_by_side, "#query-2")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    browser.execute_script("window.scrollTo(0, 500)")
    wait_until(browser, lambda: browser.execute_script("return scrollY") > 300)
    tops = browser.execute_script(
        """
        const seen = [".steps", ".stick h2"].flatMap((s) => [...document.querySelectorAll(s)]);
        return seen.map((part) => part.getBoundingClientRect().top);
        """
    )
    assert len(tops) == 4
    assert all(0 <= top < 60 for top in tops)


def test_the_head_of_a_wide_table_stays_in_sight(browser, world, tmp_path):
    evaluations = evaluate_world(world, ("image", "text", "sum", "product", "weicom", "basic"), 3)
    images = ImageStore(Dataset("world", world.data))
    open_page(browser, write_report(tmp_path / "wide", evaluations, images, 3))
    browser.execute_script("document.getElementById('around').scrollTop = 400")
    tops = browser.execute_script(
        """
        const [box, head] = ["around", "head"].map((id) => document.getElementById(id));
        return [box.scrollTop, head.getBoundingClientRect().top - box.getBoundingClientRect().top];
        """
    )
    assert tops[0] > 100
    assert abs(tops[1]) < 2


def test_plots_follow_the_dark_scheme(browser, report):
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        open_page(browser, report)
        script = "return getComputedStyle(document.querySelector('#plots img')).filter"
        assert "invert" in browser.execute_script(script)
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# --- safety ------------------------------------------------------------------------------------


def test_a_hostile_text_does_nothing(browser, world, report):
    open_page(browser, report)
    title = browser.title
    query = int(world.queries["text"].eq(HOSTILE).argmax())
    assert shown(browser, "text")[query] == HOSTILE
    open_page(browser, report, f"#query-{query}")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    assert browser.find_element(By.ID, "title").get_property("textContent") == HOSTILE
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.title == title
    assert not find(browser, "img[src='x'], #overview b, #detail b")
    assert len(find(browser, "script")) == 2


def test_no_request_leaves_the_page(browser, report):
    open_page(browser, report)
    browser.execute_script(
        "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
    )
    wait_until(browser, lambda: all_loaded(browser, "#plots img"))
    open_page(browser, report, "#query-1")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    addresses = [url for url in requests_made(browser) if not url.startswith("data:")]
    folder = report.parent.as_uri()
    assert len(addresses) > TOP_K
    assert [url for url in addresses if not url.startswith(folder)] == []


def test_the_page_may_not_reach_out(browser, report):
    open_page(browser, report)
    refused = browser.execute_async_script(
        """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (e) => done(e.effectiveDirective));
        new Image().src = "http://127.0.0.1:9/picture.png";
        """
    )
    assert refused == "img-src"
    assert all("Content Security Policy" in e["message"] for e in browser.get_log("browser"))


# --- several methods, widths, the comparison ---------------------------------------------------


@pytest.fixture(scope="module")
def side_by_side(world) -> Path:
    """A report of three methods, from the evaluations themselves."""
    evaluations = evaluate_world(world, ("image", "text", "sum"), TOP_K)
    images = ImageStore(Dataset("world", world.data))
    return write_report(world.folder / "several", evaluations, images, TOP_K)


def test_methods_stand_side_by_side(browser, side_by_side):
    open_page(browser, side_by_side)
    for m in range(3):
        sort_by(browser, f"value-{m}")
        values = [float(ap) for ap in shown(browser, f"value-{m}")]
        assert values == sorted(values)
    every = shown(browser, "value-2")
    Select(browser.find_element(By.ID, "method")).select_by_visible_text("sum")
    browser.find_element(By.ID, "low").send_keys("50")
    assert sorted(shown(browser, "value-2")) == sorted(ap for ap in every if float(ap) >= 50)
    open_page(browser, side_by_side, "#query-2")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    sections = find(browser, ".method")
    assert [s.find_element(By.TAG_NAME, "h2").text for s in sections] == ["image", "text", "sum"]
    lists = find(browser, ".ranked")
    assert len({box.rect["y"] for box in lists}) == 1
    assert len({box.rect["x"] for box in lists}) == 3
    assert [len(box.find_elements(By.CLASS_NAME, "hit")) for box in lists] == [TOP_K] * 3


def test_what_a_protocol_leaves_out_and_marks_is_shown(browser, tmp_path):
    rooms = make_rooms(tmp_path)
    images = ImageStore(Dataset("rooms", tmp_path / "data" / "rooms"))
    evaluations = evaluate_world(rooms, ("image", "text"), 5, "rooms")
    open_page(browser, write_report(tmp_path / "report", evaluations, images, 5), "#query-2")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    left_out = find(browser, ".left-out .missing, .left-out img")
    assert [picture.get_attribute("title") for picture in left_out] == ["db/0.png"]
    marks = [mark.get_attribute("title") for mark in find(browser, ".ranked .mark")]
    assert set(marks) <= {"candidate of subset", "positive of subset"}
    expected = sum((own.main.top_rows[2] < 6).sum() for own in evaluations)
    assert marks.count("candidate of subset") == expected > 0
    facts = {fact.text for fact in find(browser, ".query dt")}
    assert facts == {"Query", "room", "Positives", "Image"}
    browser.find_element(By.ID, "back").click()
    wait_until(browser, lambda: browser.find_element(By.ID, "overview").is_displayed())
    Select(browser.find_element(By.ID, "tag-1")).select_by_visible_text("size")
    assert shown(browser, "label-0") == ["a", "d"]


def marked(browser, words: str) -> set[str]:
    """The paths of the images that bear a mark, of the first method."""
    section = find(browser, ".method")[0]
    pictures = section.find_elements(
        By.XPATH, f".//figure[.//span[@title='{words}']]//*[@class='thumbnail' or @class='missing']"
    )
    return {picture.get_attribute("title") for picture in pictures}


@pytest.mark.parametrize("name", ["cirr", "circo", "fashioniq", "genecis"])
def test_a_semantic_benchmark(browser, tmp_path, name):
    """The reference that is left out, members of the group; the target among several positives."""
    world, images = make_semantic(tmp_path, name)
    evaluations = evaluate_world(world, ("image", "sum"), 60, name)
    task = evaluations[0].task
    open_page(browser, write_report(tmp_path / "report", evaluations, images, 60), "#query-0")
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    assert not find(browser, "#detail .missing")
    positives = {task.gallery.path[row] for row in task.rows_of(task.views["all"].positives, 0)}
    own = find(browser, ".method")[0].find_elements(By.CSS_SELECTOR, ".positive img")
    assert {picture.get_attribute("title") for picture in own} == positives
    assert len(find(browser, ".values")[0].find_elements(By.TAG_NAME, "li")) == len(
        evaluations[0].values
    )
    left_out = [picture.get_attribute("title") for picture in find(browser, ".left-out img")]
    reference = task.queries.images[0][0]
    if name == "cirr":
        group = {f"dev/{member}.png" for member in semantic_files.GROUPS[0]}
        assert left_out == [reference]
        assert marked(browser, "candidate of subset") == group - {reference}
        related = find(browser, ".method")[0].find_elements(By.CSS_SELECTOR, ".related img")
        assert {p.get_attribute("title") for p in related} == group - {reference} - positives
    else:
        assert not left_out
    if name == "circo":
        assert len(positives) == 2
        assert len(marked(browser, "positive of target")) == 1
        assert marked(browser, "left out of reference out") == {reference}
        assert "addition, negation" in find(browser, ".query dl")[0].text
    assert len(find(browser, ".legend .mark")) == {"cirr": 1, "circo": 2, "fashioniq": 1}.get(
        name, 0
    )


@pytest.mark.parametrize("name", ["cirr_test", "circo_test"])
def test_where_the_ground_truth_is_hidden_no_row_is_judged(browser, tmp_path, name):
    """That a query has no positives would be said of all, and be wrong."""
    world, images = make_semantic(tmp_path, name)
    evaluations = evaluate_world(world, ("image", "sum"), 6, name)
    task = evaluations[0].task
    task.queries.text[1] = " "
    page = write_report(tmp_path / "report", evaluations, images, 6)
    open_page(browser, page)
    files = {"cirr_test": "recall.json and recall_subset.json", "circo_test": "submission.json"}
    said = find(browser, "#hidden")[0].text
    assert said == (
        "The ground truth is hidden, and nothing is measured here: the evaluation server judges "
        f"the rankings, by {files[name]}."
    )
    assert [head.text for head in find(browser, "#head th")] == ["#", "", "Text", "Query"]
    assert shown(browser, "text")[:2] == [task.queries.text[0], "(no text)"]
    open_page(browser, page, "#query-1")
    assert find(browser, "#title")[0].text == "(no text)"
    labels = [own.get_attribute("aria-label") for own in find(browser, "#detail [aria-label]")]
    assert "ositive" not in "\n".join([find(browser, "#detail")[0].text, *labels])
    kinds = {kind.text for kind in find(browser, ".ranked .kind")}
    assert kinds == ({"related", "other"} if name == "cirr_test" else set())
    assert len(find(browser, ".ranked .thumbnail")) == 12


def test_of_wide_means_the_method_stays_in_sight(browser, tmp_path):
    world, images = make_semantic(tmp_path, "circo")
    evaluations = evaluate_world(world, ("image", "sum"), 3, "circo")
    open_page(browser, write_report(tmp_path / "report", evaluations, images, 3))
    places = browser.execute_script(
        """
        const table = document.getElementById("means");
        table.parentElement.scrollLeft = 400;
        const cell = table.querySelector("tbody td").getBoundingClientRect();
        return [table.parentElement.scrollLeft, cell.left];
        """
    )
    assert places[0] > 100
    assert 0 <= places[1] < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_nothing_hangs_over_the_edge(browser, report, side_by_side, width, scheme):
    comparison = report.parents[1] / "against_image" / "index.html"
    with emulated(browser, width, scheme):
        for page in (report, side_by_side, comparison):
            for fragment in ("", "#query-1") if page != comparison else ("",):
                open_page(browser, page, fragment)
                assert_fits(browser, scheme)


def test_the_comparison_leads_to_the_reports(browser, world, report):
    open_page(browser, report.parents[1] / "against_image" / "index.html")
    assert "image against sum" in browser.title
    wait_until(browser, lambda: all_loaded(browser, "img"))
    first = find(browser, "#won tbody tr")[0]
    _, text, instance, *_ = (cell.text for cell in first.find_elements(By.TAG_NAME, "td"))
    first.find_elements(By.TAG_NAME, "a")[3].click()
    wait_until(browser, lambda: find(browser, "#title"))
    assert "/sum/report/index.html#query-" in browser.current_url
    assert " ".join(browser.find_element(By.ID, "title").text.split()) == " ".join(text.split())
    assert instance in browser.find_element(By.CLASS_NAME, "query").text


def test_the_comparison_shows_both_rankings_side_by_side(browser, world, report):
    page = report.parents[1] / "against_image" / "index.html"
    open_page(browser, page)
    first = find(browser, "#won tbody tr")[0]
    text = first.find_elements(By.TAG_NAME, "td")[1].text
    first.find_elements(By.TAG_NAME, "a")[1].click()
    wait_until(browser, lambda: find(browser, "#title"))
    assert "/against_image/rankings.html#query-" in browser.current_url
    wait_until(browser, lambda: all_loaded(browser, "#detail img"))
    assert " ".join(browser.find_element(By.ID, "title").text.split()) == " ".join(text.split())
    assert [head.text for head in find(browser, ".stick h2")] == ["image", "sum"]
    number = int(query_shown(browser)[0].removeprefix("#query-"))
    for method, hits in zip(("image", "sum"), find(browser, ".ranked"), strict=True):
        with open(page.parents[2] / method / f"top{TOP_K}.csv", newline="") as file:
            row = list(csv.DictReader(file))[number]
        pictures = hits.find_elements(By.CSS_SELECTOR, ".thumbnail, .missing")
        for n, picture in enumerate(pictures, 1):
            assert picture.get_attribute("title").endswith(row[f"path_{n}"])
    assert len(find(browser, ".scatter")) == 1  # of sum; image alone has no parts
    find(browser, ".ranked .opens")[0].click()
    wait_until(browser, lambda: all_loaded(browser, "#full-image"))
    assert browser.execute_script("return document.getElementById('full-image').naturalWidth") == 64
