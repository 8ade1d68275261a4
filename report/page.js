/* Rows of the table are made once, hidden and moved by filter and sort; the pictures of a query are
   made when it is opened. The address says what is open and how the table is filtered and sorted:
   "#query-12&search=snow&sort=value-0" is the query in row 12. */
"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const KINDS = { p: "positive", s: "related", o: "other", x: "left out" };
const isHidden = report.head.hidden; // the ground truth: of no row it is known what it is
const isKnown = (kind) => kind !== "o" || !isHidden || report.head.related;

/* An element with attributes and children; strings become text, so no text can become markup. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/* The same of a drawing. */
function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const textOf = (query) => (query.text.trim() ? query.text : "(no text)");
const percent = (value) => (100 * value).toFixed(1);
const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);

/* The way to the file of [path, note, thumbnail, way], null where it has none. */
function wayTo([path, , , way]) {
  if (!way) return null;
  const whole = way === 1 ? report.full + path : way;
  return whole.split("/").map(encodeURIComponent).join("/");
}

/* The picture of an item as a link that opens the whole image. */
function opening(item, description) {
  const link = element("a", { class: "opens", href: wayTo(item) || "#",
    "aria-label": `${description}, whole image` }, picture(item, description));
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    showFull(item, description);
  });
  return link;
}

/* Without a file, and where it is gone, the thumbnail is shown, which is said. */
function showFull(item, description) {
  const [path, , thumbnail] = item;
  const [image, note] = [byId("full-image"), byId("full-note")];
  const small = (why) => {
    image.onerror = () => { image.hidden = true; };
    image.hidden = !thumbnail;
    if (thumbnail) image.src = `thumbnails/${thumbnail}`;
    note.textContent = why;
    note.hidden = false;
  };
  byId("full-name").textContent = path;
  image.alt = description;
  image.hidden = false;
  note.hidden = true;
  const way = wayTo(item);
  image.onerror = () => small("The data set's file is not where it was: this is the thumbnail.");
  if (way) image.src = way;
  else small("The image has no file of its own here: this is the thumbnail.");
  byId("full").showModal();
}

/* The thumbnail of an item, or a box with its file's name where there is none. */
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
  ];
  if (isHidden) return columns;
  columns.push({ key: "positives", label: "Positives", style: "value number positives",
    value: (i) => report.queries[i].positives });
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
const isGrouped = columns.some((column) => column.method === 1);
const rows = report.queries.map(makeRow);
const state = { key: "order", ascending: true, shown: rows.map((_, i) => i), scroll: [0, 0] };

function makeRow(query, i) {
  const row = element("tr", { "data-query": i });
  for (const column of columns) {
    const cell = element("td", { class: column.style });
    if (column.key === "icon") {
      cell.append(picture(query.images[0], ""));
    } else if (column.key === "text") {
      cell.append(element("a", { href: `#query-${i}` }, textOf(query)),
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
  if (isGrouped) {
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
        changeTable();
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

/* ---- The address ---- */

const filters = () => ["search", ...report.tags.map((_, n) => `tag-${n}`), "method", "low", "high"];

/* What the controls and the order depart in from the beginning: {"search": "snow"}. */
function departures() {
  const found = {};
  for (const id of filters()) {
    const usual = id === "method" ? "0" : "";
    if (byId(id).value !== usual) found[id] = byId(id).value;
  }
  if (state.key !== "order" || !state.ascending) found.sort = state.key;
  if (!state.ascending) found.falling = "1";
  return found;
}

function addressOf(name) {
  const said = Object.entries(departures()).map((pair) => pair.map(encodeURIComponent).join("="));
  return `#${[...(name ? [name] : []), ...said].join("&")}`;
}

/* Set the controls as the address says; one that says nothing of them leaves them as they are. */
function readAddress() {
  const [name, ...said] = location.hash.slice(1).split("&");
  const parts = name.includes("=") ? [name, ...said] : said;
  if (parts.length) {
    const values = {};
    for (const part of parts) {
      const [key, value] = part.split("=").map(decoded);
      values[key] = value;
    }
    for (const id of filters()) {
      const control = byId(id);
      const said = values[id] || (id === "method" ? "0" : "");
      control.value = control.type !== "number" || /^\d*\.?\d+$/.test(said) ? said : "";
      if (control.selectedIndex === -1) control.selectedIndex = 0;
    }
    const known = columns.some((column) => column.key === values.sort && column.value);
    state.key = known ? values.sort : "order";
    state.ascending = values.falling === undefined;
  }
  return name.includes("=") ? "" : name;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function writeAddress(name) {
  const address = addressOf(name);
  if (location.hash !== address && (location.hash || address !== "#")) {
    history.replaceState(null, "", address);
  }
}

function changeTable() {
  showTable();
  writeAddress("");
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

const short = (value) => Number(value.toPrecision(3)).toString();

/* marks: numbers of report.marks; parts: what the score is made of, [name, value] each. Words
   beside a picture: what it is, then its marks. */
function makeHit(rank, row, score, kind, marks, parts = []) {
  const item = report.rows[row];
  const name = KINDS[kind];
  const words = kind === "s" && item[1] ? item[1] : name;
  const caption = element("figcaption", {}, element("span", { class: "rank" }, rank));
  if (score !== null) caption.append(element("span", { class: "score" }, score.toPrecision(4)));
  const said = marks.map((n) => report.marks[n]);
  if (isKnown(kind)) {
    said.unshift(words === name ? name : `${name}: ${words}`);
    caption.append(element("span", { class: "kind", title: said.join(", ") }, words));
  }
  for (const n of marks) {
    caption.append(element("span", { class: "mark", title: report.marks[n] }, String(n + 1)));
  }
  for (const [part, value] of parts) {
    caption.append(element("span", { class: "part", title: `${part} ${value}` }, `${part} `,
      element("strong", {}, short(value))));
  }
  const place = rank ? [`rank ${rank}`] : [];
  return element("li", {}, element("figure", { class: `hit ${name}`, "data-row": row },
    element("div", { class: "frame" }, opening(item, [...place, ...said].join(", "))), caption));
}

/* The parts of a pair of values by name; none where the method tells none. */
const named = (method, pair) => (pair ? method.parts.map((name, n) => [name, pair[n]]) : []);

/* All that shows one image, in every method: marked while one of it has the pointer or focus. */
function markSame(row) {
  for (const other of byId("detail").querySelectorAll(".same")) other.classList.remove("same");
  if (row === undefined) return;
  for (const other of byId("detail").querySelectorAll(`[data-row="${row}"]`)) {
    other.classList.add("same");
  }
}

function followImage(event) {
  const at = event.target.closest && event.target.closest("[data-row]");
  markSame(at ? at.dataset.row : undefined);
}

/* ---- The two parts of every score ---- */

const PLOT = { width: 320, height: 250, left: 66, right: 10, top: 10, bottom: 40 };

/* The scatter of a query's gallery: a sample as dots, hits and positives, and the line on which
   all rows score as the first positive does. */
function makeScatter(method, run) {
  const [left, right, low, high] = run.box;
  const across = (x) => PLOT.left
    + (PLOT.width - PLOT.left - PLOT.right) * (x - left) / (right - left || 1);
  const up = (y) => PLOT.height - PLOT.bottom
    - (PLOT.height - PLOT.top - PLOT.bottom) * (y - low) / (high - low || 1);
  const dots = (packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    return Array.from({ length: bytes.length / 2 }, (_, n) => {
      const x = across(left + (right - left) * bytes[2 * n] / 255);
      const y = up(low + (high - low) * bytes[2 * n + 1] / 255);
      return `M${x.toFixed(1)} ${y.toFixed(1)}h0`;
    });
  };
  const [sample, more] = [dots(run.cloud), dots(run.more)];
  const [x, y] = method.parts;
  const hasLine = run.best && method.fusion;
  const says = `${sample.length} of the gallery's images by ${x} and ${y}`
    + (isHidden ? "" : ", positives marked")
    + (hasLine ? ", and the line of the first positive's score" : "");
  const plot = drawn("svg", { viewBox: `0 0 ${PLOT.width} ${PLOT.height}`, class: "scatter",
    role: "img", "aria-label": says });
  const floor = PLOT.height - PLOT.bottom;
  plot.append(drawn("path", { class: "axes",
    d: `M${PLOT.left} ${PLOT.top}V${floor}H${PLOT.width - PLOT.right}` }));
  plot.append(drawn("path", { class: "cloud", d: sample.join("") }));
  plot.append(drawn("path", { class: "cloud positive", d: more.join("") }));
  if (hasLine) plot.append(drawn("path", { class: "level", d: levelLine(method, run, across, up) }));
  const mark = (row, pair, kind, words) => plot.append(
    drawn("circle", { class: `point ${kind}`, "data-row": row, r: 4.5, cx: across(pair[0]).toFixed(1),
      cy: up(pair[1]).toFixed(1) }, drawn("title", {}, words)));
  run.rows.forEach((row, k) => mark(row, run.parts[k], KINDS[run.kinds[k]], `rank ${k + 1}`));
  run.missed.forEach((row, j) =>
    mark(row, run.missedParts[j], "positive missed", `rank ${run.missedRanks[j]}`));
  const text = (words, place) => plot.append(drawn("text", place, words));
  text(short(left), { x: PLOT.left, y: floor + 16 });
  text(short(right), { x: PLOT.width - PLOT.right, y: floor + 16, "text-anchor": "end" });
  text(short(low), { x: PLOT.left - 5, y: floor, "text-anchor": "end" });
  text(short(high), { x: PLOT.left - 5, y: PLOT.top + 8, "text-anchor": "end" });
  text(x, { x: (PLOT.left + PLOT.width) / 2, y: floor + 32, "text-anchor": "middle" });
  const middle = (PLOT.top + floor) / 2;
  text(y, { x: 12, y: middle, "text-anchor": "middle", transform: `rotate(-90 12 ${middle})` });
  const line = hasLine ? " The line: all that scores as the first positive does." : "";
  const unseen = run.missedRanks.length - run.missed.length - more.length;
  const rest = unseen > 0 ? ` Without the last ${unseen} positives.` : "";
  return element("figure", { class: "parts" }, plot, element("figcaption", {},
    `Dots: ${sample.length} images of the gallery at even steps.${line}${rest}`));
}

/* score = a x + b y + c x^2 + d x y + e y^2, solved for y at every x: one branch or two. */
function levelLine(method, run, across, up) {
  const [a, b, c, d, e] = method.fusion;
  const [left, right, low, high] = run.box;
  const [x0, y0] = run.best;
  const score = a * x0 + b * y0 + c * x0 * x0 + d * x0 * y0 + e * y0 * y0;
  const steps = 120;
  const branches = ["", ""];
  const drawing = [false, false];
  for (let n = 0; n <= steps; n += 1) {
    const x = left + (right - left) * n / steps;
    solve(e, b + d * x, a * x + c * x * x - score).forEach((y, branch) => {
      const inside = y !== null && y >= low && y <= high;
      if (inside) {
        branches[branch] += `${drawing[branch] ? "L" : "M"}${across(x).toFixed(1)} ${up(y).toFixed(1)}`;
      }
      drawing[branch] = inside;
    });
  }
  return branches.join("");
}

/* The roots of p y^2 + q y + r, the lower first; null where there is none. */
function solve(p, q, r) {
  if (Math.abs(p) < 1e-9) return [Math.abs(q) < 1e-12 ? null : -r / q, null];
  const inner = q * q - 4 * p * r;
  if (inner < 0) return [null, null];
  const root = Math.sqrt(inner);
  return [(-q - root) / (2 * p), (-q + root) / (2 * p)].sort((one, other) => one - other);
}

/* What the positives say of a ranking. */
function judged(query, run) {
  const facts = [run.first === null ? "no positives" : `first positive at rank ${run.first}`];
  facts.push(`${run.found} of ${query.positives} positives among the ${run.rows.length} shown`);
  if (run.tied) facts.push("a positive ties with a negative");
  return facts;
}

function makeMethod(method, run, query) {
  const values = report.measures.map((measure, n) =>
    `${measure.replaceAll("_", " ")} ${percent(run.values[n])}`);
  const facts = values.slice(0, 1);
  if (!isHidden) facts.push(...judged(query, run));
  const hits = run.rows.map((row, k) => makeHit(String(k + 1), row, run.scores[k], run.kinds[k],
    run.marks[k], named(method, run.parts && run.parts[k])));
  return element("section", { class: "method", "data-label": method.label },
    element("div", { class: "stick" }, element("h2", {}, method.label)),
    element("div", { class: "facts" }, element("p", {}, facts.join(", ")),
      ...(values.length > 1 ? [makeValues(values)] : [])),
    element("ol", { class: "hits ranked" }, ...hits),
    run.missed.length ? makeMissed(method, run) : element("div"),
    run.cloud === undefined ? element("div") : makeScatter(method, run),
    run.nearCount ? makeNeighbours(run) : element("div"));
}

/* All measures of a query, of a task that has several. */
function makeValues(values) {
  return element("details", {}, element("summary", {}, `${values.length} measures`),
    element("ul", { class: "values" }, ...values.map((value) => element("li", {}, value))));
}

/* The rows that query expansion took: pictures of the nearest few. */
function makeNeighbours(run) {
  const more = run.nearCount - run.near.length;
  return element("div", { class: "neighbours" },
    element("h3", {}, `Neighbours that query expansion took: ${run.nearCount}`),
    element("ol", { class: "hits" },
      ...run.near.map((row, n) => makeHit(String(n + 1), row, null, run.nearKinds[n], []))),
    element("p", { class: "facts" }, more > 0 ? `and ${more} more` : ""));
}

/* The positives below the ranks shown: pictures of the first few, the ranks of all. */
function makeMissed(method, run) {
  const missed = element("div", {},
    element("h3", {}, `Missed positives: ${run.missedRanks.length}`),
    element("ol", { class: "hits missed" },
      ...run.missed.map((row, j) => makeHit(String(run.missedRanks[j]), row, null, "p", run.missedMarks[j],
        named(method, run.missedParts && run.missedParts[j])))));
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
    element("a", { href: addressOf(""), id: "back" }, "All queries"));
  const step = (id, label, other) => {
    if (other !== undefined) {
      steps.append(element("a", { href: addressOf(`query-${other}`), id }, label));
    }
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
    ...(isHidden ? [] : [["Positives", String(query.positives)]]),
    ["Image", query.images.map(([path]) => path).join(", ")],
  ];
  const pictures = query.images.map((item) =>
    element("div", { class: "picture" }, opening(item, "query image")));
  const parts = [
    makeSteps(i),
    element("header", { class: "query" }, ...pictures,
      element("div", {}, element("h1", { id: "title", tabindex: "-1" }, textOf(query)),
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
  const name = readAddress();
  showTable();
  const match = /^query-(\d+)$/.exec(name);
  const i = match ? Number(match[1]) : -1;
  const opens = i >= 0 && i < rows.length;
  writeAddress(opens ? name : "");
  const wasOpen = !byId("detail").hidden;
  if (opens && !wasOpen) state.scroll = [window.scrollY, byId("around").scrollTop];
  byId("overview").hidden = opens;
  byId("detail").hidden = !opens;
  byId("detail").replaceChildren(...(opens ? makeQuery(i) : []));
  if (opens) {
    state.open = i;
    window.scrollTo(0, 0);
    byId("title").focus({ preventScroll: true });
  } else if (wasOpen) {
    rows[state.open].querySelector("a").focus({ preventScroll: true });
    window.scrollTo(0, state.scroll[0]);
    byId("around").scrollTop = state.scroll[1];
  }
}

function followKey(event) {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (byId("detail").hidden || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const link = byId({ Escape: "back", ArrowLeft: "previous", ArrowRight: "next" }[event.key]);
  if (link) link.click();
}

makeHead();
report.tags.forEach((tag, n) => {
  tag.labels.forEach((label, m) => byId(`tag-${n}`).append(new Option(label, m)));
  byId(`tag-${n}`).addEventListener("change", changeTable);
});
report.methods.forEach((method, m) => byId("method").append(new Option(method.label, m)));
byId("method-label").hidden = report.methods.length < 2;
byId("bounds").hidden = !report.measures.length;
byId("table").style.setProperty("--labels", Math.max(1, report.labels.length));
if (isGrouped) {
  byId("table").classList.add("several");
  byId("around").classList.add("many");
  byId("around").classList.toggle("scroll", report.methods.length > 5);
  byId("table").style.minWidth = `${480 + 120 * report.methods.length}px`;
}
for (const id of ["search", "low", "high"]) byId(id).addEventListener("input", changeTable);
byId("method").addEventListener("change", changeTable);
for (const kind of ["mouseover", "focusin"]) byId("detail").addEventListener(kind, followImage);
byId("detail").addEventListener("mouseleave", () => markSame(undefined));
byId("full-close").addEventListener("click", () => byId("full").close());
byId("full").addEventListener("click", (event) => {
  if (event.target === byId("full")) byId("full").close();
});
window.addEventListener("hashchange", follow);
window.addEventListener("keydown", followKey);
follow();
