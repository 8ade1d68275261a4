"""The pages' files, page.html and the others beside this one, filled with what they show.

Every value is escaped. A script gets its data as JSON in a block of the page and puts every text
into the document as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

FOLDER = Path(__file__).parent


def render(template: str, *, script: str | None = None, data: dict | None = None, **values) -> str:
    """Fill a template of this folder; its script, named by hash, is the one that may run.

    script: a file of this folder. data: what the script reads. values: what the template names.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    code = _read(script) if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    loader = FileSystemLoader(FOLDER)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(
        style=Markup(_read("page.css")),
        script=Markup(code),
        script_hash=Markup(f"'sha256-{digest}'"),
        data=Markup(_json_for_html(data)),
        **values,
    )


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _json_for_html(data: dict | None) -> str:
    """JSON that may stand inside a script element: no text of it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
