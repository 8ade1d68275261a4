"""The pages of a report as text: jinja2 templates, their style and their script.

The templates are rendered with autoescape on. The script gets its data as JSON in a block of the
page and puts every text into the document as text, never as markup.
"""

from __future__ import annotations

STYLE = r"""
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f6f7f9; --ink: #1b1d21; --soft: #5c636d; --line: #dfe2e7;
  --link: #0b57a4; --hover: #eef3f9;
  --positive: #0a7d3f; --same: #b25d00; --other: #b9bec6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15171a; --panel: #1e2125; --ink: #e7e9ec; --soft: #a0a7b1; --line: #33383f;
    --link: #7db7f5; --hover: #22303d;
    --positive: #3fca7b; --same: #f2a33a; --other: #565d67;
  }
}
* { box-sizing: border-box; }
html { scrollbar-gutter: stable; }
body {
  margin: 0 auto; padding: 28px 32px 64px; max-width: 1360px;
  background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
}
h1 { margin: 0 0 2px; font-size: 24px; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 17px; font-weight: 650; overflow-wrap: anywhere; }
p { margin: 0; }
.soft { color: var(--soft); }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
[hidden] { display: none !important; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; }
th, td { padding: 6px 12px; border-bottom: 1px solid var(--line); vertical-align: middle; }
.number { text-align: right; white-space: nowrap; }
.scroll { overflow-x: auto; }
.means { margin: 18px 0 6px; }
.means th:first-child, .means td:first-child { padding-left: 0; }
.means th:last-child, .means td:last-child { padding-right: 0; }
.means th { vertical-align: bottom; }
.means thead th { color: var(--soft); font-size: 13px; }
.means .main { font-size: 18px; font-weight: 650; }

details { margin: 10px 0 0; }
summary { width: fit-content; color: var(--link); cursor: pointer; }
.configs { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 10px; }
.config { padding: 12px 16px; background: var(--panel); border-radius: 8px; font-size: 13px; }
.config h2 { font-size: 14px; margin-bottom: 6px; }
.config dl {
  display: grid; grid-template-columns: auto auto; gap: 2px 16px; margin: 0;
  overflow-wrap: anywhere;
}
.config dt { color: var(--soft); }
.config dd { margin: 0; }
.plots { display: flex; flex-wrap: wrap; gap: 16px; margin-top: 12px; }
.plots figure { margin: 0; max-width: 100%; }
.plots img {
  display: block; max-width: 100%; height: 260px; object-fit: contain;
  padding: 10px; background: #ffffff; border: 1px solid var(--line); border-radius: 8px;
}
.plots figcaption { margin-top: 4px; font-size: 13px; color: var(--soft); }

.controls {
  display: flex; flex-wrap: wrap; gap: 10px 18px; align-items: end;
  margin: 30px 0 12px; padding-top: 22px; border-top: 1px solid var(--line);
}
.controls label, .controls fieldset { font-size: 13px; color: var(--soft); }
.controls label { display: block; }
.controls label input, .controls label select { display: block; margin-top: 3px; }
.controls fieldset { display: flex; gap: 10px; margin: 0; padding: 0; border: 0; min-width: 0; }
.count { margin-left: auto; padding-bottom: 6px; color: var(--soft); font-size: 13px; }
input, select {
  height: 34px; padding: 0 10px; border: 1px solid var(--line); border-radius: 6px;
  background: var(--page); color: var(--ink); font: inherit;
}
input[type="search"] { width: 260px; }
input[type="number"] { width: 84px; }
select { max-width: 240px; }

.queries { width: 100%; table-layout: fixed; }
.queries thead { position: sticky; top: 0; background: var(--page); font-size: 13px; z-index: 1; }
.queries thead th { padding: 0; vertical-align: bottom; white-space: normal; }
.queries .group { padding: 8px 8px 0; border-bottom: 0; overflow-wrap: anywhere; }
.queries th.group { width: 120px; text-align: center; }
.queries .starts { border-left: 1px solid var(--line); }
.queries th button {
  width: 100%; padding: 8px 10px; border: 0; background: none; color: var(--soft);
  font: inherit; font-weight: 600; text-align: inherit; cursor: pointer;
}
.queries th button:hover { color: var(--ink); }
.queries th[aria-sort] button { color: var(--ink); }
.queries th[aria-sort="ascending"] button::after { content: " \2191"; }
.queries th[aria-sort="descending"] button::after { content: " \2193"; }
.queries th.number button { text-align: right; }
.queries td { padding: 5px 10px; overflow-wrap: anywhere; }
.queries tbody tr { cursor: pointer; }
.queries tbody tr:hover { background: var(--hover); }
.queries .order { width: 58px; color: var(--soft); }
.queries .icon { width: 64px; }
.queries .value { width: 92px; }
.several .positives { width: 90px; }
.queries.several td.instance { width: 13%; }
.queries.several .order { width: 50px; padding-left: 0; }
.queries.several .value { padding-left: 6px; }
.queries.several .value button { padding-left: 4px; }
.queries .instance { width: 21%; }
.queries td .instance { display: none; width: auto; color: var(--soft); font-size: 13px; }
.queries .icon img, .queries .icon .missing { width: 44px; height: 44px; }
.queries .icon .missing { padding: 0; font-size: 0; }
.nothing { padding: 28px 10px; color: var(--soft); }

.steps { display: flex; flex-wrap: wrap; gap: 6px 20px; margin-bottom: 20px; }
.steps .where { margin-left: auto; color: var(--soft); font-size: 13px; }
.query { display: flex; gap: 24px; align-items: center; margin-bottom: 20px; }
.query .picture { flex: none; width: 200px; height: 200px; }
.query .picture img { object-position: left; }
.query h1 { margin-bottom: 8px; }
#title:focus { outline: none; }
.query dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 0; }
.query dt { color: var(--soft); }
.query dd { margin: 0; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 0 0 4px; padding: 0;
  font-size: 13px; }
.legend li { display: flex; gap: 8px; align-items: center; list-style: none; }
.legend .frame { flex: none; width: 20px; height: 20px; }
.note { font-size: 13px; }
.methods { display: grid; grid-template-columns: 1fr; gap: 0 22px; margin-top: 20px; }
.methods.several { grid-template-columns: repeat(auto-fit, minmax(min(100%, 218px), 1fr)); }
/* The parts of methods side by side share their rows, so that the pictures start level. */
.method {
  display: grid; grid-template-rows: subgrid; grid-row: span 4; row-gap: 0; min-width: 0;
  margin-bottom: 28px; padding-top: 12px; border-top: 1px solid var(--line);
}
.facts { margin: 1px 0 12px; color: var(--soft); font-size: 13px; }
.method h3 { margin: 20px 0 10px; font-size: 14px; font-weight: 650; }
.hits {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(106px, 1fr)); gap: 14px 12px;
  align-content: start; margin: 0; padding: 0;
}
.several .hits { grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 12px 10px; }
.hits li { list-style: none; min-width: 0; }
.hit { margin: 0; }
.frame { border-radius: 5px; border: 1px solid var(--other); }
.positive .frame, .frame.positive { border: 4px solid var(--positive); }
.same .frame, .frame.same { border: 4px dashed var(--same); }
.hit .frame { aspect-ratio: 1; overflow: hidden; }
.other .frame { padding: 3px; }
img.thumbnail { display: block; width: 100%; height: 100%; object-fit: contain; }
.picture img.thumbnail, .icon img.thumbnail { border-radius: 5px; }
.missing {
  display: flex; align-items: center; justify-content: center; width: 100%; height: 100%;
  padding: 6px; overflow: hidden; border-radius: 3px; background: var(--panel);
  color: var(--soft); font-size: 11px; line-height: 1.3; text-align: center;
  overflow-wrap: anywhere;
}
.hit figcaption { display: flex; flex-wrap: wrap; gap: 0 8px; margin-top: 4px; font-size: 12px; }
.hit .rank { font-weight: 650; }
.hit .score { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; }
.hit .kind { flex-basis: 100%; color: var(--soft); overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.positive .kind { color: var(--positive); }
.same .kind { color: var(--same); }

.sections { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
  gap: 28px 36px; margin-top: 28px; }
.sections table { width: 100%; }
.sections h2 { margin-bottom: 8px; }
.sections td { overflow-wrap: anywhere; }
.sections td:first-child, .sections th:first-child { padding-left: 0; }

@media (max-width: 1140px) {
  .around { overflow-x: auto; }
}
@media (max-width: 720px) {
  body { padding: 18px 16px 48px; }
  h1 { font-size: 20px; }
  .means .main { font-size: 16px; }
  .means th, .means td { padding: 6px 4px; }
  th, td { padding: 6px; }
  .controls { margin-top: 22px; }
  .controls > label { width: 100%; }
  .controls > label > input, .controls > label > select { width: 100%; max-width: none; }
  .count { margin-left: 0; }
  .queries .order, .queries th.instance, .queries td.instance, .means .seconds { display: none; }
  .queries td .instance { display: block; }
  .queries .icon { width: 52px; }
  .queries .value { width: 62px; }
  .queries td, .queries th button { padding-left: 4px; padding-right: 4px; }
  .queries thead { font-size: 12px; }
  .queries .icon img, .queries .icon .missing { width: 40px; height: 40px; }
  .queries.several { width: auto; min-width: 100% !important; table-layout: auto; }
  .queries.several .text { min-width: 150px; }
  .queries.several .value { min-width: 54px; }
  .queries.several .positives { display: none; }
  .query { gap: 16px; align-items: start; }
  .query .picture { width: 116px; height: 116px; }
  .hits, .several .hits {
    grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 12px 10px;
  }
  .plots img { height: auto; }
}
"""

# Rows of the table are made once, hidden and moved by filter and sort; the pictures of a query are
# made when it is opened. The address says what is open: "#query-12" is the query in row 12.
SCRIPT = r"""
"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const KINDS = { p: "positive", s: "same", o: "other" };

/* An element with attributes and children; strings become text, so no text can become markup. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const percent = (ap) => (100 * ap).toFixed(1);
const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/* The thumbnail of [path, text, thumbnail], or a box with its file's name where there is none. */
function picture(item, description) {
  const [path, , thumbnail] = item;
  const box = () => {
    const title = `no picture of ${path}`;
    return element("div", { class: "missing", title, role: "img", "aria-label": title },
      fileName(path));
  };
  if (!thumbnail) return box();
  const image = element("img", {
    class: "thumbnail", loading: "lazy", decoding: "async", alt: description, title: path,
    src: `thumbnails/${thumbnail}`,
  });
  image.addEventListener("error", () => image.replaceWith(box()));
  return image;
}

/* ---- The table of queries ---- */

/* What can be sorted by: a key, a label, a class, and the value of query i. */
function tableColumns() {
  const several = report.methods.length > 1;
  const columns = [
    { key: "order", label: "#", style: "order number", value: (i) => i,
      show: (i) => String(i + 1) },
    { key: "icon", label: "", style: "icon" },
    { key: "text", label: "Text", style: "text", value: (i) => report.queries[i].text },
    { key: "instance", label: "Instance", style: "instance",
      value: (i) => report.queries[i].instance },
    { key: "positives", label: "Positives", style: "value number positives",
      value: (i) => report.queries[i].positives },
  ];
  report.methods.forEach((method, m) => {
    columns.push({
      key: `ap-${m}`, label: several ? "AP" : "AP (%)", method: m,
      style: several ? "value number starts" : "value number",
      value: (i) => report.queries[i].runs[m].ap, show: percent,
    }, {
      key: `first-${m}`, label: several ? "first" : "First at rank", style: "value number",
      method: m, value: (i) => report.queries[i].runs[m].first,
      show: (first) => (first === null ? "none" : String(first)),
    });
  });
  return columns;
}

const columns = tableColumns();
const rows = report.queries.map(makeRow);
const state = { key: "order", ascending: true, shown: rows.map((_, i) => i), scroll: 0 };

function makeRow(query, i) {
  const row = element("tr", { "data-query": i });
  for (const column of columns) {
    const cell = element("td", { class: column.style });
    if (column.key === "icon") {
      cell.append(picture(query.item, ""));
    } else if (column.key === "text") {
      cell.append(element("a", { href: `#query-${i}` }, query.text || "(no text)"),
        element("span", { class: "instance" }, query.instance));
    } else {
      const value = column.value(i);
      cell.append(column.show ? column.show(value) : String(value));
    }
    row.append(cell);
  }
  row.addEventListener("click", (event) => {
    if (!event.target.closest("a")) location.hash = `query-${i}`;
  });
  return row;
}

/* With several methods, a line of their names stands over the columns of each. */
function makeHead() {
  const head = element("tr");
  if (report.methods.length > 1) {
    const groups = columns.filter((column) => column.method === undefined)
      .map((column) => element("td", { class: `group ${column.style}` }));
    byId("head").append(element("tr", {}, ...groups, ...report.methods.map((method) =>
      element("th", { class: "group starts", scope: "colgroup", colspan: "2" }, method.label))));
  }
  for (const column of columns) {
    const cell = element("th", { class: column.style, scope: "col", "data-key": column.key });
    if (column.value) {
      const button = element("button", { type: "button" }, column.label);
      button.addEventListener("click", () => {
        state.ascending = state.key === column.key ? !state.ascending : true;
        state.key = column.key;
        showTable();
      });
      cell.append(button);
    }
    head.append(cell);
  }
  byId("head").append(head);
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
  return a - b;
}

/* The queries that pass the filters, in the chosen order; those without a value come last. */
function selectQueries() {
  const words = byId("search").value.trim().toLowerCase();
  const instance = byId("instance").value;
  const method = Number(byId("method").value);
  const low = byId("low").value === "" ? -Infinity : Number(byId("low").value);
  const high = byId("high").value === "" ? Infinity : Number(byId("high").value);
  const passes = (query) => {
    const ap = Number(percent(query.runs[method].ap));
    return (instance === "" || query.instance === report.instances[Number(instance)])
      && ap >= low && ap <= high
      && (words === ""
        || `${query.text}\n${query.instance}\n${query.item[0]}`.toLowerCase().includes(words));
  };
  const value = columns.find((column) => column.key === state.key).value;
  const sign = state.ascending ? 1 : -1;
  return report.queries.map((_, i) => i).filter((i) => passes(report.queries[i])).sort((i, j) => {
    const [a, b] = [value(i), value(j)];
    const order = compare(a, b);
    return (a === null || b === null ? order : sign * order) || i - j;
  });
}

function showTable() {
  state.shown = selectQueries();
  const body = byId("body");
  body.replaceChildren(...state.shown.map((i) => rows[i]));
  for (const cell of byId("head").querySelectorAll("[data-key]")) {
    if (cell.dataset.key === state.key) {
      cell.setAttribute("aria-sort", state.ascending ? "ascending" : "descending");
    } else {
      cell.removeAttribute("aria-sort");
    }
  }
  byId("count").textContent =
    `${state.shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} queries`;
  byId("nothing").hidden = state.shown.length > 0;
}

/* ---- One query ---- */

function makeHit(rank, row, score, kind) {
  const item = report.rows[row];
  const name = KINDS[kind];
  const words = { p: "positive", s: item[1], o: "other" }[kind];
  const caption = element("figcaption", {}, element("span", { class: "rank" }, String(rank)));
  if (score !== null) caption.append(element("span", { class: "score" }, score.toPrecision(4)));
  const spoken = kind === "s" ? `same instance, other text: ${words}` : words;
  caption.append(element("span", { class: "kind", title: spoken }, words));
  return element("li", {}, element("figure", { class: `hit ${name}`, "data-row": row },
    element("div", { class: "frame" }, picture(item, `rank ${rank}, ${spoken}`)), caption));
}

function makeMethod(method, run, query) {
  const facts = [`AP ${percent(run.ap)}`];
  facts.push(run.first === null ? "no positives" : `first positive at rank ${run.first}`);
  facts.push(`${run.found} of ${query.positives} positives among the ${run.rows.length} shown`);
  if (run.tied) facts.push("a positive ties with a negative");
  const section = element("section", { class: "method" },
    element("h2", {}, method.label), element("p", { class: "facts" }, facts.join(", ")),
    element("ol", { class: "hits ranked" },
      ...run.rows.map((row, k) => makeHit(k + 1, row, run.scores[k], run.kinds[k]))));
  if (run.missed.length) section.append(makeMissed(run));
  return section;
}

/* The positives below the ranks shown: pictures of the first few, the ranks of all. */
function makeMissed(run) {
  const missed = element("div", {},
    element("h3", {}, `Missed positives: ${run.missedRanks.length}`),
    element("ol", { class: "hits missed" },
      ...run.missed.map((row, j) => makeHit(run.missedRanks[j], row, null, "p"))));
  const rest = run.missedRanks.slice(run.missed.length);
  if (rest.length) {
    missed.append(element("details", {},
      element("summary", {}, `${rest.length} more, by rank`),
      element("p", { class: "facts more" }, rest.join(", "))));
  }
  return missed;
}

function makeSteps(i) {
  const place = state.shown.indexOf(i);
  const steps = element("nav", { class: "steps", "aria-label": "Queries" },
    element("a", { href: "#", id: "back" }, "All queries"));
  const step = (id, label, other) => {
    if (other !== undefined) steps.append(element("a", { href: `#query-${other}`, id }, label));
  };
  if (place >= 0) {
    step("previous", "Previous", state.shown[place - 1]);
    step("next", "Next", state.shown[place + 1]);
    steps.append(element("span", { class: "where" },
      `${place + 1} of ${state.shown.length} in the order of the table`));
  }
  return steps;
}

function makeQuery(i) {
  const query = report.queries[i];
  const facts = [["Instance", query.instance], ["Positives", String(query.positives)],
    ["Image", query.item[0]]];
  return [
    makeSteps(i),
    element("header", { class: "query" },
      element("div", { class: "picture" }, picture(query.item, "query image")),
      element("div", {}, element("h1", { id: "title", tabindex: "-1" }, query.text || "(no text)"),
        element("dl", {}, ...facts.flatMap(([name, value]) =>
          [element("dt", {}, name), element("dd", {}, value)])))),
    byId("legend").content.cloneNode(true),
    element("div", { class: `methods ${report.methods.length > 1 ? "several" : ""}` },
      ...report.methods.map((method, m) => makeMethod(method, query.runs[m], query))),
  ];
}

/* Show what the address names: the query "#query-12", or the table. */
function follow() {
  const match = /^#query-(\d+)$/.exec(location.hash);
  const i = match ? Number(match[1]) : -1;
  const opens = i >= 0 && i < rows.length;
  const wasOpen = !byId("detail").hidden;
  if (opens && !wasOpen) state.scroll = window.scrollY;
  byId("overview").hidden = opens;
  byId("detail").hidden = !opens;
  byId("detail").replaceChildren(...(opens ? makeQuery(i) : []));
  if (opens) {
    state.open = i;
    window.scrollTo(0, 0);
    byId("title").focus({ preventScroll: true });
  } else if (wasOpen) {
    rows[state.open].querySelector("a").focus({ preventScroll: true });
    window.scrollTo(0, state.scroll);
  }
}

function followKey(event) {
  const typing = event.target.closest("input, select, textarea");
  if (byId("detail").hidden || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const link = byId({ Escape: "back", ArrowLeft: "previous", ArrowRight: "next" }[event.key]);
  if (link) link.click();
}

makeHead();
report.instances.forEach((name, i) => byId("instance").append(new Option(name, i)));
report.methods.forEach((method, m) => byId("method").append(new Option(method.label, m)));
byId("method-label").hidden = report.methods.length < 2;
if (report.methods.length > 1) {
  byId("table").classList.add("several");
  // A wider table scrolls in its own box (where its head cannot stay in sight).
  byId("around").classList.toggle("scroll", report.methods.length > 5);
  byId("table").style.minWidth = `${480 + 120 * report.methods.length}px`;
}
for (const id of ["search", "low", "high"]) byId(id).addEventListener("input", showTable);
for (const id of ["instance", "method"]) byId(id).addEventListener("change", showTable);
window.addEventListener("hashchange", follow);
window.addEventListener("keydown", followKey);
showTable();
follow();
"""

# A page may load its own pictures and run its one script, known by its hash, and nothing else.
HEAD = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src {{ script_hash }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
"""

REPORT = (
    HEAD
    + r"""<main id="overview">
<h1>{{ title }}</h1>
<p class="soft">{{ "{:,}".format(query_count) }} queries of {{ instance_count }} instances,
{{ "{:,}".format(database_count) }} database images, the {{ top_k }} best shown for each query</p>
<div class="scroll"><table class="means" id="means">
<thead><tr><th scope="col">Method</th><th scope="col">Backbone</th>
<th scope="col" class="number">mAP</th><th scope="col" class="number">mmAP</th>
<th scope="col" class="number">minmAP</th>
<th scope="col" class="number seconds">Seconds</th></tr></thead>
<tbody>{% for method in methods %}
<tr><td>{{ method.label }}</td><td>{{ method.backbone }}</td>
{% for name in ("mAP", "mmAP", "minmAP") -%}
<td class="number main">{{ "%.2f" | format(method.means[name]) }}</td>
{%- endfor %}
<td class="number soft seconds">{{ "%.1f" | format(method.seconds) }}</td></tr>
{% endfor %}</tbody>
</table></div>
<details id="configuration"><summary>Configuration</summary><div class="configs">
{% for method in methods %}<section class="config"><h2>{{ method.label }}</h2>
{% if method.config %}<dl>{% for name, value in method.config.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% else %}<p class="soft">nothing to set</p>{% endif %}</section>
{% endfor %}</div></details>
<details id="plots"><summary>Plots</summary><div class="plots">
{% for plot in plots %}<figure><img loading="lazy" src="plots/{{ plot.name }}.svg"
alt="{{ plot.caption }}"><figcaption>{{ plot.caption }}:
<a href="plots/{{ plot.name }}.png">PNG</a>, <a href="plots/{{ plot.name }}.svg">SVG</a>,
<a href="plots/{{ plot.name }}.csv">CSV</a></figcaption></figure>
{% endfor %}</div></details>
<div class="controls" role="search">
<label>Search text, instance, file<input type="search" id="search" autocomplete="off"></label>
<label>Instance<select id="instance"><option value="">all instances</option></select></label>
<fieldset><label id="method-label">AP of<select id="method"></select></label>
<label>AP from (%)<input type="number" id="low" min="0" max="100" step="any"></label>
<label>to (%)<input type="number" id="high" min="0" max="100" step="any"></label></fieldset>
<p class="count" id="count" role="status"></p>
</div>
<div class="around" id="around"><table class="queries" id="table">
<thead id="head"></thead><tbody id="body"></tbody></table></div>
<p class="nothing" id="nothing" hidden>No query passes these filters.</p>
</main>
<main id="detail" hidden></main>
<template id="legend"><ul class="legend" aria-label="Frames">
<li><span class="frame positive"></span>positive: this instance, this text</li>
<li><span class="frame same"></span>same instance, other text (written below)</li>
<li><span class="frame"></span>other</li>
</ul>
<p class="soft note">A row counts as the same instance under another text if its own text is another
one asked of this instance. A negative without such a text is other, also where it shows the
instance: the annotation does not tell.</p></template>
<noscript><p>The table and the pictures need JavaScript.</p></noscript>
<script type="application/json" id="data">{{ data }}</script>
<script>{{ script }}</script>
</body>
</html>
"""
)

COMPARISON = (
    HEAD
    + r"""<main>
<h1>{{ title }}</h1>
<p class="soft">{{ "{:,}".format(query_count) }} queries of {{ instance_count }} instances;
AP and means in percent, differences are B minus A</p>
<div class="scroll"><table class="means" id="means">
<thead><tr><th scope="col">Mean</th><th scope="col" class="number">A: {{ a }}</th>
<th scope="col" class="number">B: {{ b }}</th><th scope="col" class="number">B - A</th>
<th scope="col" class="number">95 % interval over queries</th>
<th scope="col" class="number">95 % interval over instances</th></tr></thead>
<tbody>{% for row in means %}
<tr><td>{{ row.mean }}</td><td class="number">{{ "%.2f" | format(row.a) }}</td>
<td class="number">{{ "%.2f" | format(row.b) }}</td>
<td class="number main">{{ "%+.2f" | format(row.difference) }}</td>
<td class="number">{% if row.queries_low == row.queries_low %}
{{- "%+.2f" | format(row.queries_low) }} to {{ "%+.2f" | format(row.queries_high) }}
{%- else %}none{% endif %}</td>
<td class="number">{{ "%+.2f" | format(row.instances_low) }} to
{{ "%+.2f" | format(row.instances_high) }}</td></tr>
{% endfor %}</tbody>
</table></div>
<p class="soft">Paired percentile bootstrap, {{ "{:,}".format(resamples) }} resamples, seed
{{ seed }}. Over queries: single queries are drawn; over instances: whole instances, which is the
wider and the safer one where the queries of an instance resemble each other. There is none over
queries for minmAP: the lowest AP of an instance can only rise when queries are drawn from it, so
the draws do not lie around the mean. B is better on
{{ won }} queries, A on {{ lost }}, and {{ equal }} are equal.</p>
<div class="plots" style="margin-top: 24px"><figure><img src="{{ plot }}.svg"
alt="AP of every query, B against A"><figcaption>AP of every query:
<a href="{{ plot }}.png">PNG</a>, <a href="{{ plot }}.svg">SVG</a>,
<a href="queries.csv">CSV</a></figcaption></figure></div>
<div class="sections">
{% for section in sections %}<section><h2>{{ section.title }}</h2>
<table id="{{ section.id }}"><thead><tr><th scope="col">Text</th><th scope="col">Instance</th>
<th scope="col" class="number">A</th><th scope="col" class="number">B</th>
<th scope="col" class="number">B - A</th></tr></thead>
<tbody>{% for row in section.rows %}
<tr><td title="{{ row.image }}">{{ row.text }}</td><td>{{ row.instance }}</td>
<td class="number">{% if report_a %}<a href="{{ report_a }}#query-{{ row.row_a }}">
{{- "%.1f" | format(row.a) }}</a>{% else %}{{ "%.1f" | format(row.a) }}{% endif %}</td>
<td class="number">{% if report_b %}<a href="{{ report_b }}#query-{{ row.row_b }}">
{{- "%.1f" | format(row.b) }}</a>{% else %}{{ "%.1f" | format(row.b) }}{% endif %}</td>
<td class="number">{{ "%+.1f" | format(row.difference) }}</td></tr>
{% else %}<tr><td colspan="5" class="soft">none</td></tr>
{% endfor %}</tbody></table></section>
{% endfor %}</div>
</main>
</body>
</html>
"""
)
