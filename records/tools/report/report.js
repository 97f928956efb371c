"use strict";
(() => {
let data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();  // keys of the lines that are not shown
const choice = {x: "step", y: "loss"};
const EARLY = {loss: 0.05, difference: 0.25};  // of the run: left out at first, as in the figures of `plot`
const NARROW = 600;  // pixels
const byId = id => document.getElementById(id);
const grouped = value => value.toLocaleString("en-US", {maximumFractionDigits: 3});
const last = values => values[values.length - 1];
const inkOf = g => `--group-${data.groups[g].label === "failed" ? 5 : Math.min(g, 4)}`;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** An element with properties or attributes; text is always text, never markup. */
function make(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    name in node && name !== "role" ? node[name] = value : node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function swatch(g) {
  const node = make("span", {className: "swatch"});
  node.style.setProperty("--colour", `var(${inkOf(g)})`);
  return node;
}

/** Digits behind the point of the number that has most of them: as many as the log prints. */
function decimalsOf(values) {
  return Math.max(0, ...values.map(value => value === null ? 0 : (String(value).split(".")[1] || "").length));
}

// ---------------------------------------------------------------------------------------------------------------------
// Lines: one for each run, one for each group's mean

const keyOf = (g, run) => `${g} ${run.name}`;
const curves = () => data.groups.flatMap(group => [group.mean, ...group.runs]).filter(Boolean);

function nameOf(group, r) {
  const name = group.runs[r].name.replace(/^([0-9a-f]{8})-[0-9a-f-]{27}$/, "$1");  // of a run id, its beginning
  if (group.runs.length === 1) return `${group.label} (${name})`;
  return `${group.label}, run ${r + 1} (${name})`.replace(/^all, /, "").replace(/ \(run \d+\)$/, "");
}

/** pick(curve, isMean) gives {x, y, tell(i)} or nothing; points without a number are left out. */
function linesOf(pick) {
  const lines = [];
  const add = (g, curve, key, label, isMean) => {
    const found = curve && pick(curve, isMean);
    if (!found) return;
    const known = found.x.map((_, i) => i).filter(i => found.x[i] !== null && found.y[i] !== null);
    const faint = !isMean && data.groups[g].runs.length > 3;
    if (known.length) lines.push({key, label, g, isMean, alpha: isMean ? "" : faint ? "80" : "d0",
                                  width: isMean ? 2.5 : faint ? 1 : 1.75, x: known.map(i => found.x[i]),
                                  y: known.map(i => found.y[i]), tell: i => found.tell(known[i])});
  };
  data.groups.forEach((group, g) => {
    group.runs.forEach((run, r) => add(g, run, keyOf(g, run), nameOf(group, r), false));
    add(g, group.mean, `${g} mean`, group.mean && group.mean.label, true);
  });
  return lines;
}

/** What differences are taken to: the first group's mean, or its first run. */
function reference() {
  const group = data.groups.find(({mean, runs}) => mean || runs.length);
  return group && (group.mean || {...group.runs[0], label: nameOf(group, 0)});
}

function lossLines() {
  const base = reference();
  const xOf = curve => choice.x === "time" ? curve.ms.map(ms => ms === null ? null : ms / 60_000) : curve.step;
  const baseX = base && xOf(base);
  return linesOf((curve, isMean) => {
    const x = xOf(curve), digits = isMean ? 6 : decimalsOf(curve.loss);
    const apart = x.map((at, i) => {
      const expected = at === null ? null : interpolate(baseX, base.loss, at);
      return expected === null || curve.loss[i] === null ? null : 1000 * (curve.loss[i] - expected);
    });
    return {x, y: choice.y === "loss" ? curve.loss : apart, tell: i =>
      `step ${grouped(curve.step[i])}: loss ${curve.loss[i].toFixed(digits)}`
      + (curve.ms[i] === null ? "" : `, ${grouped(curve.ms[i])} ms`)
      + (choice.y === "loss" ? "" : `, difference ${apart[i] < 0 ? "" : "+"}${apart[i].toFixed(3)}`)};
  });
}

function interpolate(x, y, at) {
  const next = x.findIndex(value => value !== null && value >= at);
  if (next < 0 || x[next] !== at && next === 0) return null;
  const share = x[next] === at ? 1 : (at - x[next - 1]) / (x[next] - x[next - 1]);
  return share === 1 ? y[next] : y[next - 1] + share * (y[next] - y[next - 1]);
}

function stepTimeLines() {
  return linesOf(({step_ms: points}, isMean) => points && {...points, tell: i => isMean && i + 1 < points.x.length
    ? `steps ${grouped(points.x[i] + 1)} to ${grouped(points.x[i + 1])}: ${points.y[i]} ms a step`
    : `step ${grouped(points.x[i])}: ${points.y[i]} ms`});
}

function scalarLines(name) {
  return linesOf(({fields, scalars, step}) => {
    const points = fields && fields[name] || scalars[name] && {x: step, y: scalars[name]};
    return points && {...points, tell: i => `step ${grouped(points.x[i])}: ${name} ${points.y[i]}`};
  });
}

/** Final losses: a dot for each run; below, the mean and its interval. */
function finalLines() {
  const lines = [];
  data.groups.forEach(({final, label, runs}, g) => {
    const counted = runs.filter(run => run.counts);
    if (!final) return;
    counted.forEach((run, i) => lines.push({
      key: keyOf(g, run), label: nameOf(data.groups[g], runs.indexOf(run)), g, alpha: "b0", size: 9,
      x: [last(run.loss)], y: [0.1 + 0.12 * (i % 5) - g],
      tell: () => `final loss ${last(run.loss).toFixed(decimalsOf(run.loss))}`}));
    if (counted.length < 2) return;
    const mean = {key: `${g} mean`, label: `${label}, mean of ${counted.length} runs`, g, alpha: "", size: 11};
    const ends = [final.low, final.high], words = ["95% interval from", "95% interval to"];
    lines.push({...mean, width: 4, x: ends, y: [-0.15 - g, -0.15 - g], tell: i => `${words[i]} ${ends[i].toFixed(6)}`},
               {...mean, x: [final.mean], y: [-0.15 - g], tell: () => `final loss ${final.mean.toFixed(6)}`});
  });
  return lines;
}

// ---------------------------------------------------------------------------------------------------------------------
// A chart: zoom, read-out and keyboard around uPlot

class Chart {
  /** spec: title(), lines(), x() names the axis; early() is the share of it that is left out at first. */
  constructor(host, spec) {
    this.spec = {early: () => 0, x: () => "step", marks: () => [], axis: () => ({}), pad: 0, ...spec};
    this.range = null;  // of x, if zoomed
    this.chosen = null;  // {key, x} of the point that is read out
    this.caption = make("figcaption");
    this.out = make("output");
    this.plot = make("div", {className: "plot", tabIndex: 0, role: "group", "aria-roledescription": "chart",
                             "aria-describedby": "keys"});
    host.replaceChildren(make("figure", {className: "chart"}, this.caption, this.out, this.plot));
    this.plot.addEventListener("keydown", event => this.onKey(event));
    new ResizeObserver(() => this.u && this.size().width !== this.u.width && this.u.setSize(this.size()))
      .observe(this.plot);
  }

  size() {
    const width = Math.max(this.plot.clientWidth, 200);
    return {width, height: this.spec.height ? this.spec.height() : width < NARROW ? 300 : 400};
  }

  /** From the data as they are now; zoom and chosen point stay. */
  draw() {
    this.lines = this.spec.lines();
    if (this.u) this.u.destroy();
    this.u = null;
    this.caption.textContent = this.spec.title();
    this.plot.setAttribute("aria-label", `${this.spec.title()}, against ${this.spec.x()}. ${this.lines.length} lines.`);
    if (!this.lines.length) return;
    const ends = [...this.lines.flatMap(line => [line.x[0], last(line.x)]), ...this.spec.marks()];
    const [low, high] = [Math.min(...ends), Math.max(...ends)], pad = low < high ? this.spec.pad * (high - low) : 0.5;
    this.whole = [low - pad, high + pad];
    const start = low + this.spec.early() * (high - low);
    this.home = start > low ? [start, this.whole[1]] : this.whole;
    this.u = new uPlot(this.options(), uPlot.join(this.lines.map(line => [line.x, line.y])), this.plot);
    this.marker = make("div", {className: "marker", hidden: true});
    this.u.over.append(this.marker);
    this.u.over.addEventListener("mousemove", event => this.chooseNearest(event));
    this.u.over.addEventListener("mouseleave", () => this.u.setSeries(null, {focus: true}));
    this.setRange(this.range);
  }

  options() {
    const font = "12px system-ui, sans-serif";
    const axis = {stroke: css("--soft"), font, labelFont: font, grid: {stroke: css("--grid"), width: 1},
                  ticks: {stroke: css("--grid"), size: 5}};
    const numbers = (u, splits, i, space, step) => {
      const digits = decimalsOf([+step.toPrecision(3)]);
      const format = {minimumFractionDigits: digits, maximumFractionDigits: digits};
      return splits.map(value => value.toLocaleString("en-US", format));
    };
    // The last label of the x axis is centred on its tick, which may stand at the plot's edge.
    const right = u => Math.max(14, 4 * (last(u.axes[0]._values || []) || "").length);
    const wide = (u, values) => values ? 18 + 7 * Math.max(...values.map(value => value.length)) : 50;
    return {
      ...this.size(), legend: {show: false}, focus: {alpha: 0.3}, padding: [8, right, 0, 0],
      cursor: {points: {show: false}, drag: {x: true, y: false},
               bind: {dblclick: () => () => { this.setRange(null); return null; }}},
      scales: {x: {time: false, range: (u, min, max) => this.clamp(min, max)},
               y: {range: (u, min, max) => this.spec.yRange ? this.spec.yRange()
                   : min === null ? [0, 1] : uPlot.rangeNum(min, max, 0.06, false)}},
      axes: [{...axis, label: this.spec.x(), labelSize: 20, size: 32, values: numbers},
             {...axis, size: wide, values: numbers, ...this.spec.axis()}],
      series: [{}, ...this.lines.map(line => ({
        stroke: css(inkOf(line.g)) + line.alpha, width: line.width, show: !hidden.has(line.key), spanGaps: true,
        paths: line.isMean && this.spec.stepped ? uPlot.paths.stepped({align: 1}) : undefined,
        points: {show: line.x.length === 1, size: line.size || 6, fill: css(inkOf(line.g)) + line.alpha}
      }))],
      hooks: {setScale: [u => { if (this.u === u) this.keep(u.scales.x.min, u.scales.x.max); }],
              draw: [() => this.place(), ...(this.spec.paint ? [this.spec.paint] : [])]}};
  }

  clamp(min, max) {
    const [low, high] = this.whole, least = (high - low) / 2000;
    if (max - min < least) [min, max] = [(min + max - least) / 2, (min + max + least) / 2];
    return [Math.max(min, low), Math.min(max, high)];
  }

  keep(min, max) { this.range = min === this.home[0] && max === this.home[1] ? null : [min, max]; }

  setRange(range) {
    const [min, max] = this.clamp(...(range || this.home));
    this.keep(min, max);
    if (this.u) this.u.setScale("x", {min, max});
  }

  view() { return this.range || this.home; }

  zoom(factor) {
    const [min, max] = this.view(), point = this.point();
    const middle = point && point.x >= min && point.x <= max ? point.x : (min + max) / 2;
    const width = Math.min((max - min) * factor, this.whole[1] - this.whole[0]);
    this.shift(middle - (middle - min) / (max - min) * width, width);
  }

  move(share) {
    const [min, max] = this.view();
    this.shift(min + share * (max - min), max - min);
  }

  shift(min, width) {
    min = Math.min(Math.max(min, this.whole[0]), this.whole[1] - width);
    this.setRange([min, min + width]);
  }

  /** Shows the lines that are not hidden. */
  update() {
    if (!this.u) return;
    this.u.batch(() => this.lines.forEach((line, i) => {
      if (this.u.series[i + 1].show === hidden.has(line.key)) this.u.setSeries(i + 1, {show: !hidden.has(line.key)});
    }));
    if (this.chosen && !this.point()) this.choose(null);
  }

  shown() { return this.lines.filter(line => !hidden.has(line.key)); }

  /** The chosen point, or null if its line is hidden or gone. */
  point() {
    const {key, x} = this.chosen || {}, line = this.shown().find(found => found.key === key && found.x.includes(x));
    return line ? {line, i: line.x.indexOf(x), x, y: line.y[line.x.indexOf(x)]} : null;
  }

  choose(line, i) {
    this.chosen = line && {key: line.key, x: line.x[i]};
    this.u.setSeries(line ? this.lines.indexOf(line) + 1 : null, {focus: true});
    this.out.replaceChildren(...(line ? [swatch(line.g), `${line.label} \u2014 ${line.tell(i)}`] : []));
    const [min, max] = this.view();
    if (line && (line.x[i] < min || line.x[i] > max)) this.shift(line.x[i] - (max - min) / 2, max - min);
    this.place();
  }

  chooseNearest(event) {
    const {x: {min, max}, y: {min: low, max: high}} = this.u.scales, box = this.u.over.getBoundingClientRect();
    let nearest = Infinity, found = null;
    for (const line of this.shown()) {
      for (let i = 0; i < line.x.length; i++) {
        if (line.x[i] < min || line.x[i] > max) continue;
        const dx = (line.x[i] - min) / (max - min) * box.width - (event.clientX - box.left);
        const dy = (high - line.y[i]) / (high - low) * box.height - (event.clientY - box.top);
        if (dx * dx + dy * dy < nearest) [nearest, found] = [dx * dx + dy * dy, [line, i]];
      }
    }
    if (found) this.choose(...found);
  }

  place() {
    const point = this.u && this.point();
    if (!this.marker) return;
    this.marker.hidden = !point || point.x < this.u.scales.x.min || point.x > this.u.scales.x.max;
    if (!point) return;
    this.marker.style.left = `${this.u.valToPos(point.x, "x")}px`;
    this.marker.style.top = `${this.u.valToPos(point.y, "y")}px`;
  }

  /** The next point of the chosen line; at first, the first or last in view of the last line. */
  along(by) {
    const point = this.point(), line = point ? point.line : last(this.shown());
    if (!line) return;
    const inView = line.x.map((_, i) => i).filter(i => line.x[i] >= this.view()[0] && line.x[i] <= this.view()[1]);
    const i = point ? point.i + by : by > 0 ? inView[0] || 0 : inView.length ? last(inView) : 0;
    this.choose(line, Math.min(Math.max(i, 0), line.x.length - 1));
  }

  /** The next line, at the point nearest in x. */
  across(by) {
    const point = this.point(), shown = this.shown();
    if (!point) return this.along(-1);
    const line = shown[(shown.indexOf(point.line) + by + shown.length) % shown.length];
    const gap = i => Math.abs(line.x[i] - point.x);
    this.choose(line, line.x.reduce((best, _, i) => gap(i) < gap(best) ? i : best, 0));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.u) return;
    const sideways = by => event.shiftKey ? this.move(0.25 * by) : this.along(by);
    const actions = {"+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
                     "0": () => this.setRange(null), Escape: () => this.choose(null),
                     ArrowUp: () => this.across(1), ArrowDown: () => this.across(-1),
                     ArrowLeft: () => sideways(-1), ArrowRight: () => sideways(1)};
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  }
}

/** The target across the final losses. */
function paintTarget(u) {
  if (data.target === null) return;
  const x = u.valToPos(data.target, "x", true), {left, top, width, height} = u.bbox;
  if (x < left || x > left + width) return;
  Object.assign(u.ctx, {strokeStyle: css("--ink"), fillStyle: css("--ink"), lineWidth: devicePixelRatio,
                        textBaseline: "top", font: `${12 * devicePixelRatio}px system-ui, sans-serif`,
                        textAlign: x > left + width / 2 ? "right" : "left"});
  u.ctx.setLineDash([5 * devicePixelRatio, 3 * devicePixelRatio]);
  u.ctx.beginPath();
  u.ctx.moveTo(x, top);
  u.ctx.lineTo(x, top + height);
  u.ctx.stroke();
  u.ctx.setLineDash([]);
  u.ctx.fillText(` target ${data.target} `, x, top);
}

// ---------------------------------------------------------------------------------------------------------------------
// Legend, tables, texts

function checkbox(key) {
  const box = make("input", {type: "checkbox", checked: !hidden.has(key)});
  box.dataset.key = key;
  box.addEventListener("change", () => toggle([box]));
  return box;
}

/** Hides and shows what the boxes stand for. */
function toggle(boxes) {
  boxes.forEach(box => box.checked ? hidden.delete(box.dataset.key) : hidden.add(box.dataset.key));
  charts.forEach(chart => chart.update());
}

function legend() {
  byId("legend").replaceChildren(...data.groups.map((group, g) => {
    const head = make("div", {className: "group-head"}, make("strong", {}, swatch(g), group.label));
    if (group.mean) head.append(make("label", {}, checkbox(`${g} mean`), "mean"));
    const boxes = group.runs.map(run => checkbox(keyOf(g, run)));
    if (!boxes.length) return make("div", {className: "group"}, head);
    const all = make("input", {type: "checkbox"});
    const refresh = () => {
      const shown = boxes.filter(box => box.checked).length;
      all.checked = shown > 0;
      all.indeterminate = shown > 0 && shown < boxes.length;
    };
    all.addEventListener("change", () => {
      boxes.forEach(box => { box.checked = all.checked; });
      toggle(boxes);
    });
    boxes.forEach(box => box.addEventListener("change", refresh));
    refresh();
    head.append(make("label", {}, all, boxes.length === 1 ? "1 run" : `${boxes.length} runs`));
    const runs = group.runs.map((run, r) => make("label", {title: run.name}, boxes[r], `${r + 1}`, make(
      "span", {className: "value"}, run.loss.length ? last(run.loss).toFixed(decimalsOf(run.loss)) : "no loss")));
    const summary = make("summary", {className: "plain"}, "each run, with its last loss");
    return make("div", {className: "group"}, head,
      make("details", {open: boxes.length < 9}, summary, make("div", {className: "group-runs"}, ...runs)));
  }));
}

function table({caption, header, rows}) {
  const isNumber = text => /^[+-]?[\d,.]*(e-?\d+| to [+-]?[\d.]+)?$/.test(text);
  const numeric = header.map((_, i) => i > 0 && rows.every(row => isNumber(row[i])));
  const cells = (row, scope) => row.map((text, i) => make(scope === "col" || i === 0 ? "th" : "td", {
    className: numeric[i] ? "number" : "", ...(scope === "col" || i === 0 ? {scope} : {})}, text));
  return make("div", {className: "scroll", tabIndex: 0, role: "region", "aria-label": caption}, make("table", {},
    make("caption", {}, caption), make("thead", {}, make("tr", {}, ...cells(header, "col"))),
    make("tbody", {}, ...rows.map(row => make("tr", {}, ...cells(row, "row"))))));
}

/** Shows the tables that have rows, or says that there is nothing; returns whether there are any. */
function fill(id, tables, nothing = "") {
  const shown = tables.filter(found => found && found.rows.length);
  byId(id).replaceChildren(...shown.map(table), ...(shown.length || !nothing ? [] : [make("p", {}, nothing)]));
  return shown.length > 0;
}

function texts() {
  document.title = document.querySelector("h1").textContent = data.title;
  for (const id of ["headline", "thinning"]) byId(id).textContent = data[id];
  byId("sentences").replaceChildren(...data.sentences.map(text => make("p", {}, text)));
  byId("warnings").replaceChildren(...data.warnings.map(text => make("p", {className: "hint"}, `Warning: ${text}.`)));
  byId("claim").hidden = !fill("sides", [data.sides, data.difference]);
  byId("equal").parentElement.hidden = !fill("equal", data.equal);
  fill("runs", [data.runs]);
  fill("step-table", [data.step_times]);
  fill("machine-table", [data.machine]);
  const [differing, shared] = data.constants;
  byId("constants").hidden = !differing;
  if (differing) {
    fill("constants-differ", [differing], "No constant differs between these runs, but for the seeds.");
    byId("constants-shared").parentElement.hidden = !fill("constants-shared", [shared]);
  }
  byId("source").hidden = !data.source;
  if (data.source) {
    const kinds = {"+": "add", "-": "remove", "@": "place"};
    byId("source-note").textContent = data.source.note;
    byId("diff").parentElement.hidden = !data.source.lines.length;
    byId("diff").replaceChildren(...data.source.lines.map(
      line => make("span", {className: kinds[line[0]] || ""}, line || " ")));
  }
  byId("check").hidden = !data.check;
  if (data.check) {
    byId("verdict").textContent = data.check.verdict;
    fill("findings", [data.check.table]);
    byId("kept").textContent = data.check.kept;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The page

const lossChart = new Chart(byId("loss-chart"), {
  title: () => choice.y === "loss" ? "Validation loss (nats/token)" : "Difference of the loss (0.001 nats/token)",
  x: () => choice.x === "step" ? "step" : "training time (min)",
  lines: lossLines, early: () => EARLY[choice.y]});
const counting = () => data.groups.filter(group => group.final).length;
const finalChart = new Chart(byId("final-chart"), {
  title: () => "A dot is a run; below, their mean with its 95% interval", x: () => "final validation loss (nats/token)",
  lines: finalLines, pad: 0.04, height: () => 75 + 85 * counting(),
  marks: () => data.target === null ? [] : [data.target], paint: paintTarget, yRange: () => [0.6 - counting(), 0.75],
  axis: () => ({splits: () => data.groups.map((_, g) => -g), grid: {show: false}, ticks: {show: false},
                values: (u, splits) => splits.map(g => data.groups[-g].final ? data.groups[-g].label : "")})});
const stepChart = new Chart(byId("step-chart"), {
  title: () => "Milliseconds per step; the mean is taken between validations", lines: stepTimeLines, stepped: true});
let charts = [lossChart, finalChart, stepChart], names = "";

/** One small chart for each scalar and each field of the step lines. */
function multiples() {
  const found = [...new Set(curves().flatMap(
    curve => [...Object.keys(curve.scalars), ...Object.keys(curve.fields || {})]))];
  byId("scalars").hidden = !found.length;
  if (names === found.join()) return;
  names = found.join();
  const hosts = found.map(() => make("div"));
  document.querySelector(".multiples").replaceChildren(...hosts);
  charts = [lossChart, finalChart, stepChart, ...found.map((name, i) => new Chart(hosts[i], {
    title: () => name, lines: () => scalarLines(name), height: () => 210}))];
}

function show() {
  texts();
  legend();
  byId("reference").textContent = reference() ? reference().label : "";
  byId("loss").hidden = !lossLines().length;
  byId("against").hidden = !curves().some(curve => curve.ms.some(ms => ms !== null));
  byId("spread").hidden = !counting();
  byId("final-chart").hidden = finalLines().length < 2;
  byId("step-time").hidden = !stepTimeLines().length;
  multiples();
  charts.forEach(chart => chart.draw());
  const sections = [...document.querySelectorAll("main > section")].filter(section => !section.hidden);
  document.querySelector("nav").replaceChildren(...sections.map(
    section => make("a", {href: `#${section.id}`}, section.querySelector("h2").textContent)));
}

let grew = 0;
async function poll() {
  const line = byId("live");
  try {
    const found = await (await fetch("data.json", {cache: "no-store"})).json();
    if (found.grew && found.grew !== grew) {
      grew = found.grew;
      data = found;
      show();
    }
    line.textContent = found.error || `Live: the log last grew at ${new Date(1000 * grew).toLocaleString()}.`;
    line.classList.remove("lost");
  } catch {
    line.classList.add("lost");
    line.textContent = "The server has ended: this is the last state.";
  }
  setTimeout(poll, 2000);
}

document.querySelectorAll("input[type=radio]").forEach(input => input.addEventListener("change", () => {
  choice[input.name] = input.value;
  lossChart.range = lossChart.chosen = null;
  lossChart.out.replaceChildren();
  lossChart.draw();
}));
show();
if (data.live) {
  byId("live").hidden = false;
  poll();
}
})();
