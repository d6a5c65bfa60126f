"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const views = {};
  const state = { shown: "", lo: 0, hi: data.cycles };

  // -- charts ------------------------------------------------------------------------------------

  function rows(table) {
    return table.rows.map((row) =>
      Object.fromEntries(table.columns.map((name, place) => [name, row[place]])),
    );
  }

  function ink(printing) {
    const dark = !printing && matchMedia("(prefers-color-scheme: dark)").matches;
    return dark ? { ink: "#e6edf3", grid: "#39424d" } : { ink: "#1f2328", grid: "#d0d7de" };
  }

  // Set the signals that a chart has; gives a promise of its drawing.
  function set(view, signals) {
    const known = view.getState().signals;
    for (const [name, value] of Object.entries(signals)) {
      if (name in known) view.signal(name, value);
    }
    return view.runAsync();
  }

  const setAll = (signals) =>
    Promise.all(Object.values(views).map((view) => set(view, signals)));

  async function draw(name, chart) {
    const spec = { ...chart.spec };
    spec.data = spec.data.map((source) =>
      source.name in data.tables ? { ...source, values: rows(data.tables[source.name]) } : source);
    const { view } = await vegaEmbed(`#chart-${name}`, spec, {
      mode: "vega",
      logLevel: 1, // errors: an empty chart is nothing to warn of
      renderer: chart.renderer,
      actions: false,
      ast: true, // expressions are interpreted: the page's policy allows no eval
      defaultStyle: false,
      tooltip: { disableDefaultStyle: true },
    });
    views[name] = view;
    await set(view, { ...ink(false), ...state });
  }

  // -- the filter of layers ----------------------------------------------------------------------

  function filter(text) {
    state.shown = text.trim().toLowerCase();
    const fits = (element) => element.dataset.layer.toLowerCase().includes(state.shown);
    for (const element of document.querySelectorAll("tbody tr[data-layer], .maps [data-layer]")) {
      element.hidden = !fits(element);
    }
    for (const element of document.querySelectorAll(".network [data-layer]")) {
      element.classList.toggle("dimmed", !fits(element)); // rows keep their place beside the edges
    }
    const all = [...document.querySelectorAll("#time-table tbody tr")];
    const left = all.filter((row) => !row.hidden).length;
    byId("filter-status").textContent =
      left === all.length ? `all ${left}` : `${left} of ${all.length}`;
    return setAll({ shown: state.shown });
  }

  // -- the window of time ------------------------------------------------------------------------

  const overTime = () => Object.values(views).filter((view) => "hi" in view.getState().signals);

  function show(lo, hi) {
    const width = Math.min(Math.max(hi - lo, 20), data.cycles);
    const start = Math.min(Math.max(lo, 0), data.cycles - width);
    state.lo = start;
    state.hi = start + width;
    const text = (value) => Math.round(value).toLocaleString("en");
    byId("zoom-status").textContent =
      `cycles ${text(state.lo)} to ${text(state.hi)} of ${text(data.cycles)}`;
    return Promise.all(overTime().map((view) => set(view, { lo: state.lo, hi: state.hi })));
  }

  // Zoom by a factor around a place, 0 at the left edge and 1 at the right.
  function zoom(factor, place = 0.5) {
    const width = (state.hi - state.lo) * factor;
    const at = state.lo + (state.hi - state.lo) * place;
    return show(at - width * place, at + width * (1 - place));
  }

  const move = (share) => {
    const by = (state.hi - state.lo) * share;
    return show(state.lo + by, state.hi + by);
  };

  const actions = {
    in: () => zoom(0.5),
    out: () => zoom(2),
    left: () => move(-0.25),
    right: () => move(0.25),
    all: () => show(0, data.cycles),
  };
  const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" };

  function pannable(element) {
    const name = element.querySelector(".chart").id.replace("chart-", "");
    const place = (x) => {
      const view = views[name];
      const left = element.getBoundingClientRect().left + view.origin()[0];
      return Math.min(Math.max((x - left) / view.width(), 0), 1);
    };
    const fingers = new Map();
    element.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
      event.preventDefault();
      actions[keys[event.key]]();
    });
    element.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the wheel alone moves the page
      event.preventDefault();
      zoom(Math.exp(Math.sign(event.deltaY) * 0.25), place(event.clientX));
    }, { passive: false });
    element.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event.clientX);
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return;
      const before = [...fingers.values()];
      fingers.set(event.pointerId, event.clientX);
      const now = [...fingers.values()];
      if (now.length === 1) {
        move((before[0] - now[0]) / views[name].width());
      } else {
        const spread = (xs) => Math.max(Math.abs(xs[0] - xs[1]), 10);
        zoom(spread(before) / spread(now), place((now[0] + now[1]) / 2));
      }
    });
    for (const end of ["pointerup", "pointercancel"]) {
      element.addEventListener(end, (event) => fingers.delete(event.pointerId));
    }
  }

  // -- start -------------------------------------------------------------------------------------

  byId("filter").addEventListener("input", (event) => filter(event.target.value));
  byId("filter").form.addEventListener("submit", (event) => event.preventDefault());
  byId("metric")?.addEventListener("change", (event) =>
    set(views.comparison, { metric: event.target.value }));
  for (const box of document.querySelectorAll("[data-shares]")) {
    box.addEventListener("change", () => set(views[box.dataset.shares], { shares: box.checked }));
  }
  for (const key of document.querySelectorAll("[data-alone]")) {
    const buttons = [...key.querySelectorAll("button")];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        const alone = button.getAttribute("aria-pressed") !== "true";
        for (const one of buttons) one.setAttribute("aria-pressed", alone && one === button);
        set(views[key.dataset.alone], { part: alone ? button.value : "" });
      });
    }
  }
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => {
      byId("zoom-layer").value = "";
      actions[button.dataset.zoom]();
    });
  }
  byId("zoom-layer").addEventListener("change", (event) => {
    const [lo, hi] = (event.target.value || `0 ${data.cycles}`).split(" ").map(Number);
    show(lo, hi);
  });
  document.querySelectorAll(".pan").forEach(pannable);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setAll(ink(false)));
  // Paper is white, and nobody waits for it: views draw at once.
  const redraw = (printing) => {
    for (const view of Object.values(views)) {
      for (const [name, value] of Object.entries(ink(printing))) view.signal(name, value);
      view.run();
    }
  };
  addEventListener("beforeprint", () => {
    for (const legend of document.querySelectorAll(".legend")) legend.open = true;
    redraw(true);
  });
  addEventListener("afterprint", () => redraw(false));

  Promise.all(Object.entries(data.charts).map(([name, chart]) => draw(name, chart))).then(() => {
    filter(byId("filter").value); // browsers restore fields when a page is loaded again
    show(0, data.cycles);
    document.documentElement.dataset.ready = "";
  });
  window.marsReport = { views, state }; // for the console and the tests
})();
