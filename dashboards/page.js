// Draws the panels that are in sight for what is chosen; one selection, kept in the address, moves all.
"use strict";
window.gradlab = window.gradlab || {};

// Where a page finds its figures' parts that holds them all: in chunks of itself.
gradlab.chunks = function (page) {
  const own = (object, key) => Object.prototype.hasOwnProperty.call(object, key);
  const loaded = new Map();
  function load(id) {
    if (!loaded.has(id)) {
      const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      const entry = { chunk: null };
      entry.ready = new Response(stream).json().then((chunk) => (entry.chunk = chunk));
      loaded.set(id, entry);
    }
    return loaded.get(id);
  }

  // The newest update at or before the chosen one, or the first one if all are later.
  function nearest(updates, wanted) {
    let low = 0;
    let high = updates.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (updates[middle] <= wanted) low = middle;
      else high = middle - 1;
    }
    return updates[low];
  }

  function overlay(target, patch) {
    for (const [name, value] of Object.entries(patch)) {
      if (value === null) delete target[name];
      else target[name] = value;
    }
    return target;
  }

  function whole(chunk, frame) {
    if (frame.whole) return frame.whole;
    const changes = frame.data || [];
    return {
      data: chunk.base.data.map((trace, i) => overlay({ ...trace }, changes[i] || {})),
      layout: overlay({ ...chunk.base.layout }, frame.layout || {}),
    };
  }

  function pick(part, first, chunk, chosen) {
    const values = { ...chosen };
    if (part.symmetric && Number(values.agent) > Number(values.other)) {
      [values.agent, values.other] = [values.other, values.agent];
    }
    const updates = chunk.updates || page.stops.map((stop) => stop.update);
    let update = null;
    if (part.depends.includes("update")) {
      if (updates.length) update = nearest(updates, Number(chosen.update));
      values.update = String(update || 0);
    }
    const key = part.depends.filter((name) => name !== "run").map((name) => values[name]).join("\u001f");
    const place = own(chunk.at, key) ? chunk.at[key] : -1;
    const frame = place < 0 ? null : chunk.frames[place];
    return {
      key: place,
      update: chunk.updates ? update : null,
      figure: () => (first && frame ? whole(chunk, frame) : frame),
    };
  }

  return {
    live: false,
    parts(panel, chosen) {
      const entries = panel.chunks.map((places) => load(own(places, chosen.run) ? places[chosen.run] : places[""]));
      const waiting = entries.filter((entry) => !entry.chunk).map((entry) => entry.ready);
      if (waiting.length) return Promise.all(waiting);
      return panel.parts.map((part, i) => pick(part, i === 0, entries[i].chunk, chosen));
    },
  };
};

// Show a page; `source.parts(panel, chosen)` gives for each part of a panel its figure, the update
// that it shows (null: none in particular) and a key that differs where the figure does; or, if they
// are not there yet, a promise to wait for before asking again. Where Plotly is not there yet either,
// `source.drawing()` is a promise of it.
gradlab.show = function (page, source) {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const slider = byId("update");
  const output = byId("update-text");
  const play = byId("play");
  const selects = Object.keys(page.words).filter((name) => byId(name) && byId(name).tagName === "SELECT");
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d", "toImage"],
  };
  const own = (object, key) => Object.prototype.hasOwnProperty.call(object, key);
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const options = (run) => page.options[own(page.options, run) ? run : page.defaults.run];

  // ---- what is chosen ----
  let chosen = { ...page.defaults };
  let follow = source.live; // whether the newest update is shown, whichever that is
  let theme = null; // null: as the system

  function allowed(name, value, run) {
    if (name === "update") return /^[0-9]{1,11}$/.test(value);
    const known = page.common[name] || options(run)[name];
    return Array.isArray(known) && known.includes(value);
  }

  function readAddress() {
    const query = new URLSearchParams(location.hash.slice(1));
    const next = { ...page.defaults };
    if (allowed("run", query.get("run"))) next.run = query.get("run");
    for (const [name, value] of query) {
      if (own(next, name) && allowed(name, value, next.run)) next[name] = value;
    }
    theme = ["light", "dark"].includes(query.get("theme")) ? query.get("theme") : null;
    follow = source.live && !query.has("update");
    chosen = fitted(next);
  }

  const newest = () => String(page.stops.length ? page.stops[page.stops.length - 1].update : 0);

  // Another run may lack the layer or the agents that were chosen.
  function fitted(next) {
    for (const [name, known] of Object.entries(options(next.run))) {
      if (!known.includes(next[name])) next[name] = known.includes(page.defaults[name]) ? page.defaults[name] : known[0];
    }
    return next;
  }

  let address = null;
  function writeAddress() {
    clearTimeout(address);
    // Browsers limit how often an address may change.
    address = setTimeout(() => {
      const query = new URLSearchParams(Object.entries(chosen).filter(([, value]) => value !== ""));
      if (theme) query.set("theme", theme);
      if (follow) query.delete("update");
      try {
        history.replaceState(null, "", `#${query}`);
      } catch {
        location.replace(`#${query}`);
      }
    }, 150);
  }

  function choose(changes) {
    if (changes.update !== undefined) follow = source.live && changes.update === newest();
    chosen = fitted({ ...chosen, ...changes });
    showControls();
    writeAddress();
    schedule();
  }

  // ---- the control bar ----
  function fill(select, name) {
    const known = options(chosen.run)[name] || page.common[name];
    const text = JSON.stringify([known, (page.labels[chosen.run] || {})[name]]);
    if (select.dataset.known !== text) {
      select.dataset.known = text;
      select.replaceChildren(
        ...known.map((value) => {
          const option = document.createElement("option");
          option.value = value;
          const labels = (page.labels[chosen.run] || {})[name] || page.words[name] || {};
          option.textContent = own(labels, value) ? labels[value] : value;
          return option;
        })
      );
    }
    select.value = chosen[name];
  }

  function stopAt(update) {
    let found = 0;
    page.stops.forEach((stop, i) => {
      if (stop.update <= update) found = i;
    });
    return found;
  }

  function showControls() {
    for (const name of selects) fill(byId(name), name);
    const controls = page.tabs.find((tab) => tab.name === chosen.tab).controls;
    for (const element of document.querySelectorAll("[data-choice]")) {
      const name = element.dataset.choice;
      const known = options(chosen.run)[name] || page.common[name] || [];
      const few = name === "update" ? !page.stops.length : known.length < 2;
      element.hidden = !controls.includes(name) || few;
    }
    if (page.stops.length) {
      const place = stopAt(Number(chosen.update));
      slider.max = page.stops.length - 1;
      if (document.activeElement !== slider || Number(slider.value) !== place) slider.value = place;
      output.textContent = page.stops[place].label;
      slider.setAttribute("aria-valuetext", output.textContent);
    }
    byId("follow").hidden = !source.live;
    byId("follow").setAttribute("aria-pressed", String(follow));
    for (const tab of page.tabs) {
      const button = byId(`tab-${tab.name}`);
      const open = tab.name === chosen.tab;
      button.setAttribute("aria-selected", String(open));
      button.tabIndex = open ? 0 : -1;
      byId(`tabpanel-${tab.name}`).hidden = !open;
    }
  }

  // ---- figures ----
  function compose(figures) {
    if (!figures[0]) return null;
    // Plotly takes an array for unchanged if it is the same one, so what does not differ is shared.
    const data = figures[0].data.map((trace) => ({ ...trace }));
    const layout = { ...figures[0].layout };
    if (layout.meta && layout.meta.empty) return { data, layout: cloned(layout) };
    for (const frame of figures.slice(1)) {
      if (!frame) continue;
      (frame.data || []).slice(0, data.length).forEach((patch, i) => Object.assign(data[i], patch));
      for (const [name, value] of Object.entries(frame.layout || {})) {
        if (name === "shapes" || name === "annotations") layout[name] = [...(layout[name] || []), ...value];
        else if (isObject(value) && isObject(layout[name])) layout[name] = { ...layout[name], ...value };
        else layout[name] = value;
      }
    }
    return { data, layout: cloned(layout) };
  }

  // Plotly writes into a layout, and takes these lists for changed if they are not the same ones.
  const SAME = ["tickvals", "ticktext", "categoryarray"];
  function cloned(value, name) {
    if (value === null || typeof value !== "object" || SAME.includes(name)) return value;
    if (Array.isArray(value)) return value.map((entry) => cloned(entry));
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, cloned(entry, key)]));
  }

  // ---- drawing ----
  const system = matchMedia("(prefers-color-scheme: dark)");
  const themed = () => theme || (system.matches ? "dark" : "light");
  const seen = new Set();

  function words(panel, figure, update) {
    const said = [];
    const late = update !== null && page.stops.length && update !== page.stops[stopAt(Number(chosen.update))].update;
    if (update !== null) said.push(late ? `shows update ${update}: none recorded at ${chosen.update}` : `update ${update}`);
    const meta = figure.layout.meta || {};
    if (meta.note) said.push(meta.note);
    const badge = byId(`${panel.id}-badge`);
    badge.textContent = meta.empty ? "" : said.join(" · ");
    badge.classList.toggle("late", Boolean(late));
    byId(panel.id).setAttribute("aria-label", `${panel.title}. ${meta.alt || ""}`);
  }

  function figureOf(panel) {
    const parts = source.parts(panel, chosen);
    if (parts instanceof Promise) return parts;
    const dated = parts.find((one) => one.update !== null);
    return {
      key: JSON.stringify([themed(), chosen.run, parts.map((one) => one.key)]),
      update: dated ? dated.update : null,
      compose: () => compose(parts.map((one) => one.figure())),
    };
  }

  function drawPanel(panel) {
    const found = figureOf(panel);
    if (found instanceof Promise) return found.then(() => drawPanel(panel));
    if (!window.Plotly) return source.drawing().then(() => drawPanel(panel));
    const state = JSON.stringify([found.key, chosen.update]);
    if (panel.state === state) return Promise.resolve();
    panel.state = state;
    if (panel.key !== found.key) {
      panel.key = found.key;
      panel.figure = found.compose();
      if (!panel.figure) return Promise.resolve();
      // Ours alone: Plotly would draw all anew when it changes.
      const { meta, ...layout } = panel.figure.layout;
      Object.assign(layout, { template: page.themes[themed()], uirevision: `${chosen.run}` });
      return Promise.resolve(Plotly.react(panel.id, panel.figure.data, layout, config)).then(() => {
        words(panel, panel.figure, found.update);
        listen(panel);
      });
    }
    if (panel.figure) words(panel, panel.figure, found.update);
    return Promise.resolve();
  }

  function listen(panel) {
    const element = byId(panel.id);
    if (panel.listening) return;
    panel.listening = true;
    element.on("plotly_click", (event) => {
      const click = (panel.figure.layout.meta || {}).click;
      if (!click || !event.points.length) return;
      const point = event.points[0];
      const changes = {};
      for (const [attribute, names] of Object.entries(click)) {
        const values = [].concat(point[attribute]);
        [].concat(names).forEach((name, i) => {
          if (values[i] !== undefined && values[i] !== null && allowed(name, String(values[i]), chosen.run)) {
            changes[name] = String(values[i]);
          }
        });
      }
      if (changes.agent !== undefined && changes.agent === (changes.other || chosen.other)) {
        // An agent has no pair with itself: its partner stays, or becomes the agent chosen before.
        changes.other = chosen.other !== changes.agent ? chosen.other : chosen.agent;
      }
      choose(changes);
    });
  }

  function inSight(everything = false) {
    const open = page.tabs.find((tab) => tab.name === chosen.tab).panels;
    return page.panels.filter((panel) => open.includes(panel.id) && (everything || seen.has(panel.id)));
  }

  let waiting = false;
  function schedule() {
    // What has to be fetched is under way before the next frame begins.
    inSight().forEach((panel) => source.parts(panel, chosen));
    if (waiting) return;
    waiting = true;
    root.dataset.drawn = "no";
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  function draw(everything = false) {
    return Promise.all(inSight(everything).map(drawPanel)).then(() => {
      if (!waiting) root.dataset.drawn = "yes";
      root.dataset.ready = "yes";
    });
  }

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) seen.add(entry.target.id);
      else seen.delete(entry.target.id);
    }
    schedule();
  });

  // ---- taking figures away ----
  function cell(value) {
    if (value === null || value === undefined) return "";
    const text = String(value);
    // A spreadsheet would take such a text for a formula.
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) && !Number.isFinite(Number(text)) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  }
  const plain = (text) => {
    const area = document.createElement("textarea");
    area.innerHTML = String(text).replace(/<br>/g, " ");
    return area.value;
  };
  function rows(figure) {
    const table = [["trace", "x", "y", "z"]];
    figure.data.forEach((trace, number) => {
      const name = plain(trace.name || trace.type || number);
      if (trace.hoverinfo === "skip") return;
      if (trace.type === "heatmap") {
        trace.z.forEach((row, i) => row.forEach((z, j) => table.push([name, (trace.x || [])[j], (trace.y || [])[i], z])));
        return;
      }
      const x = trace.x || [];
      const y = trace.y || [];
      for (let i = 0; i < Math.max(x.length, y.length); i += 1) table.push([name, x[i], y[i], (trace.z || [])[i]]);
    });
    return table.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }
  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  function exportPanel(panel, format) {
    if (!panel.figure) return;
    const name = `gradlab-${panel.name}`;
    if (format === "csv") {
      save(`${name}.csv`, rows(panel.figure));
      return;
    }
    const size = byId(panel.id).getBoundingClientRect();
    const layout = { ...panel.figure.layout, template: page.themes.light };
    // For paper, whatever the screen shows.
    Plotly.downloadImage({ data: panel.figure.data, layout }, { format, width: Math.round(size.width), height: Math.round(size.height), scale: format === "png" ? 2 : 1, filename: name });
  }

  // ---- events ----
  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function slide(place) {
    slider.value = place;
    choose({ update: String(page.stops[Number(slider.value)].update) });
  }
  play.addEventListener("click", () => {
    if (timer !== null) {
      stop();
      return;
    }
    if (slider.value === slider.max) slide(0);
    play.textContent = "Stop";
    timer = setInterval(() => {
      if (slider.value === slider.max) stop();
      else slide(Number(slider.value) + 1);
    }, 500);
  });
  byId("follow").addEventListener("click", () => {
    stop();
    choose({ update: newest() });
  });
  slider.addEventListener("input", () => {
    stop();
    slide(slider.value);
  });
  for (const name of selects) byId(name).addEventListener("change", () => choose({ [name]: byId(name).value }));
  document.querySelector(".tabs").addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) choose({ tab: tab.dataset.tab });
  });
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const names = page.tabs.map((tab) => tab.name);
    const next = names[(names.indexOf(chosen.tab) + step + names.length) % names.length];
    choose({ tab: next });
    byId(`tab-${next}`).focus();
    event.preventDefault();
  });
  document.querySelector("main").addEventListener("click", (event) => {
    const button = event.target.closest("[data-export]");
    if (!button) return;
    const panel = page.panels.find((one) => one.id === button.dataset.panel);
    exportPanel(panel, button.dataset.export);
  });
  function showTheme() {
    root.dataset.theme = themed();
    byId("theme").textContent = themed() === "dark" ? "Light" : "Dark";
  }
  byId("theme").addEventListener("click", () => {
    theme = themed() === "dark" ? "light" : "dark";
    showTheme();
    writeAddress();
    schedule();
  });
  system.addEventListener("change", () => {
    showTheme();
    schedule();
  });
  byId("copy").addEventListener("click", () => {
    setTimeout(() => {
      const said = navigator.clipboard ? navigator.clipboard.writeText(location.href) : Promise.reject(new Error("no clipboard"));
      said.then(
        () => (byId("copy").textContent = "Copied"),
        () => (byId("copy").textContent = "See the address bar")
      );
      setTimeout(() => (byId("copy").textContent = "Copy link"), 2000);
    }, 200);
  });
  addEventListener("hashchange", () => {
    readAddress();
    showTheme();
    showControls();
    schedule();
  });
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    draw(true);
  });
  addEventListener("afterprint", showTheme);

  readAddress();
  showTheme();
  showControls();
  document.querySelectorAll(".plot").forEach((plot) => observer.observe(plot));

  return {
    // Go on with what is newly recorded; the panels must be the same.
    renew(next) {
      next.panels.forEach((panel, i) => Object.assign(page.panels[i], panel));
      page = { ...next, panels: page.panels };
      chosen = fitted({ ...chosen, ...(follow ? { update: newest() } : {}) });
      showControls();
      schedule();
    },
  };
};

if (document.getElementById("page-data")) {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  gradlab.show(page, gradlab.chunks(page));
}
