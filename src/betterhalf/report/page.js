// Draws the figures of a report as they come near the screen, and lets the reader switch series, zoom over steps and
// read values. Runs after Vega-Embed, whose expression interpreter needs no `eval`: the page's policy forbids it.
"use strict";
(() => {
  const element = (tag, name, parent) => {
    const made = Object.assign(document.createElement(tag), {className: name});
    parent?.append(made);
    return made;
  };
  const theme = JSON.parse(document.getElementById("theme").textContent);
  const tip = element("div", "tip", document.body);
  const charts = [];
  let drawing = false;
  const AXIS = 40; // Height in pixels that a figure needs below its plot area.
  const POINTS_PER_PIXEL = 0.7; // Of each line over steps; more cost time and look the same.
  const ERRORS_ALONE = 1; // Vega's log level.
  const shown = value => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)
    ? value.toExponential(3) : String(+value.toPrecision(5)));

  /** Return the lowest and highest of each few rows, in order, so that about `most` are left and every spike is seen. */
  const thin = (found, most) => {
    if (found.length <= most) return found;
    const size = Math.ceil(2 * found.length / most), left = new Set();
    for (let start = 0; start < found.length; start += size) {
      const bucket = found.slice(start, start + size).sort((a, b) => a.y - b.y);
      const drawn = bucket.filter(row => row.y !== null);
      for (const row of drawn.length ? [drawn[0], drawn.at(-1)] : bucket.slice(0, 1)) left.add(row);
    }
    return found.filter(row => left.has(row));
  };

  /** Return the rows of a table of columns that are `kept`: lists are columns, other values are the same in each row. */
  const rows = (table, kept, most) => table.flatMap(part => {
    const lists = Object.entries(part).filter(([, cells]) => Array.isArray(cells));
    const all = lists[0][1].map((_, row) => {
      const made = {...part};
      for (const [key, cells] of lists) made[key] = cells[row];
      return made;
    });
    return thin(all.filter(kept), most);
  });

  /** Show lines of text beside the pointer; nothing without lines. */
  const say = (lines, event) => {
    tip.replaceChildren(...lines.map(line => Object.assign(element("div"), {textContent: line.text,
      className: line.style === undefined ? "" : `s${line.style % 8}`})));
    tip.hidden = !lines.length;
    if (!event) return;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
  };

  class Chart {
    constructor(box) {
      Object.assign(this, JSON.parse(box.parentElement.querySelector("script").textContent));
      this.box = box;
      this.section = box.closest("section");
      this.figure = box.closest("figure");
      this.hidden = new Set();
      this.full = this.spec.params.find(one => one.name === "full")?.value;
      this.range = this.full;
      this.near = false;
      this.stale = true;
      box.style.minHeight = `${this.spec.height + AXIS}px`;
    }
    /** Draw what changed since the last time. */
    async draw() {
      this.stale = false;
      const [low, high] = this.range ?? [];
      const kept = row => !this.hidden.has(row.a) && (!this.full || (row.x >= low && row.x <= high));
      const most = this.full ? POINTS_PER_PIXEL * this.box.clientWidth : Infinity;
      const drawn = Object.entries(this.tables).filter(([, table]) => table.length);
      const data = drawn.map(([name, table]) => [name, rows(table, kept, most)]);
      if (!this.view) await this.make(Object.fromEntries(data));
      else for (const [name, found] of data) this.view.data(name, found);
      if (this.full) this.view.signal("from", low).signal("to", high);
      await this.view.runAsync();
    }
    async make(datasets) {
      this.spec.datasets = datasets;
      const tooltip = (_, event, __, value) =>
        say(value ? Object.entries(value).map(([key, text]) => ({text: `${key} ${text}`.trim()})) : [], event);
      const made = await vegaEmbed(this.box, this.spec, {actions: false, ast: true, config: theme, renderer: "svg",
        logLevel: ERRORS_ALONE, defaultStyle: false, tooltip: this.full ? () => {} : tooltip});
      this.view = made.view;
      this.box.style.minHeight = "";
      if (this.full) {
        this.brush = element("i", "brush", this.box);
        this.cross = element("i", "cross", this.box);
        this.cross.hidden = true;
        this.listen();
      }
    }
    /** Return the step below a horizontal position on the screen, and pixels of the screen per pixel of the figure. */
    place(clientX) {
      const svg = this.box.querySelector("svg"), area = svg.getBoundingClientRect();
      const ratio = area.width / svg.viewBox.baseVal.width, left = area.left + ratio * this.view.origin()[0];
      const step = this.view.scale("x").invert((clientX - left) / ratio);
      return {step: Math.min(this.range[1], Math.max(this.range[0], step)), left, ratio};
    }
    /** Return the position of a step on the screen, from the left of the box. */
    position(step) {
      const {left, ratio} = this.place(0);
      return left + ratio * this.view.scale("x")(step) - this.box.getBoundingClientRect().left;
    }
    listen() {
      let start = null;
      const stop = () => { start = null; this.brush.style.width = "0"; };
      this.box.addEventListener("pointerdown", event => {
        start = event.clientX;
        this.read(event);
      });
      this.box.addEventListener("pointermove", event => {
        this.read(event);
        if (start === null) return;
        if (Math.abs(event.clientX - start) > 6) this.box.setPointerCapture(event.pointerId);
        const [low, high] = [start, event.clientX].sort((a, b) => a - b).map(x => this.position(this.place(x).step));
        Object.assign(this.brush.style, {left: `${low}px`, width: `${high - low}px`});
      });
      this.box.addEventListener("pointerup", event => {
        const from = start;
        stop();
        if (from === null || Math.abs(event.clientX - from) <= 6) return;
        const [low, high] = [from, event.clientX].map(x => this.place(x).step).sort((a, b) => a - b);
        if (high - low >= 1) zoom(this.section, [Math.floor(low), Math.ceil(high)]);
      });
      this.box.addEventListener("pointercancel", stop);
      this.box.addEventListener("pointerleave", () => { say([]); mark(this.section, null); });
      this.box.addEventListener("dblclick", () => zoom(this.section, null));
    }
    /** Show the values of all series at the step below the pointer. */
    read(event) {
      const step = Math.round(this.place(event.clientX).step), lines = [{text: `step ${step}`}];
      for (const {a, k, x, y} of this.tables.values) {
        if (this.hidden.has(a) || step < x[0] || step > x.at(-1)) continue;
        let near = x.findIndex(other => other >= step);
        if (near > 0 && step - x[near - 1] < x[near] - step) near -= 1;
        const at = x[near] === step ? "" : ` (step ${x[near]})`;
        lines.push({text: `${this.names[`${a}.${k}`]}: ${y[near] === null ? "-" : shown(y[near])}${at}`, style: a});
      }
      const reach = (this.range[1] - this.range[0]) / 80;
      for (const one of this.tables.events ?? [])
        if (Math.abs(one.x[0] - step) <= reach && !this.hidden.has(one.a)) lines.push({text: one.text});
      say(lines, event);
      mark(this.section, step);
    }
  }

  /** Draw a figure; one that fails does not stop the others. */
  const drawOne = chart => chart.draw().catch(error => console.error(`${chart.key}:`, error));

  /** Draw the figures near the screen that changed, and let the browser paint after each. */
  async function drawNear() {
    if (drawing) return;
    drawing = true;
    for (let chart; (chart = charts.find(one => one.near && one.stale && one.box.clientWidth));) {
      await drawOne(chart);
      await new Promise(done => setTimeout(done));
    }
    drawing = false;
    document.body.dataset.drawn = charts.filter(one => one.view).length;
  }

  /** Draw a line at a step in all figures of a section; none without a step. */
  function mark(section, step) {
    for (const chart of charts) {
      if (chart.section !== section || !chart.cross) continue;
      const inside = step !== null && chart.near && step >= chart.range[0] && step <= chart.range[1];
      chart.cross.hidden = !inside;
      if (inside) chart.cross.style.left = `${chart.position(step)}px`;
    }
  }

  /** Show a range of steps in all figures of a section that have any of them; every step without a range. */
  function zoom(section, range) {
    for (const chart of charts) {
      if (chart.section !== section || !chart.full) continue;
      const [low, high] = range ? [Math.max(range[0], chart.full[0]), Math.min(range[1], chart.full[1])] : chart.full;
      chart.range = low < high ? [low, high] : chart.full;
      chart.stale = true;
    }
    drawNear();
    section.querySelectorAll(".zoom input").forEach((input, place) => { input.value = range ? range[place] : ""; });
  }

  /** Make the entries of a legend switches of their series, in its figure or in all figures of its section. */
  function switches(legend) {
    const inside = legend.closest("figure") ?? legend.closest("section");
    for (const entry of legend.children) {
      Object.assign(entry, {tabIndex: 0, role: "button", ariaPressed: "true"});
      const toggle = () => {
        const on = entry.ariaPressed !== "true", style = +entry.dataset.style;
        entry.ariaPressed = String(on);
        for (const chart of charts) {
          if (!inside.contains(chart.box) || (inside !== chart.figure && chart.figure.querySelector(".legend"))) continue;
          chart.hidden[on ? "delete" : "add"](style);
          chart.stale = true;
        }
        drawNear();
      };
      entry.addEventListener("click", toggle);
      entry.addEventListener("keydown", event => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle();
      });
    }
  }

  /** Put the fields of the range of steps before the figures of a section. */
  function controls(section) {
    const form = element("form", "zoom");
    const fields = ["first step", "last step"].map((name, place) => {
      form.append(place ? " to " : "Steps ");
      return Object.assign(element("input", "", form), {type: "number", ariaLabel: name, placeholder: name});
    });
    const whole = section.querySelector(".chart") && charts.filter(one => one.section === section && one.full);
    const ends = [Math.min(...whole.map(one => one.full[0])), Math.max(...whole.map(one => one.full[1]))];
    fields.forEach((field, place) => { field.placeholder = ends[place]; });
    form.addEventListener("change", () => {
      const range = fields.map((field, place) => (field.value === "" ? ends[place] : +field.value));
      zoom(section, range[0] < range[1] ? range : null);
    });
    form.addEventListener("submit", event => event.preventDefault());
    const all = Object.assign(element("button", "", form), {type: "button", textContent: "All steps"});
    all.addEventListener("click", () => zoom(section, null));
    element("span", "note", form).textContent = "Drag across a figure to zoom; double-click for all steps.";
    section.querySelector(".grid-of").before(form);
  }

  tip.hidden = true;
  for (const box of document.querySelectorAll(".chart")) charts.push(new Chart(box));
  for (const legend of document.querySelectorAll(".legend:not(.heatkey)")) switches(legend);
  for (const section of new Set(charts.filter(one => one.full).map(one => one.section))) controls(section);
  const observer = new IntersectionObserver(entries => {
    for (const entry of entries) charts.find(one => one.box === entry.target).near = entry.isIntersecting;
    drawNear();
  }, {rootMargin: "50%"});
  for (const chart of charts) observer.observe(chart.box);
  // The browser prints as soon as the listener and its promises are done, so nothing may wait for a timer here.
  addEventListener("beforeprint", () => charts.filter(one => one.stale && one.box.clientWidth).forEach(drawOne));
})();
