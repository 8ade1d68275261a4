/* Rows of the table are made once, hidden and moved by filter and sort; the pictures of a query are
   made when it is opened. The address says what is open: "#query-12" is the query in row 12. */
"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const KINDS = { p: "positive", s: "related", o: "other", x: "left out" };

/* An element with attributes and children; strings become text, so no text can become markup. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const percent = (value) => (100 * value).toFixed(1);
const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/* The thumbnail of [path, note, thumbnail], or a box with its file's name where there is none. */
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
    ...report.labels.map((label, n) => ({ key: `label-${n}`, label, style: "label",
      value: (i) => report.queries[i].labels[n] })),
    { key: "positives", label: "Positives", style: "value number positives",
      value: (i) => report.queries[i].positives },
  ];
  const [measure] = report.measures;
  report.methods.forEach((method, m) => {
    if (measure) {
      columns.push({
        key: `value-${m}`, label: several ? measure : `${measure} (%)`, method: m,
        style: "value number", value: (i) => report.queries[i].runs[m].values[0], show: percent,
      });
    }
    columns.push({
      key: `first-${m}`, label: several ? "first" : "First at rank", style: "value number",
      method: m, value: (i) => report.queries[i].runs[m].first,
      show: (first) => (first === null ? "none" : String(first)),
    });
    if (several) columns.find((column) => column.method === m).style += " starts";
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
      cell.append(picture(query.images[0], ""));
    } else if (column.key === "text") {
      cell.append(element("a", { href: `#query-${i}` }, query.text || "(no text)"),
        element("span", { class: "label" }, query.labels.join(", ")));
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
      element("th", { class: "group starts", scope: "colgroup",
        colspan: String(columns.filter((column) => column.method === 0).length) },
      method.label))));
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
  const wanted = report.tags.map((_, n) => byId(`tag-${n}`).value);
  const method = Number(byId("method").value);
  const low = byId("low").value === "" ? -Infinity : Number(byId("low").value);
  const high = byId("high").value === "" ? Infinity : Number(byId("high").value);
  const within = (query) => {
    if (!report.measures.length) return true;
    const value = Number(percent(query.runs[method].values[0]));
    return value >= low && value <= high;
  };
  const said = (query) => [query.text, ...query.labels, ...query.images.map(([path]) => path)];
  const passes = (query) => within(query)
    && wanted.every((label, n) => label === "" || query.tags[n].includes(Number(label)))
    && (words === "" || said(query).join("\n").toLowerCase().includes(words));
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

/* marks: numbers of report.marks. Words beside a picture: what it is, then its marks. */
function makeHit(rank, row, score, kind, marks) {
  const item = report.rows[row];
  const name = KINDS[kind];
  const words = kind === "s" && item[1] ? item[1] : name;
  const caption = element("figcaption", {}, element("span", { class: "rank" }, rank));
  if (score !== null) caption.append(element("span", { class: "score" }, score.toPrecision(4)));
  const said = [words === name ? name : `${name}: ${words}`, ...marks.map((n) => report.marks[n])];
  caption.append(element("span", { class: "kind", title: said.join(", ") }, words));
  for (const n of marks) {
    caption.append(element("span", { class: "mark", title: report.marks[n] }, String(n + 1)));
  }
  const place = rank ? [`rank ${rank}`] : [];
  return element("li", {}, element("figure", { class: `hit ${name}`, "data-row": row },
    element("div", { class: "frame" }, picture(item, [...place, ...said].join(", "))), caption));
}

function makeMethod(method, run, query) {
  const facts = report.measures.map((measure, n) => `${measure} ${percent(run.values[n])}`);
  facts.push(run.first === null ? "no positives" : `first positive at rank ${run.first}`);
  facts.push(`${run.found} of ${query.positives} positives among the ${run.rows.length} shown`);
  if (run.tied) facts.push("a positive ties with a negative");
  const hits = run.rows.map((row, k) =>
    makeHit(String(k + 1), row, run.scores[k], run.kinds[k], run.marks[k]));
  const section = element("section", { class: "method" },
    element("h2", {}, method.label), element("p", { class: "facts" }, facts.join(", ")),
    element("ol", { class: "hits ranked" }, ...hits));
  if (run.missed.length) section.append(makeMissed(run));
  return section;
}

/* The positives below the ranks shown: pictures of the first few, the ranks of all. */
function makeMissed(run) {
  const missed = element("div", {},
    element("h3", {}, `Missed positives: ${run.missedRanks.length}`),
    element("ol", { class: "hits missed" },
      ...run.missed.map((row, j) => makeHit(String(run.missedRanks[j]), row, null, "p", []))));
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
  const facts = [
    ...report.labels.map((label, n) => [label, query.labels[n]]),
    ...report.tags.map((tag, n) => [tag.name, query.tags[n].map((m) => tag.labels[m]).join(", ")])
      .filter(([, value]) => value && !query.labels.includes(value)),
    ["Positives", String(query.positives)],
    ["Image", query.images.map(([path]) => path).join(", ")],
  ];
  const pictures = query.images.map((item) =>
    element("div", { class: "picture" }, picture(item, "query image")));
  const parts = [
    makeSteps(i),
    element("header", { class: "query" }, ...pictures,
      element("div", {}, element("h1", { id: "title", tabindex: "-1" }, query.text || "(no text)"),
        element("dl", {}, ...facts.flatMap(([name, value]) =>
          [element("dt", {}, name), element("dd", {}, value)])))),
    byId("legend").content.cloneNode(true),
    element("div", { class: `methods ${report.methods.length > 1 ? "several" : ""}` },
      ...report.methods.map((method, m) => makeMethod(method, query.runs[m], query))),
  ];
  if (query.leftOut.length) parts.push(makeLeftOut(query.leftOut));
  return parts;
}

/* The rows that no ranking of this query holds, by rule. */
function makeLeftOut(rows) {
  return element("section", { class: "left-out" }, element("h3", {}, "Left out of the ranking"),
    element("ol", { class: "hits" }, ...rows.map((row) => makeHit("", row, null, "x", []))));
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
report.tags.forEach((tag, n) => {
  tag.labels.forEach((label, m) => byId(`tag-${n}`).append(new Option(label, m)));
  byId(`tag-${n}`).addEventListener("change", showTable);
});
report.methods.forEach((method, m) => byId("method").append(new Option(method.label, m)));
byId("method-label").hidden = report.methods.length < 2;
byId("bounds").hidden = !report.measures.length;
byId("table").style.setProperty("--labels", Math.max(1, report.labels.length));
if (report.methods.length > 1) {
  byId("table").classList.add("several");
  // A wider table scrolls in its own box (where its head cannot stay in sight).
  byId("around").classList.toggle("scroll", report.methods.length > 5);
  byId("table").style.minWidth = `${480 + 120 * report.methods.length}px`;
}
for (const id of ["search", "low", "high"]) byId(id).addEventListener("input", showTable);
byId("method").addEventListener("change", showTable);
window.addEventListener("hashchange", follow);
window.addEventListener("keydown", followKey);
showTable();
follow();
