"""The page's own files, as HTML, CSS and JavaScript."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from report.render import FOLDER

TEMPLATES = sorted(FOLDER.glob("*.html"))
CODE = FOLDER / "page.js"
STYLE = FOLDER / "page.css"
VOID = {"input", "img", "link", "meta"}
OPENS_TEXT_AS_MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\("


class Reader(HTMLParser):
    """Reads a template: tags have to close in the order that they open, without handlers."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        for name, value in attrs:
            assert not name.startswith("on"), f"a handler in the markup: {name} of {tag}"
            assert name != "style", f"a style in the markup, of {tag}"
            assert not re.match(r"\s*(https?:|//|javascript:)", value or ""), value
            self.ids += [value] if name == "id" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_is_balanced_and_holds_no_code(path):
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


def test_templates_trust_no_value():
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|\braw\b", text), path


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript():
    done = subprocess.run(["node", "--check", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_script_turns_no_text_into_markup():
    text = CODE.read_text(encoding="utf-8")
    assert not re.search(OPENS_TEXT_AS_MARKUP, text)
    assert "</" not in text  # nothing that could end its element


def test_the_script_names_what_the_page_has():
    ids = set(Reader((FOLDER / "page.html").read_text(encoding="utf-8")).ids)
    text = CODE.read_text(encoding="utf-8")
    made = set(re.findall(r'\bid: "([\w-]+)"', text))
    assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids | made


def test_the_style_is_balanced_and_loads_nothing():
    text = re.sub(r"/\*.*?\*/|\"[^\"]*\"", "", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    depth = 0
    for sign in re.findall("[{}]", text):
        depth += 1 if sign == "{" else -1
        assert 0 <= depth <= 2
    assert depth == 0
    assert not re.search(r"@import|url\(|<", text)
    for block in re.findall(r"{([^{}]*)}", text):
        for line in filter(str.strip, block.split(";")):
            assert re.fullmatch(r"\s*(--)?[a-z-]+:\s*[^:;]+", line), line


def test_no_rule_is_for_a_class_that_nothing_has():
    rules = re.sub(r"{[^{}]*}|/\*.*?\*/", " ", STYLE.read_text(encoding="utf-8"), flags=re.DOTALL)
    classes = set(re.findall(r"\.([a-z][\w-]*)", rules))
    used = " ".join(path.read_text(encoding="utf-8") for path in (*TEMPLATES, CODE))
    assert len(classes) > 40
    assert [name for name in sorted(classes) if not re.search(rf"\b{name}\b", used)] == []
