"use strict";

const by = (id) => document.getElementById(id);

// the only way words get into the page: as text, never as markup
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

async function ask(path, body) {
  const upload = body instanceof FormData;
  const options = body === undefined ? {} : {
    method: "POST",
    headers: upload ? {} : { "Content-Type": "application/json" },
    body: upload ? body : JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const detail = answer.detail;
  throw new Error(Array.isArray(detail) ? detail.map((one) => one.msg).join("; ") : detail || response.statusText);
}

function picture(id, title) {
  const frame = make("div", { class: "frame" });
  const image = make("img", { src: `api/picture?item_id=${encodeURIComponent(id)}`, alt: title || String(id), loading: "lazy" });
  image.addEventListener("error", () => frame.replaceChildren(make("span", { class: "absent" }, "no picture")));
  frame.append(image);
  return frame;
}

function card(item, onclick, ...more) {
  const title = item.title || String(item.item_id);
  return make("button", { type: "button", class: "card", title, onclick },
    picture(item.item_id, title),
    make("span", { class: "name" }, title),
    make("small", {}, String(item.item_id), ` · ${item.score.toFixed(3)}`),
    ...more);
}

// --- search

let turn = 0; // an answer that comes after a later question is dropped

async function show(describe, request) {
  const own = ++turn;
  by("message").textContent = "…";
  try {
    const answer = await request();
    if (own !== turn) return;
    by("query").replaceChildren(...describe());
    by("message").textContent = answer.items.length ? "" : "Nothing fulfils the conditions.";
    by("results").replaceChildren(...answer.items.map((item) => card(item, () => neighbours(item))));
  } catch (error) {
    if (own === turn) { by("message").textContent = error.message; by("results").replaceChildren(); by("query").replaceChildren(); }
  }
}

function conditions() {
  const where = [];
  for (const field of by("filters").querySelectorAll("[data-column]")) {
    if (field.value !== "") where.push(`${field.dataset.column}${field.dataset.sign}${field.value}`);
  }
  return where;
}

let again = null; // the latest query, asked anew when a filter changes

function search(describe, parts) {
  again = () => show(describe, () => ask("api/search", { parts, k: 24, where: conditions() }));
  return again();
}

function words(text) {
  return search(() => [make("span", {}, `“${text}”`)], [{ text }]);
}

function neighbours(item) {
  window.scrollTo({ top: 0 });
  const title = item.title || String(item.item_id);
  return search(() => [picture(item.item_id, title), make("span", {}, `Like ${title}`)], [{ item_id: item.item_id }]);
}

function byPicture(file) {
  const describe = () => {
    const image = make("img", { alt: file.name, src: URL.createObjectURL(file) });
    return [make("div", { class: "frame" }, image), make("span", {}, `Like ${file.name}`)];
  };
  again = () => show(describe, () => {
    const form = new FormData();
    form.append("picture", file);
    form.append("k", "24");
    for (const condition of conditions()) form.append("where", condition);
    return ask("api/search/picture", form);
  });
  return again();
}

by("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("words").value.trim();
  if (text) words(text);
});
by("file").addEventListener("change", () => { if (by("file").files[0]) byPicture(by("file").files[0]); by("file").value = ""; });
for (const name of ["dragover", "dragenter"]) document.addEventListener(name, (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (file) byPicture(file);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) byPicture(file);
});

function filterFields(columns) {
  const fields = [];
  for (const [name, { type, values }] of Object.entries(columns)) {
    const changed = () => { if (again) again(); };
    if (values) {
      const select = make("select", { "data-column": name, "data-sign": "=", onchange: changed },
        make("option", { value: "" }, "any"), ...values.map((value) => make("option", { value }, value)));
      fields.push(make("label", {}, name, select));
    } else if (/int|float|double/.test(type) && !/list/.test(type)) {
      const bound = (sign, hint) => make("input", { type: "number", step: "any", placeholder: hint, "aria-label": `${name} ${hint}`, "data-column": name, "data-sign": sign, onchange: changed });
      fields.push(make("label", {}, name, bound(">=", "from"), bound("<=", "to")));
    } else {
      fields.push(make("label", {}, name, make("input", { type: "text", placeholder: "any", "data-column": name, "data-sign": "=", onchange: changed })));
    }
  }
  by("filters").replaceChildren(...fields);
}

// --- ranking

async function rank(userId) {
  by("said").textContent = "…";
  by("reasons").replaceChildren();
  try {
    const names = Object.keys(facts.rankers);
    const among = by("among").value;
    const columns = await Promise.all(names.map(async (name) => [name, await ask("api/rank", { user_id: userId, k: 12, ranker: name, among })]));
    by("said").textContent = `${columns[0][1].history_length} clicks in the log. Of the 200 items nearest to them; “cold” ones were in no training row.`;
    by("rankings").replaceChildren(...columns.reverse().map(([name, answer]) => make("div", {},
      make("h3", {}, name === "baseline" ? `Baseline: ${facts.rankers[name]}` : facts.rankers[name]),
      make("ol", { class: "ranking" }, ...answer.items.map((item) => make("li", {}, card(item, () => explain(userId, item, name),
        item.cold ? make("span", { class: "cold" }, "cold") : null)))))));
  } catch (error) {
    by("said").textContent = error.message;
    by("rankings").replaceChildren();
  }
}

function bar(share, down) {
  const part = make("div", { class: down ? "down" : "up" });
  part.style.width = `${Math.round(100 * share)}%`;
  return make("div", { class: "bar" }, part);
}

async function explain(userId, item, name) {
  try {
    const answer = await ask("api/explain", { user_id: userId, item_id: item.item_id, ranker: name });
    const ordered = answer.history.slice().sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, 10);
    const most = Math.max(1e-9, ...ordered.map((reason) => Math.abs(reason.effect)));
    const rows = ordered.map((reason) => make("li", {},
      picture(reason.item_id, reason.title),
      make("span", { class: "name" }, reason.title || String(reason.item_id)),
      bar(Math.abs(reason.effect) / most, reason.effect < 0),
      make("small", {}, `${reason.effect >= 0 ? "+" : "−"}${Math.abs(reason.effect).toFixed(3)}`
        + (reason.weight === null ? "" : `, attention ${reason.weight.toFixed(3)}`))));
    by("reasons").replaceChildren(
      make("h3", {}, `Why ${item.title || item.item_id} (${answer.score.toFixed(3)}, ${facts.rankers[name]})`),
      make("p", { class: "note" }, "What each clicked item adds to the log-odds of a click: with it, less without it."),
      rows.length ? make("ul", { class: "reasons" }, ...rows) : make("p", {}, "This user has clicked nothing."));
    by("reasons").scrollIntoView({ block: "nearest" });
  } catch (error) {
    by("said").textContent = error.message;
  }
}

let waiting = null;
by("who").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const found = await ask(`api/users?starts=${encodeURIComponent(by("who").value)}`).catch(() => []);
    by("users").replaceChildren(...found.map((id) => make("option", { value: String(id) })));
  }, 150);
});
by("among").addEventListener("change", () => { if (by("who").value) rank(by("who").value); });
by("user").addEventListener("submit", (event) => { event.preventDefault(); if (by("who").value) rank(by("who").value); });

// --- start

let facts = null;
ask("api/facts").then((answer) => {
  facts = answer;
  by("about").textContent = `${facts.items.toLocaleString()} items` + (facts.run ? ` · vectors of ${facts.run}` : "");
  filterFields(facts.columns);
  by("conditions").hidden = !Object.keys(facts.columns).length;
  if (!facts.encoder) { by("words").disabled = true; by("words").placeholder = "No encoder is served: click an item"; by("pick").hidden = true; }
  by("people").hidden = !Object.keys(facts.rankers).length;
  ask("api/users").then((found) => by("users").replaceChildren(...found.map((id) => make("option", { value: String(id) })))).catch(() => {});
  const query = new URLSearchParams(location.search);
  if (query.get("q")) { by("words").value = query.get("q"); words(query.get("q")); }
  else if (query.get("item")) neighbours({ item_id: query.get("item"), title: null });
  else by("results").replaceChildren(...facts.sample.map((item) => card({ ...item, score: 0 }, () => neighbours(item))));
  if (query.get("user") && !by("people").hidden) {
    by("who").value = query.get("user");
    if (query.get("among")) by("among").value = query.get("among");
    rank(query.get("user")).then(() => { if (query.get("why")) by("rankings").querySelector("button")?.click(); });
  }
}).catch((error) => { by("message").textContent = error.message; });
