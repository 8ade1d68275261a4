/* The page of live search. The address says what is asked: "#image=KEY&text=WORDS&method=NAME&p.X=1";
   every change goes into it, and what is in it is asked. Requests are numbered, late answers drop. */
"use strict";
const byId = (id) => document.getElementById(id);
const TAB = Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(16)).join("");
const TYPING = 250; // milliseconds without a letter after which a text is asked
const LATE = 1000; // milliseconds without an answer after which it is said why
const RETRY = 2000; // milliseconds between two tries to reach a server that is gone
const TITLES = { composed: "Image and text", image: "Image only", text: "Text only" };
const NAMES = Object.keys(TITLES);

let state = null; // what the server says of the gallery and the methods
let asked = null; // what the address asks: {image, text, method, given, out}
let answer = null; // the latest answer
let number = 0; // of the latest request
let before = new Map(); // row -> rank in the composed column of the answer before
let column = "composed"; // the one that is shown where there is room for one, or was chosen
let alone = false; // whether it is shown alone where there is room for all
let lastKind = ""; // of the latest change, so that typing is one step of the history
const brought = new Map(); // key -> file that was brought, for a server that has forgotten it

/* An element with attributes and children; strings become text, so no text can become markup. */
function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const fileName = (path) => path.slice(path.lastIndexOf("/") + 1);
const many = (count) => count.toLocaleString("en");
const short = (value) => (value === null ? "" : value.toPrecision(4));

function say(words) {
  byId("said").textContent = words;
  byId("said").hidden = !words;
}

/* ---- The server ---- */

class Refusal extends Error {}

/* The answer to a request. Waits, and says so, while there is no server. */
async function ask(path, options) {
  for (;;) {
    let reply = null;
    try {
      reply = await fetch(path, options);
    } catch {
      say("The server does not answer; trying again.");
      document.body.dataset.lost = "1";
      await new Promise((wait) => setTimeout(wait, RETRY));
      continue;
    }
    if (document.body.dataset.lost) {
      delete document.body.dataset.lost;
      say("");
    }
    if (reply.status === 403) throw new Refusal(await reply.text());
    const content = await reply.json();
    if (reply.ok) return content;
    const error = new Refusal(content.error);
    error.status = reply.status;
    throw error;
  }
}

/* Do what may be refused, and say why it was. */
async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.status !== 409) say(error.message);
    return null;
  }
}

/* ---- What is asked ---- */

const methodOf = (name) => state.methods.find((method) => method.name === name);
const usable = () => state.methods.filter((method) => !method.lacking);

function readAddress() {
  const query = new URLSearchParams(location.hash.slice(1));
  const named = methodOf(query.get("method"));
  const fallback = usable().find((method) => method.name === "basic") || usable()[0];
  const method = named || fallback;
  const given = {};
  for (const parameter of method.parameters) {
    const value = query.get(`p.${parameter.name}`);
    if (value !== null) given[parameter.name] = value;
  }
  return {
    image: query.get("image") || "", text: query.get("text") || "", method: method.name, given,
    out: query.get("out") === "1",
  };
}

function addressOf(what) {
  const query = new URLSearchParams();
  if (what.image) query.set("image", what.image);
  if (what.text) query.set("text", what.text);
  query.set("method", what.method);
  for (const [name, value] of Object.entries(what.given)) query.set(`p.${name}`, value);
  if (what.out) query.set("out", "1");
  return query;
}

/* Change what is asked. kind: changes of one kind in a row are one step of the history, but "step"
   is always one of its own. */
function change(parts, kind) {
  asked = { ...asked, ...parts };
  const address = `#${addressOf(asked)}`;
  if (kind !== "step" && kind === lastKind) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  lastKind = kind;
  show();
}

/* ---- The query ---- */

const pictureOf = (key, size) =>
  `/${size}/${encodeURIComponent(key)}${key[0] === "u" ? "" : `?v=${state.version}`}`;

/* A picture by key, or a box with the name where there is none. */
function picture(key, name) {
  const image = element("img", { alt: name, loading: "lazy", decoding: "async",
    src: pictureOf(key, "thumb") });
  image.addEventListener("error", () => image.replaceWith(element("span", { class: "missing",
    role: "img", "aria-label": `no picture of ${name}` }, fileName(name))));
  return image;
}

function showQuery() {
  const place = byId("given");
  if (place.dataset.key !== asked.image) {
    place.dataset.key = asked.image;
    place.replaceChildren();
    if (asked.image) {
      const remove = element("button", { type: "button", class: "remove", id: "remove",
        title: "Without an image", "aria-label": "Without an image" }, "\u00d7");
      remove.addEventListener("click", () => change({ image: "" }, "step"));
      place.append(picture(asked.image, "query image"), remove);
    }
  }
  const field = byId("text");
  if (document.activeElement !== field || field.value.trim() !== asked.text) {
    field.value = asked.text;
  }
  byId("method").value = asked.method;
  byId("out-label").hidden = !asked.image || asked.image[0] === "u";
  byId("out").checked = asked.out;
  showKnobs();
}

/* ---- The method's parameters ---- */

const valueOf = (parameter) => {
  const given = asked.given[parameter.name];
  if (given === undefined) return parameter.start;
  if (parameter.kind === "bool") return given === "true";
  return parameter.kind === "str" ? given : Number(given);
};

function setValue(parameter, value) {
  const given = { ...asked.given };
  if (String(value) === String(parameter.start)) delete given[parameter.name];
  else given[parameter.name] = String(value);
  change({ given }, `knob ${parameter.name}`);
}

function showKnobs() {
  const method = methodOf(asked.method);
  const place = byId("knobs");
  byId("summary").textContent = method.summary;
  if (place.dataset.method !== method.name) {
    place.dataset.method = method.name;
    place.replaceChildren(...method.parameters.map(makeKnob));
  }
  const on = (name) => valueOf(method.parameters.find((other) => other.name === name));
  method.parameters.forEach((parameter, place_) => {
    const knob = place.children[place_];
    const value = valueOf(parameter);
    const idle = parameter.only_with.length > 0 && !parameter.only_with.some(on);
    knob.classList.toggle("idle", idle);
    knob.classList.toggle("departs", !idle && String(value) !== String(parameter.preset));
    for (const input of knob.querySelectorAll("input, select")) {
      input.disabled = idle;
      if (input.type === "checkbox") input.checked = value;
      else if (document.activeElement !== input || Number(input.value) !== value) {
        input.value = String(value);
      }
    }
  });
  byId("reset").hidden = Object.keys(asked.given).length === 0;
}

function makeKnob(parameter) {
  const label = element("span", { class: "label" }, parameter.name.replaceAll("_", " "));
  const title = `${parameter.name}: ${parameter.help} (preset: ${parameter.preset})`;
  const kind = parameter.kind === "bool" ? "knob" : "knob long";
  return element("label", { class: kind, title, "data-name": parameter.name },
    label, ...makeInputs(parameter));
}

function makeInputs(parameter) {
  const set = (value) => setValue(parameter, value);
  if (parameter.kind === "bool") {
    const box = element("input", { type: "checkbox" });
    box.addEventListener("change", () => set(box.checked));
    return [box];
  }
  if (parameter.kind === "str") {
    const list = element("select", {},
      ...parameter.words.map((word) => element("option", { value: word }, word)));
    list.addEventListener("change", () => set(list.value));
    return [list];
  }
  const step = parameter.kind === "int" ? "1" : "any";
  const field = element("input", { type: "number", step });
  const fine = parameter.kind === "int" ? 1 : (parameter.high - parameter.low) / 200;
  const slider = element("input", { type: "range", min: parameter.low, max: parameter.high,
    step: parameter.preset >= 10 ? 1 : fine, "aria-label": parameter.name });
  field.addEventListener("input", () => {
    if (field.value !== "" && field.validity.valid) set(Number(field.value));
  });
  slider.addEventListener("input", () => set(Number(Number(slider.value).toPrecision(6))));
  return [slider, field];
}

/* ---- Answers ---- */

/* Ask what the address asks, and show what comes. */
async function show() {
  showQuery();
  const isAsked = Boolean(asked.image || asked.text);
  byId("browse").hidden = isAsked;
  for (const id of ["columns", "tabs"]) byId(id).hidden = !isAsked;
  number += 1;
  if (!isAsked) {
    say("");
    answer = null;
    for (const id of ["scatter", "export", "caution", "key"]) byId(id).hidden = true;
    return;
  }
  const own = number;
  const query = addressOf(asked);
  query.set("tab", TAB);
  query.set("n", own);
  byId("columns").classList.add("waiting");
  const isLate = () => own === number && !state.loaded && say("The backbone is being loaded.");
  const late = setTimeout(isLate, LATE);
  const found = await attempt(() => rank(query));
  clearTimeout(late);
  if (found) state.loaded = true;
  if (own !== number) return;
  byId("columns").classList.remove("waiting");
  if (found) showAnswer(found);
}

/* A ranking; an image that was brought is brought again where the server has forgotten it. */
async function rank(query) {
  const file = brought.get(query.get("image"));
  try {
    return await ask(`/api/rank?${query}`);
  } catch (error) {
    if (!(error instanceof Refusal) || error.status !== 400 || !file) throw error;
    await ask("/api/image", { method: "POST", body: file });
    return ask(`/api/rank?${query}`);
  }
}

function showAnswer(found) {
  if (found.version !== state.version) {
    refresh();
    return;
  }
  say("");
  if (answer && answer.columns.composed) {
    before = new Map(answer.columns.composed.map((row, place) => [row.row, place + 1]));
  }
  answer = found;
  const names = NAMES.filter((name) => found.columns[name]);
  const chosen = names.includes(column) ? column : names[0];
  const place = byId("columns");
  place.className = `columns${names.length > 1 ? " several" : ""}${alone ? " alone" : ""}`;
  const spans = Object.fromEntries(["image", "text"].map((part) => [part, spanOf(part)]));
  place.replaceChildren(...names.map((name) => makeColumn(name, name === chosen, spans)));
  byId("tabs").replaceChildren(...names.map((name) => makeTab(name, name === chosen)));
  for (const id of ["tabs", "key"]) byId(id).hidden = names.length < 2;
  const cautions = [found.remark, found.approximate, found.caution].filter(Boolean);
  byId("caution").textContent = cautions.join("; ");
  byId("caution").hidden = !cautions.length;
  byId("export").hidden = false;
  byId("reproduce").hidden = true;
  byId("command").hidden = !found.columns.composed;
  byId("csv").href = `/export.csv?${addressOf(asked)}&k=${Math.min(1000, state.count)}`;
  showScatter(null);
}

const mainRows = () => answer.columns[NAMES.find((name) => answer.columns[name])];

/* The lowest and highest of a sub-score that is shown or sampled. */
function spanOf(part) {
  const rows = Object.values(answer.columns).flat().map((row) => row[part]);
  const values = rows.concat(answer.scatter ? answer.scatter[part] : []);
  const known = values.filter((value) => typeof value === "number");
  return [Math.min(...known), Math.max(...known)];
}

function makeTab(name, isChosen) {
  const tab = element("button", { type: "button", "aria-pressed": isChosen }, TITLES[name]);
  tab.addEventListener("click", () => choose(name, alone));
  return tab;
}

/* Show a column, alone or beside the others. */
function choose(name, isAlone) {
  if (!answer || (name && !answer.columns[name])) return;
  [column, alone] = [name || column, isAlone];
  showAnswer(answer);
}

function makeColumn(name, isChosen, spans) {
  const rows = answer.columns[name];
  const hits = rows.map((row, place) => makeHit(row, place + 1, name, spans));
  const title = name === "composed" ? `${TITLES[name]}: ${asked.method}` : TITLES[name];
  return element("section", { class: `column${isChosen ? " chosen" : ""}`, "data-column": name },
    element("h2", {}, title), element("ul", { class: "hits" }, ...hits));
}

function makeHit(row, rankHere, name, spans) {
  const hit = element("li", { class: "hit", "data-row": row.row });
  if (row.key === asked.image) hit.classList.add("own");
  hit.append(makePicture(row, `${rankHere}. ${row.name}`));
  const line = element("div", { class: "line" }, element("span", { class: "rank" }, rankHere));
  if (name === "composed" && before.size) line.append(makeMoved(row.row, rankHere));
  line.append(element("span", { class: "score" }, short(row.score)));
  hit.append(line, makeBars(row, spans));
  const others = Object.entries(row.ranks);
  if (others.length) {
    const title = others.map(([other, at]) => `rank ${many(at)} by ${TITLES[other]}`).join(", ");
    hit.append(element("div", { class: "ranks", title }, ...others.map(([other, at]) =>
      element("span", { class: other }, `#${many(at)}`))));
  }
  hit.append(makeName(row));
  for (const kind of ["pointerenter", "focusin"]) {
    hit.addEventListener(kind, () => showScatter(row));
  }
  hit.addEventListener("pointerleave", () => showScatter(null));
  return hit;
}

/* A file's name, and in how many rows of the gallery it is where it is in several. */
function makeName(row) {
  const rows = row.listed > 1 ? [element("span", { class: "listed" }, `in ${row.listed} rows`)] : [];
  return element("div", { class: "name", title: row.name }, ...rows, fileName(row.name));
}

function makePicture(row, title) {
  const button = element("button", { type: "button", class: "picture", title,
    "data-key": row.key, "data-name": row.name }, picture(row.key, row.name));
  button.addEventListener("click", (event) => {
    if (event.altKey) enlarge(row.key, row.name);
    else change({ image: row.key }, "step");
  });
  return button;
}

function makeMoved(row, now) {
  const then = before.get(row);
  if (then === now) return "";
  const words = then === undefined ? "new" : `${then > now ? "\u25b2" : "\u25bc"}${Math.abs(then - now)}`;
  return element("span", { class: "moved" }, words);
}

/* The two sub-scores as bars, from the lowest that is seen to the highest. */
function makeBars(row, spans) {
  const bars = element("div", { class: "bars" });
  for (const part of ["image", "text"]) {
    if (typeof row[part] !== "number") continue;
    const [low, high] = spans[part];
    const fill = element("i", { class: part });
    fill.style.width = `${100 * ((row[part] - low) / (high - low || 1))}%`;
    bars.append(element("span", { class: "bar", title: `${part} ${short(row[part])}` }, fill));
  }
  return bars;
}

/* ---- The scatter ---- */

const scatter = new Scatter(byId("plot"), (row) => answer && showScatter(row));

function showScatter(lit) {
  const sample = answer && answer.scatter;
  byId("scatter").hidden = !sample;
  if (!sample) return;
  const rows = mainRows();
  const own = lit && typeof lit.image === "number" ? rows.find((row) => row.row === lit.row) : null;
  scatter.draw(sample, rows, own || null);
  for (const hit of document.querySelectorAll(".hit.lit")) hit.classList.remove("lit");
  if (own) {
    for (const hit of document.querySelectorAll(`.column [data-row="${own.row}"]`)) {
      hit.classList.add("lit");
    }
  }
  const shown = `${rows.length} shown, of ${many(sample.of)}, ${many(sample.image.length)} drawn`;
  const line = sample.level
    ? `; the line: scores like rank ${own ? rows.indexOf(own) + 1 : rows.length}`
    : "; this method is no function of the two";
  byId("legend").textContent = `${shown}${line}`;
  byId("plot").setAttribute("aria-label", `image against text similarity: ${shown}${line}`);
}

/* ---- Gallery and queries, to start from ---- */

async function browse(from) {
  const found = await attempt(() => ask(`/api/gallery?from=${from}`));
  if (!found) return;
  const hits = found.rows.map((row) => {
    return element("li", { class: "hit" }, makePicture(row, row.name), makeName(row));
  });
  if (from === 0) byId("gallery").replaceChildren(...hits);
  else byId("gallery").append(...hits);
  const next = from + hits.length;
  byId("more").hidden = next >= state.count;
  byId("more").dataset.from = next;
}

async function listQueries(from) {
  const find = byId("find").value;
  const found = await attempt(() => ask(`/api/queries?${new URLSearchParams({ find, from })}`));
  if (!found || find !== byId("find").value) return;
  const listed = found.queries.map((query) => {
    const button = element("button",
      { type: "button", "data-key": query.key, title: query.text },
      picture(query.key, query.name), element("span", {}, query.text));
    button.addEventListener("click",
      () => change({ image: query.key, text: query.text.trim() }, "step"));
    return element("li", {}, button);
  });
  if (from === 0) byId("asked-list").replaceChildren(...listed);
  else byId("asked-list").append(...listed);
  const next = from + listed.length;
  byId("asked-count").textContent = many(found.count);
  byId("asked-more").hidden = next >= found.count;
  byId("asked-more").dataset.from = next;
}

/* ---- Images that are brought ---- */

async function bring(file) {
  if (!file) return;
  if (file.size > state.mostBytes) {
    say(`${file.name || "This image"} has more than ${state.mostBytes >> 20} MB; make it smaller.`);
    return;
  }
  byId("drop").setAttribute("aria-busy", "true");
  const found = await attempt(() => ask("/api/image", { method: "POST", body: file }));
  byId("drop").removeAttribute("aria-busy");
  if (!found) return;
  brought.set(found.key, file);
  change({ image: found.key }, "step");
}

function enlarge(key, name) {
  byId("large-image").src = pictureOf(key, "image");
  byId("large-image").alt = name;
  byId("large-name").textContent = name;
  byId("large").showModal();
}

/* ---- Keys ---- */

/* The picture that an arrow leads to from the one that has the focus. */
function neighbour(from, key) {
  const pictures = [...document.querySelectorAll("#answers .picture")]
    .filter((one) => one.offsetParent);
  if (!from) return pictures[0];
  const here = from.getBoundingClientRect();
  const along = key === "ArrowLeft" || key === "ArrowRight" ? ["left", "top"] : ["top", "left"];
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  let [best, least] = [null, Infinity];
  for (const one of pictures) {
    const there = one.getBoundingClientRect();
    const ahead = sign * (there[along[0]] - here[along[0]]);
    const aside = Math.abs(there[along[1]] - here[along[1]]);
    if (ahead > 4 && ahead + 3 * aside < least) [best, least] = [one, ahead + 3 * aside];
  }
  return best;
}

const ACTIONS = {
  "/": () => byId("text").focus(),
  "?": () => byId("keys").showModal(),
  g: () => change({ image: "", text: "" }, "step"),
  Backspace: () => history.back(),
  0: () => choose("", false),
  1: () => choose("composed", true),
  2: () => choose("image", true),
  3: () => choose("text", true),
};

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if (target.matches("input, select, textarea")) {
    if (key === "Escape" || (key === "ArrowDown" && target.id === "text")) {
      target.blur();
      const first = neighbour(null);
      if (key === "ArrowDown" && first) first.focus();
      event.preventDefault();
    }
    return;
  }
  const from = target.closest("#answers .picture");
  if (key.startsWith("Arrow")) {
    const next = neighbour(from, key);
    if (next) {
      next.focus();
      event.preventDefault();
    }
  } else if (key === "o" && from) {
    enlarge(from.dataset.key, from.dataset.name);
  } else if (Object.hasOwn(ACTIONS, key) && !event.altKey) {
    event.preventDefault();
    ACTIONS[key]();
  }
}

/* ---- Beginning ---- */

function fillMethods() {
  byId("method").replaceChildren(...state.methods.map((method) => {
    const option = element("option", { value: method.name }, method.name);
    option.disabled = Boolean(method.lacking);
    if (method.lacking) option.title = method.lacking;
    return option;
  }));
  const lacking = state.methods.filter((method) => method.lacking);
  byId("lacking").hidden = !lacking.length;
  byId("lacking-title").textContent = `${lacking.length} methods lack inputs`;
  byId("lacking-list").replaceChildren(...lacking.map((method) =>
    element("li", {}, `${method.name}: ${method.lacking}`)));
}

async function refresh() {
  const found = await attempt(() => ask("/api/state"));
  if (!found) return;
  state = found;
  document.title = `${state.name}: live search`;
  byId("name").textContent = state.name;
  const skipped = state.skippedCount ? `, ${many(state.skippedCount)} cannot be read` : "";
  const rows = state.rows > state.count ? ` in ${many(state.rows)} rows` : "";
  byId("facts").textContent =
    `${many(state.count)} images${rows}${skipped}; ${state.backbone} on ${state.device}`;
  byId("gallery-count").textContent = many(state.count);
  byId("asked").hidden = !state.queries;
  byId("skipped").hidden = !state.skippedCount;
  byId("skipped-title").textContent = `Images that cannot be read: ${many(state.skippedCount)}`;
  byId("skipped-list").replaceChildren(...state.skipped.map((lost) =>
    element("li", {}, `${lost.name}: ${lost.cause}`)));
  fillMethods();
  byId("knobs").dataset.method = "";
  asked = readAddress();
  await Promise.all([browse(0), state.queries ? listQueries(0) : null, show()]);
  if (state.failed) say(state.failed);
  document.body.dataset.ready = "1";
}

function listen() {
  let typing = 0;
  const type = () => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      const text = byId("text").value.trim();
      if (text !== asked.text) change({ text }, "text");
    }, TYPING);
  };
  byId("text").addEventListener("input", type);
  byId("method").addEventListener("change",
    () => change({ method: byId("method").value, given: {} }, "step"));
  byId("reset").addEventListener("click", () => change({ given: {} }, "step"));
  byId("out").addEventListener("change", () => change({ out: byId("out").checked }, "step"));
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    bring(byId("file").files[0]);
    byId("file").value = "";
  });
  byId("back").addEventListener("click", () => history.back());
  byId("forward").addEventListener("click", () => history.forward());
  byId("home").addEventListener("click", ACTIONS.g);
  byId("help").addEventListener("click", ACTIONS["?"]);
  byId("more").addEventListener("click", () => browse(Number(byId("more").dataset.from)));
  byId("asked-more").addEventListener("click",
    () => listQueries(Number(byId("asked-more").dataset.from)));
  byId("find").addEventListener("input", () => listQueries(0));
  byId("command").addEventListener("click", reproduce);
  byId("copy").addEventListener("click",
    () => navigator.clipboard.writeText(byId("line").textContent));
  addEventListener("popstate", () => {
    lastKind = "";
    asked = readAddress();
    show();
  });
  addEventListener("keydown", onKey);
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) {
      event.preventDefault();
      bring(file);
    }
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      byId("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") bring(event.dataTransfer.files[0]);
    });
  }
}

async function reproduce() {
  const path = `/api/command?${addressOf(asked)}`;
  const found = await attempt(() => ask(path, { method: "POST" }));
  if (!found) return;
  const words = found.command.split(" ").map((word) => element("span", {}, word));
  byId("line").replaceChildren(...words.flatMap((word, place) => (place ? [" ", word] : [word])));
  byId("hidden-note").hidden = !found.hidden;
  byId("reproduce").hidden = false;
}

if (matchMedia("(max-width: 900px)").matches) byId("how").open = false;
listen();
refresh();
