"""The pages' own files, as HTML, CSS and JavaScript: of reports, and of live search."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import live
import report

FOLDERS = [Path(package.__file__).parent for package in (report, live)]
TEMPLATES = [path for folder in FOLDERS for path in sorted(folder.glob("*.html"))]
SCRIPTS = [path for folder in FOLDERS for path in sorted(folder.glob("*.js"))]
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


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_template_is_balanced_and_holds_no_code(path):
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))


def test_templates_trust_no_value():
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\|\s*safe|autoescape|\braw\b", text), path


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


every_script = pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def scripts_of(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.js")))


@every_script
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(path):
    done = subprocess.run(["node", "--check", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_script
def test_the_script_turns_no_text_into_markup(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(OPENS_TEXT_AS_MARKUP, text)
    assert "</" not in text  # nothing that could end its element


@every_folder
def test_the_script_names_what_the_page_has(folder):
    ids = set(Reader((folder / "page.html").read_text(encoding="utf-8")).ids)
    text = scripts_of(folder)
    made = set(re.findall(r'\bid: "([\w-]+)"', text))
    assert set(re.findall(r'byId\("([\w-]+)"\)', text)) <= ids | made


@every_folder
def test_the_style_is_balanced_and_loads_nothing(folder):
    text = (folder / "page.css").read_text(encoding="utf-8")
    text = re.sub(r"/\*.*?\*/|\"[^\"]*\"", "", text, flags=re.DOTALL)
    depth = 0
    for sign in re.findall("[{}]", text):
        depth += 1 if sign == "{" else -1
        assert 0 <= depth <= 2
    assert depth == 0
    assert not re.search(r"@import|url\(|<", text)
    for block in re.findall(r"{([^{}]*)}", text):
        for line in filter(str.strip, block.split(";")):
            assert re.fullmatch(r"\s*(--)?[a-z-]+:\s*[^:;]+", line), line


@every_folder
def test_no_rule_is_for_a_class_that_nothing_has(folder):
    rules = (folder / "page.css").read_text(encoding="utf-8")
    rules = re.sub(r"{[^{}]*}|/\*.*?\*/", " ", rules, flags=re.DOTALL)
    classes = set(re.findall(r"\.([a-z][\w-]*)", rules))
    used = scripts_of(folder)
    used += "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.html"))
    assert len(classes) > 40
    assert [name for name in sorted(classes) if not re.search(rf"\b{name}\b", used)] == []
