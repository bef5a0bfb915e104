// The served pages: what Dash's callbacks bring is shown here, and what is to be drawn is asked for.
"use strict";
(function () {
  const byId = (id) => document.getElementById(id);
  const host = () => byId("page");
  // Milliseconds between an answer and the next question, unless the server says how many; until a
  // server that said nothing is missed; and until it is asked again.
  const PAUSE = 1000;
  const SILENCE = 6000;
  const AGAIN = 8000;

  // Plotly's script takes longer to run than all else together: words come first, and the list of
  // runs does without.
  const address = document.querySelector("meta[name=plotly]").content;
  if (new URLSearchParams(location.search).has("runs")) {
    document.head.append(element("link", { rel: "preload", as: "script", href: address }));
  }
  let loading = null;
  function plotly() {
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    const load = (resolve, reject) => {
      const script = element("script", { src: address });
      script.addEventListener("load", resolve);
      script.addEventListener("error", reject);
      document.head.append(script);
    };
    loading = loading || frame().then(frame).then(() => new Promise(load));
    return loading;
  }

  // ---- a view of runs ----
  let page = null; // what the server said last
  let shown = null; // what `gradlab.show` gave
  let source = null;

  // Figures' parts from the server: asked for when they are missing, kept until a run changes.
  function remote() {
    const kept = new Map(); // key -> {id, update, figure}
    const latest = new Map(); // part -> the entry that came last, to tell what has changed
    const wanted = new Map(); // part -> {panel, number, promise, resolve}
    let flying = null; // one question at a time: what was passed over meanwhile is not asked for
    let entries = 0;
    let age = 0; // how often a run has changed
    let chosen = null;

    const place = (panel, number) => `${panel.name}\u001f${number}`;
    const keyOf = (panel, number) =>
      JSON.stringify([panel.name, number, panel.parts[number].depends.map((name) => chosen[name])]);

    function want(panel, number) {
      const at = place(panel, number);
      if (flying && flying.has(at)) return flying.get(at).promise;
      if (!wanted.has(at)) {
        const entry = { panel, number };
        entry.promise = new Promise((resolve) => (entry.resolve = resolve));
        wanted.set(at, entry);
      }
      return wanted.get(at).promise;
    }

    async function ask() {
      if (flying || !wanted.size) return;
      flying = new Map(wanted);
      wanted.clear();
      for (const entry of flying.values()) entry.key = keyOf(entry.panel, entry.number);
      const query = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value !== "")).toString();
      const parts = [...flying.values()].map((entry) => [entry.panel.name, entry.number]);
      const asked = age;
      const texts = await answer(JSON.stringify({ search: location.search, query, parts }));
      if (asked === age) keep([...flying], texts);
      const done = flying;
      flying = null;
      for (const entry of done.values()) entry.resolve();
      ask();
    }

    // Asks until there is an answer: the page says when the server is silent.
    async function answer(body) {
      for (;;) {
        try {
          const said = await fetch("/figures", { method: "POST", headers: { "Content-Type": "application/json" }, body });
          if (said.ok) return (await said.text()).split("\n");
        } catch {
          // out of reach
        }
        await new Promise((resolve) => setTimeout(resolve, PAUSE));
      }
    }

    function keep(asked, texts) {
      asked.forEach(([at, entry], i) => {
        const text = texts[i];
        const before = latest.get(at);
        if (!before || before.text !== text) {
          const parsed = JSON.parse(text);
          entries += 1;
          if (parsed && before) share(parsed.figure, before.figure());
          latest.set(at, {
            text,
            key: entries,
            update: parsed ? parsed.update : null,
            figure: () => (parsed ? parsed.figure : null),
          });
        }
        kept.set(entry.key, latest.get(at));
      });
    }

    return {
      live: true,
      parts(panel, now) {
        chosen = now;
        const keys = panel.parts.map((_, number) => keyOf(panel, number));
        const missing = keys.map((key, number) => (kept.has(key) ? null : want(panel, number)));
        if (missing.some(Boolean)) {
          queueMicrotask(ask);
          return Promise.all(missing);
        }
        return keys.map((key) => kept.get(key));
      },
      forget() {
        kept.clear();
        age += 1;
      },
      drawing: plotly,
    };
  }

  function same(one, other) {
    if (one === other) return true;
    if (typeof one !== "object" || typeof other !== "object" || !one || !other) return false;
    const keys = Object.keys(one);
    return keys.length === Object.keys(other).length && keys.every((key) => same(one[key], other[key]));
  }

  // What has not changed is the same object again, by which plotly tells that it has not.
  function share(figure, before) {
    if (!before) return;
    const pairs = (figure.data || []).map((trace, i) => [trace, (before.data || [])[i]]);
    for (const [now, old] of [...pairs, [figure.layout || {}, before.layout]]) {
      for (const name of Object.keys(now)) if (old && same(now[name], old[name])) now[name] = old[name];
    }
  }

  function title() {
    const names = Object.keys(page.options);
    return `gradlab: ${names.slice(0, 3).join(", ")}${names.length > 3 ? ", …" : ""}`;
  }

  // Words that change while a training goes on; the panels stay where they are.
  function renewWords(html) {
    const next = new DOMParser().parseFromString(html, "text/html");
    const plots = (root) => [...root.querySelectorAll(".plot")].map((plot) => plot.id).join();
    if (plots(next) !== plots(host())) return false;
    const pieces = [".runs tbody", ".runs summary", "#problems", ".panel h3", ".panel .reading", ".panel figcaption", "section > .note"];
    for (const piece of pieces) {
      const [old, fresh] = [host(), next].map((root) => root.querySelectorAll(piece));
      if (old.length !== fresh.length) return false;
      old.forEach((element, i) => {
        if (element.innerHTML !== fresh[i].innerHTML) element.innerHTML = fresh[i].innerHTML;
      });
    }
    return true;
  }

  function view(content) {
    const { html, page: next } = JSON.parse(content.view);
    page = next;
    if (!shown) {
      host().innerHTML = html;
      source = remote();
      shown = window.gradlab.show(page, source);
      document.title = title();
      return;
    }
    if (!renewWords(html)) {
      // Other panels, as when the first diagnosis is recorded: the address brings the view back.
      location.reload();
      return;
    }
    source.forget();
    shown.renew(next);
  }

  // ---- the list of runs ----
  const COLUMNS = [
    ["name", "run", "text"],
    ["method", "method", "text"],
    ["environment", "environment", "text"],
    ["agents", "agents", "number"],
    ["seed", "seed", "number"],
    ["frames", "frames", "number"],
    ["return", "last return", "number"],
    ["evaluation", "evaluation return", "number"],
    ["state", "state", "text"],
    ["changed", "last change", "time"],
  ];
  const list = { rows: [], chosen: new Set(), sort: "name", down: false, filter: "" };

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children); // strings become text, whatever they hold
    return made;
  }

  function shownValue(value, kind) {
    if (value === null || value === undefined) return kind === "text" ? "" : "–";
    if (kind === "time") return new Date(value * 1000).toLocaleString("sv-SE");
    if (kind === "number") return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
    return value;
  }

  function listQuery() {
    const query = new URLSearchParams(location.hash.slice(1));
    list.filter = query.get("filter") || "";
    const sort = query.get("sort") || "name";
    list.down = sort.startsWith("-");
    const column = COLUMNS.find(([name]) => name === sort.replace("-", ""));
    list.sort = column ? column[0] : "name";
  }

  function keepListQuery() {
    const query = new URLSearchParams();
    if (list.filter) query.set("filter", list.filter);
    if (list.sort !== "name" || list.down) query.set("sort", `${list.down ? "-" : ""}${list.sort}`);
    history.replaceState(null, "", `#${query}`);
  }

  function viewOf(names) {
    return `/?${new URLSearchParams(names.map((name) => ["runs", name]))}`;
  }

  function kept() {
    const words = list.filter.toLowerCase().split(/\s+/).filter(Boolean);
    const found = list.rows.filter((row) => {
      const text = [row.name, row.method, row.environment, row.state, row.problem].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const at = (row) => row[list.sort];
    const known = (row) => at(row) !== null && at(row) !== undefined;
    return found.sort((a, b) => {
      if (known(a) !== known(b)) return known(a) ? -1 : 1;
      const order = !known(a) ? 0 : typeof at(a) === "number" ? at(a) - at(b) : String(at(a)).localeCompare(String(at(b)), "en", { numeric: true });
      return (list.down ? -order : order) || a.name.localeCompare(b.name, "en", { numeric: true });
    });
  }

  // A run keeps its line, so that a click or the focus is not lost when a number in it changes.
  const lines = new Map();
  function lineOf(row) {
    if (!lines.has(row.name)) {
      const box = element("input", { type: "checkbox", "aria-label": `Choose ${row.name}` });
      box.addEventListener("change", () => {
        list.chosen[box.checked ? "add" : "delete"](row.name);
        showChosen();
      });
      const cells = COLUMNS.map(([, , kind]) => element("td", kind === "text" ? {} : { class: "number" }));
      const line = element("tr", {}, element("td", {}, box), ...cells);
      lines.set(row.name, { line, box, cells, said: "" });
    }
    const kept = lines.get(row.name);
    kept.box.checked = list.chosen.has(row.name);
    if (kept.said !== JSON.stringify(row)) {
      kept.said = JSON.stringify(row);
      const readable = row.state !== "unreadable";
      kept.box.disabled = !readable;
      kept.line.className = readable && !row.problem ? "" : "damaged";
      COLUMNS.forEach(([name, , kind], i) => fill(kept.cells[i], row, name, kind, readable));
    }
    return kept.line;
  }

  function fill(cell, row, name, kind, readable) {
    const text = shownValue(row[name], kind);
    if (name === "state") {
      const parts = [element("span", { class: `state ${row.state}` }, text)];
      if (row.problem) parts.push(element("div", { class: "problem" }, row.problem));
      cell.replaceChildren(...parts);
    } else if (name !== "name") cell.textContent = text;
    else if (readable !== Boolean(cell.querySelector("a")) || !cell.firstChild) {
      cell.replaceChildren(readable ? element("a", { href: viewOf([row.name]) }, text) : text);
    }
  }

  function showChosen() {
    const names = list.rows.filter((row) => list.chosen.has(row.name)).map((row) => row.name);
    const link = byId("compare");
    link.textContent = names.length ? `Show ${names.length} chosen` : "Choose runs to show side by side";
    if (names.length) link.setAttribute("href", viewOf(names));
    else link.removeAttribute("href");
  }

  function showRows() {
    const rows = kept();
    const now = rows.map(lineOf);
    const before = [...byId("rows").children];
    if (now.length !== before.length || now.some((line, i) => line !== before[i])) byId("rows").replaceChildren(...now);
    const running = list.rows.filter((row) => row.state === "running").length;
    byId("count").textContent = `${rows.length} of ${list.rows.length} runs${running ? `, ${running} running` : ""}`;
    for (const head of host().querySelectorAll("th[data-column]")) {
      const sorted = head.dataset.column === list.sort;
      head.setAttribute("aria-sort", sorted ? (list.down ? "descending" : "ascending") : "none");
    }
    showChosen();
  }

  function makeList() {
    listQuery();
    document.title = "gradlab: runs";
    const filter = element("input", { type: "search", id: "filter", placeholder: "Filter, e.g. hypermarl running", "aria-label": "Filter the runs" });
    filter.value = list.filter;
    filter.addEventListener("input", () => {
      list.filter = filter.value;
      keepListQuery();
      showRows();
    });
    const heads = COLUMNS.map(([name, words, kind]) => {
      const button = element("button", { type: "button" }, words);
      button.addEventListener("click", () => {
        list.down = list.sort === name ? !list.down : kind !== "text";
        list.sort = name;
        keepListQuery();
        showRows();
      });
      return element("th", { scope: "col", "data-column": name, ...(kind === "text" ? {} : { class: "number" }) }, button);
    });
    const all = element("input", { type: "checkbox", "aria-label": "Choose all that are listed" });
    all.addEventListener("change", () => {
      for (const row of kept()) if (row.state !== "unreadable") list.chosen[all.checked ? "add" : "delete"](row.name);
      showRows();
    });
    const table = element(
      "table",
      { id: "runs" },
      element("thead", {}, element("tr", {}, element("th", { scope: "col" }, all), ...heads)),
      element("tbody", { id: "rows" })
    );
    const brand = element("span", { class: "brand" }, "gradlab");
    const bar = element("div", { class: "listbar" }, filter, element("span", { id: "count", role: "status" }), element("a", { id: "compare", class: "button" }));
    host().replaceChildren(element("header", { class: "top" }, element("h1", {}, "Runs ", brand), bar, element("div", { class: "scroll" }, table)));
  }

  function runs(content) {
    list.rows = content.rows;
    if (!byId("runs")) makeList();
    showRows();
    document.documentElement.dataset.ready = "yes";
  }

  function failed(content) {
    // What of a view is shown can't be taken down piece by piece.
    if (shown) location.reload();
    document.title = "gradlab";
    const back = element("a", { href: "/" }, "All runs");
    host().replaceChildren(element("header", { class: "top" }, element("p", { class: "failed", role: "alert" }, content.error), back));
    document.documentElement.dataset.ready = "yes";
  }

  // ---- what the server says ----
  // This script comes first, for Dash to find what it calls; those that draw come after the page.
  const loaded = new Promise((resolve) => addEventListener("DOMContentLoaded", resolve));
  let heard = null;
  function show(content) {
    if (content.error) failed(content);
    else if (content.rows) runs(content);
    else view(content);
  }

  let pause = PAUSE;
  let asked = Date.now();
  function ask() {
    asked = Date.now();
    window.dash_clientside.set_props("clock", { data: asked });
  }

  function missed() {
    if (heard === null || asked <= heard) return;
    if (Date.now() - heard > SILENCE + pause) byId("silent").hidden = false;
    if (Date.now() - asked > AGAIN) ask();
  }

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.gradlab = {
    content(said) {
      if (!said) return window.dash_clientside.no_update;
      heard = Date.now();
      byId("silent").hidden = true;
      pause = said.pause;
      setTimeout(ask, pause);
      if (said.content) loaded.then(() => show(said.content));
      return said.stamp;
    },
  };
  setInterval(missed, 1000);
  // Until a view shows itself as its address says.
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
})();
