// Draws the figures of a report as they come near the screen, and lets the reader switch series, zoom over steps and
// read values. The page's policy allows this script and the libraries, and no `eval`: Vega interprets its expressions.
"use strict";
(async () => {
  const unnamed = (key, value) => (key === "legend" ? null : value); // The page has legends of its own.
  /** Return the content of each element that a selector finds, which is compressed JSON. */
  const unpacked = selector => Promise.all([...document.querySelectorAll(selector)].map(async one => {
    const bytes = Uint8Array.from(atob(one.textContent), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text(), unnamed);
  }));
  const DRAG = 6; // Pixels from which a movement is a drag.
  const [theme, library] = await unpacked("#theme, #library");
  const element = (tag, name, parent) => {
    const made = Object.assign(document.createElement(tag), {className: name});
    parent.append(made);
    return made;
  };
  const tip = element("div", "tip", document.body);
  const shown = value => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)
    ? value.toExponential(3) : String(value));

  /** Return the rows of a table that are `kept`: lists are columns, other values are the same in each row. */
  const rows = (table, kept) => table.flatMap(part => {
    const lists = Object.entries(part).filter(([, cells]) => Array.isArray(cells));
    const row = place => ({...part, ...Object.fromEntries(lists.map(([name, cells]) => [name, cells[place]]))});
    return lists[0][1].map((_, place) => row(place)).filter(kept);
  });

  /** Show lines of text beside the pointer; nothing without lines. */
  const say = (lines, event) => {
    tip.replaceChildren();
    for (const [textContent, style] of lines) Object.assign(element("div", style, tip), {textContent});
    tip.hidden = !lines.length;
    if (!event) return;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
  };

  class Chart {
    constructor(box, content) {
      const values = Object.fromEntries(content.spec.params.map(one => [one.name, one.value]));
      const {names, include, shown: ends, steps} = values;
      Object.assign(this, content, {box, names, include, ends, full: steps, range: steps, hidden: new Set()});
      Object.assign(this, {section: box.closest("section"), figure: box.closest("figure"), near: false, stale: true});
    }
    /** Draw what changed since the last time. */
    async draw() {
      this.stale = false;
      const [low, high] = this.range ?? [], whole = this.range === this.full;
      const kept = row => !this.hidden.has(row.a) && (whole || (row.x >= low && row.x <= high));
      const tables = Object.entries(this.tables).filter(([, table]) => table.length);
      const datasets = Object.fromEntries(tables.map(([name, table]) => [name, rows(table, kept)]));
      if (!whole) datasets.ends = []; // Labels at the ends of lines are apart on the whole axis alone.
      if (!this.view) await this.make(datasets);
      for (const name in datasets) this.view.data(name, datasets[name]);
      const ends = whole ? this.ends : this.fitted(datasets.values);
      if (this.full) this.view.signal("steps", this.range).signal("shown", ends);
      await this.view.runAsync();
    }
    async make(datasets) {
      const hover = (_, event, __, text) => say(text ? [[text, ""]] : [], event);
      const options = {actions: false, ast: true, config: theme, renderer: "svg", logLevel: 1, defaultStyle: false};
      const tooltip = this.full ? () => {} : hover;
      this.view = (await vegaEmbed(this.box, {...this.spec, datasets}, {...options, tooltip})).view;
      this.box.style.minHeight = "";
      if (this.full) this.listen();
    }
    /** Return the ends of the vertical axis for the rows that are shown. */
    fitted(found) {
      const drawn = [...found.map(row => row.y).filter(y => y !== null), ...this.include];
      const [low, high] = [Math.min(...drawn), Math.max(...drawn)];
      return low < high ? [low, high] : this.ends;
    }
    /** Return the step below a horizontal position on the screen. */
    step(clientX) {
      const svg = this.box.querySelector("svg"), {left, width} = svg.getBoundingClientRect();
      const place = (clientX - left) * svg.viewBox.baseVal.width / width - this.view.origin()[0];
      const step = this.view.scale("x").invert(place);
      return Math.min(this.range[1], Math.max(this.range[0], step));
    }
    /** Put the cursor over the plot from one step to another; hide it without steps. */
    span(from, to = from) {
      this.cursor.hidden = !(from >= this.range[0] && to <= this.range[1]);
      if (this.cursor.hidden) return;
      const svg = this.box.querySelector("svg"), ratio = svg.clientWidth / svg.viewBox.baseVal.width;
      const [left, right] = [from, to].map(step => ratio * (this.view.origin()[0] + this.view.scale("x")(step)));
      Object.assign(this.cursor.style, {left: `${left}px`, width: `${right - left}px`});
    }
    listen() {
      this.cursor = element("i", "cursor", this.box);
      this.cursor.hidden = true;
      let start = null;
      const dragged = event => start !== null && Math.abs(event.clientX - start) > DRAG;
      const reach = event => [start, event.clientX].map(x => this.step(x)).sort((a, b) => a - b);
      const on = (kinds, listener) => kinds.split(" ").forEach(kind => this.box.addEventListener(kind, listener));
      on("pointerdown", event => { start = event.clientX; });
      on("pointerdown pointermove", event => {
        this.read(event);
        if (!dragged(event)) return;
        this.box.setPointerCapture(event.pointerId);
        this.span(...reach(event));
      });
      on("pointerup", event => {
        const [low, high] = dragged(event) ? reach(event) : [];
        if (high - low >= 1) zoom(this.section, [Math.floor(low), Math.ceil(high)]);
      });
      on("pointerup pointercancel", event => {
        start = null;
        this.read(event);
      });
      on("pointerleave", () => { say([]); mark(this.section); });
      on("dblclick", () => zoom(this.section));
    }
    /** Show the values of all series at the step below the pointer. */
    read(event) {
      const step = Math.round(this.step(event.clientX)), lines = [[`step ${step}`, ""]];
      for (const {a, k, x, y} of this.tables.values) {
        if (this.hidden.has(a) || step < x[0] || step > x.at(-1)) continue;
        let near = x.findIndex(other => other >= step);
        if (near > 0 && step - x[near - 1] < x[near] - step) near -= 1;
        const at = x[near] === step ? "" : ` (step ${x[near]})`;
        lines.push([`${this.names[k]}: ${y[near] === null ? "-" : shown(y[near])}${at}`, `s${a % 8}`]);
      }
      const reach = (this.range[1] - this.range[0]) / 80;
      for (const one of this.tables.events)
        if (Math.abs(one.x[0] - step) <= reach && !this.hidden.has(one.a)) lines.push([one.text, ""]);
      say(lines, event);
      mark(this.section, step);
    }
  }

  document.body.append(Object.assign(document.createElement("script"), {textContent: library}));
  const contents = await unpacked(".figure");
  const charts = [...document.querySelectorAll(".chart")].map((box, place) => new Chart(box, contents[place]));
  const sections = new Set(charts.filter(one => one.full).map(one => one.section));
  const zoomable = section => charts.filter(one => one.full && one.section === section);
  const drawOne = chart => chart.draw().catch(error => console.error(`${chart.key}:`, error));
  let drawing = false;

  /** Draw the figures near the screen that changed, and let the browser paint after each. */
  async function drawNear() {
    if (drawing) return;
    drawing = true;
    for (let chart; (chart = charts.find(one => one.near && one.stale && one.box.clientWidth));) {
      await drawOne(chart);
      await new Promise(done => setTimeout(done));
    }
    drawing = false;
  }

  /** Draw a line at a step in all figures of a section; none without a step. */
  const mark = (section, step) => zoomable(section).forEach(one => one.cursor && one.near && one.span(step));

  /** Show a range of steps in all figures of a section that have any of them; every step without a range. */
  function zoom(section, range) {
    for (const chart of zoomable(section)) {
      const [low, high] = range ? [Math.max(range[0], chart.full[0]), Math.min(range[1], chart.full[1])] : [];
      chart.range = low < high ? [low, high] : chart.full;
      chart.stale = true;
    }
    drawNear();
    section.querySelectorAll(".zoom input").forEach((input, place) => { input.value = range ? range[place] : ""; });
  }

  /** Make the entries of a legend switches of their series, in its figure or in all figures of its section. */
  for (const entry of document.querySelectorAll(".legend [data-style]")) {
    const inside = entry.closest("figure") ?? entry.closest("section"), style = +entry.dataset.style;
    const own = one => inside.contains(one.box) && (inside === one.figure || !one.figure.querySelector(".legend"));
    Object.assign(entry, {tabIndex: 0, role: "button", ariaPressed: "true"});
    const toggle = event => {
      if (event.key && event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      const on = entry.ariaPressed !== "true";
      entry.ariaPressed = String(on);
      for (const chart of charts.filter(own)) {
        chart.hidden[on ? "delete" : "add"](style);
        chart.stale = true;
      }
      drawNear();
    };
    for (const kind of ["click", "keydown"]) entry.addEventListener(kind, toggle);
  }

  /** Put the fields of the range of steps before the figures of a section. */
  for (const section of sections) {
    const all = zoomable(section).map(one => one.full);
    const ends = [Math.min(...all.map(one => one[0])), Math.max(...all.map(one => one[1]))];
    const field = (name, end) => `<input type=number aria-label="${name}" placeholder=${end}>`;
    const form = element("form", "zoom", section);
    form.innerHTML = `Steps ${field("first step", ends[0])} to ${field("last step", ends[1])}
      <button type=reset>All steps</button>
      <span class=note>Drag across a figure to zoom; double-click for all steps.</span>`;
    section.querySelector(".grid-of").before(form);
    form.addEventListener("change", () => {
      const range = [...form.querySelectorAll("input")].map((one, place) => +(one.value || ends[place]));
      zoom(section, range[0] < range[1] ? range : null);
    });
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("reset", () => zoom(section));
  }

  tip.hidden = true;
  document.getElementById("undrawn").remove();
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) charts.find(one => one.box === entry.target).near = entry.isIntersecting;
    drawNear();
  }, {rootMargin: "50%"});
  charts.forEach(one => observer.observe(one.box));
  // The browser prints as soon as the listener and its promises are done, so nothing may wait for a timer here.
  addEventListener("beforeprint", () => charts.filter(one => one.stale && one.box.clientWidth).forEach(drawOne));
})();
