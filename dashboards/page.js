// Lays the frames that fit the control bar's choices over each panel's figure.
"use strict";
(function () {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const slider = document.getElementById("update");
  const output = document.getElementById("update-text");
  const play = document.getElementById("play");
  const selects = { network: document.getElementById("network"), layer: document.getElementById("layer") };
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
  };
  const own = (object, key) => Object.prototype.hasOwnProperty.call(object, key);
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

  function choices() {
    const at = page.slider[Number(slider.value)];
    return { network: selects.network.value, layer: selects.layer.value, update: at ? at.update : null };
  }

  // The newest update at or before the slider's, or the first one if all are later.
  function nearest(updates, wanted) {
    let found = updates[0];
    for (const update of updates) {
      if (update <= wanted) found = update;
    }
    return found;
  }

  function keyOf(part, chosen) {
    return part.depends
      .map((name) => (name === "update" && part.updates.length ? nearest(part.updates, chosen.update) : chosen[name]))
      .join("|");
  }

  function compose(panel, frames) {
    const data = structuredClone(panel.data);
    const layout = structuredClone(panel.layout);
    for (const frame of frames) {
      (frame.data || []).forEach((patch, i) => Object.assign(data[i], structuredClone(patch)));
      for (const [name, value] of Object.entries(frame.layout || {})) {
        const merge = isObject(value) && isObject(layout[name]);
        layout[name] = merge ? { ...layout[name], ...structuredClone(value) } : structuredClone(value);
      }
    }
    return [data, layout];
  }

  function badge(panel, frames, chosen) {
    const words = [];
    const dated = panel.parts.find((part) => part.depends.includes("update") && !part.cursor);
    let late = false;
    if (dated && dated.updates.length) {
      const update = nearest(dated.updates, chosen.update);
      late = update !== chosen.update;
      words.push(late ? `shows update ${update}: none recorded at ${chosen.update}` : `update ${update}`);
    }
    for (const frame of frames) if (frame.note) words.push(frame.note);
    const element = document.getElementById(`${panel.id}-badge`);
    element.textContent = words.join(" · ");
    element.classList.toggle("late", late);
  }

  function draw() {
    const chosen = choices();
    for (const panel of page.panels) {
      const keys = panel.parts.map((part) => keyOf(part, chosen));
      const state = JSON.stringify([keys, chosen.update]);
      if (panel.state === state) continue;
      const frames = panel.parts.map((part, i) => (own(part.frames, keys[i]) ? part.frames[keys[i]] : part.absent));
      badge(panel, frames, chosen);
      const drawn = JSON.stringify(keys);
      if (panel.drawn !== drawn) {
        const [data, layout] = compose(panel, frames);
        Plotly.react(panel.id, data, layout, config);
      }
      panel.drawn = drawn;
      panel.state = state;
    }
    const at = page.slider[Number(slider.value)];
    output.textContent = at ? at.label : "";
    slider.setAttribute("aria-valuetext", output.textContent);
  }

  let waiting = false;
  function schedule() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function toggle() {
    if (timer !== null) {
      stop();
      return;
    }
    if (slider.value === slider.max) slider.value = 0;
    play.textContent = "Stop";
    timer = setInterval(() => {
      if (slider.value === slider.max) stop();
      else slider.value = Number(slider.value) + 1;
      schedule();
    }, 500);
    schedule();
  }

  slider.addEventListener("input", () => {
    stop();
    schedule();
  });
  for (const select of Object.values(selects)) select.addEventListener("change", schedule);
  play.addEventListener("click", toggle);
  window.addEventListener("beforeprint", () => page.panels.forEach((panel) => Plotly.Plots.resize(panel.id)));
  // A reload would otherwise bring back the choices of the last visit, but not the drawing.
  slider.value = slider.max;
  draw();
  document.documentElement.dataset.ready = "yes";
})();
